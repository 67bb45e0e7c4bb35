"""Arguments of class probabilities as rows of logits, or what is wrong with them."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from taylor_softmax._numerics.arguments import as_real, check_entries, check_variances, fits

# Of a covariance's asymmetry and of its eigenvalues below 0, over its largest entry: what rounding
# in float32 leaves.
_ROUNDING = 1e-4


class Rows(NamedTuple):
    """Arguments as rows.

    Attributes:
      batch: the shape of all points.
      mean: `(N, C)`.
      spread: variances `(N, C)`, or covariances `(N, C, C)`.
      valid: which rows are, `(N,)`; the others hold something harmless.
      dtype: of results.
    """

    batch: tuple[int, ...]
    mean: Array
    spread: Array
    valid: Array
    dtype: Any


def restore(result: Array, rows: Rows) -> Array:
    """`(N, ...)` in the shape and dtype of the arguments, NaN in rows that are not valid."""
    valid = rows.valid.reshape(-1, *(1,) * (result.ndim - 1))
    result = jnp.where(valid, result, jnp.nan)
    return result.reshape(*rows.batch, *result.shape[1:]).astype(rows.dtype)


def independent(mean: Any, variance: Any) -> Rows:
    """Rows of independent logits, or what is wrong with them."""
    (mean, variance), dtype = as_real(mean=mean, variance=variance)
    valid = _check_means(mean)
    if not fits(variance.shape, mean.shape):
        raise ValueError(
            f"`variance` must broadcast to the shape {mean.shape} of `mean`, got {variance.shape}. "
            "Give one variance per point the shape (..., 1): `variance[..., None]`."
        )
    valid = valid & jnp.all(jnp.broadcast_to(check_variances("variance", variance), mean.shape), -1)
    means, variances = (
        x.reshape(-1, mean.shape[-1]) for x in (mean, jnp.broadcast_to(variance, mean.shape))
    )
    return Rows(mean.shape[:-1], *_harmless(means, variances, valid.reshape(-1)), dtype)


def with_covariance(mean: Any, covariance: Any, *, difference: bool = False) -> Rows:
    """Rows of logits with a full covariance, or what is wrong with them.

    Args:
      difference: the covariance is one of nearly equal ones: eigenvalues below 0 stand for 0.
    """
    (mean, covariance), dtype = as_real(mean=mean, covariance=covariance)
    valid = _check_means(mean)
    shape = (*mean.shape, mean.shape[-1])
    if covariance.shape[-2:] != shape[-2:] or not fits(covariance.shape, shape):
        raise ValueError(
            f"`covariance` must have shape (..., C, C) and broadcast to {shape} for a `mean` of "
            f"shape {mean.shape}, got {covariance.shape}. Variances alone go to `variance`."
        )
    present = mean > -jnp.inf
    covariance = jnp.where(present[..., :, None] & present[..., None, :], covariance, 0)
    if difference:
        valid = valid & jnp.all(jnp.isfinite(covariance), (-1, -2))
    else:
        valid = valid & _check_covariance(covariance)
    covariance = jnp.broadcast_to(covariance, shape).reshape(-1, *shape[-2:])
    mean, batch = mean.reshape(-1, shape[-1]), mean.shape[:-1]
    return Rows(batch, *_harmless(mean, covariance, valid.reshape(-1)), dtype)


def _check_covariance(covariance: Array) -> Array:
    """Which covariances are valid, or what is wrong with them."""
    finite = check_entries("covariance", covariance, jnp.isfinite(covariance), "finite")
    ok = jnp.all(finite, (-1, -2))
    covariance = jnp.where(ok[..., None, None], covariance, 0)
    slack = _ROUNDING * jnp.max(jnp.abs(covariance), (-1, -2))
    asymmetry = jnp.abs(covariance - jnp.matrix_transpose(covariance))
    symmetric = asymmetry <= slack[..., None, None]
    check_entries("covariance", covariance, symmetric, "symmetric")
    least = jnp.linalg.eigvalsh(lax.stop_gradient(covariance))[..., 0]
    positive = least >= -slack
    check_entries(
        "covariance", least, positive, "positive semi-definite, its least eigenvalue >= 0"
    )
    return ok & jnp.all(symmetric, (-1, -2)) & positive


def _check_means(mean: Array) -> Array:
    """Which rows of means are valid, or what is wrong with them."""
    if mean.ndim == 0 or mean.shape[-1] == 0:
        raise ValueError(
            f"`mean` must have shape (..., C) with C >= 1 classes, got {mean.shape}. "
            "Pass the logits of a point as one row."
        )
    numbers = ~jnp.isnan(mean) & ~jnp.isposinf(mean)
    check_entries("mean", mean, numbers, "finite, or -inf where there is no such class")
    largest = jnp.max(mean, -1)
    check_entries("mean", largest, largest > -jnp.inf, "finite for a class of each point")
    return jnp.all(numbers, -1) & (largest > -jnp.inf)


def _harmless(mean: Array, spread: Array, valid: Array) -> tuple[Array, Array, Array]:
    """Means and variances with those of rows that are not valid replaced, and `valid`."""
    spread = jnp.where(valid.reshape(-1, *(1,) * (spread.ndim - 1)), spread, 0)
    return jnp.where(valid[:, None], mean, 0), spread, valid
