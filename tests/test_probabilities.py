"""Class probabilities and the log-normaliser: brute force, sampling, identities, edges."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special

from oracles import probabilities as oracle
from taylor_softmax import losses, predict
from taylor_softmax._numerics.surrogate import parse
from taylor_softmax._probabilities import rules
from taylor_softmax._probabilities.blocks import in_graph
from taylor_softmax._probabilities.log_normalizer import log_normalizer
from taylor_softmax._probabilities.moments import _mean as mean_by_rule
from taylor_softmax._probabilities.moments import moments

ORDERS = (None, 2, 4, 32)


def points(rng, n_classes, largest, unequal):
    """Means of scale 0 to 5 and variances up to `largest`, representable in float32."""
    mean = rng.normal(size=n_classes) * rng.choice([0, 0.5, 2, 5])
    variance = np.full(n_classes, largest)
    if unequal:
        variance = variance * 10 ** rng.uniform(-4, 0, n_classes)
    return mean.astype(np.float32), np.maximum(variance, 0.01).astype(np.float32)


# (order, number of classes)
SETTINGS = [(None, 2), (None, 3), (None, 10), (None, 100), (2, 10), (4, 2), (8, 10), (32, 3)]
VARIANCES = (0.01, 1.0, 2.5, 4.1, 10.0, 100.0)


# Largest errors allowed, at any variance: those of the docstring.
LIMITS = {jnp.float64: 1e-6, jnp.float32: 1e-5}


@pytest.mark.parametrize(("order", "n_classes"), SETTINGS)
def test_against_brute_force(order, n_classes):
    rng = np.random.default_rng(n_classes)
    for variance, unequal in itertools.product(VARIANCES, (False, True)):
        mean, v = points(rng, n_classes, variance, unequal)
        first, second, log_sum = oracle.moments(mean, v, order)
        if order is None:
            for dtype in (jnp.float64, jnp.float32):
                got = predict.expected_log_normalizer(mean.astype(dtype), v.astype(dtype))
                assert abs(float(got) - log_sum) < LIMITS[dtype] * max(1, abs(log_sum))
        assert first.sum() == pytest.approx(1, abs=1e-11)  # the oracle
        for dtype in (jnp.float64, jnp.float32):
            arguments = jnp.asarray(mean, dtype), jnp.asarray(v, dtype)
            got = predict.class_probabilities(*arguments, order=order)
            assert got.dtype == dtype
            error = np.max(np.abs(np.asarray(got, float) - first))
            assert error < LIMITS[dtype], (variance, unequal)
            if dtype == jnp.float64 or n_classes == 10:
                got = predict.class_probability_covariance(*arguments, order=order)
                covariance = second - np.outer(first, first)
                error = np.max(np.abs(np.asarray(got, float) - covariance))
                assert error < LIMITS[dtype], (variance, unequal)


@pytest.mark.quick
def test_a_wrong_variance_or_rule_is_noticed(monkeypatch):
    """Negative controls: the limits above do tell the right value from one beside it."""
    mean, variance = np.array([0.0, 1.0, -0.5]), np.array([4.0, 4.0, 4.0])
    first, *_ = oracle.moments(mean, variance)

    def error(variance):
        return np.max(np.abs(np.asarray(predict.class_probabilities(mean, variance)) - first))

    assert error(variance) < 1e-7 < 1e-6 < error(variance * (1 + 1e-4))
    assert error(np.array([4.0, 4.0, 4.0 + 1e-4])) > 1e-6
    jax.clear_caches()
    coarse = tuple(rule._replace(outer=rule.outer // 3) for rule in rules.SOFTMAX_RULES[:1])
    monkeypatch.setattr(rules, "SOFTMAX_RULES", coarse)
    assert error(variance) > 1e-6
    jax.clear_caches()


@pytest.mark.parametrize("order", [None, 2, 4])
def test_brute_force_is_the_expectation_of_softmax(order):
    """The oracle against a grid in the logits that knows no Laplace transform."""
    mean, variance = np.array([0.5, -1.0, 1.5]), np.array([1.0, 0.2, 2.0])
    x = np.linspace(-7, 7, 141)
    weight = np.exp(-(x**2) / 2)
    weight /= weight.sum()
    logits = np.meshgrid(*(m + np.sqrt(v) * x for m, v in zip(mean, variance, strict=True)))
    f = np.exp(oracle.log_surrogate(np.stack([np.swapaxes(z, 0, 1) for z in logits]), order))
    y = f / f.sum(0)
    first = np.einsum("iabc,a,b,c->i", y, weight, weight, weight, optimize=True)
    second = np.einsum("iabc,jabc,a,b,c->ij", y, y, weight, weight, weight, optimize=True)
    got = oracle.moments(mean, variance, order)
    np.testing.assert_allclose(got[0], first, atol=1e-10)
    np.testing.assert_allclose(got[1], second, atol=1e-10)
    assert np.max(np.abs(oracle.moments(mean, variance * 1.0001, order)[0] - first)) > 1e-6


@pytest.mark.quick(variances=(100.0, 0.5), means=(2.0, -1.0))
@pytest.mark.parametrize("variances", [(0.01, 0.01), (1.0, 0.0), (3.0, 8.0), (100.0, 0.5)])
@pytest.mark.parametrize("means", [(0.0, 0.0), (2.0, -1.0), (-4.0, 5.0)])
def test_two_classes_are_a_sigmoid(means, variances):
    """`E[sigmoid(d)]`, `d ~ N(m_1 - m_2, v_1 + v_2)`, by adaptive quadrature."""
    m, sigma = means[0] - means[1], np.sqrt(sum(variances))

    def expectation(function):
        def integrand(x):
            return function(scipy.special.expit(m + sigma * x)) * np.exp(-(x**2) / 2)

        # The step of the sigmoid is at d = 0.
        places = sorted({-10.0, float(np.clip(-m / sigma, -9, 9)), 10.0})
        total = sum(
            scipy.integrate.quad(integrand, *ends, epsabs=1e-13, limit=500)[0]
            for ends in itertools.pairwise(places)
        )
        return total / np.sqrt(2 * np.pi)

    first = expectation(lambda p: p)
    spread = expectation(lambda p: (p - first) ** 2)
    got = predict.class_probabilities(means, variances)
    np.testing.assert_allclose(got, [first, 1 - first], atol=1e-7)
    covariance = predict.class_probability_covariance(means, variances)
    np.testing.assert_allclose(covariance, spread * np.array([[1, -1], [-1, 1]]), atol=1e-7)


@pytest.mark.quick(order=4)
@pytest.mark.parametrize("order", [None, 4])
def test_against_sampling(order):
    rng = np.random.default_rng(3)
    n, n_samples = 6, 200_000
    mean, variance = rng.normal(size=n), rng.uniform(0.1, 6, n)
    logits = mean + np.sqrt(variance) * rng.standard_normal((n_samples, n))
    y = np.asarray(parse(order).softmax(jnp.asarray(logits)))
    probabilities = np.asarray(predict.class_probabilities(mean, variance, order=order))
    stderr = y.std(0) / np.sqrt(n_samples)
    assert np.max(np.abs(y.mean(0) - probabilities) / stderr) < 4.5
    centred = y - probabilities
    products = centred[:, :, None] * centred[:, None, :]
    covariance = np.asarray(predict.class_probability_covariance(mean, variance, order=order))
    scores = (products.mean(0) - covariance) * np.sqrt(n_samples) / products.std(0)
    assert np.max(np.abs(scores)) < 4.5
    # Control: another variance of one logit is found.
    variance[0] *= 1.3
    other = np.asarray(predict.class_probabilities(mean, variance, order=order))
    assert np.max(np.abs(y.mean(0) - other) / stderr) > 4.5


@pytest.mark.quick(variance=1e4)
@pytest.mark.parametrize("variance", [0.1, 4.0, 30.0, 1e3, 1e4])
def test_many_classes_and_large_variances(variance):
    """Two, 100 and 1,000 classes of two kinds, the other's variance the same or 1e4 times less."""
    for mean, factor in (((0.0, 1.0), 1.0), ((0.0, -3.0), 1e-4)):
        v = variance * np.array([1.0, factor])
        for n in (2, 100, 1000):
            copies = np.array([n - 1, 1])
            first, _, log_sum = oracle.moments(mean, v, counts=copies)
            point = np.repeat(mean, copies), np.repeat(v, copies)
            got = log_normalizer(*(jnp.asarray(x)[None] for x in point))
            assert np.sum(np.abs(np.asarray(got.mean[0]) - np.repeat(first, copies))) < 1e-6
            assert abs(float(got.value[0]) - log_sum) < 1e-6 * max(1, abs(log_sum))
            single = predict.expected_log_normalizer(*(np.float32(x) for x in point))
            assert abs(float(single) - log_sum) < 1e-5 * max(1, abs(log_sum))


@pytest.mark.parametrize("order", [None, 2, 8])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32], ids=["float64", "float32"])
def test_small_variances_keep_their_digits(order, dtype):
    """`Cov[y] = J diag(v) J^T` where it is far below the rounding of 1."""
    mean = jnp.array([0.3, -1.0, 1.2, 3.0], dtype)
    jacobian = jax.jacfwd(parse(order).softmax)(mean.astype(float))
    for scale in (1e-6, 1e-8, 1e-15, 1e-30):
        variance = jnp.array([1.0, 2.0, 0.5, 0.0], dtype) * dtype(scale)
        got = predict.class_probability_covariance(mean, variance, order=order)
        want = (jacobian * variance.astype(float)) @ jacobian.T
        np.testing.assert_allclose(got, want, atol=1e-4 * np.max(np.abs(want)))
    # Control: with epsilon added it is another.
    got = predict.class_probability_covariance(mean, variance + jnp.finfo(dtype).eps, order=order)
    assert np.max(np.abs(got - want)) > 1e3 * np.max(np.abs(want))


@pytest.mark.quick
def test_excluded_classes():
    """A logit of `-inf` is a class that is not there, in values and gradients."""
    mean, variance = np.array([0.3, 1.0, -np.inf]), np.array([1.0, 4.0, 2.0])
    for order in (None, 2, 4):
        for function in (predict.class_probabilities, predict.class_probability_covariance):
            got = function(mean, variance, order=order)
            want = function(mean[:2], variance[:2], order=order)
            np.testing.assert_allclose(got[..., :2][:2], want, rtol=0, atol=1e-14)
            assert np.all(got[..., 2] == 0)
    got = predict.class_probabilities([0.3, 1.0, -np.inf], 1)
    np.testing.assert_allclose(got, [0.37517233, 0.62482767, 0], atol=1e-8)
    value = predict.expected_log_normalizer(mean, variance)
    assert float(value) == pytest.approx(
        float(predict.expected_log_normalizer(mean[:2], variance[:2])), abs=1e-14
    )
    gradients = jax.grad(predict.expected_log_normalizer, (0, 1))(jnp.asarray(mean), variance)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert gradient[2] == 0
    loss = losses.cross_entropy()
    fx, y = jnp.array([[0.3, 1.0, -jnp.inf]]), jnp.array([[1.0, 0.0, 0.0]])
    for order in (None, 2):
        loss = losses.cross_entropy(order)
        value, gradient = jax.value_and_grad(loss)(fx, y)
        assert float(value) == pytest.approx(float(loss(fx[:, :2], y[:, :2])), abs=1e-14)
        assert np.all(np.isfinite(gradient))
        assert np.isinf(loss(fx, jnp.array([[0.0, 0.0, 1.0]])))


# Identities


@pytest.mark.quick(variance=3.0)
@pytest.mark.parametrize("variance", [0.0, 0.7, 3.0, 30.0])
def test_derivatives_of_softmax(variance):
    """`dE[y] / d mean = diag(p) - E[y y^T]`, and `dE[y] / dv` is half of the second derivative."""
    mean = jnp.array([0.3, -1.0, 1.2, 0.0])
    v = variance * jnp.array([1.0, 0.5, 1.0, 0.8])

    def by_mean(mean):
        p = predict.class_probabilities(mean, v)
        return jnp.diag(p) - predict.class_probability_covariance(mean, v) - jnp.outer(p, p)

    got = jax.jacfwd(predict.class_probabilities, (0, 1))(mean, v)
    np.testing.assert_allclose(got[0], by_mean(mean), atol=1e-7)
    heat = jnp.diagonal(jax.jacfwd(by_mean)(mean), 0, 1, 2)
    np.testing.assert_allclose(got[1], heat / 2, atol=1e-7)
    assert np.max(np.abs(got[1])) > 1e-3


@pytest.mark.quick
def test_derivatives_of_the_log_normalizer():
    """`p` and `E[y (1 - y)] / 2`, and second derivatives, the covariance of labels."""
    mean, v = jnp.array([0.3, -1.0, 1.2]), jnp.array([0.7, 0.0, 5.0])
    p = predict.class_probabilities(mean, v)
    squares = jnp.diagonal(predict.class_probability_covariance(mean, v)) + p**2
    got = jax.grad(predict.expected_log_normalizer, (0, 1))(mean, v)
    np.testing.assert_allclose(got[0], p, atol=1e-8)
    np.testing.assert_allclose(got[1], (p - squares) / 2, atol=1e-7)
    hessian = jax.hessian(predict.expected_log_normalizer)(mean, v)
    np.testing.assert_allclose(hessian, jax.jacfwd(predict.class_probabilities)(mean, v), atol=1e-8)
    step = jnp.array([0.0, 0.0, 1e-4])
    either = (
        predict.expected_log_normalizer(mean, v + step),
        predict.expected_log_normalizer(mean, v - step),
    )
    assert float((either[0] - either[1]) / 2e-4) == pytest.approx(float(got[1][2]), abs=1e-7)


@pytest.mark.parametrize(
    ("order", "dtype"),
    [(None, jnp.float64), (None, jnp.float32), (2, jnp.float32), (8, jnp.float64)],
)
def test_variance_zero(order, dtype):
    """Softmax of the mean, and its derivatives: half the second one in the variance."""
    mean = jnp.array([0.3, -1.0, 1.2, 3.0], dtype)
    zero, eps = jnp.zeros_like(mean), float(jnp.finfo(dtype).eps)

    def softmax(mean):
        return parse(order).softmax(mean)

    got = predict.class_probabilities(mean, zero, order=order)
    np.testing.assert_allclose(got, softmax(mean), atol=10 * eps)
    by_mean, by_variance = jax.jacfwd(
        lambda m, v: predict.class_probabilities(m, v, order=order), (0, 1)
    )(mean, zero)
    exact_mean = mean.astype(float)
    jacobian, hessian = jax.jacfwd(softmax)(exact_mean), jax.hessian(softmax)(exact_mean)
    np.testing.assert_allclose(by_mean, jacobian, atol=30 * eps)
    # The rules see the root of the variance: half of the digits.
    np.testing.assert_allclose(
        by_variance, jnp.diagonal(hessian, 0, 1, 2) / 2, atol=3 * np.sqrt(eps)
    )
    tiny = jnp.array([1.0, 2.0, 0.5, 1.0], dtype) * 1e-5
    got = predict.class_probability_covariance(mean, tiny, order=order)
    linear = (jacobian * tiny.astype(float)) @ jacobian.T
    # The covariance keeps its digits. The next term is of the order of the variance.
    relative = 10 * tiny.max()
    np.testing.assert_allclose(got, linear, atol=relative * np.max(np.abs(linear)))


@pytest.mark.parametrize("order", ORDERS)
def test_the_sum_before_normalisation(order):
    """Probabilities sum to 1 by construction; that they did before is the rules' accuracy."""
    rng = np.random.default_rng(5)
    mean = jnp.asarray(rng.normal(size=(24, 4)) * 3)
    variance = jnp.asarray(10 ** rng.uniform(-3, 2, (24, 1)) * 10 ** rng.uniform(-2, 0, (24, 4)))
    result = moments(mean, variance, parse(order), True)
    np.testing.assert_allclose(result.total, 1, atol=1e-6)
    np.testing.assert_allclose(jnp.sum(result.mean, 1), 1, atol=1e-15 * 4)
    assert np.min(result.mean) >= 0
    covariance = np.asarray(result.covariance)
    np.testing.assert_array_equal(covariance, covariance.swapaxes(1, 2))
    np.testing.assert_allclose(covariance.sum(2), 0, atol=1e-15 * 8)
    assert np.min(np.linalg.eigvalsh(covariance)) > -1e-15


def test_shifts_and_permutations():
    rng = np.random.default_rng(6)
    mean, variance = rng.normal(size=7) * 3, rng.uniform(0, 3, 7)
    first = predict.class_probabilities(mean, variance)
    np.testing.assert_allclose(
        predict.class_probabilities(mean + 1000, variance), first, atol=1e-12
    )
    order = rng.permutation(7)
    np.testing.assert_allclose(
        predict.class_probabilities(mean[order], variance[order]), first[order], atol=1e-15
    )


# Edges


MEANS = np.array(
    [
        [0, 0, 0, 0, 0],
        [1e3, -1e3, 0, 1e3, 5],
        [1e3, 999, 1e3, -1e3, 990],
        [0.3, -1, 4, 2, -6],
    ]
)
VARIANCE_ROWS = np.array([*([v] * 5 for v in (0, 1e-12, 1e-3, 1, 1e3)), [0, 1e3, 1, 1e-12, 50]])


@pytest.mark.parametrize(
    ("order", "dtype"),
    [(None, jnp.float32), (2, jnp.float32), (4, jnp.float64), (32, jnp.float32)],
)
def test_edges(order, dtype):
    """A distribution, a covariance, finite gradients; at every mean with every variance."""
    mean, variance = (
        jnp.asarray(np.broadcast_to(x, (4, 6, 5)).reshape(-1, 5), dtype)
        for x in (MEANS[:, None], VARIANCE_ROWS)
    )

    def total(mean, variance):
        result = moments(mean, variance, parse(order), True)
        # Weights that differ: the sum of all entries has gradient 0.
        weighted = (x * jnp.cos(jnp.arange(x.size, dtype=dtype)).reshape(x.shape) for x in result)
        return sum(map(jnp.sum, weighted)), result

    _, result = total(mean, variance)
    tolerance = 20 * float(jnp.finfo(dtype).eps)
    assert np.min(result.mean) >= 0
    np.testing.assert_allclose(jnp.sum(result.mean, -1), 1, atol=tolerance)
    np.testing.assert_allclose(jnp.sum(result.covariance, -1), 0, atol=tolerance)
    assert np.min(np.linalg.eigvalsh(np.asarray(result.covariance, float))) > -tolerance
    if order == 32:  # whose gradient takes long to compile
        return
    for gradient in jax.grad(total, (0, 1), has_aux=True)(mean, variance)[0]:
        assert np.isfinite(gradient).all()
        assert np.max(np.abs(gradient)) > 1e-3


@pytest.mark.quick(order=None)
@pytest.mark.parametrize("order", [None, 2])
def test_one_class(order):
    mean, variance = np.array([[1e3], [0.0], [-5.0]]), np.array([[0.0], [1e3], [1.0]])
    np.testing.assert_array_equal(predict.class_probabilities(mean, variance, order=order), 1)
    covariance = predict.class_probability_covariance(mean, variance, order=order)
    np.testing.assert_array_equal(covariance, np.zeros((3, 1, 1)))


@pytest.mark.parametrize("order", [None, 2])
def test_extreme_points_against_brute_force(order):
    mean = np.array([1e3, 990.0, 1e3, -1e3, 1e3]) - (1e3 if order is None else 0)
    for variance in ([1e3] * 5, [0.0, 1e3, 1.0, 0.0, 50.0], [0.0, 400.0, 0.0, 1e3, 0.0]):
        first, *_ = oracle.moments(mean, np.array(variance), order)
        got = predict.class_probabilities(mean, variance, order=order)
        np.testing.assert_allclose(got, first, atol=1e-6)


@pytest.mark.parametrize("order", [None, 2, 4])
def test_ten_thousand_classes(order):
    """Two kinds of classes, of which the oracle needs one each."""
    n = 10_000
    counts, mean, variance = np.array([1, n - 1]), np.array([4.0, 0.0]), np.array([0.5, 1.0])
    first, *_ = oracle.moments(mean, variance, order, counts)
    for dtype, tolerance in ((jnp.float64, 1e-6), (jnp.float32, 1e-4)):
        got = predict.class_probabilities(
            *(jnp.asarray(np.repeat(x, counts), dtype) for x in (mean, variance)), order=order
        )
        np.testing.assert_allclose(got, np.repeat(first, counts), rtol=tolerance)


@pytest.mark.parametrize("order", [None, 8])
def test_memory_does_not_grow_with_the_points(order):
    def temporary_bytes(n):
        one = jnp.ones((n, 10_000))
        choices = rules.for_surrogate(parse(order))
        lowered = in_graph.lower(mean_by_rule, one, one, parse(order), 1, choices)
        memory = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes - 10 * memory.output_size_in_bytes

    assert temporary_bytes(200) <= temporary_bytes(2) < 2**30


# JAX


@pytest.mark.parametrize("order", [None, 2])
def test_points_of_all_kinds_keep_their_places(order):
    """Blocks, sorting by need and padding change nothing: each point alone is the same."""
    rng = np.random.default_rng(7)
    mean = rng.normal(size=(6, 50, 3)) * 3
    variance = 10 ** rng.uniform(-3, 2, (6, 50, 1))
    many = np.broadcast_to(mean, (3, *mean.shape)), variance
    got = predict.class_probabilities(mean, variance, order=order)
    in_blocks = predict.class_probabilities(*many, order=order)
    assert in_blocks.shape == (3, 6, 50, 3)
    alone = np.stack(
        [
            predict.class_probabilities(m, v, order=order)
            for m, v in zip(mean.reshape(-1, 3), variance.reshape(-1, 1), strict=True)
        ]
    ).reshape(mean.shape)
    np.testing.assert_allclose(got, alone, atol=2e-8)
    np.testing.assert_allclose(in_blocks, np.broadcast_to(alone, in_blocks.shape), atol=2e-8)


@pytest.mark.quick
def test_what_is_compiled_serves_any_number_of_points(caplog):
    """Of concrete points only the rules that they need are compiled, and those once."""

    def compiled(mean, variance):
        caplog.clear()
        with jax.log_compiles():
            got = predict.class_probabilities(mean, variance)
        done = (each for each in caplog.messages if "Finished XLA compilation" in each)
        return got, sum("_one_block" in each for each in done)

    rng = np.random.default_rng(9)
    # So many classes as no other test has.
    mean, variance = rng.normal(size=(50, 13)), np.full((50, 1), 0.5)
    got, first = compiled(mean, variance)
    assert first == 1
    np.testing.assert_allclose(
        got, jax.jit(predict.class_probabilities)(mean, variance), atol=1e-14
    )
    for n in (49, 33):
        other, again = compiled(mean[:n], variance[:n])
        np.testing.assert_array_equal(other, got[:n])
        assert again == 0
    # Control: another rule is another function.
    _, other = compiled(mean, variance + 2)
    assert other == 1


@pytest.mark.quick
def test_transformations():
    rng = np.random.default_rng(8)
    mean, variance = jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray(rng.uniform(0, 9, (4, 1)))
    for order in (None, 2):

        def function(mean, variance, order=order):
            return predict.class_probabilities(mean, variance, order=order)

        want = function(mean, variance)
        np.testing.assert_allclose(jax.jit(function)(mean, variance), want, atol=1e-14)
        # Here every rule computes every point, and the right one is chosen.
        np.testing.assert_allclose(jax.vmap(function)(mean, variance), want, atol=2e-8)
    forward, backward = (f(function, 1)(mean, variance) for f in (jax.jacfwd, jax.jacrev))
    np.testing.assert_allclose(forward, backward, atol=1e-13)
    with jax.numpy_dtype_promotion("strict"):
        predict.class_probabilities(mean.astype(jnp.float32), variance.astype(jnp.float32))


def test_broadcasting():
    mean = np.arange(12.0).reshape(2, 2, 3)
    rows = predict.class_probabilities(mean, np.full((2, 2, 3), 2.0))
    for shape in ((), (1,), (3,), (2, 1), (2, 1, 1), (2, 2, 1), (1, 1, 3)):
        got = predict.class_probabilities(mean, np.full(shape, 2.0))
        np.testing.assert_allclose(got, rows, atol=1e-15)
    assert predict.class_probability_covariance(mean, 2.0).shape == (2, 2, 3, 3)
    assert predict.class_probabilities(np.zeros((0, 3)), 1.0).shape == (0, 3)
    assert predict.class_probabilities([1, 2], 1).dtype == jnp.float64


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "order", "error", "message"),
    [
        ((1.0, 1.0), None, ValueError, r"`mean`.*\(\)"),
        ((np.zeros((2, 0)), 1.0), None, ValueError, r"`mean`.*\(2, 0\)"),
        ((np.zeros((4, 3)), np.ones(4)), None, ValueError, r"`variance`.*\(4, 3\).*\(4,\)"),
        ((np.zeros(3), np.ones((4, 3))), None, ValueError, r"`variance`.*\(3,\).*\(4, 3\)"),
        ((np.zeros(3) * 1j, 1.0), None, TypeError, "`mean`.*complex"),
        ((np.zeros(3), 1j), None, TypeError, "`variance`.*complex"),
        ((np.zeros(3), 1.0), 3, ValueError, "`order`.*3"),
        ((np.zeros(3), 1.0), 2.0, TypeError, "`order`.*2.0"),
    ],
)
def test_errors_name_the_argument(arguments, order, error, message):
    for function in (predict.class_probabilities, predict.class_probability_covariance):
        with pytest.raises(error, match=message):
            function(*arguments, order=order)
