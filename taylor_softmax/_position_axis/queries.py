"""Classes of the queries of one input, within which attention has one distribution.

All queries see the same keys, and their logits differ in scale alone. Where the scales are equal,
one class serves all; where not, a few scales do, between which is interpolated. Causal attention
has a class for every position.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# Scales of queries where they differ.
_N_SCALES = 3

# Scales are interpolated in log(1 / 2 + variance of the logits).
_OFFSET = 0.5


class Classes(NamedTuple):
    """Classes of the queries of one input, within which `y` has one distribution.

    Attributes:
      scales: `tau`, `(C,)`.
      allowed: 1 where a key is attended to, `(C, S)`.
      weights: of the classes for each query, `(S, C)`.
    """

    scales: Array
    allowed: Array
    weights: Array


# From variances of queries and of the keys (both of positions that there are) and presence.
Classify = Callable[[Array, Array, Array], Classes]


def of_each_position(variances: Array, spread: Array, present: Array) -> Classes:
    size = len(variances)
    earlier = jnp.asarray(np.tri(size), present.dtype)
    return Classes(safe_sqrt(variances), earlier * present, jnp.eye(size, dtype=present.dtype))


def one_for_all(variances: Array, spread: Array, present: Array) -> Classes:
    mean = jnp.sum(variances * present) / jnp.maximum(jnp.sum(present), 1)
    return Classes(safe_sqrt(mean[None]), present[None], jnp.ones_like(present)[:, None])


def of_scales(variances: Array, spread: Array, present: Array) -> Classes:
    """Nodes that cover the scales, with Lagrange weights."""
    spread = jnp.maximum(spread, jnp.finfo(spread.dtype).tiny)
    x = jnp.log(variances * spread + _OFFSET)
    low = jnp.min(jnp.where(present > 0, x, jnp.inf))
    high = jnp.max(jnp.where(present > 0, x, -jnp.inf))
    # Nothing is divided by 0 where the scales are equal, or no position is present.
    low, high = jnp.where(low <= high, low, 0), jnp.where(low <= high, high, 0)
    centre, half = (low + high) / 2, jnp.maximum((high - low) / 2, 1e-3)
    # Chebyshev's nodes, stretched to the ends: where most queries are, as a rule.
    nodes = np.cos((np.arange(_N_SCALES) + 0.5) * np.pi / _N_SCALES)
    nodes = (nodes / nodes[0]).tolist()
    u = (x - centre) / half * present
    weights = [
        math.prod((u - other) / (node - other) for other in nodes if other != node)
        for node in nodes
    ]
    scales = safe_sqrt((jnp.exp(centre + half * jnp.asarray(nodes, x.dtype)) - _OFFSET) / spread)
    allowed = jnp.broadcast_to(present, (_N_SCALES, len(present)))
    return Classes(scales, allowed, jnp.stack(weights, -1))


def safe_sqrt(x: Array) -> Array:
    """Root with a slope that can be multiplied: logits of a variance below eps count as of eps."""
    return jnp.sqrt(jnp.maximum(x, jnp.finfo(x.dtype).eps))
