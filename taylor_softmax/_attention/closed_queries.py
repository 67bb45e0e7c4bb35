"""Attention at order 2: what `trace` samples, by the closed form, a class of queries at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from taylor_softmax._attention import queries
from taylor_softmax._numerics.precision import einsum
from taylor_softmax._position_axis import closed_form

# Correlations at which the closed form is evaluated.
_NODES = 8


class ClosedLogits(NamedTuple):
    """Logits of one input at order 2, for `C` classes of scales `tau`."""

    scales: Float[Array, "*n C"]
    classes: closed_form.EigenLogits


def closed_logits(keys: Array, classes: queries.Classes) -> tuple[ClosedLogits, Array]:
    """The logits, and the means of the classes."""

    def of_class(given: tuple[Array, Array]) -> tuple[closed_form.EigenLogits, Array]:
        scale, allowed = given
        covariance = scale**2 * keys * allowed[:, None] * allowed
        logits = closed_form.diagonalise(covariance, allowed)
        # Outputs sum to 1, so that the rows of m m^T sum to m.
        uncorrelated = closed_form.second_moment(logits, logits, jnp.zeros_like(keys))
        return logits, jnp.sum(uncorrelated, 1)

    allowed = (classes.bias > -jnp.inf).astype(keys.dtype)
    logits, means = lax.map(of_class, (classes.scales, allowed))
    return ClosedLogits(classes.scales, logits), means


def coefficients(
    one: ClosedLogits,
    two: ClosedLogits,
    cross: Array,
    values: list[Array],
    keys: list[Array],
    forms: list[tuple[int, int]],
) -> Array:
    """What `trace.coefficients` estimates, through exact values at Chebyshev's nodes in `r`."""
    nodes = np.cos((np.arange(_NODES) + 0.5) * np.pi / _NODES)
    fit = jnp.asarray(np.linalg.inv(np.vander(nodes, increasing=True)), keys[0].dtype)
    shape = len(one.scales), len(two.scales), _NODES
    i, j, k = (jnp.asarray(x) for x in np.indices(shape).reshape(3, -1))

    def traces(node: tuple[Array, Array, Array]) -> Array:
        i, j, r = node
        first, second = (
            jax.tree.map(lambda x, k=k: x[k], of.classes) for of, k in ((one, i), (two, j))
        )
        allowed = first.present[:, None] * second.present
        between = r * one.scales[i] * two.scales[j] * cross * allowed
        slopes = [
            closed_form.moment_and_slope(first, second, between, x * allowed)[1] for x in keys
        ]
        return jnp.stack([jnp.sum(values[v] * slopes[k]) for v, k in forms])

    results = lax.map(traces, (i, j, jnp.asarray(nodes, keys[0].dtype)[k]))
    return einsum("kr,ijrf->fkij", fit, results.reshape(*shape, len(forms)))
