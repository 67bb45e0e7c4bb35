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
their negatives at both inputs give `r` and `-r` at once: the even and the odd part of `G`, each a
polynomial of few terms through its values at `_NODES`. At `r = 0` it is known,
`tr(V^T B_a C B'_b^T)` with `B = E[J]`, and what the sample means of `J` miss of `B` is taken off.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from taylor_softmax._numerics.precision import einsum, matmul
from taylor_softmax._numerics.surrogate import Surrogate
from taylor_softmax._position_axis import sampling

# Points, beside their negatives, of an input's mean Jacobians, whose errors enter at first order.
_MEAN_POINTS = 1 << 14

# Correlations at which `G` is sampled. A third one changes nothing that 1,024 points would show, up
# to logit variance 4; without the second the error is 5 to 10 times as large from variance 1 on.
_NODES = (1.0, 0.6)

# Numbers in an array of a block of points on a CPU, whose caches it has to fit.
_BLOCK = 1 << 17


class QueryLogits(NamedTuple):
    """Logits of the queries of one input.

    Attributes:
      root: of the covariance of the `xi`.
      scales: `tau`.
      bias: `beta`, `-inf` for keys that a query does not attend to.
      mean: `E[y]`.
      slope: `E[J]`.
    """

    root: sampling.Root
    scales: Float[Array, "*n C"]
    bias: Float[Array, "*n C T"]
    mean: Float[Array, "*n C T"]
    slope: Float[Array, "*n C T T"]

    def take(self, index: Array) -> "QueryLogits":
        """The logits of the queries `index`."""
        return QueryLogits(self.root, *(x[index] for x in self[1:]))


def query_logits(
    covariance: Float[Array, "T T"],
    noise: Float[Array, ""],
    scales: Float[Array, " C"],
    bias: Float[Array, "C T"],
    surrogate: Surrogate,
    *,
    seed: int,
) -> QueryLogits:
    """The logits of one input with `covariance` right to rounding errors of size `noise`."""
    root = sampling.psd_root(covariance, noise)
    n_points, size = _MEAN_POINTS, len(covariance)
    z = sampling.normal_points(n_points, size, root.root.dtype, sampling.COMPONENTS, seed=seed)

    def block(z: Array) -> tuple[Array, Array]:
        y, q = _outputs(matmul(z.T, root.root.T), scales, bias, surrogate, "sanp")
        return jnp.sum(y, (0, 2)), _sum_of_jacobians(y, q, "sanp")

    mean, slope = _sum_over_blocks(block, z, 2 * bias.size)
    return QueryLogits(root, scales, bias, mean / (2 * n_points), slope / (2 * n_points))


def coefficients(
    one: QueryLogits,
    two: QueryLogits,
    cross: Float[Array, "T1 T2"],
    values: list[Array],
    keys: list[Array],
    forms: list[tuple[int, int]],
    *,
    aligned: bool,
    surrogate: Surrogate,
    n_points: int,
    seed: int,
) -> Float[Array, "forms powers C D"]:
    """Coefficients of `r^0, r^1, ...` in `G(values[i]; keys[j])` for each of the `forms` `(i, j)`.

    Args:
      one, two: the logits, of `C` and `D` queries.
      cross: `K12`.
      values, keys: `V` and `C`, each `(T1, T2)`.
      aligned: of each query of `one` with the one at the same place in `two`, `(..., 1, D)`,
        rather than of all pairs.
    """
    size1, size2 = cross.shape
    slope, rest, _ = sampling.correlate(one.root, two.root, cross)
    dimension = size1 + 2 * size2
    z = sampling.normal_points(n_points, dimension, cross.dtype, sampling.PAIRS, seed=seed)
    pairing = (_Aligned if aligned else _AllPairs)(values, keys, forms)

    def block(z: Array) -> tuple[Array, ...]:
        first, second, third = jnp.split(z, (size1, size1 + size2))
        u = matmul(one.root.root, first)
        v = matmul(slope.T, first) + matmul(rest, second)
        independent = matmul(two.root.root, third)
        left = pairing.outputs(u, one, surrogate)
        traces, jacobians = [], []
        # Not a loop of the graph, in which a processor takes 3 to 6 times as long.
        for r in _NODES:
            right = pairing.outputs(r * v + math.sqrt(1 - r * r) * independent, two, surrogate)
            traces.append(pairing.traces(*left, *right))
            jacobians.append(_sum_of_jacobians(*right, pairing.axes))
        left_jacobian = _sum_of_jacobians(*left, pairing.axes)
        return jnp.stack(traces), left_jacobian, jnp.stack(jacobians)

    largest = max(one.bias.size, two.bias.size)
    traces, *jacobians = _sum_over_blocks(block, z, 2 * largest)
    left, right = (x / (2 * n_points) for x in jacobians)
    # `E[tr(V^T J_a C J'_b^T)]` without correlation, and what the samples miss of it.
    joined = "aij,aij->a" if aligned else "aij,bij->ab"
    known, missed = [], []
    for i, j in forms:
        outer = matmul(matmul(values[i].T, one.slope), keys[j])
        inner = matmul(matmul(values[i], two.slope), keys[j].T)
        known.append(einsum(joined, outer, two.slope))
        of_left = einsum(joined, one.slope - left, inner)
        missed.append([of_left - einsum(joined, outer, each) for each in right])
    uncorrelated = jnp.stack(known)
    even = traces[:, 0] / n_points + jnp.swapaxes(jnp.stack([jnp.stack(x) for x in missed]), 0, 1)
    odd = traces[:, 1] / n_points
    # Of r^2, r^4, ... and of r, r^3, ...
    even, odd = (
        jnp.tensordot(jnp.asarray(_fit(first), cross.dtype), x, 1, precision="highest")
        for first, x in ((2, even), (1, odd))
    )
    alternating = jnp.stack([odd, even], 1).reshape(-1, *odd.shape[1:])
    result = jnp.moveaxis(jnp.concatenate([uncorrelated[None], alternating]), 0, 1)
    return result[:, :, None] if aligned else result


def _fit(first: int) -> np.ndarray:
    """Takes values at the nodes to coefficients of `r^first`, `r^(first + 2)`, ..."""
    r = np.asarray(_NODES)
    return np.linalg.inv(r[:, None] ** (first + 2 * np.arange(len(r))))


def _sum_over_blocks(of: Callable[[Array], Any], z: Array, per_point: int) -> Any:
    """Sum of `of` over blocks of the points `z`, `(dimension, points)`.

    Args:
      per_point: numbers in the largest array for one point.
    """
    n_points, at_once = z.shape[1], 1 << max(3, (_BLOCK // per_point).bit_length() - 1)
    if jax.default_backend() != "cpu" or n_points % at_once:
        at_once = n_points
    if at_once >= n_points:
        return of(z)
    blocks = jnp.swapaxes(z.reshape(len(z), -1, at_once), 0, 1)

    def add(total: Any, z: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of(z)), None

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of, blocks[0]))
    total, _ = lax.scan(jax.checkpoint(add), start, blocks)
    return total


def _outputs(
    z: Array, scales: Array, bias: Array, surrogate: Surrogate, axes: str
) -> tuple[Array, Array]:
    """`y` and `q` of all queries at points `z` and their negatives.

    Args:
      z: keys and points, in the order in which `axes` has them.
      axes: of the results, a permutation of `s` signs, `a` queries, `n` points and `p` keys.
    """

    def placed(array: Array, given: str) -> Array:
        order = [given.index(axis) for axis in axes if axis in given]
        return jnp.expand_dims(
            array.transpose(order), [i for i, axis in enumerate(axes) if axis not in given]
        )

    signed = placed(jnp.stack([z, -z]), "s" + "".join(x for x in axes if x in "np"))
    allowed = bias > -jnp.inf
    beta = placed(jnp.where(allowed, bias, 0), "ap")
    present = placed(allowed.astype(z.dtype), "ap")
    logits = placed(scales, "a") * signed + beta
    value, slope, _ = surrogate.ratios(logits, present, axis=axes.index("p"))
    return value, slope


def _sum_of_jacobians(y: Array, q: Array, axes: str) -> Array:
    """Over signs and points, `(queries, keys, keys)`."""
    products = einsum(f"{axes},{axes.replace('p', 'r')}->apr", y, q)
    diagonal = einsum(f"{axes}->ap", q)
    return diagonal[:, :, None] * jnp.eye(diagonal.shape[1], dtype=y.dtype) - products


class _Pairing:
    """The traces of pairs of queries at a block of points."""

    axes: str

    def __init__(self, values: list[Array], keys: list[Array], forms: list[tuple[int, int]]):
        self._values, self._keys, self._forms = values, keys, forms

    def outputs(self, z: Array, of: QueryLogits, surrogate: Surrogate) -> tuple[Array, Array]:
        """`y` and `q` at the points `z`, `(keys, points)`."""
        z = z.T if self.axes.index("n") < self.axes.index("p") else z
        return _outputs(z, of.scales, of.bias, surrogate, self.axes)

    def traces(self, left_y: Array, left_q: Array, right_y: Array, right_q: Array) -> Array:
        """Even and odd parts, `(2, forms, pairs)`."""
        of_values = [self._times(value, right_y) for value in self._values]
        of_keys = [self._times(key, right_q) for key in self._keys]
        by_values = [self._at_each_point(left_y, x) for x in of_values]
        by_keys = [self._at_each_point(left_q, x) for x in of_keys]
        traces = []
        for i, j in self._forms:
            value, key = self._values[i], self._keys[j]
            linear = self._times(value * key, right_q) - of_keys[j] * of_values[i]
            quadratic = self._times(value.T, left_y) * self._times(key.T, left_q)
            traces.append(
                self._over_signs(by_values[i] * by_keys[j])
                + self._over_points(left_q, linear)
                - self._over_points(quadratic, right_q)
            )
        return jnp.stack(traces, 1)

    def _times(self, matrix: Array, outputs: Array) -> Array:
        """`matrix` times the outputs at each point."""
        raise NotImplementedError

    def _at_each_point(self, left: Array, right: Array) -> Array:
        """Sums over keys for all pairs of signs."""
        raise NotImplementedError

    def _over_signs(self, products: Array) -> Array:
        """Even and odd part of the sum over points of what `_at_each_point` gives."""
        raise NotImplementedError

    def _over_points(self, left: Array, right: Array) -> Array:
        """Even and odd part of the sum over points and keys."""
        raise NotImplementedError

    def _parts(self, outputs: Array) -> tuple[Array, Array]:
        plus, minus = (jnp.take(outputs, i, self.axes.index("s")) for i in (0, 1))
        return (plus + minus) / 2, (plus - minus) / 2


class _AllPairs(_Pairing):
    """Of all pairs of queries: products of matrices, for which keys are next to each other."""

    axes = "nsap"

    def _times(self, matrix: Array, outputs: Array) -> Array:
        return matmul(outputs, matrix.T)

    def _at_each_point(self, left: Array, right: Array) -> Array:
        n, signs, n_left, size = left.shape
        n_right = right.shape[2]
        rows = left.reshape(n, -1, size), right.reshape(n, -1, right.shape[3])
        product = einsum("nip,njp->nij", *rows)
        return product.reshape(n, signs, n_left, signs, n_right)

    def _over_signs(self, products: Array) -> Array:
        each = jnp.sum(products, 0) / 4
        same, other = each[0, :, 0] + each[1, :, 1], each[0, :, 1] + each[1, :, 0]
        return jnp.stack([same + other, same - other])

    def _over_points(self, left: Array, right: Array) -> Array:
        parts = zip(self._parts(left), self._parts(right), strict=True)
        return jnp.stack([einsum("nap,nbp->ab", x, y) for x, y in parts])


class _Aligned(_Pairing):
    """Of each query with the one at the same place: sums over keys, points next to each other."""

    axes = "psan"

    def _times(self, matrix: Array, outputs: Array) -> Array:
        product = matmul(matrix, outputs.reshape(len(outputs), -1))
        return product.reshape(-1, *outputs.shape[1:])

    def _at_each_point(self, left: Array, right: Array) -> Array:
        return jnp.sum(left[:, :, None] * right[:, None], 0)

    def _over_signs(self, products: Array) -> Array:
        each = jnp.sum(products, -1) / 4
        same, other = each[0, 0] + each[1, 1], each[0, 1] + each[1, 0]
        return jnp.stack([same + other, same - other])

    def _over_points(self, left: Array, right: Array) -> Array:
        parts = zip(self._parts(left), self._parts(right), strict=True)
        return jnp.stack([jnp.sum(x * y, (0, 2)) for x, y in parts])
