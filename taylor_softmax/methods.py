"""How a kernel is evaluated: objects for the argument `method` of layers and functions.

`method=None`, the default everywhere, chooses: the fastest that keeps the promised error. What does
not apply to an axis raises a `ValueError` that names what does.

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
    """Quadrature for every entry: the oracle of the interpolant, and as slow as one."""


@dataclasses.dataclass(frozen=True)
class Interpolate(Method):
    """Interpolation in the variances and the correlation, from coefficients that are shared."""


@dataclasses.dataclass(frozen=True)
class QuasiMonteCarlo(Method):
    """Quasi-random points for what is not known of the derivative in the correlation.

    The points are the same at every call, so that results are reproducible.

    Attributes:
      n_points: how many at most, per pair of inputs, beside their negatives; a power of two
        balances them best. None is what the axis takes by default.
      seed: names the points. Two seeds give two independent estimates.
      error: how large an error is wanted, relative to the scale of the kernel. Points are drawn
        until their spread says that it is reached, or there are `n_points`. About four times as
        many points have half the error. None draws a number of points that does not depend on
        their spread.

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
    """`error` as a `float`, or what is wrong with it."""
    hint = "It is static: under `jit` it can't be an argument."
    if isinstance(error, bool) or not isinstance(error, numbers.Real):
        raise TypeError(f"`error` must be a positive number, got {error!r}. {hint}")
    if not (math.isfinite(value := float(error)) and value > 0):
        raise ValueError(f"`error` must be positive and finite, got {value}.")
    return value


@dataclasses.dataclass(frozen=True)
class Series(Method):
    """The exact terms of low degree alone: a rough and fast estimate."""


def choose(method: Any, *applicable: Method, axis: str) -> Method:
    """`method`, or the first of the `applicable` ones if it is None.

    A `QuasiMonteCarlo` without `n_points` gets those of the applicable one.

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
    if isinstance(method, QuasiMonteCarlo) and method.n_points is None:
        (default,) = (each for each in applicable if isinstance(each, QuasiMonteCarlo))
        return dataclasses.replace(method, n_points=default.n_points)
    return method
