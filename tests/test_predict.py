"""Class probabilities of the Gaussian posteriors that neural_tangents returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from taylor_softmax import predict, stax

import neural_tangents as nt  # isort: skip


@pytest.fixture(scope="module")
def ensemble():
    _, _, kernel_fn = stax.serial(stax.Dense(64), stax.Relu(), stax.Dense(3, W_std=2.0))
    x_train, x_test = random.normal(random.key(0), (8, 5)), random.normal(random.key(1), (6, 5))
    y_train = jax.nn.one_hot(jnp.arange(8) % 3, 3) - 1 / 3
    predict_fn = nt.predict.gradient_descent_mse_ensemble(kernel_fn, x_train, y_train)
    return predict_fn, kernel_fn, x_train, y_train, x_test


@pytest.mark.quick(get="nngp")
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


def test_class_posterior_of_classes_that_covary(ensemble):
    """Kernels with `trace_axes=()`: of classes with a covariance of their own, and of none."""
    predict_fn, kernel_fn, x_train, y_train, x_test = ensemble
    classes = jnp.array([[1.0, 0.6, 0.1], [0.6, 1.0, 0.3], [0.1, 0.3, 1.0]])

    def posterior(classes, at):
        full = [
            jnp.einsum("ij,kl->ijkl", kernel_fn(*each, "nngp"), classes)
            for each in ((x_train, None), (at, x_train), (at, None))
        ]
        inference = nt.predict.gp_inference(full[0], y_train, trace_axes=())
        return inference("nngp", full[1], full[2])

    gaussian = posterior(classes, x_test)
    assert gaussian.covariance.shape == (6, 6, 3, 3)
    got = predict.class_posterior(gaussian)
    want = predict.class_probabilities(
        gaussian.mean, covariance=jnp.einsum("iikl->ikl", gaussian.covariance)
    )
    np.testing.assert_allclose(got.probabilities, want, atol=1e-12)
    independent = predict.class_posterior(posterior(jnp.eye(3), x_test))
    same = predict.class_posterior(predict_fn(x_test=x_test, get="nngp", compute_cov=True))
    np.testing.assert_allclose(independent.probabilities, same.probabilities, atol=1e-8)
    assert np.max(np.abs(got.probabilities - same.probabilities)) > 1e-3
    # At training points covariances are rounding errors, of either sign.
    certain = predict.class_posterior(posterior(classes, x_train)).probabilities
    np.testing.assert_allclose(certain, jax.nn.softmax(y_train), atol=1e-5)


@pytest.mark.quick
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
        gaussian._replace(covariance=jnp.ones((6, 6, 3, 2))),
        gaussian._replace(mean=jnp.ones(6)),
    ):
        with pytest.raises(ValueError, match=r"`gaussian`.*\(\.\.\., N, N\)"):
            predict.class_posterior(wrong)
    with pytest.raises(ValueError, match="`order`"):
        predict.class_posterior(gaussian, order=5)
