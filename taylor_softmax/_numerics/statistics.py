"""Sums, means and standard errors of what comes in parts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Running(NamedTuple):
    """The samples so far. Sums of squares would cancel where the spread is small.

    Attributes:
      n: their number.
      mean: their mean.
      deviation: sum of their squared deviations from it.
    """

    n: Float[Array, ""]
    mean: Float[Array, "*shape"]
    deviation: Float[Array, "*shape"]

    def add(self, samples: Float[Array, "n *shape"]) -> "Running":
        """Adds samples along the first axis (Chan, Golub & LeVeque 1983)."""
        more = samples.shape[0]
        mean = jnp.mean(samples, 0)
        total, step = self.n + more, mean - self.mean
        return Running(
            total,
            self.mean + step * (more / total),
            self.deviation
            + jnp.sum((samples - mean) ** 2, 0)
            + step**2 * (self.n * (more / total)),
        )

    def stderr(self) -> Float[Array, "*shape"]:
        """Standard error of the mean."""
        return jnp.sqrt(self.deviation / (self.n - 1) / self.n)


def sum_over(term: Callable[[Any], Any], xs: Any) -> Any:
    """Sum of `term` over the first axis of the arrays `xs`.

    Nothing of a term is kept for the backward pass.
    """
    first = jax.tree.map(lambda x: x[0], xs)
    if len(jax.tree.leaves(xs)[0]) == 1:
        return term(first)
    # Traced once for its shape and its value, and in nested sums not twice at every level.
    term = jax.jit(term)
    like = jax.eval_shape(term, first)

    def add(total: Any, x: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, term(x)), None

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return lax.scan(jax.checkpoint(add), start, xs)[0]


def none_yet(like: Float[Array, "*shape"]) -> Running:
    """The state before any sample, of the shape and dtype of a sample."""
    return Running(jnp.zeros((), like.dtype), jnp.zeros_like(like), jnp.zeros_like(like))
