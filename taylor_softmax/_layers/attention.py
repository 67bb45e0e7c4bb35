"""Self-attention: neural_tangents' layer, and the kernel at 1/sqrt(d) that it lacks."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import neural_tangents.stax as nt_stax
import numpy as np
from jax import Array
from neural_tangents import Kernel
from neural_tangents._src.stax import linear
from neural_tangents.stax import (
    AttentionMechanism,
    Bool,
    Diagonal,
    PositionalEmbedding,
    layer,
    requires,
    supports_masking,
)

from taylor_softmax._layers.arguments import in_single_at_least
from taylor_softmax._layers.finite import FiniteClassKernel
from taylor_softmax._layers.spatial import SpatialLayout
from taylor_softmax._numerics.arguments import Validated, check_boolean
from taylor_softmax._numerics.precision import matmul
from taylor_softmax._numerics.surrogate import parse
from taylor_softmax._position_axis import attention
from taylor_softmax._position_axis.attention import Cross, Inputs, Mechanism, Request, Terms
from taylor_softmax.methods import Method

Layer = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]


def GlobalSelfAttention(
    n_chan_out: int,
    n_chan_key: int,
    n_chan_val: int,
    n_heads: int,
    linear_scaling: bool = True,
    W_key_std: Validated[float] = 1.0,
    W_value_std: Validated[float] = 1.0,
    W_query_std: Validated[float] = 1.0,
    W_out_std: Validated[float] = 1.0,
    b_std: Validated[float | None] = None,
    attention_mechanism: str = AttentionMechanism.SOFTMAX.name,
    pos_emb_type: str = PositionalEmbedding.NONE.name,
    pos_emb_p_norm: Validated[float] = 2,
    pos_emb_decay_fn: Callable[[float], float] | None = None,
    n_chan_pos_emb: int | None = None,
    W_pos_emb_std: Validated[float] = 1.0,
    val_pos_emb: bool = False,
    batch_axis: int = 0,
    channel_axis: int = -1,
    *,
    method: Validated[Method | None] = None,
    causal: Validated[bool] = False,
    order: Validated[int | None] = None,
) -> Layer:
    """Self-attention over all positions, with the kernel of softmax attention at 1/sqrt(d).

    `neural_tangents.stax.GlobalSelfAttention`, whose arguments and defaults these are, in all cases
    but the one it has no kernel for: `linear_scaling=False` with softmax, that is, independent
    query and key weights and logits `Q K^T / sqrt(n_chan_key)`, as in transformers. As the numbers
    of heads and of channels grow, the logits of all queries become jointly Gaussian (Hron, Bahri,
    Sohl-Dickstein & Novak 2020, arXiv 2006.10540). With `s = (W_query_std W_key_std)^2`,
    `K` and `Theta` the incoming `nngp` and `ntk`, positional embeddings included where queries and
    keys see them, `V` and `Theta_V` those that values see, `y_a` the softmax of row `a` and `J_a`
    its Jacobian,

        nngp_ab = b_std^2 + (W_out_std W_value_std)^2 F(V),
        ntk_ab = b_std^2 + (W_out_std W_value_std)^2 (2 F(V) + F(Theta_V)
                 + s ((2 K_ab + Theta_ab) G(V; K) + K_ab G(V; Theta))),
        F(V) = sum_pq V_pq E[y_ap y'_bq],   G(V; C) = E[tr(V^T J_a C J'_b^T)],

    estimated with quasi-random points, the same at every call: see
    `taylor_softmax.attention_second_moment`, which has the errors.

    Masked positions are not attended to.

    Args:
      n_chan_out, n_chan_key, n_chan_val, n_heads: numbers of channels and heads, finite in
        `apply_fn` alone.
      linear_scaling: pass False for what this layer adds; True is attention at 1/d with tied query
        and key weights.
      W_key_std, W_value_std, W_query_std, W_out_std, b_std: standard deviations of the weights and
        the bias; None for no bias.
      attention_mechanism: `"SOFTMAX"`, `"IDENTITY"`, `"ABS"` or `"RELU"`.
      pos_emb_type, pos_emb_p_norm, pos_emb_decay_fn, n_chan_pos_emb, W_pos_emb_std, val_pos_emb:
        positional embeddings, see `neural_tangents.stax.GlobalSelfAttention`.
      batch_axis, channel_axis: of the inputs; all others are positions.
      method: `taylor_softmax.methods.QuasiMonteCarlo(n_points)`, per pair of inputs; at order 2
        also `Direct()`. None chooses.
      causal: each query attends to its own position and those before it; one spatial axis.
      order: of a Taylor softmax in the place of softmax; even, up to 32. None is softmax.

    Returns:
      `(init_fn, apply_fn, kernel_fn)`.

    Raises:
      TypeError, ValueError: an argument is not one of the above; `method`, `causal` or `order` with
        `linear_scaling=True` or another mechanism than softmax; `causal=True` with inputs that have
        other than one spatial axis.
      NotImplementedError: `kernel_fn` behind a softmax over finitely many classes.
    """
    arguments = locals()
    given = {name: arguments[name] for name in _NT_ARGUMENTS}
    softmax = AttentionMechanism(attention_mechanism) is AttentionMechanism.SOFTMAX
    if linear_scaling or not softmax:
        extra = {"method": method, "causal": causal or None, "order": order}
        if named := [f"`{name}`" for name, value in extra.items() if value is not None]:
            raise ValueError(
                f"{' and '.join(named)} apply to softmax attention at 1/sqrt(d) alone, got "
                f"`linear_scaling={linear_scaling}` and "
                f"`attention_mechanism={attention_mechanism!r}`. Pass `linear_scaling=False` and "
                f"`attention_mechanism='SOFTMAX'`."
            )
        return nt_stax.GlobalSelfAttention(**given)
    causal = check_boolean("causal", causal)
    surrogate = parse(order)
    mechanism = Mechanism(surrogate, causal, attention.check_method(method, surrogate))
    return _softmax_attention(given, mechanism)


_NT_ARGUMENTS = tuple(
    name
    for name, parameter in inspect.signature(GlobalSelfAttention).parameters.items()
    if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
)


@layer
@supports_masking(remask_kernel=True)
def _softmax_attention(given: dict[str, Any], mechanism: Mechanism) -> Any:
    init_params, _, _ = nt_stax.GlobalSelfAttention(**given)
    of = Attention(
        mechanism=mechanism,
        **{field.name: given[field.name] for field in dataclasses.fields(Attention)[1:]},
    )

    def init_fn(rng: Array, input_shape: tuple[Any, ...]) -> Any:
        of.check_axes(len(input_shape))
        return init_params(rng, input_shape)

    @requires(
        batch_axis=of.batch_axis,
        channel_axis=of.channel_axis,
        diagonal_spatial=Diagonal(input=Bool.NO),
    )
    @in_single_at_least
    def kernel_fn(k: Any, **kwargs: Any) -> Kernel:
        return of.kernel(k, attention.evaluate)

    def mask_fn(mask: Array, input_shape: tuple[int, ...]) -> Array:
        return jnp.all(mask, of.channel_axis, keepdims=True)

    return init_fn, of.apply, kernel_fn, mask_fn


@dataclasses.dataclass(frozen=True)
class Attention:
    """What the functions of a softmax attention layer share; attributes are its arguments."""

    mechanism: Mechanism
    n_chan_key: int
    n_chan_val: int
    n_heads: int
    n_chan_out: int
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
        if self.mechanism.causal and ndim != 3:
            raise ValueError(
                f"`causal=True` is for inputs with one spatial axis, such as `(batch, length, "
                f"channels)`, along which positions have an order; got inputs with {ndim} axes. "
                f"Reshape them, or pass `causal=False`."
            )

    def apply(self, params: Any, inputs: Any, *, mask: Any = None, **kwargs: Any) -> Array:
        self.check_axes(inputs.ndim)
        queries, keys, values, out, bias, embedding = params
        ends = (self.batch_axis, self.channel_axis)
        moved = jnp.moveaxis(inputs, ends, (0, -1))
        n, *spatial, channels = moved.shape
        x = moved.reshape(n, -1, channels)
        allowed = np.ones((1, x.shape[1], x.shape[1]), bool)
        if self.mechanism.causal:
            allowed = np.tril(allowed)
        present = None
        if mask is not None:
            present = ~jnp.moveaxis(jnp.all(mask, self.channel_axis, keepdims=True), ends, (0, -1))
            present = jnp.broadcast_to(present, (n, *spatial, 1)).reshape(n, -1, 1)
            allowed = allowed & jnp.swapaxes(present, 1, 2)

        attended, valued = self._embed(x, embedding, present, spatial)
        q, k, v = (
            jnp.einsum("nsc,hck->hnsk", of, weights)
            for of, weights in ((attended, queries), (attended, keys), (valued, values))
        )
        scale = self.W_query_std * self.W_key_std / (attended.shape[-1] * self.n_chan_key**0.5)
        logits = scale * jnp.einsum("hnsk,hntk->hnst", q, k)
        weights = self.mechanism.surrogate.softmax(logits, where=jnp.asarray(allowed))
        heads = jnp.einsum("hnst,hntv->nsvh", weights, v).reshape(n, x.shape[1], -1)
        scale = self.W_out_std * self.W_value_std / (heads.shape[-1] * valued.shape[-1]) ** 0.5
        outputs = (scale * (heads @ out)).reshape(n, *spatial, -1)
        outputs = jnp.moveaxis(outputs, (0, -1), ends)
        return outputs if bias is None or self.b_std is None else outputs + self.b_std * bias

    def _embed(
        self, x: Array, embedding: Any, present: Array | None, spatial: Sequence[int]
    ) -> tuple[Array, Array]:
        """What queries and keys are made of, and what values are, `(n, S, channels)`."""
        if self.embedding is PositionalEmbedding.NONE:
            return x, x
        moved = jnp.moveaxis(embedding, (self.batch_axis, self.channel_axis), (0, -1))
        embedding = moved.reshape(1, x.shape[1], -1)
        if self.pos_emb_decay_fn is not None:
            covariance = linear._pos_emb_pdist(spatial, self.pos_emb_p_norm, self.pos_emb_decay_fn)
            shape = (1, *spatial, 1)
            layout = SpatialLayout(shape, shape, 0, len(shape) - 1, range(1, len(shape) - 1))
            covariance = layout.split(covariance, 0)[0, 0]
            embedding = matmul(jnp.linalg.cholesky(covariance), embedding)
        embedding = self.W_pos_emb_std * embedding
        if present is not None:
            embedding = embedding * present
        if self.embedding is PositionalEmbedding.SUM:
            attended = x + embedding
        else:
            embedding = jnp.broadcast_to(embedding, (len(x), *embedding.shape[1:]))
            attended = jnp.concatenate([x, embedding], -1)
        return attended, attended if self.val_pos_emb else x

    def kernel(self, k: Any, evaluate: Callable[..., list[Terms]]) -> Kernel:
        """`k` after the layer.

        Args:
          evaluate: the mechanism, as `attention.evaluate`; tests put another in its place.
        """
        self.check_axes(len(k.shape1))
        if isinstance(k, FiniteClassKernel):
            raise NotImplementedError(
                f"The input of attention has {k.n_classes} channels behind a softmax over classes, "
                f"finitely many: its logits are no matrix-normal variables. Use "
                f"`infinite_width=True` in that softmax; "
                f"`neural_tangents.monte_carlo_kernel_fn` samples any network."
            )
        if k.is_reversed:
            k = k.reverse()
        blocks = _Blocks(k)
        keys = self._embedded(k)
        differ = self.embedding is not PositionalEmbedding.NONE and not self.val_pos_emb
        scale = (self.W_query_std * self.W_key_std) ** 2
        requests = blocks.requests(keys, k if differ else None, scale)
        out = (self.W_out_std * self.W_value_std) ** 2
        bias = 0.0 if self.b_std is None else self.b_std**2
        terms = evaluate(blocks.inputs(keys, scale), requests, self.mechanism)
        kernels = [
            tuple(None if x is None else out * x + bias for x in attention.assemble(t, r.cross))
            for t, r in zip(terms, requests, strict=True)
        ]
        return k.replace(is_gaussian=True, **blocks.kernels(kernels))

    def _embedded(self, k: Any) -> Any:
        """`k` as queries and keys see it: with the covariances of positional embeddings."""
        embeddings = linear._get_all_pos_emb(
            k, self.embedding, self.pos_emb_p_norm, self.pos_emb_decay_fn
        )
        share, weight = 1.0, self.W_pos_emb_std**2
        if self.embedding is PositionalEmbedding.CONCAT:
            channels = k.shape1[k.channel_axis]
            added = channels if self.n_chan_pos_emb is None else self.n_chan_pos_emb
            share, weight = (x / (channels + added) for x in (channels, weight * added))

        def mix(cov: Array | None, embedding: Array | None) -> Array | None:
            if cov is None or embedding is None:
                return cov
            return share * cov + weight * embedding.astype(cov.dtype)

        own1, cross, own2 = embeddings
        return k.replace(
            cov1=mix(k.cov1, own1),
            cov2=mix(k.cov2, own2),
            nngp=mix(k.nngp, cross),
            ntk=mix(k.ntk, cross),
        )


class _Blocks:
    """The kernel of each pair of inputs as one `(S, S)` block, and back.

    Without `x2` all are symmetric in the inputs: a block is computed for one order of every two,
    and the covariances of inputs with themselves are part of `nngp`.
    """

    def __init__(self, k: Any):
        spatial = [i for i in range(len(k.shape1)) if i not in (k.batch_axis, k.channel_axis)]
        self._layout = SpatialLayout(k.shape1, k.shape1, k.batch_axis, k.channel_axis, spatial)
        self._k = k
        self._n1, self._n2 = k.nngp.shape[:2]
        self._symmetric = k.cov2 is None

    def inputs(self, keys: Any, scale: Any) -> Inputs:
        """All of `x1`, then all of `x2`."""
        batch_ndim = 1 if self._k.diagonal_batch else 2
        given = [(keys.cov1, self._k.mask1, self._n1)]
        if not self._symmetric:
            given.append((keys.cov2, self._k.mask2, self._n2))
        covs = jnp.concatenate([self._layout.groups(cov, batch_ndim) for cov, _, _ in given])
        present = jnp.concatenate([self._layout.present(mask, n) for _, mask, n in given])
        variances = scale * jnp.diagonal(covs, axis1=1, axis2=2)
        return Inputs(variances, covs, present.astype(covs.dtype))

    def requests(self, keys: Any, values: Any, scale: Any) -> list[Request]:
        """What `kernels` needs; `values` is None where they see what keys do."""
        n1, n2 = self._n1, self._n2

        def request(name: str, first: np.ndarray, second: np.ndarray, chosen: Any) -> Request:
            def blocks(k: Any, name: str) -> Array | None:
                cov = None if k is None else getattr(k, name)
                return None if cov is None else self._split(cov, getattr(keys, shape).shape)[chosen]

            shape = name
            of_keys = blocks(keys, name)
            assert of_keys is not None
            ntk = blocks(keys, "ntk") if name == "nngp" else None
            return Request(
                first,
                second,
                Cross(
                    queries=scale * of_keys,
                    keys=of_keys,
                    values=blocks(values, name),
                    queries_ntk=None if ntk is None else scale * ntk,
                    keys_ntk=ntk,
                    values_ntk=None if ntk is None else blocks(values, "ntk"),
                ),
            )

        if self._symmetric:
            first, second = np.triu_indices(n1)
            return [request("nngp", first, second, first * n1 + second)]
        first, second = np.indices((n1, n2)).reshape(2, -1)
        requests = [request("nngp", first, n1 + second, slice(None))]
        for name, n, start in (("cov1", n1, 0), ("cov2", n2, n1)):
            if self._k.diagonal_batch:
                first, second, chosen = np.arange(n), np.arange(n), slice(None)
            else:
                first, second = np.triu_indices(n)
                chosen = first * n + second
            requests.append(request(name, start + first, start + second, chosen))
        return requests

    def kernels(self, results: list[Any]) -> dict[str, Array | None]:
        """The fields of the kernel, from NNGP and NTK of the requests."""
        (nngp, ntk), *own = results
        if self._symmetric:
            nngp = _unfold(nngp, self._n1)
            ntk = None if ntk is None else _unfold(ntk, self._n1)
        both = (self._n1, self._n2)
        fields = {
            "nngp": self._layout.join(nngp, both),
            "ntk": None if ntk is None else self._layout.join(ntk, both),
        }
        if self._symmetric:
            cov1 = self._layout.join(nngp, both)
            if self._k.diagonal_batch:
                cov1 = jnp.moveaxis(jnp.diagonal(cov1), -1, 0)
            return {**fields, "cov1": cov1, "cov2": None}
        for name, n, (cov, _) in zip(("cov1", "cov2"), both, own, strict=True):
            if self._k.diagonal_batch:
                cov = (cov + jnp.swapaxes(cov, 1, 2)) / 2
                fields[name] = self._layout.join(cov, (n,))
            else:
                fields[name] = self._layout.join(_unfold(cov, n), (n, n))
        return fields

    def _split(self, cov: Array, shape: tuple[int, ...]) -> Array:
        """`cov`, broadcast to `shape`, as `(pairs, S, S)`."""
        batch_ndim = len(shape) % 2 or 2
        return self._layout.split(jnp.broadcast_to(cov, shape), batch_ndim).reshape(
            -1, *self._layout.n_over
        )


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
