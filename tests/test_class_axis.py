"""The class covariance against brute force, at its edges, and as a JAX function."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import taylor_softmax
from oracles import class_axis as brute_force
from taylor_softmax import predict
from taylor_softmax._class_axis import covariance, interpolant
from taylor_softmax._class_axis.covariance import Pairs
from taylor_softmax._numerics import errors
from taylor_softmax._numerics.surrogate import parse
from taylor_softmax.methods import Direct, Interpolate

CORRELATIONS = np.array([-1.0, -0.6, 0.0, 0.3, 0.9, 0.999, 1.0])

# (order, n, largest variance) of the comparison with brute force, which takes a minute for more.
SETTINGS = [
    *((2, n, 20.0) for n in (2, 10, 100_000)),
    *((order, n, 4.0) for order in (8, None) for n in (2, 10, 1000)),
    (32, 10, 4.0),
    (None, 100, 10.0),
]


def limit(order, largest, dtype):
    """The promise of the class axis at variances up to `largest`."""
    name = {None: errors.CLASS_AXIS, 2: errors.CLASS_AXIS_CLOSED_FORM}.get(
        order, errors.CLASS_AXIS_TAYLOR
    )
    rows = [p for p in errors.PROMISES if p.quantity == name and p.variance >= largest]
    return rows[0].float64 if dtype == jnp.float64 else rows[0].float32


def variance_pairs(largest):
    return [(largest, largest), (largest, 0.02 * largest), (0.1 * largest, 0.1 * largest)]


def entries(var1, rho, var2, *, n, order, method=None, dtype=jnp.float64):
    """`I` and `dI / dc` for arrays of equal shape."""
    a, c, b = (jnp.asarray(x, dtype) for x in (var1, rho * np.sqrt(var1 * var2), var2))
    ((value, slope),) = covariance.covariances(
        [Pairs(a, c, b)], n_classes=n, surrogate=parse(order), method=method
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


def test_brute_force_rows_sum_to_one():
    for n, order, var in ((2, 2, 20.0), (3, 8, 4.0), (10, None, 10.0)):
        same, cross = brute_force.moments(
            jnp.asarray(var), jnp.asarray(0.7), jnp.asarray(var / 3), n=n, order=order
        )
        np.testing.assert_allclose(same + (n - 1) * cross, 1 / n, rtol=1e-10)


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


@pytest.mark.parametrize(("order", "n", "largest"), SETTINGS)
def test_accuracy(order, n, largest):
    for var1, var2 in variance_pairs(largest):
        exact, one = reference(var1, CORRELATIONS, var2, n, order), scale(var1, var2, n, order)
        first, second = (np.full(CORRELATIONS.size, v) for v in (var1, var2))
        for dtype in (jnp.float64, jnp.float32):
            value, _ = entries(first, CORRELATIONS, second, n=n, order=order, dtype=dtype)
            error = np.abs(value - exact) / one
            assert np.max(error) < limit(order, largest, dtype), (var1, var2, dtype, error)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("n", [2, 10, 100_000])
def test_large_variances_agree_with_one_dimensional_integrals(n, dtype):
    """`Cov[y]_ii = (1 - 1/n) I(a, a, a; n)`: one input with itself has independent logits.

    `predict.class_probability_covariance` is another identity, another rule and other code.
    """
    variances = np.array([1.0, 25.0, 100.0, 1e3, 1e4, 1e5, 1e6])
    few = min(n, 1000)
    value, _ = entries(variances, np.ones(7), variances, n=few, order=None, dtype=dtype)
    for variance, got in zip(variances, value, strict=True):
        probabilities = predict.class_probability_covariance(
            jnp.zeros(few), jnp.full(few, variance), order=None
        )
        want = float(probabilities[0, 0]) / (1 - 1 / few)
        assert abs(got / want - 1) < limit(None, variance, dtype), (variance, got, want)
    # Negative control: a covariance of another variance.
    assert abs(value[1] / value[2] - 1) > 1e-2


def test_two_classes_of_any_variance_are_odd_and_the_limit_is_argmax():
    """`y_1 - 1/2` is an odd function of the logits for two classes; as the variance grows it turns
    into a sign, and `I` into `arcsin(rho) / pi`.
    """
    rho = np.linspace(-1, 1, 41)
    for variance in (1.0, 1e2, 1e4, 1e6):
        value, _ = entries(np.full(41, variance), rho, np.full(41, variance), n=2, order=None)
        bound = limit(None, variance, jnp.float64)
        np.testing.assert_allclose(value, -value[::-1], atol=bound)
    # The limit is reached like 1 / sigma, slowest at correlation 1.
    np.testing.assert_allclose(value, np.arcsin(rho) / np.pi, atol=1.5e-3)
    assert np.max(np.abs(value - rho / 2)) > 0.02


@pytest.mark.parametrize(("order", "n"), [(None, 10), (2, 10), (8, 2)])
def test_interpolant_knows_its_error(order, n):
    """Against quadrature: the estimates hold, and are not far too large."""
    rng = np.random.default_rng(0)
    largest = np.repeat([20.0, 100.0, 1e4, 1e6], 5)
    var1 = largest * rng.uniform(0.3, 1, 20)
    var2 = np.where(rng.uniform(size=20) < 0.5, var1, var1 * rng.uniform(0.01, 1, 20))
    rho = np.where(rng.uniform(size=20) < 0.3, 1.0, rng.uniform(-1, 1, 20))
    pairs = [(var1, rho, var2), (var1, np.ones(20), var1), (var2, np.ones(20), var2)]
    stacked = [np.concatenate(x) for x in zip(*pairs, strict=True)]
    direct = entries(*stacked, n=n, order=order, method=Direct())
    table = entries(*stacked, n=n, order=order, method=Interpolate())
    for part in range(2):
        exact, of_one, of_two = np.split(direct[part], 3)
        error = np.abs(np.split(table[part], 3)[0] - exact) / np.sqrt(of_one * of_two)
        for top in (20.0, 100.0, 1e4, 1e6):
            estimate = interpolant.error(parse(order), n, 64, top)[part]
            found = np.max(error[largest == top])
            assert found <= estimate, (part, top, found, estimate)
            assert estimate <= 30 * limit(order, min(top, 1e4), jnp.float64), (part, top, estimate)


@pytest.mark.parametrize(("order", "n"), [(None, 2), (None, 1000), (2, 10), (32, 10)])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_fuzz(order, n, dtype):
    """Variances over twenty decades, correlations to 1 and beyond by rounding."""
    rng = np.random.default_rng(1)
    var1, var2 = (jnp.asarray(10 ** rng.uniform(-14, 6, 200), dtype) for _ in range(2))
    rho = rng.uniform(-1, 1, (200, 200)) * (1 + 4 * float(jnp.finfo(dtype).eps))
    near = 1 - 10 ** rng.uniform(-8, 0, (200, 200))
    rho = np.where(rng.uniform(size=rho.shape) < 0.5, rho, np.sign(rho) * near)
    cov12 = jnp.asarray(rho, dtype) * jnp.sqrt(var1[:, None]) * jnp.sqrt(var2)

    def total(var1, cov12, var2):
        ((value, slope),) = covariance.covariances(
            [Pairs(var1[:, None], cov12, var2)],
            n_classes=n,
            surrogate=parse(order),
            method=None,
        )
        return jnp.sum(value) + jnp.sum(slope), (value, slope)

    gradients, results = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(var1, cov12, var2)
    for array in (*gradients, *results):
        assert np.isfinite(array).all()
    value = np.asarray(results[0], np.float64) * n
    assert np.max(value) <= 1 + 1e-5
    assert np.min(np.where(np.asarray(cov12) >= 0, value, 0)) >= -1e-5


@pytest.mark.parametrize("order", [2, 4, 8, 16, None])
@pytest.mark.parametrize("n", [2, 3, 10, 1000, 100_000])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_small_variances_have_the_linear_limit(order, n, dtype):
    """`y_i = 1/n + (z_i - mean z)/n + ...` as the logits vanish, so `I -> c / n^2`.

    Brute force cannot see this: `I` is a difference of moments of 1 / n^2 there.
    """
    var1 = np.array([1e-12, 1e-12, 1e-9, 1e-20])
    var2 = np.array([1e-12, 1e-10, 1e-9, 1e-20])
    rho = np.array([1.0, -0.5, 0.3, 0.9])
    value, slope = entries(var1, rho, var2, n=n, order=order, dtype=dtype)
    rtol = 1e-7 if dtype == jnp.float64 else 1e-4
    np.testing.assert_allclose(value, rho * np.sqrt(var1 * var2) / n**2, rtol=rtol)
    np.testing.assert_allclose(slope, np.full(4, 1 / n**2), rtol=rtol)


@pytest.mark.core
def test_one_tiny_and_one_large_variance():
    for n in (2, 10, 100_000):
        exact = brute_force.class_covariance(1e-6, 0.8, 20.0, n=n, order=2)
        value, _ = entries(*np.array([[1e-6], [0.8], [20.0]]), n=n, order=2)
        assert abs(value[0] - exact) < 1e-7 * scale(1e-6, 20.0, n, 2)


def test_negative_control_another_order_is_found():
    """The limits tell apart orders whose kernels differ in the fifth digit only."""
    value, _ = entries(*np.array([[0.5], [0.9], [0.5]]), n=10, order=8)
    exact = brute_force.class_covariance(0.5, 0.9, 0.5, n=10, order=10)
    one = scale(0.5, 0.5, 10, 10)
    assert 1e-6 < abs(value[0] - exact) / one < 1e-3


def test_negative_control_a_wrong_integrand_is_found(monkeypatch):
    emitted = taylor_softmax._class_axis.integral.class_axis_order_2

    def without_the_determinant(*arguments):
        log_phi, *rest = emitted(*arguments)
        var1, cov12, var2, t, s = arguments
        wrong = log_phi + 1e-5 * jnp.log1p(t * s * (var1 * var2 - cov12**2))
        return wrong, *rest

    monkeypatch.setattr(
        taylor_softmax._class_axis.integral, "class_axis_order_2", without_the_determinant
    )
    jax.clear_caches()
    value, _ = entries(*np.array([[2.0], [0.5], [2.0]]), n=10, order=2)
    monkeypatch.undo()
    jax.clear_caches()
    exact = brute_force.class_covariance(2.0, 0.5, 2.0, n=10, order=2)
    assert abs(value[0] - exact) > 1e-7 * scale(2.0, 2.0, 10, 2)


# Edges.


@pytest.mark.parametrize(
    ("order", "method"),
    [(2, Direct()), (32, Direct()), (None, Direct()), (2, Interpolate()), (None, Interpolate())],
)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_no_nan_anywhere(order, method, dtype):
    variances = np.array([0.0, 1e-20, 1e-12, 1e-3, 1.0, 10.0, 1e3])
    var1, var2 = (jnp.asarray(v, dtype) for v in (variances[:, None], variances[None]))
    root = jnp.sqrt(var1 * var2)

    def total(var1, cov12, var2, n):
        ((value, slope),) = covariance.covariances(
            [Pairs(var1, cov12, var2)], n_classes=n, surrogate=parse(order), method=method
        )
        return jnp.sum(value) + jnp.sum(slope), (value, slope)

    gradients_of = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True), static_argnums=3)
    for n in (2,) if method == Interpolate() else (2, 100_000):
        for rho in (0.0, 0.5, 1.0, float(1 + 4 * jnp.finfo(dtype).eps), -1.0):
            gradients, values = gradients_of(var1, rho * root, var2, n)
            names = ("d var1", "d cov12", "d var2", "value", "slope")
            for name, array in zip(names, (*gradients, *values), strict=True):
                bad = ~np.isfinite(np.asarray(array))
                assert not bad.any(), (n, rho, name, np.argwhere(bad))


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


def test_levels_and_loops_agree():
    """The two ways to sum, and the two sets of terms, at sizes where the fused one is chosen."""
    x = random.normal(random.key(1), (30, 16))
    a, c = jnp.sum(x**2, 1)[None], (x @ x.T)[None]
    for order in (None, 2):
        surrogate = parse(order)
        far, near = (
            interpolant.level(surrogate, 10, 64, largest)
            for largest in (interpolant.LARGEST_VARIANCE, interpolant.NEAR)
        )
        looped, fused, cheaper = (
            jax.jit(functools.partial(interpolant.evaluate, level, fused=fused))(a, c, a)
            for level, fused in ((far, False), (far, True), (near, True))
        )
        for one, two, three in zip(looped, fused, cheaper, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-12)
            np.testing.assert_allclose(one, three, atol=3e-6 * np.max(one))


def test_one_table_serves_several_requests():
    x = random.normal(random.key(3), (36, 8)) / 3
    a = jnp.sum(x**2, 1)
    requests = [Pairs(a[:, None], x @ x.T, a[None]), Pairs(a, a, a)]
    together = covariance.covariances(requests, n_classes=10, surrogate=parse(2), method=None)
    np.testing.assert_allclose(jnp.diagonal(together[0][0]), together[1][0], rtol=1e-12)


@pytest.mark.parametrize("order", [2, None])
@pytest.mark.parametrize("method", [Direct(), Interpolate()])
def test_kernels_stay_symmetric_and_positive(order, method):
    x = random.normal(random.key(4), (40, 30)) / 5
    a = jnp.sum(x**2, 1)
    for n in (2, 10):
        kernel = taylor_softmax.class_covariance(
            a[:, None], x @ x.T, a, n_classes=n, order=order, method=method
        )
        np.testing.assert_allclose(kernel, kernel.T, rtol=0, atol=1e-13)
        # To the accuracy of the values, no more: quadrature is not exactly positive.
        eigenvalues = np.linalg.eigvalsh(kernel)
        assert eigenvalues[0] > -1e-7 * np.max(np.diagonal(kernel)), eigenvalues[0]


@pytest.mark.core
@pytest.mark.parametrize("order", [2, 4, None])
@pytest.mark.parametrize("method", [Direct(), Interpolate()])
def test_gradients_agree_with_differences_and_with_the_slope(order, method):
    arguments = [jnp.asarray(x) for x in (1.3, 0.4, 0.7)]

    def value(*arguments):
        return taylor_softmax.class_covariance(*arguments, n_classes=5, order=order, method=method)

    gradients = jax.jit(jax.grad(value, (0, 1, 2)))(*arguments)
    for i, gradient in enumerate(gradients):
        # The direct values on both sides of a step: a table's range follows its arguments.
        shifted = [[x + s * 1e-4 * (j == i) for j, x in enumerate(arguments)] for s in (1, -1)]
        ends = [
            taylor_softmax.class_covariance(*x, n_classes=5, order=order, method=Direct())
            for x in shifted
        ]
        np.testing.assert_allclose(gradient, (ends[0] - ends[1]) / 2e-4, rtol=1e-6)
    ((_, slope),) = covariance.covariances(
        [Pairs(*arguments)], n_classes=5, surrogate=parse(order), method=method
    )
    np.testing.assert_allclose(gradients[1], slope, rtol=1e-9)


def test_vmap_equals_broadcasting():
    a = jnp.linspace(0.1, 2, 6)
    direct = taylor_softmax.class_covariance(a, a / 2, a, n_classes=3, order=4)
    mapped = jax.vmap(lambda a: taylor_softmax.class_covariance(a, a / 2, a, n_classes=3, order=4))(
        a
    )
    np.testing.assert_allclose(mapped, direct, rtol=1e-12)


@pytest.mark.core
@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices; conftest makes two on a CPU")
@pytest.mark.parametrize("method", [Direct(), Interpolate(), None])
def test_sharded_rows_stay_sharded(method):
    n_rows, n_columns = 1024, 96
    x = random.normal(random.key(5), (n_rows, 8)) / 3
    y = random.normal(random.key(6), (n_columns, 8)) / 3
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("rows",)), PartitionSpec("rows"))

    def kernel(x, y):
        a, b = jnp.sum(x**2, 1), jnp.sum(y**2, 1)
        return taylor_softmax.class_covariance(
            a[:, None], x @ y.T, b, n_classes=10, order=2, method=method
        )

    sharded = jax.jit(kernel).lower(jax.device_put(x, sharding), y).compile()
    result = sharded(jax.device_put(x, sharding), y)
    assert {s.data.shape for s in result.addressable_shards} == {(n_rows // 2, n_columns)}
    np.testing.assert_allclose(result, jax.jit(kernel)(x, y), rtol=1e-11)
    # No step of it gathers the matrix: the compiled program holds no array of its full size.
    assert f"f64[{n_rows},{n_columns}]" not in sharded.as_text()


# Errors.


@pytest.mark.core
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
