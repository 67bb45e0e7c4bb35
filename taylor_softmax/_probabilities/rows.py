"""Reading and checking of the arguments of class probabilities: rows of logits, one a point."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from taylor_softmax._numerics.arguments import (
    as_real,
    check_entries,
    check_variances,
    concrete,
    fits,
    known,
    namespace,
)

# How large the asymmetry of a covariance may be, and how far its eigenvalues may be below 0,
# relative to its largest entry: float32 rounds by less.
_ROUNDING = 1e-4


class Rows(NamedTuple):
    """The logits of `N` points.

    Attributes:
      batch: the shape that the points had, before they became rows.
      mean: means, `(N, C)`.
      spread: variances, `(N, C)`, or covariances, `(N, C, C)`.
      valid: which rows are valid, `(N,)`, if arguments are traced; the others hold harmless
        numbers. None if all rows are valid.
      dtype: dtype of results.
    """

    batch: tuple[int, ...]
    mean: Array
    spread: Array
    valid: Array | None
    dtype: Any


def restore(result: Array, rows: Rows) -> Array:
    """`result`, `(N, ...)`, in the shape and dtype of the arguments; NaN in rows not valid."""
    if rows.valid is not None:
        valid = rows.valid.reshape(-1, *(1,) * (result.ndim - 1))
        result = jnp.where(valid, result, jnp.nan)
    plain = concrete(result)
    return jnp.asarray(plain.reshape((*rows.batch, *result.shape[1:])).astype(rows.dtype))


def independent(mean: Any, variance: Any) -> Rows:
    """Reads and checks independent logits.

    Raises:
      TypeError, ValueError: as `class_probabilities`.
    """
    (mean, variance), dtype = as_real(mean=mean, variance=variance)
    valid = _check_means(known(mean))
    if not fits(variance.shape, mean.shape):
        raise ValueError(
            f"`variance` must broadcast to the shape {mean.shape} of `mean`, got {variance.shape}. "
            "Give one variance per point the shape (..., 1): `variance[..., None]`."
        )
    valid_variance = check_variances("variance", known(variance))
    np_ = namespace(valid_variance)
    valid = valid & np_.all(np_.broadcast_to(valid_variance, mean.shape), -1)
    variance = concrete(variance)
    variance = namespace(variance).broadcast_to(variance, mean.shape)
    return _rows(concrete(mean), variance, valid, dtype)


def with_covariance(mean: Any, covariance: Any, *, difference: bool = False) -> Rows:
    """Reads and checks logits with a full covariance.

    Args:
      difference: whether the covariance is a difference of nearly equal ones. Its eigenvalues may
        then be below 0, and count as 0.

    Raises:
      TypeError, ValueError: as `class_probabilities`.
    """
    (mean, covariance), dtype = as_real(mean=mean, covariance=covariance)
    valid = _check_means(known(mean))
    shape = (*mean.shape, mean.shape[-1])
    if covariance.shape[-2:] != shape[-2:] or not fits(covariance.shape, shape):
        raise ValueError(
            f"`covariance` must have shape (..., C, C) and broadcast to {shape} for a `mean` of "
            f"shape {mean.shape}, got {covariance.shape}. Pass variances alone as `variance`."
        )
    mean, covariance = concrete(mean), concrete(covariance)
    np_, present = namespace(mean, covariance), known(mean) > -np.inf
    covariance = np_.where(present[..., :, None] & present[..., None, :], covariance, 0)
    if difference:
        finite = known(covariance)
        valid = valid & namespace(finite).isfinite(finite).all((-1, -2))
    else:
        valid = valid & _check_covariance(known(covariance))
    return _rows(mean, np_.broadcast_to(covariance, shape), valid, dtype)


def _rows(mean: Any, spread: Any, valid: Any, dtype: Any) -> Rows:
    """Rows from checked means, `(..., C)`, and variances or covariances of the same batch."""
    batch, axes = mean.shape[:-1], spread.shape[mean.ndim - 1 :]
    mean, spread = mean.reshape(-1, mean.shape[-1]), spread.reshape(-1, *axes)
    if not isinstance(valid, Tracer):
        return Rows(batch, jnp.asarray(mean), jnp.asarray(spread), None, dtype)
    valid = jnp.broadcast_to(valid, batch).reshape(-1)
    spread = jnp.where(valid.reshape(-1, *(1,) * len(axes)), spread, 0)
    return Rows(batch, jnp.where(valid[:, None], mean, 0), spread, valid, dtype)


def _check_covariance(covariance: Any) -> Any:
    """Which covariances are valid, `(...)`; raises `ValueError` if they are concrete."""
    np_ = namespace(covariance)
    finite = check_entries("covariance", covariance, np_.isfinite(covariance), "finite")
    ok = np_.all(finite, (-1, -2))
    covariance = np_.where(ok[..., None, None], covariance, 0)
    slack = _ROUNDING * abs(covariance).max((-1, -2))
    asymmetry = abs(covariance - covariance.swapaxes(-1, -2))
    symmetric = asymmetry <= slack[..., None, None]
    check_entries("covariance", covariance, symmetric, "symmetric")
    least = np_.linalg.eigvalsh(covariance)[..., 0]
    positive = least >= -slack
    check_entries(
        "covariance", least, positive, "positive semi-definite, its least eigenvalue >= 0"
    )
    return ok & np_.all(symmetric, (-1, -2)) & positive


def _check_means(mean: Any) -> Any:
    """Which rows of means are valid, `(...)`; raises `ValueError` if they are concrete."""
    if mean.ndim == 0 or mean.shape[-1] == 0:
        raise ValueError(
            f"`mean` must have shape (..., C) with C >= 1 classes, got {mean.shape}. "
            "Pass the logits of a point as one row."
        )
    np_ = namespace(mean)
    allowed = ~np_.isnan(mean) & ~np_.isposinf(mean)
    check_entries("mean", mean, allowed, "finite, or -inf for a class that is excluded")
    largest = mean.max(-1)
    check_entries("mean", largest, largest > -np.inf, "finite for at least one class of each point")
    return allowed.all(-1) & (largest > -np.inf)
