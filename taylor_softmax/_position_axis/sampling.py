"""Roots of covariances, quasi-random points, and what softmaxes and their Jacobians average to.

`(u, v) ~ N(0, [[K11, K12], [K12^T, K22]])` are the logits at the `S` positions of one input and the
`T` of another. With standard normal `z1`, `z2`, `z3` and roots `L1`, `L2` of `K11`, `K22`,

    u = L1 z1,    v = A^T z1 + Q z2,    w = L2 z3,

`r v + sqrt(1 - r^2) w` has covariance `K22` and cross-covariance `r K12` with `u`: every value of
`r` from one root. Attention takes several, softmax over positions `r = 1` alone. Arrays of points
are `(S, n)`, points next to each other in memory.

Covariances come with rounding errors, and are singular as soon as positions repeat. Directions
below the rounding are left out; what is left of `K12` between the others is made a contraction, so
that `v` has covariance `K22` whatever `K12` is. A ridge in its place would have to be larger than
the rounding, and smaller than what matters: at a bias of 5 in float32 there is no such number
(6e-3 off, measured).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats.qmc
from jaxtyping import Array, Float

from taylor_softmax._numerics.precision import matmul
from taylor_softmax._numerics.surrogate import Surrogate

# What points are for. Components and pairs have their own: with one set for both, an error of
# 1.4e-3 of the largest entry is left that more points don't remove (measured).
PAIRS, COMPONENTS = 0, 1

# Rounding errors of a covariance: its largest entry, eps and the root of its size times this. Sums
# of a few terms, each rounded, make up an entry.
_ROUNDING = 4.0

# Where more than this share of the axes counts, the symmetric root has less of an error: NTKs of
# i.i.d. positions have 0.6 to 0.7 of it (16 positions, variances 0.25 to 4, measured), of logits in
# 2 dimensions ten times as much.
_ALIKE = 0.6


class Root(NamedTuple):
    """Root `L` of a covariance, `L L^T = K`, without what rounding errors may have made.

    Attributes:
      root: `L`, `(S, S)`: columns are principal axes, the largest first, as the first dimensions of
        quasi-random points are the best ones; or `L` is symmetric.
      inverse: its pseudo-inverse.
      symmetric: 1 where `L` is symmetric, 0 where its columns are principal axes.
      values, vectors: eigenvalues, descending, and eigenvectors of `K`, for the size of its errors.
      noise: eigenvalues up to this count as 0, a scalar.
    """

    root: Float[Array, "S S"]
    inverse: Float[Array, "S S"]
    symmetric: Float[Array, ""]
    values: Float[Array, " S"]
    vectors: Float[Array, "S S"]
    noise: Float[Array, ""]


class Outputs(NamedTuple):
    """Softmaxes at points and, behind them, at their negatives.

    Attributes:
      value: `y = f / sum f`, `(S, 2 n)`.
      slope: `q = f' / sum f`; the Jacobian of `y` is `diag(q) - y q^T`.
      curvature: `r = f'' / sum f`.
    """

    value: Float[Array, "S points"]
    slope: Float[Array, "S points"]
    curvature: Float[Array, "S points"]

    def mean_jacobian(self) -> Float[Array, "S S"]:
        """`E[J]` over the points."""
        products = matmul(self.value, self.slope.T) / self.value.shape[1]
        return jnp.diag(jnp.mean(self.slope, 1)) - products


def rounding(covariance: Float[Array, "*batch S S"]) -> Float[Array, "*batch"]:
    """Size of the rounding errors in the eigenvalues of a covariance, before anything is taken off.

    Differences from a mean have the rounding errors of what they are differences of.
    """
    largest = jnp.max(jnp.abs(jnp.diagonal(covariance, axis1=-2, axis2=-1)), -1)
    size = covariance.shape[-1]
    return _ROUNDING * float(jnp.finfo(covariance.dtype).eps) * math.sqrt(size) * largest


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def psd_root(
    covariance: Float[Array, "S S"], noise: Float[Array, ""], may_be_symmetric: bool = False
) -> Root:
    """The root of a covariance that is positive semi-definite up to errors of size `noise`.

    Args:
      may_be_symmetric: whether it is the symmetric root where most axes count alike. A softmax of
        almost independent positions is nearly a sum of functions of one position each, which
        quasi-random points integrate best along the positions. Where few axes count, they
        deserve the leading dimensions.
    """
    values, vectors = jnp.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    kept = values > noise
    scale = jnp.sqrt(jnp.where(kept, values, 1))
    root, inverse = jnp.where(kept, vectors * scale, 0), jnp.where(kept, vectors / scale, 0).T
    symmetric = jnp.zeros((), values.dtype)
    if may_be_symmetric:
        size = jnp.sum(jnp.diagonal(covariance) > noise, dtype=values.dtype)
        # How many axes count: all of equal eigenvalues, one of a single one.
        squares = jnp.sum(jnp.where(kept, values, 0) ** 2)
        count = jnp.sum(jnp.where(kept, values, 0)) ** 2 / jnp.where(squares > 0, squares, 1)
        symmetric = (count > _ALIKE * size).astype(values.dtype)
        root = jnp.where(symmetric > 0, matmul(root, vectors.T), root)
        inverse = jnp.where(symmetric > 0, matmul(vectors, inverse), inverse)
    return Root(root, inverse, symmetric, values, vectors, noise)


@psd_root.defjvp
def _psd_root_jvp(
    may_be_symmetric: bool, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Any, Any]:
    # Of all roots of a matrix that moves, the one that moves as dL = dK L^-T / 2, as good as any
    # for what is sampled with it: eigenvectors have no derivative where eigenvalues meet.
    root = psd_root(*primals, may_be_symmetric)
    change = matmul((tangents[0] + tangents[0].T) / 4, root.inverse.T)
    inverse = -matmul(matmul(root.inverse, change), root.inverse)
    still = (jnp.zeros_like(x) for x in root[2:])
    return root, Root(change, inverse, *still)


def correlate(
    one: Root, two: Root, cross: Float[Array, "S T"]
) -> tuple[Float[Array, "S T"], Float[Array, "T T"]]:
    """`A` and `Q` of `v = A^T z1 + Q z2`, which are not to be differentiated.

    `A^T A + Q Q^T = L2 L2^T` and `L1 A = K12` up to what contradicts it.
    """
    # In the principal axes of both, where |K12_ij|^2 <= d_i e_j; what is beyond tells how large the
    # errors are, also of covariances that were rounded more coarsely than their dtype is.
    cross = matmul(matmul(one.vectors.T, cross), two.vectors)
    first, second = jnp.maximum(one.values, 0), jnp.maximum(two.values, 0)
    excess = jnp.max(jnp.abs(cross) - jnp.sqrt(first[:, None]) * jnp.sqrt(second))
    negative = -jnp.minimum(one.values[-1], two.values[-1])
    noise = functools.reduce(jnp.maximum, (excess, negative, one.noise, two.noise))
    scales = [jnp.where(x > noise, 1 / jnp.sqrt(jnp.maximum(x, noise)), 0) for x in (first, second)]
    scales = [jnp.where(jnp.isfinite(x), x, 0) for x in scales]
    whitened = scales[0][:, None] * cross * scales[1]
    # Along the columns of both roots.
    whitened = jnp.where(one.symmetric > 0, matmul(one.vectors, whitened), whitened)
    whitened = jnp.where(two.symmetric > 0, matmul(whitened, two.vectors.T), whitened)
    # Singular values are correlations, at most 1.
    squares, axes = jnp.linalg.eigh(matmul(whitened.T, whitened))
    squares = jnp.maximum(squares, 0)
    clipped = axes / jnp.sqrt(jnp.maximum(squares, 1))
    slope = matmul(matmul(matmul(whitened, clipped), axes.T), two.root.T)
    rest = 1 - squares
    kept = rest > 8 * max(cross.shape) * float(jnp.finfo(cross.dtype).eps)
    scale = jnp.sqrt(jnp.where(kept, rest, 1))
    back = jnp.where(two.symmetric > 0, axes, jnp.eye(len(axes), dtype=axes.dtype))
    return slope, matmul(two.root, matmul(jnp.where(kept, axes * scale, 0), back.T))


def outputs(z: Float[Array, "S n"], present: Float[Array, " S"], surrogate: Surrogate) -> Outputs:
    """The softmaxes at the logits `z` and at `-z`."""
    return outputs_at(jnp.concatenate([z, -z], 1), present, surrogate)


def outputs_at(
    z: Float[Array, "S points"], present: Float[Array, " S"], surrogate: Surrogate
) -> Outputs:
    """The softmaxes at the logits `z` alone."""
    return Outputs(*surrogate.ratios(z, present[:, None], axis=0))


def jacobian_product(
    left: Outputs, right: Outputs, inner: Float[Array, "S T"]
) -> Float[Array, "S T"]:
    """Mean of `J C J'^T` over the points.

    Multiplied out, so that no `S x S` matrix is held for a point; `o` is the entrywise product:

        C o q q'^T - (q o C q' - y (q^T C q')) y'^T - y (q' o C^T q)^T.
    """
    moved = left.slope * matmul(inner, right.slope)
    moved = moved - left.value * jnp.sum(moved, 0)
    total = inner * matmul(left.slope, right.slope.T) - matmul(moved, right.value.T)
    total = total - matmul(left.value, (right.slope * matmul(inner.T, left.slope)).T)
    return total / left.value.shape[1]


def normal_points(
    n_points: int, dimension: int, dtype: Any, purpose: int, *, seed: int = 0, scrambling: int = 0
) -> Array:
    """Quasi-random points of the standard normal distribution, `(dimension, n_points)`.

    The same at every call. Their negatives are left to `outputs`.

    Args:
      dimension: for a pair of inputs of `S` and `T` positions `S + T`, in attention `S + 2 T`.
      purpose: `PAIRS`, `COMPONENTS` or another number.
      seed, scrambling: any two that differ give independent points.
    """
    # Behind the barrier XLA takes them as an argument, rather than as a constant that it folds
    # into everything that is made of it.
    points = jnp.asarray(_sobol_points(n_points, dimension, (purpose, seed, scrambling)), dtype)
    return jax.lax.optimization_barrier(points)


def scramblings(
    n: int, n_points: int, dimension: int, dtype: Any, purpose: int, seed: int
) -> Float[Array, "n dimension n_points"]:
    """The first `n` scramblings of `n_points` each; see `normal_points`."""
    points = [_sobol_points(n_points, dimension, (purpose, seed, i)) for i in range(n)]
    return jax.lax.optimization_barrier(jnp.asarray(np.stack(points), dtype))


def leading_first(size1: int, size2: int) -> np.ndarray:
    """Which dimension each coordinate of `z1`, `z2` and `z3` takes, leading principal axes first.

    The first dimensions are the best ones, also in pairs. One block of dimensions behind the other
    gives the leading axes of all three to dimensions far apart, and of some of those 128 points are
    no better than random ones: keys of rank 1 had 10 times the error (8 tokens, measured).
    """
    axis = np.concatenate([np.arange(size1), np.arange(size2), np.arange(size2)])
    # Where inputs are alike, `z2` does not count.
    last = np.repeat([0, 2, 1], [size1, size2, size2])
    return np.argsort(np.lexsort([last, axis]))


@functools.cache
def _sobol_points(n_points: int, dimension: int, entropy: tuple[int, int, int]) -> np.ndarray:
    """Scrambled Sobol points, mapped to the standard normal distribution."""
    generator = np.random.default_rng(entropy)
    sampler = scipy.stats.qmc.Sobol(dimension, scramble=True, seed=generator)  # pyright: ignore[reportCallIssue]
    # A power of two is what balances the points.
    uniform = sampler.random_base2(max(0, (n_points - 1).bit_length()))[:n_points]
    # Scrambling can give 0 exactly.
    return np.ascontiguousarray(scipy.special.ndtri(np.clip(uniform, 1e-12, 1 - 1e-12)).T)
