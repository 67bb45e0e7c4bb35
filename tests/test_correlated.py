"""Class probabilities of logits with a full covariance over classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from taylor_softmax import predict
from taylor_softmax._numerics import errors
from taylor_softmax.methods import Direct, QuasiMonteCarlo

MEAN = jnp.array([0.4, -0.3, 0.1])
COVARIANCE = jnp.array([[1.0, 0.7, -0.2], [0.7, 1.5, 0.1], [-0.2, 0.1, 0.8]])


def of_three_classes(mean, covariance):
    """Mean and covariance of softmax by a fine rule in the two differences from the last class."""
    to_difference = np.array([[1.0, 0, -1], [0, 1, -1]])
    root = np.linalg.cholesky(to_difference @ covariance @ to_difference.T)
    x = np.arange(-7.5, 7.5, min(0.2, 0.6 / np.max(root)))
    weight = np.exp(-(x**2) / 2) / np.sum(np.exp(-(x**2) / 2))
    x = np.stack(np.meshgrid(x, x, indexing="ij"))
    z = np.einsum("ij,jkl->ikl", root, x) + (to_difference @ mean)[:, None, None]
    y = jax.nn.softmax(np.concatenate([z, 0 * z[:1]]), axis=0)
    p = np.einsum("ikl,k,l->i", y, weight, weight)
    return p, np.einsum("ikl,jkl,k,l->ij", y, y, weight, weight) - np.outer(p, p)


def both(mean, covariance, **options):
    return (
        predict.class_probabilities(mean, covariance=covariance, **options),
        predict.class_probability_covariance(mean, covariance=covariance, **options),
    )


@pytest.mark.quick(variance=100.0)
@pytest.mark.parametrize(("variance", "error"), [(1.0, 1e-4), (10.0, 5e-4), (100.0, 1e-3)])
def test_three_classes_against_quadrature(variance, error):
    mean = np.sqrt(variance) * MEAN
    thin = jnp.outer(jnp.array([1.0, -1, 0.5]), jnp.array([1.0, -1, 0.5])) + 0.1 * jnp.eye(3)
    covariances = variance * jnp.stack([COVARIANCE, thin])
    got = both(jnp.stack([mean, mean]), covariances)
    for i, covariance in enumerate(covariances):
        want = of_three_classes(np.asarray(mean), np.asarray(covariance))
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one[i], other, atol=error)
        # Negative control: the variances alone.
        alone = predict.class_probabilities(mean, jnp.diagonal(covariance))
        assert np.max(np.abs(alone - want[0])) > 5 * error


def low_rank(n_classes):
    """A mean and a covariance of rank 3 and a fifth on the diagonal."""
    factor = random.normal(random.key(0), (n_classes, 3)) / np.sqrt(3)
    mean = random.normal(random.key(1), (n_classes,)) / 2
    return mean, factor @ factor.T + 0.2 * jnp.eye(n_classes)


def agree_with_sampling(mean, covariance, error):
    root = jnp.linalg.cholesky(covariance)

    @jax.jit
    def sample(key):
        y = jax.nn.softmax(mean + random.normal(key, (200_000, len(mean))) @ root.T)
        return jnp.mean(y, 0), jnp.cov(y.T)

    samples = [sample(key) for key in random.split(random.key(2), 8)]
    for got, sampled in zip(both(mean, covariance), zip(*samples, strict=True), strict=True):
        stderr = np.std(sampled, 0, ddof=1) / np.sqrt(len(sampled))
        assert np.all(np.abs(got - np.mean(sampled, 0)) < error + 5 * stderr)


@pytest.mark.parametrize(("variance", "error"), [(1.0, 1e-4), (10.0, 5e-4), (100.0, 1e-3)])
def test_ten_classes_against_sampling(variance, error):
    mean, covariance = low_rank(10)
    agree_with_sampling(np.sqrt(variance) * mean, variance * covariance, error)


@pytest.mark.parametrize("variance", [1.0, 10.0, 100.0])
def test_thirty_classes_at_the_edges_of_what_is_promised(variance):
    mean, covariance = low_rank(30)
    covariance *= variance / jnp.max(jnp.diagonal(covariance))
    error = errors.promised(errors.CORRELATED, variance)
    agree_with_sampling(np.sqrt(variance) * mean, covariance, error)


def of_one_dimension(mean, root):
    """Mean and covariance of softmax at `mean + root x`, `x` standard normal."""
    x = np.linspace(-9, 9, 4001)
    weight = np.exp(-(x**2) / 2) / np.sum(np.exp(-(x**2) / 2))
    z = mean + x[:, None] * root
    y = np.exp(z - z.max(1, keepdims=True))
    y /= y.sum(1, keepdims=True)
    p = weight @ y
    return p, (y.T * weight) @ y - np.outer(p, p)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_thirty_classes_along_few_dimensions(dtype):
    """Of alternating signs, and of classes that are one: where independent logits are far."""
    rng = np.random.default_rng(0)
    signs = (-1.0) ** np.arange(30)
    roots = np.stack([signs, rng.uniform(-1, 1, 30), np.where(np.arange(30) < 1, 1.0, 0)])
    variances = np.repeat([1.0, 10.0, 100.0], 9)
    roots = np.sqrt(variances)[:, None] * np.tile(np.repeat(roots, 3, 0), (3, 1))
    size = np.tile([1.0, 2.0, 5.0], 9) * np.where(variances < 50, 1, 3)
    means = (rng.standard_normal((27, 30)) * size[:, None]).astype(dtype)
    covariances = (roots[:, :, None] * roots[:, None, :]).astype(dtype)
    got = both(jnp.asarray(means), jnp.asarray(covariances))
    for i, variance in enumerate(variances):
        error = errors.promised(errors.CORRELATED, variance, dtype)
        want = of_one_dimension(means[i].astype(float), roots[i])
        for one, other in zip(got, want, strict=True):
            assert np.max(np.abs(one[i] - other)) < error, (i, variance)
    # Control: as many dimensions as classes, of the same variances.
    alone = predict.class_probabilities(means[0], np.diagonal(covariances[0]))
    assert np.max(np.abs(alone - of_one_dimension(means[0].astype(float), roots[0])[0])) > 1e-3


@pytest.mark.slow
def test_thirty_classes_that_covary_negatively():
    """Neighbours of correlation -0.9; pairs of -1 and of 1; full rank."""
    t, rng = np.arange(30), np.random.default_rng(1)
    full = rng.standard_normal((30, 30))
    full = full @ full.T
    scale = 1 / np.sqrt(np.diagonal(full))
    for covariance in (
        (-0.9) ** np.abs(t[:, None] - t),
        np.kron(np.eye(15), [[1.0, -1.0], [-1.0, 1.0]]) + 1e-9 * np.eye(30),
        np.kron(np.eye(15), np.ones((2, 2))) + 1e-9 * np.eye(30),
        full * scale * scale[:, None],
    ):
        for variance in (1.0, 10.0, 100.0):
            mean = rng.standard_normal(30) * (1 if variance < 50 else 3)
            error = errors.promised(errors.CORRELATED, variance)
            agree_with_sampling(jnp.asarray(mean), jnp.asarray(variance * covariance), error)


def test_exact_where_there_is_an_exact_rule():
    variance = jnp.array([0.5, 3.0, 0.0])
    shift = jnp.array([0.3, -0.2, 0.6])
    diagonal = jnp.diag(variance)
    # Of what is common to all classes softmax sees nothing.
    for covariance in (diagonal, diagonal + 2.0, diagonal + shift[:, None] + shift):
        result = both(MEAN, covariance + 1.0)
        want = (
            predict.class_probabilities(MEAN, variance),
            predict.class_probability_covariance(MEAN, variance),
        )
        for got, expected in zip(result, want, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-7)
    # Two classes: only the variance of their difference matters.
    two = predict.class_probabilities(MEAN[:2], covariance=COVARIANCE[:2, :2])
    variance = (1.0 + 1.5 - 2 * 0.7) * jnp.array([1.0, 0.0])
    np.testing.assert_allclose(two, predict.class_probabilities(MEAN[:2], variance), atol=2e-6)
    one = both(jnp.ones((2, 1)), jnp.ones((1, 1)))
    np.testing.assert_allclose(one[0], 1, rtol=1e-12)
    np.testing.assert_allclose(one[1], 0, atol=1e-12)
    # Taylor softmax sees the shift, and independent logits only.
    got = predict.class_probabilities(MEAN, covariance=diagonal, order=4)
    np.testing.assert_allclose(
        got, predict.class_probabilities(MEAN, jnp.diagonal(diagonal), order=4), atol=1e-7
    )


def test_taylor_softmax():
    x = np.arange(-7.5, 7.5, 0.1)
    weight = np.exp(-(x**2) / 2) / np.sum(np.exp(-(x**2) / 2))
    covariance = np.asarray(COVARIANCE)[:2, :2]
    z = (
        np.einsum(
            "ij,jkl->ikl",
            np.linalg.cholesky(covariance),
            np.stack(np.meshgrid(x, x, indexing="ij")),
        )
        + np.asarray(MEAN)[:2, None, None]
    )
    f = 1 + z + z**2 / 2
    want = np.einsum("ikl,k,l->i", f / f.sum(0), weight, weight)
    got = predict.class_probabilities(MEAN[:2], covariance=covariance, order=2)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_excluded_classes_and_batches():
    order = jnp.array([0, 2, 3])
    larger = jnp.full((4, 4), 7.0).at[order[:, None], order].set(COVARIANCE) + jnp.eye(4) * 1e-9
    larger = larger.at[1, 1].set(99.0)
    mean = jnp.array([0.4, -jnp.inf, -0.3, 0.1])
    got = both(mean, larger)
    for one, other in zip(got, both(MEAN, COVARIANCE), strict=True):
        present = one[order] if one.ndim == 1 else one[order[:, None], order]
        np.testing.assert_allclose(present, other, atol=1e-4)
        np.testing.assert_array_equal(one[1], 0)
    means = jnp.stack([MEAN, MEAN[::-1]])[:, None]
    batch = predict.class_probabilities(means, covariance=COVARIANCE)
    assert batch.shape == (2, 1, 3)
    np.testing.assert_allclose(
        batch[0, 0], predict.class_probabilities(MEAN, covariance=COVARIANCE)
    )
    half = predict.class_probabilities(
        MEAN.astype(jnp.float16), covariance=jnp.eye(3, dtype=jnp.float16)
    )
    assert half.dtype == jnp.float16


def test_derivatives():
    """Against differences of quadrature; at a diagonal covariance, where eigenvalues meet, too."""
    direction = jnp.array([[0.5, 0.3, -0.4], [0.3, -0.2, 0.1], [-0.4, 0.1, 0.3]])
    thin = jnp.outer(jnp.array([1.0, -1, 0.5]), jnp.array([1.0, -1, 0.5]))

    @jax.jit
    def slopes(covariance):
        def p(s, t):
            return predict.class_probabilities(
                MEAN + s * direction[0], covariance=covariance + t * direction
            )

        return jax.jacfwd(p)(0.0, 0.0), jax.jacfwd(p, argnums=1)(0.0, 0.0)

    def difference(mean, covariance, along):
        s, t = 1e-3 * (1 - along), 1e-3 * along
        ends = [
            of_three_classes(mean + sign * s * direction[0], covariance + sign * t * direction)[0]
            for sign in (1, -1)
        ]
        return (ends[0] - ends[1]) / 2e-3

    for covariance in (COVARIANCE, jnp.diag(jnp.array([1.0, 2.0, 0.5]))):
        for along, slope in enumerate(slopes(covariance)):
            np.testing.assert_allclose(slope, difference(MEAN, covariance, along), atol=1e-3)
    # Where it is singular a root has no derivative.
    along_mean, along_covariance = slopes(thin)
    nearly = thin + 1e-9 * jnp.eye(3)
    np.testing.assert_allclose(along_mean, difference(MEAN, nearly, 0), atol=1e-3)
    assert np.all(np.isnan(along_covariance))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "got neither"),
        ({"variance": 1.0, "covariance": COVARIANCE}, ValueError, "got both"),
        (
            {"variance": 1.0, "method": QuasiMonteCarlo(8)},
            ValueError,
            "`method=Q.*`cov",
        ),
        (
            {"covariance": COVARIANCE, "method": Direct()},
            ValueError,
            "`method=D.*QuasiM",
        ),
        (
            {"covariance": COVARIANCE[:2]},
            ValueError,
            r"`covariance` must have shape",
        ),
        ({"covariance": 1.0}, ValueError, r"`covariance` must have shape"),
        ({"covariance": -COVARIANCE}, ValueError, "`covariance` must be positive semi-definite"),
        (
            {"covariance": COVARIANCE + jnp.eye(3, k=1)},
            ValueError,
            "`covariance` .* symmetric",
        ),
        ({"covariance": COVARIANCE * jnp.nan}, ValueError, "`covariance` must be finite, got nan"),
        ({"covariance": COVARIANCE * 1j}, TypeError, "`covariance` must be a real"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        predict.class_probabilities(MEAN, **arguments)


@pytest.mark.quick
def test_traced_arguments_that_are_wrong_are_nan_alone():
    good = jnp.stack([COVARIANCE] * 4)
    wrong = good.at[0].multiply(-1).at[1, 0, 1].add(1).at[2, 0, 0].set(jnp.inf)
    p = jax.jit(lambda s: predict.class_probabilities(jnp.tile(MEAN, (4, 1)), covariance=s))(wrong)
    assert np.all(np.isnan(p[:3]))
    np.testing.assert_allclose(p[3], predict.class_probabilities(MEAN, covariance=COVARIANCE))
