"""Attention at 1/sqrt(d) against sampling, identities, neural_tangents and finite networks."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import neural_tangents as nt
import numpy as np
import pytest
from jax import random
from neural_tangents.stax import layer

import taylor_softmax
from oracles import attention as oracle
from taylor_softmax import stax
from taylor_softmax._attention import evaluation, rotary
from taylor_softmax._attention.pair import Kernels
from taylor_softmax._numerics.errors import (
    ATTENTION,
    ATTENTION_ROTARY,
    promised,
)
from taylor_softmax._numerics.precision import enable_x64
from taylor_softmax.methods import Direct, QuasiMonteCarlo, Series

# Bound on |z| of the largest of 256 correlated entries, and of the cases below: 1e-4 by chance.
LARGEST_Z = 5.5


def moments(problem, **options):
    """The kernels of a problem of the oracle."""
    present = dict(zip(("present1", "present2"), problem.present, strict=True))
    return taylor_softmax.attention_second_moment(
        **problem.covariances(), **present, scale=problem.scale, **options
    )


def excess(value, mean, stderr, present, tolerance):
    """Largest error beyond what sampling explains, over what is promised: right below 1.

    Over the largest entry, which is below the scale that promises are relative to.
    """
    there = np.outer(*present)
    largest = np.max(np.abs(np.asarray(mean)[there]))
    error = np.abs(np.asarray(value) - mean) - LARGEST_Z * np.asarray(stderr)
    return np.max(error[there]) / (tolerance * largest)


CASES = {
    "2 tokens": {"size": 2, "variance": 1.0},
    "small logits": {"size": 8, "variance": 0.25},
    "16 tokens": {"size": 16, "variance": 1.0},
    "large logits": {"size": 8, "variance": 4.0},
    "negative correlation": {"size": 8, "variance": 1.0, "correlation": -0.7},
    "masked": {"size": 8, "variance": 1.0, "lengths": (5, 7)},
    "varying": {"size": 8, "variance": 1.0, "ratio": 6.0},
    "varying, masked": {"size": 8, "variance": 4.0, "ratio": 6.0, "lengths": (8, 6)},
    "low rank": {"size": 8, "variance": 1.0, "rank": 3},
    "4 tokens": {"size": 4, "variance": 1.0},
}


def tolerances(case):
    """Of NNGP and NTK."""
    # The variance of a problem is that of logits of tokens of mean variance.
    return [promised(ATTENTION, case["variance"] * case.get("ratio", 1.0))] * 2


def rows_of(option, size):
    """What is added to the logits by an argument of `attention_second_moment`."""
    if option.get("causal"):
        return np.where(np.tri(size) > 0, 0, -np.inf)
    if "window" in option:
        before, after = option["window"]
        return np.where(np.tri(size, k=after) - np.tri(size, k=-before - 1) > 0, 0, -np.inf)
    return option["bias"](size) if "bias" in option else np.zeros((size, size))


def slanted(*lengths):
    """A bias with a row of nothing, and one with a single key."""
    rows = np.random.default_rng(7).standard_normal((lengths[0], lengths[-1]))
    rows[2:3], rows[1, 1:] = -np.inf, -np.inf
    return rows


OPTIONS = {
    "": {},
    "order 2": {"order": 2},
    "order 4": {"order": 4},
    "causal": {"causal": True},
    "causal, order 2": {"causal": True, "order": 2, "method": Direct()},
    "window": {"window": (2, 1)},
    "bias": {"bias": slanted},
    "bias, order 4": {"bias": slanted, "order": 4},
    "rotary": {"rotary": 100.0},
    "rotary, causal": {"rotary": 100.0, "causal": True},
}


@functools.cache
def sampled(name, option=""):
    """A problem, its kernels by sampling, and what is promised of them."""
    case, given = CASES[name], dict(OPTIONS[option])
    given.pop("method", None)
    rotary, order = given.pop("rotary", None), given.pop("order", None)
    problem = oracle.random_problem(**case)
    n_samples = {2: 200_000, 4: 200_000, 8: 50_000, 16: 10_000}[case["size"]]
    rows = [rows_of(given, case["size"])] * 2
    truth = oracle.kernels(problem, rows=rows, rotary=rotary, order=order, n_samples=n_samples)
    if rotary is not None:
        return problem, truth, [promised(ATTENTION_ROTARY, case["variance"])] * 2
    if given:
        return problem, truth, [promised(ATTENTION, case["variance"])] * 2
    return problem, truth, tolerances(case)


@pytest.mark.parametrize(
    ("name", "option"),
    [pytest.param(name, "", marks=[pytest.mark.quick] * (name == "masked")) for name in CASES]
    + [
        ("masked", "order 2"),
        ("masked", "order 4"),
        ("small logits", "causal"),
        pytest.param("varying, masked", "causal", marks=pytest.mark.quick),
        ("masked", "causal, order 2"),
        ("large logits", "window"),
        ("masked", "bias"),
        ("masked", "bias, order 4"),
        ("masked", "rotary"),
        ("4 tokens", "rotary, causal"),
    ],
)
def test_sampled_logits(name, option):
    problem, truth, limits = sampled(name, option)
    nngp, ntk = moments(problem, **OPTIONS[option])
    assert excess(nngp, truth.nngp, truth.nngp_stderr, problem.present, limits[0]) < 1
    assert excess(ntk, truth.ntk, truth.ntk_stderr, problem.present, limits[1]) < 1
    if "bias" in OPTIONS[option]:
        assert not np.any(nngp[2])
        assert not np.any(ntk[:, 2])


@pytest.mark.parametrize(
    ("option", "rows"),
    [
        pytest.param({}, None, marks=pytest.mark.quick),
        ({"bias": slanted}, [slanted(4, 3), slanted(3, 5)]),
        ({"rotary": 100.0}, None),
    ],
)
def test_queries_of_another_sequence(option, rows):
    problem = oracle.crossing_problem((4, 3), (3, 5), variance=1.0)
    truth = oracle.kernels(problem, rows=rows, rotary=option.get("rotary"), n_samples=200_000)
    nngp, ntk = moments(problem, **option)
    assert nngp.shape == ntk.shape == (4, 3)
    quantity = ATTENTION_ROTARY if option.get("rotary") else ATTENTION
    limit = [np.ones(4, bool), np.ones(3, bool)], promised(quantity, 2.0)
    assert excess(nngp, truth.nngp, truth.nngp_stderr, *limit) < 1
    assert excess(ntk, truth.ntk, truth.ntk_stderr, *limit) < 1


def test_another_row_of_biases_is_found():
    problem, truth, (limit, _) = sampled("large logits", "window")
    nngp, _ = moments(problem, window=(1, 2))
    assert excess(nngp, truth.nngp, truth.nngp_stderr, problem.present, limit) > 1


@pytest.mark.quick
def test_each_term_of_the_ntk_is_needed():
    problem, truth, _ = sampled("4 tokens")
    given, nothing = problem.covariances(), np.zeros((4, 4))
    names = ("ntk12", "queries_ntk12", "values_ntk12")

    def ntk(**options):
        """It is linear in the NTKs that are passed, all of them here."""
        own = {**given, "queries_ntk12": given["ntk12"], **options}
        return taylor_softmax.attention_second_moment(**own, scale=problem.scale)

    total, (nngp, of_weights) = ntk(), ntk(**dict.fromkeys(names, nothing))
    parts = {"value and output weights": 2 * nngp, "query and key weights": of_weights - 2 * nngp}
    for name in names:
        parts[name] = total.ntk - ntk(**{name: nothing}).ntk
    np.testing.assert_allclose(sum(parts.values()), total.ntk, rtol=1e-9)
    limit = truth.ntk, truth.ntk_stderr, problem.present, promised(ATTENTION, 1.0)
    assert excess(total.ntk, *limit) < 1
    for name, part in parts.items():
        assert excess(total.ntk - part, *limit) > 1, name


def test_mean_over_nothing_but_correlation_0_fails():
    problem, truth, _ = sampled("small logits")
    uncorrelated = moments(problem._replace(scale=1e-12)).nngp
    limit = truth.nngp, truth.nngp_stderr, problem.present, promised(ATTENTION, 0.25)
    assert excess(uncorrelated, *limit) > 1


@pytest.mark.quick(order=2)
@pytest.mark.parametrize(("order", "limit"), [(2, 1e-6), (None, 3e-3)])
def test_softmax_of_each_pair_of_queries(order, limit):
    problem = oracle.random_problem(5, variance=1.0)
    size = 5
    own1, cross, own2 = (
        problem.scale * problem.keys[rows, columns]
        for rows, columns in (
            (slice(size), slice(size)),
            (slice(size), slice(size, None)),
            (slice(size, None), slice(size, None)),
        )
    )
    values = problem.values[:size, size:]
    a, b = np.indices((size, size)).reshape(2, -1)
    weights = taylor_softmax.joint_second_moment(
        np.diag(own1)[a, None, None] * own1 / problem.scale,
        cross[a, b][:, None, None] * cross / problem.scale,
        np.diag(own2)[b, None, None] * own2 / problem.scale,
        order=order,
    )
    expected = np.sum(np.asarray(weights) * values, (1, 2)).reshape(size, size)
    value = np.asarray(moments(problem, order=order).nngp)
    np.testing.assert_allclose(value, expected, atol=limit * np.max(np.abs(expected)))


@pytest.mark.parametrize("causal", [False, True])
def test_order_2_closed_form_and_points_agree(causal):
    problem = oracle.random_problem(4, variance=1.0, ratio=3.0, lengths=(3, 4))
    both = (
        moments(problem, order=2, causal=causal, method=method)
        for method in (Direct(), QuasiMonteCarlo(1 << 13))
    )
    for a, b in zip(*both, strict=True):
        kept = np.outer(*problem.present)
        np.testing.assert_allclose(a[kept], b[kept], atol=3e-3 * np.max(np.abs(a)))


# The layer.


def identity(sides, requests, mechanism):
    """Kernels of attention whose weights are the logits themselves."""

    def of(cross):
        values = cross.keys if cross.values is None else cross.values

        def trace(outer, inner):
            return jnp.sum(outer * inner, (1, 2), keepdims=True) * jnp.ones_like(cross.keys)

        nngp, slope = cross.queries * trace(values, cross.keys), trace(values, cross.keys)
        error = jnp.zeros((len(nngp), 1))
        if cross.keys_ntk is None:
            return Kernels(nngp, None, error)
        values_ntk = cross.keys_ntk if cross.values_ntk is None else cross.values_ntk
        ntk = 2 * nngp + cross.queries * trace(values_ntk, cross.keys)
        ntk += (2 * cross.queries + cross.queries_ntk) * slope
        return Kernels(nngp, ntk + cross.queries * trace(values, cross.keys_ntk), error)

    return [of(request.cross) for request in requests]


EMBEDDINGS = [
    {},
    {"b_std": 0.4},
    {"pos_emb_type": "SUM", "W_pos_emb_std": 0.7},
    {"pos_emb_type": "SUM", "val_pos_emb": True, "pos_emb_decay_fn": lambda d: jnp.exp(-d)},
    {"pos_emb_type": "CONCAT", "n_chan_pos_emb": 7, "W_pos_emb_std": 0.7},
    {"pos_emb_type": "CONCAT", "val_pos_emb": True},
]


def token_inputs(*shape, padding=True):
    x = np.random.default_rng(len(shape)).standard_normal(shape)
    if padding:
        x[0, -1:] = x[1, -2:] = 7.0
    return x


@pytest.mark.quick(spatial=(4,), options=EMBEDDINGS[3], diagonal_batch=True)
@pytest.mark.parametrize("spatial", [(4,), (3, 2)])
@pytest.mark.parametrize("options", EMBEDDINGS)
@pytest.mark.parametrize("diagonal_batch", [True, False])
def test_identity_attention_is_that_of_neural_tangents(
    monkeypatch, spatial, options, diagonal_batch
):
    monkeypatch.setattr(evaluation, "evaluate", identity)
    body = stax.Conv(16, (3,) * len(spatial), padding="SAME", b_std=0.3), stax.Relu()
    given = {"linear_scaling": False, "W_query_std": 1.2, "W_out_std": 0.8, **options}
    *_, ours = stax.serial(*body, stax.GlobalSelfAttention(4, 5, 6, 3, **given))
    theirs = nt.stax.GlobalSelfAttention(4, 5, 6, 3, attention_mechanism="IDENTITY", **given)
    *_, theirs = stax.serial(*body, theirs)
    x1, x2 = token_inputs(3, *spatial, 5), token_inputs(2, *spatial, 5)
    for inputs in ((x1, None), (x1, x2)):
        options = {"mask_constant": 7.0, "diagonal_batch": diagonal_batch}
        kernel, expected = (f(*inputs, **options) for f in (ours, theirs))
        if expected.is_reversed:
            expected = expected.reverse()
        for name in ("nngp", "ntk", "cov1", "cov2"):
            if getattr(expected, name) is None:
                assert getattr(kernel, name) is None
            else:
                np.testing.assert_allclose(
                    getattr(kernel, name), getattr(expected, name), rtol=1e-12, atol=1e-12
                )


def attention_layer(**options):
    return stax.GlobalSelfAttention(4, 5, 6, 3, linear_scaling=False, **options)


@pytest.mark.quick(options=EMBEDDINGS[3])
@pytest.mark.parametrize("options", EMBEDDINGS)
def test_apply_is_that_of_neural_tangents(options):
    x = token_inputs(2, 3, 2, 5)
    init_fn, apply_fn, _ = attention_layer(**options)
    theirs = nt.stax.GlobalSelfAttention(4, 5, 6, 3, linear_scaling=False, **options)
    # neural_tangents' own fails under a mask at another number of channels.
    masked = {} if "n_chan_pos_emb" in options else {"mask_constant": 7.0}
    shape, params = init_fn(random.key(0), x.shape)
    assert shape == (2, 3, 2, 4)
    outputs, expected = (f(params, x, **masked) for f in (apply_fn, theirs[1]))
    if masked:
        np.testing.assert_array_equal(outputs.mask, expected.mask)
        outputs, expected = (np.where(y.mask, 0, y.masked_value) for y in (outputs, expected))
    np.testing.assert_allclose(outputs, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.quick
def test_causal_outputs_don_t_see_what_comes_later():
    x = token_inputs(1, 6, 5, padding=False)
    method = QuasiMonteCarlo(512)
    init_fn, apply_fn, kernel_fn = attention_layer(causal=True, order=4, method=method)
    _, params = init_fn(random.key(0), x.shape)
    changed = x.copy()
    changed[:, 4:] += 1.0
    before, after = apply_fn(params, x), apply_fn(params, changed)
    np.testing.assert_allclose(before[:, :4], after[:, :4], rtol=1e-12)
    assert np.all(np.abs(before[:, 4:] - after[:, 4:]) > 1e-6)
    one, other = (kernel_fn(of, None, "nngp") for of in (x, changed))
    np.testing.assert_allclose(one[0, 0, :4, :4], other[0, 0, :4, :4], rtol=3e-2)
    # The first token attends to itself alone.
    np.testing.assert_allclose(one[0, 0, 0, 0], np.mean(x[0, 0] ** 2), rtol=1e-12)


FINITE = {
    "": {},
    "causal": {"causal": True},
    "rotary": {"rotary": 30.0},
    "ALiBi": {"bias": functools.partial(taylor_softmax.nn.alibi, 2), "causal": True},
    "cross": {"bias": slanted},
}


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize(
    ("n_networks", "seen"), [(300, 0.05), pytest.param(6500, 0.01, marks=pytest.mark.slow)]
)
def test_finite_networks(name, n_networks, seen):
    width, size = 256, 3
    first, second = token_inputs(2, 1, size, 6, padding=False)
    x1, x2 = jnp.asarray(first), jnp.asarray(0.7 * first + 0.7 * second)

    def network(n):
        given = {"W_query_std": 1.5, "W_out_std": 1.2, **FINITE[name]}
        body = stax.serial(stax.Dense(n, W_std=1.4), stax.Relu())
        if name != "cross":
            layer = stax.GlobalSelfAttention(8, n, 16, 2, linear_scaling=False, **given)
            return stax.serial(body, layer)
        # From two of the tokens to all of them; what `slanted` leaves to attend to.
        queries = stax.serial(stax.Index((slice(None), slice(2))), stax.Dense(n, W_std=1.4))
        both = stax.parallel(queries, body)
        return stax.serial(stax.FanOut(2), both, stax.GlobalCrossAttention(8, n, 16, 2, **given))

    init_fn, apply_fn, kernel_fn = network(width)
    ntk_fn = nt.empirical_ntk_fn(apply_fn, trace_axes=(-1,), diagonal_axes=())

    def one(key):
        """Kernels averaged over the tokens: one number each, far from 0."""
        _, params = init_fn(key, x1.shape)
        outputs = jnp.mean(apply_fn(params, x1)[0], 0), jnp.mean(apply_fn(params, x2)[0], 0)
        return jnp.mean(outputs[0] * outputs[1]), jnp.mean(ntk_fn(x1, x2, params))

    keys = random.split(random.key(1), n_networks)
    samples = jax.jit(lambda keys: jax.lax.map(one, keys))(keys)
    kernel = kernel_fn(x1, x2)
    for sample, of in zip(samples, (kernel.nngp, kernel.ntk), strict=True):
        exact, mean, stderr = jnp.mean(of), jnp.mean(sample), jnp.std(sample) / n_networks**0.5
        # Finite networks are off by about 1 / width.
        assert abs(mean - exact) < 4.5 * stderr + 2 / width * exact
        assert stderr < seen * exact


def test_values_are_averaged_without_logits():
    x = token_inputs(2, 5, 4, padding=False)
    *_, kernel_fn = attention_layer(W_query_std=0.0, W_value_std=1.3, b_std=0.2)
    kernel = kernel_fn(x)
    means = np.mean(x, 1)
    expected = 1.3**2 * (means @ means.T / 4)[:, :, None, None] + 0.04
    np.testing.assert_allclose(kernel.nngp, np.broadcast_to(expected, (2, 2, 5, 5)), atol=1e-6)


@pytest.mark.quick
def test_one_token():
    x = token_inputs(3, 1, 4, padding=False)
    *_, kernel_fn = attention_layer(W_out_std=1.3, b_std=0.2)
    flat = x[:, 0]
    expected = 1.3**2 * flat @ flat.T / 4 + 0.04
    np.testing.assert_allclose(kernel_fn(x).nngp[:, :, 0, 0], expected, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"order": 2}])
def test_tokens_in_another_order(options):
    x = token_inputs(2, 5, 4, padding=False)
    order = np.array([3, 0, 4, 2, 1])
    *_, kernel_fn = attention_layer(**options)
    nngp, permuted = kernel_fn(x).nngp, kernel_fn(x[:, order]).nngp
    limit = 1e-6 if options else 3 * promised(ATTENTION, 1.0)
    expected = nngp[:, :, order][..., order]
    np.testing.assert_allclose(permuted, expected, atol=limit * np.max(np.abs(nngp)))


@pytest.mark.slow
def test_inputs_with_others_and_with_themselves():
    x1, x2 = token_inputs(3, 4, 5), token_inputs(2, 4, 5)
    *_, kernel_fn = stax.serial(stax.Dense(1), attention_layer(W_query_std=1.5))
    options = {"mask_constant": 7.0, "diagonal_batch": False}
    both, whole = kernel_fn(x1, x2, **options), kernel_fn(np.concatenate([x1, x2]), **options)
    for name, rows, columns in (
        ("nngp", slice(3), slice(3, None)),
        ("ntk", slice(3), slice(3, None)),
        ("cov1", slice(3), slice(3)),
        ("cov2", slice(3, None), slice(3, None)),
    ):
        expected = getattr(whole, "nngp" if name != "ntk" else name)[rows, columns]
        np.testing.assert_allclose(getattr(both, name), expected, atol=1e-9)
    diagonal = kernel_fn(x1, x2, mask_constant=7.0, diagonal_batch=True)
    np.testing.assert_allclose(diagonal.cov1, np.moveaxis(np.diagonal(both.cov1), -1, 0), atol=1e-9)
    # Rows and columns of padding are 0, all others as of `attention_second_moment`.
    assert np.all(both.nngp[0, :, -1] == 0)
    gram = np.einsum("npc,mqc->nmpq", x1, x1)[1, 1] / 5
    short = gram[:2, :2]
    moment = taylor_softmax.attention_second_moment(short, short, short, scale=1.5**2, ntk12=short)
    for value, expected in zip((whole.nngp, whole.ntk), moment, strict=True):
        np.testing.assert_allclose(value[1, 1, :2, :2], expected, rtol=2e-2)


def test_symmetric_and_positive_semi_definite():
    x = token_inputs(20, 4, 5, padding=False)
    *_, kernel_fn = stax.serial(stax.Dense(1), stax.LayerNorm(), attention_layer(W_query_std=1.3))
    kernel = kernel_fn(x)
    for of in (kernel.nngp, kernel.ntk):
        matrix = np.transpose(of, (0, 2, 1, 3)).reshape(80, 80)
        np.testing.assert_array_equal(matrix, matrix.T)
        values = np.linalg.eigvalsh(matrix)
        assert values[0] > -promised(ATTENTION, 4.0) * values[-1]


def transformer(depth, last, **options):
    def residual(*layers):
        body = stax.serial(stax.LayerNorm(), *layers)
        return stax.FanOut(2), stax.parallel(stax.Identity(), body), stax.FanInSum()

    attend = functools.partial(attention_layer, W_query_std=1.5, **options)
    block = (
        *residual(attend()),
        *residual(stax.Dense(8, W_std=1.4, b_std=0.1), stax.Relu(), stax.Dense(4)),
    )
    return stax.serial(stax.Dense(4), *block * depth, last, stax.Dense(1))


@pytest.mark.filterwarnings("ignore:`FanIn`")
@pytest.mark.parametrize("depth", [6, 12])
def test_transformer_is_finite_in_float32(depth):
    x = token_inputs(3, 4, 5, padding=False).astype(np.float32)
    x[2] = x[1] + 1e-4
    *_, kernel_fn = transformer(depth, stax.GlobalAvgPool(), pos_emb_type="SUM")
    # neural_tangents makes float64 of everything as soon as there is float64.
    with enable_x64(False):
        kernel = kernel_fn(x)
    for of in (kernel.nngp, kernel.ntk):
        assert of.dtype == np.float32
        assert np.all(np.isfinite(of))
        values = np.linalg.eigvalsh(np.asarray(of, float))
        assert values[0] > -1e-4 * values[-1]


@pytest.mark.filterwarnings("ignore:`FanIn`")
def test_causal_transformer_ends_in_its_last_token():
    x = token_inputs(2, 4, 5, padding=False).astype(np.float32)
    last = stax.serial(stax.Index((slice(None), -1)), stax.Identity())
    *_, kernel_fn = transformer(2, last, causal=True)
    kernel = kernel_fn(x)
    assert kernel.nngp.shape == (2, 2)
    assert np.all(np.isfinite(kernel.ntk))


@pytest.mark.slow
def test_compiled_and_differentiated():
    x = token_inputs(2, 3, 4, padding=False)
    x[0, 1] = x[0, 0]

    def total(std, order=None):
        *_, kernel_fn = attention_layer(W_query_std=std, order=order)
        return jnp.sum(kernel_fn(x, None, "ntk") ** 2)

    for order, limit in ((None, 2e-2), (2, 1e-4)):
        slope = jax.jit(jax.grad(functools.partial(total, order=order)))(1.2)
        step = 1e-3
        difference = (total(1.2 + step, order) - total(1.2 - step, order)) / (2 * step)
        np.testing.assert_allclose(slope, difference, rtol=limit)
    assert np.isfinite(jax.grad(total)(0.0))


FEW = QuasiMonteCarlo(64)


@pytest.fixture(scope="module")
def covariances():
    """Of two inputs of four and three tokens, and the NTK between them."""
    joint = oracle.tokens(4, correlation=0.5)[:7, :7]
    return (joint[:4, :4], joint[:4, 4:], joint[4:, 4:]), joint[:4, 4:] + 0.3


def second_moments(covariances, **options):
    covs, ntk = covariances
    return taylor_softmax.attention_second_moment(*covs, ntk12=ntk, method=FEW, **options)


def masked(allowed):
    return np.where(allowed, 0.0, -np.inf)


@pytest.mark.quick
def test_masks_are_biases(covariances):
    causal = second_moments(covariances, bias=lambda n: masked(np.tri(n) > 0))
    for options in ({"causal": True}, {"window": (3, 0)}):
        for value, expected in zip(second_moments(covariances, **options), causal, strict=True):
            np.testing.assert_array_equal(value, expected)
    # Of queries that attend to all keys each is as it is without a row, up to the error.
    wide, unmasked = (
        taylor_softmax.attention_second_moment(*covariances[0], window=w) for w in (3, None)
    )
    limit = 2 * promised(ATTENTION, 1.0)
    np.testing.assert_allclose(wide.nngp, unmasked.nngp, atol=limit * np.max(np.abs(unmasked.nngp)))


def test_padding_is_as_if_it_was_not_there(covariances):
    (cov11, cov12, cov22), ntk = covariances
    present = np.array([True, True, True, False])
    options = {"window": (1, 1), "bias": functools.partial(taylor_softmax.nn.alibi, 1)}
    padded = second_moments(covariances, present1=present, **options)
    short = (cov11[:3, :3], cov12[:3], cov22), ntk[:3]
    for value, expected in zip(padded, second_moments(short, **options), strict=True):
        limit = 5e-3 * np.max(np.abs(expected))
        np.testing.assert_allclose(value[:3], expected, atol=limit)


def test_shares_of_heads_are_averaged(covariances):
    each = [
        second_moments(covariances, bias=lambda n, k=k: taylor_softmax.nn.alibi(2, n)[k])
        for k in (0, 1)
    ]
    both = second_moments(covariances, bias=functools.partial(taylor_softmax.nn.alibi, 2))
    for value, *expected in zip(both, *each, strict=True):
        np.testing.assert_allclose(value, sum(expected) / 2, rtol=1e-12)


def test_rotation_by_nothing(monkeypatch, covariances):
    unrotated = second_moments(covariances, causal=True)
    turned = second_moments(covariances, causal=True, rotary=50.0)
    monkeypatch.setattr(rotary, "correlations", lambda base, size, dtype: jnp.ones(size, dtype))
    still = second_moments(covariances, causal=True, rotary=51.0)
    for value, other, expected in zip(still, turned, unrotated, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-9)
        assert np.max(np.abs(other - expected)) > 1e-3 * np.max(np.abs(expected))


@pytest.mark.quick
def test_rotary_correlations():
    value = rotary.correlations(10000.0, 40, float)
    expected = [
        mpmath.quad(
            lambda u, t=t: mpmath.cos(mpmath.mpf(10000) ** -u * t), mpmath.linspace(0, 1, 9)
        )
        for t in range(40)
    ]
    np.testing.assert_allclose(value, np.array(expected, float), atol=1e-12)


def test_nothing_to_attend_to(covariances):
    (cov11, cov12, cov22), ntk = covariances
    nothing = np.zeros(3, bool)

    def total(scale, bias):
        moments = taylor_softmax.attention_second_moment(
            scale * cov11,
            cov12,
            cov22,
            ntk12=ntk,
            present2=nothing,
            bias=lambda n: bias[:n, :n],
            method=FEW,
        )
        return sum(jnp.sum(x**2) for x in moments)

    value, slopes = jax.value_and_grad(total, (0, 1))(1.0, jnp.asarray(slanted(4)))
    assert value == 0
    for slope in slopes:
        np.testing.assert_array_equal(slope, jnp.zeros_like(slope))


def test_inputs_of_other_lengths():
    x1, x2 = token_inputs(2, 4, 5), token_inputs(3, 3, 5)
    options = {"linear_scaling": False, "attention_mechanism": "IDENTITY"}
    theirs = nt.stax.GlobalSelfAttention(4, 5, 6, 3, **options)
    *_, theirs = stax.serial(stax.Dense(4), theirs)
    *_, ours = stax.serial(stax.Dense(4), attention_layer(causal=True, method=FEW))
    kernel, other = (f(x1, x2, mask_constant=7.0) for f in (ours, theirs))
    for name in ("nngp", "ntk", "cov1", "cov2"):
        assert getattr(kernel, name).shape == getattr(other, name).shape
    swapped = np.transpose(ours(x2, x1, mask_constant=7.0).nngp, (1, 0, 3, 2))
    np.testing.assert_allclose(kernel.nngp, swapped, atol=0.05 * np.max(swapped))
    nothing = ours(x1, x2[:0])
    assert nothing.nngp.shape == nothing.ntk.shape == (2, 0, 4, 3)


def test_strict_promotion_of_types():
    x = token_inputs(2, 3, 4).astype(np.float32)
    network = stax.serial(
        stax.Dense(4), attention_layer(pos_emb_type="SUM", causal=True, method=FEW)
    )
    with enable_x64(False), jax.numpy_dtype_promotion("strict"):
        init_fn, apply_fn, kernel_fn = network
        _, params = init_fn(random.key(0), x.shape)
        assert apply_fn(params, x, mask_constant=7.0).masked_value.dtype == np.float32
        assert kernel_fn(x, None, ("nngp", "ntk")).ntk.dtype == np.float32


def cross_attention(**options):
    return stax.GlobalCrossAttention(4, 6, 6, 2, W_query_std=1.5, **options)


@pytest.mark.quick(others=False)
@pytest.mark.parametrize("others", [False, True])
def test_cross_attention_is_that_of_arrays(others):
    """Of inputs with each other, and with inputs of other lengths."""
    q1, q2, m1, m2 = (
        np.random.default_rng(i).standard_normal((2, n, 4)) for i, n in enumerate((3, 2, 4, 5))
    )
    m1[0, 3] = m2[1, 3:] = q1[1, 2] = 7.0
    if not others:
        q2, m2 = q1, m1
    branches = stax.parallel(stax.Dense(4), stax.Dense(4, W_std=1.3))
    *_, kernel_fn = stax.serial(branches, cross_attention(b_std=0.3, method=FEW))
    second = (q2, m2) if others else None
    kernel = kernel_fn((q1, m1), second, mask_constant=7.0)
    assert kernel.nngp.shape == (2, 2, 3, 2 if others else 3)
    assert kernel.cov1.shape == (2, 3, 3)
    *_, of_branches = branches
    queries, memory = of_branches((q1, m1), (q2, m2), mask_constant=7.0)
    moments = taylor_softmax.attention_second_moment(
        memory.cov1[0],
        memory.nngp[0, 1],
        memory.cov2[1],
        queries11=queries.cov1[0],
        queries12=queries.nngp[0, 1],
        queries22=queries.cov2[1],
        ntk12=memory.ntk[0, 1],
        queries_ntk12=queries.ntk[0, 1],
        present1=np.any(m1[0] != 7, -1),
        present2=np.any(m2[1] != 7, -1),
        scale=1.5**2,
        method=FEW,
    )
    # What queries of the second input are padding is 0.
    asked = np.any(q2[1] != 7, -1)
    for name, expected in zip(("nngp", "ntk"), moments, strict=True):
        expected = np.where(asked, expected + 0.3**2, 0)
        np.testing.assert_allclose(getattr(kernel, name)[0, 1], expected, rtol=1e-9)
    assert not np.any(kernel.nngp[1, :, 2])


@layer
def first_of_two():
    """The first of two branches, which goes past an attention to the second."""

    def init_fn(rng, shapes):
        return shapes[0], ()

    def apply_fn(params, inputs, **kwargs):
        return inputs[0]

    def kernel_fn(kernels, **kwargs):
        return kernels[0]

    return init_fn, apply_fn, kernel_fn


@pytest.mark.filterwarnings("ignore:`FanIn`")
def test_encoder_and_decoder():
    def residual(*layers):
        body = stax.serial(stax.LayerNorm(), *layers)
        return stax.FanOut(2), stax.parallel(stax.Identity(), body), stax.FanInSum()

    encoder = stax.serial(stax.Dense(4), *residual(attention_layer(method=FEW)), stax.LayerNorm())
    decoder = stax.serial(stax.Dense(4), *residual(attention_layer(causal=True, method=FEW)))
    network = stax.serial(
        stax.parallel(decoder, encoder),
        stax.FanOut(2),
        stax.parallel(first_of_two(), cross_attention(method=FEW)),
        stax.FanInSum(),
        stax.Dense(1),
    )
    targets, sources = token_inputs(2, 3, 5), token_inputs(2, 4, 5)
    init_fn, apply_fn, kernel_fn = network
    _, params = init_fn(random.key(0), (targets.shape, sources.shape))
    assert apply_fn(params, (targets, sources)).shape == (2, 3, 1)
    kernel = kernel_fn((targets, sources), None, mask_constant=7.0)
    for of in (kernel.nngp, kernel.ntk):
        matrix = np.transpose(of, (0, 2, 1, 3)).reshape(6, 6)
        assert np.all(np.isfinite(matrix))
        assert np.linalg.eigvalsh(matrix)[0] > -2e-2 * np.max(matrix)


def test_alibi():
    # Slopes 1/2, 1/4, ... of eight heads, and of twelve those of eight and every second of 16.
    np.testing.assert_allclose(
        -taylor_softmax.nn.alibi(12, 3)[:, 2, 1],
        [*(0.5 ** np.arange(1, 9)), *(0.5 ** np.arange(0.5, 4.5))],
        rtol=1e-12,
    )
    np.testing.assert_allclose(
        taylor_softmax.nn.alibi(1, 3)[0] * 256, [[0, -1, -2], [-1, 0, -1], [-2, -1, 0]]
    )


# Errors.


@pytest.mark.quick
def test_arguments():
    cov = np.eye(3)
    moment = functools.partial(taylor_softmax.attention_second_moment, cov, cov, cov)
    half = taylor_softmax.attention_second_moment(*(cov.astype(np.float16),) * 3)
    assert half.nngp.dtype == np.float16
    assert half.ntk is None
    with pytest.raises(
        ValueError, match=r"`values12` must have shape \(\.\.\., 3, 3\), got \(2, 2\)"
    ):
        moment(values12=np.eye(2))
    with pytest.raises(ValueError, match=r"Batches must broadcast.*`ntk12` \(3, 3, 3\)"):
        moment(ntk12=np.zeros((3, 3, 3)), present1=np.ones((2, 3)))
    with pytest.raises(ValueError, match="pass `queries11`, `queries22` too"):
        moment(queries12=cov)
    with pytest.raises(ValueError, match="pass `queries_ntk12`, that of queries, too"):
        moment(queries11=cov, queries12=cov, queries22=cov, ntk12=cov)
    with pytest.raises(ValueError, match="`window` must be an integer or a pair"):
        moment(window=(1, 2, 3))
    with pytest.raises(ValueError, match="`window` must be at least 0, got -1"):
        moment(window=-1)
    with pytest.raises(ValueError, match=r"`bias` must have shape \(3, 3\) or \(B, 3, 3\)"):
        moment(bias=np.eye(2))
    with pytest.raises(TypeError, match="got booleans"):
        moment(bias=np.eye(3) > 0)
    with pytest.raises(ValueError, match="`bias` must be finite, or -inf"):
        moment(bias=np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match=r"`rotary` must be finite and above 1, got 1\.0"):
        moment(rotary=1.0)
    with pytest.raises(ValueError, match="and a bias or rotary embeddings"):
        moment(rotary=10.0, order=2, method=Direct())
    with pytest.raises(ValueError, match="`values_ntk12` is part of the NTK"):
        moment(values_ntk12=cov)
    with pytest.raises(TypeError, match="`causal` must be a boolean"):
        moment(causal=1)
    with pytest.raises(ValueError, match="does not apply to attention with softmax"):
        moment(method=Direct())
    with pytest.raises(ValueError, match="`scale` must be a number"):
        moment(scale=np.ones(3))
    with pytest.raises(TypeError, match="`cov11` must be a real number"):
        taylor_softmax.attention_second_moment(1j * cov, cov, cov)


@pytest.mark.quick
def test_layer_arguments():
    with pytest.raises(ValueError, match="`causal` and `order` apply to softmax attention"):
        stax.GlobalSelfAttention(4, 5, 6, 3, causal=True, order=2)
    with pytest.raises(ValueError, match="`bias` applies to softmax attention"):
        stax.GlobalSelfAttention(4, 5, 6, 3, bias=np.eye(3))
    with pytest.raises(ValueError, match="`n_chan_key` must be even, got 5"):
        attention_layer(rotary=100.0)
    with pytest.raises(ValueError, match="`rotary` takes the place of positional embeddings"):
        cross_attention(rotary=100.0, pos_emb_type="SUM")
    with pytest.raises(ValueError, match="rows for 2 equal shares of the heads"):
        attention_layer(bias=np.zeros((2, 3, 3)))[2](token_inputs(2, 3, 5))
    with pytest.raises(ValueError, match="inputs with 2 axes have none"):
        attention_layer()[2](token_inputs(2, 5))
    with pytest.raises(ValueError, match="a fan-in layer of two branches"):
        cross_attention()[2](token_inputs(2, 3, 5))
    with pytest.raises(ValueError, match="does not apply to attention"):
        attention_layer(method=Series())
    with pytest.raises(ValueError, match="one spatial axis"):
        attention_layer(causal=True)[2](token_inputs(2, 3, 2, 5))
    with pytest.raises(ValueError, match="one spatial axis"):
        attention_layer(causal=True)[0](random.key(0), (2, 3, 2, 5))
    *_, kernel_fn = stax.serial(stax.Dense(8), stax.Softmax(), attention_layer())
    with pytest.raises(NotImplementedError, match="softmax over classes"):
        kernel_fn(token_inputs(2, 3, 5))


@pytest.mark.filterwarnings("ignore:Linear scaling")
def test_what_neural_tangents_has_stays_with_it():
    x = token_inputs(2, 3, 5, padding=False)
    options = {"attention_mechanism": "RELU", "b_std": 0.1, "pos_emb_type": "SUM"}
    kernels = (of.GlobalSelfAttention(4, 5, 6, 3, **options)[2](x) for of in (stax, nt.stax))
    np.testing.assert_array_equal(*(kernel.ntk for kernel in kernels))
