"""Derivatives of what attention takes from samples, in covariances of logits.

By Price's theorem (see `_position_axis/derivatives.py`) along `X11`, `X22` and `r X12` of what `xi`
and `xi'` have as covariances `K11`, `K22` and `r K12` (see `trace`),

    dE[F] = E[sum_k d_xi[e_k] (d_xi[X11 e_k] / 2 + r d_xi'[X12^T e_k]) F]
          + E[sum_k d_xi'[e_k] d_xi'[X22 e_k] F] / 2,

with derivatives along directions in brackets. Of products `F = y_a^T V y'_b` along `X11` and `X22`
these sums are closed forms, by the curvature of `y`; along `X12` they are the traces of `trace`. Of
the traces, which are derivatives already, the terms of the sums are taken one by one, `T1 + T2`
times the work: only the NTK needs them.

Along the scale of a query the logits themselves move: `d/d log tau_a F(tau_a xi)`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from taylor_softmax._attention import pairing, trace
from taylor_softmax._numerics.precision import einsum, matmul
from taylor_softmax._numerics.statistics import sum_over
from taylor_softmax._numerics.surrogate import Surrogate
from taylor_softmax._position_axis.derivatives import curved
from taylor_softmax._position_axis.sampling import Outputs


class _Sums(NamedTuple):
    """Over the points of one scrambling and their negatives: of `y^T V y'`, or of traces.

    Attributes:
      first: of `y`, or of `J`.
      second: of `y'`, or of `J'`, at each node.
      pairs: even and odd parts, at each node.
    """

    first: Float[Array, "C T1 *T1"]
    second: Float[Array, "nodes D T2 *T2"]
    pairs: Float[Array, "nodes 2 forms *pairs"]


# From `xi`, `(T1, points)`, and `xi'`, `(nodes, T2, points)`.
_SumsAt = Callable[[Array, Array], _Sums]


def samples(
    one: trace.QueryLogits,
    two: trace.QueryLogits,
    keys: trace.Keys,
    values: tuple[list[Array], list[Array]],
    forms: list[tuple[int, int]],
    scrambling: trace.Scrambling,
    changes: tuple[Float[Array, "T1 T1"], Float[Array, "T2 T2"]],
    *,
    aligned: bool,
    surrogate: Surrogate,
    nodes: tuple[float, ...],
) -> tuple[list[trace.Samples], list[trace.Samples]]:
    """Derivatives of `E[y_a^T V y'_b]` of each of the `values`, and of `G` of each of the `forms`.

    They are along the changes of covariances, along the logarithm of the scale of the first query,
    along that of the second one, and, of `G` alone, along that of `r`. `X12` changes `G` alone. For
    the other arguments see `trace.samples`.

    Args:
      keys: of which the last matrix is `X12`.
      values: `V` as it is, and as the trace sees it.
      changes: `X11` and `X22`.

    Returns:
      those of products, and those of `G`, none without forms.
    """
    (whole, centred), (*matrices, crossing) = values, keys.matrices
    own1, own2 = ((x + x.T) / 4 for x in changes)
    pair = pairing.paired(centred, matrices, forms, aligned=aligned)
    products_of = pairing.paired(whole, [], [], aligned=aligned).products

    def outputs(u: Array, v: Array) -> tuple[Outputs, list[Outputs]]:
        right = [pair.outputs(x, two.scales, two.bias, surrogate) for x in v]
        return pair.outputs(u, one.scales, one.bias, surrogate), right

    def of_outputs(left: Array, right: list[Array]) -> _Sums:
        first, *second = (einsum(f"{pair.axes}->ap", x) for x in (left, *right))
        return _Sums(first, jnp.stack(second), jnp.stack([products_of(left, x) for x in right]))

    def products(u: Array, v: Array) -> _Sums:
        left, right = outputs(u, v)
        return of_outputs(left.value, [x.value for x in right])

    def curved_products(u: Array, v: Array) -> _Sums:
        left, right = outputs(u, v)
        curved = _curved(left, own1, one.scales, pair.axes)
        of_left = of_outputs(curved, [x.value for x in right])
        curved_right = [_curved(x, own2, two.scales, pair.axes) for x in right]
        of_right = of_outputs(left.value, curved_right)
        return _Sums(of_left.first, of_right.second, of_left.pairs + of_right.pairs)

    def traces(u: Array, v: Array) -> _Sums:
        left, right = outputs(u, v)
        first, *second = (pairing.sum_of_jacobians(x, pair.axes) for x in (left, *right))
        return _Sums(first, jnp.stack(second), jnp.stack([pair.traces(left, x) for x in right]))

    def block(z: Array) -> tuple[list[_Sums], list[_Sums]]:
        u, at_nodes = trace.logits_at(one, two, keys, z, nodes)
        v = jnp.stack(at_nodes)

        def along_scales(sums: _SumsAt) -> list[_Sums]:
            still = jnp.zeros_like(u), jnp.zeros_like(v)
            return [jax.jvp(sums, (u, v), along)[1] for along in ((u, still[1]), (still[0], v))]

        of_products = [curved_products(u, v), *along_scales(products)]
        if not forms:
            return of_products, []
        crossings = [jnp.stack([r * x for r in nodes]) for x in (crossing, matrices[0])]
        of_traces, along_r = _second_derivatives(traces, u, v, (own1, own2), crossings)
        return of_products, [of_traces, *along_scales(traces), along_r]

    n_points = scrambling.points.shape[1]
    largest = max(one.bias.size, two.bias.size)
    totals = trace.sum_over_blocks(block, scrambling.points, 2 * largest)

    def of_values(x: Array, y: Array) -> list[Array]:
        """At `r = 0`, where both inputs are independent."""
        joined = "ap,ap->a" if aligned else "ap,bp->ab"
        return [einsum(joined, matmul(x, v), y) for v in whole]

    def of_forms(x: Array, y: Array) -> list[Array]:
        joined = "aij,aij->a" if aligned else "aij,bij->ab"
        left = (matmul(matmul(centred[i].T, x), matrices[j]) for i, j in forms)
        return [einsum(joined, product, y) for product in left]

    def from_sums(sums: _Sums, of_one: Array, of_two: Array, at_0: Callable[..., list[Array]]):
        first, second = (x / (2 * n_points) for x in (sums.first, jnp.mean(sums.second, 0)))
        of_one, of_two = of_one[scrambling.group], of_two[scrambling.group]
        known = jnp.stack(at_0(first, of_two)) + jnp.stack(at_0(of_one, second))
        even, odd = sums.pairs[:, 0] / n_points - known, sums.pairs[:, 1] / n_points
        result = trace.Samples(known, jnp.stack([even, odd], 1))
        return jax.tree.map(lambda x: x[..., None, :] if aligned else x, result)

    of_products, of_traces = totals
    return (
        [from_sums(x, one.mean, two.mean, of_values) for x in of_products],
        [from_sums(x, one.slope, two.slope, of_forms) for x in of_traces],
    )


def _second_derivatives(
    sums: _SumsAt, u: Array, v: Array, own: tuple[Array, Array], crossings: list[Array]
) -> tuple[_Sums, _Sums]:
    """`sum_k d_u[e_k] (d_u[X11 e_k] + d_v[X12^T e_k]) F + sum_k d_v[e_k] d_v[X22 e_k] F`.

    Also `sum_k d_u[e_k] d_v[K12^T e_k] F`, with `F` the sums.

    Args:
      own: `X11` and `X22`.
      crossings: `X12` and `K12` of each node.
    """

    def along(x: Array, direction: Array) -> Array:
        return jnp.broadcast_to(direction[..., None], x.shape)

    def slope_in_u(u: Array, v: Array, direction: Array) -> _Sums:
        return jax.jvp(lambda u: sums(u, v), (u,), (along(u, direction),))[1]

    def slope_in_v(v: Array, direction: Array) -> _Sums:
        return jax.jvp(lambda v: sums(u, v), (v,), (along(v, direction),))[1]

    def in_u(direction: Array, own: Array, *crossings: Array) -> tuple[_Sums, _Sums]:
        # One linear map, along two directions.
        _, change = jax.linearize(lambda u, v: slope_in_u(u, v, direction), u, v)
        first, second = (along(v, x) for x in crossings)
        return change(along(u, own), first), change(jnp.zeros_like(u), second)

    def in_v(direction: Array, own: Array) -> _Sums:
        return jax.jvp(lambda v: slope_in_v(v, direction), (v,), (along(v, own),))[1]

    basis1, basis2 = (jnp.eye(len(x), dtype=x.dtype) for x in own)
    directions = basis1, own[0], *(jnp.swapaxes(x, 0, 1) for x in crossings)
    of_u, along_r = sum_over(lambda x: in_u(*x), directions)
    of_v = sum_over(lambda x: in_v(*x), (basis2, own[1]))
    return jax.tree.map(jnp.add, of_u, of_v), along_r


def _curved(outputs: Outputs, change: Array, scales: Array, axes: str) -> Array:
    """`D^2 y : change`, with derivatives along `xi`."""
    keys = axes.index("p")
    flat = (jnp.moveaxis(x, keys, 0).reshape(x.shape[keys], -1) for x in outputs)
    moved = curved(Outputs(*flat), change)
    shape = jnp.moveaxis(outputs.value, keys, 0).shape
    placed = jnp.expand_dims(scales, [i for i, x in enumerate(axes) if x != "a"])
    return placed**2 * jnp.moveaxis(moved.reshape(shape), 0, keys)
