"""Means and standard errors of samples that come in parts."""

from typing import NamedTuple

import jax.numpy as jnp
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


def none_yet(like: Float[Array, "*shape"]) -> Running:
    """The state before any sample, of the shape and dtype of a sample."""
    return Running(jnp.zeros((), like.dtype), jnp.zeros_like(like), jnp.zeros_like(like))
