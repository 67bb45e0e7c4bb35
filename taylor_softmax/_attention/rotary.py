"""Correlations that rotary embeddings leave between queries and keys, at many key channels."""

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.special
from jax import Array
from jax.typing import DTypeLike


def check_base(base: Any) -> float:
    """`base`, the argument `rotary`, as a `float`, or what is wrong with it."""
    hint = "Pass the base of the frequencies, usually 10000.0, or None for no rotation."
    if isinstance(base, bool) or not isinstance(base, int | float | np.number):
        raise TypeError(f"`rotary` must be a number, got {base!r}. {hint}")
    if not (math.isfinite(base) and base > 1):
        raise ValueError(f"`rotary` must be finite and above 1, got {base}. {hint}")
    return float(base)


def correlations(base: float, size: int, dtype: DTypeLike) -> Array:
    """`rho(t) = int_0^1 cos(base^(-u) t) du` at the distances `0, ..., size - 1`."""
    return jnp.asarray(_correlations(base, size), dtype)


@functools.cache
def _correlations(base: float, size: int) -> np.ndarray:
    # With w = base^(-u) t an integral of cos(w) / w, and so of Ci.
    t = np.arange(1.0, size)
    _, upper = scipy.special.sici(t)
    _, lower = scipy.special.sici(t / base)
    return np.concatenate([[1.0], (upper - lower) / np.log(base)])
