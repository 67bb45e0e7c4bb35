"""`G(V; C) = E[tr(V^T J(u) C J(v)^T)]` of softmaxes of jointly Gaussian logits, for correlations.

`J` is the Jacobian of `y(z)_p = f(z_p) / sum_q f(z_q)`, the logits are `u = tau xi`,
`v = tau' xi'` for every two of a few scales and sets of allowed keys (*classes*), and
`xi`, `xi'` have covariances `K11`, `K22` and cross-covariance `r K12`. Wanted is `G` as a
polynomial in the correlation `r`. With `q = f' / sum f`, `J = diag(q) - y q^T` and

    tr(V^T J C J'^T) = q^T (V o C) q' - q^T ((C q') o (V y')) - ((C^T q) o (V^T y))^T q'
                       + (q^T C q') (y^T V y'),

products of `(S, S)` with `(S, points)`. Points and their negatives at both inputs give `r` and
`-r` at once, and so the even and the odd part of `G`, each a polynomial of few terms through its
values at `_NODES`. At `r = 0` it is known, `tr(V^T B C B'^T)` with `B = E[J]`, and what the sample
means of `J` miss of `B` is taken off.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from taylor_softmax._numerics.precision import einsum, matmul
from taylor_softmax._numerics.surrogate import Surrogate
from taylor_softmax._position_axis import sampling
from taylor_softmax._position_axis.components import Components, components

# Correlations at which `G` is sampled. A third one changes nothing that 1,024 points would show, up
# to logit variance 4; without the second the error is 5 to 10 times as large from variance 1 on.
_NODES = (1.0, 0.6)


class QueryLogits(NamedTuple):
    """QueryLogits of one input, in `C` classes.

    Attributes:
      root: of the covariance of the `xi`.
      scales: `tau`.
      allowed: 1 where a key is attended to, else 0.
      components: of the classes' softmaxes, mean and mean Jacobian.
    """

    root: sampling.Root
    scales: Float[Array, "*n C"]
    allowed: Float[Array, "*n C S"]
    components: Components


def query_logits(
    covariance: Float[Array, "S S"],
    noise: Float[Array, ""],
    scales: Float[Array, " C"],
    allowed: Float[Array, "C S"],
    surrogate: Surrogate,
) -> QueryLogits:
    """The logits of one input with `covariance` right to rounding errors of size `noise`."""
    root = sampling.psd_root(covariance, noise)

    def of_class(of: tuple[Array, Array]) -> Components:
        scale, allowed = of
        return components(scale * root.root, allowed, surrogate, with_curvature=False)

    return QueryLogits(root, scales, allowed, lax.map(of_class, (scales, allowed)))


def coefficients(
    one: QueryLogits,
    two: QueryLogits,
    cross: Float[Array, "S S"],
    values: list[Array],
    keys: list[Array],
    forms: list[tuple[int, int]],
    *,
    surrogate: Surrogate,
    n_points: int,
) -> Float[Array, "forms powers C D"]:
    """Coefficients of `r^0, r^1, ...` in `G(values[i]; keys[j])` for each of the `forms` `(i, j)`.

    Args:
      one, two: the logits, in `C` and `D` classes.
      cross: `K12`.
      values, keys: `V` and `C`, each `(S, S)`.
    """
    slope1, slope2 = one.components.slope, two.components.slope
    u, v, independent = _correlated_points(one, two, cross, n_points)
    left = _Left(values, keys, forms, *_outputs(u, one.scales, one.allowed, surrogate))
    known = [_form(slope1, values[i], keys[j], slope2) for i, j in forms]
    missed = slope1 - _mean_jacobian(left.y, left.q)

    def at(r: float) -> tuple[Array, Array]:
        """Even part less its known value, and odd part."""
        z = r * v + math.sqrt(1 - r * r) * independent
        y, q = _outputs(z, two.scales, two.allowed, surrogate)
        jacobian = _mean_jacobian(y, q)
        corrections = [
            _form(missed, values[i], keys[j], slope2) - _form(slope1, values[i], keys[j], jacobian)
            for i, j in forms
        ]
        even, odd = left.traces(y, q)
        return even + jnp.stack(corrections), odd

    # Not a loop of the graph, in which a processor takes 3 to 6 times as long.
    even, odd = (jnp.stack(each) for each in zip(*map(at, _NODES), strict=True))
    # Of r^2, r^4, ... and of r, r^3, ...
    even, odd = (
        einsum("kr,rfij->kfij", jnp.asarray(_fit(first), cross.dtype), values)
        for first, values in ((2, even), (1, odd))
    )
    alternating = jnp.stack([odd, even], 1).reshape(-1, *odd.shape[1:])
    return jnp.moveaxis(jnp.concatenate([jnp.stack(known)[None], alternating]), 0, 1)


def _fit(first: int) -> np.ndarray:
    """Takes values at the nodes to coefficients of `r^first`, `r^(first + 2)`, ..."""
    r = np.asarray(_NODES)
    return np.linalg.inv(r[:, None] ** (first + 2 * np.arange(len(r))))


def _form(first: Array, values: Array, keys: Array, second: Array) -> Array:
    """`tr(V^T P C P'^T)` for matrices `P`, `(C, S, S)`, and `P'`, `(D, S, S)`."""
    left = matmul(first, keys)
    right = matmul(values, second)
    return einsum("ipl,jpl->ij", left, right)


def _correlated_points(
    one: QueryLogits, two: QueryLogits, cross: Array, n_points: int
) -> tuple[Array, Array, Array]:
    """`xi`, `xi'` at correlation 1, and an independent `xi'`, each `(S, points)`."""
    size = len(cross)
    z = sampling.normal_points(n_points, 3 * size, cross.dtype, sampling.PAIRS)
    slope, rest, _ = sampling.correlate(one.root, two.root, cross)
    first, second, third = z[:size], z[size : 2 * size], z[2 * size :]
    v = matmul(slope.T, first) + matmul(rest, second)
    return matmul(one.root.root, first), v, matmul(two.root.root, third)


def _outputs(z: Array, scales: Array, allowed: Array, surrogate: Surrogate) -> tuple[Array, Array]:
    """`y` and `q` of the classes at the points `z`, `(S, n)`, and at `-z`: `(S, C, 2, n)`."""
    # Positions, along which everything is summed, are the first axis: points are next to each
    # other in memory.
    signed = scales[:, None, None] * jnp.stack([z, -z], 1)[:, None]
    value, slope, _ = surrogate.ratios(signed, allowed.T[:, :, None, None], axis=0)
    return value, slope


def _mean_jacobian(y: Array, q: Array) -> Array:
    """`(C, S, S)`, of the outputs `(S, C, 2, n)`."""
    size, n_classes, signs, n = y.shape
    rows = (jnp.moveaxis(x, 1, 0).reshape(n_classes, size, signs * n) for x in (y, q))
    first, second = rows
    products = matmul(first, jnp.swapaxes(second, 1, 2)) / (signs * n)
    diagonal = jnp.mean(second, -1)
    return diagonal[:, :, None] * jnp.eye(size, dtype=y.dtype) - products


class _Left:
    """The first input's outputs, and what of the traces does not depend on the second's."""

    def __init__(
        self,
        values: list[Array],
        keys: list[Array],
        forms: list[tuple[int, int]],
        y: Array,
        q: Array,
    ):
        self.y, self.q, self.forms = y, q, forms
        self.values, self.keys = jnp.stack(values), jnp.stack(keys)
        self.both = jnp.stack([values[i] * keys[j] for i, j in forms])
        of_y = _products(jnp.swapaxes(self.values, 1, 2), y)
        of_q = _products(jnp.swapaxes(self.keys, 1, 2), q)
        self.quadratic = [_parts(of_y[i] * of_q[j]) for i, j in forms]

    def traces(self, y: Array, q: Array) -> tuple[Array, Array]:
        """Even and odd parts with the second input's outputs, `(forms, C, D)`."""
        y_parts, q_parts, right_q = _parts(self.y), _parts(self.q), _parts(q)
        of_y, of_q, of_both = (
            _products(self.values, y),
            _products(self.keys, q),
            _products(self.both, q),
        )
        by_values = [_pairings(y_parts, _parts(product)) for product in of_y]
        by_keys = [_pairings(q_parts, _parts(product)) for product in of_q]
        even, odd = [], []
        for form, (i, j) in enumerate(self.forms):
            linear = _parts(of_both[form] - of_q[j] * of_y[i])
            quadratic = self.quadratic[form]
            v, k = by_values[i], by_keys[j]
            sums = [
                jnp.sum(_pairing(q_parts[s], linear[s]) - _pairing(quadratic[s], right_q[s]), -1)
                for s in (0, 1)
            ]
            products = (
                v[0][0] * k[0][0] + v[0][1] * k[0][1] + v[1][0] * k[1][0] + v[1][1] * k[1][1],
                v[0][0] * k[1][1] + v[1][1] * k[0][0] + v[0][1] * k[1][0] + v[1][0] * k[0][1],
            )
            both, differing = (
                (total + jnp.sum(product, -1)) / y.shape[-1]
                for total, product in zip(sums, products, strict=True)
            )
            even.append(both)
            odd.append(differing)
        return jnp.stack(even), jnp.stack(odd)


def _products(matrices: Array, outputs: Array) -> Array:
    """`(k, S, S)` with `(S, C, 2, n)`: `(k, S, C, 2, n)`."""
    k, size, _ = matrices.shape
    product = matmul(matrices.reshape(k * size, size), outputs.reshape(size, -1))
    return product.reshape(k, *outputs.shape)


def _parts(outputs: Array) -> tuple[Array, Array]:
    """Even and odd part of `(S, C, 2, n)`, the values at points and their negatives."""
    plus, minus = outputs[:, :, 0], outputs[:, :, 1]
    return (plus + minus) / 2, (plus - minus) / 2


def _pairing(left: Array, right: Array) -> Array:
    """Sum over positions of `(S, C, n)` with `(S, D, n)`: `(C, D, n)`."""
    if left.shape[1] == right.shape[1] == 1:
        # A sum in one loop with what makes the factors; a product of matrices would store them.
        return jnp.sum(left * right, 0)[None]
    return einsum("pcn,pdn->cdn", left, right)


def _pairings(
    left: tuple[Array, Array], right: tuple[Array, Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    first, second = (tuple(_pairing(x, y) for y in right) for x in left)
    return first, second  # type: ignore[return-value]
