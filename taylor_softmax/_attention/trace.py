"""`G(V; C)_ab = E[tr(V^T J_a C J'_b^T)]` of softmaxes of jointly Gaussian logits, in one sample.

`J_a` is the Jacobian of `y_a`, the softmax `y_p = f(z_p) / sum_q f(z_q)` of the logits
`z = tau_a xi + beta_a`: every query has a scale and a row of biases of its own, `-inf` for keys
that it does not attend to. `xi`, `xi'` have covariances `K11`, `K22` and cross-covariance `r K12`.
Wanted is `G_ab` as a polynomial in `r`. With `q = f' / sum f`, `J = diag(q) - y q^T` and

    tr(V^T J_a C J'_b^T) = q_a^T (V o C) q'_b - q_a^T ((C q'_b) o (V y'_b))
                           - ((C^T q_a) o (V^T y_a))^T q'_b + (q_a^T C q'_b) (y_a^T V y'_b).

Averaged over the points, the first three terms are one product of matrices for all pairs of
queries; the last one takes two products at each point.

`(xi, xi')` and `(-xi, -xi')` have one distribution, whatever the biases are, so that points and
their negatives at both inputs give `r` and `-r` at once: the even and the odd part of `G`. Both are
polynomials of few terms through their values at nodes, times `h(r) = (1 - k r^2)^(-1/2)`, where `k`
goes from 0 to 1 as the variance of the logits grows: a softmax of large logits takes the largest
one, and its derivatives grow like that as `r` goes to 1. At `r = 0` it is known,
`tr(V^T B_a C B'_b^T)` with `B = E[J]`, and what the sample means of `J` miss of `B` is taken off.

Means of inputs come in groups. Each scrambling of the points of a pair takes a group of its own, so
that the spread of scramblings tells the errors of both.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from taylor_softmax._attention import pairing
from taylor_softmax._numerics.precision import einsum, matmul
from taylor_softmax._numerics.statistics import sum_over
from taylor_softmax._numerics.surrogate import Surrogate
from taylor_softmax._position_axis import sampling
from taylor_softmax._position_axis.estimate import Budget

# Points, beside their negatives, of an input's means, whose errors enter at first order; as many
# times those of a pair where these are more; and those that give the scales of errors.
_MEAN_POINTS, _MORE_OF_MEANS, _SCALE_POINTS = 1 << 14, 4, 1 << 9

# Groups of them at most.
_GROUPS = 8

# Correlations at which `G` is sampled. With 0.6 in the place of 0.7 tokens of rank 1 are off by two
# to three times as much. Where an error is asked for, polynomials must not be off by more than
# points are: there are three nodes. Those through all nodes but the last one tell the error.
NODES, NODES_OF_ERROR = (1.0, 0.7), (1.0, 0.6, 0.9)

# Variance of the logits at which `k` is a half. With two nodes NNGP and NTK are off by up to 3e-3,
# 2e-2, 4e-2 at variances 4, 20, 100 for tokens of rank 1, and by 2e-3, 1e-2, 2e-2 for 16 i.i.d.
# tokens. With `k = 0` both are off by 3e-3, 4e-2, 0.2. With 4 in the place of 2.5 tokens of rank 1
# are off by 8e-2 at 100, with 2 i.i.d. ones by 2e-2 at 20.
_STEEP = 2.5

# Numbers in an array of a block of points on a CPU, whose caches it has to fit.
_BLOCK = 1 << 17


class QueryLogits(NamedTuple):
    """Logits of the queries of one input.

    Attributes:
      root: of the covariance of the `xi`.
      scales: `tau`.
      bias: `beta`, `-inf` for keys that a query does not attend to.
      mean: `E[y]`, of each group.
      slope: `E[J]`, of each group.
    """

    root: sampling.Root
    scales: Float[Array, "*n C"]
    bias: Float[Array, "*n C T"]
    mean: Float[Array, "*n G C T"]
    slope: Float[Array, "*n G C T T"]

    def take(self, index: Array) -> "QueryLogits":
        """The logits of the queries `index`."""
        means, slopes = self.mean[:, index], self.slope[:, index]
        return QueryLogits(self.root, self.scales[index], self.bias[index], means, slopes)


def mean_points(budget: Budget, size: int, dtype: Any) -> Float[Array, "G T points"]:
    """Points for the means of all inputs of `size` keys, in groups."""
    groups = min(budget.n_scramblings, _GROUPS)
    total = max(_MEAN_POINTS, _MORE_OF_MEANS * budget.n_points * budget.n_scramblings)
    n_points = 1 << (total // groups - 1).bit_length()
    return sampling.scramblings(groups, n_points, size, dtype, sampling.COMPONENTS, budget.seed)


def query_logits(
    covariance: Float[Array, "T T"],
    noise: Float[Array, ""],
    scales: Float[Array, " C"],
    bias: Float[Array, "C T"],
    surrogate: Surrogate,
    points: Float[Array, "G T points"],
) -> QueryLogits:
    """The logits of one input with `covariance` right to rounding errors of size `noise`."""
    root = sampling.psd_root(covariance, noise)

    def block(z: Array) -> tuple[Array, Array]:
        logits = matmul(z.T, root.root.T)
        outputs = pairing.outputs_of_queries(logits, scales, bias, surrogate, "sanp")
        return jnp.sum(outputs.value, (0, 2)), pairing.sum_of_jacobians(outputs, "sanp")

    def group(z: Array) -> tuple[Array, Array]:
        total = sum_over_blocks(block, z, 2 * bias.size)
        return jax.tree.map(lambda x: x / (2 * z.shape[1]), total)

    mean, slope = lax.map(group, points)
    return QueryLogits(root, scales, bias, mean, slope)


def own_scales(
    logits: QueryLogits,
    values: Array,
    outer: Array,
    inner: Array,
    surrogate: Surrogate,
    points: Array,
) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    """`E[y_a^T V y_a]` and `tau_a^2 E[tr(V^T J_a C J_a^T)]`, of one input with itself.

    Args:
      values: `V`.
      outer, inner: `V` and `C` in the trace.
      points: of one group.
    """
    pair = pairing.paired([outer], [inner], [(0, 0)], aligned=True)
    z = matmul(logits.root.root, points[:, :_SCALE_POINTS])
    outputs = pair.outputs(z, logits.scales, logits.bias, surrogate)
    value = jnp.mean(jnp.sum(outputs.value * pair.times(values, outputs.value), 0), (0, 2))
    even, odd = pair.traces(outputs, outputs)
    return value, logits.scales**2 * (even + odd)[0] / z.shape[1]


class Keys(NamedTuple):
    """How the keys of two inputs go together.

    Attributes:
      matrices: the `C`, of which the first is `K12`.
      slope, rest: `A` and `Q` of `sampling.correlate`.
    """

    matrices: list[Float[Array, "*n T1 T2"]]
    slope: Float[Array, "*n T1 T2"]
    rest: Float[Array, "*n T2 T2"]


def correlated(one: QueryLogits, two: QueryLogits, matrices: list[Array]) -> Keys:
    """The keys of two inputs."""
    frozen = lax.stop_gradient((one.root, two.root, matrices[0]))
    return Keys(matrices, *sampling.correlate(*frozen))


class Scrambling(NamedTuple):
    """One of the sets of points of a pair, in `T1 + 2 T2` dimensions, or all of them.

    Attributes:
      group: whose means of inputs go with it.
    """

    points: Float[Array, "*k dims points"]
    group: Int[Array, "*k"]


class Samples(NamedTuple):
    """Means over the points of one scrambling, from which coefficients are made.

    Attributes:
      known: `G` at `r = 0`, of each form.
      slopes: even and odd part of `G` less that, at each node, of each form.
    """

    known: Float[Array, "forms C D"]
    slopes: Float[Array, "nodes 2 forms C D"]


def samples(
    one: QueryLogits,
    two: QueryLogits,
    keys: Keys,
    values: list[Array],
    forms: list[tuple[int, int]],
    scrambling: Scrambling,
    *,
    aligned: bool,
    surrogate: Surrogate,
    nodes: tuple[float, ...],
) -> Samples:
    """Of `G(values[i]; keys.matrices[j])` for each of the `forms` `(i, j)`.

    Args:
      one, two: the logits, of `C` and `D` queries.
      values: `V`, each `(T1, T2)`.
      aligned: of each query of `one` with the one at the same place in `two`, `(..., 1, D)`,
        rather than of all pairs.
      nodes: values of `r`.
    """
    n_points = scrambling.points.shape[1]
    pair = pairing.paired(values, keys.matrices, forms, aligned=aligned)

    def block(z: Array) -> tuple[Array, ...]:
        u, at_nodes = logits_at(one, two, keys, z, nodes)
        left = pair.outputs(u, one.scales, one.bias, surrogate)
        traces, jacobians = [], []
        # Not a loop of the graph, in which a processor takes 3 to 6 times as long.
        for v in at_nodes:
            right = pair.outputs(v, two.scales, two.bias, surrogate)
            traces.append(pair.traces(left, right))
            jacobians.append(pairing.sum_of_jacobians(right, pair.axes))
        left_jacobian = pairing.sum_of_jacobians(left, pair.axes)
        return jnp.stack(traces), left_jacobian, jnp.stack(jacobians)

    largest = max(one.bias.size, two.bias.size)
    traces, *jacobians = sum_over_blocks(block, scrambling.points, 2 * largest)
    left, right = (x / (2 * n_points) for x in jacobians)
    # `E[tr(V^T J_a C J'_b^T)]` without correlation, and what the samples miss of it.
    joined = "aij,aij->a" if aligned else "aij,bij->ab"
    of_one, of_two = (of.slope[scrambling.group] for of in (one, two))
    known, corrections = [], []
    for i, j in forms:
        outer = matmul(matmul(values[i].T, of_one), keys.matrices[j])
        inner = matmul(matmul(values[i], of_two), keys.matrices[j].T)
        known.append(einsum(joined, outer, of_two))
        of_left = einsum(joined, of_one - left, inner)
        corrections.append([of_left - einsum(joined, outer, each) for each in right])
    corrections = jnp.swapaxes(jnp.stack([jnp.stack(x) for x in corrections]), 0, 1)
    even, odd = traces[:, 0] / n_points + corrections, traces[:, 1] / n_points
    result = Samples(jnp.stack(known), jnp.stack([even, odd], 1))
    return jax.tree.map(lambda x: x[..., None, :] if aligned else x, result)


def logits_at(
    one: QueryLogits, two: QueryLogits, keys: Keys, z: Array, nodes: tuple[float, ...]
) -> tuple[Float[Array, "T1 points"], list[Float[Array, "T2 points"]]]:
    """`xi` at the points `z`, and `xi'` with `r K12` between them, for each `r` of `nodes`."""
    first, second, third = jnp.split(z, np.cumsum(keys.slope.shape))
    v = matmul(keys.slope.T, first) + matmul(keys.rest, second)
    independent = matmul(two.root.root, third)
    at_nodes = [r * v + math.sqrt(1 - r * r) * independent for r in nodes]
    return matmul(one.root.root, first), at_nodes


def coefficients(
    given: Samples, steepness: Float[Array, "C D"], nodes: tuple[float, ...], *, degree: int = 1
) -> Float[Array, "forms powers C D"]:
    """Those of `r^0, r^1, ...` in `G / h^degree`, for each form.

    Args:
      steepness: `k`.
      nodes: the first of those of the samples, or all of them.
    """
    r = np.asarray(nodes)
    flattened = jnp.stack([growth(steepness, x) ** -degree for x in nodes])[:, None]
    even = flattened * (given.slopes[: len(r), 0] + given.known) - given.known
    odd = flattened * given.slopes[: len(r), 1]

    def fit(parts: Array, first: int) -> Array:
        """From values at the nodes to coefficients of `r^first`, `r^(first + 2)`, ..."""
        inverse = np.linalg.inv(r[:, None] ** (first + 2 * np.arange(len(r))))
        return jnp.tensordot(jnp.asarray(inverse, parts.dtype), parts, 1, precision="highest")

    alternating = jnp.stack([fit(odd, 1), fit(even, 2)], 1).reshape(-1, *given.known.shape)
    return jnp.moveaxis(jnp.concatenate([given.known[None], alternating]), 0, 1)


def steepness(variance: Array) -> Array:
    """`k`, of logits of softmax with a `variance`."""
    return variance / (variance + _STEEP)


def growth(steepness: Array, r: Any) -> Array:
    """`h(r)`."""
    return 1 / jnp.sqrt(1 - steepness * r**2)


def sum_over_blocks(term: Callable[[Array], Any], z: Array, per_point: int) -> Any:
    """Sum of `term` over blocks of the points `z`, `(dimension, points)`.

    Args:
      per_point: numbers in the largest array for one point.
    """
    n_points, at_once = z.shape[1], 1 << max(3, (_BLOCK // per_point).bit_length() - 1)
    if jax.default_backend() != "cpu" or n_points % at_once:
        at_once = n_points
    blocks = jnp.swapaxes(z.reshape(len(z), -1, at_once), 0, 1)
    return sum_over(term, blocks)
