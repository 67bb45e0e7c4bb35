"""One Gaussian logit under the outer integral: its transform `phi` and tilted moments of `t f(z)`.

`z ~ N(mean, variance)`, `phi(t) = E[exp(-t f(z))]`; "tilted" is under weights proportional to
`exp(-t f(z))`. For softmax `phi(exp(-x))` is the distribution function of `z + g` with `g` standard
Gumbel, and the expectation may be taken over either of the two.
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

# Up to this standard deviation deviations are taken from `t f(mean)`, relative to which they are
# small; beyond it the tilted logit may be so far from its mean that this would lose digits.
NARROW = 0.3
# Where variances are taken about beyond it, in units of `t f`: at most here.
_LARGEST_POINT = 4.0


class Tilted(NamedTuple):
    """Of each class, at each outer node.

    Attributes:
      log_phi: `log phi`.
      mean: tilted mean of `t f(z)`.
      deviation: that minus `t f(mean)`, where the standard deviation is at most `NARROW`; or None.
      variance: tilted variance of `t f(z)`, or None.
    """

    log_phi: Array
    mean: Array
    deviation: Array | None = None
    variance: Array | None = None


def tilted(
    mean: Array, variance: Array, s: Array, *, rule: Rule, surrogate: Surrogate, second: bool
) -> Tilted:
    """At `s`, `(outer, M)`, for logits of the given means and variances, `(M,)`.

    Args:
      second: whether deviations and variances are wanted.
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
    log_f = surrogate.log_value
    low, high = (lax.stop_gradient(x) for x in range_of_log_f(mean, sigma, surrogate))
    # t f as a product of two factors, of which one belongs to the outer node: a sum of logarithms
    # would cost one more exponential. Centred, neither overflows; from `limit` on exp(-t f) is 0.
    limit = -log_tiny(s.dtype)
    centre = (high + low) / 2
    t = jnp.exp(jnp.minimum(s + centre, high - centre + math.log(limit)))

    # Here, since within the loop it would be computed again for every outer node.
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
    # The variance about a point near the mean: about 0 it would cancel for small sigma.
    point = t * at_mean
    point = jnp.where(narrow, point, jnp.minimum(point, _LARGEST_POINT))
    # f(z) - f(mean) itself has no digits left where sigma is small.
    change = at_mean * surrogate.relative_change(mean, jnp.where(narrow, step, 0))

    def terms(node: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        f, change, weight = node
        value = jnp.minimum(t * f, limit)
        distance = jnp.where(narrow, t * change, value - point)
        # What 1 + expm1 has lost where it is small only the variances miss.
        tilt = weight * jnp.exp(-value)
        return weight * jnp.expm1(-value), tilt, tilt * distance, tilt * distance**2

    shortfall, phi, first, squares = _sums(terms, (f, change, weight), s, 4)
    _, log_phi = _from_shortfall(shortfall)
    # Relative to their own sum, which has digits where phi is small and 1 + shortfall has none; the
    # floor, below which nothing matters, keeps 1 / phi^2 finite in derivatives.
    phi = jnp.maximum(phi, jnp.finfo(s.dtype).eps ** 2)
    deviation = first / phi
    return Tilted(log_phi, point + deviation, deviation, squares / phi - deviation**2)


def _steps(mean: Array, sigma: Array, rule: Rule, surrogate: Surrogate) -> tuple[Array, ArrayLike]:
    """Nodes for a logit less its mean, `(nodes, M)`, and their weights, summing to 1."""
    x, weight = quadrature.normal_rule(rule.logit, REACH)
    step = sigma * jnp.asarray(x, sigma.dtype)[:, None]
    if not rule.graded_logit:
        return step, weight
    # z = bottom + order sinh(xi): polynomials are resolved by steps that grow with |z| / order.
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
    """The same for softmax, where `exp(-t e^z)` is the probability that `tau ~ Exp(1) > t e^z`.

    So `phi = E[Phi(x)]` with `x = (log tau - s - mean) / sigma` and `Phi` the normal distribution
    function, and by parts `E[(t e^z)^k exp(-t e^z)] = E[tau^(k-1) Phi'(x)] / sigma` for `k = 1, 2`.
    """

    scaled, inverse = (s + mean) / sigma, 1 / sigma

    def terms(node: tuple[Array, Array]) -> tuple[Array, ...]:
        log_tau, weight = node
        x = log_tau * inverse - scaled
        shortfall = weight * jax.scipy.special.erfc(x / math.sqrt(2)) / -2
        # Where the density underflows its logarithm does not matter.
        density = weight * jnp.exp(jnp.maximum(-(x**2) / 2, -80.0))
        sums = shortfall, density
        return (*sums, density * jnp.exp(log_tau)) if second else sums

    shortfall, *sums = _sums(terms, quadrature.exponential_rule(n), s, 2 + second)
    phi, log_phi = _from_shortfall(shortfall)
    first, *squares = (total / (math.sqrt(2 * math.pi) * sigma * phi) for total in sums)
    if not second:
        return Tilted(log_phi, first)
    # Not narrow, so that nobody asks for deviations.
    return Tilted(log_phi, first, first, squares[0] - first**2)


def _sums(
    terms: Callable[..., tuple[Array, ...]],
    nodes: tuple[ArrayLike, ...],
    like: Array,
    n_sums: int,
) -> tuple[Array, ...]:
    """Sums over nodes of the `n_sums` arrays that `terms` returns for one of them."""

    # One node after the other, with the sums in cache: an axis for the nodes is twice as slow.
    @jax.checkpoint
    def add(sums: tuple[Array, ...], node: tuple[Array, ...]) -> tuple[tuple[Array, ...], None]:
        return tuple(a + b for a, b in zip(sums, terms(node), strict=True)), None

    rule = tuple(jnp.asarray(x, like.dtype) for x in nodes)
    return lax.scan(add, (jnp.zeros_like(like),) * n_sums, rule)[0]


def _from_shortfall(shortfall: Array) -> tuple[Array, Array]:
    """`phi` and `log phi` from `phi - 1`, which has the digits where many classes have phi near 1.

    Where `phi` is near 0 all that matters is its absolute error, and that no logarithm is infinite.
    """
    shortfall = jnp.maximum(shortfall, -1 + jnp.finfo(shortfall.dtype).eps)
    return 1 + shortfall, jnp.log1p(shortfall)
