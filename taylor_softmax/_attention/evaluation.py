"""The kernel of attention for pairs of inputs with rows of biases of any kind.

Here are the preparation of each input and the loop over pairs; `pair` has what is
computed of a pair.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from taylor_softmax._attention import closed_queries, inputs, pair, queries, rotary, trace
from taylor_softmax._attention.inputs import Cross, Mechanism, Prepared
from taylor_softmax._attention.pair import Kernels
from taylor_softmax._attention.rows import Rows
from taylor_softmax._numerics.arguments import known, namespace
from taylor_softmax._numerics.precision import matmul
from taylor_softmax._numerics.statistics import sum_over
from taylor_softmax._numerics.surrogate import Surrogate
from taylor_softmax._position_axis import estimate, sampling
from taylor_softmax._position_axis.estimate import Budget, Default
from taylor_softmax._position_axis.moments import project
from taylor_softmax.methods import Direct, Method, QuasiMonteCarlo, choose

# Relative difference of variances below which queries count as equal in scale: normalised inputs in
# float32 differ by 1e-6.
_EQUAL = 1e-4

# Queries of unequal scales beyond which scales are interpolated.
_MANY_SCALES = 16

# Numbers in the largest array of a step, on accelerators.
_CHUNK = 1 << 24

# In 128 points pairs of dimensions are correlated by up to 0.6, in 256 by 0.1: with those, keys of
# rank 3 had up to six times the error (16 tokens, causal, measured). 512 halve no error but that of
# i.i.d. tokens at variance 1, 4e-4 (16 tokens, one class, measured).
_DEFAULT = Default(4, 1 << 8, (5e-2, 0.1))

# That is for so many keys and more. For fewer there are as many times more points, up to a factor.
_KEYS, _MORE_OF_FEW = 16, 4


def mechanism(surrogate: Surrogate, method: Any, rows: Rows, base: float | None) -> Mechanism:
    """Of queries with `rows` of biases, or what is wrong with `method`.

    Args:
      base: of rotary embeddings; None without.

    Raises:
      TypeError, ValueError: `method` does not apply.
    """
    sampled = QuasiMonteCarlo()
    applicable: tuple[Method, ...] = (sampled,)
    if surrogate.has_closed_form and rows.bias is None and base is None:
        # Slow where every query is a class.
        applicable = (sampled, Direct()) if rows.along_a_line else (Direct(), sampled)
    axis = f"attention with {surrogate}"
    if surrogate.has_closed_form and len(applicable) == 1:
        axis += ", and a bias or rotary embeddings"
    chosen = choose(method, *applicable, axis=axis)
    return Mechanism(surrogate, chosen, base)


class Inputs(NamedTuple):
    """`n` inputs, of `A` queries and `T` keys each.

    Attributes:
      variances: `Q_aa`, `(n, A)`.
      asked: 1 where there is a query, 0 where it is padding, `(n, A)`.
      keys: `K`, `(n, T, T)`.
      present: 1 where there is a key, `(n, T)`.
      bias: rows of constants in the logits, `-inf` where a query does not attend to a key, for each
        of `H` equal shares of the heads, `(H, A, T)`; None where they are all 0.
    """

    variances: Array
    asked: Array
    keys: Array
    present: Array
    bias: Array | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["first", "second", "cross"],
    meta_fields=["sides"],
)
@dataclasses.dataclass(frozen=True)
class Request:
    """Pairs of inputs.

    Attributes:
      first, second: indices of the two inputs of each pair, in their `Inputs`.
      cross: of the pairs.
      sides: which `Inputs` the first ones, and the second ones, are of.
    """

    first: np.ndarray | Array
    second: np.ndarray | Array
    cross: Cross
    sides: tuple[int, int] = (0, 0)


def warn(results: Sequence[Kernels], mechanism: Mechanism) -> None:
    """Says so where an error is missed; see `estimate.warn`."""
    errors = [each.error for each in results]
    estimate.warn(errors, mechanism.method, "Attention", default=_DEFAULT)


def evaluate(
    sides: Sequence[Inputs], requests: Sequence[Request], mechanism: Mechanism
) -> list[Kernels]:
    """The kernels of each request."""
    equal = None
    if sides[0].bias is None:
        # Of two ways to evaluate them one is compiled, where it is known which.
        known_scales = _have_equal_scales(sides)
        equal = None if isinstance(known_scales, Tracer) else bool(known_scales)
    return _evaluate_all(list(sides), list(requests), mechanism, equal)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _evaluate_all(
    sides: list[Inputs], requests: list[Request], mechanism: Mechanism, equal: bool | None
) -> list[Kernels]:
    """Args: `equal`: whether queries have equal scales, if it is known and there is no bias."""
    sides, requests = _joined_sides(sides, requests)
    biases = [side.bias for side in sides if side.bias is not None]
    if biases:

        def of_share(bias: list[Array]) -> list[Kernels]:
            classify = [queries.of_each(rows) for rows in bias]
            return _evaluate(sides, requests, mechanism, classify)

        return jax.tree.map(lambda x: x / len(biases[0]), sum_over(of_share, biases))
    many = max(side.variances.shape[1] for side in sides) > _MANY_SCALES

    def of(rule: queries.Classify) -> Callable[[], list[Kernels]]:
        return lambda: _evaluate(sides, requests, mechanism, [rule] * len(sides))

    alike = of(queries.one_for_all)
    unequal = of(queries.of_scales if many else queries.of_each(None))
    if equal is None:
        return lax.cond(_have_equal_scales(sides), alike, unequal)
    return alike() if equal else unequal()


def _joined_sides(
    sides: list[Inputs], requests: list[Request]
) -> tuple[list[Inputs], list[Request]]:
    """Sides of equal lengths as one, so that what prepares them, and their pairs, compile once.

    Their rows of biases are the same, as lengths alone tell them.
    """
    arrays = [side[:-1] for side in sides]
    if len({tuple(x.shape[1:] for x in of_side) for of_side in arrays}) > 1:
        return sides, requests
    variances, asked, keys, present = (jnp.concatenate(x) for x in zip(*arrays, strict=True))
    joined = Inputs(variances, asked, keys, present, sides[0].bias)
    ends = np.cumsum([len(side.keys) for side in sides])
    starts = [int(end) - len(side.keys) for end, side in zip(ends, sides, strict=True)]
    moved = [
        Request(each.first + starts[each.sides[0]], each.second + starts[each.sides[1]], each.cross)
        for each in requests
    ]
    return [joined], moved


def _have_equal_scales(sides: Sequence[Inputs]) -> Any:
    """Whether all queries of each input do."""

    def of_side(side: Inputs) -> Any:
        variances, asked = known(side.variances), known(side.asked) > 0
        xp = namespace(variances, asked)
        largest = xp.max(xp.where(asked, variances, 0), -1)
        smallest = xp.min(xp.where(asked, variances, xp.inf), -1)
        return xp.all(smallest >= (1 - _EQUAL) * largest)

    return functools.reduce(operator.and_, (of_side(side) for side in sides))


def _evaluate(
    sides: list[Inputs],
    requests: list[Request],
    mechanism: Mechanism,
    classify: list[queries.Classify],
) -> list[Kernels]:
    budget = None
    if isinstance(mechanism.method, QuasiMonteCarlo):
        n_keys = max(side.keys.shape[-1] for side in sides)
        more = 1 << (min(_MORE_OF_FEW, max(1, _KEYS // n_keys)).bit_length() - 1)
        default = _DEFAULT._replace(n_points=_DEFAULT.n_points * more)
        budget = Budget.of(mechanism.method, default=default)
    prepared = [
        _prepare_all(side, mechanism, rule, budget)
        for side, rule in zip(sides, classify, strict=True)
    ]
    # A loop over pairs is compiled for all requests whose pairs have the same shapes.
    groups: dict[Any, list[int]] = {}
    for i, request in enumerate(requests):
        arrays, structure = jax.tree.flatten(request.cross)
        shapes = tuple(x.shape[1:] for x in arrays)
        groups.setdefault((request.sides, structure, shapes), []).append(i)
    results: dict[int, Kernels] = {}
    for (of_sides, *_), members in groups.items():
        chosen = [requests[i] for i in members]
        joined = jax.tree.map(lambda *x: jnp.concatenate(x), *chosen)
        one, two = (prepared[side] for side in of_sides)
        kernels = _map_pairs(one, two, joined, mechanism, budget)
        ends = np.cumsum([len(request.first) for request in chosen])[:-1]
        leaves, structure = jax.tree.flatten(kernels)
        parts = zip(*(jnp.split(x, ends) for x in leaves), strict=True)
        for i, part in zip(members, parts, strict=True):
            results[i] = jax.tree.unflatten(structure, part)
    return [results[i] for i in range(len(requests))]


def _prepare_all(
    side: Inputs, mechanism: Mechanism, classify: queries.Classify, budget: Budget | None
) -> Prepared:
    keys = side.keys
    # Outside the loop over inputs, in which they would be laid out once an input.
    points = None if budget is None else trace.mean_points(budget, keys.shape[-1], keys.dtype)

    def prepare(one: Inputs) -> Prepared:
        return _prepare(one, mechanism, classify, points)

    return lax.map(jax.checkpoint(prepare), side._replace(bias=None))


def _prepare(
    one: Inputs, mechanism: Mechanism, classify: queries.Classify, points: Array | None
) -> Prepared:
    present, surrogate = one.present, mechanism.surrogate
    keys = own = one.keys * present[:, None] * present
    if mechanism.rotary is not None:
        table = rotary.correlations(mechanism.rotary, len(keys), keys.dtype)
        keys = keys * table[np.abs(np.subtract.outer(*(np.arange(len(keys)),) * 2))]
    noise = sampling.rounding(keys)
    keys, seen = (project(x, present, present, surrogate) for x in (keys, own))
    variance = jnp.trace(keys) / jnp.maximum(jnp.sum(present), 1)
    row = jnp.where(present > 0, 0.0, -jnp.inf).astype(keys.dtype)
    classes = classify(one.variances, one.asked, variance, row)
    scales = None
    if points is None:
        logits, means = closed_queries.closed_logits(keys, classes)
    else:
        # What follows from covariances is differentiated by Price's theorem, of each pair.
        frozen = lax.stop_gradient((keys, noise, classes.scales))
        logits = trace.query_logits(*frozen, classes.bias, surrogate, points)
        classes = classes._replace(weights=lax.stop_gradient(classes.weights))
        means = logits.mean
        value, slope = trace.own_scales(logits, own, seen, keys, surrogate, points[0])
        largest = jnp.max(classes.scales) ** 2
        scales = inputs.Scales(
            value=jnp.max(value),
            slope=jnp.max(slope),
            size=jnp.sqrt(jnp.sum(own**2)),
            centred=jnp.sqrt(jnp.sum(seen**2)),
            queries=largest,
            variance=largest * jnp.max(jnp.diagonal(keys)),
        )
        scales = jax.tree.map(lax.stop_gradient, scales)
    if classes.weights is not None:
        means = matmul(classes.weights, means)
    tau = queries.safe_sqrt(one.variances)
    spread = variance if surrogate.is_shift_invariant else jnp.zeros_like(variance)
    return Prepared(tau, keys, classes.weights, spread, present, means, logits, scales)


def _map_pairs(
    one: Prepared, two: Prepared, request: Request, mechanism: Mechanism, budget: Budget | None
) -> Kernels:
    cross = request.cross
    if not len(request.first):
        nothing = jnp.zeros_like(cross.queries)
        has_ntk = cross.keys_ntk is not None
        return Kernels(nothing, nothing if has_ntk else None, jnp.zeros((0, 1 + has_ntk)))
    points = None
    if budget is not None:
        order = sampling.leading_first(*cross.keys.shape[1:])
        points = budget.scramblings(len(order), cross.keys.dtype)[:, order]

    def of_pair(given: tuple[Array, Array, Cross]) -> Kernels:
        i, j, cross = given
        left, right = (jax.tree.map(lambda x, k=k: x[k], side) for side, k in ((one, i), (two, j)))
        return pair.kernels(mechanism, budget, left, right, cross, points)

    # Processors take one pair after the other: what a pair needs fits their caches.
    step = None
    if jax.default_backend() != "cpu":
        size, n_classes = one.present.shape[1], inputs.n_classes(one, two)
        n_points = size if budget is None else budget.n_points
        step = max(1, _CHUNK // (n_points * 4 * n_classes * max(n_classes, size)))
    pairs = jnp.asarray(request.first), jnp.asarray(request.second), cross
    return lax.map(jax.checkpoint(of_pair), pairs, batch_size=step)
