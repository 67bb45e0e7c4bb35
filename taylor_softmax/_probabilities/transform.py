"""One Gaussian logit under the outer integral: its transform `phi` and tilted moments of `t f(z)`.

Let `z ~ N(mean, variance)` and `phi(t) = E[exp(-t f(z))]`. "Tilted" means weighted in proportion to
`exp(-t f(z))`. For softmax, `phi(exp(-x))` is the distribution function of `z + g`, where `g` is a
standard Gumbel variable, the noise. The expectation may be taken over either of the two.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from taylor_softmax._generated.probabilities import logit_order_2
from taylor_softmax._numerics import quadrature
from taylor_softmax._numerics.precision import log_tiny
from taylor_softmax._numerics.surrogate import Surrogate
from taylor_softmax._probabilities.rules import (
    LEAST_DEVIATION,
    LEAST_GRADED,
    REACH,
    Rule,
    range_of_log_f,
)

# Up to this standard deviation moments are taken about `t f(mean)`, from which `t f(z)` deviates
# little. Beyond it the tilted logit may be so far from its mean that this would lose digits.
NARROW = 0.3
# Beyond it variances are taken about at most this value of `t f`.
_LARGEST_POINT = 4.0


class Tilted(NamedTuple):
    """Moments of each class at each outer node.

    Attributes:
      log_phi: `log phi`.
      mean: tilted mean of `t f(z)`.
      deviation: tilted mean of `t f(z) - t f(mean)`; it means nothing if the standard deviation is
        beyond `NARROW`. None if it was not asked for.
      variance: tilted variance of `t f(z)`, or None.
    """

    log_phi: Array
    mean: Array
    deviation: Array | None = None
    variance: Array | None = None


def tilted(
    mean: Array, variance: Array, s: Array, *, rule: Rule, surrogate: Surrogate, second: bool
) -> Tilted:
    """Tilted moments of `M` logits.

    Args:
      mean, variance: of the logits, `(M,)`.
      s: nodes, `(outer, M)`.
      rule: numbers of nodes of the expectations.
      surrogate: the function `f`.
      second: whether to compute deviations and variances.

    Returns:
      Arrays of shape `(outer, M)`.
    """
    if surrogate.has_closed_form:
        t = jnp.exp(s)
        log_phi, first, deviation, squares = logit_order_2(mean, variance, t)
        if not second:
            return Tilted(log_phi, t * first)
        return Tilted(log_phi, t * first, t * deviation, t**2 * squares)
    sigma = jnp.sqrt(variance)
    if not rule.noise:
        return _over_logit(mean, sigma, s, rule, surrogate, second)
    if not rule.logit:
        return _over_noise(mean, sigma, s, rule.noise, second)
    wide = sigma > LEAST_DEVIATION
    noise = _over_noise(mean, jnp.where(wide, sigma, LEAST_DEVIATION), s, rule.noise, second)
    logit = _over_logit(mean, jnp.where(wide, 0, sigma), s, rule, surrogate, second)
    return jax.tree.map(lambda a, b: jnp.where(wide, a, b), noise, logit)


def _over_logit(
    mean: Array, sigma: Array, s: Array, rule: Rule, surrogate: Surrogate, second: bool
) -> Tilted:
    """By an expectation over the logit itself."""
    log_f = surrogate.log_value
    low, high = (lax.stop_gradient(x) for x in range_of_log_f(mean, sigma, surrogate))
    # t f is a product of two factors, one for the outer node and one for the inner: a sum of
    # logarithms would cost one more exponential. Centred, neither overflows. Beyond `limit`
    # exp(-t f) is 0.
    limit = -log_tiny(s.dtype)
    centre = (high + low) / 2
    t = jnp.exp(jnp.minimum(s + centre, high - centre + math.log(limit)))

    # Computed outside of the loop, in which it would be repeated for every outer node.
    step, weight = _steps(mean, sigma, rule, surrogate)
    f = jnp.exp(log_f(mean + step) - centre)

    def first_terms(node: tuple[Array, Array]) -> tuple[Array, ...]:
        f, weight = node
        value = jnp.minimum(t * f, limit)
        excess = jnp.expm1(-value)
        return weight * excess, weight * (1 + excess) * value

    if not second:
        shortfall, first = _sums(first_terms, (f, weight), s, 2)
        phi, log_phi = _from_shortfall(shortfall)
        return Tilted(log_phi, first / phi)

    at_mean = jnp.exp(log_f(mean) - centre)
    narrow = sigma <= NARROW
    # The variance is taken about a point near the mean: about 0 it would cancel for small sigma.
    point = t * at_mean
    point = jnp.where(narrow, point, jnp.minimum(point, _LARGEST_POINT))
    # The difference f(z) - f(mean) would lose its digits for small sigma.
    change = at_mean * surrogate.relative_change(mean, jnp.where(narrow, step, 0))

    def terms(node: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        f, change, weight = node
        value = jnp.minimum(t * f, limit)
        distance = jnp.where(narrow, t * change, value - point)
        # 1 + expm1 loses digits where it is small, which only variances notice.
        tilt = weight * jnp.exp(-value)
        return weight * jnp.expm1(-value), tilt, tilt * distance, tilt * distance**2

    shortfall, phi, first, squares = _sums(terms, (f, change, weight), s, 4)
    _, log_phi = _from_shortfall(shortfall)
    # Divided by their own sum, which keeps its digits where phi is small and 1 + shortfall has
    # none. The floor keeps 1 / phi^2 finite in derivatives; nothing below it matters.
    phi = jnp.maximum(phi, jnp.finfo(s.dtype).eps ** 2)
    deviation = first / phi
    return Tilted(log_phi, point + deviation, deviation, squares / phi - deviation**2)


def _steps(mean: Array, sigma: Array, rule: Rule, surrogate: Surrogate) -> tuple[Array, ArrayLike]:
    """Nodes for a logit minus its mean, `(nodes, M)`, and their weights, which sum to 1."""
    x, weight = quadrature.normal_rule(rule.logit, REACH)
    step = sigma * jnp.asarray(x, sigma.dtype)[:, None]
    if not rule.graded_logit:
        return step, weight
    # z = minimiser + order sinh(xi). Steps that grow with |z| / order resolve polynomials.
    assert surrogate.order is not None
    wide = sigma > LEAST_GRADED
    spread = jnp.where(wide, sigma, LEAST_GRADED)
    centre = (mean - surrogate.minimiser) / surrogate.order
    reach = REACH * spread / surrogate.order
    ends = jnp.arcsinh(centre - reach), jnp.arcsinh(centre + reach)
    xi = jnp.linspace(*ends, rule.logit)
    graded = surrogate.order * (jnp.sinh(xi) - centre)
    density = jnp.exp(-((graded / spread) ** 2) / 2) * jnp.cosh(xi)
    density = density / jnp.sum(density, axis=0)
    weight = jnp.asarray(weight, sigma.dtype)[:, None]
    return jnp.where(wide, graded, step), jnp.where(wide, density, weight)


def _over_noise(mean: Array, sigma: Array, s: Array, n: int, second: bool) -> Tilted:
    """For softmax, by an expectation over the noise.

    `exp(-t e^z)` is the probability that `tau ~ Exp(1)` is larger than `t e^z`. So
    `phi = E[Phi(x)]` with `x = (log tau - s - mean) / sigma` and `Phi` the normal distribution
    function. Integration by parts gives
    `E[(t e^z)^k exp(-t e^z)] = E[tau^(k-1) Phi'(x)] / sigma` for `k = 1, 2`.
    """
    scaled, inverse = (s + mean) / sigma, 1 / sigma

    def terms(node: tuple[Array, Array]) -> tuple[Array, ...]:
        log_tau, weight = node
        x = log_tau * inverse - scaled
        shortfall = weight * jax.scipy.special.erfc(x / math.sqrt(2)) / -2
        # A density below exp(-80) does not matter. The floor keeps it from underflowing.
        density = weight * jnp.exp(jnp.maximum(-(x**2) / 2, -80.0))
        sums = shortfall, density
        return (*sums, density * jnp.exp(log_tau)) if second else sums

    shortfall, *sums = _sums(terms, quadrature.exponential_rule(n), s, 2 + second)
    phi, log_phi = _from_shortfall(shortfall)
    first, *squares = (total / (math.sqrt(2 * math.pi) * sigma * phi) for total in sums)
    if not second:
        return Tilted(log_phi, first)
    # Wide logits have no deviations: the mean takes their place.
    return Tilted(log_phi, first, first, squares[0] - first**2)


def _sums(
    terms: Callable[..., tuple[Array, ...]],
    nodes: tuple[ArrayLike, ...],
    like: Array,
    n_sums: int,
) -> tuple[Array, ...]:
    """Sums over nodes of the `n_sums` arrays that `terms` returns for one node.

    Args:
      terms: `terms(node)` returns arrays of the shape of `like`.
      nodes: arrays with one entry a node along the first axis.
      like: an array of the shape and dtype of the sums.
    """

    # One node after the other keeps the sums in cache: an axis for the nodes is twice as slow.
    @jax.checkpoint
    def add(sums: tuple[Array, ...], node: tuple[Array, ...]) -> tuple[tuple[Array, ...], None]:
        return tuple(a + b for a, b in zip(sums, terms(node), strict=True)), None

    rule = tuple(jnp.asarray(x, like.dtype) for x in nodes)
    return lax.scan(add, (jnp.zeros_like(like),) * n_sums, rule)[0]


def _from_shortfall(shortfall: Array) -> tuple[Array, Array]:
    """`phi` and `log phi` from `phi - 1`, which keeps its digits where `phi` is near 1.

    Where `phi` is near 0, only its absolute error matters, and that its logarithm is finite.
    """
    shortfall = jnp.maximum(shortfall, -1 + jnp.finfo(shortfall.dtype).eps)
    return 1 + shortfall, jnp.log1p(shortfall)
