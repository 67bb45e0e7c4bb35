"""The class covariance against brute force, at its edges, and as a JAX function."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.polynomial import chebyshev

import taylor_softmax
from derivations import class_axis_grids
from oracles import class_axis as brute_force
from taylor_softmax import monte_carlo, predict, stax
from taylor_softmax._class_axis import covariance, evaluation, integral, terms
from taylor_softmax._class_axis.covariance import Pairs
from taylor_softmax._numerics import errors
from taylor_softmax._numerics.surrogate import parse
from taylor_softmax.methods import Direct, Interpolate

DIRECT = Direct()

CORRELATIONS = np.array([-1.0, -0.6, 0.0, 0.3, 0.9, 0.999, 1.0])

# (order, n, largest variance), within what brute force resolves.
SETTINGS = [
    *((2, n, 20.0) for n in (2, 3, 10, 1000, 100_000)),
    *((order, n, 4.0) for order in (4, 16, None) for n in (2, 3, 10, 1000)),
    (8, 10, 10.0),
    (32, 10, 4.0),
    (None, 100, 10.0),
    (None, 100_000, 10.0),
]


def some(settings):
    """All but every fifth of them marked as slow."""
    return [
        each if i % 5 == 0 else pytest.param(*each, marks=pytest.mark.slow)
        for i, each in enumerate(settings)
    ]


def variance_pairs(largest):
    return [(largest, largest), (largest, 0.02 * largest), (0.1 * largest, 0.1 * largest)]


def promised(order, n, variance, dtype=jnp.float64):
    """Of value and slope."""
    return [errors.promised(each, variance, dtype) for each in errors.class_axis(parse(order), n)]


def entries(var1, rho, var2, *, n, order, method=None, dtype=jnp.float64):
    """`I` and `dI / dc` for arrays of equal shape."""
    a, c, b = (jnp.asarray(x, dtype) for x in (var1, rho * np.sqrt(var1 * var2), var2))
    ((value, slope),) = covariance.covariances(
        [Pairs(a, c, b)], n_classes=n, surrogate=parse(order), method=method, slopes=[True]
    )
    return np.asarray(value, np.float64), np.asarray(slope, np.float64)


def reference(var1, rho, var2, n, order):
    # Two classes of large variance make functions that a coarser grid does not resolve.
    grid = 400 if n == 2 and order == 2 else 200
    return np.array(
        [brute_force.class_covariance(var1, r, var2, n=n, order=order, grid=grid) for r in rho]
    )


def scale(var1, var2, n, order):
    """The value at correlation 1 that errors are relative to."""
    return np.sqrt(
        brute_force.class_covariance(var1, 1.0, var1, n=n, order=order)
        * brute_force.class_covariance(var2, 1.0, var2, n=n, order=order)
    )


# The brute force itself.


@pytest.mark.quick
def test_brute_force_rows_sum_to_one():
    for n, order, var in ((2, 2, 20.0), (3, 8, 4.0), (10, None, 10.0)):
        same, cross = brute_force.moments(
            jnp.asarray(var), jnp.asarray(0.7), jnp.asarray(var / 3), n=n, order=order
        )
        np.testing.assert_allclose(same + (n - 1) * cross, 1 / n, rtol=1e-10)


@pytest.mark.quick
def test_brute_force_of_two_classes_is_the_logistic_integral():
    # For n = 2 softmax is a sigmoid of the difference of the logits: two dimensions, no Laplace.
    x, w = np.polynomial.hermite_e.hermegauss(120)
    w = w / w.sum()
    for var1, rho, var2 in ((1.0, 0.5, 1.0), (4.0, -0.8, 0.5), (0.1, 1.0, 0.1)):
        u = np.sqrt(2 * var1) * x
        v = np.sqrt(2 * var2) * (rho * x[:, None] + np.sqrt(1 - rho**2) * x)
        same = w @ (1 / (1 + np.exp(-v)) @ w / (1 + np.exp(-u)))
        value = brute_force.class_covariance(var1, rho, var2, n=2, order=None)
        np.testing.assert_allclose(0.25 + value / 2, same, rtol=1e-8)


# Accuracy.


@pytest.mark.quick(order=None, n=10)
@pytest.mark.parametrize(("order", "n", "largest"), some(SETTINGS))
def test_accuracy(order, n, largest):
    for var1, var2 in variance_pairs(largest):
        exact, one = reference(var1, CORRELATIONS, var2, n, order), scale(var1, var2, n, order)
        variances = (np.full(CORRELATIONS.size, each) for each in (var1, var2))
        var1s, var2s = variances
        for dtype, method in itertools.product((jnp.float64, jnp.float32), (None, DIRECT)):
            value, _ = entries(
                var1s, CORRELATIONS, var2s, n=n, order=order, method=method, dtype=dtype
            )
            error = np.abs(value - exact) / one
            assert np.max(error) < promised(order, n, largest, dtype)[0], (
                var1,
                var2,
                dtype,
                method,
                dict(zip(CORRELATIONS, error, strict=True)),
            )


@pytest.mark.quick(order=None, n=10)
@pytest.mark.parametrize(("order", "n", "largest"), some(SETTINGS[::3]))
def test_accuracy_of_derivative(order, n, largest):
    """`dI / dc` against the derivative of a Chebyshev interpolant of brute-force values.

    At equal variances, where it converges slowest, near correlation 1.
    """
    nodes = chebyshev.chebpts2(97 if n < 10 else 49)
    values = reference(largest, nodes, largest, n, order)
    fit = chebyshev.chebfit(nodes, values, nodes.size - 1)
    derivative = chebyshev.chebder(fit) / largest
    one = chebyshev.chebval(1.0, derivative)
    # What the interpolant itself can be trusted to, at the ends, where it is worst.
    tail = np.max(np.abs(fit[-4:])) * nodes.size**2 / largest
    _, limit = promised(order, n, largest)
    assert tail / one < limit / 2, "the reference itself is not good enough"
    exact = chebyshev.chebval(CORRELATIONS, derivative)
    variances = np.full(CORRELATIONS.size, largest)
    for dtype, method in itertools.product((jnp.float64, jnp.float32), (None, DIRECT)):
        _, slope = entries(
            variances, CORRELATIONS, variances, n=n, order=order, method=method, dtype=dtype
        )
        error = np.abs(slope - exact) / one
        limit = promised(order, n, largest, dtype)[1]
        assert np.max(error) < limit, (dtype, method, dict(zip(CORRELATIONS, error, strict=True)))


@pytest.mark.quick(order=2, n=10, dtype=jnp.float32)
@pytest.mark.parametrize("order", [2, 8, None])
@pytest.mark.parametrize("n", [2, 10, 100_000])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_small_variances_have_the_linear_limit(order, n, dtype):
    """`y_i = 1/n + (z_i - mean z)/n + ...` as the logits vanish, so `I -> c / n^2`.

    Brute force cannot see this: `I` is a difference of moments of 1 / n^2 there.
    """
    var1 = np.array([1e-12, 1e-12, 1e-9, 1e-20])
    var2 = np.array([1e-12, 1e-10, 1e-9, 1e-20])
    rho = np.array([1.0, -0.5, 0.3, 0.9])
    for method in (None, DIRECT):
        value, slope = entries(var1, rho, var2, n=n, order=order, method=method, dtype=dtype)
        rtol = promised(order, n, 1.0, dtype)[1]
        np.testing.assert_allclose(value, rho * np.sqrt(var1 * var2) / n**2, rtol=rtol)
        np.testing.assert_allclose(slope, np.full(4, 1 / n**2), rtol=rtol)


def test_one_tiny_and_one_large_variance():
    for n in (2, 10, 100_000):
        exact = brute_force.class_covariance(1e-6, 0.8, 20.0, n=n, order=2)
        value, _ = entries(*np.array([[1e-6], [0.8], [20.0]]), n=n, order=2)
        assert abs(value[0] - exact) < promised(2, n, 20.0)[0] * scale(1e-6, 20.0, n, 2)


@pytest.mark.quick
def test_negative_control_another_order_is_found():
    """The limits tell apart orders whose kernels differ in the fifth digit only."""
    value, _ = entries(*np.array([[0.5], [0.9], [0.5]]), n=10, order=8, method=DIRECT)
    exact = brute_force.class_covariance(0.5, 0.9, 0.5, n=10, order=10)
    one = scale(0.5, 0.5, 10, 10)
    assert 1e-6 < abs(value[0] - exact) / one < 1e-3


@pytest.mark.quick
def test_negative_control_a_wrong_integrand_is_found(monkeypatch):
    emitted = integral.class_axis_order_2

    def without_the_determinant(*arguments):
        log_phi, *rest = emitted(*arguments)
        var1, cov12, var2, t, s = arguments
        wrong = log_phi + 1e-5 * jnp.log1p(t * s * (var1 * var2 - cov12**2))
        return wrong, *rest

    monkeypatch.setattr(integral, "class_axis_order_2", without_the_determinant)
    jax.clear_caches()
    value, _ = entries(*np.array([[2.0], [0.5], [2.0]]), n=10, order=2, method=DIRECT)
    monkeypatch.undo()
    jax.clear_caches()
    exact = brute_force.class_covariance(2.0, 0.5, 2.0, n=10, order=2)
    assert abs(value[0] - exact) > promised(2, 10, 2.0)[0] * scale(2.0, 2.0, 10, 2)


# Edges.


@pytest.mark.parametrize(
    ("order", "method"),
    [
        (2, DIRECT),
        pytest.param(4, DIRECT, marks=pytest.mark.slow),
        pytest.param(None, DIRECT, marks=pytest.mark.slow),
        *((order, None) for order in (2, 4, None)),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_no_nan_anywhere(order, method, dtype):
    # Quadrature and its gradients take their time.
    variances = np.array([0.0, 1.0, 1e3] if method == DIRECT else [0, 1e-20, 1e-6, 1, 1e3, 1e6])
    var1, var2 = (jnp.asarray(v, dtype) for v in (variances[:, None], variances[None]))
    root = jnp.sqrt(var1 * var2)

    def total(var1, cov12, var2, n):
        ((value, slope),) = covariance.covariances(
            [Pairs(var1, cov12, var2)],
            n_classes=n,
            surrogate=parse(order),
            method=method,
            slopes=[True],
        )
        return jnp.sum(value) + jnp.sum(slope), (value, slope)

    gradients_of = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True), static_argnums=3)
    for n in (2,) if method == DIRECT else (2, 100_000):
        for rho in (0.0, 1.0, float(1 + 4 * jnp.finfo(dtype).eps), -1.0):
            gradients, values = gradients_of(var1, rho * root, var2, n)
            names = ("d var1", "d cov12", "d var2", "value", "slope")
            for name, array in zip(names, (*gradients, *values), strict=True):
                bad = ~np.isfinite(np.asarray(array))
                assert not bad.any(), (n, rho, name, np.argwhere(bad))


@pytest.mark.quick
def test_one_class_is_constant():
    value = taylor_softmax.class_covariance(jnp.ones(3), 0.5, 1.0, n_classes=1, order=2)
    np.testing.assert_array_equal(value, np.zeros(3))


def test_zero_variance_has_zero_covariance_and_the_slope_of_the_limit():
    for order in (2, 4, None):
        value, slope = entries(*np.array([[0.0], [0.0], [3.0]]), n=5, order=order)
        assert value[0] == 0
        # E[y_1'(u) y_1'(v)] with u = 0: y' = Id/n - 1 1^T/n^2 there. Compare a tiny variance.
        _, tiny = entries(*np.array([[1e-10], [0.0], [3.0]]), n=5, order=order)
        np.testing.assert_allclose(slope, tiny, rtol=1e-7)


# Shapes, methods, transformations.


def test_shapes_broadcast():
    key = random.split(random.key(0), 3)
    shapes = ((2, 1, 3, 1), (2, 2, 3, 4), (1, 2, 1, 4))
    a, r, b = (random.uniform(k, s) for k, s in zip(key, shapes, strict=True))
    c = (2 * r - 1) * jnp.sqrt(a * b)
    value = taylor_softmax.class_covariance(a, c, b, n_classes=4, order=4)
    assert value.shape == (2, 2, 3, 4)
    for index in itertools.product(range(2), range(2), range(3), range(4)):
        i, j, k, m = index
        alone = taylor_softmax.class_covariance(
            a[i, 0, k, 0], c[index], b[0, j, 0, m], n_classes=4, order=4
        )
        np.testing.assert_allclose(value[index], alone, rtol=1e-12)
    scalar = taylor_softmax.class_covariance(1, 0.5, 1, n_classes=4, order=None)
    assert scalar.shape == ()
    assert scalar.dtype == jnp.float64


@pytest.mark.parametrize(
    "order", [None, 2, *(pytest.param(m, marks=pytest.mark.slow) for m in (4, 12, 32))]
)
def test_the_interpolant_knows_its_error(order):
    """Against quadrature, which shares no code with it but the surrogate, at all correlations.

    Its estimate is not below the true error, nor above what is promised.
    """
    rng = np.random.default_rng(0)
    for low, top in ((1e-2, 20.0), (20.0, 100.0), (100.0, 1e4), (1e4, 1e6)):
        var1 = np.exp(rng.uniform(np.log(low), np.log(top), 12))
        var1[0] = top
        var2 = np.where(np.arange(12) % 3, np.exp(rng.uniform(np.log(1e-2), np.log(var1))), var1)
        rho = np.concatenate([[1.0, -1.0, 0.999, 0.0], rng.uniform(-1, 1, 8)])
        for n in (2, 10, 1000):
            exact = entries(var1, rho, var2, n=n, order=order, method=DIRECT)
            one = (
                entries(v, np.ones(12), v, n=n, order=order, method=DIRECT) for v in (var1, var2)
            )
            scales = [np.sqrt(first * second) for first, second in zip(*one, strict=True)]
            for dtype in (jnp.float64, jnp.float32):
                found = entries(var1, rho, var2, n=n, order=order, dtype=dtype)
                errors_found = [
                    np.abs(got - want) / scale
                    for got, want, scale in zip(found, exact, scales, strict=True)
                ]
                check_errors(errors_found, parse(order), n, top, dtype)


def check_errors(found, surrogate, n, top, dtype):
    """That errors of value and slope are below estimates, and these below what is promised."""
    info = jnp.finfo(dtype)
    estimates = terms.error(surrogate, n, info.bits, top)
    rounding = 3 * float(info.eps) * np.sqrt(np.maximum(top, 100.0))
    quantities = errors.class_axis(surrogate, n)
    for error, estimate, quantity in zip(found, estimates, quantities, strict=True):
        assert np.max(error) < estimate + rounding, (top, n, dtype)
        if any(row.quantity == quantity and top <= row.variance for row in errors.PROMISES):
            assert estimate < errors.promised(quantity, top, dtype), (top, n, dtype)


def test_the_ridge_of_high_orders(monkeypatch):
    """Where both inputs pass from the largest logit to the largest in size, together or not.

    That is where sigma is about a third of the order, variances are close and the correlation is
    close to 1; it is the narrower the higher the order.
    """
    var1 = np.array([60.0, 60.0, 60.0, 300.0])
    var2, rho = var1 * np.array([1.0, 0.97, 0.9, 0.98]), np.array([1.0, 1.0, 0.999, 1.0])
    order, n = 24, 2
    want = entries(var1, rho, var2, n=n, order=order, method=DIRECT)
    scale = [
        np.sqrt(one * two)
        for one, two in zip(
            *(entries(v, np.ones(4), v, n=n, order=order, method=DIRECT) for v in (var1, var2)),
            strict=True,
        )
    ]

    def wrong(dtype):
        found = entries(var1, rho, var2, n=n, order=order, dtype=dtype)
        return [
            np.max(np.abs(got - exact) / each)
            for got, exact, each in zip(found, want, scale, strict=True)
        ]

    for dtype in (jnp.float64, jnp.float32):
        limits = promised(order, n, 300.0, dtype)
        assert all(error < limit for error, limit in zip(wrong(dtype), limits, strict=True))
    # Negative control: on as many nodes as do for other surrogates.
    terms.interpolant.cache_clear()
    jax.clear_caches()
    monkeypatch.setattr(terms, "_NODES", (48,))
    assert wrong(jnp.float64)[1] > 1e-2
    monkeypatch.undo()
    terms.interpolant.cache_clear()
    jax.clear_caches()


def test_products_of_matrices_give_what_a_fused_loop_does():
    total, arguments = many_pairs(None, 10)
    want = jax.jit(jax.value_and_grad(total))(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_FUSED_TERMS", 0)
        jax.clear_caches()
        got = jax.jit(jax.value_and_grad(total))(*arguments)
    jax.clear_caches()
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.quick
def test_chebyshev_polynomials_of_each_backend():
    x = np.linspace(-1, 1, 41)
    want = np.cos(np.arange(243)[:, None] * np.arccos(x))
    slope = np.stack([chebyshev.chebval(0.3, chebyshev.chebder(row)) for row in np.eye(243)])
    for of_backend in (evaluation._by_recurrence, evaluation._by_doubling):
        for count in (2, 3, 48, 243):
            got = of_backend(jnp.asarray(x), count)
            np.testing.assert_allclose(got, want[:count], atol=1e-12)
        got, along = jax.jvp(lambda x, form=of_backend: form(x, 243), (0.3,), (1.0,))
        np.testing.assert_allclose(along, slope, atol=1e-8)
    # Control: rows that are out by one degree.
    assert np.max(np.abs(got[1:] - want[:-1, 0])) > 0.1


@pytest.mark.quick
def test_one_table_serves_several_requests():
    x = random.normal(random.key(3), (36, 8)) / 3
    a = jnp.sum(x**2, 1)
    requests = [Pairs(a[:, None], x @ x.T, a[None]), Pairs(a, a, a)]
    together = covariance.covariances(
        requests, n_classes=10, surrogate=parse(2), method=None, slopes=[True, False]
    )
    assert together[1][1] is None
    np.testing.assert_allclose(jnp.diagonal(together[0][0]), together[1][0], rtol=1e-12)


@pytest.mark.quick(order=None, method=Interpolate())
@pytest.mark.parametrize("order", [2, None])
@pytest.mark.parametrize("method", [pytest.param(DIRECT, marks=pytest.mark.slow), Interpolate()])
def test_kernels_stay_symmetric_and_positive(order, method):
    x = random.normal(random.key(4), (40, 30)) / 5
    a = jnp.sum(x**2, 1)
    for n in (2, 10):
        kernel = taylor_softmax.class_covariance(
            a[:, None], x @ x.T, a, n_classes=n, order=order, method=method
        )
        np.testing.assert_allclose(kernel, kernel.T, rtol=0, atol=1e-13)
        # To the accuracy of the values, no more: neither is exactly positive.
        eigenvalues = np.linalg.eigvalsh(kernel)
        assert eigenvalues[0] > -1e-7 * eigenvalues[-1], eigenvalues


@pytest.mark.quick(order=None, method=Interpolate())
@pytest.mark.parametrize("order", [2, 4, None])
@pytest.mark.parametrize("method", [pytest.param(DIRECT, marks=pytest.mark.slow), Interpolate()])
def test_gradients_agree_with_differences_and_with_the_slope(order, method):
    arguments = [jnp.asarray(x) for x in (1.3, 0.4, 0.7)]

    def value(*arguments):
        return taylor_softmax.class_covariance(*arguments, n_classes=5, order=order, method=method)

    gradients = jax.jit(jax.grad(value, (0, 1, 2)))(*arguments)
    for i, gradient in enumerate(gradients):
        shifted = [[x + s * 1e-4 * (j == i) for j, x in enumerate(arguments)] for s in (1, -1)]
        ends = [value(*x) for x in shifted]
        np.testing.assert_allclose(gradient, (ends[0] - ends[1]) / 2e-4, rtol=1e-6)
    ((_, slope),) = covariance.covariances(
        [Pairs(*arguments)], n_classes=5, surrogate=parse(order), method=method, slopes=[True]
    )
    np.testing.assert_allclose(gradients[1], slope, rtol=1e-5)


def many_pairs(order, n):
    """A sum of values and slopes of fused pairs, and its arguments."""
    rng = np.random.default_rng(0)
    shape = 131, 257
    a, b = (jnp.asarray(rng.uniform(0.1, 3, n)) for n in shape)
    c = jnp.asarray(rng.uniform(-0.95, 0.95, shape)) * jnp.sqrt(a[:, None] * b)
    weights = jnp.asarray(rng.standard_normal(shape))
    assert c.size > covariance._MANY_PAIRS > 11 * shape[1]

    def total(a, c, b, weights):
        # The slope, of which there is nothing but a derivative to ask for, and the value.
        ((value, slope),) = covariance.covariances(
            [Pairs(a[:, None], c, b)],
            n_classes=n,
            surrogate=parse(order),
            method=None,
            slopes=[True],
        )
        return jnp.sum(weights * (value + slope))

    return total, (a, c, b, weights)


@pytest.mark.parametrize(("order", "n"), [(None, 10), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_derivatives_of_many_pairs(order, n):
    """Fused and in blocks of columns, against few pairs at a time."""
    total, (a, c, b, weights) = many_pairs(order, n)
    gradient = jax.jit(jax.grad(total, (0, 1, 2)))
    got = gradient(a, c, b, weights)
    parts = [
        gradient(*(x[i : i + 11] for x in (a, c)), b, weights[i : i + 11])
        for i in range(0, 131, 11)
    ]
    want = (
        np.concatenate([part[0] for part in parts]),
        np.concatenate([part[1] for part in parts]),
        sum(part[2] for part in parts),
    )
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("order", "n"), [(None, 10), (2, 2)])
def test_second_derivatives_of_many_pairs(order, n):
    """Against differences."""
    total, (a, c, b, weights) = many_pairs(order, n)

    def along(t):
        return total(a * (1 + t), c * (1 + t) ** 0.5, b, weights)

    step = 1e-4
    values = [along(k * step) for k in (-1, 0, 1)]
    first, second = (jax.jit(f)(0.0) for f in (jax.grad(along), jax.grad(jax.grad(along))))
    scale = np.sum(np.abs(weights)) / n
    np.testing.assert_allclose(first, (values[2] - values[0]) / (2 * step), atol=1e-7 * scale)
    curvature = (values[2] - 2 * values[1] + values[0]) / step**2
    np.testing.assert_allclose(second, curvature, atol=1e-5 * scale)


def test_vmap_equals_broadcasting():
    a = jnp.linspace(0.1, 2, 6)
    direct = taylor_softmax.class_covariance(a, a / 2, a, n_classes=3, order=4)
    mapped = jax.vmap(lambda a: taylor_softmax.class_covariance(a, a / 2, a, n_classes=3, order=4))(
        a
    )
    np.testing.assert_allclose(mapped, direct, rtol=1e-12)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices; conftest makes two on a CPU")
def test_sharded_rows_stay_sharded():
    n_rows, n_columns = 1024, 96
    x = random.normal(random.key(5), (n_rows, 8)) / 3
    y = random.normal(random.key(6), (n_columns, 8)) / 3
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("rows",)), PartitionSpec("rows"))

    def kernel(x, y):
        a, b = jnp.sum(x**2, 1), jnp.sum(y**2, 1)
        return taylor_softmax.class_covariance(a[:, None], x @ y.T, b, n_classes=10, order=2)

    sharded = jax.jit(kernel).lower(jax.device_put(x, sharding), y).compile()
    result = sharded(jax.device_put(x, sharding), y)
    assert {s.data.shape for s in result.addressable_shards} == {(n_rows // 2, n_columns)}
    np.testing.assert_allclose(result, jax.jit(kernel)(x, y), rtol=1e-11)
    # No step of it gathers the matrix: the compiled program holds no array of its full size.
    assert f"f64[{n_rows},{n_columns}]" not in sharded.as_text()


# Every variance.


WIDE = np.array([25.0, 100.0, 1e3, 1e4, 1e6])


@pytest.mark.quick(order=None, n=10, dtype=jnp.float64)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize(("order", "n"), [(None, 2), (None, 10), (None, 1000), (2, 2), (2, 10)])
def test_an_input_with_itself_has_the_covariance_of_its_probabilities(order, n, dtype):
    """`Cov[y]_ii = (1 - 1/n) I(a, a, a; n)`: other code, another rule, another identity."""
    for variance in WIDE[::-1]:
        (got,), _ = entries(
            *np.array([[variance], [1.0], [variance]]), n=n, order=order, dtype=dtype
        )
        of_class = predict.class_probability_covariance(
            jnp.zeros(n), jnp.full(n, variance), order=order
        )
        want = float(of_class[0, 0]) / (1 - 1 / n)
        assert abs(got / want - 1) < promised(order, n, variance, dtype)[0], variance
    # Negative control: another variance has another.
    (other,), _ = entries(*np.array([[24.0], [1.0], [24.0]]), n=n, order=order, dtype=dtype)
    assert abs(other / want - 1) > 1e-5


@pytest.mark.parametrize(
    ("order", "near"), [(None, False), (2, False), (8, False), (20, False), (20, True)]
)
def test_shipped_samples_are_those_of_the_program(order, near):
    """A few of them, computed anew: what comes with the package is not stale."""
    of = parse(order)
    design = class_axis_grids.design_for(of, near=near)
    sigma1, sigma2 = class_axis_grids.pairs(design)
    n = np.array([2.0, 1000.0])
    i, j, k = design.variances // 2, design.seconds // 5, design.correlations // 3
    at = sigma1[i, j], sigma2[i, j]
    s = class_axis_grids.nodes(design.correlations)
    rho = design.coordinates.correlation(s, *at)[0][k]

    def slope(sigma1, rho, sigma2):
        return class_axis_grids.slopes(sigma1, np.array([rho]), sigma2, n, of)[0]

    want = slope(at[0], rho, at[1])
    scale = np.sqrt(slope(at[0], 1.0, at[0]) * slope(at[1], 1.0, at[1]))
    estimates = [terms.error(of, number, 64, max(at) ** 2)[1] for number in (2, 1000)]
    for m, number in enumerate((2, 1000)):
        arguments = np.array([[at[0] ** 2], [rho], [at[1] ** 2]])
        _, (got,) = entries(*arguments, n=number, order=order)
        assert abs(got - want[m]) / scale[m] < estimates[m]
    # Negative control: another node is another number.
    other = slope(sigma1[i + 1, j], rho, sigma2[i + 1, j])
    assert np.max(np.abs(other - want) / scale) > 2 * max(estimates)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("order", [None, 2, 4, 32])
def test_any_input_is_finite_and_within_its_bounds(order, dtype):
    rng = np.random.default_rng(1)
    # Few enough not to be fused, which takes long to compile and is compared elsewhere.
    size = 16_000
    assert size < covariance._MANY_PAIRS
    var1, var2 = 10 ** rng.uniform(-8, 6, (2, size))
    var1[::7], var2[::11] = 0, var1[::11]
    rho = rng.uniform(-1, 1, size)
    eps = float(jnp.finfo(dtype).eps)
    rho[::5], rho[1::5], rho[2::5] = 1 + 2 * eps, -1, 1 - 10 ** rng.uniform(-8, 0, size // 5)
    a, b = (jnp.asarray(x, dtype) for x in (var1, var2))
    c = jnp.asarray(rho, dtype) * jnp.sqrt(a) * jnp.sqrt(b)
    for n in (2, 10, 1_000_000):

        def total(a, c, b, n=n):
            value = taylor_softmax.class_covariance(a, c, b, n_classes=n, order=order)
            return jnp.sum(value), value

        gradients, value = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(a, c, b)
        value = np.asarray(value, float)
        assert np.all(np.isfinite(value))
        assert np.all(np.abs(n * value) < 1 + 2e-3)
        assert np.all(n * value[rho >= 0] > -2e-3)
        for gradient in gradients:
            assert np.all(np.isfinite(gradient))


@pytest.mark.quick
def test_the_limit_is_argmax():
    """Of two classes: the sign of a difference, whose covariance is an arcsine."""
    rho = np.array([-1.0, -0.5, 0.0, 0.3, 0.9, 1.0])
    variances = np.full(6, 1e6)
    value, _ = entries(variances, rho, variances, n=2, order=None, method=None)
    np.testing.assert_allclose(value, np.arcsin(rho) / np.pi, atol=2e-3)
    below, _ = entries(variances / 1e4, rho, variances / 1e4, n=2, order=None, method=None)
    assert np.max(np.abs(below - np.arcsin(rho) / np.pi)) > 1e-2


def test_raw_digits():
    """Unscaled pixels of 0 to 16: logits have variances of 46 to 80."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = jnp.asarray(digits.data[:6])
    logits = stax.serial(stax.Dense(512, W_std=2**0.5), stax.Relu(), stax.Dense(10))
    init_fn, apply_fn, kernel_fn = stax.serial(logits, stax.Softmax())
    kernel = kernel_fn(x, None)
    of_logits = logits[2](x, None)
    assert 20 < np.min(of_logits.cov1) < np.max(of_logits.cov1) < 200
    mean, stderr = monte_carlo.class_second_moment(
        random.key(0),
        of_logits.cov1[:, None],
        of_logits.nngp,
        of_logits.cov1,
        n_classes=10,
        n_samples=20_000,
    )
    classes = taylor_softmax.class_kernel(kernel)
    assert np.max(np.abs((mean - classes.nngp) / stderr)) < 5

    def sample(key):
        y = apply_fn(init_fn(key, x.shape)[1], x)
        return y @ y.T / 10

    samples = jax.lax.map(jax.jit(sample), random.split(random.key(1), 200))
    stderr = np.std(samples, 0) / np.sqrt(len(samples))
    assert np.all(np.abs(np.mean(samples, 0) - kernel.nngp) < 4.5 * stderr + 0.01 * kernel.nngp)
    # Negative control: what variances of a tenth would give.
    small = stax.serial(logits, stax.Softmax())[2](x / 10**0.5, None)
    assert np.max(np.abs((np.mean(samples, 0) - small.nngp) / stderr)) > 10


# Errors.


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"n_classes": 0}, ValueError, "`n_classes`.*0"),
        ({"n_classes": 2.0}, TypeError, "`n_classes`.*2.0"),
        ({"n_classes": True}, TypeError, "`n_classes`.*True"),
        ({"order": 3}, ValueError, "`order`.*3"),
        ({"order": 0}, ValueError, "`order`.*0"),
        ({"order": 2.0}, TypeError, "`order`.*2.0"),
        ({"method": "fast"}, TypeError, "`method`.*fast"),
    ],
)
def test_errors_name_the_argument(changed, error, message):
    arguments = {"n_classes": 3, "order": 2} | changed
    with pytest.raises(error, match=message):
        taylor_softmax.class_covariance(1.0, 0.5, 1.0, **arguments)
