"""The kernel of attention between two inputs: all pairs of their queries.

See `attention` for the formulas. Here are the polynomials in the correlation of two queries, whose
coefficients `trace` samples or `closed_queries` computes; what is made of them; and its error, from
the spread of scramblings, see `estimate`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from taylor_softmax._numerics.precision import einsum, matmul
from taylor_softmax._numerics.quadrature import unit_interval_rule
from taylor_softmax._numerics.statistics import Running
from taylor_softmax._numerics.surrogate import Surrogate
from taylor_softmax._position_axis import closed_queries, estimate, rotary, trace
from taylor_softmax._position_axis.estimate import Budget
from taylor_softmax._position_axis.moments import project
from taylor_softmax.methods import Method

# Nodes at which slopes are integrated, exactly where they are polynomials; at variance 100 they
# leave 1e-3.
_NODES = 8


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


class Kernels(NamedTuple):
    """Of pairs of inputs.

    Attributes:
      nngp, ntk: of attention with weights of variance 1 for values and outputs, and no bias.
      error: the estimated largest errors of both, `(pairs, 1 or 2)`, relative to `units`; 0 of what
        is computed without points.
    """

    nngp: Float[Array, "*pairs A1 A2"]
    ntk: Float[Array, "*pairs A1 A2"] | None
    error: Float[Array, "*pairs k"]


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
      weights: of the classes for each query; None where queries are classes.
      spread: mean variance of the keys, times which `tau^2` is that of the logits; 0 of Taylor
        softmax, whose derivatives stay flat.
      present: 1 where there is a key.
      means: `E[y]` of each query, of each group of `logits`; without groups in the closed form.
      logits: in `C` classes.
      scales: None in the closed form, which has no error.
    """

    tau: Float[Array, "*n A"]
    weights: Float[Array, "*n A C"] | None
    spread: Float[Array, "*n"]
    present: Float[Array, "*n T"]
    means: Float[Array, "*n A T"]
    logits: "trace.QueryLogits | closed_queries.ClosedLogits"
    scales: Scales | None


def n_classes(one: Prepared, two: Prepared) -> int:
    return max(x.logits.scales.shape[-1] for x in (one, two))


def kernels(
    mechanism: Mechanism,
    budget: Budget | None,
    one: Prepared,
    two: Prepared,
    cross: Cross,
    points: Float[Array, "k dims points"] | None,
) -> Kernels:
    """Of one pair; without a `budget` by the closed form."""
    if budget is None:
        values, keys, forms = _matrices(cross, mechanism)
        inner, outer = ([_centred(x, one, two, mechanism) for x in of] for of in (keys, values))
        left, right = one.logits, two.logits
        assert isinstance(left, closed_queries.ClosedLogits)
        assert isinstance(right, closed_queries.ClosedLogits)
        of_classes = closed_queries.coefficients(left, right, inner[0], outer, inner, forms)
        coefficients = _of_queries(one, two, of_classes)
        results = _assembled(coefficients, one, two, cross, (one.means, two.means))
        error = jnp.zeros(len(results), results.dtype)
    else:
        results, error, _ = sampled(mechanism, budget, one, two, cross, points)
    return Kernels(results[0], results[1] if len(results) > 1 else None, error)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def sampled(
    mechanism: Mechanism,
    budget: Budget,
    one: Prepared,
    two: Prepared,
    cross: Cross,
    points: Float[Array, "k dims points"],
) -> tuple[Float[Array, "results A1 A2"], Float[Array, " results"], Float[Array, ""]]:
    """NNGP and NTK of one pair, their errors, and how many scramblings."""
    once = _estimator(mechanism, budget, one, two, cross)
    of_units = units(one, two, cross, mechanism)
    k = len(of_units)

    def error(state: Running) -> Array:
        of_points = estimate.relative_error(
            state.stderr()[:k], of_units, state.n, budget.n_scramblings
        )
        # What polynomials are off, of which the spread says nothing: those through a node less are
        # off by at least twice as much.
        fewer = jnp.max(jnp.abs(state.mean[:k] - state.mean[k:]), (1, 2)) / 2
        return of_points + fewer / jnp.maximum(of_units, float(jnp.finfo(fewer.dtype).tiny))

    def reached(state: Running) -> Array:
        assert budget.error is not None
        return jnp.all(error(state) <= budget.error)

    assert one.scales is not None
    assert two.scales is not None
    limit = budget.limit(jnp.sqrt(one.scales.variance * two.scales.variance))
    scramblings = _with_groups(points, one)
    total = estimate.average(once, scramblings, limit, None if budget.error is None else reached)
    return total.mean[:k], error(total), total.n


@sampled.defjvp
def _sampled_jvp(
    mechanism: Mechanism, budget: Budget, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    """That of the mean over the scramblings that the value took."""
    results = sampled(mechanism, budget, *primals)
    *given, points = primals
    n = lax.stop_gradient(results[2])

    def mean(one: Prepared, two: Prepared, cross: Cross) -> Array:
        once = _estimator(mechanism, budget, one, two, cross)
        return estimate.mean_of_first(once, _with_groups(points, one), n)

    _, slopes = jax.jvp(mean, tuple(given), tuple(tangents[:-1]))
    return results, (slopes[: len(results[0])], *(jnp.zeros_like(x) for x in results[1:]))


def _with_groups(points: Array, one: Prepared) -> trace.Scrambling:
    """Each scrambling, and the group of the means of inputs that it takes."""
    return trace.Scrambling(points, jnp.arange(len(points)) % len(one.means))


def _estimator(
    mechanism: Mechanism, budget: Budget, one: Prepared, two: Prepared, cross: Cross
) -> Callable[[trace.Scrambling], Float[Array, "results A1 A2"]]:
    """From one scrambling to NNGP and NTK, and both again of polynomials through a node less."""
    values, matrices, forms = _matrices(cross, mechanism)
    outer = [_centred(x, one, two, mechanism) for x in values]
    nodes = trace.NODES if budget.error is None else trace.NODES_OF_ERROR
    polynomials = [nodes, nodes[:-1]]
    alike = n_classes(one, two) == 1
    first, second = one.logits, two.logits
    assert isinstance(first, trace.QueryLogits)
    assert isinstance(second, trace.QueryLogits)

    def of(matrices: list[Array]) -> trace.Keys:
        inner = [_centred(x, one, two, mechanism) for x in matrices]
        return trace.correlated(first, second, inner)

    def sample(
        left: trace.QueryLogits, keys: trace.Keys, scrambling: trace.Scrambling, aligned: bool
    ) -> list[Array]:
        """Coefficients, for each of the `polynomials`."""
        options = {"surrogate": mechanism.surrogate, "nodes": polynomials[0], "aligned": aligned}
        samples = trace.samples(left, second, keys, outer, forms, scrambling, **options)
        steepness = _steepness(left.scales, second.scales, one, two, aligned=aligned)
        of_classes = (trace.coefficients(samples, steepness, nodes) for nodes in polynomials)
        return [_of_queries(one, two, each) for each in of_classes]

    def unrotated(scrambling: trace.Scrambling) -> list[Array]:
        return sample(first, keys, scrambling, alike)

    def rotated(scrambling: trace.Scrambling) -> list[Array]:
        """Every distance has keys of its own, and serves the queries that far apart."""

        def at(distance: Array, keys: trace.Keys) -> list[Array]:
            if one.weights is not None or alike:
                return sample(first, keys, scrambling, alike)
            index = jnp.clip(jnp.arange(distances.shape[1]) + distance, 0, len(distances) - 1)
            return sample(first.take(index), keys, scrambling, True)

        def add(total: list[Array], of: tuple[Array, trace.Keys]) -> tuple[list[Array], None]:
            chosen = distances == of[0]
            return [jnp.where(chosen, x, y) for x, y in zip(at(*of), total, strict=True)], None

        like = jax.eval_shape(at, each[0], jax.tree.map(lambda x: x[0], keys))
        start = [jnp.zeros((*x.shape[:2], *distances.shape), x.dtype) for x in like]
        return lax.scan(jax.checkpoint(add), start, (each, keys))[0]

    if mechanism.rotary is None:
        keys, coefficients = of(matrices), unrotated
    else:
        apart = _differences(*cross.queries.shape)
        distances, each = jnp.asarray(apart), np.arange(np.min(apart), np.max(apart) + 1)
        apart = np.abs(_differences(*cross.keys.shape) - each[:, None, None])
        rho = rotary.correlations(mechanism.rotary, int(np.max(apart)) + 1, cross.keys.dtype)[apart]
        keys = lax.map(lambda rho: of([rho * x for x in matrices]), rho)
        coefficients, each = rotated, jnp.asarray(each)

    def once(scrambling: trace.Scrambling) -> Array:
        means = one.means[scrambling.group], two.means[scrambling.group]
        of_nodes = coefficients(scrambling)
        return jnp.concatenate([_assembled(x, one, two, cross, means) for x in of_nodes])

    return once


def units(one: Prepared, two: Prepared, cross: Cross, mechanism: Mechanism) -> Float[Array, " k"]:
    """What errors of NNGP and, unless they are not wanted, NTK are relative to.

    Both at correlation 1, as geometric means of the largest ones of the inputs with themselves,
    with NTKs, and values that are not keys, of the shape of `K` and the size that they have.
    """
    scales = [x.scales for x in (one, two) if x.scales is not None]
    of = Scales(*(jnp.sqrt(x) * jnp.sqrt(y) for x, y in zip(*scales, strict=True)))

    def size(matrix: Array, own: Array) -> Array:
        """Relative to that of the keys."""
        norm = jnp.sqrt(jnp.sum(matrix**2))
        return norm / jnp.maximum(own, float(jnp.finfo(own.dtype).tiny))

    present = one.present[:, None] * two.present

    def whole(matrix: Array) -> Array:
        return size(matrix * present, of.size)

    def centred(matrix: Array) -> Array:
        return size(_centred(matrix, one, two, mechanism), of.centred)

    values = (jnp.ones_like(of.size),) * 2
    if cross.values is not None:
        values = whole(cross.values), centred(cross.values)
    nngp = values[0] * of.value
    if cross.keys_ntk is None:
        return nngp[None]
    assert cross.queries_ntk is not None
    values_ntk = cross.keys_ntk if cross.values_ntk is None else cross.values_ntk
    largest = jnp.max(jnp.abs(cross.queries_ntk)) / of.queries
    slopes = values[1] * (2 + largest + centred(cross.keys_ntk)) * of.slope
    return jnp.stack([nngp, 2 * nngp + whole(values_ntk) * of.value + slopes])


def _matrices(
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


def _centred(matrix: Array, one: Prepared, two: Prepared, mechanism: Mechanism) -> Array:
    return project(matrix, one.present, two.present, mechanism.surrogate)


def _differences(rows: int, columns: int) -> np.ndarray:
    """`a - b` for each row `a` and column `b`."""
    return np.subtract.outer(np.arange(rows), np.arange(columns))


def _of_queries(one: Prepared, two: Prepared, of_classes: Array) -> Array:
    """Coefficients of all queries, from those of their classes."""
    if one.weights is None or two.weights is None:
        return of_classes
    return einsum("ai,fkij,bj->fkab", one.weights, of_classes, two.weights)


def _steepness(
    tau1: Array, tau2: Array, one: Prepared, two: Prepared, *, aligned: bool = False
) -> Array:
    """Of pairs of queries of scales `tau1` and `tau2`; all of them, or those at the same place."""
    products = (tau1 if aligned else tau1[:, None]) * tau2
    variance = products * jnp.sqrt(one.spread) * jnp.sqrt(two.spread)
    return lax.stop_gradient(trace.steepness(jnp.atleast_2d(variance)))


def _assembled(
    coefficients: Float[Array, "forms powers A1 A2"],
    one: Prepared,
    two: Prepared,
    cross: Cross,
    means: tuple[Array, Array],
) -> Float[Array, "results A1 A2"]:
    """NNGP and NTK from the coefficients of powers of the correlation in the forms."""
    correlation = jnp.clip(cross.queries / (one.tau[:, None] * two.tau), -1, 1)
    steepness = _steepness(one.tau, two.tau, one, two)

    def slope(form: int, r: Array) -> Array:
        """`G` at correlations `r`."""
        polynomial = functools.reduce(lambda total, c: total * r + c, coefficients[form][::-1])
        return trace.growth(steepness, r) * polynomial

    def value(form: int, of: Array) -> Array:
        """`F`, integrated from correlation 0 on."""
        rule = (x.tolist() for x in unit_interval_rule(_NODES))
        parts = (w * slope(form, t * correlation) for t, w in zip(*rule, strict=True))
        integral = cross.queries * functools.reduce(jnp.add, parts)
        return matmul(matmul(means[0], of), means[1].T) + integral

    nngp = value(0, cross.keys if cross.values is None else cross.values)
    if cross.keys_ntk is None:
        return nngp[None]
    # The terms of output and value weights, of what values are made of, of query and key weights,
    # and of what queries and keys are made of.
    assert cross.queries_ntk is not None
    values_ntk = cross.keys_ntk if cross.values_ntk is None else cross.values_ntk
    ntk = 2 * nngp + value(len(coefficients) - 1, values_ntk)
    ntk = ntk + (2 * cross.queries + cross.queries_ntk) * slope(0, correlation)
    return jnp.stack([nngp, ntk + cross.queries * slope(1, correlation)])
