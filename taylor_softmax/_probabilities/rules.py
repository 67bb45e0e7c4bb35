"""Quadrature rules: nodes of the outer integral over `s = log t`, and numbers of inner nodes.

A rule is a number of nodes in each direction. A block of points gets the cheapest rule that is fine
enough for all of its points. The last rule serves every point.
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
# Least standard deviation at which the expectation for softmax is taken over the Gumbel noise
# instead of the logit (see `transform`).
LEAST_DEVIATION = 2.0
# The outer rule begins at `s = lower - exp(_TAIL)` and ends at `upper + log(_DECAY)`. The rest is
# below 1e-9 of the integral.
_TAIL, _DECAY = 3.1, 21.0
# Largest step of the outer rule. The integrand is analytic for `|Im s| < pi / 2`, so the error
# falls as `exp(-pi^2 / step)`. For softmax, a standard deviation of `sigma` widens that strip, and
# a class allows steps of `sigma / 3`. The largest of many classes has a smaller spread, and needs
# smaller steps.
_STEP, _STEPS_PER_DEVIATION, _STEPS_PER_DECADE = 0.5, 3.0, 1.0
# A graded rule has small steps up to this distance from its fine end.
_GRADED_SCALE = 16.0
# Nodes of a graded rule per unit of its variable: steps of 0.5 at the fine end.
_GRADED_STEPS = 32.0
# Nodes for a logit per unit of its standard deviation. They must resolve `f`: softmax has poles at
# the distance pi, Taylor softmax at that of the roots of f (0.89 at order 4).
_SOFTMAX_NODES, _TAYLOR_NODES = 14.0, 40.0


class Rule(NamedTuple):
    """Numbers of nodes of one rule.

    Attributes:
      outer: nodes in `s`.
      logit: nodes of the expectation over a logit; 0 if it is not used.
      noise: nodes of the expectation over the Gumbel noise; 0 if it is not used.
      graded: whether steps in `s` grow with the distance from the upper end.
      graded_logit: whether steps in wide logits grow with the distance from the minimum of `f`.
    """

    outer: int
    logit: int = 0
    noise: int = 0
    graded: bool = False
    graded_logit: bool = False


# Rules from cheap to expensive. Largest errors, measured for 2 to 100 classes and variances of 0.01
# to 100: 5e-8 for equal variances and 1e-7 for unequal ones, both of probabilities and of their
# covariance. With 2 nodes less for a logit the error is 3e-7, with 2 more for the noise 1e-8.
SOFTMAX_RULES = (
    Rule(40, logit=16),
    Rule(56, logit=28),
    Rule(72, noise=24),
    # For variances that differ between the classes of a point.
    Rule(96, logit=48),
    Rule(192, logit=28, noise=24, graded=True),
    Rule(384, logit=28, noise=24, graded=True),
)
# Orders 4 to 32: errors of 1e-8. The last rule grades its nodes for logits about the minimum of f,
# for standard deviations from LEAST_GRADED on. At variances of 1e4 its steps are 0.5 there, where
# equal steps would leave an error of 1e-5.
TAYLOR_RULES = (Rule(48, logit=64), Rule(128, logit=160), Rule(256, logit=512, graded_logit=True))
LEAST_GRADED = 4.0
# Order 2 needs no inner nodes: errors of 1e-14.
CLOSED_FORM_RULES = (Rule(48),)


class Logits(NamedTuple):
    """Independent Gaussian logits of `P` points.

    Attributes:
      mean, variance: finite numbers, `(P, C)`. Excluded classes have those of another class.
      multiplicity: how many classes with this distribution a column stands for, `(P, C)`; 0 for a
        class that is excluded by a logit of `-inf`.
      lower, upper: where in `s` the product `w` begins to fall, and where it nearly vanishes,
        `(P,)`.
    """

    mean: Any
    variance: Any
    multiplicity: Any
    lower: Any
    upper: Any

    @property
    def present(self) -> Array:
        """Which classes are not excluded, `(P, C)`."""
        return self.multiplicity > 0


def for_surrogate(surrogate: Surrogate) -> tuple[Rule, ...]:
    """The rules for a surrogate, from cheap to expensive."""
    if surrogate.has_closed_form:
        return CLOSED_FORM_RULES
    return SOFTMAX_RULES if surrogate.is_shift_invariant else TAYLOR_RULES


def range_of_log_f(
    mean: Any, sigma: Any, surrogate: Surrogate, reach: ArrayLike = REACH
) -> tuple[Any, Any]:
    """Least and largest `log f(z)` for logits `z` within `reach` deviations of their mean.

    NumPy's arrays are computed in NumPy, which compiles nothing.
    """
    np_, left, right = namespace(mean), mean - reach * sigma, mean + reach * sigma
    bottom = np_.minimum(np_.maximum(left, surrogate.minimiser), right)
    ends, least = (surrogate.log_value(z) for z in (np_.stack([left, right]), bottom))
    return least, np_.max(ends, axis=0)


def prepared(mean: Any, variance: Any, surrogate: Surrogate, count: int) -> Logits:
    """`Logits` of the given means and variances, both `(P, C)`; a mean of `-inf` excludes a class.

    Excluded classes get mean and variance of the likeliest class, which changes no rule. NumPy's
    arrays are computed in NumPy, which compiles nothing.

    Args:
      count: number of classes that each column stands for.
    """
    np_ = namespace(mean)
    present = ~np_.isneginf(mean)
    likeliest = np_.argmax(mean, axis=1)[:, None]
    mean, variance = (
        np_.where(present, x, constant(np_.take_along_axis(x, likeliest, axis=1)))
        for x in (mean, variance)
    )
    if surrogate.is_shift_invariant:
        # A shift does not change softmax. Without it, logits of 1e3 would lose digits.
        mean = mean - constant(np_.max(mean, axis=1, keepdims=True))
    multiplicity = np_.where(present, float(count), 0.0).astype(mean.dtype)
    return Logits(
        mean,
        variance,
        multiplicity,
        *_bounds(constant(mean), constant(variance), multiplicity, surrogate),
    )


def _log_count(multiplicity: Any) -> Any:
    """Logarithm of the number of classes that are not excluded, `(P,)`."""
    np_ = namespace(multiplicity)
    return np_.log(np_.maximum(np_.sum(multiplicity, axis=1), 1))


def _bounds(mean: Any, variance: Any, count: Any, surrogate: Surrogate) -> tuple[Any, Any]:
    """Where in `s` the product `w` begins to fall, and where it nearly vanishes, both `(P,)`."""
    np_ = namespace(mean)
    # The largest of many logits reaches farther than each.
    reach = np_.sqrt(REACH**2 + 2 * _log_count(count))[:, None]
    sigma = np_.sqrt(variance)
    least, largest = range_of_log_f(mean, sigma, surrogate, reach)
    if surrogate.is_shift_invariant:
        # 1 - w <= sum_j t E[f(z_j)] is a tighter bound than the largest f if variances are small.
        # Without the margin of 2 deviations, the bend of u - exp(-u) would lie where w falls: an
        # error of 1e-5 at 40 nodes.
        largest = np_.minimum(largest, mean + variance / 2 + 2 * sigma)
    largest = np_.where(count > 0, largest + np_.log(np_.maximum(count, 1)), -np_.inf)
    least = np_.where(count > 0, least, -np_.inf)
    # w is at most any one phi, so the class with the largest lower end of f determines where it
    # ends.
    top = np_.max(largest, axis=1)
    total = top + np_.log(np_.sum(np_.exp(largest - top[:, None]), axis=1))
    return -total, -np_.max(least, axis=1)


def fine_enough(logits: Logits, rules: tuple[Rule, ...], surrogate: Surrogate) -> Any:
    """Whether each of `rules` is fine enough for each point, `(rules, P)`; True for the last."""
    np_, lower, upper = namespace(logits.mean), logits.lower, logits.upper
    sigma = np_.sqrt(constant(logits.variance))
    least, largest = np_.min(sigma, axis=1), np_.max(sigma, axis=1)
    softmax = surrogate.is_shift_invariant
    steps = _STEPS_PER_DEVIATION + _STEPS_PER_DECADE / math.log(10) * _log_count(
        logits.multiplicity
    )
    step = np_.maximum(_STEP, least / steps) if softmax else _STEP
    length = upper - lower + _TAIL + math.log(_DECAY)
    # The largest of many wide logits has a smaller spread than each of them.
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
    """Nodes in `s` and their weights, both `(outer, P)`."""
    lower, upper = logits.lower, logits.upper
    u = jnp.linspace(0, 1, rule.outer, dtype=lower.dtype)[:, None]
    if rule.graded:
        # s = end - scale sinh(xi). A class that varies at the distance d below the upper end has a
        # standard deviation of at least d / 13. Otherwise that end would lie lower.
        last, first = _graded_ends(lower, upper)
        xi = first + u * (last - first)
        weight = (last - first) / (rule.outer - 1) * _GRADED_SCALE * jnp.cosh(xi)
        return upper - _GRADED_SCALE * jnp.sinh(xi), weight
    # s = lower + u - exp(-u). Below `lower` w is a power series in t = exp(s), so that the
    # integrand in u falls doubly exponentially at both ends. In s itself the lower end would take
    # 30 units more.
    span = upper - lower + _TAIL + math.log(_DECAY)
    u = u * span - _TAIL
    return lower + u - jnp.exp(-u), span / (rule.outer - 1) * (1 + jnp.exp(-u))


def _graded_ends(lower: Any, upper: Any) -> tuple[Any, float]:
    """Largest and least value of the variable `xi` of a graded rule."""
    least = -math.asinh(math.log(_DECAY) / _GRADED_SCALE)
    largest = namespace(lower).arcsinh((upper - lower + math.exp(_TAIL)) / _GRADED_SCALE)
    return largest, least
