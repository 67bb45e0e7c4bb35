"""Means of a softmax over positions and of its first two derivatives, once an input.

They are the coefficients of Mehler's formula in `S` dimensions,

    E[y(u) y(v)^T] = sum_k (1/k!) < E[D^k y(u)], K12^(x)k, E[D^k y(v)] >,

whose terms of degree 0 to 2 need nothing of the pair but `K12`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from taylor_softmax._numerics.precision import einsum, matmul
from taylor_softmax._numerics.surrogate import Surrogate
from taylor_softmax._position_axis import sampling

# Scramblings of a round, and points of each, beside their negatives. Errors of the mean enter at
# first order, as the mean of one side times the error of the other's. With so many points they have
# standard errors of 1e-4, 5e-4 and 1.5e-3 of the NNGP's scale at variances 0.25, 1 and 4 (16
# positions), with 8 times 2,048 2e-4, 8e-4 and 2.4e-3.
_GROUPS, _POINTS = 4, 1 << 13

# Of these the first of each round make up the curvature, whose errors enter at a tenth of their
# size, and whose cost grows with the cube of the number of positions.
_CURVATURE_POINTS = 1 << 11

# Share of an asked-for error that the components may have: beside it that of the pairs is seen.
_SHARE = 0.2


class Components(NamedTuple):
    """Hermite components of `y` for the logits of one input, up to degree 2.

    Attributes:
      mean: `m = E[y]`.
      slope: `B = E[D y]`, the mean Jacobian.
      curvature: `E[D^2 y]`; None where it is not wanted.
      means, slopes: of each group of scramblings, whose spread tells their errors.
      value_scale: largest entry of `E[y y^T]`.
      slope_scale: largest entry of `E[J X J^T]` for `X = K / |K|`, by Frobenius's norm.
    """

    mean: Float[Array, "*n S"]
    slope: Float[Array, "*n S S"]
    curvature: Float[Array, "*n S S S"] | None
    means: Float[Array, "*n G S"]
    slopes: Float[Array, "*n G S S"]
    value_scale: Float[Array, "*n"]
    slope_scale: Float[Array, "*n"]

    def linear(self, inner: Array, other: "Components") -> Float[Array, "S T"]:
        """`B C B'^T`, the term of degree 1; also the value of `E[J C J'^T]` without correlation."""
        return matmul(matmul(self.slope, inner), other.slope.T)

    def quadratic(self, first: Array, second: Array, other: "Components") -> Float[Array, "S T"]:
        """`<E[D^2 y], C (x) D, E[D^2 y']>`, twice the term of degree 2 at `C = D = K12`."""
        assert self.curvature is not None
        assert other.curvature is not None
        size, other_size = first.shape
        moved = matmul(jnp.swapaxes(matmul(self.curvature, second), 1, 2), first)
        flat = jnp.swapaxes(moved, 1, 2).reshape(size, -1)
        return matmul(flat, other.curvature.reshape(other_size, -1).T)

    def variance(
        self, cross: Array, theta: Array | None, other: "Components"
    ) -> Float[Array, "k S T"]:
        """Squared standard errors that the components give the second moment and the NTK.

        Both are `m m'^T + B K12 B'^T` and `B Theta B'^T` to first order in the components' errors.
        """

        def linear(inner: Array) -> Array:
            return matmul(matmul(self.slopes, inner), jnp.swapaxes(other.slopes, 1, 2))

        products = einsum("gp,gq->gpq", self.means, other.means)
        parts = [products + linear(cross)]
        if theta is not None:
            parts.append(linear(theta))
        return jnp.stack([jnp.var(x, 0) for x in parts]) / (len(self.means) - 1)


def rounds(
    n_points: int, size: int, dtype: jnp.dtype, seed: int
) -> Float[Array, "rounds G S points"]:
    """Points for all inputs of `size` positions, as good as `n_points` of pairs deserve.

    Four times as many, and one round at least.
    """
    n = max(1, 4 * n_points // (_GROUPS * _POINTS))
    points = sampling.scramblings(n * _GROUPS, _POINTS, size, dtype, sampling.COMPONENTS, seed)
    return points.reshape(n, _GROUPS, size, _POINTS)


def components(
    root: Float[Array, "S S"],
    present: Float[Array, " S"],
    surrogate: Surrogate,
    points: Float[Array, "rounds G S points"],
    *,
    with_curvature: bool,
    error: float | None = None,
) -> Components:
    """The components of one input with logits `root z` at the positions `present`.

    Args:
      points: of `rounds`, all of which are used if `error` is None.
      error: that of a pair; rounds end where their own is a small share of it.
    """
    covariance = matmul(root, root.T)
    # Where there is no variance, any shape.
    shape = covariance + float(jnp.finfo(root.dtype).tiny) ** 0.25 * jnp.diag(present)
    size = jnp.sqrt(jnp.sum(shape**2))

    def group(z: Array) -> tuple[Array, Array, Array, Array]:
        at = sampling.outputs(matmul(root, z), present, surrogate)
        squares = jnp.mean(at.value**2, 1), _diagonal_jacobian_square(at, shape)
        return jnp.mean(at.value, 1), at.mean_jacobian(), *squares

    def one_round(z: Array) -> Components:
        means, slopes, values, jacobians = lax.map(group, z)
        curvature = None
        if with_curvature:
            first = matmul(root, z[0, :, :_CURVATURE_POINTS])
            curvature = _curvature(first, present, surrogate)
        return Components(
            jnp.mean(means, 0),
            jnp.mean(slopes, 0),
            curvature,
            means,
            slopes,
            jnp.max(jnp.mean(values, 0)),
            jnp.max(jnp.mean(jacobians, 0)) / jnp.where(size > 0, size, 1),
        )

    total = one_round(points[0])
    if len(points) == 1:
        return total

    def reached(of: Components) -> Array:
        # Relative to the scales of an input's pair with itself.
        scales = jnp.stack([of.value_scale, of.slope_scale * size])
        errors = jnp.sqrt(jnp.max(of.variance(covariance, covariance, of), (1, 2)))
        return jnp.all(errors <= _SHARE * (error or 0.0) * scales)

    def add(state: tuple[Array, Components]) -> tuple[Array, Components]:
        i, mean = state
        more = one_round(lax.dynamic_index_in_dim(points, i, keepdims=False))
        return i + 1, jax.tree.map(lambda x, y: x + (y - x) / (i + 1), mean, more)

    def goes_on(state: tuple[Array, Components]) -> Array:
        left = state[0] < len(points)
        return left if error is None else left & ~reached(state[1])

    return lax.while_loop(goes_on, add, (jnp.ones((), int), total))[1]


def _diagonal_jacobian_square(at: sampling.Outputs, covariance: Array) -> Float[Array, " S"]:
    """Diagonal of `E[J K J^T]` over the points."""
    moved = matmul(covariance, at.slope)
    squares = at.slope**2 * jnp.diagonal(covariance)[:, None] - 2 * at.slope * at.value * moved
    return jnp.mean(squares + at.value**2 * jnp.sum(at.slope * moved, 0), 1)


def _curvature(z: Array, present: Array, surrogate: Surrogate) -> Array:
    """Mean of `D_jk y_i` over the points `z` and their negatives.

    With p, q, r = f, f', f'' over the normaliser,

        D_jk y_i = [i=j=k] r_i - [i=j] q_i q_k - [i=k] q_i q_j - [j=k] p_i r_j + 2 p_i q_j q_k.
    """
    both = jnp.concatenate([z, -z], 1)
    value, slope, curvature = surrogate.ratios(both, present[:, None], axis=0)
    size, n = both.shape

    def mean(left: Array, right: Array) -> Array:
        return matmul(left, right.T) / n

    # One j at a time, for the memory's sake.
    triple = 2 * lax.map(lambda q: mean(value * q, slope), slope)
    triple = jnp.swapaxes(triple, 0, 1)
    each, slopes = jnp.arange(size), mean(slope, slope)
    triple = triple.at[each, each, :].add(-slopes).at[each, :, each].add(-slopes)
    triple = triple.at[:, each, each].add(-mean(value, curvature))
    return triple.at[each, each, each].add(jnp.mean(curvature, 1))
