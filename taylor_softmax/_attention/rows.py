"""Rows of biases: which keys each query attends to, and what is added to its logits."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from taylor_softmax._numerics.arguments import (
    Validated,
    as_real,
    check_boolean,
    check_entries,
    check_integer,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The arguments `causal`, `window` and `bias` of attention, checked.

    Attributes:
      causal: whether queries attend to keys up to their own position only.
      window: how many keys before and after its own position a query attends to; None for all.
      bias: what is added to the logits, or the function of the lengths that gives it; None for
        nothing.
    """

    causal: bool = False
    window: tuple[int, int] | None = None
    bias: Array | Callable[..., Any] | None = None

    @classmethod
    def parse(cls, causal: Any, window: Any, bias: Any) -> "Rows":
        """The rows that public arguments name, or what is wrong with them."""
        if bias is not None and not callable(bias):
            bias = _check_bias(bias)
        return cls(check_boolean("causal", causal), _check_window(window), bias)

    @property
    def along_a_line(self) -> list[str]:
        """Names of the arguments that need positions to have an order."""
        given = {"causal": self.causal, "window": self.window is not None}
        return [name for name, is_given in given.items() if is_given]

    def of(self, *lengths: int, dtype: DTypeLike) -> Array | None:
        """The rows, `(B, A, T)`, `-inf` where a key is not attended to; None where all are 0.

        Args:
          lengths: numbers of queries and of keys, `A` and `T`; one where they are the same.

        Raises:
          ValueError: `bias` does not have these lengths.
        """
        n_queries, n_keys = lengths[0], lengths[-1]
        if not self.along_a_line and self.bias is None:
            return None
        ahead = np.arange(n_keys) - np.arange(n_queries)[:, None]
        allowed = np.ones_like(ahead, bool)
        if self.causal:
            allowed &= ahead <= 0
        if self.window is not None:
            before, after = self.window
            allowed &= (-before <= ahead) & (ahead <= after)
        mask = jnp.asarray(np.where(allowed, 0.0, -math.inf), dtype)
        if self.bias is None:
            return mask[None]
        bias = _check_bias(self.bias(*lengths)) if callable(self.bias) else self.bias
        if bias.shape[-2:] != (n_queries, n_keys):
            raise ValueError(
                f"`bias` must have shape {(n_queries, n_keys)} or (B, {n_queries}, {n_keys}) for "
                f"{n_queries} queries and {n_keys} keys, got {bias.shape}. Where lengths differ, "
                f"pass a function of them."
            )
        return mask + bias.reshape(-1, n_queries, n_keys).astype(dtype)


def alibi(n_heads: Validated[int], length: Validated[int]) -> Array:
    """Attention with linear biases: `-m_h |a - p|` for head `h`, query `a` and key `p`.

    Of Press, Smith & Lewis 2022 (arXiv 2108.12409), for the argument `bias` of attention. The
    slopes `m_h` are `2^(-8 h / n)`, `h = 1, ..., n`, where the number of heads is a power of two;
    otherwise those of the next lower one, and every second one of the next higher one.

    Returns:
      `(n_heads, length, length)`.

    Raises:
      TypeError, ValueError: `n_heads` or `length` is not a positive integer.
    """
    n_heads = check_integer("n_heads", n_heads, least=1)
    length = check_integer("length", length, least=1)
    lower = 1 << (n_heads.bit_length() - 1)
    slopes = 2.0 ** (-8 * np.arange(1, lower + 1) / lower)
    between = 2.0 ** (-4 * np.arange(1, 2 * (n_heads - lower), 2) / lower)
    distances = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
    return jnp.asarray(-np.concatenate([slopes, between])[:, None, None] * distances)


def _check_window(window: Any) -> tuple[int, int] | None:
    if window is None:
        return None
    sides = window if isinstance(window, tuple | list) else (window, window)
    if len(sides) != 2:
        raise ValueError(
            f"`window` must be an integer or a pair `(before, after)`, got {window!r}."
        )
    before, after = (check_integer("window", side, least=0) for side in sides)
    return before, after


def _check_bias(bias: Any) -> Array:
    (array,), _ = as_real(bias=bias)
    if jnp.asarray(bias).dtype == bool:
        raise TypeError(
            "`bias` must be what is added to the logits, got booleans. Pass "
            "`jnp.where(mask, 0, -jnp.inf)` for a mask."
        )
    if array.ndim not in (2, 3):
        raise ValueError(
            f"`bias` must have shape (queries, keys), or (B, queries, keys) with one for each of B "
            f"equal shares of the heads, got {array.shape}."
        )
    check_entries("bias", array, array < jnp.inf, "finite, or -inf where a key is not attended to")
    return array
