"""How a kernel is evaluated: objects for the argument `method` of layers and functions.

`method=None`, the default everywhere, chooses the fastest method that keeps the promised error. A
method that does not apply to an axis raises a `ValueError`, which names those that do.

| axis | methods |
|---|---|
| classes | `Interpolate()`, `Direct()` |
| positions, order 2 | `Direct()` |
| positions, other orders and softmax | `QuasiMonteCarlo(n_points, seed, error)`, `Series()` |
| attention | `QuasiMonteCarlo(n_points, seed, error)`, at order 2 `Direct()` |
| infinite width | none: closed forms |
"""

import dataclasses
import math
import numbers
from typing import Any

from taylor_softmax._numerics.arguments import Validated, check_integer

__all__ = ["Direct", "Interpolate", "Method", "QuasiMonteCarlo", "Series"]


class Method:
    """Base class of all methods."""


@dataclasses.dataclass(frozen=True)
class Direct(Method):
    """Quadrature for every entry: slow, and the reference for tests of the interpolation."""


@dataclasses.dataclass(frozen=True)
class Interpolate(Method):
    """Interpolation in the variances and the correlation, with coefficients for all entries."""


@dataclasses.dataclass(frozen=True)
class QuasiMonteCarlo(Method):
    """An estimate with quasi-random points, of the part of a kernel that is not known exactly.

    The points are the same at every call, so that results are reproducible.

    Attributes:
      n_points: largest number of points for each pair of inputs, not counting their negatives. A
        power of two balances them best. None takes the default of the axis.
      seed: number of the set of points. Two seeds give two independent estimates.
      error: the error to reach, relative to the scale of the kernel. Points are drawn until their
        spread says that it is reached, or until there are `n_points`. Half the error takes about
        four times as many points. None draws a fixed number of points.

    Raises:
      TypeError, ValueError: `n_points` is not a positive integer, `seed` not a nonnegative one, or
        `error` not a positive number.
    """

    n_points: Validated[int | None] = None
    _: dataclasses.KW_ONLY
    seed: Validated[int] = 0
    error: Validated[float | None] = None

    def __post_init__(self) -> None:
        if self.n_points is not None:
            object.__setattr__(self, "n_points", check_integer("n_points", self.n_points, least=1))
        object.__setattr__(self, "seed", check_integer("seed", self.seed, least=0))
        if self.error is not None:
            object.__setattr__(self, "error", _check_error(self.error))


def _check_error(error: Any) -> float:
    """Returns `error` as a `float`; raises `TypeError` or `ValueError` if it is not positive."""
    hint = "It is static: under `jit` it can't be an argument."
    if isinstance(error, bool) or not isinstance(error, numbers.Real):
        raise TypeError(f"`error` must be a positive number, got {error!r}. {hint}")
    if not (math.isfinite(value := float(error)) and value > 0):
        raise ValueError(f"`error` must be positive and finite, got {value}.")
    return value


@dataclasses.dataclass(frozen=True)
class Series(Method):
    """The sum of the terms of low degree, which are known exactly: a rough and fast estimate."""


def choose(method: Any, *applicable: Method, axis: str) -> Method:
    """Returns `method`, or the first of the `applicable` methods if it is None.

    A `QuasiMonteCarlo` without `n_points` gets the number of the applicable one.

    Args:
      method: the argument of the user.
      applicable: methods of the kinds that apply, with their defaults.
      axis: name of the axis, for messages.

    Raises:
      TypeError: `method` is not an object of this module.
      ValueError: `method` is of a kind that does not apply.
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
    if isinstance(method, QuasiMonteCarlo) and method.n_points is None:
        (default,) = (kind for kind in applicable if isinstance(kind, QuasiMonteCarlo))
        return dataclasses.replace(method, n_points=default.n_points)
    return method
