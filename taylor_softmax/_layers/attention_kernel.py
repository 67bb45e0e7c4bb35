"""Kernels of attention layers: blocks of all pairs of inputs, of covariances and back."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from neural_tangents import Kernel
from neural_tangents.stax import PositionalEmbedding

from taylor_softmax._attention import evaluation
from taylor_softmax._attention.evaluation import Inputs, Request
from taylor_softmax._attention.inputs import Cross, Mechanism
from taylor_softmax._attention.pair import Kernels
from taylor_softmax._layers.attention_network import Attention
from taylor_softmax._layers.finite import FiniteClassKernel
from taylor_softmax._layers.spatial import SpatialLayout

Evaluate = Callable[[Sequence[Inputs], Sequence[Request], Mechanism], list[Kernels]]


def kernel(attention: Attention, queries: Any, memory: Any, evaluate: Evaluate) -> Kernel:
    """The kernel of queries after attention to the memory, which may be their own.

    Args:
      evaluate: as `evaluation.evaluate`; tests put another in its place.
    """
    for k in (queries, memory):
        attention.check_axes(len(k.shape1))
        if isinstance(k, FiniteClassKernel):
            raise NotImplementedError(
                f"The input of attention has {k.n_classes} channels behind a softmax over classes, "
                f"finitely many: its logits are no matrix-normal variables. Use "
                f"`infinite_width=True` in that softmax; "
                f"`neural_tangents.monte_carlo_kernel_fn` samples any network."
            )
    if queries.nngp.shape[:2] != memory.nngp.shape[:2]:
        raise ValueError(
            f"Queries and memory must be of the same inputs, got batches of "
            f"{queries.nngp.shape[:2]} and {memory.nngp.shape[:2]}."
        )
    asking = _Tokens(queries, attention)
    attended = asking if memory is queries else _Tokens(memory, attention)
    lengths = [
        (asking.lengths[side], attended.lengths[side])[: 1 if attended is asking else 2]
        for side in asking.sides
    ]
    inputs = [_inputs(attention, asking, attended, side, lengths[side]) for side in asking.sides]
    pairs = _pairs(asking)
    requests = [_request(attention, asking, attended, each) for each in pairs]
    out = (attention.W_out_std * attention.W_value_std) ** 2
    bias = 0.0 if attention.b_std is None else attention.b_std**2
    blocks = evaluate(inputs, requests, attention.mechanism)
    evaluation.warn(blocks, attention.mechanism)
    results = [
        tuple(None if x is None else out * x + bias for x in (each.nngp, each.ntk))
        for each in blocks
    ]
    return asking.kernel.replace(is_gaussian=True, **_fields(asking, results))


class _Tokens:
    """The tokens of one branch of the network.

    Without `x2` the covariances of inputs with themselves are part of `nngp`.

    Attributes:
      kernel: of the branch.
      sides: 0 for `x1` and, if there is an `x2`, 1.
      counts, lengths: numbers of inputs and of their tokens on each side, always two.
      present: which tokens there are, `(n, S)`, of each side.
    """

    def __init__(self, k: Any, attention: Attention):
        k = k.reverse() if k.is_reversed else k
        self.kernel, self._attention = k, attention
        self.sides = (0,) if k.cov2 is None else (0, 1)
        self.counts = k.nngp.shape[:2]
        ends = k.batch_axis, k.channel_axis
        self._axes = [i for i in range(len(k.shape1)) if i not in ends]
        self._spatial = [[shape[i] for i in self._axes] for shape in (k.shape1, k.shape2)]
        self.lengths = [int(np.prod(spatial)) for spatial in self._spatial]
        masks = (k.mask1, k.mask2)
        self.present = [
            self.layout(side, side).present(masks[side], self.counts[side]) for side in self.sides
        ]

    def layout(self, first: int, second: int) -> SpatialLayout:
        """Of covariances between two sides."""
        k = self.kernel
        shapes = k.shape1, k.shape2
        return SpatialLayout(
            shapes[first], shapes[second], k.batch_axis, k.channel_axis, self._axes
        )

    def own(self, side: int) -> Array:
        """Covariances of each input of a side with itself, as queries and keys see them."""
        k = self.kernel
        cov = (k.cov1, k.cov2)[side]
        groups = self.layout(side, side).groups(cov, 1 if k.diagonal_batch else 2)
        index = np.arange(self.counts[side])
        return self._embed(groups, (side, side), index, index)

    def blocks(self, name: str, pairs: "_Pairs", *, seen_by_values: bool = False) -> Array | None:
        """The covariance `name` of the pairs, `(pairs, S, S)`."""
        k = self.kernel
        cov = getattr(k, name)
        if cov is None:
            return None
        n1, n2 = (self.counts[side] for side in pairs.sides)
        diagonal = name != "nngp" and name != "ntk" and k.diagonal_batch
        batch_ndim = 1 if diagonal else 2
        spatial = [self._spatial[side] for side in pairs.sides]
        # An NTK of parts without parameters is a scalar 0.
        doubled = [size for both in zip(*spatial, strict=True) for size in both]
        shape = ((n1,) if diagonal else (n1, n2)) + tuple(doubled)
        cov = jnp.broadcast_to(cov, shape).astype(k.nngp.dtype)
        split = self.layout(*pairs.sides).split(cov, batch_ndim)
        lengths = [self.lengths[side] for side in pairs.sides]
        chosen = split.reshape(-1, *lengths)[pairs.chosen]
        if seen_by_values and not self._attention.val_pos_emb:
            return chosen
        return self._embed(chosen, pairs.sides, pairs.first, pairs.second)

    def _embed(
        self, blocks: Array, sides: tuple[int, int], first: np.ndarray, second: np.ndarray
    ) -> Array:
        """`blocks` with the covariances of positional embeddings, of tokens that there are."""
        attention = self._attention
        if attention.embedding is PositionalEmbedding.NONE:
            return blocks
        share, weight = 1.0, attention.W_pos_emb_std**2
        if attention.embedding is PositionalEmbedding.CONCAT:
            channels = self.kernel.shape1[self.kernel.channel_axis]
            added = channels if attention.n_chan_pos_emb is None else attention.n_chan_pos_emb
            share, weight = (x / (channels + added) for x in (channels, weight * added))
        covariance = attention.embedding_covariance(*(self._spatial[side] for side in sides))
        one, two = self.present[sides[0]][first], self.present[sides[1]][second]
        both = one[:, :, None] & two[:, None, :]
        added = jnp.where(both, weight * jnp.asarray(covariance, blocks.dtype), 0)
        return share * blocks + added


def _inputs(
    attention: Attention, asking: _Tokens, attended: _Tokens, side: int, lengths: tuple[int, ...]
) -> Inputs:
    keys = attended.own(side)
    own = keys if asking is attended else asking.own(side)
    scale = (attention.W_query_std * attention.W_key_std) ** 2
    return Inputs(
        scale * jnp.diagonal(own, axis1=1, axis2=2),
        asking.present[side].astype(keys.dtype),
        keys,
        attended.present[side].astype(keys.dtype),
        attention.bias_rows(*lengths, dtype=keys.dtype),
    )


class _Pairs(NamedTuple):
    """Pairs of inputs of which the kernel has a field.

    Attributes:
      name: of the field.
      sides: that the first and the second inputs are of.
      first, second: inputs.
      chosen: which of all pairs, in the order of the field.
    """

    name: str
    sides: tuple[int, int]
    first: np.ndarray
    second: np.ndarray
    chosen: Any


def _pairs(tokens: _Tokens) -> list[_Pairs]:
    """What the fields of a kernel are made of.

    Of what is symmetric in the inputs a block is computed for one order of every two.
    """
    n1, n2 = tokens.counts

    def symmetric(name: str, side: int, n: int) -> _Pairs:
        first, second = np.triu_indices(n)
        return _Pairs(name, (side, side), first, second, first * n + second)

    if len(tokens.sides) == 1:
        return [symmetric("nngp", 0, n1)]
    first, second = np.indices((n1, n2)).reshape(2, -1)
    pairs = [_Pairs("nngp", (0, 1), first, second, slice(None))]
    for name, side, n in (("cov1", 0, n1), ("cov2", 1, n2)):
        if tokens.kernel.diagonal_batch:
            index = np.arange(n)
            pairs.append(_Pairs(name, (side, side), index, index, slice(None)))
        else:
            pairs.append(symmetric(name, side, n))
    return pairs


def _request(attention: Attention, asking: _Tokens, attended: _Tokens, pairs: _Pairs) -> Request:
    keys = attended.blocks(pairs.name, pairs)
    queries = keys if asking is attended else asking.blocks(pairs.name, pairs)
    assert keys is not None
    assert queries is not None
    differ = attention.embedding is not PositionalEmbedding.NONE and not attention.val_pos_emb
    scale = (attention.W_query_std * attention.W_key_std) ** 2
    cross = Cross(scale * queries, keys)
    if differ:
        cross = cross._replace(values=attended.blocks(pairs.name, pairs, seen_by_values=True))
    ntk = attended.blocks("ntk", pairs) if pairs.name == "nngp" else None
    if ntk is not None:
        of_queries = ntk if asking is attended else asking.blocks("ntk", pairs)
        assert of_queries is not None
        values = attended.blocks("ntk", pairs, seen_by_values=True) if differ else None
        cross = cross._replace(queries_ntk=scale * of_queries, keys_ntk=ntk, values_ntk=values)
    return Request(pairs.first, pairs.second, cross, pairs.sides)


def _fields(tokens: _Tokens, results: list[Any]) -> dict[str, Array | None]:
    """The fields of the kernel, from NNGP and NTK of what `_pairs` lists."""
    (nngp, ntk), *own = results
    n1, n2 = tokens.counts
    diagonal_batch = tokens.kernel.diagonal_batch
    if len(tokens.sides) == 1:
        within = tokens.layout(0, 0)
        nngp = within.join(_unfold(nngp, n1), (n1, n1))
        ntk = None if ntk is None else within.join(_unfold(ntk, n1), (n1, n1))
        cov1 = jnp.moveaxis(jnp.diagonal(nngp), -1, 0) if diagonal_batch else nngp
        return {"nngp": nngp, "ntk": ntk, "cov1": cov1, "cov2": None}
    between = tokens.layout(0, 1)
    nngp, ntk = (None if x is None else between.join(x, (n1, n2)) for x in (nngp, ntk))
    fields = {"nngp": nngp, "ntk": ntk}
    for name, side, (cov, _) in zip(("cov1", "cov2"), (0, 1), own, strict=True):
        n, within = tokens.counts[side], tokens.layout(side, side)
        if diagonal_batch:
            fields[name] = within.join((cov + jnp.swapaxes(cov, 1, 2)) / 2, (n,))
        else:
            fields[name] = within.join(_unfold(cov, n), (n, n))
    return fields


def _unfold(blocks: Array, n: int) -> Array:
    """`(n, n, S, S)`, symmetric in the inputs, from blocks in the order of `np.triu_indices(n)`."""
    first, second = np.triu_indices(n)
    same = (first == second)[:, None, None]
    swapped = jnp.swapaxes(blocks, 1, 2)
    blocks = jnp.where(same, (blocks + swapped) / 2, blocks)
    index = np.zeros((n, n), int)
    index[first, second] = index[second, first] = np.arange(len(first))
    above = (np.arange(n)[:, None] <= np.arange(n))[:, :, None, None]
    return jnp.where(above, blocks[index], swapped[index])
