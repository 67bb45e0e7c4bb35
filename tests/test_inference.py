"""Categorical inference: importance sampling, finite differences, optimality, edges, errors."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from taylor_softmax import predict, stax
from taylor_softmax._probabilities import inference
from taylor_softmax._probabilities.log_normalizer import log_normalizer
from taylor_softmax._probabilities.priors import Exact, Inducing, padded


def problem(seed, n, n_classes, variance, noise=0.3):
    """A smooth kernel, `(N, N)`, labels, and the inputs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2))
    scores = x @ rng.normal(size=(2, n_classes)) + noise * rng.normal(size=(n, n_classes))
    return kernel(x, x, variance), scores.argmax(1), x


def kernel(x1, x2, variance):
    return variance * np.exp(-np.sum((x1[:, None] - x2) ** 2, axis=-1) / 2)


def importance_sampling(prior, labels, n_classes, posterior, k_test, n_samples=400_000):
    """`log p(y)`, probabilities at test points, and their standard errors.

    Proposals are the posterior's marginals widened by 1.3, and at test points the prior given the
    training logits: prior, likelihood and proposal are evaluated as they are defined.
    """
    rng = np.random.default_rng(0)
    n = len(prior)
    cross, test = k_test
    log_weight = np.zeros(n_samples)
    z, z_test = [], []
    for c in range(n_classes):
        omega = np.asarray(posterior.site_precision)[:, c]
        covariance = prior - prior @ np.linalg.solve(np.diag(1 / omega) + prior, prior)
        root = np.linalg.cholesky(1.69 * covariance)
        noise = rng.standard_normal((n_samples, n))
        sample = (prior @ np.asarray(posterior.alpha)[:, c]) + noise @ root.T
        whitened = np.linalg.solve(np.linalg.cholesky(prior), sample.T)
        log_weight += (
            np.sum(noise**2, 1) / 2
            + np.log(np.diag(root)).sum()
            - np.sum(whitened**2, 0) / 2
            - np.log(np.diag(np.linalg.cholesky(prior))).sum()
        )
        z.append(sample)
        rest = test - np.sum(cross * np.linalg.solve(prior, cross.T).T, 1)
        mean = sample @ np.linalg.solve(prior, cross.T)
        z_test.append(mean + np.sqrt(rest) * rng.standard_normal(mean.shape))
    z, z_test = np.stack(z, -1), np.stack(z_test, -1)
    log_weight += np.sum(
        np.take_along_axis(np.asarray(jax.nn.log_softmax(z)), labels[None, :, None], -1), (1, 2)
    )
    largest = log_weight.max()
    weight = np.exp(log_weight - largest)
    evidence = np.log(weight.mean()) + largest
    error = weight.std() / weight.mean() / np.sqrt(n_samples)
    y = np.asarray(jax.nn.softmax(z_test))
    p = np.einsum("s,smc->mc", weight, y) / weight.sum()
    p_error = np.sqrt(np.einsum("s,smc->mc", weight**2, (y - p) ** 2)) / weight.sum()
    return evidence, error, p, p_error


# Of the bound, in nats, and of probabilities: what a Gaussian independent over classes costs.
LIMITS = {1.0: (0.05, 0.01), 10.0: (0.3, 0.03), 100.0: (1.0, 0.06)}


@pytest.mark.quick(variance=100.0, n=5)
@pytest.mark.parametrize("variance", LIMITS)
@pytest.mark.parametrize(
    ("n", "n_classes"),
    [(5, 3), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((6, 2), (4, 5)))],
)
def test_against_importance_sampling(n, n_classes, variance):
    prior, labels, x = problem(n, n, n_classes, variance)
    posterior = predict.categorical_inference(prior, labels, n_classes=n_classes)
    assert posterior.converged
    x_test = np.random.default_rng(9).normal(size=(4, 2))
    k_test = kernel(x_test, x, variance), np.full(4, variance)
    evidence, error, p, p_error = importance_sampling(prior, labels, n_classes, posterior, k_test)
    assert error < 0.02  # the oracle
    below, difference = LIMITS[variance]
    gap = evidence - float(posterior.log_evidence)
    assert -4 * error < gap < below + 4 * error
    got = posterior(*k_test).probabilities
    assert np.all(np.abs(got - p) < difference + 4 * p_error)
    # Above the factorised bound, which counts the divergence of the common shift as well.
    assert float(posterior.log_evidence) > float(factorised_bound(prior, labels, n_classes))


def factorised_bound(prior, labels, n_classes):
    """The largest bound with the whole divergence: fixed point of `omega = lambda`."""
    y = np.eye(n_classes)[labels]
    alpha, omega = np.zeros_like(y), np.full_like(y, 0.2)
    n = len(y)
    for _ in range(300):
        covariances = [
            prior - prior @ np.linalg.solve(np.diag(1 / w) + prior, prior) for w in omega.T
        ]
        mean, variance = prior @ alpha, np.stack([np.diag(v) for v in covariances], 1)
        p = np.asarray(predict.class_probabilities(mean, variance))
        covariance = np.asarray(predict.class_probability_covariance(mean, variance))
        rate = p - p**2 - np.diagonal(covariance, 0, 1, 2)
        gradient = y - p - alpha
        steps = [g - w * (v @ g) for g, w, v in zip(gradient.T, omega.T, covariances, strict=True)]
        alpha, omega = alpha + 0.5 * np.stack(steps, 1), omega + 0.5 * (rate - omega)
    logdets = sum(np.linalg.slogdet(np.eye(n) + w[:, None] * prior)[1] for w in omega.T)
    divergence = (np.sum(alpha * mean) - np.sum(omega * variance) + logdets) / 2
    expected = predict.expected_log_normalizer(mean, variance)
    return np.sum(y * mean) - np.sum(expected) - divergence


@pytest.mark.quick(variance=10.0)
@pytest.mark.parametrize("variance", [1.0, 10.0, 100.0])
def test_gradient_against_finite_differences_of_the_refitted_bound(variance):
    prior, labels, x = problem(1, 12, 3, variance)
    # Of another length scale: along it the kernel stays positive definite on both sides.
    other = kernel(2 * x, 2 * x, variance)
    prior = prior + other / 10
    y = jax.nn.one_hot(labels, 3)
    options = {"tol": 2e-5, "max_iterations": 300}
    posterior = predict.categorical_inference(prior, y, **options)
    gradient = jax.grad(lambda k: predict.categorical_log_evidence(k, y, **options))(prior)
    for direction in (prior, other):

        def refitted(step, direction=direction):
            k = prior + step * direction
            return predict.categorical_inference(k, y, init=posterior, **options).log_evidence

        want = float(refitted(1e-3) - refitted(-1e-3)) / 2e-3
        assert float(jnp.sum(gradient * direction)) == pytest.approx(want, rel=2e-3, abs=1e-3)
    # Control: away from the optimum the derivative at fixed sites is another.
    start = inference.Sites(*map(jnp.asarray, inference.initial_sites(y)))
    at_start = inference.slope(Exact(jnp.asarray(prior)), y, start).kernel
    assert abs(float(jnp.sum(at_start * other)) - want) > 0.01


def plain_bound(prior, y, sites):
    """The bound as the docstring of `inference` has it, by inverse matrices."""
    n, n_classes = y.shape
    if isinstance(prior, Inducing):
        kernel_, rest = prior.weights.T @ prior.weights, prior.rest
    else:
        kernel_, rest = prior.kernel, 0.0
    b = [jnp.eye(n) + w[:, None] * kernel_ for w in (*sites.precision.T, sites.precision.mean(1))]
    variance = jnp.stack([jnp.diag(kernel_ @ jnp.linalg.inv(each)) for each in b[:-1]], 1)
    logdets = [jnp.linalg.slogdet(each)[1] for each in b]
    mean, shift = kernel_ @ sites.alpha, sites.alpha.sum(1)
    traces = sum(jnp.trace(jnp.linalg.inv(each)) for each in b[:-1])
    divergence = (
        (1 - 1 / n_classes) * traces - n * (n_classes - 1) + sum(logdets[:-1]) - logdets[-1]
    ) + (jnp.sum(sites.alpha * mean) - shift @ kernel_ @ shift / n_classes)
    expected = predict.expected_log_normalizer(mean, variance + jnp.reshape(rest, (-1, 1)))
    return jnp.sum(y * mean) - jnp.sum(y.sum(1) * expected) - divergence / 2


@pytest.mark.quick(inputs="all")
@pytest.mark.parametrize("inputs", ["all", "inducing"])
def test_bound_and_slopes_are_those_of_inverse_matrices(inputs):
    """At any sites, with soft labels, and with an input that has none."""
    variance = 3.0
    prior, labels, x = problem(3, 12, 3, variance)
    rng = np.random.default_rng(0)
    y = 0.8 * np.eye(3)[labels] + 0.2 / 3
    y[4] = 0
    prior = prior + kernel(2 * x, 2 * x, variance) / 10
    if inputs == "inducing":
        z, whole = x[:5], np.full(12, 1.1 * variance)
        arrays = kernel(z, z, variance), kernel(z, x, variance), whole
        prior = Inducing.of(*map(jnp.asarray, arrays))
    else:
        prior = Exact(jnp.asarray(prior))
    alpha = 0.3 * rng.standard_normal((12, 3))
    alpha -= alpha.mean(1, keepdims=True)
    sites = inference.Sites(*map(jnp.asarray, (alpha, rng.uniform(0, 0.4, (12, 3)))))
    y = jnp.asarray(y)
    want, slopes = jax.value_and_grad(plain_bound)(prior, y, sites)
    gain, q = inference._gain(prior, y, sites)
    got = gain - jnp.sum(y.sum(1) * log_normalizer(q.mean, q.whole).value)
    assert float(got) == pytest.approx(float(want), abs=1e-6)
    found = inference.slope(prior, y, sites)
    if inputs == "inducing":
        # Of a root that is given.
        slopes = slopes._replace(root=jnp.zeros_like(slopes.root))
    for a, b in zip(found, slopes, strict=True):
        symmetric = (a + a.T, b + b.T) if inputs == "all" else (a, b)
        np.testing.assert_allclose(*symmetric, atol=1e-6)
    # Control: sites that differ have other slopes.
    moved = inference.slope(prior, y, sites._replace(precision=1.1 * sites.precision))
    assert np.max(np.abs(moved[-1] - slopes[-1])) > 1e-3


def test_stationary_in_the_sites():
    """No step of the sites raises the bound."""
    prior, labels, _ = problem(3, 12, 3, 5.0)
    y = jax.nn.one_hot(labels, 3)
    posterior = predict.categorical_inference(prior, labels, tol=1e-6)
    sites = inference.Sites(posterior.alpha, posterior.site_precision)
    slopes = jax.jit(jax.grad(lambda sites: plain_bound(Exact(jnp.asarray(prior)), y, sites)))
    at = slopes(sites)
    assert np.max(np.abs(at.alpha)) < 1e-4
    assert np.max(np.abs(at.precision * sites.precision)) < 1e-5
    assert np.max(at.precision * np.maximum(sites.precision, 0.01)) < 1e-5
    moved = sites._replace(precision=sites.precision * 1.1)
    assert np.max(np.abs(slopes(moved).precision * moved.precision)) > 1e-3


def inducing(x, z, variance):
    return predict.InducingKernels(
        kernel(z, z, variance), kernel(z, x, variance), np.full(len(x), variance)
    )


def test_inducing_inputs():
    """All training inputs for inducing ones are the whole kernel; of fewer the bound is lower."""
    variance = 10.0
    prior, labels, x = problem(0, 40, 3, variance)
    x_test = np.random.default_rng(9).normal(size=(4, 2))
    k_test = np.full(4, variance)
    whole = predict.categorical_inference(prior, labels)
    want = whole(kernel(x_test, x, variance), k_test, latent=True)
    chosen = predict.choose_inducing(np.diag(prior), lambda i: prior[:, i], 40)
    bounds, distances = [], []
    for m in (12, 40):
        z = x[chosen[:m]]
        posterior = predict.categorical_inference(inducing(x, z, variance), labels)
        assert posterior.converged
        got = posterior(kernel(x_test, z, variance), k_test, latent=True)
        bounds.append(float(posterior.log_evidence))
        distances.append(max(np.max(np.abs(a - b)) for a, b in zip(got, want, strict=True)))
    assert bounds[1] == pytest.approx(float(whole.log_evidence), abs=1e-7)
    assert distances[1] < 1e-6
    # The comparisons can fail.
    assert bounds[0] < bounds[1] - 0.1
    assert distances[0] > 0.01


def test_inputs_without_labels_and_variance_change_nothing():
    """What fills up a kernel to a size that is compiled; a loop of Python and one in a graph."""
    variance = 5.0
    kernel_, labels, x = problem(2, 20, 3, variance)
    # A few steps: the last of many are those that rounding takes.
    y, options = jnp.eye(3)[labels], {"tol": 1e-9, "max_iterations": 6, "damping": 1.0}
    whole = Exact(jnp.asarray(kernel_))
    for prior in (whole, Inducing.of(*map(jnp.asarray, inducing(x, x[:6], variance)))):
        alone = inference.fit(prior, y, inference.initial_sites(y), **options)
        more = padded(y, 32, 3)
        start = inference.initial_sites(more)
        filled = inference.fit(prior.padded(32), more, start, **options)
        traced = jax.jit(
            lambda prior, y=more, start=start: inference.fit(prior, y, start, **options)
        )(prior.padded(32))
        # In a graph a block of inputs has one rule for all, right to 5e-8.
        for fit, error in ((filled, 1e-10), (traced, 1e-6)):
            assert int(fit.iterations) == 6
            assert float(fit.log_evidence) == pytest.approx(float(alone.log_evidence), abs=error)
            np.testing.assert_allclose(fit.sites.alpha[:20], alone.sites.alpha, atol=error)
            np.testing.assert_array_equal(fit.sites.alpha[20:], 0)
    # Control: with a label one more input does change the bound.
    more = more.at[20, 0].set(1)
    other = inference.fit(whole.padded(32), more, start, **options)
    assert float(other.log_evidence) == pytest.approx(
        float(inference.fit(whole, y, inference.initial_sites(y), **options).log_evidence)
        + np.log(1 / 3),
        abs=1e-6,
    )


def test_what_is_compiled_serves_other_numbers_of_inputs(caplog):
    def compiled(n, n_test):
        prior, labels, x = problem(2, n, 3, 5.0)
        caplog.clear()
        with jax.log_compiles():
            posterior = predict.categorical_inference(prior, labels, n_classes=3)
            posterior(kernel(x[:n_test], x, 5.0), np.full(n_test, 5.0))
        long = ("_trial", "_ascent", "_latent", "_one_block")
        done = [each for each in caplog.messages if "Finished XLA compilation" in each]
        return sum(any(name in each for name in long) for each in done)

    compiled(49, 2)
    assert compiled(80, 16) == 0
    # Control: beyond the next size it does not.
    assert compiled(81, 17) > 0


def test_evidence_with_inducing_inputs_is_differentiable():
    _, labels, x = problem(2, 15, 3, 5.0)
    z = x[:6]

    def evidence(scale):
        kernels = jax.tree.map(lambda k: scale * k, inducing(x, z, 5.0))
        return predict.categorical_log_evidence(kernels, labels, n_classes=3, tol=1e-6)

    want = (evidence(1.001) - evidence(0.999)) / 2e-3
    assert float(jax.grad(evidence)(1.0)) == pytest.approx(float(want), rel=1e-4)
    assert abs(float(want)) > 0.1


def test_logits_without_variance():
    """Probabilities of 1/3, whatever the labels, of a whole kernel and of inducing inputs."""
    x, labels = np.zeros((4, 2)), [0, 1, 2, 2]
    kernels = predict.InducingKernels(*(k.astype(np.float32) for k in inducing(x, x[:2], 0.0)))
    for given in (np.zeros((4, 4), np.float32), kernels):
        posterior = predict.categorical_inference(given, labels, tol=1e-3)
        assert posterior.converged
        assert float(posterior.log_evidence) == pytest.approx(4 * np.log(1 / 3), rel=1e-5)


def test_inducing_inputs_that_are_alike():
    """Duplicates leave the bound as it is, and are not chosen."""
    _, labels, x = problem(6, 12, 3, 10.0)
    once, twice = x[:5], np.concatenate([x[:5], x[:5]])
    bounds = [
        float(predict.categorical_inference(inducing(x, z, 10.0), labels).log_evidence)
        for z in (once, twice)
    ]
    assert bounds[1] == pytest.approx(bounds[0], abs=1e-5)
    k = kernel(twice, twice, 10.0)
    chosen = predict.choose_inducing(np.diag(k), lambda i: k[:, i], 10)
    assert sorted(chosen % 5) == [0, 1, 2, 3, 4]
    # The pivots of SciPy's Cholesky factorisation (LAPACK's pstrf) are the same inputs.
    k = kernel(x, x, 10.0) * np.outer(np.arange(1, 13), np.arange(1, 13))
    chosen = predict.choose_inducing(np.diag(k), lambda i: k[:, i], 12)
    _, pivots, _, _ = scipy.linalg.lapack.dpstrf(k)
    np.testing.assert_array_equal(chosen, pivots[: len(chosen)] - 1)


def test_two_classes_are_binary_classification():
    """`z_1 - z_2 ~ N(0, 2 K)` under a sigmoid: a dense Gaussian bound, maximised by SciPy."""
    from scipy.optimize import minimize

    prior, labels, _ = problem(4, 4, 2, 3.0)
    posterior = predict.categorical_inference(prior, labels, tol=1e-6)
    sign = jnp.asarray(np.where(labels == 0, 1.0, -1.0))
    x, weight = np.polynomial.hermite_e.hermegauss(60)
    inverse = np.linalg.inv(2 * prior)

    def negative(parameters):
        mean, root = parameters[:4], jnp.tril(parameters[4:].reshape(4, 4))
        covariance = root @ root.T
        z = mean[:, None] + jnp.sqrt(jnp.diagonal(covariance))[:, None] * x
        likelihood = jnp.sum(jax.nn.log_sigmoid(sign[:, None] * z) * weight) / weight.sum()
        divergence = jnp.trace(inverse @ covariance) + mean @ inverse @ mean - 4
        divergence -= jnp.linalg.slogdet(inverse @ covariance)[1]
        return divergence / 2 - likelihood

    start = np.concatenate([np.zeros(4), np.linalg.cholesky(2 * prior).ravel() / 2])
    best = minimize(jax.jit(jax.value_and_grad(negative)), start, jac=True, tol=1e-10)
    assert float(posterior.log_evidence) == pytest.approx(-best.fun, abs=1e-5)


@pytest.mark.quick(variance=1e4)
@pytest.mark.parametrize("variance", [1e-3, 1.0, 1e4])
def test_hard_problems_stay_finite(variance):
    """Duplicates that contradict each other, an absent class, a singular kernel."""
    _, labels, x = problem(5, 12, 3, variance)
    twice = np.concatenate([x, x])
    both = np.concatenate([labels, (labels + 1) % 3])
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        posterior = predict.categorical_inference(kernel(twice, twice, variance), both, n_classes=5)
        linear = variance * x @ x.T  # of rank 2
        singular = predict.categorical_inference(linear, labels, n_classes=3)
    for each in (posterior, singular):
        # The last nats of a separable problem of rank 2 are far away: then it says so.
        assert each.converged or each.residual < 0.1
        assert np.isfinite(each.log_evidence)
    p = posterior(kernel(x, twice, variance), np.full(12, variance)).probabilities
    assert np.all(np.isfinite(p))
    # Each label was seen as often as its neighbour.
    p, rows = np.asarray(p), np.arange(12)
    if variance > 1:
        assert np.all(p[:, 3:] < 0.25)
        assert np.mean(p[rows, labels] + p[rows, (labels + 1) % 3]) > 0.5


def test_one_input_and_many_classes():
    posterior = predict.categorical_inference([[4.0]], [1], n_classes=100)
    assert posterior.converged
    logits = posterior([[4.0]], [4.0], latent=True)
    assert logits.mean[0, 1] > logits.mean[0, 0] == pytest.approx(float(logits.mean[0, 2]))
    # Exact: by symmetry the label has probability 1/100, whatever the variance.
    assert -0.5 < float(posterior.log_evidence) - np.log(1 / 100) < 1e-6


@pytest.mark.quick
def test_float32():
    prior, labels, x = problem(6, 12, 3, 10.0)
    double = predict.categorical_inference(prior, labels)
    single = predict.categorical_inference(prior.astype(np.float32), labels, tol=1e-3)
    assert single.alpha.dtype == jnp.float32
    assert single.converged
    assert float(single.log_evidence) == pytest.approx(float(double.log_evidence), abs=1e-2)
    k_test = kernel(x + 0.3, x, 10.0), np.full(12, 10.0)
    got = single(*(k.astype(np.float32) for k in k_test)).probabilities
    np.testing.assert_allclose(got, double(*k_test).probabilities, atol=2e-3)


def test_classes_that_compete_converge_in_single_precision():
    """Steps of 1 jump from one side of the optimum to the other, which rounding hides."""
    images, labels = load_digits(return_X_y=True)
    x, _, y, _ = train_test_split(images, labels, train_size=150, random_state=0)
    x = x - x.mean(0)
    x = np.float32(x / np.sqrt(np.mean(x**2)))
    kernel_fn = stax.serial(
        *[stax.Dense(1, W_std=1.846, b_std=0.302), stax.Relu()] * 2, stax.Dense(1, W_std=3.442)
    )[2]
    k = np.float32(kernel_fn(x, None, "nngp"))
    posterior = predict.categorical_inference(k, y, tol=1e-4, max_iterations=40)
    assert posterior.converged
    exact = predict.categorical_inference(np.float64(k), y, tol=1e-6)
    np.testing.assert_allclose(posterior.log_evidence, exact.log_evidence, rtol=1e-5)


@pytest.mark.slow
def test_evidence_of_a_network():
    """`jax.grad` through `kernel_fn` to its scales, under `jit`; soft labels; a warm start."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(12, 3))
    labels = (x[:, 0] > 0).astype(int)

    def evidence(scales):
        _, _, kernel_fn = stax.serial(
            stax.Dense(64, scales[0], scales[1]), stax.Relu(), stax.Dense(1, scales[2])
        )
        k = kernel_fn(x, None, "nngp")
        return predict.categorical_log_evidence(k, labels, n_classes=2, tol=1e-6)

    scales = jnp.array([1.3, 0.2, 2.0])
    gradient = jax.jit(jax.grad(evidence))(scales)
    for i in range(3):
        step = 1e-3 * np.eye(3)[i]
        want = (evidence(scales + step) - evidence(scales - step)) / 2e-3
        assert float(gradient[i]) == pytest.approx(float(want), rel=1e-3, abs=1e-4)
    prior = kernel(x, x, 2.0)
    cold = predict.categorical_inference(prior, np.eye(2)[labels] * 0.8 + 0.1)
    warm = predict.categorical_inference(prior, np.eye(2)[labels] * 0.8 + 0.1, init=cold)
    assert warm.iterations == 1
    assert float(warm.log_evidence) == pytest.approx(float(cold.log_evidence), abs=1e-9)
    hard = predict.categorical_inference(prior, labels)
    assert abs(float(hard.log_evidence - cold.log_evidence)) > 1e-2


@pytest.mark.quick
def test_start_from_another_kernel_keeps_the_sites():
    """The posterior given observations that stand for the likelihood, by its definition."""
    prior, labels, _ = problem(3, 12, 3, 4.0)
    at = predict.categorical_inference(prior, labels, n_classes=3)
    sites = inference.Sites(at.alpha, at.site_precision)
    larger = Exact(jnp.asarray(9 * prior))
    moved = inference.carried_over(larger, at.prior, sites)
    alpha, omega = np.asarray(at.alpha), np.asarray(at.site_precision)
    values = prior @ alpha + alpha / omega
    want = np.stack(
        [
            np.linalg.solve(9 * prior + np.diag(1 / w), v)
            for v, w in zip(values.T, omega.T, strict=True)
        ],
        1,
    )
    np.testing.assert_allclose(moved.alpha, want - want.mean(1, keepdims=True), atol=1e-9)
    np.testing.assert_array_equal(moved.precision, omega)
    # With the same kernel nothing moves.
    same = inference.carried_over(at.prior, at.prior, sites)
    np.testing.assert_allclose(same.alpha, alpha, atol=1e-3)
    # As the steps of a search for hyperparameters are.
    warm = predict.categorical_inference(1.3 * prior, labels, n_classes=3, init=at)
    cold = predict.categorical_inference(1.3 * prior, labels, n_classes=3)
    assert warm.iterations < cold.iterations
    np.testing.assert_allclose(warm.log_evidence, cold.log_evidence, atol=1e-4)


def test_not_converged_is_said(capsys):
    prior, labels, _ = problem(8, 12, 3, 10.0)
    with pytest.warns(UserWarning, match=r"not converged: after 2 iterations.*residual"):
        posterior = predict.categorical_inference(prior, labels, max_iterations=2, progress=True)
    assert not posterior.converged
    assert posterior.history.shape == (2, 2)
    jax.effects_barrier()
    assert "iteration 2: log evidence" in capsys.readouterr().out


@pytest.mark.quick
@pytest.mark.parametrize(
    ("k", "y", "options", "error", "message"),
    [
        (np.eye(3)[:2], [0, 1], {}, ValueError, r"`k_train_train`.*\(2, 3\)"),
        (np.triu(np.ones((2, 2))), [0, 1], {}, ValueError, "`k_train_train` must be symmetric"),
        (np.eye(2) * np.nan, [0, 1], {}, ValueError, "`k_train_train` must be finite"),
        (np.eye(2) * 1j, [0, 1], {}, TypeError, "`k_train_train` .*Pass its real part"),
        (
            -np.eye(2),
            [0, 1],
            {},
            ValueError,
            r"`k_train_train` must be nonnegative along.*-1\.0 at \(0,\)",
        ),
        (np.eye(2), [0, 1, 1], {}, ValueError, r"`y_train`.*\(2,\).*\(3,\)"),
        (np.eye(2), [0.0, 1.0], {}, TypeError, "`y_train`.*integers"),
        (np.eye(2), [0, -1], {}, ValueError, "`y_train`.*0 to 1, got -1"),
        (np.eye(2), [0, 3], {"n_classes": 3}, ValueError, "`y_train`.*0 to 2, got 3"),
        (np.eye(2), np.eye(2) - 0.5, {}, ValueError, "`y_train`.*sum to 1"),
        (np.eye(2), np.eye(2), {"n_classes": 3}, ValueError, "`y_train` must have 3 columns"),
        (np.eye(2), [0, 1], {"damping": 1.5}, ValueError, "`damping`"),
        (np.eye(2), [0, 1], {"tol": 0.0}, ValueError, "`tol`"),
        (np.eye(2), [0, 1], {"max_iterations": 0}, ValueError, "`max_iterations`"),
    ],
)
def test_errors_name_the_argument(k, y, options, error, message):
    with pytest.raises(error, match=message):
        predict.categorical_inference(k, y, **options)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ((np.eye(2)[:1], np.ones((2, 3)), np.ones(3)), r"`k_inducing_inducing`.*\(1, 2\)"),
        ((np.eye(2), np.ones((3, 2)), np.ones(3)), r"`k_inducing_train`.*\(2, N\).*\(3, 2\)"),
        ((np.eye(2), np.ones((2, 3)), np.eye(3)), r"`k_train_train`.*\(3,\).*\(3, 3\)"),
        ((np.eye(2), np.ones((2, 3)), -np.ones(3)), "`k_train_train` must be nonnegative"),
        (
            (np.eye(2), 2 * np.ones((2, 3)), np.ones(3)),
            r"`k_inducing_train`.*kernels of one kind.*\(0, 0\)",
        ),
        ((np.eye(2), np.ones((2, 3)) * np.nan, np.ones(3)), "`k_inducing_train` must be finite"),
    ],
)
def test_errors_of_inducing_kernels_name_the_argument(kernels, message):
    with pytest.raises(ValueError, match=message):
        predict.categorical_inference(predict.InducingKernels(*kernels), [0, 1, 2])


@pytest.mark.quick
def test_errors_of_the_choice():
    with pytest.raises(ValueError, match=r"`variance`.*\(2, 2\)"):
        predict.choose_inducing(np.eye(2), lambda i: np.eye(2)[i], 1)
    with pytest.raises(ValueError, match=r"`column`.*\(2,\).*\(3,\)"):
        predict.choose_inducing(np.ones(2), lambda i: np.ones(3), 1)
    with pytest.raises(ValueError, match=r"`variance` must be nonnegative.*\(1,\)"):
        predict.choose_inducing(np.array([1.0, -1.0]), lambda i: np.ones(2), 1)


@pytest.mark.quick
def test_errors_of_the_posterior():
    posterior = predict.categorical_inference(np.eye(2), [0, 1])
    with pytest.raises(ValueError, match=r"`k_test_train`.*\(T, 2\).*\(2, 3\)"):
        posterior(np.ones((2, 3)), np.ones(2))
    with pytest.raises(ValueError, match=r"`k_test_test`.*\(3,\)"):
        posterior(np.ones((2, 2)), np.ones(3))
    with pytest.raises(ValueError, match="`init`"):
        predict.categorical_inference(np.eye(3), [0, 1, 1], init=posterior)
    with pytest.raises(ValueError, match=r"`k_test_test` must be nonnegative"):
        posterior(np.zeros((2, 2)), -np.ones(2))
    # Of the NNGP and NTK, say.
    with pytest.raises(ValueError, match=r"`k_test_train`.*kernels of one kind.*2\.0 at \(0, 1\)"):
        posterior(np.array([[0.0, 2.0]]), np.ones(1))
    both = posterior(np.zeros((1, 2)), np.ones((1, 1)), covariance=True)
    np.testing.assert_allclose(both.probabilities, [[0.5, 0.5]], atol=1e-8)
    assert both.covariance.shape == (1, 2, 2)
