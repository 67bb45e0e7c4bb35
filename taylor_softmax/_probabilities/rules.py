"""Where the outer integral over `s = log t` has its nodes, and how many its inner sums have.

A rule has a number of nodes in each direction. A block of points gets the cheapest that is fine
enough for all of them; the last one serves every point.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from taylor_softmax._numerics.arguments import constant, namespace
from taylor_softmax._numerics.surrogate import Surrogate

# Logits beyond this many standard deviations are left out: 2e-9 of the probability.
REACH = 6.0
# From this standard deviation on, for softmax, the expectation is taken over the noise instead.
LEAST_DEVIATION = 2.0
# The outer rule begins at `s = lower - exp(_TAIL)` and ends at `upper + log(_DECAY)`: what is left
# out is below 1e-9 of the integral.
_TAIL, _DECAY = 3.1, 21.0
# Largest step of the outer rule. The integrand is analytic for `|Im s| < pi / 2`, so that the error
# falls as `exp(-pi^2 / step)`. For softmax, standard deviations of `sigma` widen that strip, to
# steps of `sigma / 3` for a class; the largest of many classes is spread less.
_STEP, _STEPS_PER_DEVIATION, _STEPS_PER_DECADE = 0.5, 3.0, 1.0
# Of a graded rule, the distance from its fine end over which steps stay small.
_GRADED_SCALE = 16.0
# Nodes per unit of its variable: steps of 0.5 at the fine end.
_GRADED_STEPS = 32.0
# Nodes for a logit per unit of its standard deviation, which is what `f` resolves: softmax has its
# poles at distance pi, Taylor softmax at that of the roots of f (0.89 at order 4).
_SOFTMAX_NODES, _TAYLOR_NODES = 14.0, 40.0


class Rule(NamedTuple):
    """Numbers of nodes: in `s`, for the expectation over a logit, and over the noise (or 0).

    Attributes:
      graded: whether steps in `s` grow with the distance from the upper end.
      graded_logit: whether those in wide logits grow with the distance from the minimum of `f`.
    """

    outer: int
    logit: int = 0
    noise: int = 0
    graded: bool = False
    graded_logit: bool = False


# From cheap to expensive. Largest errors measured over 2 to 100 classes and variances of 0.01 to
# 100: softmax 5e-8 where variances are equal and 1e-7 where not, probabilities and covariance
# alike. 2 nodes less for a logit have 3e-7, 2 more for the noise 1e-8.
SOFTMAX_RULES = (
    Rule(40, logit=16),
    Rule(56, logit=28),
    Rule(72, noise=24),
    # Variances that differ between the classes of a point.
    Rule(96, logit=48),
    Rule(192, logit=28, noise=24, graded=True),
    Rule(384, logit=28, noise=24, graded=True),
)
# Orders 4 to 32: 1e-8. The last one's logits are graded about the minimum of f from a standard
# deviation of LEAST_GRADED on, which it resolves by steps of 0.5 there at variances of 1e4; equal
# steps are 1e-5 off at that variance.
TAYLOR_RULES = (Rule(48, logit=64), Rule(128, logit=160), Rule(256, logit=512, graded_logit=True))
LEAST_GRADED = 4.0
# No rule but the outer one: 1e-14.
CLOSED_FORM_RULES = (Rule(48),)


class Logits(NamedTuple):
    """Independent Gaussian logits of points.

    Attributes:
      mean, variance: `(P, C)`, finite; of absent classes those of some class that is there.
      multiplicity: `(P, C)`, how many classes each stands for, of independent logits alike; 0 where
        the logit is `-inf`: the class is excluded.
      lower, upper: `(P,)`, where in `s` the product `w` begins to fall, and is about to vanish.
    """

    mean: Any
    variance: Any
    multiplicity: Any
    lower: Any
    upper: Any

    @property
    def present(self) -> Array:
        """Whether there is a class at all, `(P, C)`."""
        return self.multiplicity > 0


def for_surrogate(surrogate: Surrogate) -> tuple[Rule, ...]:
    if surrogate.has_closed_form:
        return CLOSED_FORM_RULES
    return SOFTMAX_RULES if surrogate.is_shift_invariant else TAYLOR_RULES


def range_of_log_f(
    mean: Any, sigma: Any, surrogate: Surrogate, reach: ArrayLike = REACH
) -> tuple[Any, Any]:
    """Least and largest `log f` of a logit, within reach of its mean; of NumPy's in NumPy."""
    np_, left, right = namespace(mean), mean - reach * sigma, mean + reach * sigma
    bottom = np_.minimum(np_.maximum(left, surrogate.minimiser), right)
    ends, least = (surrogate.log_value(z) for z in (np_.stack([left, right]), bottom))
    return least, np_.max(ends, axis=0)


def prepared(mean: Any, variance: Any, surrogate: Surrogate, count: int) -> Logits:
    """Logits of the given means, `-inf` where there is no class, and variances, both `(P, C)`.

    Absent classes are given the moments of the likeliest one, which changes no rule. Of NumPy's
    arrays in NumPy, which compiles nothing.

    Args:
      count: how many classes each column stands for.
    """
    np_ = namespace(mean)
    present = ~np_.isneginf(mean)
    likeliest = np_.argmax(mean, axis=1)[:, None]
    mean, variance = (
        np_.where(present, x, constant(np_.take_along_axis(x, likeliest, axis=1)))
        for x in (mean, variance)
    )
    if surrogate.is_shift_invariant:
        # Softmax does not see a shift; logits of 1e3 would lose digits.
        mean = mean - constant(np_.max(mean, axis=1, keepdims=True))
    multiplicity = np_.where(present, float(count), 0.0).astype(mean.dtype)
    return Logits(
        mean,
        variance,
        multiplicity,
        *_bounds(constant(mean), constant(variance), multiplicity, surrogate),
    )


def _log_count(multiplicity: Any) -> Any:
    """Logarithm of the number of classes that are there, `(P,)`: others change no node."""
    np_ = namespace(multiplicity)
    return np_.log(np_.maximum(np_.sum(multiplicity, axis=1), 1))


def _bounds(mean: Any, variance: Any, count: Any, surrogate: Surrogate) -> tuple[Any, Any]:
    """Where in `s` the product `w` begins to fall, and is about to vanish; `(P, C)` to `(P,)`."""
    np_ = namespace(mean)
    # The largest of many logits reaches farther than each.
    reach = np_.sqrt(REACH**2 + 2 * _log_count(count))[:, None]
    sigma = np_.sqrt(variance)
    least, largest = range_of_log_f(mean, sigma, surrogate, reach)
    if surrogate.is_shift_invariant:
        # 1 - w <= sum_j t E[f(z_j)], nearer than the largest f where variances are small. Nearer by
        # 2 deviations more, the bend of u - exp(-u) would meet w where it falls: 1e-5 at 40 nodes.
        largest = np_.minimum(largest, mean + variance / 2 + 2 * sigma)
    largest = np_.where(count > 0, largest + np_.log(np_.maximum(count, 1)), -np_.inf)
    least = np_.where(count > 0, least, -np_.inf)
    # w falls below any one phi: the class whose least plausible f is largest ends it.
    top = np_.max(largest, axis=1)
    total = top + np_.log(np_.sum(np_.exp(largest - top[:, None]), axis=1))
    return -total, -np_.max(least, axis=1)


def fine_enough(logits: Logits, rules: tuple[Rule, ...], surrogate: Surrogate) -> Any:
    """Whether each of `rules` is fine enough for each point, `(rules, P)`; the last has to be."""
    np_, lower, upper = namespace(logits.mean), logits.lower, logits.upper
    sigma = np_.sqrt(constant(logits.variance))
    least, largest = np_.min(sigma, axis=1), np_.max(sigma, axis=1)
    softmax = surrogate.is_shift_invariant
    steps = _STEPS_PER_DEVIATION + _STEPS_PER_DECADE / math.log(10) * _log_count(
        logits.multiplicity
    )
    step = np_.maximum(_STEP, least / steps) if softmax else _STEP
    length = upper - lower + _TAIL + math.log(_DECAY)
    # The largest of many wide classes is spread less than each.
    graded_steps = _GRADED_STEPS * steps / _STEPS_PER_DEVIATION
    enough = []
    for rule in rules:
        if rule.graded:
            last, first = _graded_ends(lower, upper)
            fine = last - first <= (rule.outer - 1) / graded_steps
        else:
            fine = length <= step * rule.outer
        if rule.noise and not rule.logit:
            fine &= least >= LEAST_DEVIATION
        elif rule.logit and not rule.noise:
            fine &= largest <= rule.logit / (_SOFTMAX_NODES if softmax else _TAYLOR_NODES)
        enough.append(fine)
    enough[-1] = np_.ones_like(enough[-1])
    return np_.stack(enough)


def outer_nodes(logits: Logits, rule: Rule) -> tuple[Array, Array]:
    """Nodes in `s` and their weights, `(outer, P)`."""
    lower, upper = logits.lower, logits.upper
    u = jnp.linspace(0, 1, rule.outer, dtype=lower.dtype)[:, None]
    if rule.graded:
        # s = end - scale sinh(xi). A class with features at distance d below the upper end has a
        # standard deviation of d / 13 at least, or it would have put that end lower.
        last, first = _graded_ends(lower, upper)
        xi = first + u * (last - first)
        weight = (last - first) / (rule.outer - 1) * _GRADED_SCALE * jnp.cosh(xi)
        return upper - _GRADED_SCALE * jnp.sinh(xi), weight
    # s = lower + u - exp(-u): below `lower` w is a power series in t = exp(s), and both ends of
    # the integrand in u fall off doubly exponentially. In s the lower would take 30 more units.
    span = upper - lower + _TAIL + math.log(_DECAY)
    u = u * span - _TAIL
    return lower + u - jnp.exp(-u), span / (rule.outer - 1) * (1 + jnp.exp(-u))


def _graded_ends(lower: Any, upper: Any) -> tuple[Any, float]:
    """Largest and least `xi` of a graded rule."""
    least = -math.asinh(math.log(_DECAY) / _GRADED_SCALE)
    largest = namespace(lower).arcsinh((upper - lower + math.exp(_TAIL)) / _GRADED_SCALE)
    return largest, least
