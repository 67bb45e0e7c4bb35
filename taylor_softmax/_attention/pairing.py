"""Sums over points of what two queries have in common, for all pairs of queries or for some.

`tr(V^T J_a C J'_b^T)` and `y_a^T V y'_b`, see `trace`, at points and their negatives. Arrays of
outputs have axes `s` of signs, `a` of queries, `n` of points and `p` of keys, in the order in which
sums over them are fast.
"""

import jax.numpy as jnp
from jaxtyping import Array

from taylor_softmax._numerics.precision import einsum, matmul
from taylor_softmax._numerics.surrogate import Surrogate
from taylor_softmax._position_axis.sampling import Outputs


def outputs_of_queries(
    z: Array, scales: Array, bias: Array, surrogate: Surrogate, axes: str
) -> Outputs:
    """The softmaxes of all queries at points `z` and their negatives.

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
    return Outputs(*surrogate.ratios(logits, present, axis=axes.index("p")))


def sum_of_jacobians(outputs: Outputs, axes: str) -> Array:
    """Over signs and points, `(queries, keys, keys)`."""
    products = einsum(f"{axes},{axes.replace('p', 'r')}->apr", outputs.value, outputs.slope)
    diagonal = einsum(f"{axes}->ap", outputs.slope)
    return diagonal[:, :, None] * jnp.eye(diagonal.shape[1], dtype=products.dtype) - products


def paired(
    values: list[Array], keys: list[Array], forms: list[tuple[int, int]], *, aligned: bool
) -> "Pairing":
    """For `tr(V^T J_a C J'_b^T)` with `V = values[i]`, `C = keys[j]` for each of `forms` `(i, j)`.

    Args:
      aligned: of each query with the one at the same place, rather than of all pairs.
    """
    return (_Aligned if aligned else _AllPairs)(values, keys, forms)


class Pairing:
    """The traces of pairs of queries at a block of points."""

    axes: str

    def __init__(self, values: list[Array], keys: list[Array], forms: list[tuple[int, int]]):
        self._values, self._keys, self._forms = values, keys, forms

    def outputs(self, z: Array, scales: Array, bias: Array, surrogate: Surrogate) -> Outputs:
        """The softmaxes at the points `z`, `(keys, points)`."""
        z = z.T if self.axes.index("n") < self.axes.index("p") else z
        return outputs_of_queries(z, scales, bias, surrogate, self.axes)

    def products(self, left_y: Array, right_y: Array) -> Array:
        """Even and odd parts of the sums of `y_a^T V y'_b`, `(2, values, pairs)`."""
        of_values = (self.times(value, right_y) for value in self._values)
        return jnp.stack([self._over_points(left_y, x) for x in of_values], 1)

    def traces(self, left: Outputs, right: Outputs) -> Array:
        """Even and odd parts of the sums of the traces, `(2, forms, pairs)`."""
        (left_y, left_q, _), (right_y, right_q, _) = left, right
        of_values = [self.times(value, right_y) for value in self._values]
        of_keys = [self.times(key, right_q) for key in self._keys]
        by_values = [self._at_each_point(left_y, x) for x in of_values]
        by_keys = [self._at_each_point(left_q, x) for x in of_keys]
        traces = []
        for i, j in self._forms:
            value, key = self._values[i], self._keys[j]
            linear = self.times(value * key, right_q) - of_keys[j] * of_values[i]
            quadratic = self.times(value.T, left_y) * self.times(key.T, left_q)
            traces.append(
                self._over_signs(by_values[i] * by_keys[j])
                + self._over_points(left_q, linear)
                - self._over_points(quadratic, right_q)
            )
        return jnp.stack(traces, 1)

    def times(self, matrix: Array, outputs: Array) -> Array:
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


class _AllPairs(Pairing):
    """Of all pairs of queries: products of matrices, for which keys are next to each other."""

    axes = "nsap"

    def times(self, matrix: Array, outputs: Array) -> Array:
        return matmul(outputs, matrix.T)

    def _at_each_point(self, left: Array, right: Array) -> Array:
        n, signs, n_left, size = left.shape
        n_right = right.shape[2]
        rows = left.reshape(n, -1, size), right.reshape(n, -1, right.shape[3])
        product = einsum("nip,njp->nij", *rows)
        return product.reshape(n, signs, n_left, signs, n_right)

    def _over_signs(self, products: Array) -> Array:
        means = jnp.sum(products, 0) / 4
        same, other = means[0, :, 0] + means[1, :, 1], means[0, :, 1] + means[1, :, 0]
        return jnp.stack([same + other, same - other])

    def _over_points(self, left: Array, right: Array) -> Array:
        parts = zip(self._parts(left), self._parts(right), strict=True)
        return jnp.stack([einsum("nap,nbp->ab", x, y) for x, y in parts])


class _Aligned(Pairing):
    """Of each query with the one at the same place: sums over keys, points next to each other."""

    axes = "psan"

    def times(self, matrix: Array, outputs: Array) -> Array:
        product = matmul(matrix, outputs.reshape(len(outputs), -1))
        return product.reshape(-1, *outputs.shape[1:])

    def _at_each_point(self, left: Array, right: Array) -> Array:
        return jnp.sum(left[:, :, None] * right[:, None], 0)

    def _over_signs(self, products: Array) -> Array:
        means = jnp.sum(products, -1) / 4
        same, other = means[0, 0] + means[1, 1], means[0, 1] + means[1, 0]
        return jnp.stack([same + other, same - other])

    def _over_points(self, left: Array, right: Array) -> Array:
        parts = zip(self._parts(left), self._parts(right), strict=True)
        return jnp.stack([jnp.sum(x * y, (0, 2)) for x, y in parts])
