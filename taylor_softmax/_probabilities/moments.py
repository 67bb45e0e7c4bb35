"""Softmax of independent Gaussian logits: expectation and covariance of class probabilities.

With `z_j ~ N(mu_j, v_j)`, `phi_j(t) = E[exp(-t f(z_j))]` and `1 / D = int_0^inf exp(-t D) dt` for
the normaliser `D = sum_j f(z_j)`, one integral over `s = log t` has everything. Let `a_j(s)` and
`b_j(s)` be mean and variance of `t f(z_j)` under the weights tilted by `exp(-t f(z_j))`, so that
`a_j = -d log phi_j / ds`, and

    w(s) = prod_j phi_j,    m(s) = sum_j a_j(s),    int w m ds = 1    (w falls from 1 to 0).

Then `p_i = E[y_i] = int w a_i ds` and `E[y_i y_j] = int w (a_i a_j + [i = j] b_i) ds`. To subtract
`p p^T` from that would leave rounding errors where the variances are small. But outputs sum to 1,
which says `int w m a_i ds = p_i - V_i` with `V_i = int w b_i ds`, and so

    Cov[y] = int w (a - m p) (a - m p)^T ds + (Id - p 1^T) diag(V) (Id - 1 p^T):

positive semi-definite terms whose rows sum to 0, each of the order of the variances.

For softmax this is the Gumbel-max identity: `phi_j(exp(-x))` is the distribution function of
`z_j + g_j` with `g_j` standard Gumbel, and `y_i` the probability that the i-th is the largest; it
is an expectation over either of the two. At order 2 the integrand is elementary: SymPy emits it.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from taylor_softmax._generated.probabilities import logit_order_2
from taylor_softmax._numerics import quadrature
from taylor_softmax._numerics.precision import einsum, log_tiny, off_zero
from taylor_softmax._numerics.surrogate import Surrogate

# Logits beyond this many standard deviations are left out: 2e-9 of the probability.
_REACH = 6.0
# The outer rule begins at `s = lower - exp(_TAIL)` and ends at `upper + log(_DECAY)`: what is left
# out is below 1e-9 of the integral.
_TAIL, _DECAY = 3.1, 21.0
# Largest step of the outer rule. The integrand is analytic for `|Im s| < pi / 2`, so that the error
# falls as `exp(-pi^2 / step)`. For softmax, standard deviations of `sigma` widen that strip.
_STEP, _STEPS_PER_DEVIATION = 0.5, 2.5
# Nodes for a logit per unit of its standard deviation, which is what `f` resolves: softmax has its
# poles at distance pi, Taylor softmax at that of the roots of f (0.89 at order 4).
_SOFTMAX_NODES, _TAYLOR_NODES = 13.0, 40.0
# From this standard deviation on, for softmax, the expectation is taken over the noise instead.
_LEAST_DEVIATION = 1.5
# Where variances are taken about, in units of `t f`: at most here.
_LARGEST_POINT = 4.0
# Logits times outer nodes in one step of the loop over points: 0.5 MB in float64, which stays in
# cache (measured on a CPU, 10,000 points of 10 classes: a quarter of it takes twice as long, twice
# as much the same time).
_BLOCK = 1 << 16


class _Rule(NamedTuple):
    """Numbers of nodes: in `s`, for the expectation over a logit, and over the noise (or 0)."""

    outer: int
    logit: int = 0
    noise: int = 0


# From cheap to expensive. A block of points gets the first that is fine enough for all of them.
# Largest errors measured over 2 to 100 classes and variances of 0.01 to 100: softmax 5e-8 where
# variances are equal and 1e-7 where not, probabilities and covariance alike. 2 nodes less for a
# logit have 3e-7, 2 more for the noise 1e-8.
_SOFTMAX_RULES = (
    _Rule(38, logit=16),
    _Rule(48, logit=20),
    _Rule(40, noise=18),
    # Variances that differ between the classes of a point.
    _Rule(192, logit=20, noise=18),
    _Rule(1024, logit=20, noise=18),
)
# Orders 4 to 32: 1e-8.
_TAYLOR_RULES = (_Rule(48, logit=64), _Rule(128, logit=160), _Rule(256, logit=512))
# No rule but the outer one: 1e-14.
_CLOSED_FORM_RULES = (_Rule(48),)


class Moments(NamedTuple):
    """Moments of class probabilities `y`.

    Attributes:
      mean: `E[y]`, `(..., C)`.
      covariance: `Cov[y]`, `(..., C, C)`, or None.
      total: what `mean` summed to before it was divided by that, `(...)`; 1 but for quadrature.
    """

    mean: Array
    covariance: Array | None
    total: Array


class _Tilted(NamedTuple):
    """`log phi` of each class, and mean and variance (or None) of `t f(z)` under tilted weights."""

    log_phi: Array
    mean: Array
    variance: Array | None


@functools.partial(jax.jit, static_argnames=("surrogate", "covariance"))
def moments(mean: Array, variance: Array, *, surrogate: Surrogate, covariance: bool) -> Moments:
    """Moments of `y` for logits of the given means and variances, both `(N, C)`."""
    n_points, n_classes = mean.shape
    if not n_points:
        empty = jnp.zeros((0, n_classes, n_classes), mean.dtype) if covariance else None
        return Moments(mean, empty, mean.sum(axis=1))
    variance = off_zero(variance)
    if surrogate.is_shift_invariant:
        # Softmax does not see a shift; logits of 1e3 would lose digits.
        mean = mean - lax.stop_gradient(jnp.max(mean, axis=1, keepdims=True))
    rules = _rules(surrogate)
    fine = _fine_enough(lax.stop_gradient(mean), lax.stop_gradient(variance), rules, surrogate)
    branches = [
        functools.partial(_by_rule, rule=rule, surrogate=surrogate, covariance=covariance)
        for rule in rules
    ]

    # Rematerialised in the backward pass, which otherwise would keep every block's intermediates.
    @jax.checkpoint
    def block(points: Array) -> Moments:
        index = jnp.argmax(jnp.all(fine[:, points], axis=1))
        return lax.switch(index, branches, mean[points], variance[points])

    # Points that need the same rule come together, so that few wait for what others need.
    by_need = jnp.argsort(jnp.argmax(fine, axis=0))
    size = max(1, min(n_points, _BLOCK // (n_classes * rules[0].outer)))
    n_blocks = -(-n_points // size)
    padded = jnp.pad(by_need, (0, n_blocks * size - n_points), mode="edge")
    blocks = lax.map(block, padded.reshape(n_blocks, size))
    restore = jnp.argsort(by_need)
    return jax.tree.map(lambda x: x.reshape(n_blocks * size, *x.shape[2:])[restore], blocks)


def _rules(surrogate: Surrogate) -> tuple[_Rule, ...]:
    if surrogate.has_closed_form:
        return _CLOSED_FORM_RULES
    return _SOFTMAX_RULES if surrogate.is_shift_invariant else _TAYLOR_RULES


def _bounds(mean: Array, variance: Array, surrogate: Surrogate) -> tuple[Array, Array]:
    """Where in `s` the product `w` begins to fall, and is about to vanish; `(P, C)` to `(P,)`."""
    low, high = _range_of_log_f(mean, jnp.sqrt(variance), surrogate)
    # w falls below any one phi: the class whose least plausible f is largest ends it.
    return -jnp.max(high, axis=1), -jnp.max(low, axis=1)


def _range_of_log_f(mean: Array, sigma: Array, surrogate: Surrogate) -> tuple[Array, Array]:
    """Least and largest `log f` of a logit, within reach of its mean."""
    left, right = mean - _REACH * sigma, mean + _REACH * sigma
    bottom = jnp.clip(surrogate.minimiser, left, right)
    ends, least = (surrogate.log_value(z) for z in (jnp.stack([left, right]), bottom))
    return least, jnp.max(ends, axis=0)


def _fine_enough(
    mean: Array, variance: Array, rules: tuple[_Rule, ...], surrogate: Surrogate
) -> Array:
    """Whether each of `rules` is fine enough for each point, `(rules, P)`; the last has to be."""
    lower, upper = _bounds(mean, variance, surrogate)
    sigma = jnp.sqrt(variance)
    least, largest = jnp.min(sigma, axis=1), jnp.max(sigma, axis=1)
    softmax = surrogate.is_shift_invariant
    step = jnp.maximum(_STEP, least / _STEPS_PER_DEVIATION) if softmax else _STEP
    length = upper - lower + _TAIL + math.log(_DECAY)
    enough = []
    for rule in rules:
        fine = length <= step * rule.outer
        if rule.noise and not rule.logit:
            fine &= least >= _LEAST_DEVIATION
        elif rule.logit and not rule.noise:
            fine &= largest <= rule.logit / (_SOFTMAX_NODES if softmax else _TAYLOR_NODES)
        enough.append(fine)
    enough[-1] = jnp.ones_like(enough[-1])
    return jnp.stack(enough)


def _by_rule(
    mean: Array, variance: Array, *, rule: _Rule, surrogate: Surrogate, covariance: bool
) -> Moments:
    """`moments` of a block of points, `(P, C)`, by one rule."""
    n_classes = mean.shape[1]
    lower, upper = (lax.stop_gradient(x) for x in _bounds(mean, variance, surrogate))
    # s = lower + u - exp(-u): below `lower` w is a power series in t = exp(s), and both ends of
    # the integrand in u fall off doubly exponentially. In s the lower would take 30 more units.
    span = upper - lower + _TAIL + math.log(_DECAY)
    u = jnp.linspace(0, 1, rule.outer, dtype=mean.dtype)[:, None] * span - _TAIL
    s = lower + u - jnp.exp(-u)
    weight = span / (rule.outer - 1) * (1 + jnp.exp(-u))

    # One long axis: loops over a short one are not vectorised.
    tilted = _tilted(
        mean.ravel(),
        variance.ravel(),
        jnp.repeat(s, n_classes, axis=1),
        rule=rule,
        surrogate=surrogate,
        second=covariance,
    )
    tilted = jax.tree.map(lambda x: x.reshape(rule.outer, *mean.shape), tilted)
    w = weight * jnp.exp(jnp.sum(tilted.log_phi, axis=2))
    p = jnp.sum(w[..., None] * tilted.mean, axis=0)
    total = jnp.sum(p, axis=1)
    p = p / total[:, None]
    if tilted.variance is None:
        return Moments(p, None, total)

    w = w / total
    m = jnp.sum(tilted.mean, axis=2)
    v = jnp.sum(w[..., None] * tilted.variance, axis=0)
    between = jnp.moveaxis(tilted.mean - m[..., None] * p, 0, 1)
    centring = jnp.eye(n_classes, dtype=p.dtype) - p[:, None, :]
    return Moments(p, _gram(w.T, between) + _gram(v, centring), total)


def _gram(weight: Array, rows: Array) -> Array:
    """`sum_k weight_k rows_k rows_k^T` by point, symmetric to the last bit."""
    product = einsum("pki,pkj->pij", weight[:, :, None] * rows, rows)
    return (product + jnp.matrix_transpose(product)) / 2


def _tilted(
    mean: Array, variance: Array, s: Array, *, rule: _Rule, surrogate: Surrogate, second: bool
) -> _Tilted:
    """At `s`, `(outer, M)`, for logits of the given means and variances, `(M,)`."""
    if surrogate.has_closed_form:
        t = jnp.exp(s)
        log_phi, tilted_mean, tilted_variance = logit_order_2(mean, variance, t)
        return _Tilted(log_phi, t * tilted_mean, t**2 * tilted_variance if second else None)
    sigma = jnp.sqrt(variance)
    if not rule.noise:
        return _over_logit(mean, sigma, s, rule.logit, surrogate, second)
    if not rule.logit:
        return _over_noise(mean, sigma, s, rule.noise, second)
    wide = sigma > _LEAST_DEVIATION
    noise = _over_noise(mean, jnp.where(wide, sigma, _LEAST_DEVIATION), s, rule.noise, second)
    logit = _over_logit(mean, jnp.where(wide, 0, sigma), s, rule.logit, surrogate, second)
    return jax.tree.map(lambda a, b: jnp.where(wide, a, b), noise, logit)


def _over_logit(
    mean: Array, sigma: Array, s: Array, n: int, surrogate: Surrogate, second: bool
) -> _Tilted:
    log_f = surrogate.log_value
    low, high = (lax.stop_gradient(x) for x in _range_of_log_f(mean, sigma, surrogate))
    # t f as a product of two factors, of which one belongs to the outer node: a sum of logarithms
    # would cost one more exponential. Centred, neither overflows; from `limit` on exp(-t f) is 0.
    limit = -log_tiny(s.dtype)
    centre = (high + low) / 2
    t = jnp.exp(jnp.minimum(s + centre, high - centre + math.log(limit)))
    # The variance about a point near the mean: about 0 it would cancel for small sigma.
    point = jnp.minimum(t * jnp.exp(log_f(mean) - centre), _LARGEST_POINT)

    x, weight = quadrature.normal_rule(n, _REACH)
    # Here, since within the loop it would be computed again for every outer node.
    f = jnp.exp(log_f(mean + sigma * jnp.asarray(x, s.dtype)[:, None]) - centre)

    def terms(f: Array, weight: Array) -> tuple[Array, ...]:
        value = jnp.minimum(t * f, limit)
        excess = jnp.expm1(-value)
        # What 1 + expm1 has lost where it is small only the variances miss.
        tilt = weight * (jnp.exp(-value) if second else 1 + excess)
        return weight * excess, tilt * value, tilt, tilt * (value - point) ** 2

    shortfall, first, *rest = _sums(terms, f, weight, s, 4 if second else 2)
    phi, log_phi = _from_shortfall(shortfall)
    if not second:
        return _Tilted(log_phi, first / phi, None)
    # Relative to their own sum, which has digits where phi is small and 1 + shortfall has none; the
    # floor, below which nothing matters, keeps 1 / phi^2 finite in derivatives.
    phi, squares = jnp.maximum(rest[0], jnp.finfo(s.dtype).eps ** 2), rest[1]
    first = first / phi
    return _Tilted(log_phi, first, squares / phi - (first - point) ** 2)


def _over_noise(mean: Array, sigma: Array, s: Array, n: int, second: bool) -> _Tilted:
    """The same for softmax, where `exp(-t e^z)` is the probability that `tau ~ Exp(1) > t e^z`.

    So `phi = E[Phi(x)]` with `x = (log tau - s - mean) / sigma` and `Phi` the normal distribution
    function, and by parts `E[(t e^z)^k exp(-t e^z)] = E[tau^(k-1) Phi'(x)] / sigma` for `k = 1, 2`.
    """

    scaled, inverse = (s + mean) / sigma, 1 / sigma

    def terms(log_tau: Array, weight: Array) -> tuple[Array, ...]:
        x = log_tau * inverse - scaled
        shortfall = weight * jax.scipy.special.erfc(x / math.sqrt(2)) / -2
        # Where the density underflows its logarithm does not matter.
        density = weight * jnp.exp(jnp.maximum(-(x**2) / 2, -80.0))
        return shortfall, density, density * jnp.exp(log_tau)

    shortfall, *sums = _sums(terms, *quadrature.exponential_rule(n), s, 2 + second)
    phi, log_phi = _from_shortfall(shortfall)
    first, *squares = (total / (math.sqrt(2 * math.pi) * sigma * phi) for total in sums)
    return _Tilted(log_phi, first, squares[0] - first**2 if second else None)


def _sums(
    terms: Callable[[Array, Array], tuple[Array, ...]],
    nodes: ArrayLike,
    weights: ArrayLike,
    like: Array,
    n_sums: int,
) -> tuple[Array, ...]:
    """Sums over `nodes` of the first `n_sums` arrays that `terms(node, weight)` returns."""

    # One node after the other, with the sums in cache: an axis for the nodes is twice as slow.
    @jax.checkpoint
    def add(sums: tuple[Array, ...], node: tuple[Array, Array]) -> tuple[tuple[Array, ...], None]:
        return tuple(a + b for a, b in zip(sums, terms(*node), strict=False)), None

    rule = tuple(jnp.asarray(x, like.dtype) for x in (nodes, weights))
    return lax.scan(add, (jnp.zeros_like(like),) * n_sums, rule)[0]


def _from_shortfall(shortfall: Array) -> tuple[Array, Array]:
    """`phi` and `log phi` from `phi - 1`, which has the digits where many classes have phi near 1.

    Where `phi` is near 0 all that matters is its absolute error, and that no logarithm is infinite.
    """
    shortfall = jnp.maximum(shortfall, -1 + jnp.finfo(shortfall.dtype).eps)
    return 1 + shortfall, jnp.log1p(shortfall)
