"""Means of a softmax over positions and of its first two derivatives, once an input.

They are the coefficients of Mehler's formula in `S` dimensions,

    E[y(u) y(v)^T] = sum_k (1/k!) < E[D^k y(u)], K12^(x)k, E[D^k y(v)] >,

whose terms of degree 0 to 2 need nothing of the pair but `K12`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from taylor_softmax._numerics.precision import matmul
from taylor_softmax._numerics.surrogate import Surrogate
from taylor_softmax._position_axis import sampling

# Points, beside their negatives. Errors of the mean enter at first order, as the mean of one side
# times the error of the other's: with a quarter of these points they are 3e-3 of the largest entry
# (16 positions, variance 1), at any number of points per pair.
N_POINTS = 1 << 14

# Of these the first make up the curvature, whose errors enter at a tenth of their size, and whose
# cost grows with the cube of the number of positions.
_CURVATURE_POINTS = 1 << 11


class Components(NamedTuple):
    """Hermite components of `y` for the logits of one input, up to degree 2.

    Attributes:
      mean: `m = E[y]`.
      slope: `B = E[D y]`, the mean Jacobian.
      curvature: `E[D^2 y]`; None where it is not wanted.
    """

    mean: Float[Array, "*n S"]
    slope: Float[Array, "*n S S"]
    curvature: Float[Array, "*n S S S"] | None

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


def components(
    root: Float[Array, "S S"],
    present: Float[Array, " S"],
    surrogate: Surrogate,
    *,
    with_curvature: bool,
) -> Components:
    """The components of one input with logits `root z` at the positions `present`."""
    z = matmul(root, sampling.normal_points(N_POINTS, len(root), root.dtype, sampling.COMPONENTS))
    outputs = sampling.outputs(z, present, surrogate)
    mean, slope = jnp.mean(outputs.value, 1), outputs.mean_jacobian()
    curvature = None
    if with_curvature:
        curvature = _curvature(z[:, :_CURVATURE_POINTS], present, surrogate)
    return Components(mean, slope, curvature)


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
