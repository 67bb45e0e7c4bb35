"""What the kernel of attention is made of, for pairs of inputs with rows of biases of any kind.

See `attention` for the formulas. Here are the preparation of each input, the loop over pairs, and
the polynomials in the correlation of two queries; `trace` samples their coefficients.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from taylor_softmax._numerics.precision import einsum, matmul
from taylor_softmax._numerics.surrogate import Surrogate
from taylor_softmax._position_axis import closed_queries, queries, rotary, sampling, trace
from taylor_softmax._position_axis.attention_rows import Rows
from taylor_softmax._position_axis.moments import project
from taylor_softmax.methods import Direct, Method, QuasiMonteCarlo, choose

# Relative difference of variances below which queries count as equal in scale: normalised inputs in
# float32 differ by 1e-6.
_EQUAL = 1e-4

# Queries of unequal scales beyond which scales are interpolated.
_MANY_SCALES = 16

# Numbers in the largest array of a step, on accelerators.
_CHUNK = 1 << 24

# Points by default, of classes that several queries share, and of queries that are classes, which
# take longer. There 512 points leave 1.0e-3 and 1.4e-3 at 16 and 32 tokens, variance 1 (measured).
_SHARED_POINTS, _POINTS_OF_EACH = 1 << 11, 1 << 9


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """How queries attend.

    Attributes:
      surrogate: what the softmax normalises.
      method: how the terms are evaluated.
      rotary: base of the frequencies of rotary embeddings; None without.
    """

    surrogate: Surrogate
    method: Method
    rotary: float | None = None


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
    if isinstance(chosen, QuasiMonteCarlo) and chosen.error is not None:
        raise ValueError(
            f"`error` of `{chosen}` does not apply to {axis}: points are drawn for all pairs of "
            f"queries together. Pass `n_points`, and compare kernels of several `seed`s."
        )
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


class Terms(NamedTuple):
    """What the kernel is assembled from, `(pairs, A1, A2)`; the last three with NTKs only.

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
def evaluate(
    sides: Sequence[Inputs], requests: Sequence[Request], mechanism: Mechanism
) -> list[Terms]:
    """The terms of each request."""
    sides, requests = list(sides), list(requests)
    biases = [side.bias for side in sides]
    if biases[0] is not None:

        def of_share(bias: list[Array]) -> list[Terms]:
            return _evaluate(sides, requests, mechanism, [queries.of_each(rows) for rows in bias])

        return _mean_over_shares(of_share, biases)
    equal = jnp.all(jnp.stack([_have_equal_scales(side) for side in sides]))
    many = max(side.variances.shape[1] for side in sides) > _MANY_SCALES
    unequal = queries.of_scales if many else queries.of_each(None)

    def of(classify: queries.Classify) -> Callable[[], list[Terms]]:
        return lambda: _evaluate(sides, requests, mechanism, [classify] * len(sides))

    return lax.cond(equal, of(queries.one_for_all), of(unequal))


def _have_equal_scales(side: Inputs) -> Array:
    """Whether all queries of each input do."""
    asked = side.asked > 0
    largest = jnp.max(jnp.where(asked, side.variances, 0), -1)
    smallest = jnp.min(jnp.where(asked, side.variances, jnp.inf), -1)
    return jnp.all(smallest >= (1 - _EQUAL) * largest)


def _mean_over_shares(of: Callable[[Any], Any], biases: Any) -> Any:
    """Mean of `of` over the first axis, that of shares of the heads."""
    n = len(biases[0])
    if n == 1:
        return of([bias[0] for bias in biases])

    def add(total: Any, bias: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of(bias)), None

    shapes = jax.eval_shape(of, [bias[0] for bias in biases])
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = lax.scan(jax.checkpoint(add), start, biases)
    return jax.tree.map(lambda x: x / n, total)


class _Prepared(NamedTuple):
    """What pairs need of an input; `C` is 1 where all queries are alike.

    Attributes:
      scales: `tau_a` of each query.
      weights: of the classes for each query; None where queries are classes, or alike.
      present: 1 where there is a key.
      means: `E[y]` of each query.
      logits: in `C` classes.
    """

    scales: Float[Array, "*n A"]
    weights: Float[Array, "*n A C"] | None
    present: Float[Array, "*n T"]
    means: Float[Array, "*n C T"]
    logits: "trace.QueryLogits | closed_queries.ClosedLogits"


def _evaluate(
    sides: list[Inputs],
    requests: list[Request],
    mechanism: Mechanism,
    classify: list[queries.Classify],
) -> list[Terms]:
    prepared = []
    for side, of in zip(sides, classify, strict=True):
        prepare = functools.partial(_prepare, mechanism=mechanism, classify=of)
        prepared.append(lax.map(jax.checkpoint(prepare), side._replace(bias=None)))
    return [
        _map_pairs(prepared[request.sides[0]], prepared[request.sides[1]], request, mechanism)
        for request in requests
    ]


def _prepare(one: Inputs, *, mechanism: Mechanism, classify: queries.Classify) -> _Prepared:
    present, surrogate = one.present, mechanism.surrogate
    keys = one.keys
    if mechanism.rotary is not None:
        table = rotary.correlations(mechanism.rotary, len(keys), keys.dtype)
        keys = keys * table[np.abs(_differences(*keys.shape))]
    noise = sampling.rounding(keys * present[:, None] * present)
    keys = project(keys, present, present, surrogate)
    variance = jnp.trace(keys) / jnp.maximum(jnp.sum(present), 1)
    row = jnp.where(present > 0, 0.0, -jnp.inf).astype(keys.dtype)
    classes = classify(one.variances, one.asked, variance, row)
    if isinstance(mechanism.method, QuasiMonteCarlo):
        seed = mechanism.method.seed
        logits = trace.query_logits(keys, noise, classes.scales, classes.bias, surrogate, seed=seed)
        means = logits.mean
    else:
        logits, means = closed_queries.closed_logits(keys, classes)
    if classes.weights is not None:
        means = matmul(classes.weights, means)
    return _Prepared(queries.safe_sqrt(one.variances), classes.weights, present, means, logits)


def _differences(rows: int, columns: int) -> np.ndarray:
    """`a - b` for each row `a` and column `b`."""
    return np.subtract.outer(np.arange(rows), np.arange(columns))


def _n_classes(one: _Prepared, two: _Prepared) -> int:
    return max(x.logits.scales.shape[-1] for x in (one, two))


def _n_points(method: QuasiMonteCarlo, one: _Prepared, two: _Prepared) -> int:
    """The points of a pair of inputs."""
    if method.n_points is not None:
        return method.n_points
    shared = one.weights is not None or _n_classes(one, two) == 1
    return _SHARED_POINTS if shared else _POINTS_OF_EACH


def _map_pairs(one: _Prepared, two: _Prepared, request: Request, mechanism: Mechanism) -> Terms:
    def pair(of: tuple[Array, Array, Cross]) -> Terms:
        i, j, cross = of
        left, right = (jax.tree.map(lambda x, k=k: x[k], of) for of, k in ((one, i), (two, j)))
        return _pair(left, right, cross, mechanism)

    if not len(request.first):
        nothing = jnp.zeros_like(request.cross.queries)
        return Terms(*(nothing,) * (1 if request.cross.keys_ntk is None else 4))
    # Processors take one pair after the other: what a pair needs fits their caches.
    step = None
    if jax.default_backend() != "cpu":
        method, size = mechanism.method, one.present.shape[1]
        n_classes = _n_classes(one, two)
        points = _n_points(method, one, two) if isinstance(method, QuasiMonteCarlo) else size
        step = max(1, _CHUNK // (points * 4 * n_classes * max(n_classes, size)))
    pairs = jnp.asarray(request.first), jnp.asarray(request.second), request.cross
    return lax.map(jax.checkpoint(pair), pairs, batch_size=step)


def _pair(one: _Prepared, two: _Prepared, cross: Cross, mechanism: Mechanism) -> Terms:
    values = [cross.keys if cross.values is None else cross.values]
    if cross.keys_ntk is not None:
        values.append(cross.keys_ntk if cross.values_ntk is None else cross.values_ntk)
    if mechanism.rotary is None:
        coefficients = _coefficients(one, two, cross, values, mechanism)
    else:
        coefficients = _rotated_coefficients(one, two, cross, values, mechanism)
    correlation = jnp.clip(cross.queries / (one.scales[:, None] * two.scales), -1, 1)

    def value(form: int, of: Array) -> Array:
        """`F`, integrated from correlation 0 on."""
        powers = jnp.arange(1, coefficients.shape[1] + 1, dtype=coefficients.dtype)
        divided = coefficients[form] / powers[:, None, None]
        integral = cross.queries * _polynomial(divided, correlation)
        return matmul(matmul(one.means, of), two.means.T) + integral

    if cross.keys_ntk is None:
        return Terms(value(0, values[0]))
    return Terms(
        value(0, values[0]),
        value(len(coefficients) - 1, values[1]),
        _polynomial(coefficients[0], correlation),
        _polynomial(coefficients[1], correlation),
    )


def _coefficients(
    one: _Prepared,
    two: _Prepared,
    cross: Cross,
    values: list[Array],
    mechanism: Mechanism,
    *,
    aligned: bool = False,
) -> Float[Array, "forms powers A1 A2"]:
    """Of `G(V; K)`, `G(V; K_ntk)` and `G(V_ntk; K)`, as polynomials in the correlation.

    The last one is left out where it is the one before. Axes of queries are of length 1 where all
    are alike.

    Args:
      aligned: see `trace.coefficients`.
    """
    surrogate = mechanism.surrogate

    def centred(cov: Array) -> Array:
        return project(cov, one.present, two.present, surrogate)

    keys, forms = [cross.keys], [(0, 0)]
    if cross.keys_ntk is not None:
        keys.append(cross.keys_ntk)
        # The Jacobian of softmax is symmetric, and so is `G` in its two matrices.
        shared = cross.values is None and cross.values_ntk is None
        shared = shared and mechanism.rotary is None and surrogate.is_shift_invariant
        forms += [(0, 1)] if shared else [(0, 1), (1, 0)]
    inner, outer = [centred(x) for x in keys], [centred(x) for x in values]
    of_pair: tuple[Any, ...] = one.logits, two.logits, inner[0], outer, inner, forms
    if isinstance(mechanism.method, QuasiMonteCarlo):
        coefficients = trace.coefficients(
            *of_pair,
            aligned=aligned or _n_classes(one, two) == 1,
            surrogate=surrogate,
            n_points=_n_points(mechanism.method, one, two),
            seed=mechanism.method.seed,
        )
    else:
        coefficients = closed_queries.coefficients(*of_pair)
    if one.weights is None or two.weights is None:
        return coefficients
    return einsum("ai,fkij,bj->fkab", one.weights, coefficients, two.weights)


def _rotated_coefficients(
    one: _Prepared, two: _Prepared, cross: Cross, values: list[Array], mechanism: Mechanism
) -> Float[Array, "forms powers A1 A2"]:
    """`_coefficients` where keys covary as the distance `a - b` of the queries has it.

    Every distance is a covariance of keys of its own, and serves the queries that far apart.
    """
    assert mechanism.rotary is not None
    distances, apart = _differences(*cross.queries.shape), _differences(*cross.keys.shape)
    largest = int(np.max(np.abs(distances)) + np.max(np.abs(apart)))
    table = rotary.correlations(mechanism.rotary, largest + 1, cross.keys.dtype)
    aligned = one.weights is None and _n_classes(one, two) > 1

    def at(distance: Array) -> Array:
        rho = table[jnp.abs(jnp.asarray(apart) - distance)]
        ntk = None if cross.keys_ntk is None else rho * cross.keys_ntk
        rotated = cross._replace(keys=rho * cross.keys, keys_ntk=ntk)
        left = one
        if aligned:
            assert isinstance(one.logits, trace.QueryLogits)
            index = jnp.clip(jnp.arange(distances.shape[1]) + distance, 0, len(distances) - 1)
            left = one._replace(logits=one.logits.take(index))
        return _coefficients(left, two, rotated, values, mechanism, aligned=aligned)

    def add(total: Array, distance: Array) -> tuple[Array, None]:
        return jnp.where(jnp.asarray(distances) == distance, at(distance), total), None

    each = jnp.arange(np.min(distances), np.max(distances) + 1)
    shape = jax.eval_shape(at, each[0]).shape[:2]
    start = jnp.zeros((*shape, *distances.shape), cross.keys.dtype)
    total, _ = lax.scan(jax.checkpoint(add), start, each)
    return total


def _polynomial(coefficients: Array, x: Array) -> Array:
    return functools.reduce(lambda total, c: total * x + c, coefficients[::-1])
