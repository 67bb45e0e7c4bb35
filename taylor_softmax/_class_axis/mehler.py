"""The class covariance at small variances, by Mehler's formula, in which the two inputs separate.

With `(u_i, v_i) ~ N(0, [[a, c], [c, b]])` for `n` classes and `f` the surrogate,
`D_u = sum_i f(u_i)`, `D_v = sum_i f(v_i)`, exchangeability and rows that sum to 1 leave one number
per pair of inputs,

    E[y(u) y(v)^T] = 1 1^T / n^2 + I(a, c, b; n) (Id - 1 1^T / n),

and `1 / D = int_0^inf exp(-t D) dt` for both normalisers gives it without approximation:

    I = int_0^inf int_0^inf  L_ts exp(n L) dt ds,   L(t, s) = log E[exp(-t f(u_1) - s f(v_1))].

`L_ts` is proportional to `c`; everything here computes the quotient `I / c`, which keeps its digits
when the covariance is small. The integrand is elementary at order 2 and emitted by SymPy. For the
other orders and softmax Mehler's formula separates the two inputs: with `X ~ N(0, 1)`, normalised
Hermite polynomials `h_k` and

    l(t; a) = log E[exp(-t f(sqrt(a) X))],
    alpha_k(t; a) = E[h_k(X) exp(-t f(sqrt(a) X))] / exp(l(t; a)),

    L(t, s) = l(t; a) + l(s; b) + log(1 + R),   R = sum_{k >= 1} rho^k alpha_k(t; a) alpha_k(s; b),

so that what is expensive belongs to one input, and a pair costs one product of small matrices.
`L_ts = (R_ts (1 + R) - R_t R_s) / (1 + R)^2`: nothing nearly equal is subtracted.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from taylor_softmax._generated.class_axis import class_axis_order_2
from taylor_softmax._numerics import quadrature
from taylor_softmax._numerics.precision import log_tiny, matmul
from taylor_softmax._numerics.surrogate import Surrogate

# Nodes of the outer rule in each of t and s. Measured at order 2 over n = 2 to 100,000 and
# variances up to 20: 24 nodes 4e-8, 28 nodes 5e-9, 32 nodes 1e-10; softmax, variance 10, n = 10,
# in the derivative: 28 nodes 1e-5. The cost of a pair grows as the square.
_OUTER_NODES = 28

# Rule for one input's logits, orders above 2 and softmax.
_NORMAL_NODES, _NORMAL_REACH = 128, 8.0


def _degrees(n_classes: int) -> int:
    """Number of Hermite degrees. Few classes make sharp functions of each, which need more.

    Measured against 360 degrees, relative to the value at correlation 1, variances up to 4, `I`
    and `dI / dc`: order 8, n = 3: 2e-7 and 1e-5 with 96, 1e-8 and 1e-6 with 144; order 16, n = 10,
    variance 10: 2e-6 and 8e-5 with 96. Softmax, n = 3: 9e-9 and 1e-7 with 96 already.
    """
    return 160 if n_classes < 10 else 96


class HermiteExpansion(NamedTuple):
    """What Mehler's formula needs of one input.

    Attributes:
      log_phi: `l(t)`, `(T,)`.
      factors: `alpha_k(t) / sigma`, `k >= 1`, above its derivative in `t`, `(2 T, K)`.
    """

    log_phi: Array
    factors: Array


class Input(NamedTuple):
    """What the integrand of a pair needs of one of its two inputs.

    Attributes:
      variance: of the logits.
      node: nodes in `t` of the outer rule, `(T,)`.
      weight: their weights, `(T,)`.
      expansion: None at order 2, which is elementary.
    """

    variance: Array
    node: Array
    weight: Array
    expansion: HermiteExpansion | None


def expand(variance: Array, *, n_classes: int, surrogate: Surrogate) -> Input:
    """The `Input` of one input with logits of (scalar, positive) `variance`."""
    tau, weight = (jnp.asarray(x, variance.dtype) for x in quadrature.half_line_rule(_OUTER_NODES))
    # tau = n E[f] t is of order 1 where the weight is, at any number of classes and variance.
    if surrogate.has_closed_form:
        scale = 1 / (n_classes * (1 + variance / 2))
        t, weight = tau * scale, weight * scale
        # f_2 >= 1/2, so that log phi(t) <= -t / 2.
        t, weight = _drop_underflow(t, weight, -t / 2, n_classes)
        return Input(variance, t, weight, None)

    x, normal_weight = quadrature.normal_rule(_NORMAL_NODES, _NORMAL_REACH)
    degrees = np.arange(1, _degrees(n_classes) + 1)
    hermite = quadrature.hermite_functions(x, degrees.size).T / np.sqrt(degrees)
    x, normal_weight, hermite = (
        jnp.asarray(array, variance.dtype) for array in (x, normal_weight, hermite)
    )
    # Here f comes divided by E[f].
    value, slope = surrogate.normalised(x, variance)
    t, weight = tau / n_classes, weight / n_classes
    # Where exp(-t f) underflows at every node f does not matter, but its powers would overflow.
    least = lax.stop_gradient(jnp.min(value))
    visible = value < least - log_tiny(t.dtype) / t[0]
    value, slope = jnp.where(visible, value, least), jnp.where(visible, slope, 0)
    normal_weight = jnp.where(visible, normal_weight, 0)
    log_phi, _ = _tilt(t, value, normal_weight)
    t, weight = _drop_underflow(t, weight, log_phi, n_classes)
    log_phi, tilted = _tilt(t, value, normal_weight)
    mean = matmul(tilted, value)
    # alpha_k / sigma = E[h_{k-1}(X) d/dz exp(-t f(z))] / (sqrt(k) phi), Stein's lemma: projecting
    # on h_k itself would lose digits as 1 / sigma.
    first = -t[:, None] * slope * tilted
    second = slope * tilted * (t[:, None] * (value - mean[:, None]) - 1)
    factors = matmul(jnp.concatenate([first, second]), hermite)
    return Input(variance, t, weight, HermiteExpansion(log_phi, factors))


def _tilt(t: Array, value: Array, normal_weight: Array) -> tuple[Array, Array]:
    """`l(t)`, and the weights of the normal rule tilted by `exp(-t f)`, `(T, nodes)`."""
    # Taking the smallest value out of the exponent keeps phi from underflowing for large t.
    least = lax.stop_gradient(jnp.min(value))
    exponent = -t[:, None] * (value - least)
    tilted = jnp.exp(exponent) * normal_weight
    phi = jnp.sum(tilted, axis=1)
    # log phi to relative precision, also where t is O(1/n) and phi is 1 - O(1/n).
    shortfall = matmul(jnp.expm1(exponent), normal_weight)
    near_one = shortfall > -0.5
    log_phi = -t * least + jnp.where(
        near_one, jnp.log1p(jnp.where(near_one, shortfall, 0.0)), jnp.log(phi)
    )
    return log_phi, tilted / phi[:, None]


def _drop_underflow(t: Array, weight: Array, log_phi: Array, n_classes: int) -> tuple[Array, Array]:
    """Takes the nodes where `phi^n` underflows to 0, with weight 0.

    Nothing is left of the integrand there, but powers of `t` in it would overflow.
    """
    alive = n_classes * lax.stop_gradient(log_phi) > log_tiny(t.dtype)
    return jnp.where(alive, t, 0), jnp.where(alive, weight, 0)


def pair(one: Input, two: Input, cov12: Array, *, n_classes: int) -> tuple[Array, Array]:
    """`I / c` and `dI / dc` of one pair of inputs with (scalar) covariance `c = cov12`."""
    outer_weight = one.weight[:, None] * two.weight
    if one.expansion is None or two.expansion is None:
        log_phi, cross, cross_slope, log_phi_slope = class_axis_order_2(
            one.variance, cov12, two.variance, one.node[:, None], two.node
        )
        density = outer_weight * jnp.exp(n_classes * log_phi)
        slope = cross_slope + n_classes * cov12 * cross * log_phi_slope
        return jnp.sum(density * cross), jnp.sum(density * slope)

    scale = lax.rsqrt(one.variance * two.variance)
    log_phi = n_classes * (one.expansion.log_phi[:, None] + two.expansion.log_phi)
    one_factors, two_factors = one.expansion.factors, two.expansion.factors

    def quotient(cov12: Array) -> Array:
        rho = jnp.full(one_factors.shape[1], cov12 * scale).at[0].set(1.0)
        products = matmul(one_factors * jnp.cumprod(rho), two_factors.T)
        r, r_s = products[:_OUTER_NODES, :_OUTER_NODES], products[:_OUTER_NODES, _OUTER_NODES:]
        r_t, r_ts = products[_OUTER_NODES:, :_OUTER_NODES], products[_OUTER_NODES:, _OUTER_NODES:]
        ratio = cov12 * r  # R = phi(t, s) / (phi(t) phi(s)) - 1, at least -1 up to rounding
        floor = -1 + jnp.finfo(ratio.dtype).eps
        tilt = jnp.exp(log_phi + (n_classes - 2) * jnp.log1p(jnp.maximum(ratio, floor)))
        return jnp.sum(outer_weight * tilt * (r_ts * (1 + ratio) - cov12 * r_t * r_s))

    value, slope = jax.jvp(quotient, (cov12,), (jnp.ones_like(cov12),))
    return value, value + cov12 * slope
