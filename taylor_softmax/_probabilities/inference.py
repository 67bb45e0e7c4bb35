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
the natural gradient's: both ascend, and a step that does not is taken back and shortened. How long
a step is follows from the slopes at the ends of the last one (Barzilai & Borwein 1988).

What is computed of `K` and `V` stands in `priors`: all `N x N` entries, or what `M` inducing inputs
say of them, and a rest of the logits that keeps its prior variance. The classes are taken one after
the other, twice an iteration, so that memory is a few `N x N` or `M x N` arrays.

The labels of an input may sum to 0: then its likelihood is 1. Such inputs, of variance 0, change
nothing, and fill up a kernel to a size for which everything is compiled (`priors.padded_size`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from taylor_softmax._numerics.arguments import known, namespace
from taylor_softmax._probabilities.log_normalizer import LogNormalizer, log_normalizer
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
    """An optimisation: where it is, or where it has ended.

    Attributes:
      sites: those of the largest bound.
      expected: `E[log sum_j exp z_nj]` at each input, with its derivatives, there.
      log_evidence: the bound, in nats.
      residual: the largest of `|y - p - alpha|`, and of `|omega D|`, what a change of `log omega`
        would do to twice the bound.
      iterations: how often the bound was evaluated.
      direction: in which `alpha` and `omega` go next.
      step: how far.
      slope: of the bound along `direction`.
    """

    sites: Sites
    expected: LogNormalizer
    log_evidence: Any
    residual: Any
    iterations: Any
    direction: Sites
    step: Any
    slope: Any


class _Marginals(NamedTuple):
    """Of `q`, `(N, C)`; and of the posterior of the mean over classes, `(N,)`.

    Attributes:
      variance: of the part of the logits that the prior resolves.
      whole: with the rest.
    """

    mean: Array
    variance: Array
    whole: Array
    shared: Array


def _divergence_terms(prior: Prior, precision: Array) -> tuple[Array, Array]:
    """Diagonal of `V`, and `logdet B`, of one class."""
    given = prior.given(precision)
    # Below eps of the prior's, rounding is all that is left.
    least = jnp.finfo(precision.dtype).eps * prior.variance
    return jnp.maximum(given.variance(), least), given.logdet()


def _gain(prior: Prior, y: Array, sites: Sites) -> tuple[Array, _Marginals]:
    """The bound without the expectations of `log_normalizer`, and the marginals of `q`.

    The divergence is that from the prior modulo shifts, in which `tr B^-1 = N - sum(omega v)`.
    """
    n_classes = sites.precision.shape[1]
    total = jnp.sum(sites.precision, axis=1)
    each = jnp.concatenate([sites.precision.T, total[None] / n_classes])
    variances, logdets = lax.map(functools.partial(_divergence_terms, prior), each)
    variance = variances[:-1].T
    mean = prior.times(sites.alpha)
    shift = jnp.sum(sites.alpha, axis=1)
    squares = jnp.sum(sites.alpha * mean) - jnp.sum(shift * jnp.sum(mean, axis=1)) / n_classes
    twice = squares - (1 - 1 / n_classes) * jnp.sum(sites.precision * variance)
    twice = twice + jnp.sum(logdets[:-1]) - logdets[-1]
    whole = variance + prior.rest[:, None]
    return jnp.sum(y * mean) - twice / 2, _Marginals(mean, variance, whole, variances[-1])


@jax.jit
def _ascent(
    prior: Prior, y: Array, sites: Sites, expected: LogNormalizer, q: _Marginals, before: Sites
) -> tuple[Sites, Array, Array, Array]:
    """The direction at `sites`, in `alpha` and `omega`; and the residual there.

    Then the slopes of the bound: along the direction `before`, and along the new one.
    """
    n_classes = y.shape[1]
    mass = jnp.sum(y, axis=1, keepdims=True)
    gradient = y - mass * expected.mean - sites.alpha
    curvature = jnp.maximum(mass * expected.curvature, _LEAST_CURVATURE)

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
        return step, change, slope

    columns = (gradient.T, sites.precision.T, curvature.T, q.variance.T)
    alpha, change, slope = (x.T for x in lax.map(of_class, columns))
    # Gradients sum to 0 over the classes, as alpha does.
    direction = Sites(alpha - jnp.mean(alpha, axis=1, keepdims=True), change)
    at_most = jnp.where(slope < 0, jnp.minimum(sites.precision, curvature), curvature)
    residual = jnp.maximum(jnp.max(jnp.abs(gradient)), jnp.max(jnp.abs(slope * at_most)))
    in_alpha = prior.times(gradient)
    along = [
        jnp.sum(in_alpha * each.alpha) + jnp.sum(slope * each.precision) / 2
        for each in (before, direction)
    ]
    # The new direction ascends; below eps its slope is rounding.
    return direction, residual, along[0], jnp.maximum(along[1], jnp.finfo(y.dtype).eps)


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
    precision = (1 - 1 / n_classes) / n_classes / max(1 - 1 / n_classes, 0.5)
    zeros: Any = np.zeros(y.shape, y.dtype)
    return Sites(zeros, zeros + zeros.dtype.type(precision))


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


@jax.jit
def _trial(
    prior: Prior, y: Array, sites: Sites, direction: Sites, step: ArrayLike
) -> tuple[Sites, Array, _Marginals]:
    """Sites a step ahead, and what `_gain` says of them."""
    precision = jnp.maximum(sites.precision + step * direction.precision, _LEAST_CURVATURE)
    sites = Sites(sites.alpha + step * direction.alpha, precision)
    return sites, *_gain(prior, y, sites)


def fit(
    prior: Prior,
    y: Array,
    start: Sites,
    *,
    tol: ArrayLike,
    max_iterations: int,
    damping: Any,
    report: Callable[[int, float, float], None] | None = None,
) -> Fit:
    """Maximises the bound over the sites.

    Where numbers are known the loop is Python's: each of its functions is compiled for itself, and
    the expectations for any number of inputs.

    Args:
      y: one-hot or soft labels, `(N, C)`.
      tol: of the residual.
      damping: the longest step, in (0, 1].
      report: called with iteration, bound and residual; only where numbers are known.
    """
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((prior, y, start, tol, damping))):
        return _fit_traced(prior, y, start, tol, max_iterations, damping)
    unfinished, advance = _steps(prior, y, tol, max_iterations, damping)
    at = _begin(start, damping)
    while unfinished(at):
        at = advance(at)
        if report is not None:
            report(int(at.iterations), float(at.log_evidence), float(at.residual))
    return at


@functools.partial(jax.jit, static_argnums=4)
def _fit_traced(
    prior: Prior, y: Array, start: Sites, tol: ArrayLike, max_iterations: int, damping: Any
) -> Fit:
    return lax.while_loop(*_steps(prior, y, tol, max_iterations, damping), _begin(start, damping))


def _begin(start: Sites, damping: Any) -> Fit:
    """Before the first evaluation: any bound is better, and the direction is none."""
    zeros: Any = np.zeros(start.alpha.shape, start.alpha.dtype)
    number = zeros.dtype.type
    expected = LogNormalizer(zeros[:, 0], zeros, zeros)
    least, largest = number(-np.inf), number(np.inf)
    step = known(damping).astype(zeros.dtype)
    return Fit(start, expected, least, largest, 0, Sites(zeros, zeros), step, number(1))


def _steps(
    prior: Prior, y: Array, tol: ArrayLike, max_iterations: int, damping: Any
) -> tuple[Callable[[Fit], Any], Callable[[Fit], Fit]]:
    """Whether a search goes on, and its next step: of numbers that are known, or in a graph."""
    weight = known(y).sum(axis=1)
    size = weight.sum() * y.shape[1]

    def unfinished(at: Fit) -> Any:
        going = (at.residual > tol) & (at.iterations < max_iterations)
        return going & (at.step > _SHORTEST)

    def advance(at: Fit) -> Fit:
        sites, gain, q = _trial(prior, y, at.sites, at.direction, at.step)
        expected = log_normalizer(q.mean, q.whole)
        value = known(gain) - (weight * known(expected.value)).sum()

        def accept() -> Fit:
            direction, residual, end, slope = _ascent(prior, y, sites, expected, q, at.direction)
            # To where the slope along the last direction was 0, if the bound were quadratic. Where
            # classes compete, curvatures are up to twice `diag omega`, so that a step of 1 jumps
            # from one side of the optimum to the other, by changes that the bound's rounding hides.
            slower = namespace(value).maximum(at.slope - known(end), at.slope / _LONGER)
            step = at.step * at.slope / slower
            step = namespace(value).clip(step, at.step * _SHORTER, damping).astype(y.dtype)
            found = known(residual), at.iterations, direction, step, known(slope)
            return Fit(sites, expected, value, *found)

        def shorten() -> Fit:
            return at._replace(step=at.step * _SHORTER)

        slack = 10 * float(jnp.finfo(y.dtype).eps) * (size + abs(at.log_evidence))
        better = value >= at.log_evidence - slack
        if isinstance(better, Tracer):
            after = lax.cond(better, accept, shorten)
        else:
            after = accept() if better else shorten()
        return after._replace(iterations=at.iterations + 1)

    return unfinished, advance


@jax.jit
def _slope(prior: Prior, y: Array, sites: Sites, expected: LogNormalizer) -> Prior:
    """Of the bound in the prior, at given sites. It takes one Cholesky factor a class."""
    n_classes = y.shape[1]
    mass = jnp.sum(y, axis=1, keepdims=True)
    in_whole = -mass * expected.curvature / 2
    in_variance = in_whole + (1 - 1 / n_classes) / 2 * sites.precision

    def means_and_rest(prior: Prior) -> Array:
        mean = prior.times(sites.alpha)
        centred = sites.alpha - jnp.mean(sites.alpha, axis=1, keepdims=True)
        of_mean = (y - mass * expected.mean) - centred / 2
        return jnp.sum(of_mean * mean) + jnp.sum(in_whole * prior.rest[:, None])

    def add(total: Prior, of_class: tuple[Any, ...]) -> tuple[Prior, None]:
        precision, in_variance, in_logdet = of_class
        slope = prior.given(precision).slope(in_variance, in_logdet)
        return jax.tree.map(jnp.add, total, slope), None

    # The last is the posterior of the mean over classes, of which logdet alone counts.
    shared = jnp.sum(sites.precision, axis=1) / n_classes
    precisions = jnp.concatenate([sites.precision.T, shared[None]])
    in_variances = jnp.concatenate([in_variance.T, jnp.zeros_like(shared)[None]])
    in_logdets = np.array([-0.5] * n_classes + [0.5], y.dtype)
    start = jax.grad(means_and_rest)(prior)
    return lax.scan(add, start, (precisions, in_variances, in_logdets))[0]


def slope(prior: Prior, y: Array, sites: Sites) -> Any:
    """Of the bound in the prior, at sites of its optimum, which can be held fixed there."""
    still = jax.tree.map(np.zeros_like, sites)
    _, _, q = _trial(prior, y, sites, still, y.dtype.type(0))
    return _slope(prior, y, sites, log_normalizer(q.mean, q.whole))


@jax.custom_jvp
def evidence(prior: Prior, y: Array, fit: Fit) -> Array:
    """The bound that a fit of `prior` and `y` has reached; NaN where none is finite.

    It has first derivatives in both: at the optimum the sites can be held fixed.
    """
    del prior, y
    value = jnp.asarray(fit.log_evidence)
    return jnp.where(jnp.isfinite(value), value, jnp.nan)


@evidence.defjvp
def _evidence_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    prior, y, fit = primals
    slope = _slope(prior, y, fit.sites, fit.expected)
    along = sum(jnp.sum(a * b) for a, b in zip(slope, tangents[0], strict=True))
    in_labels = prior.times(fit.sites.alpha) - fit.expected.value[:, None]
    return evidence(*primals), along + jnp.sum(in_labels * tangents[1])
