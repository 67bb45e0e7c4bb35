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
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from taylor_softmax._numerics.precision import einsum, matmul
from taylor_softmax._numerics.surrogate import Surrogate
from taylor_softmax._position_axis import closed_form, sampling, trace
from taylor_softmax._position_axis.moments import project
from taylor_softmax.methods import Direct, Method, QuasiMonteCarlo, choose

# Scales of queries at which `G` is computed where they differ, and the relative difference of
# variances below which they don't: normalised inputs in float32 differ by 1e-6.
_N_SCALES = 3
_EQUAL = 1e-4

# Scales are interpolated in log(1 / 2 + variance of the logits).
_OFFSET = 0.5

# Correlations at which the closed form of order 2 is evaluated.
_CLOSED_NODES = 8

# Numbers in the largest array of a step, on accelerators.
_CHUNK = 1 << 24


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
    sampled = QuasiMonteCarlo(n_points=1 << 10)
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
        return _evaluate(inputs, requests, mechanism, _class_of_each_position)
    variances, present = inputs.variances, inputs.present > 0
    largest = jnp.max(jnp.where(present, variances, 0), -1)
    smallest = jnp.min(jnp.where(present, variances, jnp.inf), -1)
    equal = jnp.all(smallest >= (1 - _EQUAL) * largest)

    def of(classify: "_Classify") -> Callable[[], list[Terms]]:
        return lambda: _evaluate(inputs, requests, mechanism, classify)

    return lax.cond(equal, of(_one_class), of(_classes_of_scales))


class _Classes(NamedTuple):
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
_Classify = Callable[[Array, Array, Array], _Classes]


def _class_of_each_position(variances: Array, spread: Array, present: Array) -> _Classes:
    size = len(variances)
    earlier = jnp.asarray(np.tri(size), present.dtype)
    return _Classes(_safe_sqrt(variances), earlier * present, jnp.eye(size, dtype=present.dtype))


def _one_class(variances: Array, spread: Array, present: Array) -> _Classes:
    mean = jnp.sum(variances * present) / jnp.maximum(jnp.sum(present), 1)
    return _Classes(_safe_sqrt(mean[None]), present[None], jnp.ones_like(present)[:, None])


def _classes_of_scales(variances: Array, spread: Array, present: Array) -> _Classes:
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
    nodes = nodes / nodes[0]
    u = (x - centre) / half * present
    weights = [
        math.prod((u - other) / (node - other) for other in nodes if other != node)
        for node in nodes
    ]
    scales = _safe_sqrt((jnp.exp(centre + half * nodes) - _OFFSET) / spread)
    allowed = jnp.broadcast_to(present, (_N_SCALES, len(present)))
    return _Classes(scales.astype(x.dtype), allowed, jnp.stack(weights, -1))


def _safe_sqrt(x: Array) -> Array:
    """Root with a finite slope everywhere."""
    return jnp.sqrt(jnp.maximum(x, jnp.finfo(x.dtype).tiny))


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
    logits: "trace.Logits | _ClosedLogits"


def _evaluate(
    inputs: Inputs, requests: list[Request], mechanism: Mechanism, classify: _Classify
) -> list[Terms]:
    prepare = functools.partial(_prepare, mechanism=mechanism, classify=classify)
    prepared = lax.map(jax.checkpoint(prepare), inputs)
    return [_map_pairs(prepared, request, mechanism) for request in requests]


def _prepare(one: Inputs, *, mechanism: Mechanism, classify: _Classify) -> _Prepared:
    present, surrogate = one.present, mechanism.surrogate
    noise = sampling.rounding(one.keys * present[:, None] * present)
    keys = project(one.keys, present, present, surrogate)
    variance = jnp.trace(keys) / jnp.maximum(jnp.sum(present), 1)
    classes = classify(one.variances, variance, present)
    if isinstance(mechanism.method, Direct):
        logits, means = _closed_logits(keys, classes)
    else:
        logits = trace.prepare(keys, noise, classes.scales, classes.allowed, surrogate)
        means = logits.components.mean
    return _Prepared(_safe_sqrt(one.variances), classes.weights, present, means, logits)


class _ClosedLogits(NamedTuple):
    """Logits of one input at order 2, for `C` classes of scales `tau`."""

    scales: Float[Array, "*n C"]
    classes: closed_form.Logits


def _closed_logits(keys: Array, classes: _Classes) -> tuple[_ClosedLogits, Array]:
    """The logits, and the means of the classes."""

    def of_class(of: tuple[Array, Array]) -> tuple[closed_form.Logits, Array]:
        scale, allowed = of
        covariance = scale**2 * keys * allowed[:, None] * allowed
        logits = closed_form.prepare(covariance, allowed)
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
        step = max(1, _CHUNK // (_points(mechanism) * size * n_classes**2))
    pairs = jnp.asarray(request.first), jnp.asarray(request.second), request.cross
    return lax.map(jax.checkpoint(pair), pairs, batch_size=step)


def _points(mechanism: Mechanism) -> int:
    method = mechanism.method
    return method.n_points if isinstance(method, QuasiMonteCarlo) else closed_form.N_NODES**2


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
    if isinstance(one.logits, trace.Logits) and isinstance(two.logits, trace.Logits):
        coefficients = trace.coefficients(
            one.logits,
            two.logits,
            inner[0],
            outer,
            inner,
            forms,
            surrogate=surrogate,
            n_points=_points(mechanism),
        )
    else:
        coefficients = _closed_coefficients(one.logits, two.logits, outer, inner, forms)
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
        cross = r * one.scales[i] * two.scales[j] * keys[0]
        cross = cross * first.present[:, None] * second.present
        moved = [x * first.present[:, None] * second.present for x in keys]
        slopes = [closed_form.moment_and_slope(first, second, cross, x)[1] for x in moved]
        return jnp.stack([jnp.sum(values[v] * slopes[k]) for v, k in forms])

    results = lax.map(traces, (i, j, jnp.asarray(nodes, keys[0].dtype)[k]))
    return einsum("kr,ijrf->fkij", fit, results.reshape(*shape, len(forms)))


def _polynomial(coefficients: Array, x: Array) -> Array:
    return functools.reduce(lambda total, c: total * x + c, coefficients[::-1])
