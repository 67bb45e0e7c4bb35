"""Classes of the queries of one input, within which attention has one distribution.

All queries see the same keys. Without rows of biases their logits differ in scale alone: where the
scales are equal, one class serves all, and where there are many queries a few scales do, between
which is interpolated. Otherwise each query is a class.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# Scales of queries where they differ.
N_SCALES = 3

# Scales are interpolated in log(1 / 2 + variance of the logits).
_OFFSET = 0.5


class Classes(NamedTuple):
    """Classes of the queries of one input, within which `y` has one distribution.

    Attributes:
      scales: `tau`, `(C,)`.
      bias: `(C, T)`, `-inf` where a key is not attended to.
      weights: of the classes for each query, `(A, C)`; None where each query is a class.
    """

    scales: Array
    bias: Array
    weights: Array | None


# From the variances of queries, which of them there are, the mean variance of the keys, and which
# keys are attended to as a row of 0 and `-inf`.
Classify = Callable[[Array, Array, Array, Array], Classes]


def of_each(bias: Array | None) -> Classify:
    """Each query, with its row of `bias`, `(A, T)`."""

    def classify(variances: Array, present: Array, spread: Array, row: Array) -> Classes:
        rows = jnp.broadcast_to(row, (len(variances), len(row)))
        return Classes(safe_sqrt(variances), rows if bias is None else rows + bias, None)

    return classify


def one_for_all(variances: Array, present: Array, spread: Array, row: Array) -> Classes:
    mean = jnp.sum(variances * present) / jnp.maximum(jnp.sum(present), 1)
    return Classes(safe_sqrt(mean[None]), row[None], jnp.ones_like(present)[:, None])


def of_scales(variances: Array, present: Array, spread: Array, row: Array) -> Classes:
    """Nodes that cover the scales, with Lagrange weights."""
    spread = jnp.maximum(spread, jnp.finfo(spread.dtype).tiny)
    x = jnp.log(variances * spread + _OFFSET)
    low = jnp.min(jnp.where(present > 0, x, jnp.inf))
    high = jnp.max(jnp.where(present > 0, x, -jnp.inf))
    # Nothing is divided by 0 where the scales are equal, or no position is present.
    low, high = jnp.where(low <= high, low, 0), jnp.where(low <= high, high, 0)
    centre, half = (low + high) / 2, jnp.maximum((high - low) / 2, 1e-3)
    # Chebyshev's nodes, stretched to the ends: where most queries are, as a rule.
    nodes = np.cos((np.arange(N_SCALES) + 0.5) * np.pi / N_SCALES)
    nodes = (nodes / nodes[0]).tolist()
    u = (x - centre) / half * present
    weights = [
        math.prod((u - other) / (node - other) for other in nodes if other != node)
        for node in nodes
    ]
    scales = safe_sqrt((jnp.exp(centre + half * jnp.asarray(nodes, x.dtype)) - _OFFSET) / spread)
    rows = jnp.broadcast_to(row, (N_SCALES, len(row)))
    return Classes(scales, rows, jnp.stack(weights, -1))


def safe_sqrt(x: Array) -> Array:
    """Root with a slope that can be multiplied: logits of a variance below eps count as of eps."""
    return jnp.sqrt(jnp.maximum(x, jnp.finfo(x.dtype).eps))
