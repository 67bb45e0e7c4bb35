"""Variational inference for a Gaussian process with a softmax on top.

Prior `z_c ~ N(0, K)`, independent over `C` classes; labels `y` with probabilities `softmax(z_n)`.
The posterior is approximated by `q(z) = prod_c N(m_c, V_c)`,

    m_c = K alpha_c,    V_c = (K^-1 + diag omega_c)^-1,

`omega` being the precisions of Gaussian observations ("sites") that stand for the likelihood.
Softmax ignores a shift common to the classes, so that only the divergence of `q` from the prior
modulo that shift counts: the divergence of the whole less that of the shift given the rest. With
`B_c = I + omega_c^(1/2) K omega_c^(1/2)`, `Omega = sum_c omega_c` and `B_S` that of `Omega / C`,

    bound = sum_n (y_n^T m_n - E[log sum_j exp z_nj]) - KL,
    2 KL  = (1 - 1/C) sum_c tr B_c^-1 - N (C - 1) + sum_c logdet B_c - logdet B_S
            + sum_c alpha_c^T K alpha_c - (sum_c alpha_c)^T K (sum_c alpha_c) / C,

a lower bound of `log p(y)`. Its expectations are exact (`log_normalizer`), with gradients `p` and
`lambda / 2`. By `dV = -V diag(d omega) V` it is stationary where

    e := y - p - alpha = 0,
    D_c := H_c (lambda_c - (1 - 1/C) omega_c) - (v_c - v_S) / C = 0,    H_c = V_c o V_c,

`v` the diagonals of `V`, `V_S` that of `Omega / C`; `dbound / d omega = D / 2`. The steps are
`(Id + omega_c K)^-1 e_c`, Newton's with `diag omega` for the curvature, and `H_c^-1 D_c`, which is
the natural gradient's: both ascend, and a step that does not is taken back and shortened.

What is computed of `K` and `V` stands in `priors`: all `N x N` entries, or what `M` inducing inputs
say of them, and a rest of the logits that keeps its prior variance. The classes are taken one after
the other, twice an iteration, so that memory is a few `N x N` or `M x N` arrays.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from taylor_softmax._probabilities.log_normalizer import (
    expected_log_normalizer,
    log_normalizer,
)
from taylor_softmax._probabilities.priors import Prior

# Smallest p (1 - p) that a site stands for.
_LEAST_CURVATURE = 1e-13
# Steps of conjugate gradients for H^-1 D. H is nearly singular where inputs are alike, and there D
# nearly vanishes too: a few find what matters.
_GRADIENTS = 8
# A precision below this share of its curvature is near 0, where some have their optimum.
_NEAR_0 = 0.05
_SHORTER, _LONGER, _SHORTEST = 0.35, 1.6, 1e-5


class Sites(NamedTuple):
    """What determines `q` given a kernel, both `(N, C)`: `m = K alpha`, precisions `omega`."""

    alpha: Array
    precision: Array


class Fit(NamedTuple):
    """Where an optimisation ended.

    Attributes:
      sites: those of the largest bound.
      log_evidence: the bound, in nats.
      residual: the largest of `|y - p - alpha|`, and of `|omega D|`, what a change of `log omega`
        would do to twice the bound.
      iterations: how often the bound was evaluated.
      history: bound and residual after each, `(max_iterations, 2)`; NaN after the last.
    """

    sites: Sites
    log_evidence: Array
    residual: Array
    iterations: Array
    history: Array


class _Marginals(NamedTuple):
    """Of `q`, `(N, C)`; and of the posterior of the mean over classes, `(N,)`."""

    mean: Array
    variance: Array
    shared: Array


class _Search(NamedTuple):
    sites: Sites
    direction: Sites
    bound: Array
    residual: Array
    step: Array
    iterations: Array
    history: Array


def _divergence_terms(prior: Prior, precision: Array) -> tuple[Array, Array]:
    """Diagonal of `V`, and `logdet B`, of one class."""
    given = prior.given(precision)
    # Below eps of the prior's, rounding is all that is left.
    least = jnp.finfo(precision.dtype).eps * prior.variance
    return jnp.maximum(given.variance(), least), given.logdet()


def _divergence(prior: Prior, sites: Sites) -> tuple[Array, _Marginals]:
    """The divergence of `q` from the prior, modulo shifts, and the marginals of `q`."""
    n, n_classes = sites.precision.shape
    total = jnp.sum(sites.precision, axis=1)
    each = jnp.concatenate([sites.precision.T, total[None] / n_classes])
    # Rematerialised: in the backward pass, too, one class at a time.
    terms = jax.checkpoint(functools.partial(_divergence_terms, prior))
    variances, logdets = lax.map(terms, each)
    variance = variances[:-1].T
    mean = prior.times(sites.alpha)
    shift = jnp.sum(sites.alpha, axis=1)
    traces = n * n_classes - jnp.sum(sites.precision * variance)
    squares = jnp.sum(sites.alpha * mean) - jnp.sum(shift * jnp.sum(mean, axis=1)) / n_classes
    twice = (1 - 1 / n_classes) * traces - n * (n_classes - 1) + squares
    twice = twice + jnp.sum(logdets[:-1]) - logdets[-1]
    return twice / 2, _Marginals(mean, variance, variances[-1])


def bound(prior: Prior, y: Array, sites: Sites) -> Array:
    """The bound at given sites; differentiable in the prior and in the sites."""
    divergence, q = _divergence(prior, sites)
    variance = q.variance + prior.rest[:, None]
    likelihoods = jnp.sum(y * q.mean, axis=1) - expected_log_normalizer(q.mean, variance)
    return jnp.sum(likelihoods) - divergence


def _ascent(
    prior: Prior, sites: Sites, gradient: Array, curvature: Array, q: _Marginals
) -> tuple[Sites, Array]:
    """The direction at `sites`, in `alpha` and `log omega`; and the largest `|omega D|`.

    Args:
      gradient: `y - p - alpha`.
      curvature: `lambda`.
    """
    n_classes = gradient.shape[1]

    def of_class(each: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        e, omega, rate, v = each
        given = prior.given(omega)
        step = given.damped(e)
        squares = given.squares()
        slope = squares(rate - (1 - 1 / n_classes) * omega)
        slope = slope - (v - q.shared) / n_classes
        # Precisions that the bound wants at 0 move by themselves, so that none holds up the others.
        bound_to_0 = (slope < 0) & (omega < _NEAR_0 * rate)
        scale = jnp.maximum(squares(jnp.ones_like(omega)), jnp.finfo(omega.dtype).tiny)
        change = _conjugate_gradients(squares, scale, slope, ~bound_to_0)
        change = jnp.where(bound_to_0, slope / scale, change)
        return step, change, slope * jnp.where(slope < 0, jnp.minimum(omega, rate), rate)

    columns = (gradient.T, sites.precision.T, curvature.T, q.variance.T)
    alpha, change, slope = (x.T for x in lax.map(of_class, columns))
    # Gradients sum to 0 over the classes, as alpha does.
    alpha = alpha - jnp.mean(alpha, axis=1, keepdims=True)
    return Sites(alpha, change), jnp.max(jnp.abs(slope))


def _conjugate_gradients(
    squares: Callable[[Array], Array], scale: Array, target: Array, free: Array
) -> Array:
    """A few steps towards `squares^-1 target` in the `free` entries, from 0; `scale` preconditions.

    Every iterate ascends: its product with `target` is positive.
    """

    def step(_: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
        x, rest, direction, energy = state
        image = jnp.where(free, squares(direction), 0)
        length = jnp.sum(direction * image)
        # What is left of less is rounding, which has parts that a singular matrix takes to 0.
        going = (length > 0) & (energy > enough)
        rate = jnp.where(going, energy / jnp.where(going, length, 1), 0)
        x, rest = x + rate * direction, rest - rate * image
        scaled = rest / scale
        new = jnp.sum(rest * scaled)
        ratio = jnp.where(energy > 0, new / jnp.where(energy > 0, energy, 1), 0)
        return x, rest, scaled + ratio * direction, new

    target = jnp.where(free, target, 0)
    first = target / scale
    start = jnp.zeros_like(target), target, first, jnp.sum(target * first)
    enough = jnp.finfo(target.dtype).eps * start[-1]
    return lax.fori_loop(0, _GRADIENTS, step, start)[0]


def initial_sites(y: Array) -> Sites:
    """`alpha = 0`, and precisions as at equal probabilities."""
    n_classes = y.shape[1]
    curvature = jnp.full_like(y, (1 - 1 / n_classes) / n_classes)
    return Sites(jnp.zeros_like(y), curvature / max(1 - 1 / n_classes, 0.5))


@jax.jit
def carried_over(prior: Prior, before: Prior, sites: Sites) -> Sites:
    """Where to start from with another prior: observations that stand for the likelihood stay.

    They are of precision `omega` and value `m + alpha / omega`, and the posterior given them has

        alpha' = (K' + diag omega^-1)^-1 (m + alpha / omega)
               = (Id + diag(omega) K')^-1 (omega m + alpha),

    where nothing is divided. With `alpha` itself kept, a kernel that is larger makes the means too
    large by as much.
    """

    def of_class(each: tuple[Array, ...]) -> Array:
        alpha, omega, mean = each
        return prior.given(omega).damped(omega * mean + alpha)

    columns = (sites.alpha.T, sites.precision.T, before.times(sites.alpha).T)
    alpha = lax.map(of_class, columns).T
    return Sites(alpha - jnp.mean(alpha, axis=1, keepdims=True), sites.precision)


def _evaluate(
    prior: Prior, y: Array, sites: Sites
) -> tuple[Array, Callable[[], tuple[Sites, Array]]]:
    """The bound at `sites`; and what computes direction and residual there, if they are wanted."""
    divergence, q = _divergence(prior, sites)
    expected = log_normalizer(q.mean, q.variance + prior.rest[:, None])
    value = jnp.sum(jnp.sum(y * q.mean, axis=1) - expected.value) - divergence
    gradient = y - expected.mean - sites.alpha

    def ascent() -> tuple[Sites, Array]:
        curvature = jnp.maximum(expected.curvature, _LEAST_CURVATURE)
        direction, slope = _ascent(prior, sites, gradient, curvature, q)
        return direction, jnp.maximum(jnp.max(jnp.abs(gradient)), slope)

    return value, ascent


def _begin(start: Sites, damping: ArrayLike, max_iterations: int) -> _Search:
    """Before the first evaluation: any bound is better, and the direction is none."""
    zero = jnp.zeros((), start.alpha.dtype)
    return _Search(
        start,
        jax.tree.map(jnp.zeros_like, start),
        zero - jnp.inf,
        zero + jnp.inf,
        zero + damping,
        jnp.zeros((), int),
        jnp.full((max_iterations, 2), jnp.nan, zero.dtype),
    )


@functools.partial(jax.jit, static_argnames=("max_iterations", "report"))
def fit(
    prior: Prior,
    y: Array,
    start: Sites,
    *,
    tol: ArrayLike,
    max_iterations: int,
    damping: ArrayLike,
    report: Callable[..., None] | None = None,
) -> Fit:
    """Maximises the bound over the sites.

    Args:
      y: one-hot or soft labels, `(N, C)`.
      tol: of the residual.
      damping: the longest step, in (0, 1].
      report: called with iteration, bound and residual.
    """
    size = jnp.asarray(y.size, y.dtype)
    slack = 10 * jnp.finfo(y.dtype).eps * size

    def advance(state: _Search) -> _Search:
        step = state.step
        sites = Sites(
            state.sites.alpha + step * state.direction.alpha,
            jnp.maximum(state.sites.precision + step * state.direction.precision, _LEAST_CURVATURE),
        )
        value, ascent = _evaluate(prior, y, sites)
        better = value >= state.bound - slack * (1 + jnp.abs(state.bound) / size)
        direction, residual = lax.cond(better, ascent, lambda: (state.direction, state.residual))
        step = jnp.where(better, jnp.minimum(step * _LONGER, damping), step * _SHORTER)
        value = jnp.where(better, value, state.bound)
        sites = jax.tree.map(lambda new, old: jnp.where(better, new, old), sites, state.sites)
        row = jnp.stack([value, residual])
        if report is not None:
            jax.debug.callback(report, state.iterations + 1, value, residual)
        history = state.history.at[state.iterations].set(row)
        return _Search(sites, direction, value, residual, step, state.iterations + 1, history)

    def unfinished(state: _Search) -> Array:
        going = (state.residual > tol) & (state.iterations < max_iterations)
        return going & (state.step > _SHORTEST)

    search = _begin(start, damping, max_iterations)
    end = lax.while_loop(unfinished, advance, search)
    return Fit(end.sites, end.bound, end.residual, end.iterations, end.history)
