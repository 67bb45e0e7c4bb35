"""The surrogates `f` that a softmax normalises: `exp` and its Taylor polynomials.

Taylor softmax of even order `m` is `y_i = f_m(z_i) / sum_j f_m(z_j)` with
`f_m(z) = sum_{k <= m} z^k / k!` (de Brebisson & Vincent 2016, arXiv 1511.05042, eq. 5); softmax is
`f = exp`. What users pass is `order`, the even integer `m`, or `None` for softmax; `parse` makes a
`Surrogate` of it where it comes in, and nothing behind that asks for the order again.
"""

import abc
import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import scipy.optimize
from jax import Array, lax

from taylor_softmax._numerics.arguments import constant, namespace

# The largest order of Taylor softmax over a finite axis whose kernels are tested. At this order
# they are those of softmax to many digits.
LARGEST_FINITE_ORDER = 32

# Roots are found with this many decimal digits. The roots of `f_m` are ill-conditioned in double
# precision (condition number 1e8 at order 32, growing like `exp(m / 2)`); the digits lost at order
# `m` are about `m / 2`, so that `40 + m` always leaves more than a double holds.
_ROOT_DIGITS = 40


@dataclasses.dataclass(frozen=True)
class Surrogate(abc.ABC):
    """The function `f > 0` that a softmax normalises: `y_i = f(z_i) / sum_j f(z_j)`.

    Surrogates are hashable, and equal where their functions are: `jit` takes them as static.

    Attributes:
      order: of the Taylor polynomial; None for `exp`.
    """

    order: int | None

    @property
    @abc.abstractmethod
    def is_shift_invariant(self) -> bool:
        """Whether a shift common to all logits leaves the softmax as it is."""

    @property
    @abc.abstractmethod
    def has_closed_form(self) -> bool:
        """Whether Gaussian expectations of `exp(-t f)` are elementary."""

    @property
    @abc.abstractmethod
    def minimiser(self) -> float:
        """Where `f` is smallest; it falls before and rises after."""

    @abc.abstractmethod
    def log_value(self, z: Any) -> Any:
        """`log f(z)`, of the shape of `z`; finite and differentiable for `|z|` up to 1e37.

        NumPy's arrays are computed in NumPy, which compiles nothing.
        """

    @abc.abstractmethod
    def relative_change(self, z: Array, step: Array) -> Array:
        """`f(z + step) / f(z) - 1`, with an error of rounding relative to this itself."""

    @abc.abstractmethod
    def _relative(self, z: Array, axis: int | tuple[int, ...]) -> Array:
        """`f(z)`, divided by a number for each row along `axis` that keeps all sums finite."""

    @abc.abstractmethod
    def _relative_slopes(self, z: Array, axis: int) -> tuple[Array, Array, Array]:
        """`f`, `f'` and `f''`, divided by such a number."""

    def softmax(
        self, z: Array, *, axis: int | tuple[int, ...] = -1, where: Array | None = None
    ) -> Array:
        """`f(z_i) / sum_j f(z_j)` over `axis`, of the shape of `z`.

        Finite for `|z|` up to 1e37 (1e307 in float64): numerator and denominator are first divided
        by a common power.

        Args:
          where: boolean, broadcasts with `z`. Entries where it is False leave the sum and become 0.
        """
        if where is not None:
            # Any value does that does not raise the largest, and is finite where nothing is left.
            z = jnp.where(where, z, jnp.min(jnp.where(where, z, 0), axis=axis, keepdims=True))
        values = self._relative(z, axis)
        if where is None:
            return values / jnp.sum(values, axis=axis, keepdims=True)
        values = jnp.where(where, values, 0)
        total = jnp.sum(values, axis=axis, keepdims=True)
        return values / jnp.where(total > 0, total, 1)

    def ratios(self, z: Array, present: Array, *, axis: int = -1) -> tuple[Array, Array, Array]:
        """`f(z_i)`, `f'(z_i)` and `f''(z_i)` over `sum_j f(z_j)`, along `axis`.

        Args:
          z: the logits.
          present: 1 or 0, broadcasts with `z`: the positions that there are; the others are 0.
        """
        lowest = jnp.min(z, axis, keepdims=True)
        relative = self._relative_slopes(jnp.where(present > 0, z, lowest), axis)
        total = jnp.sum(present * relative[0], axis, keepdims=True)
        total = jnp.where(total > 0, total, 1)
        value, slope, curvature = (present * x / total for x in relative)
        return value, slope, curvature


@dataclasses.dataclass(frozen=True)
class Exponential(Surrogate):
    """`f = exp`: softmax itself."""

    order: None = None

    def __str__(self) -> str:
        return "softmax"

    @property
    def is_shift_invariant(self) -> bool:
        return True

    @property
    def has_closed_form(self) -> bool:
        return False

    @property
    def minimiser(self) -> float:
        return -math.inf

    def log_value(self, z: Any) -> Any:
        return z

    def relative_change(self, z: Array, step: Array) -> Array:
        return jnp.expm1(step)

    def _relative(self, z: Array, axis: int | tuple[int, ...]) -> Array:
        return jnp.exp(z - lax.stop_gradient(jnp.max(z, axis=axis, keepdims=True)))

    def _relative_slopes(self, z: Array, axis: int) -> tuple[Array, Array, Array]:
        value = self._relative(z, axis)
        return value, value, value


@dataclasses.dataclass(frozen=True)
class TaylorPolynomial(Surrogate):
    """`f_m(z) = sum_{k <= m} z^k / k!` of even order `m`, which is positive."""

    order: int

    def __str__(self) -> str:
        return f"Taylor softmax of order {self.order}"

    @property
    def is_shift_invariant(self) -> bool:
        return False

    @property
    def has_closed_form(self) -> bool:
        # exp(-t f_2) is Gaussian.
        return self.order == 2

    @property
    def minimiser(self) -> float:
        return _minimiser(self.order)

    def log_value(self, z: Any) -> Any:
        # `softmax` divides by a common power. Here each entry has a power of its own.
        scale, log = self._scale(abs(z)), namespace(z).log
        return log(self._scaled(z, scale)) + self.order * log(scale)

    def relative_change(self, z: Array, step: Array) -> Array:
        roots = _quadratic_factors(self.order)
        logarithm = jnp.zeros_like(z * step)
        for real, imag in zip(roots.real, roots.imag, strict=True):
            # ((z + step - real)^2 + imag^2) / ((z - real)^2 + imag^2), from finite factors.
            size = jnp.maximum(jnp.abs(z - real), imag)
            distance, shift = (z - real) / size, step / size
            change = shift * (2 * distance + shift) / (distance**2 + (imag / size) ** 2)
            logarithm = logarithm + jnp.log1p(change)
        return jnp.expm1(logarithm)

    def _relative(self, z: Array, axis: int | tuple[int, ...]) -> Array:
        largest = jnp.max(jnp.abs(z), axis=axis, keepdims=True, initial=0.0)
        return self._scaled(z, self._scale(largest))

    def _relative_slopes(self, z: Array, axis: int) -> tuple[Array, Array, Array]:
        scale = self._scale(jnp.max(jnp.abs(z), axis=axis, keepdims=True))
        ones = jnp.ones_like(z)

        def value_and_slope(z: Array) -> tuple[Array, Array]:
            return jax.jvp(lambda z: self._scaled(z, scale), (z,), (ones,))

        (value, slope), (_, curvature) = jax.jvp(value_and_slope, (z,), (ones,))
        return value, slope, curvature

    def _scale(self, largest: Any) -> Any:
        """The number by which logits of that size are divided.

        Ratios of `f` don't depend on it, nor do their gradients, so that it needs none.
        """
        unit = _quadratic_factors(self.order).unit
        return constant(namespace(largest).maximum(1.0, largest / unit))

    def _scaled(self, z: Any, scale: Any) -> Any:
        """`f_m(z) / scale^m` as a product of `m/2` positive quadratics.

        Horner's form of `f_m` cancels for negative `z`: in float32, at order 32, it turns negative
        at `z = -10.5`. The product is positive by construction and right to `m` roundings.
        """
        roots = _quadratic_factors(self.order)
        # Every factor is divided by the m-th root of m!, which alone would overflow.
        unit = roots.unit * scale
        value = namespace(z).ones_like(z * scale)
        for real, imag in zip(roots.real, roots.imag, strict=True):
            value = value * (((z - real) / unit) ** 2 + (imag / unit) ** 2)
        return value


def parse(order: Any, *, finite: bool = True) -> Surrogate:
    """The surrogate that the public argument `order` names, or what is wrong with it.

    Args:
      order: an even integer, or None for softmax.
      finite: whether the axis is, over which orders end at 32.

    Raises:
      TypeError: `order` is not an integer (booleans are not).
      ValueError: `order` is odd, zero or negative.
      NotImplementedError: `order` is beyond 32 over a finite axis.
    """
    if order is None:
        return Exponential()
    hint = "Pass an even integer >= 2, or `None` for softmax itself."
    if isinstance(order, bool | np.bool_):
        raise TypeError(f"`order` must be an integer, got the boolean {order!r}. {hint}")
    try:
        value = operator.index(order)
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
    if finite and value > LARGEST_FINITE_ORDER:
        raise NotImplementedError(
            f"`order` over a finite axis is at most {LARGEST_FINITE_ORDER}, got {value}. It is "
            f"softmax's own to many digits by then: use softmax (`order=None`), or, in a layer, "
            f"`infinite_width=True`, which takes every even order."
        )
    return TaylorPolynomial(value)


@functools.cache
def _minimiser(order: int) -> float:
    """The real root of `f_m' = f_{m-1}`; `f_m'' = f_{m-2} > 0`, so that there is one."""
    roots = _quadratic_factors(order)
    real, imag = np.array(roots.real), np.array(roots.imag)
    # The slope of log f, since the polynomial f_{m-1} cancels: 1e-9 of the root at order 32.
    solution = scipy.optimize.root_scalar(
        lambda z: np.sum((z - real) / ((z - real) ** 2 + imag**2)), bracket=(-order, 0)
    )
    return float(solution.root)


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
