"""Softmax of Gaussian logits with a full covariance over classes: expectation and covariance.

For `z ~ N(mu, Sigma)` there is no one-dimensional integral, but there is one for independent logits
nearby. Let `P` be the projection on differences between classes, since a common shift does not
change softmax; for Taylor softmax `P = Id`. Let `D` be the diagonal matrix for which `P D P` has
the diagonal of `P Sigma P`. With `z = mu + R x`, `z_D = mu + R_D x` and `x ~ N(0, Id)`,

    E[g(z)] = b E[g(z_D)] + E[g(z) - b g(z_D)],

where `R` and `R_D` are the symmetric roots of `P Sigma P` and `P D P`. The exact rule of `moments`
gives the first term. The second is a mean over quasi-random points `x` and their negatives. It
vanishes if `Sigma` is diagonal up to a common shift, as that of equicorrelated logits is, and for
two classes. Otherwise it is the smaller, the nearer `D` is. `b` is the coefficient of the
regression of `g(z)` on `g(z_D)`, which is 1 where the two agree. Without it, `g(z_D)`, which varies
along as many dimensions as there are classes, would add an error of its own where `z` varies along
few.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from taylor_softmax._numerics.precision import matmul
from taylor_softmax._numerics.surrogate import Surrogate
from taylor_softmax._position_axis.sampling import normal_points
from taylor_softmax._probabilities import moments as independent
from taylor_softmax._probabilities.moments import Moments

# Number that distinguishes these quasi-random points from those of softmax over positions.
_PURPOSE = 2
# Standard deviations below this fraction of the largest have no derivative. Its error grows as
# their inverse, and would be beyond 1e-1.
_SINGULAR = 1e-3
# Largest rounding error of softmax at a point, in units of eps.
_ROUNDING = 64


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def moments(
    mean: Array, covariance: Array, surrogate: Surrogate, second: bool, n_points: int, seed: int
) -> Moments:
    """Moments of `y` for logits of means `(N, C)` and covariances `(N, C, C)`.

    Args:
      mean: a mean of `-inf` excludes its class.
      surrogate: function that the softmax normalises.
      second: whether to compute `Cov[y]`.
      n_points: number of points, not counting their negatives.
      seed: number of the set of points.
    """
    present = ~jnp.isneginf(mean)
    full = project(covariance, present, surrogate)
    variance = _nearest_diagonal(full, present, surrogate)
    near = project(
        variance[:, :, None] * jnp.eye(mean.shape[1], dtype=mean.dtype), present, surrogate
    )
    points = normal_points(n_points, mean.shape[1], mean.dtype, _PURPOSE, seed=seed)
    exact = independent.moments(mean, variance, surrogate, second)
    centre = jnp.where(present, mean, 0)

    # Rematerialised in the backward pass, which otherwise would keep the points of every row.
    @jax.checkpoint
    def expectations(row: tuple[Any, ...]) -> tuple[Array, Array | None]:
        centre, present, full, near, exact_mean, exact_covariance = row
        # The largest principal axes take the first dimensions of the points, which are the best.
        axes = lax.stop_gradient(jnp.linalg.eigh(full)[1][:, ::-1])
        x = matmul(axes, points)
        samples = []
        n_null = jnp.sum(~present) + int(surrogate.is_shift_invariant)
        for matrix in (full, near):
            step = matmul(symmetric_root(matrix, n_null.astype(x.dtype)), x)
            z = centre[:, None] + jnp.concatenate([step, -step], 1)
            samples.append(surrogate.softmax(z, axis=0, where=present[:, None]))
        y, y_near = samples
        b = _regression(y, y_near)
        mean = b * exact_mean + jnp.mean(y - b * y_near, 1)
        if not second:
            return mean, None
        # The coefficients of the squares serve all products, whose own ones are nearly the same.
        b_products = _regression(y**2, y_near**2)
        difference = exact_covariance - _covariance(y_near)
        return mean, _covariance(y) + b_products * difference

    rows = centre, present, full, near, exact.mean, exact.covariance
    estimate, covariance_estimate = lax.map(expectations, rows)
    # Estimates may be below 0 where probabilities are below the error.
    p = jnp.maximum(estimate, 0)
    p = p / jnp.sum(p, axis=1, keepdims=True)
    return Moments(p, covariance_estimate, exact.total)


def _regression(y: Array, x: Array) -> Array:
    """The coefficient of the regression of samples `y` on samples `x`, both `(C, 2 n)`.

    It is that of means over a point and its negative, which are `n` columns apart. It is 1 where
    `x` varies by no more than its rounding, on which a regression means nothing.
    """
    n = y.shape[1] // 2
    y, x = (
        (samples[:, :n] + samples[:, n:]) / 2
        for samples in (lax.stop_gradient(y), lax.stop_gradient(x))
    )
    y, x = (samples - jnp.mean(samples, 1, keepdims=True) for samples in (y, x))
    rounding = x.size * (_ROUNDING * float(jnp.finfo(x.dtype).eps)) ** 2
    return 1 + jnp.sum(x * (y - x)) / (jnp.sum(x * x) + rounding)


def project(covariance: Array, present: Array, surrogate: Surrogate) -> Array:
    """`P Sigma P`, symmetric to the last bit; 0 for classes that are not present.

    Args:
      covariance: `Sigma`, `(N, C, C)`.
      present: which classes are not excluded, `(N, C)`.
    """
    covariance = (covariance + jnp.matrix_transpose(covariance)) / 2
    covariance = jnp.where(present[:, :, None] & present[:, None, :], covariance, 0)
    if not surrogate.is_shift_invariant:
        return covariance
    weight = present.astype(covariance.dtype)
    weight = weight / jnp.sum(weight, axis=1, keepdims=True)
    rows = jnp.sum(covariance * weight[:, None, :], axis=2)
    total = jnp.sum(rows * weight, axis=1)[:, None, None]
    centred = covariance - rows[:, :, None] - rows[:, None, :] + total
    return jnp.where(present[:, :, None] & present[:, None, :], centred, 0)


def _nearest_diagonal(full: Array, present: Array, surrogate: Surrogate) -> Array:
    """The nonnegative diagonal `D`, `(N, C)`, for which `P D P` has the diagonal of `full`.

    For softmax `(P D P)_ii = (1 - 2 / n) D_i + sum D / n^2`. Where the solution is negative, `D` is
    0.
    """
    diagonal = jnp.maximum(jnp.diagonal(full, axis1=1, axis2=2), 0)
    if not surrogate.is_shift_invariant:
        return diagonal
    n = jnp.sum(present, axis=1, keepdims=True).astype(full.dtype)
    total = jnp.sum(diagonal, axis=1, keepdims=True) * n / jnp.maximum(n - 1, 1)
    several = n > 2
    solution = (diagonal - total / n**2) / jnp.where(several, 1 - 2 / n, 1)
    # For two classes only the sum of the variances matters.
    return jnp.where(present, jnp.maximum(jnp.where(several, solution, total / n), 0), 0)


@jax.custom_jvp
def symmetric_root(matrix: Array, n_null: Array) -> Array:
    """The symmetric root of a matrix that is positive semi-definite up to rounding.

    The derivative is NaN where the matrix is singular, since a root has no derivative there.

    Args:
      n_null: number of dimensions in which the matrix and its derivatives are 0.
    """
    return _from_eigen(*_eigen(matrix))


@symmetric_root.defjvp
def _symmetric_root_jvp(primals: tuple[Array, Array], tangents: Any) -> tuple[Array, Array]:
    # R dR + dR R = dA in the eigenvectors of R, which need no derivatives where eigenvalues meet.
    matrix, n_null = primals
    roots, vectors = _eigen(matrix)
    small = roots <= _SINGULAR * roots[-1]
    null = jnp.arange(len(roots)) < n_null
    weight = 1 / jnp.where(small[:, None] & small, jnp.nan, roots[:, None] + roots)
    weight = jnp.where(null[:, None] | null, 0, weight)
    change = weight * matmul(matmul(vectors.T, tangents[0]), vectors)
    return _from_eigen(roots, vectors), matmul(matmul(vectors, change), vectors.T)


def _eigen(matrix: Array) -> tuple[Array, Array]:
    """Roots of the eigenvalues, ascending, and eigenvectors."""
    values, vectors = jnp.linalg.eigh(matrix)
    return jnp.sqrt(jnp.maximum(values, 0)), vectors


def _from_eigen(roots: Array, vectors: Array) -> Array:
    return matmul(vectors * roots, vectors.T)


def _covariance(samples: Array) -> Array:
    """The covariance of samples `(C, n)`, symmetric to the last bit."""
    centred = samples - jnp.mean(samples, 1, keepdims=True)
    product = matmul(centred, centred.T) / samples.shape[1]
    return (product + product.T) / 2
