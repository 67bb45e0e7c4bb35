"""neural_tangents, mended by `_compat`, imports as it should and computes what it should."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
import scipy.linalg
from jax import random

import taylor_softmax._compat as _compat  # isort: split

import neural_tangents

# Untyped: neural_tangents' annotations are narrower than what its functions take and return.
nt: Any = neural_tangents
stax = nt.stax
empirical: Any = _compat.empirical.empirical
predict: Any = _compat.predict.predict

REPOSITORY = Path(__file__).resolve().parents[1]

# Without a rule of its own for a primitive, implementation 3 differentiates it in the ordinary way,
# and says so each time. That is neural_tangents' advice to its own developers.
ignore_missing_rules = pytest.mark.filterwarnings("ignore:No Jacobian rule found:UserWarning")

assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-10)


# Importing


def python(code: str, *options: str, path: Path | None = None) -> str:
    """What a fresh interpreter prints for `code`; `path` goes in front of its search path."""
    prefix = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    done = subprocess.run(
        [sys.executable, *options, "-c", prefix + code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def fake_tensorflow(tmp_path: Path) -> Path:
    """A folder with modules named like those that `neural_tangents.experimental` needs."""
    for name in ("tensorflow", "tf2jax"):
        (tmp_path / f"{name}.py").write_text(
            "from unittest.mock import MagicMock\n"
            "def __getattr__(name):\n"
            "    if name.startswith('__'):\n"
            "        raise AttributeError(name)\n"
            "    return MagicMock()\n"
        )
    return tmp_path


# `jax2tf`, which `experimental` imports too, needs the real TensorFlow.
FAKE_JAX2TF = """
import sys, types
import jax.experimental
jax.experimental.jax2tf = sys.modules["jax.experimental.jax2tf"] = types.ModuleType("jax2tf")
"""


@pytest.mark.quick
def test_import_leaves_everything_else_alone():
    python(
        """
import sys, types
import jax, jax.core, jax.extend.core, jax.numpy, scipy.linalg
from jax.interpreters import ad

def snapshot():
    modules = (jax, jax.core, ad, jax.numpy, scipy, scipy.linalg)
    return dict(jax.config.values), [dict(vars(m)) for m in modules], "jax.util" in sys.modules

before = snapshot()
import taylor_softmax._compat
import neural_tangents as nt
after = snapshot()
assert before[0] == after[0], "jax.config"
for ours, theirs in zip(after[1], before[1]):
    changed = {k for k in ours.keys() | theirs.keys() if ours.get(k) is not theirs.get(k)}
    # A submodule that somebody imports becomes an attribute of its package.
    changed -= {k for k, v in ours.items() if isinstance(v, types.ModuleType)}
    assert not changed, (ours["__name__"], changed)
assert before[2] or not after[2] or hasattr(jax, "util"), "jax.util"
assert not {"tensorflow", "tf2jax", "jax.experimental.jax2tf"} & sys.modules.keys()
""",
        "-Werror",
    )


@pytest.mark.quick
def test_experimental_is_lazy_and_fails_in_the_ordinary_way():
    python(
        """
import inspect, sys
import taylor_softmax._compat
import neural_tangents as nt

def fails(use):
    try:
        use()
    except ModuleNotFoundError as error:
        assert error.name.split(".")[0] in ("tensorflow", "tf2jax", "absl"), error.name
    else:
        raise AssertionError("TensorFlow is installed here")

def explicitly():
    import neural_tangents.experimental

assert type(vars(nt)["experimental"]).__name__ == "_LazyModule"
assert "neural_tangents.experimental" not in sys.modules
inspect.stack()  # asks every module in sys.modules for its file
try:
    import tensorflow
except ModuleNotFoundError:
    for _ in range(2):
        fails(lambda: nt.experimental.empirical_ntk_fn_tf)
        fails(explicitly)
    from neural_tangents import experimental
    fails(lambda: experimental.empirical_ntk_fn_tf)
    assert "neural_tangents.experimental" not in sys.modules
""",
        "-Werror",
    )


def test_experimental_loads_when_used(fake_tensorflow: Path):
    code = """
import taylor_softmax._compat
import neural_tangents as nt
assert "tensorflow" not in sys.modules
assert callable(nt.experimental.empirical_ntk_fn_tf)
assert "tensorflow" in sys.modules and "tf2jax" in sys.modules
assert sys.modules["neural_tangents.experimental"] is nt.experimental
import neural_tangents.experimental
assert neural_tangents.experimental is nt.experimental
"""
    python(FAKE_JAX2TF + code, path=fake_tensorflow)


WORKS = """
import jax.numpy as jnp
k = nt.empirical_ntk_fn(lambda p, x: x @ p, implementation=3)(jnp.eye(2), None, jnp.ones((2, 1)))
assert k.shape == (2, 2)
assert abs(nt.predict.max_learning_rate(k) - 4) < 1e-5
"""


def test_repairs_an_import_that_failed():
    code = """
try:
    import neural_tangents
except Exception:
    print("failed")
import taylor_softmax._compat
import neural_tangents as nt
"""
    if "failed" not in python(code + WORKS):
        pytest.skip("neural_tangents imports by itself here: old JAX, and TensorFlow installed")


@pytest.mark.quick
def test_mends_what_was_imported_first(fake_tensorflow: Path):
    code = """
try:
    import neural_tangents as nt
except ImportError:
    print("failed")
    sys.exit()
experimental = nt.experimental
import taylor_softmax._compat
assert sys.modules["neural_tangents"] is nt and nt.experimental is experimental
"""
    if "failed" in python(FAKE_JAX2TF + code + WORKS, path=fake_tensorflow):
        pytest.skip("neural_tangents cannot be imported first on this JAX, with TensorFlow or not")


@pytest.mark.quick
def test_names_are_only_lent_while_importing():
    with _compat.lending.lent_names():
        from jax.core import Jaxpr  # pyright: ignore[reportAttributeAccessIssue]
        from jax.util import safe_map, safe_zip  # pyright: ignore[reportMissingImports]
    assert Jaxpr is jax.extend.core.Jaxpr
    assert safe_map(lambda x, y: x + y, [1, 2], [3, 4]) == [4, 6]
    assert safe_zip([1, 2], [3, 4]) == [(1, 3), (2, 4)]
    for f in (safe_zip, functools.partial(safe_map, max)):
        with pytest.raises(ValueError, match="argument 2"):
            f([1, 2], [3])
    assert "Jaxpr" not in vars(jax.core)


# Empirical kernels

KEY = random.PRNGKey(0)


def network(*layers, shape=(3, 5)):
    """`(apply_fn, params, x1, x2)`, in float64 where that is on."""
    init_fn, apply_fn, _ = stax.serial(*layers)
    k1, k2, k3 = random.split(KEY, 3)
    return apply_fn, init_fn(k1, shape)[1], random.normal(k2, shape), random.normal(k3, shape)[:2]


def dense():
    return network(stax.Dense(8), stax.Erf(), stax.Dense(3))


def jacobian_contraction(f, x1, x2, params):
    """The definition: sum over parameters of df_i/dp df_j/dp, axes (N1, N2, C1, C2)."""
    j1, j2 = (jax.tree_util.tree_leaves(jax.jacobian(f)(params, x)) for x in (x1, x2))
    return sum(jnp.einsum("ai...,bj...->abij", a, b) for a, b in zip(j1, j2, strict=True))


@pytest.mark.quick(implementation=3, vmap_axes=None)
@ignore_missing_rules
@pytest.mark.parametrize("implementation", [1, 2, 3])
@pytest.mark.parametrize("vmap_axes", [None, 0])
def test_ntk_is_the_jacobian_contraction(implementation, vmap_axes):
    f, params, x1, x2 = dense()
    want = jacobian_contraction(f, x1, x2, params)
    ntk_fn = functools.partial(
        nt.empirical_ntk_fn, f, vmap_axes=vmap_axes, implementation=implementation
    )
    assert_close(jax.jit(ntk_fn(trace_axes=()))(x1, x2, params), want)
    got = ntk_fn(trace_axes=(-1,))(x1, x2, params)
    assert_close(got, jnp.trace(want, axis1=2, axis2=3) / 3)


@pytest.mark.quick(implementation=1)
@ignore_missing_rules
@pytest.mark.parametrize("implementation", [1, 2, 3])
def test_empirical_kernel_fn(implementation):
    f, params, x1, x2 = dense()
    kernel_fn = nt.empirical_kernel_fn(
        f, trace_axes=(), diagonal_axes=(-1,), implementation=implementation
    )
    k = kernel_fn(x1, x2, ("nngp", "ntk"), params)
    want = jacobian_contraction(f, x1, x2, params)
    assert_close(k.ntk, jnp.diagonal(want, axis1=2, axis2=3))
    assert_close(k.nngp, jnp.einsum("ai,bi->abi", f(params, x1), f(params, x2)))


@ignore_missing_rules
def test_auto_chooses_one_of_the_others(capsys):
    f, params, x1, x2 = dense()
    got = nt.empirical_ntk_fn(f, trace_axes=(), implementation=0)(x1, x2, params)
    assert_close(got, jacobian_contraction(f, x1, x2, params))
    # neural_tangents prints what each costs.
    costs = [float(line.split("flops=")[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(costs) == 3
    assert all(0 < cost < np.inf for cost in costs)


@pytest.mark.quick
def test_ntk_vector_product():
    f, params, x1, x2 = dense()
    v = random.normal(KEY, (2, 3))
    got = nt.empirical_ntk_vp_fn(f, x1, x2, params)(v)
    assert_close(got, jnp.einsum("abij,bj->ai", jacobian_contraction(f, x1, x2, params), v))


def attention():
    return stax.GlobalSelfAttention(
        4, n_chan_key=3, n_chan_val=3, n_heads=1, linear_scaling=False, pos_emb_type="SUM"
    )


NETWORKS = {
    "conv": lambda: network(
        stax.Conv(4, (3, 3), padding="SAME"),
        stax.Relu(),
        stax.AvgPool((2, 2)),
        stax.Flatten(),
        stax.LayerNorm(),
        stax.Dense(2),
        shape=(3, 4, 4, 2),
    ),
    "attention": lambda: network(attention(), stax.GlobalAvgPool(), stax.Dense(2), shape=(3, 5, 4)),
    "residual": lambda: network(
        stax.FanOut(2),
        stax.parallel(stax.Identity(), stax.serial(stax.Dense(5), stax.Dropout(0.7))),
        stax.FanInSum(),
        stax.Dense(2),
    ),
}


@pytest.mark.quick(name="conv")
@ignore_missing_rules
@pytest.mark.parametrize("name", NETWORKS)
def test_implementations_agree(name):
    f, params, x1, x2 = NETWORKS[name]()
    rng = {"rng": random.PRNGKey(1)} if name == "residual" else {}
    kernels = [
        jax.jit(nt.empirical_ntk_fn(f, trace_axes=(), implementation=i))(x1, x2, params, **rng)
        for i in (1, 2, 3)
    ]
    assert float(jnp.abs(kernels[0]).max()) > 1e-2
    assert_close(kernels[1], kernels[0])
    assert_close(kernels[2], kernels[0])


WEIGHTS = random.normal(KEY, (5, 4))


FUNCTIONS = {
    "softmax": lambda p, x: jax.nn.softmax(x @ p),
    "slice": lambda p, x: (x @ p)[:, 1:3],
    "gather": lambda p, x: (x @ p)[:, jnp.array([0, 2, 2])],
    "checkpoint": lambda p, x: jax.checkpoint(lambda h: jnp.tanh(jnp.tanh(h)))(x @ p),
    "jit": lambda p, x: jax.jit(lambda h: jnp.tanh(h))(x @ p),
    "loop": lambda p, x: jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h), x @ p),
    "constant": lambda p, x: jnp.sin(x) + 0 * p[0, 0],
}


@ignore_missing_rules
@pytest.mark.parametrize("name", FUNCTIONS)
def test_structured_derivatives_of_other_primitives(name):
    f = FUNCTIONS[name]
    _, _, x1, x2 = dense()
    got = nt.empirical_ntk_fn(f, trace_axes=(), implementation=3)(x1, x2, WEIGHTS)
    assert_close(got, jacobian_contraction(f, x1, x2, WEIGHTS))


@jax.custom_vjp
def two_outputs(h):
    return jnp.sin(h), h**2


two_outputs.defvjp(
    lambda h: (two_outputs(h), h), lambda h, cts: (jnp.cos(h) * cts[0] + 2 * h * cts[1],)
)


def not_structured(params, x):
    """Its linearised version has an equation with two outputs."""
    a, b = two_outputs(x @ params)
    return a * b


@ignore_missing_rules
def test_auto_passes_over_what_structured_derivatives_cannot_do():
    _, _, x1, x2 = dense()
    with pytest.raises(NotImplementedError):
        nt.empirical_ntk_fn(not_structured, implementation=3)(x1, x2, WEIGHTS)
    got = nt.empirical_ntk_fn(not_structured, trace_axes=(), implementation=0)(x1, x2, WEIGHTS)
    assert_close(got, jacobian_contraction(not_structured, x1, x2, WEIGHTS))


@pytest.mark.quick
def test_linearize_and_taylor_expand():
    def f(p, x):
        return jnp.sin(x @ p)

    x, p0, dp = jnp.ones((2, 5)) / 5, WEIGHTS, random.normal(random.PRNGKey(3), WEIGHTS.shape)
    h, dh = x @ p0, x @ dp
    linear = jnp.sin(h) + jnp.cos(h) * dh
    assert_close(nt.linearize(f, p0)(p0 + dp, x), linear)
    assert_close(nt.taylor_expand(f, p0, 1)(p0 + dp, x), linear)
    assert_close(nt.taylor_expand(f, p0, 2)(p0 + dp, x), linear - jnp.sin(h) * dh**2 / 2)


# Analytic kernels, batching, sampling


def analytic(*layers, shape=(4, 5)):
    init_fn, apply_fn, kernel_fn = stax.serial(*layers)
    x = random.normal(KEY, shape)
    return init_fn, apply_fn, kernel_fn, x


@pytest.mark.quick
def test_analytic_dense_kernel_is_the_arc_cosine_one():
    *_, kernel_fn, x = analytic(stax.Dense(1), stax.Relu(), stax.Dense(1))
    k = kernel_fn(x, None, ("nngp", "ntk"))
    gram = np.asarray(x @ x.T) / x.shape[1]
    norms = np.sqrt(np.outer(np.diag(gram), np.diag(gram)))
    angle = np.arccos(np.clip(gram / norms, -1, 1))
    nngp = norms * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
    ntk = nngp + gram * (np.pi - angle) / (2 * np.pi)
    # The arc cosine loses half of its digits at angle 0.
    assert_close(k.nngp, nngp, rtol=1e-6)
    assert_close(k.ntk, ntk, rtol=1e-6)


def identity_attention():
    """The mechanism that has an analytic kernel, with its positional embeddings."""
    return stax.GlobalSelfAttention(
        1,
        n_chan_key=1,
        n_chan_val=1,
        n_heads=1,
        linear_scaling=False,
        attention_mechanism="IDENTITY",
        pos_emb_type="SUM",
    )


LAYERS = {
    "conv": ((stax.Conv(1, (3, 3)), stax.Relu(), stax.Flatten()), (4, 4, 4, 2)),
    "attention": ((identity_attention(), stax.Dropout(0.9), stax.GlobalAvgPool()), (4, 5, 3)),
    "dense": ((stax.Dense(1), stax.LayerNorm(), stax.Erf(), stax.Dropout(0.8)), (4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_batch_and_jit_change_nothing(name):
    layers, shape = LAYERS[name]
    *_, kernel_fn, x = analytic(*layers, stax.Dense(1), shape=shape)
    # Not a part of x: where a batch of both is the same, Dropout takes its entries for variances.
    y = x[2:] + 1
    want = kernel_fn(x, y, ("nngp", "ntk"))
    for f in (
        nt.batch(kernel_fn, batch_size=2, device_count=1),
        jax.jit(kernel_fn, static_argnums=2),
    ):
        got = f(x, y, ("nngp", "ntk"))
        assert_close(got.nngp, want.nngp)
        assert_close(got.ntk, want.ntk)


def test_batch_of_an_empirical_kernel():
    f, params, x1, x2 = dense()
    x1 = jnp.concatenate([x1, x1[:1] + 1])
    ntk_fn = nt.empirical_ntk_fn(f, trace_axes=())
    got = nt.batch(ntk_fn, batch_size=2, device_count=1)(x1, x2, params)
    assert_close(got, jacobian_contraction(f, x1, x2, params))


@pytest.mark.quick
def test_batch_over_two_devices():
    """Through `pmap`. A process has one CPU device unless told before JAX starts."""
    python("""
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import taylor_softmax._compat, jax, numpy as np, neural_tangents as nt
from neural_tangents import stax
jax.config.update("jax_enable_x64", True)
assert jax.local_device_count() == 2
*_, kernel_fn = stax.serial(stax.Dense(1), stax.Relu(), stax.Dense(1))
x = jax.random.normal(jax.random.PRNGKey(0), (8, 3))
want = kernel_fn(x, x[:4], "ntk")
got = nt.batch(kernel_fn, batch_size=2, device_count=2)(x, x[:4], "ntk")
np.testing.assert_allclose(got, want, rtol=1e-5)
""")


def test_monte_carlo_kernel_converges_to_the_analytic_one():
    """With one hidden layer the mean over initialisations is the analytic kernel at any width."""
    n = 300
    init_fn, apply_fn, kernel_fn, x = analytic(stax.Dense(64), stax.Relu(), stax.Dense(1))
    estimate = nt.monte_carlo_kernel_fn(
        init_fn, apply_fn, KEY, n_samples=range(1, n + 1), implementation=2, vmap_axes=0
    )
    # Running means after 1, 2, ..., n samples: their differences give back the samples.
    means = list(estimate(x, None, ("nngp", "ntk")))
    want = kernel_fn(x, None, ("nngp", "ntk"))
    for get in ("nngp", "ntk"):
        totals = np.stack([i * np.asarray(getattr(m, get)) for i, m in enumerate(means, 1)])
        samples = np.diff(totals, axis=0, prepend=0)
        z = (samples.mean(0) - getattr(want, get)) / (samples.std(0, ddof=1) / np.sqrt(n))
        assert np.abs(z).max() < 4


@pytest.mark.quick
def test_global_self_attention_in_jit():
    """Its positional embeddings come through `eval_context` and stay in a cache."""
    init_fn, apply_fn, _, x = analytic(attention(), shape=(2, 5, 4))
    _, params = init_fn(KEY, x.shape)
    inside = jax.jit(apply_fn)(params, x)
    assert_close(jax.vmap(lambda y: apply_fn(params, y[None])[0])(x), inside)
    assert_close(apply_fn(params, x), inside)


# Prediction

N_TRAIN, N_TEST, N_OUT = 6, 3, 2


@pytest.fixture(scope="module")
def task():
    """A network's kernels with themselves and each other, targets, and the kernel function."""
    *_, kernel_fn, x = analytic(
        stax.Dense(1), stax.Erf(), stax.Dense(1, b_std=0.1), shape=(N_TRAIN + N_TEST, 4)
    )
    kernel_fn = jax.jit(kernel_fn, static_argnums=2)
    train, test = x[:N_TRAIN], x[N_TRAIN:]
    get = ("nngp", "ntk")
    y = random.normal(random.PRNGKey(7), (N_TRAIN, N_OUT))
    kernels = [kernel_fn(a, b, get) for a, b in ((train, None), (test, train), (test, None))]
    return kernel_fn, train, test, y, *kernels


def flow(ntk_dd, y, t):
    """`(I - exp(-ntk t / size)) y` and the weights `ntk^-1` times it: gradient flow from 0."""
    ntk_dd = np.asarray(ntk_dd)
    moved = y - scipy.linalg.expm(-ntk_dd * t / y.size) @ y
    return moved, np.linalg.solve(ntk_dd, moved)


@pytest.mark.quick(t=0.7)
@pytest.mark.parametrize("t", [None, 0.7, 30.0])
def test_gradient_descent_mse(task, t):
    _, _, _, y, k_dd, k_td, _ = task
    predict_fn = nt.predict.gradient_descent_mse(k_dd.ntk, y)
    fx_train, fx_test = predict_fn(t, 0.0, 0.0, k_td.ntk)
    moved, weights = flow(k_dd.ntk, y, 1e9 if t is None else t)
    assert_close(fx_train, moved)
    assert_close(fx_test, k_td.ntk @ weights)


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_gradient_descent_follows_the_ode(task, momentum):
    _, _, _, y, k_dd, k_td, _ = task
    predict_fn = nt.predict.gradient_descent(
        lambda fx, y: jnp.mean((fx - y) ** 2) / 2, k_dd.ntk, y, momentum=momentum
    )
    fx_train, fx_test = predict_fn(2.0, jnp.zeros_like(y), jnp.zeros((N_TEST, N_OUT)), k_td.ntk)
    if momentum is None:
        moved, weights = flow(k_dd.ntk, y, 2.0)
    else:
        # f'' = -(1 - momentum) f' / sqrt(rate) - grad, as a first-order system in (f - y, f').
        k = np.asarray(k_dd.ntk) / y.size
        one, zero = np.eye(N_TRAIN), np.zeros((N_TRAIN, N_TRAIN))
        system = np.block([[zero, one], [-k, (momentum - 1) * one]])
        moved = y + (scipy.linalg.expm(2.0 * system) @ np.concatenate([-y, 0 * y]))[:N_TRAIN]
        weights = np.linalg.solve(k_dd.ntk, moved)
    # The ODE solver's own tolerance.
    assert_close(fx_train, moved, rtol=1e-5, atol=1e-6)
    assert_close(fx_test, k_td.ntk @ weights, rtol=1e-5, atol=1e-6)


def posterior(k_dd, k_td, k_tt, y):
    """Mean and covariance, `ntk` being an ensemble's trained for infinite time."""
    k_dd, k_td, k_tt = (
        {g: np.asarray(getattr(k, g)) for g in k._fields} for k in (k_dd, k_td, k_tt)
    )
    w = {g: np.linalg.solve(k_dd[g], k_td[g].T).T for g in ("nngp", "ntk")}
    cross = w["ntk"] @ k_td["nngp"].T
    return {
        "nngp": (w["nngp"] @ y, k_tt["nngp"] - w["nngp"] @ k_td["nngp"].T),
        "ntk": (
            w["ntk"] @ y,
            k_tt["nngp"] + w["ntk"] @ k_dd["nngp"] @ w["ntk"].T - cross - cross.T,
        ),
    }


@pytest.mark.quick
def test_gp_inference_and_ensemble(task):
    kernel_fn, train, test, y, k_dd, k_td, k_tt = task
    want = posterior(k_dd, k_td, k_tt, y)
    gp = nt.predict.gp_inference(k_dd, y)(("nngp", "ntk"), k_td, k_tt)
    ensemble = nt.predict.gradient_descent_mse_ensemble(kernel_fn, train, y)
    trained = ensemble(None, test, ("nngp", "ntk"), compute_cov=True)
    late = ensemble(1e9, test, ("nngp", "ntk"), compute_cov=True)
    for got, get in itertools.product((gp, trained, late), ("nngp", "ntk")):
        mean, covariance = getattr(got, get)
        assert_close(mean, want[get][0], rtol=1e-6, atol=1e-8)
        assert_close(covariance, want[get][1], rtol=1e-6, atol=1e-8)


def test_ensemble_at_a_finite_time(task):
    kernel_fn, train, test, y, k_dd, k_td, _ = task
    got = nt.predict.gradient_descent_mse_ensemble(kernel_fn, train, y)(3.0, test, "ntk")
    assert_close(got, k_td.ntk @ flow(k_dd.ntk, y, 3.0)[1])


PREDICTORS = {
    "mse": lambda k_dd, k_td, y, t: nt.predict.gradient_descent_mse(k_dd, y)(t, 0.0, 0.0, k_td)[1],
    "mse, t=None": lambda k_dd, k_td, y, _: nt.predict.gradient_descent_mse(k_dd, y)(
        None, 0.0, 0.0, k_td
    )[1],
    "gp": lambda k_dd, k_td, y, _: nt.predict.gp_inference(k_dd, y)("ntk", k_td),
    "ode": lambda k_dd, k_td, y, t: nt.predict.gradient_descent(
        lambda fx, y: jnp.mean((fx - y) ** 2) / 2, k_dd, y
    )(t, jnp.zeros_like(y), jnp.zeros((N_TEST, N_OUT)), k_td)[1],
}


@pytest.mark.quick(name="mse")
@pytest.mark.parametrize("name", PREDICTORS)
def test_predicting_inside_transformations(task, name):
    _, _, _, y, k_dd, k_td, _ = task
    f = PREDICTORS[name]
    t = jnp.array(1.5)
    want = f(k_dd.ntk, k_td.ntk, y, t)
    close = functools.partial(assert_close, rtol=1e-6, atol=1e-8)
    close(jax.jit(f)(k_dd.ntk, k_td.ntk, y, t), want)
    scales = jnp.array([1.0, 2.0])
    several = jax.vmap(lambda s: f(s * k_dd.ntk, k_td.ntk, y, t))(scales)
    close(several[0], want)
    close(several[1], f(2 * k_dd.ntk, k_td.ntk, y, t))
    if name == "mse":
        _, slope = jax.jvp(lambda s: f(s * k_dd.ntk, k_td.ntk, y, t), (1.0,), (1.0,))
        h = 1e-5
        up, down = (f((1 + d) * k_dd.ntk, k_td.ntk, y, t) for d in (h, -h))
        assert_close(slope, (up - down) / (2 * h), rtol=1e-4, atol=1e-6)


def calls_of_one_predictor(task):
    """The same predict functions inside one `jit`, inside another and outside."""
    _, _, _, y, k_dd, k_td, _ = task
    gp = nt.predict.gp_inference(k_dd, y)
    mse = nt.predict.gradient_descent_mse(k_dd.ntk, y)

    def infer(k):
        return gp("ntk", k), mse(2.0, None, 0.0, k), mse(None, None, 0.0, k)

    return jax.jit(infer)(k_td.ntk), jax.jit(infer)(k_td.ntk[:2]), infer(k_td.ntk)


def test_a_predict_function_outlives_the_trace_that_called_it_first(task):
    for first, second, outside in zip(*calls_of_one_predictor(task), strict=True):
        assert_close(first, outside)
        assert_close(second, outside[:2])


def predict_in_nested_traces(task):
    """With a kernel of the outer trace, predictions in the inner one first."""
    _, _, _, y, k_dd, k_td, _ = task

    @jax.jit
    def outer(k_dd, k_td):
        predict_fn = nt.predict.gradient_descent_mse(k_dd, y)
        inner = jax.jit(lambda k: predict_fn(2.0, None, 0.0, k))(k_td)
        return inner, predict_fn(2.0, None, 0.0, k_td)

    return outer(k_dd.ntk, k_td.ntk)


def test_predicting_inside_nested_traces(task):
    def evaluates_tracers_of_an_outer_trace(x):
        with jax.ensure_compile_time_eval():
            return x + 1

    try:
        jax.jit(lambda x: jax.jit(lambda: evaluates_tracers_of_an_outer_trace(x))())(1.0)
    except jax.errors.UnexpectedTracerError:
        pytest.skip("`jax.ensure_compile_time_eval` itself fails in nested traces before JAX 0.6")
    _, _, _, y, k_dd, k_td, _ = task
    want = nt.predict.gradient_descent_mse(k_dd.ntk, y)(2.0, None, 0.0, k_td.ntk)
    for got in predict_in_nested_traces(task):
        assert_close(got, want)


@pytest.mark.quick(name="jax")
@pytest.mark.parametrize(
    ("name", "theirs", "use"),
    [
        ("jax", jax, predict_in_nested_traces),
        ("lru_cache", functools.lru_cache, calls_of_one_predictor),
        ("lru_cache", functools.lru_cache, predict_in_nested_traces),
    ],
)
def test_without_the_mend_predicting_inside_jit_leaks(task, monkeypatch, name, theirs, use):
    """Negative control of the tests above."""
    monkeypatch.setattr(predict, name, theirs)
    with pytest.raises(jax.errors.UnexpectedTracerError):
        use(task)


def test_factorisation_is_still_done_once(task, monkeypatch):
    _, _, _, y, k_dd, k_td, _ = task
    done = []
    solver = predict._get_cho_solve
    monkeypatch.setattr(predict, "_get_cho_solve", lambda *a: done.append(a) or solver(*a))
    gp = nt.predict.gp_inference(k_dd, y)
    for _ in range(3):
        gp("ntk", k_td)
    jax.jit(lambda k: gp("ntk", k))(k_td.ntk)
    assert len(done) == 1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_max_learning_rate(task, momentum):
    *_, y, k_dd, _, _ = task
    want = 2 * (1 + momentum) * y.size / np.linalg.eigvalsh(np.asarray(k_dd.ntk))[-1]
    got = nt.predict.max_learning_rate(k_dd.ntk, y_train_size=y.size, momentum=momentum)
    assert_close(got, want)


# What is mended, and no more


@pytest.mark.quick
def test_overlays_are_seen_by_their_importer_only():
    assert predict.jax.core.eval_context is jax.ensure_compile_time_eval
    assert jax.core.eval_context is not jax.ensure_compile_time_eval
    assert predict.jax.numpy is jnp
    assert predict.sp.linalg.eigh is scipy.linalg.eigh
    assert empirical.jnp.size is not jnp.size
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = predict.jax.no_such_name


@pytest.mark.quick
@pytest.mark.parametrize("x", [jnp.ones((2, 3)), np.ones(4), 1.5, jax.ShapeDtypeStruct((2,), "f")])
def test_shape_functions(x):
    shape = np.shape(x) if not isinstance(x, jax.ShapeDtypeStruct) else x.shape
    assert _compat.empirical._shape(x) == shape
    assert _compat.empirical._size(x) == np.prod(shape)
