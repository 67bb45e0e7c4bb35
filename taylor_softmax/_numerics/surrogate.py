"""The surrogates `f` that a softmax layer normalises: `exp` and its Taylor polynomials.

Taylor softmax of even order `m` is `y_i = f_m(z_i) / sum_j f_m(z_j)` with
`f_m(z) = sum_{k <= m} z^k / k!` (de Brebisson & Vincent 2016, arXiv 1511.05042, eq. 5); softmax is
`f = exp`. Throughout the library `order` is the even integer `m`, or `None` for softmax.
"""

import functools
import math
import operator
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import scipy.optimize
from jax import Array, lax

# Roots are found with this many decimal digits. The roots of `f_m` are ill-conditioned in double
# precision (condition number 1e8 at order 32, growing like `exp(m / 2)`); the digits lost at order
# `m` are about `m / 2`, so that `40 + m` always leaves more than a double holds.
_ROOT_DIGITS = 40


@overload
def check_order(order: Any, *, allow_softmax: Literal[False]) -> int: ...
@overload
def check_order(order: Any, *, allow_softmax: bool = True) -> int | None: ...
def check_order(order: Any, *, allow_softmax: bool = True) -> Any:
    """Returns `order` as an `int` (or `None`), or says what is wrong with it.

    Raises:
      TypeError: `order` is not an integer (booleans are not).
      ValueError: `order` is odd, zero or negative.
    """
    if order is None and allow_softmax:
        return None
    hint = "Pass an even integer >= 2" + (
        ", or `None` for softmax itself." if allow_softmax else "."
    )
    if isinstance(order, bool | np.bool_):
        raise TypeError(f"`order` must be an integer, got the boolean {order!r}. {hint}")
    try:
        value = operator.index(order)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise TypeError(
            f"`order` must be an integer, got {order!r} of type {type(order).__name__}. {hint}"
        ) from None
    if value < 2:
        raise ValueError(f"`order` must be positive, got {value}. {hint}")
    if value % 2:
        raise ValueError(
            f"`order` must be even, got {value}: Taylor polynomials of `exp` of odd order have a "
            f"real root, so the normaliser of their softmax can vanish. {hint}"
        )
    return value


def softmax(
    z: Array,
    *,
    order: int | None,
    axis: int | tuple[int, ...] = -1,
    where: Array | None = None,
) -> Array:
    """Softmax or Taylor softmax over `axis`: `f(z_i) / sum_j f(z_j)`, of the shape of `z`.

    Finite for `|z|` up to 1e37 (1e307 in float64): numerator and denominator are first divided by a
    common power.

    Args:
      where: boolean, broadcasts with `z`. Entries where it is False leave the sum and become 0.
    """
    if where is not None:
        # Anything that does not raise the largest, and is finite where nothing is left.
        z = jnp.where(where, z, jnp.min(jnp.where(where, z, 0), axis=axis, keepdims=True))
    if order is None:
        if where is None:
            return jax.nn.softmax(z, axis=axis)
        values = jnp.exp(z - lax.stop_gradient(jnp.max(z, axis=axis, keepdims=True)))
    else:
        largest = jnp.max(jnp.abs(z), axis=axis, keepdims=True, initial=0.0)
        # The ratio does not depend on the scale, so neither does its gradient.
        scale = lax.stop_gradient(jnp.maximum(1.0, largest / _quadratic_factors(order).unit))
        values = _scaled_taylor(z, scale, order)
    if where is None:
        return values / jnp.sum(values, axis=axis, keepdims=True)
    values = jnp.where(where, values, 0)
    total = jnp.sum(values, axis=axis, keepdims=True)
    return values / jnp.where(total > 0, total, 1)


def ratios(z: Array, present: Array, *, order: int | None) -> tuple[Array, Array, Array]:
    """`f(z_i)`, `f'(z_i)` and `f''(z_i)` over `sum_j f(z_j)`, along the last axis.

    Args:
      z: `(..., S)`.
      present: 1 or 0, `(S,)`: the positions that there are; the others are 0.
    """
    if order is None:
        value = softmax(z, order=None, where=present > 0)
        return value, value, value
    largest = jnp.max(jnp.abs(z), axis=-1, keepdims=True)
    scale = lax.stop_gradient(jnp.maximum(1.0, largest / _quadratic_factors(order).unit))
    ones = jnp.ones_like(z)

    def value_and_slope(z: Array) -> tuple[Array, Array]:
        return jax.jvp(lambda z: _scaled_taylor(z, scale, order), (z,), (ones,))

    (value, slope), (_, curvature) = jax.jvp(value_and_slope, (z,), (ones,))
    total = jnp.sum(present * value, -1, keepdims=True)
    total = jnp.where(total > 0, total, 1)
    return present * value / total, present * slope / total, present * curvature / total


def normalised(x: Array, variance: Array, *, order: int | None) -> tuple[Array, Array]:
    """`f(sigma x) / E[f]` and `f'(sigma x) / E[f]` with `E[f] = E[f(sigma X)]`, `X ~ N(0, 1)`.

    Dividing by the mean keeps both within the range of float32 at any variance (`exp(500)` is
    not): a softmax does not change when `f` is multiplied by a constant.

    Args:
      x: standard normal abscissae, any shape that broadcasts with `variance`.
      variance: `sigma^2 > 0`.
      order: even order, or `None` for softmax.
    """
    sigma = jnp.sqrt(variance)
    if order is None:
        value = jnp.exp(sigma * x - variance / 2)
        return value, value
    z = sigma * x
    largest = jnp.max(jnp.abs(z), initial=0.0)
    scale = lax.stop_gradient(jnp.maximum(1.0, largest / _quadratic_factors(order).unit))
    value, slope = jax.jvp(lambda z: _scaled_taylor(z, scale, order), (z,), (jnp.ones_like(z),))
    mean = _scaled_mean(variance, scale, order)
    return value / mean, slope / mean


def log_value(z: Array, *, order: int | None) -> Array:
    """`log f(z)`, of the shape of `z`; finite and differentiable for `|z|` up to 1e37."""
    if order is None:
        return z
    # What a common power of numerator and denominator is to `softmax`, each entry has of its own.
    scale = lax.stop_gradient(jnp.maximum(1.0, jnp.abs(z) / _quadratic_factors(order).unit))
    return jnp.log(_scaled_taylor(z, scale, order)) + order * jnp.log(scale)


@functools.cache
def minimiser(order: int | None) -> float:
    """Where `f` is smallest: the real root of `f_m' = f_{m-1}`, for softmax `-inf`.

    `f_m'' = f_{m-2} > 0`, so that `f` falls before it and rises after it.
    """
    if order is None:
        return -math.inf
    roots = _quadratic_factors(order)
    real, imag = np.array(roots.real), np.array(roots.imag)
    # The slope of log f, since the polynomial f_{m-1} cancels: 1e-9 of the root at order 32.
    solution = scipy.optimize.root_scalar(
        lambda z: np.sum((z - real) / ((z - real) ** 2 + imag**2)), bracket=(-order, 0)
    )
    return float(solution.root)


def _scaled_taylor(z: Array, scale: Array, order: int) -> Array:
    """`f_m(z) / scale^m` as a product of `m/2` positive quadratics.

    Horner's form of `f_m` cancels for negative `z`: in float32, at order 32, it turns negative at
    `z = -10.5`. The product is positive by construction and right to `m` roundings.
    """
    roots = _quadratic_factors(order)
    # Every factor is divided by the m-th root of m!, which alone would overflow.
    unit = roots.unit * scale
    value = jnp.ones_like(z * scale)
    for real, imag in zip(roots.real, roots.imag, strict=True):
        value = value * (((z - real) / unit) ** 2 + (imag / unit) ** 2)
    return value


def _scaled_mean(variance: Array, scale: Array, order: int) -> Array:
    """`E[f_m(z)] / scale^m = sum_{j <= m/2} (v/2)^j / j! / scale^m`, `z ~ N(0, v)`."""
    half, shrink = variance / (2 * scale**2), 1 / scale**2
    total, term = jnp.ones_like(half), jnp.ones_like(half)
    for j in range(1, order // 2 + 1):
        term = term * half / j
        total = total * shrink + term
    return total


class _QuadraticFactors:
    """`f_m(z) = prod_j ((z - real_j)^2 + imag_j^2) / unit^m`, `unit = (m!)^(1/m)`."""

    def __init__(self, order: int):
        # Double precision finds the roots of `f_m(m w)` well enough to start from; mpmath alone
        # would need a second at order 32.
        ratios = np.cumprod(order / np.arange(1, order + 1))
        start = order * np.roots([*ratios[::-1], 1.0])
        with mpmath.workdps(_ROOT_DIGITS + order):
            coefficients = [1 / mpmath.factorial(k) for k in range(order, -1, -1)]
            roots = mpmath.polyroots(
                coefficients, maxsteps=500, extraprec=8 * order, roots_init=list(start)
            )
            upper = [root for root in roots if root.imag > 0]
            self.real = tuple(float(root.real) for root in upper)
            self.imag = tuple(float(root.imag) for root in upper)
            self.unit = float(mpmath.factorial(order) ** (mpmath.mpf(1) / order))


_quadratic_factors = functools.lru_cache(maxsize=None)(_QuadraticFactors)
