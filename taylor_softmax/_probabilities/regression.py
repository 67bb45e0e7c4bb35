"""Least squares on labels: Gaussian processes through targets, seen through Gaussian noise.

Targets `t = y - 1/C` of one-hot labels `y` are logits `z_c ~ N(0, K)` in some unit, with noise of
variance `1 / omega`. A shift common to the classes does not count, so that they have `C - 1`
dimensions. With `S = K + Id / omega`, the density of the targets in the unit `u` is, in the
notation of `priors`,

    2 log p(t) = -sum_c t_c^T S^-1 t_c / u^2
                 - (C - 1) (logdet S + N log(2 pi u^2) + omega sum(rest)),

where `omega sum(rest)` makes a bound of it (Titsias 2009) with inducing inputs. Unit and noise are
those of the largest density: `u^2 = sum_c t_c^T S^-1 t_c / (N (C - 1))`, and the noise is searched
for in the spectrum of `K`. So a factor of the kernel changes nothing. The posterior is that of
`inference` with the targets for observations,

    alpha = S^-1 t / u,    V = (K^-1 + omega Id)^-1.

How sure of itself the softmax of the posterior is depends on the unit of the logits, about which
the density says nothing. Without observation `n` its logits are `N(m_n - v_n alpha_n, v_n)`, where

    1 / v_n = 1 / V_nn - omega

(Rasmussen & Williams 2006, section 5.4.2), and `scale` is the one of the largest leave-one-out
likelihood.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax import Array
from jax.typing import ArrayLike

from taylor_softmax._numerics.surrogate import Exponential
from taylor_softmax._probabilities.arguments import InducingKernels, KernelLike, read_observations
from taylor_softmax._probabilities.inference import Sites
from taylor_softmax._probabilities.moments import moments
from taylor_softmax._probabilities.posterior import CategoricalPosterior
from taylor_softmax._probabilities.priors import Exact, Prior

# Variance of the noise, in units of the kernel's mean variance. With less than the first, rounding
# in float32 shows; with more than the second, the kernel explains nothing. How exactly it is found,
# in its logarithm: each trial takes no time.
_LEAST_NOISE, _MOST_NOISE, _NOISE_EXACTLY = 1e-3, 1e3, 1e-5
# Of the logits' scale: the largest makes the largest standard deviation this one, beyond which
# class probabilities hardly change; the least is smaller by the second factor; how exactly it is
# found, in its logarithm.
_LARGEST, _SMALLER, _EXACTLY = 100.0, 1e-5, 1e-2


def _targets(y: Array) -> Array:
    """Of one-hot labels `(N, C)`."""
    return y - 1 / y.shape[1]


def _mean_variance(prior: Prior) -> Array:
    """The unit of the noise; 1 for a kernel that is 0."""
    mean = jnp.mean(prior.variance)
    return jnp.where(mean > 0, mean, 1)


def log_evidence(prior: Prior, y: Array, noise: ArrayLike) -> tuple[Array, Sites]:
    """The log density of the targets, in nats, differentiable; and the posterior.

    Args:
      y: one-hot labels, `(N, C)`.
      noise: its variance, in units of the kernel's mean variance.
    """
    n, n_classes = y.shape
    t, omega = _targets(y), jnp.full(n, 1 / (noise * _mean_variance(prior)), y.dtype)
    given = prior.given(omega)
    weights = jax.vmap(given.damped, 1, 1)(omega[:, None] * t)
    squared_unit = jnp.sum(t * weights) / (n * (n_classes - 1))
    of_each = n + given.logdet() + jnp.sum(jnp.log(2 * jnp.pi * squared_unit / omega))
    of_each = of_each + jnp.sum(omega * prior.rest)
    sites = Sites(weights / jnp.sqrt(squared_unit), jnp.broadcast_to(omega[:, None], y.shape))
    return -(n_classes - 1) * of_each / 2, sites


@jax.jit
def _spectrum(prior: Prior, t: Array) -> tuple[Array, Array]:
    """Eigenvalues of the kernel, and squares of targets `(N, C)` along its eigenvectors."""
    if isinstance(prior, Exact):
        values, vectors = jnp.linalg.eigh(prior.kernel)
        along = vectors.T @ t
        return jnp.maximum(values, 0), jnp.sum(along**2, axis=1)
    # `Phi^T Phi` has the eigenvalues of `Phi Phi^T`, and all others are 0.
    values, vectors = jnp.linalg.eigh(prior.weights @ prior.weights.T)
    values = jnp.maximum(values, 0)
    along = vectors.T @ (prior.weights @ t)
    least = len(values) * jnp.finfo(values.dtype).eps * jnp.max(values)
    some = values > least
    squares = jnp.sum(along**2, axis=1) / jnp.where(some, values, 1)
    return values, jnp.where(some, squares, 0)


def likeliest_noise(prior: Prior, y: Array) -> float:
    """The noise of the largest evidence, as `log_evidence` takes it."""
    t, unit = _targets(y), float(_mean_variance(prior))
    values, squares = (np.asarray(x, float) for x in _spectrum(prior, t))
    values, rest = values / unit, float(jnp.sum(prior.rest)) / unit
    of_all = float(jnp.sum(t**2))

    def loss(logarithm: float) -> float:
        noise = np.exp(logarithm)
        quadratic = (of_all - np.sum(squares * values / (values + noise))) / noise
        logdet = np.sum(np.log1p(values / noise)) + len(t) * logarithm
        return len(t) * np.log(quadratic) + logdet + rest / noise

    found = scipy.optimize.minimize_scalar(
        loss,
        bounds=(np.log(_LEAST_NOISE), np.log(_MOST_NOISE)),
        method="bounded",
        options={"xatol": _NOISE_EXACTLY},
    )
    return float(np.exp(found.x))


def posterior(
    k_train_train: KernelLike | InducingKernels, labels: ArrayLike, n_classes: int
) -> CategoricalPosterior:
    """What `categorical_inference` returns, with targets for observations: without iterations."""
    prior, y, get = read_observations(k_train_train, labels, n_classes)
    value, sites = _log_evidence(prior, y, likeliest_noise(prior, y))
    history = np.array([[value, 0.0]])
    return CategoricalPosterior(
        value, sites.alpha, sites.precision, True, 1, 0.0, history, prior, get
    )


_log_evidence = jax.jit(log_evidence)


def slope(posterior: CategoricalPosterior, y: Array) -> Array:
    """Of the evidence, in the kernel. The noise is at its optimum, and can be held fixed."""
    noise = 1 / (posterior.site_precision[0, 0] * _mean_variance(posterior.prior))
    return _slope(posterior.prior, y, noise).kernel


_slope = jax.jit(jax.grad(lambda prior, y, noise: log_evidence(prior, y, noise)[0]))


@jax.jit
def _without_each(prior: Prior, sites: Sites) -> tuple[Array, Array]:
    """Means and variances of the logits of each input given the others, `(N, C)` and `(N, 1)`."""
    omega = sites.precision[:, :1]
    variance = prior.given(omega[:, 0]).variance()[:, None]
    # Of a variance equal to that of the noise, the others say nothing.
    rest = jnp.maximum(1 - omega * variance, jnp.finfo(variance.dtype).eps)
    mean = prior.times(sites.alpha) - variance / rest * sites.alpha
    return mean, variance / rest + prior.rest[:, None]


def scale(posterior: CategoricalPosterior, y: Array) -> float:
    """Of the logits: what makes the labels likeliest, each given the others."""
    sites = Sites(posterior.alpha, posterior.site_precision)
    mean, variance = _without_each(posterior.prior, sites)

    def loss(logarithm: float) -> float:
        by = np.exp(logarithm).astype(mean.dtype)
        p = moments(by * mean, jnp.broadcast_to(by**2 * variance, mean.shape), Exponential(), False)
        likelihoods = np.sum(np.asarray(p.mean) * np.asarray(y), axis=1)
        return -float(np.mean(np.log(np.maximum(likelihoods, np.finfo(likelihoods.dtype).tiny))))

    largest = np.log(_LARGEST / np.sqrt(np.max(np.asarray(variance))))
    bounds = largest + np.log(_SMALLER), largest
    found = scipy.optimize.minimize_scalar(
        loss, bounds=bounds, method="bounded", options={"xatol": _EXACTLY}
    )
    return float(np.exp(found.x))
