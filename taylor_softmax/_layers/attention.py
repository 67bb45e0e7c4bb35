"""Attention layers: neural_tangents' layer, and the kernels at 1/sqrt(d) that it lacks."""

import inspect
from collections.abc import Callable
from typing import Any

import neural_tangents.stax as nt_stax
from jax import Array
from jax.typing import ArrayLike
from neural_tangents import Kernel
from neural_tangents.stax import (
    AttentionMechanism,
    Bool,
    Diagonal,
    PositionalEmbedding,
    layer,
    requires,
    supports_masking,
)

from taylor_softmax._attention import evaluation, rotary
from taylor_softmax._attention.rows import Rows
from taylor_softmax._layers import attention_kernel
from taylor_softmax._layers.arguments import Layer, in_single_at_least
from taylor_softmax._layers.attention_network import Attention
from taylor_softmax._numerics.arguments import Validated
from taylor_softmax._numerics.surrogate import parse
from taylor_softmax.methods import Method

Window = int | tuple[int, int]
Bias = ArrayLike | Callable[..., ArrayLike]


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
    window: Validated[Window | None] = None,
    bias: Validated[Bias | None] = None,
    rotary: Validated[float | None] = None,
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
    `taylor_softmax.attention_second_moment`, which has the errors. With rotary embeddings the keys
    of queries `a` and `b` covary by `K_pq rho((p - a) - (q - b))` in the place of `K_pq` (and
    `Theta` likewise), `rho(t) = int_0^1 cos(rotary^(-u) t) du`.

    Masked positions are not attended to. What has nothing to attend to is 0 before the bias.

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
      method: `taylor_softmax.methods.QuasiMonteCarlo(n_points, seed, error)`; at order 2 also
        `Direct()`. None chooses.
      causal: each query attends to its own position and those before it. This, `window` and
        `rotary` are for inputs with one spatial axis.
      window: how many keys before and behind its own position a query attends to, an integer for
        both or a pair of them; None for all. As `local_window_size` of
        `jax.nn.dot_product_attention`.
      bias: what is added to the logits, `(S, S)` of queries and keys, `-inf` where a query does not
        attend to a key; or `(B, S, S)`, one for each of `B` equal shares of the heads, such as
        `taylor_softmax.nn.alibi` gives; or a function of the length `S` that gives one of these.
        The kernel is the mean over the shares.
      rotary: base of the frequencies of rotary embeddings, usually 10000.0 (Su et al. 2021, arXiv
        2104.09864): `apply_fn` rotates the pair `f` of channels of queries and keys by
        `rotary^(-2 f / n_chan_key)` times the position, and `n_chan_key` is even. The kernel is the
        limit of many key channels. None for no rotation.
      order: of a Taylor softmax in the place of softmax; even, up to 32. None is softmax.

    Returns:
      `(init_fn, apply_fn, kernel_fn)`.

    Raises:
      TypeError, ValueError: an argument is not one of the above; a keyword-only one with
        `linear_scaling=True` or another mechanism than softmax; `rotary` with positional embeddings
        that are added; inputs without a spatial axis, or `causal`, `window` or `rotary` with inputs
        that have several.
      NotImplementedError: `kernel_fn` behind a softmax over finitely many classes.
    """
    arguments = locals()
    given = {name: arguments[name] for name in _NT_ARGUMENTS}
    softmax = AttentionMechanism(attention_mechanism) is AttentionMechanism.SOFTMAX
    if linear_scaling or not softmax:
        extra = {name: value for name, value in arguments.items() if name not in given}
        extra = {name: value for name, value in extra.items() if value is not None}
        if named := [f"`{name}`" for name, value in extra.items() if value is not False]:
            applies = "applies" if len(named) == 1 else "apply"
            raise ValueError(
                f"{' and '.join(named)} {applies} to softmax attention at 1/sqrt(d) alone, got "
                f"`linear_scaling={linear_scaling}` and "
                f"`attention_mechanism={attention_mechanism!r}`. Pass `linear_scaling=False` and "
                f"`attention_mechanism='SOFTMAX'`."
            )
        return nt_stax.GlobalSelfAttention(**given)
    return _self_attention(given, _attention(arguments))


_NT_ARGUMENTS = tuple(
    name
    for name, parameter in inspect.signature(GlobalSelfAttention).parameters.items()
    if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
)


def GlobalCrossAttention(
    n_chan_out: int,
    n_chan_key: int,
    n_chan_val: int,
    n_heads: int,
    W_key_std: Validated[float] = 1.0,
    W_value_std: Validated[float] = 1.0,
    W_query_std: Validated[float] = 1.0,
    W_out_std: Validated[float] = 1.0,
    b_std: Validated[float | None] = None,
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
    window: Validated[Window | None] = None,
    bias: Validated[Bias | None] = None,
    rotary: Validated[float | None] = None,
    order: Validated[int | None] = None,
) -> Layer:
    """Attention of one sequence to another, as in decoders: a fan-in layer of two branches.

    Its inputs are `[queries, memory]`: queries are made of the first, keys and values of the
    second, each with weights of their own. The lengths may differ, and each has its own mask; the
    output has the length and the mask of the queries. Logits are scaled by `1/sqrt(n_chan_key)`.
    The kernel is that of `GlobalSelfAttention`, with `Q` and `Theta_Q`, the `nngp` and `ntk` of the
    queries, and `K`, `Theta` those of the memory:

        nngp_ab = b_std^2 + (W_out_std W_value_std)^2 F(V),
        ntk_ab = b_std^2 + (W_out_std W_value_std)^2 (2 F(V) + F(Theta_V)
                 + s ((2 Q_ab + Theta_Q_ab) G(V; K) + Q_ab G(V; Theta))).

    Args:
      n_chan_out, n_chan_key, n_chan_val, n_heads, W_key_std, W_value_std, W_query_std, W_out_std,
        b_std, batch_axis, channel_axis, method, window, rotary, order: see `GlobalSelfAttention`.
        Positions of both sequences count from 0.
      pos_emb_type, pos_emb_p_norm, pos_emb_decay_fn, n_chan_pos_emb, W_pos_emb_std, val_pos_emb:
        positional embeddings; each branch has its own.
      bias: as in `GlobalSelfAttention`, of shape `(queries, keys)` or `(B, queries, keys)`, or a
        function of both lengths.

    Returns:
      `(init_fn, apply_fn, kernel_fn)`; `init_fn` takes two shapes, `apply_fn` two inputs.

    Raises:
      TypeError, ValueError: an argument is not one of the above; `rotary` with positional
        embeddings that are added; inputs that are not two, differ in their batch or number of axes,
        or have no spatial axis; `window` or `rotary` with inputs that have several.
      NotImplementedError: `kernel_fn` behind a softmax over finitely many classes.
    """
    return _cross_attention(_attention({**locals(), "causal": False}))


def _attention(given: dict[str, Any]) -> Attention:
    """The arguments of a layer, checked."""
    surrogate = parse(given["order"])
    rows = Rows.parse(given["causal"], given["window"], given["bias"])
    base = _check_rotary(given["rotary"], given["n_chan_key"], given["pos_emb_type"])
    mechanism = evaluation.mechanism(surrogate, given["method"], rows, base)
    names = inspect.signature(Attention).parameters
    shared = {name: given[name] for name in names if name in given}
    return Attention(mechanism=mechanism, rows=rows, **shared)


def _check_rotary(base: Any, n_chan_key: int, embedding: str) -> float | None:
    if base is None:
        return None
    base = rotary.check_base(base)
    if n_chan_key % 2:
        raise ValueError(
            f"`rotary` rotates pairs of key channels: `n_chan_key` must be even, got {n_chan_key}."
        )
    if PositionalEmbedding(embedding) is PositionalEmbedding.SUM:
        raise ValueError(
            "`rotary` takes the place of positional embeddings that are added: pass "
            "`pos_emb_type='NONE'`, or `rotary=None`."
        )
    return base


@layer
@supports_masking(remask_kernel=True)
def _self_attention(given: dict[str, Any], attention: Attention) -> Any:
    init_params, _, _ = nt_stax.GlobalSelfAttention(**given)

    def init_fn(rng: Array, input_shape: tuple[Any, ...]) -> Any:
        attention.check_axes(len(input_shape))
        return init_params(rng, input_shape)

    @_with_requirements(attention)
    def kernel_fn(k: Any, **kwargs: Any) -> Kernel:
        return attention_kernel.kernel(attention, k, k, evaluation.evaluate)

    def mask_fn(mask: Array, input_shape: tuple[int, ...]) -> Array:
        return attention.mask_of_tokens(mask)

    return init_fn, attention.apply_to_self, kernel_fn, mask_fn


@layer
@supports_masking(remask_kernel=True)
def _cross_attention(attention: Attention) -> Any:
    def init_fn(rng: Array, input_shape: Any) -> Any:
        queries, memory = _check_branches(input_shape)
        return attention.init(rng, tuple(queries), tuple(memory))

    def apply_fn(params: Any, inputs: Any, **kwargs: Any) -> Array:
        return attention.apply_to_memory(params, _check_branches(inputs), **kwargs)

    @_with_requirements(attention)
    def kernel_fn(k: Any, **kwargs: Any) -> Kernel:
        queries, memory = _check_branches(k)
        return attention_kernel.kernel(attention, queries, memory, evaluation.evaluate)

    def mask_fn(mask: Any, input_shape: Any) -> Array | None:
        return None if mask[0] is None else attention.mask_of_tokens(mask[0])

    return init_fn, apply_fn, kernel_fn, mask_fn


def _with_requirements(attention: Attention) -> Callable[..., Any]:
    """What a `kernel_fn` needs of kernels that come in."""
    require = requires(
        batch_axis=attention.batch_axis,
        channel_axis=attention.channel_axis,
        diagonal_spatial=Diagonal(input=Bool.NO),
    )
    return lambda kernel_fn: require(in_single_at_least(kernel_fn))


def _check_branches(inputs: Any) -> Any:
    """`inputs`, if they are of queries and of a memory."""
    if not isinstance(inputs, list | tuple) or len(inputs) != 2:
        raise ValueError(
            f"`GlobalCrossAttention` is a fan-in layer of two branches, `[queries, memory]`, got "
            f"{f'{len(inputs)} of them' if isinstance(inputs, list | tuple) else type(inputs)}. "
            f"Put `parallel(...)` of two networks before it."
        )
    return inputs
