"""Softmax over a finite axis of i.i.d. logits: the class axis of a network's last dense layer.

With `(u_i, v_i) ~ N(0, [[a, c], [c, b]])` for `n` classes and `f` the surrogate,
`D_u = sum_i f(u_i)`, `D_v = sum_i f(v_i)`, exchangeability and rows that sum to 1 leave one number
per pair of inputs,

    E[y(u) y(v)^T] = 1 1^T / n^2 + I(a, c, b; n) (Id - 1 1^T / n),

and `1 / D = int_0^inf exp(-t D) dt` for both normalisers gives it without approximation. With
`t = e^-x`, `s = e^-y` and `F(x, y) = E[exp(-e^-x f(u) - e^-y f(v))]`

    I = int int (F_xy F - F_x F_y) F^(n-2) dx dy,
    dI / dc = n int int F_c (2 F_xy F + (n - 2) F_x F_y) F^(n-3) dx dy

over the plane, in which no surrogate and no variance sets a scale: the trapezoidal rule converges
exponentially in both directions. The second line is the derivative of the first after integration
by parts, which takes x and y off `F_c`; for softmax, where `F_c = F_xy`, all of its terms are
positive. With `X ~ N(0, 1)`, `A(x; X) = exp(-e^-x f(sqrt(a) X))` and
`B(y; X) = E[exp(-e^-y f(v)) | X]` all four factors are products of matrices over nodes in `X`:
`F = E[A B]`, `F_x = E[A' B]`, `F_y = E[A B']`, `F_xy = E[A' B']`, and, by Price's theorem,
`F_c = E[A_u B_v]` with `A_u = -(f' / f)(u) A'`.

Two rules place the nodes. `_product_rule` resolves `f` itself, and is for the polynomials at any
variance and for softmax at small ones. `_graded_rule` is for softmax at large variances, where `F`
is the distribution function of the logits plus Gumbel noise, and all that is steep lies along a
line. At order 2 the integrand is elementary, and emitted by SymPy.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from taylor_softmax._generated.class_axis import class_axis_order_2
from taylor_softmax._numerics.precision import matmul
from taylor_softmax._numerics.quadrature import exponential_rule
from taylor_softmax._numerics.surrogate import Surrogate

# Standard deviations that nodes reach to.
_REACH = 8.5

# The largest standard deviation whose structure the product rule is given the nodes to resolve.
_LARGEST_SIGMA = 1000.0

# Steps of the product rule: in x and in log f, in which `exp(-e^-x f)` is analytic in a strip of
# half-width pi / 2, and in z, where the roots of f are closest to the axis, to which two classes
# are sensitive. 1e-6 or better, measured against two thirds of them at variances 1e-4 to 1e6,
# orders 4 to 32, n = 2 to 1e6.
_X_STEP, _LOG_STEP, _Z_STEP = 0.42, 0.6, 0.32

# Beyond these the integrand is below 1e-12 of its largest value: the lower end since `A` falls like
# exp(-e^-x), the upper one, for up to 1e6 classes, since it is n^2 e^-2x there.
_BELOW, _ABOVE = 4.0, 27.0

# Where softmax passes from one rule to the other; both are right to 1e-8 around it.
_GRADED_FROM = 2.0

# Nodes of the graded rule in x, in y - rho sigma_b x / sigma_a, and in X.
_GRADED_NODES = 161, 141, 121

# Below this variance the covariance is integrated from its slope, which is a mean of products of
# derivatives, while the covariance itself is a difference of terms 1 / variance as large.
_SMALL_VARIANCE = 1e-2


def pair(
    var1: Array, cov12: Array, var2: Array, *, n_classes: int, surrogate: Surrogate
) -> tuple[Array, Array]:
    """`I` and `dI / dc` for one pair of inputs: scalars, variances nonnegative.

    A variance of 0 has no root that could be differentiated: both are taken a little larger, by
    1e-9 (1e-5 in float32), which is the relative error that it makes. What rounding makes of
    `c^2 <= a b` is mended in the same way.
    """
    eps = float(jnp.finfo(var1.dtype).eps)
    shift = 1e-9 if eps < 1e-12 else 1e-5
    limit = jnp.sqrt(var1) * jnp.sqrt(var2)
    # Not the clipped number itself, whose derivative ends at the limit.
    cov12 = cov12 + lax.stop_gradient(jnp.clip(cov12, -limit, limit) - cov12)
    var1, var2 = (v * (1 + 8 * eps) + shift for v in (var1, var2))
    if surrogate.has_closed_form:
        quotient, slope = _elementary(var1, cov12, var2, n_classes, surrogate)
        return cov12 * quotient, slope
    # I is symmetric, and the rules want the larger variance first.
    swap = var2 > var1
    var1, var2 = jnp.where(swap, var2, var1), jnp.where(swap, var1, var2)
    product = functools.partial(_product_rule, n_classes=n_classes, surrogate=surrogate)
    graded = functools.partial(_graded_rule, n_classes=n_classes)

    def both(cov12: Array) -> tuple[Array, Array]:
        if surrogate.order is not None:
            return product(var1, cov12, var2)
        return lax.cond(var1 > _GRADED_FROM, graded, product, var1, cov12, var2)

    def small(cov12: Array) -> tuple[Array, Array]:
        # Two Gauss-Legendre nodes on [0, c] do, since I is a polynomial of low degree in c there.
        unit = jnp.asarray([0.5 - math.sqrt(1 / 12), 0.5 + math.sqrt(1 / 12), 1.0], cov12.dtype)
        nodes = cov12 * unit
        slopes = lax.map(lambda node: both(node)[1], nodes)
        return cov12 * (slopes[0] + slopes[1]) / 2, slopes[2]

    return lax.cond(var2 < _SMALL_VARIANCE, small, both, cov12)


def _elementary(
    var1: Array, cov12: Array, var2: Array, n_classes: int, surrogate: Surrogate
) -> tuple[Array, Array]:
    """`I / c` and `dI / dc` at order 2: emitted integrand, trapezoidal rule in `x` and `y`."""
    (x, x_step), (y, y_step) = (_x_nodes(v, surrogate, 0.3) for v in (var1, var2))
    t, s = jnp.exp(-x)[:, None], jnp.exp(-y)
    log_phi, cross, cross_slope, log_phi_slope = class_axis_order_2(var1, cov12, var2, t, s)
    density = x_step * y_step * t * s * jnp.exp(n_classes * log_phi)
    slope = cross_slope + n_classes * cov12 * cross * log_phi_slope
    return jnp.sum(density * cross), jnp.sum(density * slope)


def _x_nodes(variance: Array, surrogate: Surrogate, step: float) -> tuple[Array, Array]:
    """Equally spaced nodes over where the integrand is not negligible, and their distance."""

    def ends(sigma: Array | float) -> tuple[Array, Array]:
        sigma = jnp.asarray(sigma)
        lowest = surrogate.log_value(jnp.maximum(-_REACH * sigma, surrogate.minimiser))
        top = 0.8 * _REACH * sigma
        highest = jnp.maximum(surrogate.log_value(top), surrogate.log_value(-top))
        return lowest - _BELOW, highest + _ABOVE

    largest = _LARGEST_SIGMA if surrogate.order is not None else 1.1 * math.sqrt(_GRADED_FROM)
    with jax.ensure_compile_time_eval():
        low, high = ends(largest)
        count = math.ceil(float(high - low) / step) + 1
    low, high = ends(jnp.sqrt(variance))
    unit = jnp.asarray(np.linspace(0, 1, count), variance.dtype)
    return low + (high - low) * unit, (high - low) / (count - 1)


def _z_scale(surrogate: Surrogate) -> float:
    """`w` of nodes `w sinh(h k)` in the logit.

    The slope of `log f` is at most about `min(1, m / |z|)`, `m` the order: so spaced they have
    equal steps in `log f` where these matter.
    """
    return (surrogate.order or 64) * _Z_STEP / _LOG_STEP


def _z_nodes(variance: Array, surrogate: Surrogate) -> tuple[Array, Array]:
    """Nodes in the logit `z` and their weights `dz`.

    At most 0.4 standard deviations apart where the variance is small.
    """
    scale = _z_scale(surrogate)
    largest = _LARGEST_SIGMA if surrogate.order is not None else 1.1 * math.sqrt(_GRADED_FROM)
    count = max(
        math.ceil(2 * math.asinh(_REACH * largest / scale) * scale / _Z_STEP),
        math.ceil(2 * _REACH / 0.4),
    )
    end = jnp.arcsinh(_REACH * jnp.sqrt(variance) / scale)
    angle = end * jnp.asarray(np.linspace(-1, 1, count + 1), variance.dtype)
    return scale * jnp.sinh(angle), scale * jnp.cosh(angle) * (2 * end / count)


def _log_f(z: Array, surrogate: Surrogate) -> tuple[Array, Array]:
    """`log f` and its slope."""
    return jax.jvp(surrogate.log_value, (z,), (jnp.ones_like(z),))


def _factors(log_f: Array, x: Array) -> tuple[Array, Array]:
    """`1 - A` and `A'` for `A = exp(-e^-x f)`, from `log f` and `x`."""
    # Beyond, A underflows.
    rate = jnp.exp(jnp.minimum(log_f - x, 6.7))
    return -jnp.expm1(-rate), rate * jnp.exp(-rate)


def _product_rule(
    var1: Array, cov12: Array, var2: Array, *, n_classes: int, surrogate: Surrogate
) -> tuple[Array, Array]:
    (x, x_step), (y, y_step) = (_x_nodes(v, surrogate, _X_STEP) for v in (var1, var2))
    z, spacing = _z_nodes(var1, surrogate)
    sigma = jnp.sqrt(var1)
    density = jnp.exp(-((z / sigma) ** 2) / 2) * spacing / (sigma * math.sqrt(2 * math.pi))
    log_f, log_slope = _log_f(z, surrogate)
    first = _factors(log_f, x[:, None])
    *second, slope2 = _conditional(z, var1, cov12, var2, y, surrogate)
    f_c = matmul(first[1] * (density * log_slope), slope2.T)
    return _double_sums(*_expectations(first, second, density), f_c, x_step * y_step, n_classes)


def _conditional(
    u: Array, var1: Array, cov12: Array, var2: Array, y: Array, surrogate: Surrogate
) -> list[Array]:
    """`1 - B`, `B'` and `-B_v`, `(y, u)`: expectations over `v` given `u`.

    Where the distribution of `v` is wide, over nodes in `v` that resolve `f`; where it is narrow
    beside their distance, `log f` hardly curves over it, and Gauss-Hermite does.
    """
    # var1 var2 > cov12^2: see `pair`.
    tau = jnp.sqrt((var1 * var2 - cov12**2) / var1)
    mean = cov12 / var1 * u
    v, spacing = _z_nodes(var2, surrogate)
    end = spacing.size // 2
    # The distance of nodes at `mean`, by cosh^2 = 1 + sinh^2.
    spacing_at_mean = spacing[end] * jnp.sqrt(1 + (mean / _z_scale(surrogate)) ** 2)
    is_wide = tau > spacing_at_mean
    safe = jnp.where(is_wide, tau, spacing_at_mean)
    wide = jnp.exp(-(((v[:, None] - mean) / safe) ** 2) / 2) * spacing[:, None]
    wide = wide / (safe * math.sqrt(2 * math.pi))
    log_f, log_slope = _log_f(v, surrogate)
    shortfall, rate = _factors(log_f, y[:, None])
    by_nodes = [matmul(f, wide) for f in (shortfall, rate, rate * log_slope)]

    def narrow(total: list[Array], rule: Array) -> tuple[list[Array], None]:
        log_f, log_slope = _log_f(mean + tau * rule[0], surrogate)
        shortfall, rate = _factors(log_f, y[:, None])
        factors = shortfall, rate, rate * log_slope
        return [t + rule[1] * f for t, f in zip(total, factors, strict=True)], None

    node, weight = np.polynomial.hermite_e.hermegauss(14)
    zero = jnp.zeros((y.size, u.size), u.dtype)
    rule = jnp.asarray(np.stack([node, weight / weight.sum()], 1), u.dtype)
    by_gauss, _ = lax.scan(narrow, [zero] * 3, rule)
    return [jnp.where(is_wide, *both) for both in zip(by_nodes, by_gauss, strict=True)]


def _expectations(
    first: Sequence[Array], second: Sequence[Array], density: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """`F`, `1 - F`, `F_x`, `F_y` and `F_xy`, from `(1 - A, A')` and, `(y, X)`, `(1 - B, B')`."""
    value1, shortfall1, slope1 = (x * density for x in (1 - first[0], *first))
    shortfall2, slope2 = second[0].T, second[1].T
    value2 = 1 - shortfall2
    one_minus_f = jnp.sum(shortfall1, 1, keepdims=True) + matmul(value1, shortfall2)
    f_x, f_y = matmul(slope1, value2), matmul(value1, slope2)
    return matmul(value1, value2), one_minus_f, f_x, f_y, matmul(slope1, slope2)


def _double_sums(
    f: Array,
    one_minus_f: Array,
    f_x: Array,
    f_y: Array,
    f_xy: Array,
    f_c: Array,
    cell: Array,
    n_classes: int,
) -> tuple[Array, Array]:
    """`I` and `dI / dc`, with `one_minus_f = 1 - F` to its own precision."""
    near_one = one_minus_f < 0.5
    # Below this, rounding of F, where the integrands are negligible.
    f = jnp.maximum(f, jnp.finfo(f.dtype).eps)
    log_f = jnp.where(
        near_one,
        jnp.log1p(-jnp.where(near_one, one_minus_f, 0)),
        jnp.log(jnp.where(near_one, 1, f)),
    )
    weight = jnp.exp((n_classes - 2) * log_f) * cell
    value = jnp.sum((f_xy * f - f_x * f_y) * weight)
    slope = jnp.sum(f_c * (2 * f_xy + (n_classes - 2) * (f_x / f * f_y)) * weight)
    return value, n_classes * slope


def _sinh_nodes(count: int, scale: Array, reach: Array) -> tuple[Array, Array]:
    """Nodes on `[-reach, reach]`, densest within `scale` of 0, and their trapezoidal weights."""
    end = jnp.arcsinh(reach / scale)
    angle = end * jnp.asarray(np.linspace(-1, 1, count), scale.dtype)
    return scale * jnp.sinh(angle), scale * jnp.cosh(angle) * (2 * end / (count - 1))


def _graded_rule(var1: Array, cov12: Array, var2: Array, *, n_classes: int) -> tuple[Array, Array]:
    """Softmax, `var1 >= var2`, `var1` not small.

    In `x = sigma_a xi`, `y = (c / a) x + d` and `X = xi - e`, `A` depends on `e` alone and `B` on
    `d + c e / sigma_a`: `A(e) = G(sigma_a e)`, `B = H(d + c e / sigma_a)`, with the distribution
    functions G of a Gumbel variable and H of one plus `N(0, tau^2)`, `tau^2 = b - c^2 / a`. What is
    steep lies at `e = 0` and `d = 0`, about which the nodes are graded.
    """
    sigma1, sigma2 = jnp.sqrt(var1), jnp.sqrt(var2)
    tau_squared = (var1 * var2 - cov12**2) / var1
    n_xi, n_d, n_e = _GRADED_NODES
    low, high = -5.0, 8 + (_ABOVE - 1) / sigma1
    xi = low + (high - low) * jnp.asarray(np.linspace(0, 1, n_xi), var1.dtype)
    d, d_weight = _sinh_nodes(n_d, 0.6 * jnp.sqrt(1.6 + tau_squared), 10 * sigma2 + 25)
    e, e_weight = _sinh_nodes(n_e, 0.6 / sigma1, 13 + _ABOVE / sigma1)
    density = jnp.exp(-((xi[:, None] - e) ** 2) / 2) * e_weight / math.sqrt(2 * math.pi)
    cell = sigma1 * (high - low) / (n_xi - 1) * d_weight

    shift = cov12 / sigma1
    first = _factors(-sigma1 * e, jnp.zeros_like(e))
    second = _smoothed_gumbel(d[:, None] + shift * e, tau_squared)
    f, one_minus_f, f_x, f_y, f_xy = _expectations(first, second, density)

    # At c < 0 and d > 0, B is steep where no node is. But A = 1 there, up to what the nodes about
    # e = 0 resolve: with the marginal distribution of v, `E[A B] = E[B] - E[(1 - A) B]`.
    marginal, marginal_slope = _smoothed_gumbel(shift * xi[:, None] + d, var2)
    shortfall1, slope1, shortfall2 = first[0] * density, first[1] * density, second[0].T
    by_marginal = jnp.sum(shortfall1, 1, keepdims=True) + marginal - matmul(shortfall1, shortfall2)
    unresolved = (cov12 < 0) & (d > 0)
    one_minus_f = jnp.where(unresolved, by_marginal, one_minus_f)
    f = jnp.where(unresolved, 1 - by_marginal, f)
    f_y = jnp.where(unresolved, marginal_slope - matmul(shortfall1, second[1].T), f_y)
    f_x_by_marginal = jnp.sum(slope1, 1, keepdims=True) - matmul(slope1, shortfall2)
    f_x = jnp.where(unresolved, f_x_by_marginal, f_x)
    return _double_sums(f, one_minus_f, f_x, f_y, f_xy, f_xy, cell, n_classes)


def _smoothed_gumbel(w: Array, variance: Array) -> tuple[Array, Array]:
    """`1 - H(w)` and `H'(w)`: a Gumbel variable plus `N(0, variance)`.

    The mean over the Gaussian where it is narrow, over the Gumbel variable where it is wide.
    """
    tau = jnp.sqrt(variance)

    def mean(function: Any, node: np.ndarray, weight: np.ndarray) -> tuple[Array, Array]:
        def add(total: tuple[Array, Array], rule: Array) -> tuple[tuple[Array, Array], None]:
            first, second = function(rule[0])
            return (total[0] + rule[1] * first, total[1] + rule[1] * second), None

        zero = jnp.zeros_like(w)
        rule = jnp.asarray(np.stack([node, weight], 1), w.dtype)
        return lax.scan(add, (zero, zero), rule)[0]

    def over_gaussian() -> tuple[Array, Array]:
        node = np.linspace(-8, 8, 65)
        weight = np.exp(-(node**2) / 2)
        return mean(lambda z: _factors(-tau * z, w), node, weight / weight.sum())

    def over_gumbel() -> tuple[Array, Array]:
        # `exponential_rule` has the logarithms of exponential variables: minus Gumbel variables.
        wide = jnp.maximum(tau, 0.5)

        def integrand(log_tau: Array) -> tuple[Array, Array]:
            r = (w + log_tau) / wide
            return jax.scipy.special.ndtr(-r), jnp.exp(-(r**2) / 2) / (
                wide * math.sqrt(2 * math.pi)
            )

        return mean(integrand, *exponential_rule(48))

    return lax.cond(variance < 1.5, over_gaussian, over_gumbel)
