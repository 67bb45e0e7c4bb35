"""Variational inference for a Gaussian process with a softmax on top.

The prior is `z_c ~ N(0, K)`, independent over `C` classes. Labels `y` have the probabilities
`softmax(z_n)`. The posterior is approximated by `q(z) = prod_c N(m_c, V_c)` with

    m_c = K alpha_c,    V_c = (K^-1 + diag omega_c)^-1,

where `omega` are the precisions of Gaussian observations ("sites") that stand for the likelihood.
Softmax ignores a shift common to the classes. So only the divergence of `q` from the prior modulo
that shift counts: the whole divergence minus that of the shift given the rest. With
`B_c = I + omega_c^(1/2) K omega_c^(1/2)`, `Omega = sum_c omega_c` and `B_S` that of `Omega / C`,

    bound = sum_n (y_n^T m_n - E[log sum_j exp z_nj]) - KL,
    2 KL  = (1 - 1/C) sum_c tr B_c^-1 - N (C - 1) + sum_c logdet B_c - logdet B_S
            + sum_c alpha_c^T K alpha_c - (sum_c alpha_c)^T K (sum_c alpha_c) / C,

is a lower bound of `log p(y)`. Its expectations are exact (`log_normalizer`), with gradients `p`
and `lambda / 2`. By `dV = -V diag(d omega) V` it is stationary where

    e := y - p - alpha = 0,
    D_c := H_c (lambda_c - (1 - 1/C) omega_c) - (v_c - v_S) / C = 0,    H_c = V_c o V_c,

where `v` are the diagonals of `V`, `V_S` is that of `Omega / C`, and `dbound / d omega = D / 2`.
There are two kinds of steps. Newton's steps `(Id + omega_c K)^-1 e_c` have the curvature
`diag omega`. The steps `H_c^-1 D_c` are those of the natural gradient. Both ascend. A step that
does not is taken back and shortened. The length of a step follows from the slopes at the ends of
the last one (Barzilai & Borwein 1988).

`priors` computes with `K` and `V`: with all `N x N` entries, or with what `M` inducing inputs say
of them and a rest of the logits that keeps its prior variance. The classes are taken one after the
other, twice an iteration, so that memory is a few `N x N` or `M x N` arrays.

The labels of an input may sum to 0. Then its likelihood is 1. Such inputs, with variance 0, change
nothing. They fill up a kernel to a size for which everything is compiled (`priors.padded_size`).
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

# Least precision of a site, which is of the size of p (1 - p).
_LEAST_CURVATURE = 1e-13
# Steps of conjugate gradients for H^-1 D. H is nearly singular where inputs are alike, but D nearly
# vanishes there too, so that a few steps find what matters.
_GRADIENTS = 8
# A precision below this fraction of its curvature is near 0, where some precisions have their
# optimum.
_NEAR_0 = 0.05
# Factors of the step length: of a step that was taken back, the largest growth of the next step,
# and the length at which the search ends.
_SHORTER, _LONGER, _SHORTEST = 0.35, 1.6, 1e-5


class Sites(NamedTuple):
    """What determines `q` given a kernel: `alpha` (`m = K alpha`) and `omega`, both `(N, C)`."""

    alpha: Array
    precision: Array


class Fit(NamedTuple):
    """The state of an optimisation, or its end.

    Attributes:
      sites: the sites of the largest bound so far.
      expected: `E[log sum_j exp z_nj]` of each input at these sites, with derivatives.
      log_evidence: the bound there, in nats.
      residual: the largest of `|y - p - alpha|` and `|omega D|`; the latter is the derivative of
        twice the bound in `log omega`.
      iterations: number of evaluations of the bound.
      direction: direction of the next step in `alpha` and `omega`.
      step: length of the next step.
      slope: slope of the bound along `direction`.
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
    """Marginals of `q`.

    Attributes:
      mean: means of the logits, `(N, C)`.
      variance: variances of the part of the logits that the prior resolves, `(N, C)`.
      whole: variances of the logits, with the rest, `(N, C)`.
      shared: variances `v_S` of the mean over classes, `(N,)`.
    """

    mean: Array
    variance: Array
    whole: Array
    shared: Array


def _divergence_terms(prior: Prior, precision: Array) -> tuple[Array, Array]:
    """The diagonal of `V`, and `logdet B`, of one class."""
    given = prior.given(precision)
    # A variance below eps times the prior variance is nothing but rounding.
    least = jnp.finfo(precision.dtype).eps * prior.variance
    return jnp.maximum(given.variance(), least), given.logdet()


def _gain(prior: Prior, y: Array, sites: Sites) -> tuple[Array, _Marginals]:
    """The bound without the expectations of `log_normalizer`, and the marginals of `q`.

    The divergence is that from the prior modulo shifts, with `tr B^-1 = N - sum(omega v)`.
    """
    n_classes = sites.precision.shape[1]
    total = jnp.sum(sites.precision, axis=1)
    # The last one belongs to the mean over classes.
    precisions = jnp.concatenate([sites.precision.T, total[None] / n_classes])
    variances, logdets = lax.map(functools.partial(_divergence_terms, prior), precisions)
    variance = variances[:-1].T
    mean = prior.times(sites.alpha)
    shift = jnp.sum(sites.alpha, axis=1)
    squares = jnp.sum(sites.alpha * mean) - jnp.sum(shift * jnp.sum(mean, axis=1)) / n_classes
    twice_kl = squares - (1 - 1 / n_classes) * jnp.sum(sites.precision * variance)
    twice_kl = twice_kl + jnp.sum(logdets[:-1]) - logdets[-1]
    whole = variance + prior.rest[:, None]
    return jnp.sum(y * mean) - twice_kl / 2, _Marginals(mean, variance, whole, variances[-1])


@jax.jit
def _ascent(
    prior: Prior, y: Array, sites: Sites, expected: LogNormalizer, q: _Marginals, before: Sites
) -> tuple[Sites, Array, Array, Array]:
    """The next direction.

    Args:
      before: the last direction.

    Returns:
      The direction at `sites`, the residual there, and the slopes of the bound along `before` and
      along the new direction.
    """
    n_classes = y.shape[1]
    mass = jnp.sum(y, axis=1, keepdims=True)
    gradient = y - mass * expected.mean - sites.alpha
    curvature = jnp.maximum(mass * expected.curvature, _LEAST_CURVATURE)

    def of_class(columns: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        e, omega, curvature_c, v = columns
        given = prior.given(omega)
        step = given.damped(e)
        squares = given.squares()
        slope = squares(curvature_c - (1 - 1 / n_classes) * omega)
        slope = slope - (v - q.shared) / n_classes
        # Precisions that go to 0 move by themselves, so that they do not hold up the others.
        goes_to_0 = (slope < 0) & (omega < _NEAR_0 * curvature_c)
        scale = jnp.maximum(squares(jnp.ones_like(omega)), jnp.finfo(omega.dtype).tiny)
        change = _conjugate_gradients(squares, scale, slope, ~goes_to_0)
        change = jnp.where(goes_to_0, slope / scale, change)
        return step, change, slope

    columns = (gradient.T, sites.precision.T, curvature.T, q.variance.T)
    alpha, change, slope = (x.T for x in lax.map(of_class, columns))
    # Gradients sum to 0 over the classes, as alpha does.
    direction = Sites(alpha - jnp.mean(alpha, axis=1, keepdims=True), change)
    at_most = jnp.where(slope < 0, jnp.minimum(sites.precision, curvature), curvature)
    residual = jnp.maximum(jnp.max(jnp.abs(gradient)), jnp.max(jnp.abs(slope * at_most)))
    in_alpha = prior.times(gradient)
    slopes = [
        jnp.sum(in_alpha * line.alpha) + jnp.sum(slope * line.precision) / 2
        for line in (before, direction)
    ]
    # The new direction ascends. A slope below eps is nothing but rounding.
    return direction, residual, slopes[0], jnp.maximum(slopes[1], jnp.finfo(y.dtype).eps)


def _conjugate_gradients(
    squares: Callable[[Array], Array], scale: Array, target: Array, free: Array
) -> Array:
    """A few steps of conjugate gradients from 0 towards `squares^-1 target`.

    Every iterate ascends: its product with `target` is positive.

    Args:
      squares: product with a positive semi-definite matrix.
      scale: the preconditioner, a diagonal.
      target: the right side.
      free: the entries that are solved for; the others stay 0.
    """

    def step(_: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
        x, rest, direction, energy = state
        image = jnp.where(free, squares(direction), 0)
        length = jnp.sum(direction * image)
        # A smaller rest is rounding, with parts that a singular matrix maps to 0.
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
    """`alpha = 0`, and the precisions that belong to equal probabilities."""
    n_classes = y.shape[1]
    precision = (1 - 1 / n_classes) / n_classes / max(1 - 1 / n_classes, 0.5)
    zeros: Any = np.zeros(y.shape, y.dtype)
    return Sites(zeros, zeros + zeros.dtype.type(precision))


@jax.jit
def carried_over(prior: Prior, before: Prior, sites: Sites) -> Sites:
    """Where to start with another prior: the Gaussian observations stay as they are.

    They have precisions `omega` and values `m + alpha / omega`. The posterior given them has

        alpha' = (K' + diag omega^-1)^-1 (m + alpha / omega)
               = (Id + diag(omega) K')^-1 (omega m + alpha),

    which divides by nothing. If `alpha` itself were kept, the means would grow with the kernel.

    Args:
      prior: the new prior.
      before: the prior that the sites belong to.
    """

    def of_class(columns: tuple[Array, ...]) -> Array:
        alpha, omega, mean = columns
        return prior.given(omega).damped(omega * mean + alpha)

    columns = (sites.alpha.T, sites.precision.T, before.times(sites.alpha).T)
    alpha = lax.map(of_class, columns).T
    return Sites(alpha - jnp.mean(alpha, axis=1, keepdims=True), sites.precision)


@jax.jit
def _trial(
    prior: Prior, y: Array, sites: Sites, direction: Sites, step: ArrayLike
) -> tuple[Sites, Array, _Marginals]:
    """The sites after a step, and what `_gain` returns for them."""
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

    If all numbers are known, the loop runs in Python. Each of its functions is then compiled by
    itself, and the expectations serve any number of inputs.

    Args:
      prior: prior of the logits at the training inputs.
      y: one-hot or soft labels, `(N, C)`.
      start: sites to start from.
      tol: the residual to reach.
      max_iterations: largest number of evaluations of the bound.
      damping: the longest step, in (0, 1].
      report: called with iteration, bound and residual, if all numbers are known.
    """
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((prior, y, start, tol, damping))):
        return _fit_traced(prior, y, start, tol, max_iterations, damping)
    unfinished, advance = _steps(prior, y, tol, max_iterations, damping)
    state = _begin(start, damping)
    while unfinished(state):
        state = advance(state)
        if report is not None:
            report(int(state.iterations), float(state.log_evidence), float(state.residual))
    return state


@functools.partial(jax.jit, static_argnums=4)
def _fit_traced(
    prior: Prior, y: Array, start: Sites, tol: ArrayLike, max_iterations: int, damping: Any
) -> Fit:
    return lax.while_loop(*_steps(prior, y, tol, max_iterations, damping), _begin(start, damping))


def _begin(start: Sites, damping: Any) -> Fit:
    """The state before the first evaluation. Any bound is better, and there is no direction."""
    zeros: Any = np.zeros(start.alpha.shape, start.alpha.dtype)
    number = zeros.dtype.type
    expected = LogNormalizer(zeros[:, 0], zeros, zeros)
    least, largest = number(-np.inf), number(np.inf)
    step = known(damping).astype(zeros.dtype)
    return Fit(start, expected, least, largest, 0, Sites(zeros, zeros), step, number(1))


def _steps(
    prior: Prior, y: Array, tol: ArrayLike, max_iterations: int, damping: Any
) -> tuple[Callable[[Fit], Any], Callable[[Fit], Fit]]:
    """Functions of the state: whether the search goes on, and the next state.

    They take known numbers, or traced ones inside a graph.
    """
    weight = known(y).sum(axis=1)
    size = weight.sum() * y.shape[1]

    def unfinished(state: Fit) -> Any:
        going = (state.residual > tol) & (state.iterations < max_iterations)
        return going & (state.step > _SHORTEST)

    def advance(state: Fit) -> Fit:
        sites, gain, q = _trial(prior, y, state.sites, state.direction, state.step)
        expected = log_normalizer(q.mean, q.whole)
        value = known(gain) - (weight * known(expected.value)).sum()

        def accept() -> Fit:
            direction, residual, end, slope = _ascent(prior, y, sites, expected, q, state.direction)
            # The step that would have reached slope 0 along the last direction if the bound were
            # quadratic. Where classes compete, curvatures are up to twice `diag omega`. A step of 1
            # would then jump from one side of the optimum to the other, and the rounding of the
            # bound would hide it.
            slower = namespace(value).maximum(state.slope - known(end), state.slope / _LONGER)
            step = state.step * state.slope / slower
            step = namespace(value).clip(step, state.step * _SHORTER, damping).astype(y.dtype)
            found = known(residual), state.iterations, direction, step, known(slope)
            return Fit(sites, expected, value, *found)

        def shorten() -> Fit:
            return state._replace(step=state.step * _SHORTER)

        slack = 10 * float(jnp.finfo(y.dtype).eps) * (size + abs(state.log_evidence))
        better = value >= state.log_evidence - slack
        if isinstance(better, Tracer):
            after = lax.cond(better, accept, shorten)
        else:
            after = accept() if better else shorten()
        return after._replace(iterations=state.iterations + 1)

    return unfinished, advance


@jax.jit
def _slope(prior: Prior, y: Array, sites: Sites, expected: LogNormalizer) -> Prior:
    """The slope of the bound in the prior at given sites: one Cholesky factor for each class."""
    n_classes = y.shape[1]
    mass = jnp.sum(y, axis=1, keepdims=True)
    in_whole = -mass * expected.curvature / 2
    in_variance = in_whole + (1 - 1 / n_classes) / 2 * sites.precision

    def means_and_rest(prior: Prior) -> Array:
        """The part of the bound that needs no posterior variance."""
        mean = prior.times(sites.alpha)
        centred = sites.alpha - jnp.mean(sites.alpha, axis=1, keepdims=True)
        of_mean = (y - mass * expected.mean) - centred / 2
        return jnp.sum(of_mean * mean) + jnp.sum(in_whole * prior.rest[:, None])

    def add(total: Prior, of_class: tuple[Any, ...]) -> tuple[Prior, None]:
        precision, in_variance, in_logdet = of_class
        slope = prior.given(precision).slope(in_variance, in_logdet)
        return jax.tree.map(jnp.add, total, slope), None

    # The last one is the posterior of the mean over classes, of which only logdet counts.
    shared = jnp.sum(sites.precision, axis=1) / n_classes
    precisions = jnp.concatenate([sites.precision.T, shared[None]])
    in_variances = jnp.concatenate([in_variance.T, jnp.zeros_like(shared)[None]])
    in_logdets = np.array([-0.5] * n_classes + [0.5], y.dtype)
    start = jax.grad(means_and_rest)(prior)
    return lax.scan(add, start, (precisions, in_variances, in_logdets))[0]


def slope(prior: Prior, y: Array, sites: Sites) -> Any:
    """The slope of the bound in the prior at its optimum, where the sites can be held fixed."""
    no_direction = jax.tree.map(np.zeros_like, sites)
    _, _, q = _trial(prior, y, sites, no_direction, y.dtype.type(0))
    return _slope(prior, y, sites, log_normalizer(q.mean, q.whole))


@jax.custom_jvp
def evidence(prior: Prior, y: Array, fit: Fit) -> Array:
    """The bound that a fit of `prior` and `y` has reached, in nats; NaN if it is not finite.

    It has first derivatives in both, since at the optimum the sites can be held fixed.
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
