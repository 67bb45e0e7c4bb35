"""Least squares on labels: Gaussian process regression on targets with Gaussian noise.

The targets `t = y - 1/C` of one-hot labels `y` are logits `z_c ~ N(0, K)` in a unit `u`, with noise
of variance `1 / omega`. A shift common to the classes does not count, so the targets have `C - 1`
dimensions. With `S = K + Id / omega` and in the notation of `priors`, their density is

    2 log p(t) = -sum_c t_c^T S^-1 t_c / u^2
                 - (C - 1) (logdet S + N log(2 pi u^2) + omega sum(rest)),

With inducing inputs `omega sum(rest)` makes it a lower bound (Titsias 2009). Unit and noise
maximise the density: `u^2 = sum_c t_c^T S^-1 t_c / (N (C - 1))`, and the noise is searched for in
the spectrum of `K`. So a factor of the kernel changes nothing. The posterior is that of `inference`
with the targets as observations,

    alpha = S^-1 t / u,    V = (K^-1 + omega Id)^-1.

How confident the softmax of the posterior is depends on the unit of the logits, about which the
density says nothing. `scale` chooses it by the leave-one-out likelihood. Given all observations but
`n`, the logits of input `n` are `N(m_n - v_n alpha_n, v_n)` with

    1 / v_n = 1 / V_nn - omega

(Rasmussen & Williams 2006, section 5.4.2).
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

# Least and largest variance of the noise, in units of the kernel's mean variance. With less noise
# the rounding of float32 shows; with more the kernel explains nothing.
_LEAST_NOISE, _LARGEST_NOISE = 1e-3, 1e3
# Tolerance of its logarithm. A trial takes hardly any time.
_NOISE_TOLERANCE = 1e-5
# The largest scale makes the largest standard deviation of the logits this large. Class
# probabilities hardly change beyond it. The least scale is that times the second number.
_LARGEST_DEVIATION, _LEAST_SCALE = 100.0, 1e-5
# Tolerance of the logarithm of the scale.
_SCALE_TOLERANCE = 1e-2


def _targets(y: Array) -> Array:
    """The targets of one-hot labels, both `(N, C)`."""
    return y - 1 / y.shape[1]


def _mean_variance(prior: Prior) -> Array:
    """The mean variance of the prior, the unit of the noise; 1 if the kernel is 0."""
    mean = jnp.mean(prior.variance)
    return jnp.where(mean > 0, mean, 1)


def log_evidence(prior: Prior, y: Array, noise: ArrayLike) -> tuple[Array, Sites]:
    """The log density of the targets, in nats, and the posterior; both are differentiable.

    Args:
      y: one-hot labels, `(N, C)`.
      noise: variance of the noise, in units of the kernel's mean variance.
    """
    n, n_classes = y.shape
    t, omega = _targets(y), jnp.full(n, 1 / (noise * _mean_variance(prior)), y.dtype)
    given = prior.given(omega)
    weights = jax.vmap(given.damped, 1, 1)(omega[:, None] * t)
    squared_unit = jnp.sum(t * weights) / (n * (n_classes - 1))
    # Minus twice the log density of each of the dimensions of the targets.
    loss = n + given.logdet() + jnp.sum(jnp.log(2 * jnp.pi * squared_unit / omega))
    loss = loss + jnp.sum(omega * prior.rest)
    sites = Sites(weights / jnp.sqrt(squared_unit), jnp.broadcast_to(omega[:, None], y.shape))
    return -(n_classes - 1) * loss / 2, sites


@jax.jit
def _spectrum(prior: Prior, t: Array) -> tuple[Array, Array]:
    """Eigenvalues of the kernel, and squared norms of targets `(N, C)` along its eigenvectors."""
    if isinstance(prior, Exact):
        values, vectors = jnp.linalg.eigh(prior.kernel)
        along = vectors.T @ t
        return jnp.maximum(values, 0), jnp.sum(along**2, axis=1)
    # `Phi^T Phi` has the eigenvalues of `Phi Phi^T`, and all others are 0.
    values, vectors = jnp.linalg.eigh(prior.weights @ prior.weights.T)
    values = jnp.maximum(values, 0)
    along = vectors.T @ (prior.weights @ t)
    rounding = len(values) * jnp.finfo(values.dtype).eps * jnp.max(values)
    nonzero = values > rounding
    squares = jnp.sum(along**2, axis=1) / jnp.where(nonzero, values, 1)
    return values, jnp.where(nonzero, squares, 0)


def likeliest_noise(prior: Prior, y: Array) -> float:
    """The noise of the largest evidence, in the unit that `log_evidence` takes."""
    t, unit = _targets(y), float(_mean_variance(prior))
    values, squares = (np.asarray(x, float) for x in _spectrum(prior, t))
    values, rest = values / unit, float(jnp.sum(prior.rest)) / unit
    sum_of_squares = float(jnp.sum(t**2))

    def loss(logarithm: float) -> float:
        noise = np.exp(logarithm)
        quadratic = (sum_of_squares - np.sum(squares * values / (values + noise))) / noise
        logdet = np.sum(np.log1p(values / noise)) + len(t) * logarithm
        return len(t) * np.log(quadratic) + logdet + rest / noise

    found = scipy.optimize.minimize_scalar(
        loss,
        bounds=(np.log(_LEAST_NOISE), np.log(_LARGEST_NOISE)),
        method="bounded",
        options={"xatol": _NOISE_TOLERANCE},
    )
    return float(np.exp(found.x))


def posterior(
    k_train_train: KernelLike | InducingKernels, labels: ArrayLike, n_classes: int
) -> CategoricalPosterior:
    """As `categorical_inference`, with the targets as observations and without iterations.

    Args:
      k_train_train, labels, n_classes: as in `categorical_inference`.
    """
    prior, y, get = read_observations(k_train_train, labels, n_classes)
    value, sites = _log_evidence(prior, y, likeliest_noise(prior, y))
    history = np.array([[value, 0.0]])
    return CategoricalPosterior(
        value, sites.alpha, sites.precision, True, 1, 0.0, history, prior, get
    )


_log_evidence = jax.jit(log_evidence)


def slope(posterior: CategoricalPosterior, y: Array) -> Array:
    """The slope of the evidence in the kernel. At its optimum the noise can be held fixed."""
    noise = 1 / (posterior.site_precision[0, 0] * _mean_variance(posterior.prior))
    return _slope(posterior.prior, y, noise).kernel


_slope = jax.jit(jax.grad(lambda prior, y, noise: log_evidence(prior, y, noise)[0]))


@jax.jit
def _without_each(prior: Prior, sites: Sites) -> tuple[Array, Array]:
    """Means and variances of the logits of each input given the others, `(N, C)` and `(N, 1)`."""
    omega = sites.precision[:, :1]
    variance = prior.given(omega[:, 0]).variance()[:, None]
    # 0 up to rounding if the other observations say nothing of this input.
    explained = jnp.maximum(1 - omega * variance, jnp.finfo(variance.dtype).eps)
    mean = prior.times(sites.alpha) - variance / explained * sites.alpha
    return mean, variance / explained + prior.rest[:, None]


def scale(posterior: CategoricalPosterior, y: Array) -> float:
    """The factor of the logits that makes labels likeliest, each given all others."""
    sites = Sites(posterior.alpha, posterior.site_precision)
    mean, variance = _without_each(posterior.prior, sites)

    def loss(logarithm: float) -> float:
        factor = np.exp(logarithm).astype(mean.dtype)
        scaled_variance = jnp.broadcast_to(factor**2 * variance, mean.shape)
        p = moments(factor * mean, scaled_variance, Exponential(), False)
        likelihoods = np.sum(np.asarray(p.mean) * np.asarray(y), axis=1)
        return -float(np.mean(np.log(np.maximum(likelihoods, np.finfo(likelihoods.dtype).tiny))))

    largest = np.log(_LARGEST_DEVIATION / np.sqrt(np.max(np.asarray(variance))))
    bounds = largest + np.log(_LEAST_SCALE), largest
    found = scipy.optimize.minimize_scalar(
        loss, bounds=bounds, method="bounded", options={"xatol": _SCALE_TOLERANCE}
    )
    return float(np.exp(found.x))
