"""Softmax attention at 1/sqrt(d), with infinitely many heads and channels of keys.

With `Q` the covariances of what queries are made of, times the variances of the weights, and `K`
those of keys, the logits of all queries of all inputs are jointly Gaussian:

    Cov[G_ap(x), G_bq(x')] = Q_ab K_pq.

A row of biases is added to those of each query, `-inf` where it does not attend to a key: causal
masks, windows, padding and ALiBi are all such rows. Of `y_a`, the softmax of row `a`, with Jacobian
`J_a`, and for the covariances `V` of values,

    F(V)_ab = sum_pq V_pq E[y_ap y'_bq],        G(V; C)_ab = E[tr(V^T J_a C J'_b^T)],

make the kernel (Hron, Bahri, Sohl-Dickstein & Novak 2020, arXiv 2006.10540, who left them open).
By Price's theorem `dF(V)_ab / dQ_ab = G(V; K)_ab`.

All queries of an input see the same keys: their logits differ in scale, `tau_a^2 = Q_aa`, and in
biases. Two queries of two inputs differ in nothing else but the correlation
`r_ab = Q_ab / (tau_a tau_b)`. In `r`, `G` is a polynomial times a known function to the accuracy
wanted, and one set of points gives its coefficients for all pairs of queries. With `m = E[y]`,

    F(V)_ab = m_a^T V m'_b + Q_ab int_0^1 G(V; K)_ab(t r_ab) dt.

`G` is sampled, rather than `F`, because it is as small as what it is integrated to. Each scrambling
of the points gives an estimate, and their spread its error: see `estimate`.

Rotary embeddings (Su et al. 2021, arXiv 2104.09864) turn keys against queries by frequencies
`base^(-u)`, `u` uniform in `[0, 1]` in the limit of many channels. Keys of queries `a` and `b` then
covary by `K_pq rho((p - a) - (q - b))`, `rho(t) = int_0^1 cos(base^(-u) t) du`: for one query that
is the same for all `a`, and for two it depends on their distance, so that the pairs of queries at
one distance share a sample.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from taylor_softmax._attention import evaluation
from taylor_softmax._attention.evaluation import Inputs, Request
from taylor_softmax._attention.inputs import Cross
from taylor_softmax._attention.rotary import check_base
from taylor_softmax._attention.rows import Rows
from taylor_softmax._numerics.arguments import Validated, as_real, check_entries
from taylor_softmax._numerics.surrogate import parse
from taylor_softmax.methods import Method


class AttentionMoments(NamedTuple):
    """Kernels of attention, `(..., A1, A2)` of the queries of two inputs.

    Attributes:
      nngp: `F(V)`.
      ntk: None without NTKs of what it is made of.
    """

    nngp: Float[Array, "*batch A1 A2"]
    ntk: Float[Array, "*batch A1 A2"] | None


def attention_second_moment(
    cov11: Validated[ArrayLike],
    cov12: Validated[ArrayLike],
    cov22: Validated[ArrayLike],
    *,
    queries11: Validated[ArrayLike | None] = None,
    queries12: Validated[ArrayLike | None] = None,
    queries22: Validated[ArrayLike | None] = None,
    values12: Validated[ArrayLike | None] = None,
    ntk12: Validated[ArrayLike | None] = None,
    queries_ntk12: Validated[ArrayLike | None] = None,
    values_ntk12: Validated[ArrayLike | None] = None,
    scale: Validated[ArrayLike] = 1.0,
    present1: Validated[ArrayLike | None] = None,
    present2: Validated[ArrayLike | None] = None,
    causal: Validated[bool] = False,
    window: Validated[int | tuple[int, int] | None] = None,
    bias: Validated[ArrayLike | Callable[..., ArrayLike] | None] = None,
    rotary: Validated[float | None] = None,
    order: Validated[int | None] = None,
    method: Validated[Method | None] = None,
) -> AttentionMoments:
    """Kernels of infinitely wide softmax attention at 1/sqrt(d), `softmax(Q K^T / sqrt(d)) V`.

    Two inputs of `S1` and `S2` tokens, `K11`, `K12`, `K22` the covariances of one channel of what
    keys are made of, and `Q11`, `Q12`, `Q22` those of queries: `K` in self-attention. With `y_a`
    the attention weights of query `a`, the softmax of logits of covariance `s Q_ab K_pq`, and `J_a`
    its Jacobian,

        nngp_ab = F(V)_ab = sum_pq V_pq E[y_ap y'_bq],
        ntk_ab = 2 F(V) + F(Theta_V) + s ((2 Q12_ab + Theta_Q_ab) G(V; K12) + Q12_ab G(V; Theta)),
        G(V; C)_ab = E[tr(V^T J_a C J'_b^T)]

    (Hron, Bahri, Sohl-Dickstein & Novak 2020, arXiv 2006.10540): those of the layers
    `taylor_softmax.stax.GlobalSelfAttention` and `GlobalCrossAttention` with weights of variance 1
    for values and outputs. Covariances may be singular, and positive semi-definite up to rounding.
    Differentiable in all covariances and the bias: at `order=2` without a finite bias, which has a
    closed form, to any order; first derivatives alone where points are used, which estimate the
    derivatives by Price's theorem. Their errors are of the size of the kernel's. A derivative of
    the NTK takes `S1 + S2` times as long as the NTK.

    Errors are relative to the largest entries of the inputs with themselves. Those promised are
    `ATTENTION`, with rotary embeddings `ATTENTION_ROTARY`, in `taylor_softmax._numerics.errors`, by
    the largest variance of the logits (order 2: they are 1e-3 then). Where values are concrete, an
    estimated error of more than 5e-2 of the NNGP or 0.1 of the NTK warns.

    Args:
      cov11, cov12, cov22: `K11`, `(..., S1, S1)`, `K12`, `(..., S1, S2)`, and `K22`.
      queries11, queries12, queries22: `Q11`, `(..., A1, A1)`, of which the diagonal counts, `Q12`,
        `(..., A1, A2)`, and `Q22`, for cross-attention; those of keys by default.
      values12: `V`, covariance between what the inputs' values are made of; `K12` by default.
      ntk12: `Theta`, the NTK of what keys are made of. None: no NTK is computed.
      queries_ntk12: `Theta_Q`, that of queries; `Theta` by default, where `Q12` is `K12`.
      values_ntk12: `Theta_V`, that of values; `Theta` by default.
      scale: `s`, variance of the query weights times that of the key weights; a number.
      present1, present2: which keys there are, booleans `(..., S1)` and `(..., S2)`; all by
        default. Others are not attended to. In self-attention rows and columns of theirs in the
        result mean nothing.
      causal: query `a` attends to keys up to `a` only.
      window: how many keys before and behind its own position a query attends to, an integer for
        both or a pair; None for all.
      bias: what is added to the logits, `(queries, keys)`, `-inf` where a query does not attend to
        a key; or `(B, queries, keys)`, one for each of `B` equal shares of the heads, of which the
        result is the mean; or a function that gives one of these for a length, and in
        cross-attention for the numbers of queries and of keys.
      rotary: base of the frequencies of rotary embeddings; None without.
      order: even order of a Taylor softmax in the place of softmax, up to 32; None is softmax.
      method: `QuasiMonteCarlo(n_points, seed, error)`, the default; `Direct()` at order 2
        without `bias` and `rotary`, which has a closed form: the default unless queries attend to
        keys of their own, where it is slow.

    Returns:
      `AttentionMoments(nngp, ntk)`; 0 for a query that has nothing to attend to.

    Raises:
      TypeError, ValueError: an argument is not one of the above; a covariance does not have the
        shape above, or is not finite; `values_ntk12` or `queries_ntk12` without `ntk12`, or one of
        the `queries` without the others.
    """
    surrogate = parse(order)
    rows = Rows.parse(causal, window, bias)
    base = None if rotary is None else check_base(rotary)
    mechanism = evaluation.mechanism(surrogate, method, rows, base)
    keys = {"cov11": cov11, "cov12": cov12, "cov22": cov22}
    asking = {"queries11": queries11, "queries12": queries12, "queries22": queries22}
    extra = {
        "values12": values12,
        "ntk12": ntk12,
        "queries_ntk12": queries_ntk12,
        "values_ntk12": values_ntk12,
    }
    presence = {"present1": present1, "present2": present2}
    crossing = _check_given(asking, extra)
    optional = {k: v for k, v in {**asking, **extra, **presence}.items() if v is not None}
    arrays, dtype = as_real(**keys, **optional)
    given = dict(zip([*keys, *optional], arrays, strict=True))
    covs, batch = _check_shapes(given, "queries" if crossing else "cov")
    factor = _check_scale(scale, covs["cov12"].dtype)
    own = [covs[name] for name in (("queries11", "queries22") if crossing else ("cov11", "cov22"))]
    queries12 = covs["queries12" if crossing else "cov12"]
    inputs = []
    for side, queries in enumerate(own):
        of_keys, present = covs[("cov11", "cov22")[side]], covs.get(f"present{side + 1}")
        there = jnp.ones(of_keys.shape[:2], of_keys.dtype)
        if present is not None:
            there = (present != 0).astype(of_keys.dtype)
        variances = factor * jnp.diagonal(queries, axis1=1, axis2=2)
        asked = jnp.ones_like(variances) if crossing else there
        lengths = (variances.shape[1], of_keys.shape[1])[: 2 if crossing else 1]
        bias_rows = rows.of(*lengths, dtype=of_keys.dtype)
        inputs.append(Inputs(variances, asked, of_keys, there, bias_rows))
    theta = covs.get("ntk12")
    queries_ntk = covs.get("queries_ntk12", theta)
    cross = Cross(
        factor * queries12,
        covs["cov12"],
        covs.get("values12"),
        None if queries_ntk is None else factor * queries_ntk,
        theta,
        covs.get("values_ntk12"),
    )
    index = np.arange(len(queries12))
    (result,) = evaluation.evaluate(inputs, [Request(index, index, cross, (0, 1))], mechanism)
    evaluation.warn([result], mechanism)
    nngp, ntk = (
        None if x is None else x.reshape(*batch, *x.shape[1:]).astype(dtype)
        for x in (result.nngp, result.ntk)
    )
    assert nngp is not None
    return AttentionMoments(nngp, ntk)


def _check_given(asking: dict[str, Any], extra: dict[str, Any]) -> bool:
    """Whether there are queries of their own, if what is given belongs together."""
    missing = [name for name, value in asking.items() if value is None]
    if 0 < len(missing) < len(asking):
        named = ", ".join(f"`{name}`" for name in asking)
        raise ValueError(f"{named} belong together: pass `{'`, `'.join(missing)}` too, or none.")
    if extra["ntk12"] is None:
        for name in ("values_ntk12", "queries_ntk12"):
            if extra[name] is not None:
                raise ValueError(f"`{name}` is part of the NTK: pass `ntk12` too.")
    elif not missing and extra["queries_ntk12"] is None:
        raise ValueError(
            "`ntk12` is that of keys: pass `queries_ntk12`, that of queries, too; zeros where they "
            "have no parameters."
        )
    return not missing


def _check_shapes(
    given: dict[str, Array], queries: str
) -> tuple[dict[str, Array], tuple[int, ...]]:
    """The arrays with one batch axis, and the batch that they had.

    Args:
      queries: how the names of the covariances of queries begin.

    Raises:
      ValueError: shapes don't fit, or a covariance is not finite or has a negative variance.
    """

    def lengths(name: str) -> list[int]:
        shapes = (given[f"{name}{side}"].shape for side in ("11", "22"))
        return [shape[-1] if shape else 0 for shape in shapes]

    of_keys, of_queries = lengths("cov"), lengths(queries)
    expected: dict[str, tuple[int, ...]] = {}
    for name in given:
        sizes = of_queries if name.startswith("queries") else of_keys
        expected[name] = tuple(sizes[int(digit) - 1] for digit in name if digit.isdigit())
    batches = {}
    for name, array in given.items():
        shape = expected[name]
        if array.shape[-len(shape) :] != shape or 0 in shape:
            wanted = ", ".join(["...", *map(str, shape)])
            others = " and ".join(f"`{n}` of shape {given[n].shape}" for n in ("cov11", "cov22"))
            raise ValueError(
                f"`{name}` must have shape ({wanted}), got {array.shape} beside {others}."
            )
        batches[name] = array.shape[: -len(shape)]
    try:
        batch = np.broadcast_shapes(*batches.values())
    except ValueError:
        listed = ", ".join(f"`{name}` {given[name].shape}" for name in given)
        raise ValueError(f"Batches must broadcast by NumPy's rules, got {listed}.") from None
    for name, array in given.items():
        check_entries(name, array, jnp.isfinite(array), "finite")
        if name in ("cov11", "cov22", "queries11", "queries22"):
            variance = jnp.diagonal(array, axis1=-2, axis2=-1)
            # Of inputs that differ by nothing but rounding it may be below 0.
            slack = 1e-4 * jnp.max(jnp.abs(variance), -1, keepdims=True)
            check_entries(name, variance, ~(variance < -slack), "nonnegative along its diagonal")
    return {
        name: jnp.broadcast_to(array, (*batch, *expected[name])).reshape(-1, *expected[name])
        for name, array in given.items()
    }, batch


def _check_scale(scale: Any, dtype: Any) -> Array:
    (factor,), _ = as_real(scale=scale)
    if factor.ndim:
        raise ValueError(f"`scale` must be a number, got an array of shape {factor.shape}.")
    return factor.astype(dtype)
