"""Softmax of Gaussian logits with a full covariance over classes: expectation and covariance.

For `z ~ N(mu, Sigma)` there is no one-dimensional integral. What is near is: with `P` the
projection on differences between classes (softmax does not see a common shift; for Taylor softmax
`P = Id`) let `D` be the diagonal matrix for which `P D P` has the diagonal of `P Sigma P`. Then

    E[g(z)] = b E[g(z_D)] + E[g(z) - b g(z_D)],    z = mu + R x,  z_D = mu + R_D x,  x ~ N(0, Id),

`R`, `R_D` being the symmetric roots of `P Sigma P` and `P D P`. The first term is the exact rule of
`moments`, the second a mean over quasi-random points `x` and their negatives, of a difference that
is small where `D` is near: it vanishes where `Sigma` is diagonal, or so up to a shift, as
equicorrelated logits are, and for two classes always. There `b = 1`. `b` is the coefficient of
regression of `g(z)` on `g(z_D)`, so that `g(z_D)`, which varies along as many dimensions as there
are classes, adds no error of its own where `z` varies along few.
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

# Purpose of the quasi-random points: another than those of softmax over positions.
_PURPOSE = 2
# Standard deviations below this share of the largest have no derivative: its error, which grows as
# their inverse, would be beyond 1e-1.
_SINGULAR = 1e-3
# Rounding errors of softmax at a point, over eps, at most.
_ROUNDING = 64


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def moments(
    mean: Array, covariance: Array, surrogate: Surrogate, second: bool, n_points: int, seed: int
) -> Moments:
    """Moments of `y` for logits of means `(N, C)` and covariances `(N, C, C)`.

    A mean of `-inf` excludes its class.

    Args:
      second: whether `Cov[y]` is wanted.
      n_points: how many points, beside their negatives.
      seed: which points.
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
    def expectations(of: tuple[Any, ...]) -> tuple[Array, Array | None]:
        centre, present, full, near, exact_mean, exact_covariance = of
        # Principal axes first, as the first dimensions of quasi-random points are the best ones.
        axes = lax.stop_gradient(jnp.linalg.eigh(full)[1][:, ::-1])
        x = matmul(axes, points)
        samples = []
        n_null = jnp.sum(~present) + int(surrogate.is_shift_invariant)
        for matrix in (full, near):
            step = matmul(symmetric_root(matrix, n_null.astype(x.dtype)), x)
            z = centre[:, None] + jnp.concatenate([step, -step], 1)
            samples.append(surrogate.softmax(z, axis=0, where=present[:, None]))
        first, other = samples
        of_mean = _regression(first, other)
        mean = of_mean * exact_mean + jnp.mean(first - of_mean * other, 1)
        if not second:
            return mean, None
        # Of the squares, whose regression is that of all products nearly.
        of_products = _regression(first**2, other**2)
        difference = exact_covariance - _covariance(other)
        return mean, _covariance(first) + of_products * difference

    rows = centre, present, full, near, exact.mean, exact.covariance
    estimate, products = lax.map(expectations, rows)
    # Estimates may be below 0 where probabilities are below the error.
    p = jnp.maximum(estimate, 0)
    p = p / jnp.sum(p, axis=1, keepdims=True)
    return Moments(p, products, exact.total)


def _regression(y: Array, x: Array) -> Array:
    """The coefficient of one of samples `(C, 2 n)` on another, of means over `x` and `-x`.

    It is 1 where `x` varies by no more than rounding, which has any coefficient on rounding.
    """
    n = y.shape[1] // 2
    y, x = (
        (each[:, :n] + each[:, n:]) / 2 for each in (lax.stop_gradient(y), lax.stop_gradient(x))
    )
    y, x = (each - jnp.mean(each, 1, keepdims=True) for each in (y, x))
    rounding = x.size * (_ROUNDING * float(jnp.finfo(x.dtype).eps)) ** 2
    return 1 + jnp.sum(x * (y - x)) / (jnp.sum(x * x) + rounding)


def project(covariance: Array, present: Array, surrogate: Surrogate) -> Array:
    """`P Sigma P`, symmetric to the last bit, of the classes that are there."""
    covariance = (covariance + jnp.matrix_transpose(covariance)) / 2
    covariance = jnp.where(present[:, :, None] & present[:, None, :], covariance, 0)
    if not surrogate.is_shift_invariant:
        return covariance
    share = present.astype(covariance.dtype)
    share = share / jnp.sum(share, axis=1, keepdims=True)
    rows = jnp.sum(covariance * share[:, None, :], axis=2)
    total = jnp.sum(rows * share, axis=1)[:, None, None]
    centred = covariance - rows[:, :, None] - rows[:, None, :] + total
    return jnp.where(present[:, :, None] & present[:, None, :], centred, 0)


def _nearest_diagonal(full: Array, present: Array, surrogate: Surrogate) -> Array:
    """The nonnegative `D` for which `P D P` has the diagonal of `full`, as near as there is.

    `(P D P)_ii = (1 - 2 / n) D_i + sum D / n^2` for softmax.
    """
    diagonal = jnp.maximum(jnp.diagonal(full, axis1=1, axis2=2), 0)
    if not surrogate.is_shift_invariant:
        return diagonal
    n = jnp.sum(present, axis=1, keepdims=True).astype(full.dtype)
    total = jnp.sum(diagonal, axis=1, keepdims=True) * n / jnp.maximum(n - 1, 1)
    several = n > 2
    each = (diagonal - total / n**2) / jnp.where(several, 1 - 2 / n, 1)
    # For two classes only the sum of the variances matters.
    return jnp.where(present, jnp.maximum(jnp.where(several, each, total / n), 0), 0)


@jax.custom_jvp
def symmetric_root(matrix: Array, n_null: Array) -> Array:
    """The symmetric positive semi-definite root of a matrix that is so up to rounding.

    Its derivative is NaN where the matrix is singular: a root has none there.

    Args:
      n_null: how many dimensions the matrix has no part in, nor have its derivatives.
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
    """Of samples `(C, n)`."""
    centred = samples - jnp.mean(samples, 1, keepdims=True)
    product = matmul(centred, centred.T) / samples.shape[1]
    return (product + product.T) / 2
