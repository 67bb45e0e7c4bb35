"""Class probabilities: brute force, sampling, identities, edges, neural_tangents' posteriors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
from jax import random

from taylor_softmax import predict, stax
from taylor_softmax._numerics.surrogate import parse
from taylor_softmax._probabilities import moments as probabilities

import neural_tangents as nt  # isort: skip

pytestmark = pytest.mark.core

ORDERS = (None, 2, 4, 8, 32)


def log_surrogate(z, order):
    """`log f(z)` by Horner's form, in long doubles: at order 32 it cancels by a factor of 1e7."""
    if order is None:
        return z
    z, value = np.asarray(z, np.longdouble), np.longdouble(1)
    for k in range(order, 0, -1):
        value = 1 + value * z / k
    return np.log(value).astype(float)


def brute_force(mean, variance, order=None, counts=None):
    """`E[y]` and `E[y y^T]` by fine trapezoidal rules in `log t` and in every logit.

    Equal classes are given once, with their number in `counts`; second moments are then those of
    one class of each kind with another of its kind.
    """
    mean, variance = np.asarray(mean, float), np.asarray(variance, float)
    counts = np.ones(mean.size) if counts is None else np.asarray(counts)
    sigma = np.sqrt(variance)
    # Steps of 0.15 in s and in the logits leave out exp(-2 pi 0.89 / 0.15), at the root of f_4.
    x = np.linspace(-8, 8, max(100, int(16 * sigma.max() / 0.15)))
    weight = np.exp(-(x**2) / 2)
    weight /= weight.sum()
    log_f = log_surrogate(mean[:, None] + sigma[:, None] * x, order)
    s = np.arange(-log_f.max() - 37, np.log(40) - log_f.min(1).max(), 0.15)
    first, second = np.zeros(mean.size), np.zeros((mean.size, mean.size))
    for part in np.array_split(s, -(-s.size * log_f.size // 2_000_000)):
        value = np.exp(np.minimum(part[:, None, None] + log_f, 6.5))
        tilt = np.exp(-value) * weight
        phi = np.maximum(tilt.sum(-1), 1e-300)
        a, b = (value * tilt).sum(-1) / phi, (value**2 * tilt).sum(-1) / phi
        w = np.exp(np.log(phi) @ counts) * 0.15
        first += w @ a
        second += np.einsum("l,li,lj->ij", w, a, a) + np.diag(w @ (b - a**2))
    return first, second


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
LIMITS = {jnp.float64: 2e-7, jnp.float32: 2e-6}


@pytest.mark.parametrize(("order", "n_classes"), SETTINGS)
def test_against_brute_force(order, n_classes):
    rng = np.random.default_rng(n_classes)
    for variance, unequal in itertools.product(VARIANCES, (False, True)):
        mean, v = points(rng, n_classes, variance, unequal)
        first, second = brute_force(mean, v, order)
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


def test_a_wrong_variance_or_rule_is_noticed(monkeypatch):
    """Negative controls: the limits above do tell the right value from one beside it."""
    mean, variance = np.array([0.0, 1.0, -0.5]), np.array([4.0, 4.0, 4.0])
    first, _ = brute_force(mean, variance)

    def error(variance):
        return np.max(np.abs(np.asarray(predict.class_probabilities(mean, variance)) - first))

    assert error(variance) < 1e-7 < 1e-6 < error(variance * (1 + 1e-4))
    assert error(np.array([4.0, 4.0, 4.0 + 1e-4])) > 1e-6
    jax.clear_caches()
    rules = tuple(rule._replace(outer=rule.outer // 3) for rule in probabilities._SOFTMAX_RULES[:1])
    monkeypatch.setattr(probabilities, "_SOFTMAX_RULES", rules)
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
    f = np.exp(log_surrogate(np.stack([np.swapaxes(z, 0, 1) for z in logits]), order))
    y = f / f.sum(0)
    first = np.einsum("iabc,a,b,c->i", y, weight, weight, weight, optimize=True)
    second = np.einsum("iabc,jabc,a,b,c->ij", y, y, weight, weight, weight, optimize=True)
    got = brute_force(mean, variance, order)
    np.testing.assert_allclose(got[0], first, atol=1e-10)
    np.testing.assert_allclose(got[1], second, atol=1e-10)
    assert np.max(np.abs(brute_force(mean, variance * 1.0001, order)[0] - first)) > 1e-6


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


# Identities


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


@pytest.mark.parametrize(
    ("order", "dtype"),
    [(None, jnp.float64), (None, jnp.float32), (2, jnp.float32), (4, jnp.float64)],
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
    # The covariance keeps its digits. The next term is of the order of the variance, to which the
    # library adds eps.
    relative = 10 * tiny.max() + 2 * eps / tiny.min()
    np.testing.assert_allclose(got, linear, atol=relative * np.max(np.abs(linear)))


@pytest.mark.parametrize("order", ORDERS)
def test_the_sum_before_normalisation(order):
    """Probabilities sum to 1 by construction; that they did before is the rules' accuracy."""
    rng = np.random.default_rng(5)
    mean = jnp.asarray(rng.normal(size=(60, 4)) * 3)
    variance = jnp.asarray(10 ** rng.uniform(-3, 2, (60, 1)) * 10 ** rng.uniform(-2, 0, (60, 4)))
    result = probabilities.moments(mean, variance, surrogate=parse(order), covariance=True)
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
        result = probabilities.moments(mean, variance, surrogate=parse(order), covariance=True)
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
        first, _ = brute_force(mean, np.array(variance), order)
        got = predict.class_probabilities(mean, variance, order=order)
        np.testing.assert_allclose(got, first, atol=1e-6)


@pytest.mark.parametrize("order", [None, 2, 4])
def test_ten_thousand_classes(order):
    """Two kinds of classes, of which the oracle needs one each."""
    n = 10_000
    counts, mean, variance = np.array([1, n - 1]), np.array([4.0, 0.0]), np.array([0.5, 1.0])
    first, _ = brute_force(mean, variance, order, counts)
    for dtype, tolerance in ((jnp.float64, 1e-6), (jnp.float32, 1e-4)):
        got = predict.class_probabilities(
            *(jnp.asarray(np.repeat(x, counts), dtype) for x in (mean, variance)), order=order
        )
        np.testing.assert_allclose(got, np.repeat(first, counts), rtol=tolerance)


@pytest.mark.parametrize("order", [None, 8])
def test_memory_does_not_grow_with_the_points(order):
    def temporary_bytes(n):
        one = jnp.ones((n, 10_000))
        lowered = probabilities.moments.lower(one, one, surrogate=parse(order), covariance=False)
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


# Posteriors of neural_tangents


@pytest.fixture(scope="module")
def ensemble():
    _, _, kernel_fn = stax.serial(stax.Dense(64), stax.Relu(), stax.Dense(3, W_std=2.0))
    x_train, x_test = random.normal(random.key(0), (8, 5)), random.normal(random.key(1), (6, 5))
    y_train = jax.nn.one_hot(jnp.arange(8) % 3, 3) - 1 / 3
    predict_fn = nt.predict.gradient_descent_mse_ensemble(kernel_fn, x_train, y_train)
    return predict_fn, kernel_fn, x_train, y_train, x_test


@pytest.mark.parametrize(
    ("get", "t"), [("nngp", None), ("ntk", 3.0), ("ntk", np.array([0.0, 1.0, 100.0]))]
)
def test_class_posterior(ensemble, get, t):
    predict_fn, *_, x_test = ensemble
    gaussian = predict_fn(t=t, x_test=x_test, get=get, compute_cov=True)
    posterior = predict.class_posterior(gaussian, order=2)
    variance = np.diagonal(gaussian.covariance, axis1=-2, axis2=-1)[..., None]
    for got, function in zip(
        posterior,
        (predict.class_probabilities, predict.class_probability_covariance),
        strict=True,
    ):
        want = function(gaussian.mean, variance, order=2)
        np.testing.assert_allclose(got, want, atol=1e-14)
    assert posterior.covariance.shape == (*gaussian.mean.shape, 3)


def test_class_posterior_of_gp_inference_and_at_training_points(ensemble):
    predict_fn, kernel_fn, x_train, y_train, x_test = ensemble
    inference = nt.predict.gp_inference(kernel_fn(x_train, None), y_train)
    arguments = kernel_fn(x_test, x_train), kernel_fn(x_test, None, "nngp")
    posterior = predict.class_posterior(inference("nngp", arguments[0].nngp, arguments[1]))
    want = predict.class_posterior(predict_fn(x_test=x_test, get="nngp", compute_cov=True))
    np.testing.assert_allclose(posterior.probabilities, want.probabilities, atol=1e-10)

    # Without noise the variance at training points is 0 up to rounding, which may be negative.
    gaussian = predict_fn(x_test=x_train, get="nngp", compute_cov=True)
    assert np.max(np.abs(np.diagonal(gaussian.covariance))) < 1e-10
    negative = gaussian._replace(covariance=gaussian.covariance - 1e-13 * jnp.eye(8))
    posterior = predict.class_posterior(negative)
    np.testing.assert_allclose(posterior.probabilities, jax.nn.softmax(y_train), atol=1e-6)


def test_class_posterior_says_what_to_pass(ensemble):
    predict_fn, *_, x_test = ensemble
    both = predict_fn(x_test=x_test, get=("nngp", "ntk"), compute_cov=True)
    with pytest.raises(TypeError, match=r"pass `gaussian.nngp`"):
        predict.class_posterior(both)
    with pytest.raises(TypeError, match="compute_cov=True"):
        predict.class_posterior(predict_fn(x_test=x_test, get="ntk"))
    gaussian = both.ntk
    for wrong in (
        gaussian._replace(covariance=jnp.ones((6, 5))),
        gaussian._replace(covariance=jnp.ones((6, 6, 3, 3))),
        gaussian._replace(mean=jnp.ones(6)),
    ):
        with pytest.raises(ValueError, match=r"`gaussian`.*\(\.\.\., N, N\)"):
            predict.class_posterior(wrong)
    with pytest.raises(ValueError, match="`order`"):
        predict.class_posterior(gaussian, order=5)
