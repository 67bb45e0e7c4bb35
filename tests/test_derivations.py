"""What SymPy derives against mpmath; that what is emitted is current, stable and traceable."""

from __future__ import annotations

import ast
import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import sympy as sp
from numpy.polynomial import hermite_e

from derivations import __main__ as command
from derivations import class_axis, emit, gaussian, infinite_width, position_axis, probabilities
from taylor_softmax._generated.class_axis import class_axis_order_2
from taylor_softmax._generated.position_axis import (
    covariance_order_2,
    mean_order_2,
    observation_order_2,
)
from taylor_softmax._generated.probabilities import logit_order_2

REPOSITORY = Path(__file__).resolve().parents[1]
DIGITS = 60
EPS = float(np.finfo(float).eps)


@pytest.fixture(scope="module")
def rendered() -> dict[str, str]:
    return command.render()


# Staleness


@pytest.mark.quick
def test_generated_code_is_current():
    """What `python -m derivations --check` says; the rendering takes seconds."""
    assert command.main(["--check"]) == 0


def test_rendering_does_not_depend_on_the_process(rendered):
    """Twice the same text: here, and in a process that orders its sets in another way."""
    code = "import json, derivations.__main__ as m; print(json.dumps(m.render()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == rendered


@pytest.fixture
def target(tmp_path, rendered, monkeypatch) -> Path:
    """A folder that `main` has written; rendering again would take seconds each time."""
    monkeypatch.setattr(command, "render", lambda: dict(rendered))
    folder = tmp_path / "_generated"
    assert command.main([], target=folder) == 0
    assert {path.name: path.read_text() for path in folder.iterdir()} == rendered
    return folder


def check(target: Path, capsys) -> tuple[int, str, str]:
    capsys.readouterr()
    before = {path: path.read_text() for path in target.glob("*")}
    code = command.main(["--check"], target=target)
    assert {path: path.read_text() for path in target.glob("*")} == before  # writes nothing
    return code, *capsys.readouterr()


@pytest.mark.quick
def test_check_passes_on_what_was_written(target, capsys):
    assert check(target, capsys) == (0, "", "")


def stale(target: Path) -> None:
    path = target / "class_axis.py"
    path.write_text(path.read_text().replace("jnp.log1p(excess)", "jnp.log1p(2*excess)"))


def trailing(target: Path) -> None:
    path = target / "probabilities.py"
    path.write_text(path.read_text() + "\n")


def missing(target: Path) -> None:
    (target / "probabilities.py").unlink()


def orphan(target: Path) -> None:
    (target / "order_3.py").write_text("ORPHAN = 1\n")


def empty(target: Path) -> None:
    for path in target.iterdir():
        path.unlink()


DAMAGES = {
    stale: ("--- _generated/class_axis.py", "+++ _generated/class_axis.py", "log1p(2*excess)"),
    trailing: ("--- _generated/probabilities.py", "+++ _generated/probabilities.py", "\n-\n"),
    missing: ("--- /dev/null", "+++ _generated/probabilities.py", "+def logit_order_2("),
    orphan: ("--- _generated/order_3.py", "+++ /dev/null", "-ORPHAN = 1"),
    empty: ("--- /dev/null", "+++ _generated/__init__.py", "+def class_axis_order_2("),
}


@pytest.mark.quick
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_check_finds(damage, target, capsys, rendered):
    damage(target)
    code, diff, said = check(target, capsys)
    assert code == 1
    for part in (*DAMAGES[damage], "\n@@ "):
        assert part in diff
    assert "_generated/ is out of date: run `python -m derivations`." in said
    # Only the files concerned.
    assert len(re.findall(r"^--- ", diff, re.M)) == (len(rendered) if damage is empty else 1)
    # Writing repairs, and removes orphans.
    assert command.main([], target=target) == 0
    assert {path.name: path.read_text() for path in target.iterdir()} == rendered
    assert check(target, capsys) == (0, "", "")


@pytest.mark.quick
def test_what_is_not_python_is_left_alone(target, capsys):
    (target / "notes.txt").write_text("kept")
    assert check(target, capsys)[0] == 0
    assert command.main([], target=target) == 0
    assert (target / "notes.txt").read_text() == "kept"


# What is emitted


@pytest.mark.quick
def test_generated_files_say_where_they_come_from(rendered):
    modules = {"class_axis.py", "position_axis.py", "probabilities.py"}
    assert set(rendered) == {"__init__.py"} | modules
    for name, text in rendered.items():
        first = text.splitlines()[0]
        assert "`python -m derivations`" in first
        assert "do not edit" in first
        if name != "__init__.py":
            assert f"`derivations/{name}`" in first
            assert (REPOSITORY / "derivations" / name).exists()
            functions = [x for x in ast.parse(text).body if isinstance(x, ast.FunctionDef)]
            counts = [re.search(r"(\d+) operations", ast.get_docstring(f) or "") for f in functions]
            assert functions
            assert all(counts)


def test_operation_counts(rendered):
    """Against the operators in the text; a constant like `1/2` or `-3` counts as a number there."""
    for text in rendered.values():
        for function in ast.walk(ast.parse(text)):
            if not isinstance(function, ast.FunctionDef):
                continue
            stated = re.search(r"(\d+) operations", ast.get_docstring(function) or "")
            assert stated
            counted = sum(
                isinstance(node, (ast.BinOp, ast.Call))
                and not all(isinstance(x, ast.Constant) for x in ast.iter_child_nodes(node))
                for node in ast.walk(function)
            )
            assert 0.6 * counted <= int(stated[1]) <= 1.2 * counted, (function.name, counted)


def test_order_2_is_cheap(rendered):
    """A guard on the derivation's choice of form: multiplied out it takes three times as many."""
    counts = [int(x) for x in re.findall(r"(\d+) operations", rendered["class_axis.py"])]
    assert counts == [156]


def probe(*expressions: Any, definitions: Any = ()) -> emit.Module:
    x = sp.Symbol("x")
    outputs = tuple((f"out{i}", "m", expression) for i, expression in enumerate(expressions))
    function = emit.Function("probe", "Summary.", (x,), tuple(definitions), outputs)
    return emit.Module("probe_module", "derivations/probe.py", (function,))


X, A, B = sp.symbols("x a b")


def load(text: str, folder: Path) -> Any:
    path = folder / "probe_module.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("probe_module", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.quick
def test_emitted_function_computes_what_it_should(tmp_path):
    """Definitions out of order, shared subexpressions, powers, a function of jax.numpy."""
    shared = (X + 1) ** 3
    definitions = ((B, A * shared), (A, 1 / (1 + X**2)))
    expressions = (B + sp.exp(X) * shared, sp.Rational(1, 3) * A - sp.Function("log1p")(B))
    text = probe(*expressions, definitions=definitions).render()
    got = jax.jit(load(text, tmp_path).probe)(jnp.asarray(0.7))
    x = 0.7
    a = 1 / (1 + x**2)
    b = a * (x + 1) ** 3
    np.testing.assert_allclose(
        got, [b + np.exp(x) * (x + 1) ** 3, a / 3 - np.log1p(b)], rtol=8 * EPS
    )
    assert "import math" not in text


@pytest.mark.quick
@pytest.mark.parametrize(
    ("expression", "called"),
    [
        (sp.erf(X), "erf"),
        (sp.erfc(X), "erfc"),
        (sp.gamma(X), "gamma"),
        (sp.loggamma(X), "lgamma"),
        (sp.factorial(X), "factorial"),
        (sp.exp(X) + X * sp.erf(X), "erf"),
        (sp.Max(X, 0), "reduce"),
    ],
    ids=str,
)
def test_untraceable_calls_are_rejected(expression, called):
    with pytest.raises(NotImplementedError, match=f"`probe_module` would call `.*{called}`"):
        probe(expression).render()
    # In a definition, too.
    with pytest.raises(NotImplementedError, match=called):
        probe(A + X, definitions=((A, expression),)).render()


@pytest.mark.quick
@pytest.mark.parametrize("expression", [sp.sqrt(X), X ** sp.Rational(3, 2), 2**X, 1 / sp.cbrt(X)])
def test_powers_that_are_not_integers_are_rejected(expression):
    with pytest.raises(NotImplementedError, match="integer powers"):
        probe(expression).render()


@pytest.mark.quick
@pytest.mark.parametrize(
    "definitions",
    [((A, B + X), (B, A * X)), ((A, A + 1),), ((A, sp.Symbol("unknown") * X),)],
    ids=["two", "itself", "unknown"],
)
def test_circular_definitions_are_rejected(definitions):
    with pytest.raises(ArithmeticError, match="`probe`: circular definitions"):
        probe(A * X, definitions=definitions).render()


# Order 2 on the class axis


def log_phi(t, s, c, a, b):
    """`log E[exp(-t f(u) - s f(v))]`, `f(z) = 1 + z + z^2 / 2`, also for a singular covariance."""
    covariance = mpmath.matrix([[a, c], [c, b]])
    weight = mpmath.matrix([[t, 0], [0, s]])
    linear = mpmath.matrix([t, s])
    system = mpmath.eye(2) + covariance * weight
    tilted = system**-1 * covariance
    quadratic = (linear.T * tilted * linear)[0]
    return -(t + s) + quadratic / 2 - mpmath.log(mpmath.det(system)) / 2


# (var1, cov12, var2): correlation 0, +-1 (exact in floats), and between.
COVARIANCES = (
    (1.0, 0.5, 1.0),
    (0.3, 0.0, 2.0),
    (4.0, 2.0, 1.0),
    (4.0, -2.0, 1.0),
    (2.25, 2.25, 2.25),
    (20.0, -7.0, 5.0),
    (1e-6, 5e-7, 1e-6),
)
POINTS = ((0.3, 0.7), (1.0, 1.0), (1e-5, 3e-5), (12.0, 0.02), (40.0, 25.0), (0.0, 0.5), (0.0, 0.0))


@functools.cache
def exact(t: float, s: float, a: float, c: float, b: float) -> tuple[Any, ...]:
    """`L`, `L_ts / c`, `d L_ts / dc`, `dL / dc` by differences of `L` at 60 digits and more."""
    with mpmath.workdps(DIGITS):
        at = tuple(mpmath.mpf(x) for x in (t, s, c))

        def function(t, s, c):
            return log_phi(t, s, c, mpmath.mpf(a), mpmath.mpf(b))

        cross_slope = mpmath.diff(function, at, (1, 1, 1))
        cross = mpmath.diff(function, at, (1, 1, 0)) / c if c else cross_slope
        return function(*at), cross, cross_slope, mpmath.diff(function, at, (0, 0, 1))


@pytest.mark.quick(covariance=COVARIANCES[0], point=POINTS[0])
@pytest.mark.parametrize("covariance", COVARIANCES[:4])
@pytest.mark.parametrize("point", POINTS[:3])
def test_log_phi_is_the_gaussian_integral(point, covariance):
    """The oracle, by quadrature in the logits."""
    (a, c, b), (t, s) = covariance, point
    x, weight = hermite_e.hermegauss(100)
    weight /= weight.sum()
    u = np.sqrt(a) * x[:, None] + 0 * x
    v = c / np.sqrt(a) * x[:, None] + np.sqrt(b - c**2 / a) * x
    value = np.exp(-t * (1 + u + u**2 / 2) - s * (1 + v + v**2 / 2))
    want = np.log(weight @ value @ weight)
    with mpmath.workdps(DIGITS):
        got = float(log_phi(*(mpmath.mpf(y) for y in (t, s, c, a, b))))
    assert got == pytest.approx(want, rel=1e-12, abs=1e-14)


def test_log_phi_by_adaptive_quadrature():
    a, c, b, t, s = 1.0, 0.5, 1.0, 0.3, 0.7
    with mpmath.workdps(15):

        def integrand(u, v):
            density = mpmath.exp(-(b * u * u - 2 * c * u * v + a * v * v) / (2 * (a * b - c * c)))
            tilt = mpmath.exp(-t * (1 + u + u * u / 2) - s * (1 + v + v * v / 2))
            return density * tilt / (2 * mpmath.pi * mpmath.sqrt(a * b - c * c))

        integral: Any = mpmath.quad(integrand, [-7, 0, 7], [-7, 0, 7], maxdegree=4)
        got = float(mpmath.log(integral))
    assert got == pytest.approx(float(exact(t, s, a, c, b)[0]), rel=1e-8)
    # Negative control: another covariance.
    assert got != pytest.approx(float(exact(t, s, a, c + 1e-6, b)[0]), rel=1e-8)


def emitted_errors(covariance, point, shift=0.0, dtype: Any = np.float64) -> list[float]:
    """Of the four outputs, in eps of their size: the larger of the values at `+-cov12`.

    The determinant is even in `cov12` and the numerators are not, so that their terms add up at
    one sign where they cancel at the other: `L_ts / cov12 = 1 + cov12 / 2` at `t = s = 0`.
    """
    (a, c, b), (t, s) = covariance, point
    got = class_axis_order_2(*(jnp.asarray(x, dtype) for x in (a, c * (1 + shift), b, t, s)))
    assert all(g.dtype == dtype for g in got)
    want, mirrored = exact(t, s, a, c, b), exact(t, s, a, -c, b)
    errors = []
    with mpmath.workdps(DIGITS):
        for g, w, m in zip(got, want, mirrored, strict=True):
            size = max(abs(w), abs(m)) * float(np.finfo(dtype).eps)
            errors.append(float(abs(float(g) - w) / size) if size else float(abs(g)))
    return errors


@pytest.mark.quick(point=POINTS[0])
@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("point", POINTS)
def test_class_axis_order_2(point, covariance):
    errors = emitted_errors(covariance, point)
    assert max(errors) <= 40, errors


@pytest.mark.parametrize("covariance", COVARIANCES[:6])
@pytest.mark.parametrize("point", POINTS)
def test_class_axis_order_2_in_float32(point, covariance):
    # The oracle gets the very numbers that the function gets.
    covariance, point = (
        tuple(float(np.float32(x)) for x in numbers) for numbers in (covariance, point)
    )
    errors = emitted_errors(covariance, point, dtype=np.float32)
    assert max(errors) <= 40, errors


@pytest.mark.quick
@pytest.mark.parametrize("output", range(4))
def test_a_perturbed_covariance_is_noticed(output):
    """Negative control: every output depends on cov12."""
    covariance, point = (20.0, -7.0, 5.0), (0.3, 0.7)
    assert emitted_errors(covariance, point)[output] <= 40
    assert emitted_errors(covariance, point, shift=1e-12)[output] > 40


def test_class_axis_order_2_is_symmetric_and_differentiable_at_the_edges():
    """Variances 0 and 1e3, correlation beyond 1 by rounding, t and s on the whole half line."""
    edges = [(0.0, 0.0, 0.0), (1e3, 1e3 * (1 + 4 * EPS), 1e3), (1e3, -1e3, 1e3), (0.0, 0.0, 1e3)]
    points = list(itertools.product((0.0, 1e-8, 1.0, 1e4), repeat=2))
    rows = np.array([(*edge, *point) for edge in edges for point in points])
    arguments = [jnp.asarray(column) for column in rows.T]
    got = jnp.stack(class_axis_order_2(*arguments))
    assert np.isfinite(got).all()
    a, c, b, t, s = arguments
    swapped = jnp.stack(class_axis_order_2(b, c, a, s, t))
    np.testing.assert_allclose(swapped, got, rtol=1e-9, atol=1e-12)
    gradient = jax.jacfwd(class_axis_order_2, argnums=(0, 1, 2, 3, 4))
    leaves = jax.tree.leaves(jax.jit(jax.vmap(gradient))(*arguments))
    assert len(leaves) == 20
    assert all(np.isfinite(leaf).all() for leaf in leaves)


# Order 2, one logit of a posterior


def log_transform(t, mean, variance):
    """`log E[exp(-t f(z))]`, `f(z) = ((1 + z)^2 + 1) / 2`, `z ~ N(mean, variance)`."""
    scale = 1 + t * variance
    return -t / 2 - t * (1 + mean) ** 2 / (2 * scale) - mpmath.log(scale) / 2


OUTPUTS = ("log_phi", "tilted_mean", "deviation", "tilted_variance")
# Mean, variance and t.
LOGITS = (
    (0.0, 1.0, 0.7),
    (-1.0, 2.0, 3.0),
    (1.5, 0.3, 1e-6),
    (-40.0, 1e-8, 12.0),
    (1e3, 1e3, 1e-3),
    (-1e3, 0.0, 1e-5),
    (3.0, 50.0, 1e4),
    (2.0, 4.0, 0.0),
)


def posterior_errors(logit, mean_shift=0.0, dtype: Any = np.float64) -> list[float]:
    """Of `log phi`, its two derivatives, up to sign, and the deviation, in eps of their size.

    The deviation is a difference, 0 at some means: its size is that of its two terms.
    """
    mean, variance, t = (float(dtype(x)) for x in logit)
    arguments = (jnp.asarray(x, dtype) for x in (mean + mean_shift, variance, t))
    got = dict(zip(OUTPUTS, logit_order_2(*arguments), strict=True))
    with mpmath.workdps(DIGITS):
        at, mean, variance = (mpmath.mpf(x) for x in (t, mean, variance))

        def mean_of_f(mean, variance):
            return -mpmath.diff(lambda t: log_transform(t, mean, variance), at)

        # At variance 0 it is f(mean). The mean's part has its zero at mean -1.
        by_mean = mean_of_f(mean, variance) - mean_of_f(-1, variance)
        by_mean -= mean_of_f(mean, 0) - mean_of_f(-1, 0)
        by_variance = mean_of_f(-1, variance) - mean_of_f(-1, 0)
        exact = {
            "log_phi": log_transform(at, mean, variance),
            "tilted_mean": mean_of_f(mean, variance),
            "deviation": by_mean + by_variance,
            "tilted_variance": mpmath.diff(lambda t: log_transform(t, mean, variance), at, 2),
        }
        sizes = {name: abs(x) for name, x in exact.items()}
        sizes["deviation"] = abs(by_mean) + abs(by_variance)
        eps, floor = float(np.finfo(dtype).eps), mpmath.mpf(10) ** -40
        return [
            float(abs(mpmath.mpf(float(got[name])) - exact[name]) / max(sizes[name], floor) / eps)
            for name in OUTPUTS
        ]


@pytest.mark.quick(dtype=np.float64)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("logit", LOGITS)
def test_logit_order_2(logit, dtype):
    """To a few roundings of its terms, which but for the deviation have one sign."""
    assert max(posterior_errors(logit, dtype=dtype)) <= 8


@pytest.mark.quick
def test_a_perturbed_mean_is_noticed():
    """Negative control: every output depends on the mean."""
    assert min(posterior_errors((0.5, 1.0, 0.7), mean_shift=1e-13)) > 8


@pytest.mark.parametrize("logit", [(0.5, 1.0, 0.7), (-2.0, 3.0, 0.1)])
def test_log_transform_of_a_logit_is_the_gaussian_integral(logit):
    mean, variance, t = logit
    x, weight = hermite_e.hermegauss(100)
    z = mean + np.sqrt(variance) * x
    want = np.log(np.sum(weight / weight.sum() * np.exp(-t * (1 + z + z**2 / 2))))
    assert float(log_transform(t, mean, variance)) == pytest.approx(want, rel=1e-12)
    rational, determinant = probabilities.log_transform()
    numbers = {probabilities.MEAN: mean, probabilities.VARIANCE: variance, probabilities.T: t}
    derived = (rational - sp.log(determinant) / 2).subs(numbers)
    assert float(derived) == pytest.approx(want, rel=1e-12)


# Positions


OBSERVATIONS = (
    (1.0, 1.0, 0.7),
    (0.3, 2.0, 5.0),
    (-4.0, 1e-8, 3.0),
    (2.0, 50.0, 1e4),
    (3.0, 0.0, 1.0),
)


def observation_errors(observation, shift=0.0) -> list[float]:
    """Of gain, shift and `log phi` in eps of their size; derivatives in the mean by mpmath."""
    moved, variance, rate = observation
    got = observation_order_2(*map(jnp.asarray, (moved + shift, variance, rate)))
    with mpmath.workdps(DIGITS):

        def function(mean):
            return log_transform(mpmath.mpf(rate), mean, mpmath.mpf(variance))

        mean = mpmath.mpf(moved) - 1
        exact = (-mpmath.diff(function, mean, 2), mpmath.diff(function, mean), function(mean))
        return [float(abs(float(g) - x) / abs(x) / EPS) for g, x in zip(got, exact, strict=True)]


@pytest.mark.quick
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_observation_order_2(observation):
    assert max(observation_errors(observation)) <= 8


@pytest.mark.quick
def test_a_perturbed_observation_is_noticed():
    """Negative control; the gain does not depend on the mean."""
    assert min(observation_errors((1.0, 1.0, 0.7), shift=1e-13)[1:]) > 8


def test_an_observation_moves_the_others():
    """Mean and covariance of all after one factor, against sums over a fine grid."""
    covariance, rate = np.array([[1.0, 0.6], [0.6, 2.0]]), 0.8
    x, weight = hermite_e.hermegauss(60)
    grid = np.stack(np.meshgrid(x, x, indexing="ij"), -1) @ np.linalg.cholesky(covariance).T
    tilt = np.exp(-rate * (1 + grid[..., 0] + grid[..., 0] ** 2 / 2)) * np.outer(weight, weight)
    mean = np.einsum("ij,ijk->k", tilt, grid) / tilt.sum()
    second = np.einsum("ij,ijk,ijl->kl", tilt, grid - mean, grid - mean) / tilt.sum()
    gain, shift, log_phi = observation_order_2(
        jnp.asarray(1.0), jnp.asarray(covariance[0, 0]), jnp.asarray(rate)
    )
    column = covariance[:, 0]
    np.testing.assert_allclose(shift * column, mean, rtol=1e-10)
    np.testing.assert_allclose(covariance - gain * np.outer(column, column), second, rtol=1e-10)
    np.testing.assert_allclose(log_phi, np.log(tilt.sum() / weight.sum() ** 2), rtol=1e-10)


@pytest.mark.quick
@pytest.mark.parametrize("cov12", [0.0, 0.6, -1.2])
def test_second_moment_of_two_logits(cov12):
    moved, variances = (0.4, -1.5), (1.0, 2.0)
    x, weight = hermite_e.hermegauss(20)
    root = np.linalg.cholesky([[variances[0], cov12], [cov12, variances[1]]])
    z = np.stack(np.meshgrid(x, x, indexing="ij"), -1) @ root.T + np.array(moved)
    values = np.prod((z**2 + 1) / 2, -1)
    want = np.sum(values * np.outer(weight, weight)) / weight.sum() ** 2

    def second_moment(cov12):
        means = [
            float(mean_order_2(*map(jnp.asarray, of))) for of in zip(moved, variances, strict=True)
        ]
        between = covariance_order_2(*map(jnp.asarray, (moved[0], cov12, moved[1])))
        return means[0] * means[1] + float(between)

    assert second_moment(cov12) == pytest.approx(want, rel=1e-12)
    assert second_moment(cov12 + 1e-3) != pytest.approx(want, rel=1e-8)


def test_the_covariance_of_two_logits_vanishes_with_theirs():
    _, between = position_axis.second_moment()
    assert between.outputs[0][2].subs(gaussian.COV12, 0) == 0


@pytest.mark.quick
def test_positive_terms():
    """Changes nothing, and refuses what could cancel."""
    inverse = sp.Symbol("inverse")
    scale = 1 + probabilities.T * probabilities.VARIANCE
    expression = (1 + probabilities.MEAN) ** 2 / scale**2 + probabilities.VARIANCE / (2 * scale)
    got = probabilities.positive_terms(inverse, sp.expand(expression))
    assert sp.simplify(got.subs(inverse, 1 / scale) - expression) == 0
    with pytest.raises(ArithmeticError, match="negative coefficient"):
        probabilities.positive_terms(inverse, probabilities.MEAN / scale)


# The steps of the derivations

U, V, W = sp.symbols("u v w", real=True)


def gaussian_integral_by_quadrature(exponent, variables, covariance, n_nodes=40) -> float:
    """`log E[exp(exponent)]` on a grid, through the Cholesky factor."""
    x, weight = hermite_e.hermegauss(n_nodes)
    weight = weight / weight.sum()
    n = len(variables)
    grid = np.stack(np.meshgrid(*[x] * n, indexing="ij"), axis=-1)
    weights = functools.reduce(np.multiply.outer, [weight] * n)
    values = grid @ np.linalg.cholesky(np.array(covariance, dtype=float)).T
    function = sp.lambdify(variables, exponent, "numpy")
    return float(np.log(np.sum(weights * np.exp(function(*np.moveaxis(values, -1, 0))))))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("exponent", "variables", "covariance"),
    [
        (-U * U / 3 + U / 2 - sp.Rational(1, 5), [U], [[sp.Rational(3, 2)]]),
        (U - V / 4 + 2, [U, V], [[1, sp.Rational(1, 3)], [sp.Rational(1, 3), 2]]),
        (
            -U * U / 2 - U * V / 5 - V * V / 7 + V,
            [U, V],
            [[1, -sp.Rational(1, 2)], [-sp.Rational(1, 2), 1]],
        ),
        (
            -U * U / 4 + V * W / 6 - W * W / 2 + U / 3 - W / 8,
            [U, V, W],
            [
                [1, sp.Rational(1, 4), 0],
                [sp.Rational(1, 4), 1, sp.Rational(1, 5)],
                [0, sp.Rational(1, 5), sp.Rational(1, 2)],
            ],
        ),
    ],
    ids=["one", "linear", "cross", "three"],
)
def test_gaussian_log_integral(exponent, variables, covariance):
    rational, determinant = gaussian.gaussian_log_integral(
        sp.sympify(exponent), sp.Matrix(variables), sp.Matrix(covariance)
    )
    got = float(rational - sp.log(determinant) / 2)
    want = gaussian_integral_by_quadrature(exponent, variables, covariance)
    assert got == pytest.approx(want, abs=1e-11)
    # Negative control: a linear term more.
    other = gaussian_integral_by_quadrature(exponent + variables[0] / 1000, variables, covariance)
    assert got != pytest.approx(other, abs=1e-11)


def test_log_transform_is_the_oracle():
    rational, determinant = class_axis.log_transform()
    fractions = ((3, 4), (-1, 3), (2, 1), (2, 7), (5, 3))
    symbols = (
        gaussian.VAR1,
        gaussian.COV12,
        gaussian.VAR2,
        gaussian.T,
        gaussian.S,
    )
    numbers = {x: sp.Rational(*fraction) for x, fraction in zip(symbols, fractions, strict=True)}
    with mpmath.workdps(DIGITS):
        got = mpmath.mpf(sp.N((rational - sp.log(determinant) / 2).subs(numbers), DIGITS))
        a, c, b, t, s = (mpmath.mpf(p) / q for p, q in fractions)
        assert abs(got - log_phi(t, s, c, a, b)) < mpmath.mpf(10) ** -50


def test_in_powers_of():
    _, base = class_axis.log_transform()
    inverse = sp.Symbol("inverse")
    digits = (gaussian.COV12 * gaussian.T - 3, gaussian.S, sp.Integer(2))
    expression: Any = sum(digit / base ** (3 - i) for i, digit in enumerate(digits))
    expression = sp.together(expression)
    got = class_axis.in_powers_of(base, inverse, expression)
    want = sum(digit * inverse ** (3 - i) for i, digit in enumerate(digits))
    assert sp.expand(got - want) == 0
    with pytest.raises(ArithmeticError, match="not a polynomial"):
        class_axis.in_powers_of(base, inverse, base**2)


A11, C12, B22 = gaussian.VAR1, gaussian.COV12, gaussian.VAR2

# By counting pairings (Isserlis 1918): c per pair of one u and one v.
ISSERLIS = {
    (0, 0): sp.Integer(1),
    (2, 0): A11,
    (0, 2): B22,
    (1, 1): C12,
    (4, 0): 3 * A11**2,
    (0, 6): 15 * B22**3,
    (3, 1): 3 * A11 * C12,
    (2, 2): A11 * B22 + 2 * C12**2,
    (3, 3): 9 * A11 * B22 * C12 + 6 * C12**3,
    (4, 2): 3 * A11**2 * B22 + 12 * A11 * C12**2,
    (4, 4): 9 * A11**2 * B22**2 + 72 * A11 * B22 * C12**2 + 24 * C12**4,
}


@pytest.mark.quick
@pytest.mark.parametrize(("i", "j"), ISSERLIS)
def test_moment(i, j):
    assert sp.expand(gaussian.moment(i, j) - ISSERLIS[i, j]) == 0
    # Its mirror image.
    mirror = {A11: B22, B22: A11}
    assert sp.expand(gaussian.moment(j, i) - ISSERLIS[i, j].subs(mirror, simultaneous=True)) == 0


@pytest.mark.quick
@pytest.mark.parametrize(("i", "j"), [(1, 0), (0, 3), (2, 1), (4, 5), (-1, 1), (-2, 0), (0, -1)])
def test_moments_that_vanish(i, j):
    assert gaussian.moment(i, j) == 0


@pytest.mark.parametrize(("i", "j"), [(5, 3), (6, 6), (1, 9), (12, 8)])
def test_moment_by_quadrature(i, j):
    a, c, b = 0.75, -0.5, 1.25
    x, weight = hermite_e.hermegauss(30)
    weight /= weight.sum()
    u = np.sqrt(a) * x[:, None]
    v = c / np.sqrt(a) * x[:, None] + np.sqrt(b - c**2 / a) * x
    want = weight @ (u**i * v**j) @ weight
    numbers = {A11: a, C12: c, B22: b}
    assert float(gaussian.moment(i, j).subs(numbers)) == pytest.approx(want, rel=1e-11)
    # Negative control: another variance.
    numbers[B22] = b * (1 + 1e-9)
    assert float(gaussian.moment(i, j).subs(numbers)) != pytest.approx(want, rel=1e-11)


def test_expectation_is_linear():
    polynomial = 2 * U**2 * V**2 - sp.Rational(1, 3) * U * V + U**3 + 7
    polynomial = polynomial.subs({U: gaussian.U, V: gaussian.V})
    want = 2 * ISSERLIS[2, 2] - C12 / 3 + 7
    assert sp.expand(gaussian.expectation(polynomial) - want) == 0


@pytest.mark.quick
def test_sums_of_the_infinitely_wide_axis():
    infinite_width.verify()


@pytest.mark.quick
def test_a_wrong_sum_of_the_infinitely_wide_axis_is_noticed(monkeypatch):
    """Negative control: `e_r` with one degree less."""
    monkeypatch.setattr(
        infinite_width,
        "exponential_sum",
        lambda x, degree: gaussian.taylor_polynomial(x, max(0, degree - 1)),
    )
    with pytest.raises(ArithmeticError, match="of order 2"):
        infinite_width.verify()


@pytest.mark.quick
@pytest.mark.parametrize("order", [0, 1, 2, 5, 12])
def test_taylor_polynomial(order):
    got = sp.Poly(gaussian.taylor_polynomial(U, order), U)
    assert got.degree() == order
    assert sp.expand(got.as_expr() - sp.series(sp.exp(U), U, 0, order + 1).removeO()) == 0
    # f_m' = f_{m-1}.
    if order:
        below = gaussian.taylor_polynomial(U, order - 1)
        assert sp.expand(got.as_expr().diff(U) - below) == 0
