"""Softmax attention at 1/sqrt(d), with infinitely many heads and channels of keys.

With `Q` the covariances of what queries are made of, times the variances of the weights, and `K`
those of keys, the logits of all queries of all inputs are jointly Gaussian:

    Cov[G_ap(x), G_bq(x')] = Q_ab K_pq.

Of `y_a`, the softmax of row `a`, with Jacobian `J_a`, and for the covariances `V` of values,

    F(V)_ab = sum_pq V_pq E[y_ap y'_bq],        G(V; C)_ab = E[tr(V^T J_a C J'_b^T)],

make the kernel (Hron, Bahri, Sohl-Dickstein & Novak 2020, arXiv 2006.10540, who left them open).
By Price's theorem `dF(V)_ab / dQ_ab = G(V; K)_ab`.

All queries of an input see the same keys: their logits differ in scale alone, `tau_a^2 = Q_aa`.
Between two inputs, at given scales, they differ in the correlation `r_ab = Q_ab / (tau_a tau_b)`
alone. In `r`, `G` is a polynomial to the accuracy wanted, and one set of points gives its
coefficients: all pairs of queries at the price of one. With `m = E[y]`,

    F(V)_ab = m_a^T V m'_b + Q_ab sum_k r_ab^k G_k / (k + 1).

`G` is sampled, rather than `F`, because it is as small as what it is integrated to.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from taylor_softmax._numerics.arguments import (
    Validated,
    as_real,
    broadcast_covariances,
    check_boolean,
    fits,
)
from taylor_softmax._numerics.precision import einsum, matmul
from taylor_softmax._numerics.surrogate import Surrogate, parse
from taylor_softmax._position_axis import closed_form, queries, sampling, trace
from taylor_softmax._position_axis.moments import project
from taylor_softmax.methods import Direct, Method, QuasiMonteCarlo, choose

# Relative difference of variances below which queries count as equal in scale: normalised inputs in
# float32 differ by 1e-6.
_EQUAL = 1e-4

# Correlations at which the closed form of order 2 is evaluated.
_CLOSED_NODES = 8

# Numbers in the largest array of a step, on accelerators.
_CHUNK = 1 << 24


class AttentionMoments(NamedTuple):
    """Kernels of attention, `(..., S, S)`.

    Attributes:
      nngp: `F(V)`.
      ntk: None without NTKs of what it is made of.
    """

    nngp: Float[Array, "*batch S S"]
    ntk: Float[Array, "*batch S S"] | None


def attention_second_moment(
    cov11: Validated[ArrayLike],
    cov12: Validated[ArrayLike],
    cov22: Validated[ArrayLike],
    *,
    values12: Validated[ArrayLike | None] = None,
    ntk12: Validated[ArrayLike | None] = None,
    values_ntk12: Validated[ArrayLike | None] = None,
    scale: Validated[ArrayLike] = 1.0,
    present1: Validated[ArrayLike | None] = None,
    present2: Validated[ArrayLike | None] = None,
    causal: Validated[bool] = False,
    order: Validated[int | None] = None,
    method: Validated[Method | None] = None,
) -> AttentionMoments:
    """Kernels of infinitely wide softmax attention at 1/sqrt(d), `softmax(Q K^T / sqrt(d)) V`.

    Two inputs of `S` tokens, `K11`, `K12`, `K22` the covariances of one channel of what queries and
    keys are made of. With `y_a` the attention weights of query `a`, the softmax of logits of
    covariance `s K_ab K_pq`, and `J_a` its Jacobian,

        nngp_ab = F(V)_ab = sum_pq V_pq E[y_ap y'_bq],
        ntk_ab = 2 F(V) + F(Theta_V) + s ((2 K12_ab + Theta_ab) G(V; K12) + K12_ab G(V; Theta)),
        G(V; C)_ab = E[tr(V^T J_a C J'_b^T)]

    (Hron, Bahri, Sohl-Dickstein & Novak 2020, arXiv 2006.10540): those of the layer
    `taylor_softmax.stax.GlobalSelfAttention` with weights of variance 1 for values and outputs.
    Covariances may be singular, and positive semi-definite up to rounding. Differentiable.

    Errors: `ATTENTION_NNGP` and `ATTENTION_NTK` in `taylor_softmax._numerics.errors` where all
    `K_aa` of an input are equal, `ATTENTION_VARYING` where they differ by a factor of up to 6, by
    the largest variance of the logits (order 2: they are 1e-3 then). Causal attention, which has a
    mean over points for each query, is as good as where they are equal, and takes `S^2` times as
    many operations.

    Args:
      cov11, cov12, cov22: `K11`, `K12`, `K22`, each `(..., S, S)`.
      values12: `V`, covariance between what the inputs' values are made of; `K12` by default.
      ntk12: `Theta`, the NTK of what queries and keys are made of. None: no NTK is computed.
      values_ntk12: `Theta_V`, that of values; `Theta` by default.
      scale: `s`, variance of the query weights times that of the key weights; a number.
      present1, present2: which tokens there are, booleans `(..., S)`; all by default. Others are
        not attended to; rows and columns of theirs in the result mean nothing.
      causal: query `a` attends to keys up to `a` only.
      order: even order of a Taylor softmax in the place of softmax, up to 32; None is softmax.
      method: `QuasiMonteCarlo(n_points)`, per pair of inputs, the default; `Direct()`, the default
        at order 2, which has a closed form (slow for causal attention).

    Returns:
      `AttentionMoments(nngp, ntk)`.

    Raises:
      TypeError, ValueError: `order`, `method` or `causal` is not one of the above; a covariance is
        not of shape `(..., S, S)` with the same `S` as the others; `values_ntk12` without `ntk12`.
    """
    surrogate = parse(order)
    causal = check_boolean("causal", causal)
    mechanism = Mechanism(surrogate, causal, check_method(method, surrogate))
    if values_ntk12 is not None and ntk12 is None:
        raise ValueError("`values_ntk12` is part of the NTK: pass `ntk12` too.")
    *covs, dtype = broadcast_covariances(cov11, cov12, cov22)
    shape = covs[0].shape
    cov11, cov12, cov22 = (cov.reshape(-1, *shape[-2:]) for cov in covs)
    values = _like("values12", values12, shape, cov12.dtype)
    theta = _like("ntk12", ntk12, shape, cov12.dtype)
    values_theta = _like("values_ntk12", values_ntk12, shape, cov12.dtype)
    given = {"present1": present1, "present2": present2}
    present = [
        _like(name, np.ones(shape[-1]) if value is None else value, shape[:-1], cov12.dtype)
        for name, value in given.items()
    ]
    (factor,), _ = as_real(scale=scale)
    if factor.ndim:
        raise ValueError(f"`scale` must be a number, got an array of shape {factor.shape}.")
    factor = factor.astype(cov12.dtype)
    keys = jnp.concatenate([cov11, cov22])
    both = jnp.concatenate([(x > 0).astype(cov12.dtype) for x in present if x is not None])
    inputs = Inputs(factor * jnp.diagonal(keys, axis1=1, axis2=2), keys, both)
    queries_ntk = None if theta is None else factor * theta
    cross = Cross(factor * cov12, cov12, values, queries_ntk, theta, values_theta)
    first = np.arange(len(cov12))
    (terms,) = evaluate(inputs, [Request(first, first + len(first), cross)], mechanism)
    nngp, ntk = (
        None if x is None else x.reshape(shape).astype(dtype) for x in assemble(terms, cross)
    )
    assert nngp is not None
    return AttentionMoments(nngp, ntk)


def _like(name: str, value: Any, shape: tuple[int, ...], dtype: Any) -> Array | None:
    """The argument `name` for every pair, `(pairs, S)` or `(pairs, S, S)`, or what is wrong."""
    if value is None:
        return None
    (array,), _ = as_real(**{name: value})
    if array.shape[-1:] != shape[-1:] or not fits(array.shape, shape):
        raise ValueError(f"`{name}` must have shape {shape}, got {array.shape}.")
    inputs = shape[-2:] if name.endswith("12") else shape[-1:]
    return jnp.broadcast_to(array, shape).reshape(-1, *inputs).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """How queries attend.

    Attributes:
      surrogate: what the softmax normalises.
      causal: each query to the keys up to its own position only.
      method: how the terms are evaluated.
    """

    surrogate: Surrogate
    causal: bool
    method: Method


def methods(surrogate: Surrogate) -> tuple[Method, ...]:
    """The methods that apply, the default one first."""
    sampled = QuasiMonteCarlo(n_points=1 << 11)
    return (Direct(), sampled) if surrogate.has_closed_form else (sampled,)


def check_method(method: Any, surrogate: Surrogate) -> Method:
    """`method`, or the default if it is None, or which ones apply."""
    return choose(method, *methods(surrogate), axis=f"attention with {surrogate}")


class Inputs(NamedTuple):
    """`n` inputs of `S` positions.

    Attributes:
      variances: `Q_aa`, `(n, S)`.
      keys: `K`, `(n, S, S)`.
      present: 1 where there is a position, 0 where it is padding, `(n, S)`.
    """

    variances: Array
    keys: Array
    present: Array


class Cross(NamedTuple):
    """Covariances between the inputs of each pair, `(pairs, S, S)`, and their NTKs.

    Attributes:
      queries, keys: `Q`, `K`.
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


class Request(NamedTuple):
    """Pairs of inputs `first[k]`, `second[k]`, with `cross`."""

    first: np.ndarray
    second: np.ndarray
    cross: Cross


class Terms(NamedTuple):
    """What the kernel is assembled from, `(pairs, S, S)`; the last three with NTKs only.

    Attributes:
      value: `F(V)`.
      value_ntk: `F(V_ntk)`.
      slope: `G(V; K)`.
      slope_ntk: `G(V; K_ntk)`.
    """

    value: Array
    value_ntk: Array | None = None
    slope: Array | None = None
    slope_ntk: Array | None = None


def assemble(terms: Terms, cross: Cross) -> tuple[Array, Array | None]:
    """NNGP and NTK of attention with weights of variance 1 for values and outputs, and no bias.

    The NTK's terms: those of output and value weights, each `F(V)`; of what values are made of; of
    query and key weights, each `Q G(V; K)`; of what queries and keys are made of.
    """
    if terms.value_ntk is None or terms.slope is None or terms.slope_ntk is None:
        return terms.value, None
    assert cross.queries_ntk is not None
    weights = 2 * terms.value + 2 * cross.queries * terms.slope
    inputs = terms.value_ntk + cross.queries_ntk * terms.slope + cross.queries * terms.slope_ntk
    return terms.value, weights + inputs


@functools.partial(jax.jit, static_argnames="mechanism")
def evaluate(inputs: Inputs, requests: Sequence[Request], mechanism: Mechanism) -> list[Terms]:
    """The terms of each request, of softmax attention."""
    requests = list(requests)
    if mechanism.causal:
        return _evaluate(inputs, requests, mechanism, queries.of_each_position)
    variances, present = inputs.variances, inputs.present > 0
    largest = jnp.max(jnp.where(present, variances, 0), -1)
    smallest = jnp.min(jnp.where(present, variances, jnp.inf), -1)
    equal = jnp.all(smallest >= (1 - _EQUAL) * largest)

    def of(classify: queries.Classify) -> Callable[[], list[Terms]]:
        return lambda: _evaluate(inputs, requests, mechanism, classify)

    return lax.cond(equal, of(queries.one_for_all), of(queries.of_scales))


class _Prepared(NamedTuple):
    """What pairs need of an input.

    Attributes:
      scales: `tau_a` of each query.
      weights: of the classes for each query.
      present: 1 where there is a position.
      means: `E[y]` of the classes.
      logits: in `C` classes.
    """

    scales: Float[Array, "*n S"]
    weights: Float[Array, "*n S C"]
    present: Float[Array, "*n S"]
    means: Float[Array, "*n C S"]
    logits: "trace.QueryLogits | _ClosedLogits"


def _evaluate(
    inputs: Inputs, requests: list[Request], mechanism: Mechanism, classify: queries.Classify
) -> list[Terms]:
    prepare = functools.partial(_prepare, mechanism=mechanism, classify=classify)
    prepared = lax.map(jax.checkpoint(prepare), inputs)
    return [_map_pairs(prepared, request, mechanism) for request in requests]


def _prepare(one: Inputs, *, mechanism: Mechanism, classify: queries.Classify) -> _Prepared:
    present, surrogate = one.present, mechanism.surrogate
    noise = sampling.rounding(one.keys * present[:, None] * present)
    keys = project(one.keys, present, present, surrogate)
    variance = jnp.trace(keys) / jnp.maximum(jnp.sum(present), 1)
    classes = classify(one.variances, variance, present)
    if isinstance(mechanism.method, Direct):
        logits, means = _closed_logits(keys, classes)
    else:
        logits = trace.query_logits(keys, noise, classes.scales, classes.allowed, surrogate)
        means = logits.components.mean
    return _Prepared(queries.safe_sqrt(one.variances), classes.weights, present, means, logits)


class _ClosedLogits(NamedTuple):
    """Logits of one input at order 2, for `C` classes of scales `tau`."""

    scales: Float[Array, "*n C"]
    classes: closed_form.EigenLogits


def _closed_logits(keys: Array, classes: queries.Classes) -> tuple[_ClosedLogits, Array]:
    """The logits, and the means of the classes."""

    def of_class(of: tuple[Array, Array]) -> tuple[closed_form.EigenLogits, Array]:
        scale, allowed = of
        covariance = scale**2 * keys * allowed[:, None] * allowed
        logits = closed_form.diagonalise(covariance, allowed)
        # Outputs sum to 1, so that the rows of m m^T sum to m.
        uncorrelated = closed_form.second_moment(logits, logits, jnp.zeros_like(keys))
        return logits, jnp.sum(uncorrelated, 1)

    logits, means = lax.map(of_class, (classes.scales, classes.allowed))
    return _ClosedLogits(classes.scales, logits), means


def _map_pairs(prepared: _Prepared, request: Request, mechanism: Mechanism) -> Terms:
    def pair(of: tuple[Array, Array, Cross]) -> Terms:
        i, j, cross = of
        one, two = (jax.tree.map(lambda x, k=k: x[k], prepared) for k in (i, j))
        return _pair(one, two, cross, mechanism)

    # Processors take one pair after the other: what a pair needs fits their caches.
    step = None
    if jax.default_backend() != "cpu":
        size, n_classes = prepared.weights.shape[1:]
        method = mechanism.method
        points = size
        if isinstance(method, QuasiMonteCarlo):
            assert method.n_points is not None
            points = method.n_points
        step = max(1, _CHUNK // (points * size * n_classes**2))
    pairs = jnp.asarray(request.first), jnp.asarray(request.second), request.cross
    return lax.map(jax.checkpoint(pair), pairs, batch_size=step)


def _pair(one: _Prepared, two: _Prepared, cross: Cross, mechanism: Mechanism) -> Terms:
    surrogate = mechanism.surrogate

    def centred(cov: Array) -> Array:
        return project(cov, one.present, two.present, surrogate)

    values = [cross.keys if cross.values is None else cross.values]
    keys, forms = [cross.keys], [(0, 0)]
    if cross.keys_ntk is not None:
        values.append(cross.keys_ntk if cross.values_ntk is None else cross.values_ntk)
        keys.append(cross.keys_ntk)
        # The Jacobian of softmax is symmetric, and so is `G` in its two matrices.
        shared = cross.values is None and cross.values_ntk is None
        forms += [(0, 1)] if shared and surrogate.is_shift_invariant else [(0, 1), (1, 0)]
    inner, outer = [centred(x) for x in keys], [centred(x) for x in values]
    of_pair: tuple[Any, ...] = one.logits, two.logits, inner[0], outer, inner, forms
    if isinstance(mechanism.method, QuasiMonteCarlo):
        n_points = mechanism.method.n_points
        assert n_points is not None
        coefficients = trace.coefficients(*of_pair, surrogate=surrogate, n_points=n_points)
    else:
        coefficients = _closed_coefficients(*of_pair)
    coefficients = einsum("ai,fkij,bj->fkab", one.weights, coefficients, two.weights)
    correlation = jnp.clip(cross.queries / (one.scales[:, None] * two.scales), -1, 1)
    mean1, mean2 = (matmul(x.weights, x.means) for x in (one, two))

    def value(form: int, of: Array) -> Array:
        """`F`, integrated from correlation 0 on."""
        divided = coefficients[form] / np.arange(1, coefficients.shape[1] + 1)[:, None, None]
        integral = cross.queries * _polynomial(divided, correlation)
        return matmul(matmul(mean1, of), mean2.T) + integral

    if cross.keys_ntk is None:
        return Terms(value(0, values[0]))
    return Terms(
        value(0, values[0]),
        value(len(forms) - 1, values[1]),
        _polynomial(coefficients[0], correlation),
        _polynomial(coefficients[1], correlation),
    )


def _closed_coefficients(
    one: _ClosedLogits,
    two: _ClosedLogits,
    cross: Array,
    values: list[Array],
    keys: list[Array],
    forms: list[tuple[int, int]],
) -> Array:
    """What `trace.coefficients` estimates, through exact values at Chebyshev's nodes in `r`."""
    nodes = np.cos((np.arange(_CLOSED_NODES) + 0.5) * np.pi / _CLOSED_NODES)
    fit = jnp.asarray(np.linalg.inv(np.vander(nodes, increasing=True)), keys[0].dtype)
    shape = len(one.scales), len(two.scales), _CLOSED_NODES
    i, j, k = (jnp.asarray(x) for x in np.indices(shape).reshape(3, -1))

    def traces(at: tuple[Array, Array, Array]) -> Array:
        i, j, r = at
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


def _polynomial(coefficients: Array, x: Array) -> Array:
    return functools.reduce(lambda total, c: total * x + c, coefficients[::-1])
