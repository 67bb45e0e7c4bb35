"""What pairs of attention are given: how queries attend, covariances, and what inputs are."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from taylor_softmax._attention import closed_queries, trace
from taylor_softmax._numerics.surrogate import Surrogate
from taylor_softmax._position_axis.moments import project
from taylor_softmax.methods import Method


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """How queries attend.

    Attributes:
      surrogate: what the softmax normalises.
      method: how the kernel is evaluated.
      rotary: base of the frequencies of rotary embeddings; None without.
    """

    surrogate: Surrogate
    method: Method
    rotary: float | None = None


class Cross(NamedTuple):
    """Covariances between the inputs of each pair, and their NTKs.

    Attributes:
      queries, keys: `Q`, `(pairs, A1, A2)`, and `K`, `(pairs, T1, T2)`.
      values: `V`, or None where it is `K`.
      queries_ntk, keys_ntk: the NTKs, or None where they are not wanted.
      values_ntk: or None where it is `keys_ntk`.
    """

    queries: Array
    keys: Array
    values: Array | None = None
    queries_ntk: Array | None = None
    keys_ntk: Array | None = None
    values_ntk: Array | None = None


class Scales(NamedTuple):
    """Of one input with itself, for `units`; numbers.

    Attributes:
      value: the largest `E[y_a^T K y_a]`.
      slope: the largest `tau_a^2 E[tr(K^T J_a K J_a^T)]`.
      size: Frobenius's norm of `K`.
      centred: that of what softmax sees of `K`.
      queries: the largest `tau_a^2`.
      variance: the largest of the logits.
    """

    value: Float[Array, "*n"]
    slope: Float[Array, "*n"]
    size: Float[Array, "*n"]
    centred: Float[Array, "*n"]
    queries: Float[Array, "*n"]
    variance: Float[Array, "*n"]


class Prepared(NamedTuple):
    """What pairs need of an input; `C` is 1 where all queries are alike.

    Attributes:
      tau: of each query.
      covariance: of the keys, as softmax sees them.
      weights: of the classes for each query; None where queries are classes.
      spread: mean variance of the keys, times which `tau^2` is that of the logits; 0 of Taylor
        softmax, whose derivatives stay flat.
      present: 1 where there is a key.
      means: `E[y]` of each query, of each group of `logits`; without groups in the closed form.
      logits: in `C` classes.
      scales: None in the closed form, which has no error.
    """

    tau: Float[Array, "*n A"]
    covariance: Float[Array, "*n T T"]
    weights: Float[Array, "*n A C"] | None
    spread: Float[Array, "*n"]
    present: Float[Array, "*n T"]
    means: Float[Array, "*n A T"]
    logits: "trace.QueryLogits | closed_queries.ClosedLogits"
    scales: Scales | None


def n_classes(one: Prepared, two: Prepared) -> int:
    return max(x.logits.scales.shape[-1] for x in (one, two))


def units(one: Prepared, two: Prepared, cross: Cross, mechanism: Mechanism) -> Float[Array, " k"]:
    """What errors of NNGP and, unless they are not wanted, NTK are relative to.

    Both at correlation 1, as geometric means of the largest ones of the inputs with themselves,
    with NTKs, and values that are not keys, of the shape of `K` and the size that they have.
    """
    scales = [x.scales for x in (one, two) if x.scales is not None]
    means = Scales(*(jnp.sqrt(x) * jnp.sqrt(y) for x, y in zip(*scales, strict=True)))

    def size(matrix: Array, own: Array) -> Array:
        """Relative to that of the keys."""
        norm = jnp.sqrt(jnp.sum(matrix**2))
        return norm / jnp.maximum(own, float(jnp.finfo(own.dtype).tiny))

    present = one.present[:, None] * two.present

    def whole(matrix: Array) -> Array:
        return size(matrix * present, means.size)

    def as_seen(matrix: Array) -> Array:
        return size(centred(matrix, one, two, mechanism), means.centred)

    values = (jnp.ones_like(means.size),) * 2
    if cross.values is not None:
        values = whole(cross.values), as_seen(cross.values)
    nngp = values[0] * means.value
    if cross.keys_ntk is None:
        return nngp[None]
    assert cross.queries_ntk is not None
    values_ntk = cross.keys_ntk if cross.values_ntk is None else cross.values_ntk
    largest = jnp.max(jnp.abs(cross.queries_ntk)) / means.queries
    slopes = values[1] * (2 + largest + as_seen(cross.keys_ntk)) * means.slope
    return jnp.stack([nngp, 2 * nngp + whole(values_ntk) * means.value + slopes])


def matrices(
    cross: Cross, mechanism: Mechanism
) -> tuple[list[Array], list[Array], list[tuple[int, int]]]:
    """The `V` and the `C` of `G(V; K)`, `G(V; K_ntk)` and `G(V_ntk; K)`, and which go together.

    The last one is left out where it is the one before.
    """
    values, keys = [cross.keys if cross.values is None else cross.values], [cross.keys]
    if cross.keys_ntk is None:
        return values, keys, [(0, 0)]
    values.append(cross.keys_ntk if cross.values_ntk is None else cross.values_ntk)
    keys.append(cross.keys_ntk)
    # The Jacobian of softmax is symmetric, and so is `G` in its two matrices.
    shared = cross.values is None and cross.values_ntk is None
    shared = shared and mechanism.rotary is None and mechanism.surrogate.is_shift_invariant
    return values, keys, [(0, 0), (0, 1)] + [(1, 0)] * (not shared)


def centred(matrix: Array, one: Prepared, two: Prepared, mechanism: Mechanism) -> Array:
    return project(matrix, one.present, two.present, mechanism.surrogate)
