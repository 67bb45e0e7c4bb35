"""The infinitely wide layer against two-dimensional quadrature in mpmath, exact for polynomials."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from numpy.polynomial import hermite_e

from taylor_softmax import _infinite_width, stax
from taylor_softmax._numerics import errors
from taylor_softmax._numerics.surrogate import parse

ORDERS = (2, 4, 6, 8, 10, 12, 14, 20, 32)
DIGITS = 50
EPS = float(np.finfo(float).eps)

# (var1, cov12, var2): correlations of both signs, 0, +-1; equal and unequal variances; variance 0.
COVARIANCES: Any = (
    (1.0, 0.5, 1.0),
    (0.25, -0.3, 2.0),
    (3.0, 0.0, 0.5),
    (4.0, 4.0, 4.0),
    (4.0, -2.0, 1.0),
    (0.0, 0.0, 1.5),
    (20.0, 11.0, 12.0),
    (1e-6, 1e-7, 1e-6),
)


@functools.cache
def gauss_hermite(n_nodes: int) -> tuple[list, list]:
    """Nodes and weights for the standard normal at 50 digits: Newton's method on He_n."""
    nodes, weights = [], []
    with mpmath.workdps(DIGITS + 10):
        for start in hermite_e.hermegauss(n_nodes)[0]:
            x = mpmath.mpf(float(start))
            for _ in range(4):  # doubles the 15 digits each time
                below, value = hermite_pair(n_nodes, x)
                x -= value / (n_nodes * below)  # He_n' = n He_{n-1}
            below, _ = hermite_pair(n_nodes, x)
            nodes.append(x)
            weights.append(mpmath.factorial(n_nodes) / (n_nodes * below) ** 2)
    return nodes, weights


def hermite_pair(n: int, x):
    """`He_{n-1}(x), He_n(x)` by the three-term recurrence."""
    below, value = mpmath.mpf(0), mpmath.mpf(1)
    for k in range(n):
        below, value = value, x * value - k * below
    return below, value


def taylor(z, order: int):
    """`f_m(z)`, whose derivative is `f_{m-1}`."""
    total = mpmath.mpf(1)
    for k in range(order, 0, -1):
        total = 1 + z * total / k
    return total


@functools.cache
def exact(var1: Any, cov12: Any, var2: Any, order: int) -> tuple[Any, Any, Any, Any]:
    """`E[f(u) f(v)], E[f'(u) f'(v)], E f(u), E f(v)`; `u`, `v` from their Cholesky factor."""
    with mpmath.workdps(DIGITS):
        var1, cov12, var2 = (mpmath.mpf(x) for x in (var1, cov12, var2))
        sigma1 = mpmath.sqrt(var1)
        shared = cov12 / sigma1 if var1 else mpmath.mpf(0)
        own = mpmath.sqrt(max(var2 - shared**2, 0))
        # u and v together have degree 2 m in the first variable, v alone m in the second.
        xs, x_weights = gauss_hermite(order + 1)
        ys, y_weights = gauss_hermite(order // 2 + 1)
        totals = [mpmath.mpf(0)] * 4
        for x, x_weight in zip(xs, x_weights, strict=True):
            u = sigma1 * x
            vs = [shared * x + own * y for y in ys]
            mean_v = mpmath.fdot(y_weights, [taylor(v, order) for v in vs])
            mean_slope_v = mpmath.fdot(y_weights, [taylor(v, order - 1) for v in vs])
            value_u = taylor(u, order)
            for i, term in enumerate(
                (value_u * mean_v, taylor(u, order - 1) * mean_slope_v, value_u, mean_v)
            ):
                totals[i] += x_weight * term
        return tuple(totals)


def exact_kernel(var1: Any, cov12: Any, var2: Any, order: int) -> tuple[Any, Any]:
    with mpmath.workdps(DIGITS):
        second, slope, mean1, mean2 = exact(var1, cov12, var2, order)
        return second / (mean1 * mean2), slope / (mean1 * mean2)


def assert_moments(got, covariance, order: int, allowed: float) -> None:
    """Relative to the value at `|cov12|`: the terms alternate in sign where cov12 is negative."""
    var1, cov12, var2 = covariance
    want = exact_kernel(var1, cov12, var2, order)
    size = exact_kernel(var1, abs(cov12), var2, order)
    with mpmath.workdps(DIGITS):
        errors = [float(abs(float(g) - w) / s) for g, w, s in zip(got, want, size, strict=True)]
    assert max(errors) <= allowed, f"order {order}, {covariance}: {errors}, {got} for {want}"


# One compilation, where eager operations would each have their own.


def kernel(var1, cov12, var2, *, order: int | None):
    return _infinite_width.moments(var1, cov12, var2, surrogate=parse(order, finite=False))


compiled: Any = jax.jit(kernel, static_argnames="order")


def moments(covariance, order, dtype: Any = np.float64):
    return compiled(*(jnp.asarray(x, dtype) for x in covariance), order=order)


# The oracle


@pytest.mark.quick(n_nodes=9)
@pytest.mark.parametrize("n_nodes", [1, 2, 9, 33])
def test_gauss_hermite_is_exact(n_nodes):
    with mpmath.workdps(DIGITS):
        xs, weights = gauss_hermite(n_nodes)
        for power in range(2 * n_nodes):
            got = mpmath.fdot(weights, [x**power for x in xs])
            want = 0 if power % 2 else mpmath.fac2(power - 1)
            assert abs(got - want) < mpmath.mpf(10) ** (5 - DIGITS) * mpmath.fac2(power)
        # Negative control: the first degree that it must get wrong.
        got = mpmath.fdot(weights, [x ** (2 * n_nodes) for x in xs])
        assert abs(got / mpmath.fac2(2 * n_nodes - 1) - 1) > 1e-10


@pytest.mark.quick
def test_oracle_on_what_is_known_by_hand():
    """`f_2 = 1 + z + z^2 / 2`: E[u^2 v^2] = a b + 2 c^2, E[u v] = c."""
    a, c, b = 0.75, -0.25, 2.0
    second, slope, mean1, mean2 = exact(a, c, b, 2)
    assert float(mean1) == pytest.approx(1 + a / 2, rel=1e-15)
    assert float(mean2) == pytest.approx(1 + b / 2, rel=1e-15)
    assert float(second) == pytest.approx(1 + (a + b) / 2 + c + (a * b + 2 * c**2) / 4, rel=1e-15)
    assert float(slope) == pytest.approx(1 + c, rel=1e-15)


# Values


@pytest.mark.quick(order=12)
@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("order", ORDERS)
def test_moments(order, covariance):
    got = moments(covariance, order)
    assert_moments(got, covariance, order, 2 * order * EPS)
    swapped = moments(covariance[::-1], order)
    np.testing.assert_allclose(swapped, got, rtol=8 * EPS, atol=8 * EPS * abs(float(got[0])))


@pytest.mark.quick(order=14)
@pytest.mark.parametrize("order", ORDERS)
def test_a_perturbed_moment_is_noticed(order, monkeypatch):
    """Negative control: a covariance that is off by 1e-12, a neighbouring order."""
    covariance = (1.0, 0.5, 1.0)
    with pytest.raises(AssertionError, match="order"):
        assert_moments(
            moments((1.0, 0.5 * (1 + 1e-12), 1.0), order), covariance, order, 2 * order * EPS
        )
    # Orders above 20 agree with their neighbours to rounding at variance 1, but not at 20.
    covariance = (20.0, 11.0, 12.0)
    with pytest.raises(AssertionError, match="order"):
        assert_moments(moments(covariance, order + 2), covariance, order, 2 * order * EPS)


@pytest.mark.quick(order=14)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_float32(covariance, order):
    # The oracle gets the very numbers that the library gets.
    covariance = tuple(float(np.float32(x)) for x in covariance)
    got = moments(covariance, order, np.float32)
    assert got[0].dtype == got[1].dtype == np.float32
    assert_moments(got, covariance, order, 2 * order * float(np.finfo(np.float32).eps))


# Edges


@functools.cache
def derivatives_fn(order) -> Any:
    """Cached: compiling the sums for one order and shape takes a second or more."""
    function = jax.jacrev(functools.partial(kernel, order=order), argnums=(0, 1, 2))
    return jax.jit(jax.vmap(function))


def derivatives(arguments, order):
    """Of value and slope in all three arguments, `(6, N)`."""
    return np.stack(jax.tree.leaves(derivatives_fn(order)(*arguments)))


@pytest.mark.quick(order=14, dtype=np.float32)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", [2, 12, 14, 32])
def test_edges(order, dtype):
    """Variance 0 and tiny; correlation +-1, and beyond by rounding."""
    beyond = 1 + 4 * float(np.finfo(dtype).eps)
    covariances = [
        (0.0, 0.0, 0.0),
        (0.0, 0.0, 3.0),
        (1e-12, -1e-12, 1e-12),
        *((v, sign * v * beyond, v) for v in (1e-12, 1.0, 20.0) for sign in (1, -1)),
        (20.0, 1e-6, 1e-12),
    ]
    arguments = [jnp.asarray(x, dtype) for x in np.array(covariances).T]
    values = jnp.stack(compiled(*arguments, order=order))
    assert values.dtype == dtype
    for got, covariance in zip(values.T, covariances, strict=True):
        # The oracle stops at correlation 1.
        inside = tuple(c / beyond if abs(c) > covariance[0] > 0 else c for c in covariance)
        allowed = 2 * order * float(np.finfo(dtype).eps)
        assert_moments(got, inside, order, allowed * (1 + 2 * order))
    if order <= 12 or (order == 14 and dtype is np.float32):  # compiling them takes long
        assert np.isfinite(derivatives(arguments, order)).all()


@pytest.mark.quick(order=32)
@pytest.mark.parametrize("order", ORDERS)
def test_variance_1000(order):
    for covariance in ((1e3, 1e3, 1e3), (1e3, -1e3, 1e3)):
        assert_moments(moments(covariance, order), covariance, order, 2 * order * EPS)


@pytest.mark.quick(order=32)
@pytest.mark.parametrize("order", ORDERS)
def test_variance_1000_in_float32(order):
    eps = float(np.finfo(np.float32).eps)
    for covariance in ((1e3, 1e3, 1e3), (1e3, -1e3, 1e3)):
        got = moments(covariance, order, np.float32)
        assert np.isfinite(got).all()
        assert_moments(got, covariance, order, 2 * order * eps)


@pytest.mark.quick(order=20)
@pytest.mark.parametrize("order", [2, 12, 14, 20])
def test_derivatives_at_variance_1000_in_float32(order):
    covariances = [(1e3, 1e3, 1e3), (1e3, -1e3, 1e3), (1e3, 0.0, 1e3), (1e3, 1e-3, 1e-12)]
    arguments = [jnp.asarray(x, np.float32) for x in np.array(covariances).T]
    got = derivatives(arguments, order)
    assert got.dtype == np.float32
    assert np.isfinite(got).all()
    want = derivatives([jnp.asarray(x, np.float64) for x in arguments], order)
    # float64 itself is compared with mpmath below. Derivatives in the variances are differences
    # of terms of the size of that in the covariance, or of the value over the variance.
    var1, cov12, var2 = arguments
    value, _ = compiled(var1, jnp.abs(cov12), var2, order=order)
    size = np.abs(want).max(axis=0) + value / jnp.maximum(1, jnp.minimum(var1, var2))
    assert (np.abs(got - want) <= 10 * order * np.finfo(np.float32).eps * size).all()


@pytest.mark.quick(order=12)
@pytest.mark.parametrize("order", [2, 12, 14])
def test_derivatives(order):
    covariances = ((0.25, -0.3, 2.0), (20.0, 11.0, 12.0), (1e3, 500.0, 1e3), (1e3, -999.0, 1e3))
    columns = derivatives([jnp.asarray(x) for x in np.array(covariances).T], order).T
    for covariance, got in zip(covariances, columns, strict=True):
        with mpmath.workdps(DIGITS):
            want = []
            for output, argument in np.ndindex(2, 3):
                h = mpmath.mpf(10) ** -12 * covariance[argument]
                ends = []
                for sign in (1, -1):
                    moved = [mpmath.mpf(x) for x in covariance]
                    moved[argument] += sign * h
                    ends.append(exact_kernel(*moved, order=order)[output])
                want.append(float((ends[0] - ends[1]) / (2 * h)))
        # As above: what cancels is of the size of the derivative in the covariance.
        scale = np.abs(want).max() * EPS
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=100 * order * scale)
        # Negative control: the two variances told apart.
        if covariance[0] != covariance[2]:
            assert abs(got[0] - want[2]) > 1e-3 * abs(want[2])


@pytest.mark.quick(order=4)
@pytest.mark.parametrize("order", ORDERS)
def test_constant_input(order):
    """A variance of 0 makes `f(u) = 1`: nothing to correlate."""
    value, slope = moments((0.0, 0.0, 5.0), order)
    np.testing.assert_allclose(value, 1, rtol=4 * EPS)
    # E[f'(v)] / E[f(v)], the sum of the order below over that of the order.
    terms = [2.5**j / float(mpmath.factorial(j)) for j in range(order // 2 + 1)]
    np.testing.assert_allclose(slope, sum(terms[:-1]) / sum(terms), rtol=order * EPS)


# Slopes, shapes, softmax


@pytest.mark.quick(order=14)
@pytest.mark.parametrize("order", [2, 4, 8, 12, 14, None])
def test_slope_is_the_derivative(order):
    """By Price's theorem; here by differentiating the value, and by mpmath."""
    arguments = [jnp.asarray(x) for x in np.array(COVARIANCES).T]
    value_fn: Any = jax.grad(lambda a, c, b: kernel(a, c, b, order=order)[0], argnums=1)
    value_fn = jax.jit(jax.vmap(value_fn))
    _, slope = compiled(*arguments, order=order)
    var1, cov12, var2 = arguments
    _, size = compiled(var1, jnp.abs(cov12), var2, order=order)
    difference = jnp.abs(value_fn(*arguments) - slope) / size
    assert float(difference.max()) <= 4 * (order or 2) * EPS
    if order is not None and order <= 8:
        with mpmath.workdps(30):
            numeric = mpmath.diff(lambda c: exact_kernel(1.0, c, 1.0, order)[0], 0.5, h=1e-10)
        np.testing.assert_allclose(slope[0], float(numeric), rtol=1e-9)
    # Negative control: the value is not its own slope, except for softmax.
    if order in (2, 4, 6, 8, 10):
        assert abs(float(slope[6] / compiled(*arguments, order=order)[0][6] - 1)) > 1e-2


@pytest.mark.quick
def test_softmax_is_exp():
    var1, cov12, var2 = (jnp.asarray(x) for x in np.array(COVARIANCES).T)
    value, slope = kernel(var1, cov12, var2, order=None)
    want = [float(mpmath.exp(float(c))) for c in cov12]
    np.testing.assert_allclose(value, want, rtol=2 * EPS * 12)
    np.testing.assert_array_equal(value, slope)
    # Independent: E[exp(u + v)] / (E[exp u] E[exp v]) by quadrature.
    x, weight = hermite_e.hermegauss(60)
    weight = weight / weight.sum()
    u = 0.8 * x[:, None]
    v = 0.3 * x[:, None] + 0.4 * x
    second = weight @ np.exp(u + v) @ weight
    means = (weight @ np.exp(u) @ np.ones(1)) * (weight @ np.exp(v) @ weight)
    got, _ = moments((0.64, 0.24, 0.25), None)
    np.testing.assert_allclose(got, second / means, rtol=1e-13)


@pytest.mark.quick
def test_orders_converge_to_softmax():
    covariance = (1.0, -0.7, 0.8)
    want = float(moments(covariance, None)[0])
    errors = [abs(float(moments(covariance, order)[0]) - want) for order in (2, 6, 10, 14, 20)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[0] > 1e-2
    assert errors[-1] < 1e-9


@pytest.mark.quick(order=14)
@pytest.mark.parametrize("order", [2, 14, None])
def test_broadcasts(order):
    var1, var2 = jnp.asarray([[0.5], [1.0], [4.0]]), jnp.asarray([0.3, 2.0])
    cov12 = 0.6 * jnp.sqrt(var1 * var2)
    got = jnp.stack(compiled(var1, cov12, var2, order=order))
    assert got.shape == (2, 3, 2)
    for i in range(3):
        for j in range(2):
            each = compiled(var1[i, 0], cov12[i, j], var2[j], order=order)
            np.testing.assert_allclose(got[:, i, j], each, rtol=1e-14)
    # cov12 may be the one that is broadcast.
    value, slope = kernel(var1, jnp.asarray(0.1), var2, order=order)
    assert value.shape == slope.shape == (3, 2)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_to_where_floats_go(dtype):
    """The promise at its edge; beyond it a layer says so."""
    top = {np.float32: 88.0, np.float64: 709.0}[dtype]
    error = errors.promised(errors.INFINITE_WIDTH_SOFTMAX, top, dtype)
    got = moments((top, top, top), None, dtype)
    for each in got:
        assert each.dtype == dtype
        assert float(each) == pytest.approx(float(mpmath.exp(top)), rel=error)
    with pytest.raises(KeyError, match="Nothing is promised"):
        errors.promised(errors.INFINITE_WIDTH_SOFTMAX, 1.01 * top, dtype)
    softmax = stax.Softmax(infinite_width=True)[2]

    def logits(variance):
        k = stax.Dense(8)[2](np.sqrt(np.array([[1.0], [variance]])), None)
        return k.replace(
            **{name: getattr(k, name).astype(dtype) for name in ("nngp", "ntk", "cov1")}
        )

    assert np.all(np.isfinite(softmax(logits(top - 10)).ntk))
    # The NTK, of which the covariance is a factor, ends before.
    for variance, name in ((1.02 * top, "nngp"), (top - 1, "ntk")):
        message = f"`{name}` of .*overflows {np.dtype(dtype)}.*variances up to"
        with pytest.raises(ValueError, match=message):
            softmax(logits(variance))
        assert np.isinf(jax.jit(lambda k: softmax(k).ntk)(logits(variance))).any()


@pytest.mark.quick
def test_orders_at_the_edge_of_the_promise():
    top = 1e3
    for dtype in (np.float64, np.float32):
        error = errors.promised(errors.INFINITE_WIDTH, top, dtype)
        for order in (2, 8):
            assert_moments(moments((top, top, top), order, dtype), (top,) * 3, order, error)
