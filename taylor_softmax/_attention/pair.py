"""The kernel of attention between two inputs: all pairs of their queries.

See `attention` for the formulas. Here are the polynomials in the correlation of two queries, whose
coefficients `trace` samples or `closed_queries` computes; what is made of them; and its error, from
the spread of scramblings, see `estimate`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from taylor_softmax._attention import closed_queries, derivatives, inputs, rotary, trace
from taylor_softmax._attention.inputs import Cross, Mechanism, Prepared
from taylor_softmax._numerics.precision import einsum, matmul
from taylor_softmax._numerics.quadrature import unit_interval_rule
from taylor_softmax._numerics.statistics import Running, sum_over
from taylor_softmax._position_axis import estimate
from taylor_softmax._position_axis.derivatives import first_order_only
from taylor_softmax._position_axis.estimate import Budget

# Nodes at which slopes are integrated, exactly where they are polynomials; at variance 100 they
# leave 1e-3.
_NODES = 8

# Logits of both inputs, and how their keys go together.
_Pair = tuple[trace.QueryLogits, trace.QueryLogits, trace.Keys]


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
        values, keys, forms = inputs.matrices(cross, mechanism)
        inner, outer = (
            [inputs.centred(x, one, two, mechanism) for x in of] for of in (keys, values)
        )
        left, right = one.logits, two.logits
        assert isinstance(left, closed_queries.ClosedLogits)
        assert isinstance(right, closed_queries.ClosedLogits)
        of_classes = closed_queries.coefficients(left, right, inner[0], outer, inner, forms)
        coefficients = _of_queries(one, two, of_classes)
        means = one.means, two.means
        results = _assembled(coefficients, one, two, cross, means, sampled=False)
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
    of_units = inputs.units(one, two, cross, mechanism)
    k = len(of_units)

    def error(state: Running) -> Array:
        of_points = estimate.relative_error(
            state.stderr()[:k], of_units, state.n, budget.n_scramblings
        )
        # What polynomials are off, of which the spread says nothing: those through a node less are
        # off by at least twice as much.
        fewer = jnp.max(jnp.abs(state.mean[:k] - state.mean[k:]), (1, 2)) / 2
        return of_points + fewer / jnp.maximum(of_units, float(jnp.finfo(fewer.dtype).tiny))

    assert one.scales is not None
    assert two.scales is not None
    variance = jnp.sqrt(one.scales.variance * two.scales.variance)
    scramblings = _with_groups(points, one)
    results, of_results, n = estimate.average(once, scramblings, budget, variance, error)
    return results[:k], of_results, n


@sampled.defjvp
def _sampled_jvp(
    mechanism: Mechanism, budget: Budget, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    """From the scramblings that the value took.

    The estimate is differentiated in what it has as an explicit factor, in correlations of queries
    and in biases; in covariances of logits by Price's theorem, see `derivatives`.
    """
    results = sampled(mechanism, budget, *primals)
    n = lax.stop_gradient(results[2])
    only = first_order_only
    *given, points = primals
    one, two = (
        jax.tree.map(lambda x, of=of: only(x, of.tau, of.covariance), of) for of in given[:2]
    )
    cross = jax.tree.map(only, given[2])
    scramblings = _with_groups(points, one)

    def mean(one: Prepared, two: Prepared, cross: Cross) -> Array:
        once = _estimator(mechanism, budget, one, two, cross)
        return estimate.mean_of_first(once, scramblings, n)

    _, explicit = jax.jvp(mean, (one, two, cross), tuple(tangents[:-1]))
    once = _by_price(mechanism, one, two, cross, *tangents[:3])
    slopes = explicit[: len(results[0])] + estimate.mean_of_first(once, scramblings, n)
    return results, (slopes, *(jnp.zeros_like(x) for x in results[1:]))


def _with_groups(points: Array, one: Prepared) -> trace.Scrambling:
    """Each scrambling, and the group of the means of inputs that it takes."""
    return trace.Scrambling(points, jnp.arange(len(points)) % len(one.means))


def _estimator(
    mechanism: Mechanism, budget: Budget, one: Prepared, two: Prepared, cross: Cross
) -> Callable[[trace.Scrambling], Float[Array, "results A1 A2"]]:
    """From one scrambling to NNGP and NTK, and both again of polynomials through a node less."""
    values, matrices, forms = inputs.matrices(cross, mechanism)
    outer = [inputs.centred(x, one, two, mechanism) for x in values]
    nodes = trace.NODES if budget.error is None else trace.NODES_OF_ERROR

    def sample(
        pair: _Pair, scrambling: trace.Scrambling, steepness: Array, **options: Any
    ) -> list[Array]:
        samples = trace.samples(*pair, outer, forms, scrambling, nodes=nodes, **options)
        return [trace.coefficients(samples, steepness, of) for of in (nodes, nodes[:-1])]

    coefficients = _of_all_queries(sample, mechanism, one, two, cross, matrices)

    def once(scrambling: trace.Scrambling) -> Array:
        means = one.means[scrambling.group], two.means[scrambling.group]
        of_nodes = coefficients(scrambling)
        return jnp.concatenate(
            [_assembled(x, one, two, cross, means, sampled=True) for x in of_nodes]
        )

    return once


def _by_price(
    mechanism: Mechanism,
    one: Prepared,
    two: Prepared,
    cross: Cross,
    d_one: Prepared,
    d_two: Prepared,
    d_cross: Cross,
) -> Callable[[trace.Scrambling], Float[Array, "results A1 A2"]]:
    """From one scrambling to the derivatives of NNGP and NTK in covariances of logits."""
    values, matrices, forms = inputs.matrices(cross, mechanism)
    outer = [inputs.centred(x, one, two, mechanism) for x in values]
    # That of values that come from elsewhere is not needed.
    forms = forms[:2] if len(values) > 1 else []
    along_keys = [(i, len(matrices)) for i in range(len(values))]
    changes = d_one.covariance, d_two.covariance

    def sample(
        pair: _Pair, scrambling: trace.Scrambling, steepness: Array, **options: Any
    ) -> list[Array]:
        options["nodes"] = trace.NODES
        crossing = trace.samples(*pair, outer, along_keys, scrambling, **options)
        of_products, of_traces = derivatives.samples(
            *pair, (values, outer), forms, scrambling, changes, **options
        )
        fitted = functools.partial(trace.coefficients, steepness=steepness, nodes=trace.NODES)
        # `G` grows like `h`, and its derivatives like `h^3`.
        of_slopes = [fitted(x, degree=3) for x in of_traces]
        return [fitted(crossing), *(fitted(x) for x in of_products), *of_slopes]

    matrices = [*matrices, d_cross.keys]
    coefficients = _of_all_queries(sample, mechanism, one, two, cross, matrices)
    steepness = _steepness(one.tau, two.tau, one, two)
    correlation, d_correlation = jax.jvp(_correlation, (one, two, cross), (d_one, d_two, d_cross))
    along_scales = (d_one.tau / one.tau)[:, None], d_two.tau / two.tau

    def once(scrambling: trace.Scrambling) -> Array:
        def at(coefficients: Array, r: Array, degree: int = 1) -> Array:
            return jnp.stack([_polynomial(x, steepness, r, degree=degree) for x in coefficients])

        def total(of_keys: Array, *of_scales: Array) -> Array:
            parts = (x * y for x, y in zip(along_scales, of_scales, strict=True))
            return of_keys + functools.reduce(jnp.add, parts)

        crossing, *of_changes = coefficients(scrambling)
        # `Q G(V; dK12)`, in the place of the integral, of which the estimate has it as a factor.
        integral = _integrated(functools.partial(at, crossing), correlation)
        of_values = total(*(at(x, correlation) for x in of_changes[:3]))
        of_values = of_values + cross.queries * (at(crossing, correlation) - integral)
        if not forms:
            return of_values
        *of_slopes, along_r = of_changes[3:]
        of_forms = total(*(at(x, correlation, 3) for x in of_slopes))
        # It is that along the logarithm of `r`, of powers from the first on.
        of_forms = of_forms + d_correlation * at(along_r[:, 1:], correlation, 3)
        assert cross.queries_ntk is not None
        ntk = 2 * of_values[0] + of_values[1]
        ntk = ntk + (2 * cross.queries + cross.queries_ntk) * of_forms[0]
        return jnp.stack([of_values[0], ntk + cross.queries * of_forms[1]])

    return once


def _of_all_queries(
    sample: Callable[..., list[Array]],
    mechanism: Mechanism,
    one: Prepared,
    two: Prepared,
    cross: Cross,
    matrices: list[Array],
) -> Callable[[trace.Scrambling], list[Float[Array, "forms powers A1 A2"]]]:
    """From one scrambling to coefficients of all pairs of queries.

    Args:
      sample: gives those of classes, or of queries at the same place, from a pair, a scrambling
        and the steepness of `G`; its options are `aligned` and `surrogate` of `trace.samples`.
      matrices: of `Keys`, before rotation.
    """
    alike = inputs.n_classes(one, two) == 1
    first, second = one.logits, two.logits
    assert isinstance(first, trace.QueryLogits)
    assert isinstance(second, trace.QueryLogits)

    def keys_of(matrices: list[Array]) -> trace.Keys:
        inner = [inputs.centred(x, one, two, mechanism) for x in matrices]
        return trace.correlated(first, second, inner)

    def of_queries(
        left: trace.QueryLogits, keys: trace.Keys, scrambling: trace.Scrambling, aligned: bool
    ) -> list[Array]:
        steepness = _steepness(left.scales, second.scales, one, two, aligned=aligned)
        options = {"aligned": aligned, "surrogate": mechanism.surrogate}
        of_classes = sample((left, second, keys), scrambling, steepness, **options)
        return [_of_queries(one, two, x) for x in of_classes]

    if mechanism.rotary is None:
        keys = keys_of(matrices)
        return lambda scrambling: of_queries(first, keys, scrambling, alike)

    # Every distance has keys of its own, and serves the queries that far apart.
    apart = _differences(*cross.queries.shape)
    distances, shifts = jnp.asarray(apart), np.arange(np.min(apart), np.max(apart) + 1)
    apart = np.abs(_differences(*cross.keys.shape) - shifts[:, None, None])
    rho = rotary.correlations(mechanism.rotary, int(np.max(apart)) + 1, cross.keys.dtype)[apart]
    keys = lax.map(lambda rho: keys_of([rho * x for x in matrices]), rho)

    def rotated(scrambling: trace.Scrambling) -> list[Array]:
        def at_distance(given: tuple[Array, trace.Keys]) -> list[Array]:
            distance, keys = given
            left, aligned = first, alike
            if one.weights is None and not alike:
                index = jnp.arange(distances.shape[1]) + distance
                left, aligned = first.take(jnp.clip(index, 0, len(distances) - 1)), True
            found = of_queries(left, keys, scrambling, aligned)
            return [jnp.where(distances == distance, x, 0) for x in found]

        return sum_over(at_distance, (jnp.asarray(shifts), keys))

    return rotated


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
    *,
    sampled: bool,
) -> Float[Array, "results A1 A2"]:
    """NNGP and NTK from the coefficients of powers of the correlation in the forms.

    Args:
      sampled: leave to `_by_price` what follows from logits of another covariance.
    """
    correlation, steepness = _correlation(one, two, cross), _steepness(one.tau, two.tau, one, two)
    scales = one.tau[:, None] * two.tau
    if sampled:
        scales = lax.stop_gradient(scales)

    def slope(form: int, r: Array) -> Array:
        """`G` at correlations `r`."""
        return _polynomial(coefficients[form], steepness, r)

    def value(form: int, matrix: Array) -> Array:
        """`F`, integrated from correlation 0 on."""
        mean = _integrated(functools.partial(slope, form), correlation)
        return matmul(matmul(means[0], matrix), means[1].T) + scales * correlation * mean

    nngp = value(0, cross.keys if cross.values is None else cross.values)
    if cross.keys_ntk is None:
        return nngp[None]
    # The terms of output and value weights, of what values are made of, of query and key weights,
    # and of what queries and keys are made of.
    assert cross.queries_ntk is not None
    values_ntk = cross.keys_ntk if cross.values_ntk is None else cross.values_ntk
    ntk = 2 * nngp + value(len(coefficients) - 1, values_ntk)
    still = lax.stop_gradient(correlation) if sampled else correlation
    ntk = ntk + (2 * cross.queries + cross.queries_ntk) * slope(0, still)
    return jnp.stack([nngp, ntk + cross.queries * slope(1, still)])


def _correlation(one: Prepared, two: Prepared, cross: Cross) -> Float[Array, "A1 A2"]:
    """Of all pairs of queries."""
    correlation = cross.queries / (one.tau[:, None] * two.tau)
    # Slopes are those without the clip, which halves them at 1.
    return correlation + lax.stop_gradient(jnp.clip(correlation, -1, 1) - correlation)


def _integrated(function: Callable[[Array], Array], r: Array) -> Array:
    """`int_0^1 of(t r) dt`."""
    rule = (x.tolist() for x in unit_interval_rule(_NODES))
    return functools.reduce(jnp.add, (w * function(t * r) for t, w in zip(*rule, strict=True)))


def _polynomial(
    coefficients: Float[Array, "powers A1 A2"], steepness: Array, r: Array, *, degree: int = 1
) -> Array:
    """At correlations `r`, times `h^degree`."""
    polynomial = functools.reduce(lambda total, c: total * r + c, coefficients[::-1])
    return trace.growth(steepness, r) ** degree * polynomial
