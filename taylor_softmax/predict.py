"""Class probabilities of Gaussian logits, and of the posterior that labels give them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from taylor_softmax._numerics.arguments import Validated
from taylor_softmax._numerics.surrogate import Surrogate, parse
from taylor_softmax._probabilities import correlated, log_normalizer, rows
from taylor_softmax._probabilities import moments as class_moments
from taylor_softmax._probabilities.arguments import InducingKernels
from taylor_softmax._probabilities.posterior import (
    CategoricalPosterior,
    ClassPosterior,
    LogitPosterior,
    categorical_inference,
    categorical_log_evidence,
    choose_inducing,
)
from taylor_softmax.methods import Method, QuasiMonteCarlo, choose

__all__ = [
    "CategoricalPosterior",
    "ClassPosterior",
    "InducingKernels",
    "LogitPosterior",
    "categorical_inference",
    "categorical_log_evidence",
    "choose_inducing",
    "class_posterior",
    "class_probabilities",
    "class_probability_covariance",
    "expected_log_normalizer",
]

# Numbers of quasi-random points, not counting their negatives, for logits with a full covariance.
# For 30 classes that all covary, 1 << 14 points leave an error of 1e-4 at variance 1, all that is
# promised (measured). So more than `_MANY` classes take twice as many.
_POINTS, _POINTS_FOR_MANY = 1 << 14, 1 << 15
_MANY = 10


def class_probabilities(
    mean: Validated[ArrayLike],
    variance: Validated[ArrayLike | None] = None,
    *,
    covariance: Validated[ArrayLike | None] = None,
    order: Validated[int | None] = None,
    method: Validated[Method | None] = None,
) -> Float[Array, "*batch classes"]:
    """`E[f(z_i) / sum_j f(z_j)]` for Gaussian logits, independent or with a full covariance.

    It is the probability of each class where the logits have a Gaussian posterior. Other methods
    approximate it by the softmax of scaled means, or by samples. For independent logits,
    `z_j ~ N(mean_j, variance_j)`, it is one integral. With `phi_j(t) = E[exp(-t f(z_j))]` and
    `1 / D = int_0^inf exp(-t D) dt`,

        E[y_i] = int_0^inf -phi_i'(t) prod_{j != i} phi_j(t) dt.

    Quadrature is the only approximation: see the docstring of the module
    `taylor_softmax._probabilities.moments`.

    The largest error for up to 1,000 classes and variances up to 1e4, as tested, is 1e-6 in float64
    and 1e-5 in float32. Values stay finite beyond. Probabilities are divided by their sum, which
    differs from 1 by about the error. So their sum, which is 1, says nothing about the error.

    With `covariance=` in place of `variance`, `z ~ N(mean, covariance)`. The result is that of the
    nearest independent logits, plus a mean over quasi-random points of what differs from it (module
    `taylor_softmax._probabilities.correlated`). The points are the same at every call. The result
    is exact for two classes, and where covariances are diagonal up to a shift common to all
    classes: equicorrelated ones, for example. Otherwise the largest error, as tested for up to 30
    classes, is 1e-4 at variance 1, 1e-3 at 10 and 4e-3 at 100; it falls about as `1 / n_points`.

    The function is differentiable in all arguments; for independent logits to any order, and at
    variance 0 too. The derivative in a `covariance` is NaN if the covariance is singular, that is,
    if a standard deviation along one of its axes is below 1e-3 of the largest. For softmax these
    are the axes of differences between classes.

    Points are computed in blocks, each by the cheapest rule that is fine enough for it. Give many
    points as leading axes: under `vmap` every point is computed by all of the rules.

    Args:
      mean: means of the logits, shape `(..., C)`; `-inf` excludes a class, whose probability is 0.
      variance: variances of the logits, nonnegative, in units of a logit squared. They broadcast to
        the shape of `mean` by NumPy's rules: one variance per point has shape `(..., 1)`, one per
        class `(C,)`, and one for all logits `()`.
      covariance: covariances of the logits of each point, `(..., C, C)`, symmetric and positive
        semi-definite. Leading axes broadcast to those of `mean`.
      order: even order of the Taylor polynomial `f`, or None for `f = exp`, softmax itself.
      method: `methods.QuasiMonteCarlo(n_points)`, with `covariance` only. None takes 16,384 points,
        and 32,768 for more than 10 classes.

    Returns:
      Probabilities, shape `(..., C)`; nonnegative, with sum 1. Arguments in float16 and bfloat16
      are computed in float32, and have results of their own dtype. If arrays are traced, as under
      `jit`, a point with a variance that is negative or not finite, or with a mean of NaN or
      infinity, has probabilities of NaN.

    Raises:
      TypeError: `order` is not an integer, an array is not real, or `method` is not an object of
        `taylor_softmax.methods`.
      ValueError: `order` is odd or below 2; `mean` has no axis of classes; `variance` or
        `covariance` does not broadcast to its shape; both or neither of them are given; `method`
        does not apply; or a variance, covariance or mean is not as above.
      NotImplementedError: `order` is beyond 32.
    """
    return _moments(mean, variance, covariance, order, method, second=False).mean


def class_probability_covariance(
    mean: Validated[ArrayLike],
    variance: Validated[ArrayLike | None] = None,
    *,
    covariance: Validated[ArrayLike | None] = None,
    order: Validated[int | None] = None,
    method: Validated[Method | None] = None,
) -> Float[Array, "*batch classes classes"]:
    """`Cov[y_i, y_j]` of `y = f(z) / sum_j f(z_j)` for Gaussian logits.

    For independent logits it follows from
    `E[y_i y_j] = int_0^inf t phi_i' phi_j' prod_{k != i, j} phi_k dt` (for `i = j`:
    `t phi_i'' prod_{k != i} phi_k`). The form that is computed has no cancellation: see the
    docstring of the module `taylor_softmax._probabilities.moments`.

    The function has the arguments, errors and accuracy of `class_probabilities`. The result is
    symmetric, positive semi-definite, and has rows that sum to 0, up to rounding. With a full
    `covariance` of the logits it is positive semi-definite up to its error.

    Returns:
      Covariances of the probabilities, shape `(..., C, C)`. The covariance of the one-hot label is
      another: `diag(p) - p p^T`, where `p` are the `class_probabilities`.
    """
    return _covariance(_moments(mean, variance, covariance, order, method, second=True))


def expected_log_normalizer(
    mean: Validated[ArrayLike], variance: Validated[ArrayLike]
) -> Float[Array, "*batch"]:
    """`E[log sum_j exp z_j]` for independent Gaussian logits `z_j ~ N(mean_j, variance_j)`.

    Variational inference needs it: the expected log-likelihood of a label is
    `mean_y - E[log sum_j exp z_j]`. It is one integral, that of `class_probabilities`: see the
    docstring of the module `taylor_softmax._probabilities.log_normalizer`.

    The largest error for up to 1,000 classes and variances up to 1e4 is 1e-6 in float64 and 1e-5 in
    float32, relative to the larger of 1 and the value.

    The function is differentiable to any order. The gradient in the means is
    `class_probabilities(mean, variance)`, and that in the variances `E[y (1 - y)] / 2`. Both come
    at the cost of the value.

    Args:
      mean: means of the logits, shape `(..., C)`; `-inf` excludes a class.
      variance: variances of the logits, nonnegative; they broadcast to the shape of `mean`.

    Returns:
      Expectations in nats, shape `(...)`.

    Raises:
      TypeError: the arguments are not real.
      ValueError: `mean` has no axis of classes, `variance` does not broadcast to its shape, or a
        number is not as above.
    """
    logits = rows.independent(mean, variance)
    value = log_normalizer.expected_log_normalizer(logits.mean, logits.spread)
    return rows.restore(value, logits)


def class_posterior(gaussian: Any, *, order: Validated[int | None] = None) -> ClassPosterior:
    """Class probabilities of a posterior over logits as neural-tangents returns it.

    It must be the posterior of a network without its last softmax: make `kernel_fn` of the layers
    up to `Dense(n_classes)`. Predictions from the kernel behind the softmax are not logits, and
    this function cannot tell the difference.

        predict_fn = nt.predict.gradient_descent_mse_ensemble(kernel_fn, x_train, y_train)
        posterior = class_posterior(predict_fn(x_test=x_test, get="ntk", compute_cov=True))

    Args:
      gaussian: what a function of `nt.predict.gradient_descent_mse_ensemble` or `gp_inference`
        returns for one kernel, with the covariance asked for. `mean` has shape `(..., N, C)` for
        `N` points; leading axes are times. `covariance` has shape `(..., N, N)` if it is the same
        for every class, or `(..., N, N, C, C)` for kernels with `trace_axes=()`, whose classes
        covary. Only the covariance of each point with itself is used.
      order: even order of the Taylor polynomial `f`, or None for softmax itself.

    Returns:
      `ClassPosterior(probabilities, covariance)`, of shapes `(..., N, C)` and `(..., N, C, C)`.

    Raises:
      TypeError: `gaussian` has no `mean` and `covariance`, or `order` is not an integer.
      ValueError: their shapes are not those above, or `order` is odd or below 2.
    """
    if not (hasattr(gaussian, "mean") and hasattr(gaussian, "covariance")):
        kinds = [kind for kind in ("nngp", "ntk") if hasattr(gaussian, kind)]
        if hasattr(gaussian, "is_gaussian"):
            hint = " It is a kernel: pass what a predict function returns for it."
        elif kinds:
            hint = f" It holds one result per kernel: pass `gaussian.{kinds[0]}`."
        else:
            hint = " Ask the predict function for it with `compute_cov=True` or `k_test_test`."
        raise TypeError(
            "`gaussian` must have `mean` and `covariance`, got "
            f"{type(gaussian).__name__} without them.{hint}"
        )
    mean, covariance = jnp.asarray(gaussian.mean), jnp.asarray(gaussian.covariance)
    points = (*mean.shape[:-1], *mean.shape[-2:-1])
    if mean.ndim >= 2 and covariance.shape == points:
        # At training points it is a difference of nearly equal numbers, and may be -1e-16.
        variance = jnp.maximum(jnp.diagonal(covariance, axis1=-2, axis2=-1), 0)
        moments = _moments(mean, variance[..., None], None, order, None, second=True)
    elif mean.ndim >= 2 and covariance.shape == (*points, *mean.shape[-1:] * 2):
        covariance = jnp.moveaxis(jnp.diagonal(covariance, axis1=-4, axis2=-3), -1, -3)
        logits = rows.with_covariance(mean, covariance, difference=True)
        moments = _correlated(logits, parse(order), None, second=True)
    else:
        raise ValueError(
            "`gaussian` must have a mean of shape (..., N, C) and a covariance of shape "
            "(..., N, N), or with `trace_axes=()` (..., N, N, C, C), got "
            f"{mean.shape} and {covariance.shape}. Pass the result of a predict function unchanged."
        )
    return ClassPosterior(moments.mean, _covariance(moments))


def _moments(
    mean: Any, variance: Any, covariance: Any, order: Any, method: Any, *, second: bool
) -> class_moments.Moments:
    """Moments for the arguments of `class_probabilities`.

    Args:
      second: whether to compute the covariance of the probabilities.
    """
    surrogate = parse(order)
    if (variance is None) == (covariance is None):
        given = "neither" if variance is None else "both"
        raise ValueError(
            f"Pass either `variance`, of independent logits, or `covariance`, got {given} of them."
        )
    if covariance is None:
        if method is not None:
            raise ValueError(
                f"`method={method}` applies to logits with a `covariance`. Pass None: independent "
                "logits have an exact rule."
            )
        logits = rows.independent(mean, variance)
        moments = class_moments.moments(logits.mean, logits.spread, surrogate, second)
        return jax.tree.map(lambda x: rows.restore(x, logits), moments)
    return _correlated(rows.with_covariance(mean, covariance), surrogate, method, second=second)


def _correlated(
    logits: rows.Rows, surrogate: Surrogate, method: Any, *, second: bool
) -> class_moments.Moments:
    """Moments for logits with a full covariance."""
    default = _POINTS if logits.mean.shape[-1] <= _MANY else _POINTS_FOR_MANY
    points = choose(method, QuasiMonteCarlo(default), axis="logits with a `covariance`")
    assert isinstance(points, QuasiMonteCarlo)
    if points.error is not None:
        raise ValueError(
            f"`method={points}` with an `error` applies to positions and attention. Pass "
            "`n_points` and `seed` alone."
        )
    assert points.n_points is not None
    moments = correlated.moments(
        logits.mean, logits.spread, surrogate, second, points.n_points, points.seed
    )
    return jax.tree.map(lambda x: rows.restore(x, logits), moments)


def _covariance(moments: class_moments.Moments) -> Array:
    assert moments.covariance is not None
    return moments.covariance
