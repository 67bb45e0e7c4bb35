"""Attention layers of finite width, and the arguments that their kernels share with them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, random
from neural_tangents.stax import PositionalEmbedding

from taylor_softmax._attention.inputs import Mechanism
from taylor_softmax._attention.rows import Rows
from taylor_softmax._numerics.arguments import Validated
from taylor_softmax._numerics.precision import matmul


@dataclasses.dataclass(frozen=True, eq=False)
class Attention:
    """The arguments of an attention layer, and its outputs.

    In self-attention queries, keys and values are made of one input; in cross-attention queries are
    made of one, keys and values of another, the *memory*.
    """

    mechanism: Mechanism
    rows: Rows
    n_chan_out: int
    n_chan_key: int
    n_chan_val: int
    n_heads: int
    W_key_std: Validated[float]
    W_value_std: Validated[float]
    W_query_std: Validated[float]
    W_out_std: Validated[float]
    b_std: Validated[float | None]
    pos_emb_type: str
    pos_emb_p_norm: Validated[float]
    pos_emb_decay_fn: Callable[[float], float] | None
    n_chan_pos_emb: int | None
    W_pos_emb_std: Validated[float]
    val_pos_emb: bool
    batch_axis: int
    channel_axis: int

    @property
    def embedding(self) -> PositionalEmbedding:
        return PositionalEmbedding(self.pos_emb_type)

    def check_axes(self, ndim: int) -> None:
        """Raises `ValueError` unless inputs of so many axes have tokens, in order where need be."""
        if ndim < 3:
            raise ValueError(
                f"Attention is over positions, and inputs with {ndim} axes have none. Pass inputs "
                f"of shape `(batch, length, channels)`."
            )
        named = [*self.rows.along_a_line, *(["rotary"] if self.mechanism.rotary else [])]
        if named and ndim != 3:
            raise ValueError(
                f"`{'`, `'.join(named)}`: for inputs with one spatial axis, such as `(batch, "
                f"length, channels)`, along which positions have an order; got inputs with {ndim} "
                f"axes. Reshape them, or leave the argument out."
            )

    def bias_rows(self, *lengths: int, dtype: Any) -> Array | None:
        """See `Rows.of`; raises `ValueError` where heads can't be shared out equally."""
        rows = self.rows.of(*lengths, dtype=dtype)
        if rows is not None and self.n_heads % len(rows):
            raise ValueError(
                f"`bias` has rows for {len(rows)} equal shares of the heads, of which `n_heads` "
                f"must be a multiple, got {self.n_heads}."
            )
        return rows

    def mask_of_tokens(self, mask: Array) -> Array:
        """Where all channels are masked."""
        return jnp.all(mask, self.channel_axis, keepdims=True)

    def embedding_covariance(self, shape1: Sequence[int], shape2: Sequence[int]) -> Any:
        """Covariance of the embeddings of positions of two inputs, `(S1, S2)`.

        Args:
          shape1, shape2: spatial shapes of the inputs.
        """
        first, second = (np.indices(shape).reshape(len(shape), -1) for shape in (shape1, shape2))
        apart = np.abs(np.subtract(first[:, :, None], second[:, None, :], dtype=float))
        distance = np.sum(apart**self.pos_emb_p_norm, 0)
        if self.pos_emb_decay_fn is None:
            return (distance == 0).astype(float)
        return self.pos_emb_decay_fn(distance)

    def init(self, rng: Array, queries: Sequence[int], memory: Sequence[int]) -> tuple[Any, Any]:
        """Shape of the outputs and weights of cross-attention, for inputs of two shapes."""
        keys = random.split(rng, 7)
        channels, attended, embeddings = [], [], []
        for key, shape in zip(keys[:2], (queries, memory), strict=True):
            channels.append(shape[self.channel_axis])
            embedding = None
            added = 0
            if self.embedding is not PositionalEmbedding.NONE:
                n = self.n_chan_pos_emb
                added = channels[-1] if n is None else n
                embedding = random.normal(key, self._with_ends(shape, 1, added))
            embeddings.append(embedding)
            concat = self.embedding is PositionalEmbedding.CONCAT
            attended.append(channels[-1] + (added if concat else 0))
        valued = attended[1] if self.val_pos_emb else channels[1]
        shapes = (
            (self.n_heads, attended[0], self.n_chan_key),
            (self.n_heads, attended[1], self.n_chan_key),
            (self.n_heads, valued, self.n_chan_val),
            (self.n_heads * self.n_chan_val, self.n_chan_out),
        )
        weights = [random.normal(key, shape) for key, shape in zip(keys[2:6], shapes, strict=True)]
        bias = None
        if self.b_std is not None:
            ones = (1,) * len(queries)
            bias = random.normal(keys[6], self._with_ends(ones, 1, self.n_chan_out))
        shape = self._with_ends(queries, queries[self.batch_axis], self.n_chan_out)
        return shape, (*weights, bias, tuple(embeddings))

    def _with_ends(self, shape: Sequence[int], batch: int, channels: int) -> tuple[int, ...]:
        result = list(shape)
        result[self.batch_axis], result[self.channel_axis] = batch, channels
        return tuple(result)

    def apply_to_self(self, params: Any, inputs: Any, *, mask: Any = None, **kwargs: Any) -> Array:
        """Outputs of self-attention with the parameters of neural_tangents' layer."""
        tokens = self._tokens(inputs, mask, params[-1])
        return self._attend(params, inputs.shape, tokens, tokens, (tokens.attended.shape[1],))

    def apply_to_memory(
        self, params: Any, inputs: Any, *, mask: Any = None, **kwargs: Any
    ) -> Array:
        """Outputs of cross-attention from `inputs`, those of queries and the memory."""
        masks = (None, None) if mask is None else mask
        queries, memory = (
            self._tokens(*each) for each in zip(inputs, masks, params[-1], strict=True)
        )
        lengths = queries.attended.shape[1], memory.attended.shape[1]
        return self._attend(params, inputs[0].shape, queries, memory, lengths)

    def _attend(
        self,
        params: Any,
        shape: Sequence[int],
        queries: "_Tokens",
        memory: "_Tokens",
        lengths: tuple[int, ...],
    ) -> Array:
        of_queries, of_keys, of_values, out, bias, _ = params
        q, k, v = (
            jnp.einsum("nsc,hck->hnsk", of, weights)
            for of, weights in (
                (queries.attended, of_queries),
                (memory.attended, of_keys),
                (memory.valued, of_values),
            )
        )
        if self.mechanism.rotary is not None:
            q, k = (_rotate(x, self.mechanism.rotary) for x in (q, k))
        channels = math.sqrt(queries.attended.shape[-1] * memory.attended.shape[-1])
        scale = self.W_query_std * self.W_key_std / (channels * self.n_chan_key**0.5)
        logits = scale * jnp.einsum("hnsk,hntk->hnst", q, k)
        allowed = jnp.ones(logits.shape[-2:], bool)
        if memory.present is not None:
            allowed = allowed & memory.present[:, None, :]
        rows = self.bias_rows(*lengths, dtype=logits.dtype)
        if rows is not None:
            attended = rows > -jnp.inf
            shares = [jnp.repeat(x, self.n_heads // len(x), 0)[:, None] for x in (rows, attended)]
            logits = logits + jnp.where(shares[1], shares[0], 0)
            allowed = allowed & shares[1]
        weights = self.mechanism.surrogate.softmax(logits, where=allowed)
        heads = jnp.einsum("hnst,hntv->nsvh", weights, v)
        heads = heads.reshape(*heads.shape[:2], len(out))
        scale = self.W_out_std * self.W_value_std
        scale = scale / (heads.shape[-1] * memory.valued.shape[-1]) ** 0.5
        spatial = [n for i, n in enumerate(shape) if i not in self._ends(len(shape))]
        outputs = (scale * (heads @ out)).reshape(len(heads), *spatial, out.shape[1])
        outputs = jnp.moveaxis(outputs, (0, -1), (self.batch_axis, self.channel_axis))
        return outputs if bias is None or self.b_std is None else outputs + self.b_std * bias

    def _ends(self, ndim: int) -> tuple[int, int]:
        return self.batch_axis % ndim, self.channel_axis % ndim

    def _tokens(self, inputs: Any, mask: Any, embedding: Any) -> "_Tokens":
        self.check_axes(inputs.ndim)
        ends = (self.batch_axis, self.channel_axis)
        moved = jnp.moveaxis(inputs, ends, (0, -1))
        n, *spatial, channels = moved.shape
        length = math.prod(spatial)
        x = moved.reshape(n, length, channels)
        present = None
        if mask is not None:
            present = ~jnp.moveaxis(self.mask_of_tokens(mask), ends, (0, -1))
            present = jnp.broadcast_to(present, (n, *spatial, 1)).reshape(n, length)
        if self.embedding is PositionalEmbedding.NONE:
            return _Tokens(x, x, present)
        embedding = jnp.moveaxis(embedding, ends, (0, -1)).reshape(1, x.shape[1], -1)
        if self.pos_emb_decay_fn is not None:
            covariance = jnp.asarray(self.embedding_covariance(spatial, spatial), embedding.dtype)
            embedding = matmul(jnp.linalg.cholesky(covariance), embedding)
        embedding = self.W_pos_emb_std * embedding
        if present is not None:
            embedding = jnp.where(present[:, :, None], embedding, 0)
        if self.embedding is PositionalEmbedding.SUM:
            attended = x + embedding
        else:
            embedding = jnp.broadcast_to(embedding, (n, *embedding.shape[1:]))
            attended = jnp.concatenate([x, embedding], -1)
        return _Tokens(attended, attended if self.val_pos_emb else x, present)


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """One input of the layer.

    Attributes:
      attended, valued: what queries and keys, and what values are made of, `(n, S, channels)`.
      present: which tokens there are, `(n, S)`; None for all.
    """

    attended: Array
    valued: Array
    present: Array | None


def _rotate(x: Array, base: float) -> Array:
    """Each pair of channels of `(..., S, channels)` by its frequency times the position."""
    length, channels = x.shape[-2:]
    frequencies = base ** (-np.arange(0, channels, 2) / channels)
    angles = np.arange(length)[:, None] * frequencies
    cos, sin = (jnp.asarray(f(angles), x.dtype) for f in (np.cos, np.sin))
    first, second = x[..., 0::2], x[..., 1::2]
    rotated = jnp.stack([cos * first - sin * second, sin * first + cos * second], -1)
    return rotated.reshape(x.shape)
