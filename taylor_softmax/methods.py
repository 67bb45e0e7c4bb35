"""How a kernel is evaluated: objects for the argument `method` of layers and functions.

`method=None`, the default everywhere, chooses: the fastest that keeps the promised error. What does
not apply to an axis raises a `ValueError` that names what does.

| axis | methods |
|---|---|
| classes | `Interpolate()`, `Direct()` |
| positions, order 2 | `Direct()` |
| positions, other orders and softmax | `QuasiMonteCarlo(n_points)`, `Series()` |
| infinite width | none: closed forms |
"""

import dataclasses
from typing import Any

from taylor_softmax._numerics.arguments import Validated, check_integer

__all__ = ["Direct", "Interpolate", "Method", "QuasiMonteCarlo", "Series"]


class Method:
    """Base class of all methods."""


@dataclasses.dataclass(frozen=True)
class Direct(Method):
    """Quadrature for every entry: the oracle of the interpolant, and as slow as one."""


@dataclasses.dataclass(frozen=True)
class Interpolate(Method):
    """Interpolation in the variances and the correlation, from coefficients that are shared."""


@dataclasses.dataclass(frozen=True)
class QuasiMonteCarlo(Method):
    """Quasi-random points for what is not known of the derivative in the correlation.

    The points are the same at every call, so that results are reproducible and differentiable.

    Attributes:
      n_points: per pair of inputs, beside their negatives; a power of two balances them best.

    Raises:
      TypeError, ValueError: `n_points` is not a positive integer.
    """

    n_points: Validated[int] = 1 << 13

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_points", check_integer("n_points", self.n_points, least=1))


@dataclasses.dataclass(frozen=True)
class Series(Method):
    """The exact terms of low degree alone: a rough and fast estimate."""


def choose(method: Any, *applicable: Method, axis: str) -> Method:
    """`method`, or the first of the `applicable` ones if it is None.

    Args:
      axis: what to call it in the message.

    Raises:
      TypeError: `method` is no method.
      ValueError: `method` is none of the kinds that apply.
    """
    if method is None and applicable:
        return applicable[0]
    names = ", ".join(f"`{candidate}`" for candidate in applicable)
    hint = f"Pass None or one of {names}." if applicable else "Pass None: it has a closed form."
    if not isinstance(method, Method):
        raise TypeError(
            f"`method` must be an object of `taylor_softmax.methods`, got {method!r}. {hint}"
        )
    if not isinstance(method, tuple(type(candidate) for candidate in applicable)):
        raise ValueError(f"`method={method}` does not apply to {axis}. {hint}")
    return method
