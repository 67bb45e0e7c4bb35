"""Means of a softmax over positions and of its first two derivatives, once an input.

They are the coefficients of Mehler's formula in `S` dimensions,

    E[y(u) y(v)^T] = sum_k (1/k!) < E[D^k y(u)], K12^(x)k, E[D^k y(v)] >,

whose terms of degree 0 to 2 need nothing of the pair but `K12`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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

# Of these the first of each round make up the entries of the curvature for three different
# positions. Their cost grows with the cube of the number of positions, and four times as many make
# no difference (16 positions, measured).
_CURVATURE_POINTS = 1 << 11

# Beside how many points of a pair the form has to be worth it.
_POINTS_OF_PAIRS = 1 << 13

# Share of an asked-for error that the components may have: beside it that of the pairs is seen.
_SHARE = 0.2


class Curvature(NamedTuple):
    """`T = E[D^2 y]` of one input, and the part of `y` of degree 2 that values are taken less of.

    All of that part is `S^3` operations a point. The entries `T_ijk` of three different positions
    hardly count, though; without them it is a quadratic form of `S^2` operations,

        g(u)_i = (u_i (A u)_i + (D u^2)_i) / 2,    less its mean.

    Of the variance of the even part of `y` it takes off what all of degree 2 does, but a hundredth
    of the whole (16 and 64 i.i.d. positions, variances 0.25 to 20, measured).

    Attributes:
      whole: `T`, `(S, S, S)`.
      rest: `T` without the second derivative of `g`.
      mixed, squares: `A` and `D`.
      projections: means of `2 g_i g'_i`, `(G, S)`, with `g'` as each group of scramblings says;
        their spread is the error of the term of degree 2 that `g` brings in.
    """

    whole: Float[Array, "*n S S S"]
    rest: Float[Array, "*n S S S"]
    mixed: Float[Array, "*n S S"]
    squares: Float[Array, "*n S S"]
    projections: Float[Array, "*n G S"]


class Components(NamedTuple):
    """Hermite components of `y` for the logits of one input, up to degree 2.

    Attributes:
      mean: `m = E[y]`.
      slope: `B = E[D y]`, the mean Jacobian.
      curvature: of degree 2; None where it is not wanted.
      means, slopes: of each group of scramblings, whose spread tells their errors.
      value_scale: largest entry of `E[y y^T]`.
      slope_scale: largest entry of `E[J X J^T]` for `X = K / |K|`, by Frobenius's norm.
    """

    mean: Float[Array, "*n S"]
    slope: Float[Array, "*n S S"]
    curvature: Curvature | None
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
        return _contracted(self.curvature.whole, other.curvature.whole, first, second)

    def quadratic_of_forms(self, cross: Array, other: "Components") -> Float[Array, "S T"]:
        """The term of degree 2 without `<rest, K12 (x) K12, rest'> / 2`.

        Values less the forms have the latter. What the forms are off therefore cancels.
        """
        assert self.curvature is not None
        assert other.curvature is not None
        rest = _contracted(self.curvature.rest, other.curvature.rest, cross, cross)
        return (self.quadratic(cross, cross, other) - rest) / 2

    def variance(
        self, cross: Array, theta: Array | None, other: "Components"
    ) -> Float[Array, "k S T"]:
        """Squared standard errors that the components give the second moment and the NTK.

        To first order in the components' errors, the NTK is `B Theta B'^T`, and the second moment
        `m m'^T + B K12 B'^T` and the term of degree 2 that the forms bring in.
        """

        def linear(inner: Array) -> Array:
            return matmul(matmul(self.slopes, inner), jnp.swapaxes(other.slopes, 1, 2))

        products = einsum("gp,gq->gpq", self.means, other.means)
        parts = [products + linear(cross)]
        if theta is not None:
            parts.append(linear(theta))
        variances = [jnp.var(x, 0) for x in parts]
        if self.curvature is not None and other.curvature is not None:
            of_forms = [jnp.std(x.projections, 0) for x in (self.curvature, other.curvature)]
            variances[0] = variances[0] + of_forms[0][:, None] * of_forms[1]
        return jnp.stack(variances) / (len(self.means) - 1)


def _contracted(left: Array, right: Array, first: Array, second: Array) -> Float[Array, "S T"]:
    """`<T, C (x) D, T'>`."""
    size, other_size = first.shape
    moved = matmul(jnp.swapaxes(matmul(left, second), 1, 2), first)
    flat = jnp.swapaxes(moved, 1, 2).reshape(size, -1)
    return matmul(flat, right.reshape(other_size, -1).T)


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

    def group(z: Array) -> tuple[Any, ...]:
        outputs = sampling.outputs(matmul(root, z), present, surrogate)
        squares = jnp.mean(outputs.value**2, 1), _diagonal_jacobian_square(outputs, shape)
        forms = _forms(outputs) if with_curvature else None
        return jnp.mean(outputs.value, 1), outputs.mean_jacobian(), *squares, forms

    def one_round(z: Array) -> Components:
        means, slopes, values, jacobians, forms = lax.map(group, z)
        curvature = None
        if with_curvature:
            curvature = _curvature(root, z[0, :, :_CURVATURE_POINTS], present, surrogate, *forms)
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

    def reached(mean: Components) -> Array:
        # Relative to the scales of an input's pair with itself.
        scales = jnp.stack([mean.value_scale, mean.slope_scale * size])
        errors = jnp.sqrt(jnp.max(mean.variance(covariance, covariance, mean), (1, 2)))
        return jnp.all(errors <= _SHARE * (error or 0.0) * scales)

    def add(state: tuple[Array, Components]) -> tuple[Array, Components]:
        i, mean = state
        more = one_round(lax.dynamic_index_in_dim(points, i, keepdims=False))
        return i + 1, jax.tree.map(lambda x, y: x + (y - x) / (i + 1), mean, more)

    def goes_on(state: tuple[Array, Components]) -> Array:
        left = state[0] < len(points)
        return left if error is None else left & ~reached(state[1])

    return lax.while_loop(goes_on, add, (jnp.ones((), int), total))[1]


def _diagonal_jacobian_square(outputs: sampling.Outputs, covariance: Array) -> Float[Array, " S"]:
    """Diagonal of `E[J K J^T]` over the points."""
    moved = matmul(covariance, outputs.slope)
    squares = (
        outputs.slope**2 * jnp.diagonal(covariance)[:, None]
        - 2 * outputs.slope * outputs.value * moved
    )
    return jnp.mean(squares + outputs.value**2 * jnp.sum(outputs.slope * moved, 0), 1)


def _forms(outputs: sampling.Outputs) -> tuple[Float[Array, "S S"], Float[Array, "S S"]]:
    """`A` and `D` of a `Curvature`: means over the points of `at`.

    With p, q, r = f, f', f'' over the normaliser,

        D_jk y_i = [i=j=k] r_i - [i=j] q_i q_k - [i=k] q_i q_j - [j=k] p_i r_j + 2 p_i q_j q_k.
    """
    p, q, r = outputs
    n = p.shape[1]
    mixed = matmul(4 * p * q - 2 * q, q.T) / n
    own = jnp.mean(r - 2 * q * q, 1)
    mixed = jnp.where(jnp.eye(len(p), dtype=bool), own, mixed)
    return mixed, matmul(p, (2 * q * q - r).T) / n


def quadratic_form(
    mixed: Array, squares: Array, root: Array, z: Array, present: Array
) -> Float[Array, "S points"]:
    """`g(z)` of a `Curvature`, for logits `z` of the covariance `root root^T`.

    Less its mean over the positions, as `y` sums to 1.
    """
    covariance = matmul(root, root.T)
    mean = jnp.sum(mixed * covariance, 1) + matmul(squares, jnp.diagonal(covariance))
    form = z * matmul(mixed, z) + matmul(squares, z * z) - mean[:, None]
    return _centred(form, present) / 2


def _centred(x: Float[Array, "S *rest"], present: Float[Array, " S"]) -> Float[Array, "S *rest"]:
    """`x` less its mean over the positions that are present."""
    share = present / jnp.maximum(jnp.sum(present), 1)
    return x - share.reshape(-1, *(1,) * (x.ndim - 1)) * jnp.sum(x, 0)


def _curvature(
    root: Array,
    z: Array,
    present: Array,
    surrogate: Surrogate,
    mixed: Float[Array, "G S S"],
    squares: Float[Array, "G S S"],
) -> Curvature:
    """Of points `z` and their negatives, and of the forms of each group of scramblings."""
    z = matmul(root, z)
    outputs = sampling.outputs(z, present, surrogate)
    size, n = outputs.value.shape
    # One j at a time, for the memory's sake.
    triple = 2 * lax.map(lambda q: matmul(outputs.value * q, outputs.slope.T) / n, outputs.slope)
    i, j, k = np.ix_(*(np.arange(size),) * 3)
    different = (i != j) & (j != k) & (i != k)
    triple = _centred(jnp.where(different, jnp.swapaxes(triple, 0, 1), 0), present)

    def form_of(given: tuple[Array, Array]) -> Array:
        return quadratic_form(*given, root, z, present)

    forms = lax.map(form_of, (mixed, squares))
    mixed, squares, form = (jnp.mean(x, 0) for x in (mixed, squares, forms))
    plus, minus = jnp.split(outputs.value, 2, 1)
    even = (plus + minus) / 2
    even = even - jnp.mean(even, 1, keepdims=True)
    # As much of the form as leaves least of `y`, and less where what the form is off is more than
    # what it saves.
    tiny = float(jnp.finfo(root.dtype).tiny)
    share = jnp.clip(jnp.sum(form * even) / jnp.maximum(jnp.sum(form**2), tiny), 0, 1)
    projections = 2 * share * jnp.mean(form * forms, 2)
    off = jnp.sum(jnp.var(projections, 0)) / (len(forms) - 1)
    saved = jnp.sum(jnp.var(even**2, 1)) / _POINTS_OF_PAIRS
    trusted = saved / jnp.maximum(saved + off, tiny)
    share, projections = trusted * share, trusted * projections

    dense, own = jnp.zeros_like(triple), np.arange(size)
    dense = dense.at[own, own, :].add(mixed / 2).at[own, :, own].add(mixed / 2)
    dense = _centred(dense.at[:, own, own].add(squares), present)
    whole = triple + dense
    return Curvature(whole, whole - share * dense, share * mixed, share * squares, projections)
