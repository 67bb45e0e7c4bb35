"""Least squares on labels: Gaussian processes through targets, seen through Gaussian noise.

Targets `t = y - 1/C` of one-hot labels `y`, logits `z_c ~ N(0, K)`, and `t_c = z_c + noise` of
variance `1 / omega`. The posterior is that of `inference` with the targets for observations,

    alpha = (K + Id / omega)^-1 t,    V = (K^-1 + omega Id)^-1,

and the evidence is the density of the targets, in the notation of `priors`

    log p(t_c) = -(t_c^T alpha_c + logdet B - N log omega + N log 2 pi + omega sum(rest)) / 2,

where the last term makes a bound of it (Titsias 2009) with inducing inputs. How sure of itself the
softmax of the posterior is depends on the unit of the targets, about which the evidence says
nothing: another unit scales the logits. Without observation `n` its logits are `N(u_n, v_n)`,

    1 / v_n = 1 / V_nn - omega,    u_n = v_n (m_n / V_nn - omega t_n)

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
from taylor_softmax._probabilities.priors import Prior

# Standard deviation of the noise, of labels 0 and 1. Less noise fits as well, and is harder to
# compute with; the kernel's scale, which is chosen by the evidence, is relative to it.
_NOISE = 0.1
# Of the logits' scale: the largest makes the largest standard deviation this one, beyond which
# class probabilities hardly change; the least is smaller by the second factor; how exactly it is
# found, in its logarithm.
_LARGEST, _SMALLER, _EXACTLY = 100.0, 1e-5, 1e-2


def _targets(y: Array) -> Array:
    """Of one-hot labels `(N, C)`."""
    return y - 1 / y.shape[1]


def log_evidence(prior: Prior, y: Array) -> tuple[Array, Sites]:
    """The log density of the targets, in nats, differentiable; and the posterior.

    Args:
      y: one-hot labels, `(N, C)`.
    """
    n, n_classes = y.shape
    t, omega = _targets(y), jnp.full(n, 1 / _NOISE**2, y.dtype)
    given = prior.given(omega)
    alpha = jax.vmap(given.damped, 1, 1)(omega[:, None] * t)
    of_each = given.logdet() - jnp.sum(jnp.log(omega / (2 * jnp.pi))) + jnp.sum(omega * prior.rest)
    precision = jnp.broadcast_to(omega[:, None], y.shape)
    return -(jnp.sum(t * alpha) + n_classes * of_each) / 2, Sites(alpha, precision)


def posterior(
    k_train_train: KernelLike | InducingKernels, labels: ArrayLike, n_classes: int
) -> CategoricalPosterior:
    """What `categorical_inference` returns, with targets for observations: without iterations."""
    prior, y, get = read_observations(k_train_train, labels, n_classes)
    value, sites = _log_evidence(prior, y)
    history = np.array([[value, 0.0]])
    return CategoricalPosterior(
        value, sites.alpha, sites.precision, True, 1, 0.0, history, prior, get
    )


_log_evidence = jax.jit(log_evidence)


@jax.jit
def _without_each(prior: Prior, y: Array, sites: Sites) -> tuple[Array, Array]:
    """Means and variances of the logits of each input given the others, `(N, C)` and `(N, 1)`."""
    omega = sites.precision[:, :1]
    variance = prior.given(omega[:, 0]).variance()[:, None]
    # Of a variance equal to that of the noise, the others say nothing.
    rest = jnp.maximum(1 - omega * variance, jnp.finfo(variance.dtype).eps)
    mean = (prior.times(sites.alpha) - omega * variance * _targets(y)) / rest
    return mean, variance / rest + prior.rest[:, None]


def scale(posterior: CategoricalPosterior, y: Array) -> float:
    """Of the logits: what makes the labels likeliest, each given the others."""
    sites = Sites(posterior.alpha, posterior.site_precision)
    mean, variance = _without_each(posterior.prior, y, sites)

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
