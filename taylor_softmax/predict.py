"""Class probabilities: of Gaussian logits, and of the posterior given labels."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from taylor_softmax._numerics.arguments import Validated
from taylor_softmax._numerics.surrogate import parse
from taylor_softmax._probabilities import log_normalizer
from taylor_softmax._probabilities import moments as class_moments
from taylor_softmax._probabilities.posterior import (
    CategoricalPosterior,
    ClassPosterior,
    LogitPosterior,
    categorical_inference,
    categorical_log_evidence,
)

__all__ = [
    "CategoricalPosterior",
    "ClassPosterior",
    "LogitPosterior",
    "categorical_inference",
    "categorical_log_evidence",
    "class_posterior",
    "class_probabilities",
    "class_probability_covariance",
    "expected_log_normalizer",
]


def class_probabilities(
    mean: Validated[ArrayLike],
    variance: Validated[ArrayLike],
    *,
    order: Validated[int | None] = None,
) -> Float[Array, "*batch classes"]:
    """`E[f(z_i) / sum_j f(z_j)]` for independent Gaussian logits `z_j ~ N(mean_j, variance_j)`.

    With `phi_j(t) = E[exp(-t f(z_j))]` and `1 / D = int_0^inf exp(-t D) dt`,

        E[y_i] = int_0^inf -phi_i'(t) prod_{j != i} phi_j(t) dt,

    without approximation other than quadrature: see the docstring of the module
    `taylor_softmax._probabilities.moments`. It is the probability of each class where the logits
    have a Gaussian posterior, which others approximate by the softmax of scaled means or by
    samples.

    Largest error for up to 1,000 classes and variances up to 1e4, as tested: 1e-6 in float64, 1e-5
    in float32. Values stay finite beyond. Probabilities are divided by their sum, which differs
    from 1 by about the error: that they sum to 1 says nothing about it.

    Differentiable in both arguments, to any order, at variance 0 too. Computed in blocks of points,
    each by the cheapest rule that is fine enough for it. Give many points as leading axes: under
    `vmap` every point is computed by all of the rules.

    Args:
      mean: means of the logits, shape `(..., C)`; `-inf` excludes a class, whose probability is 0.
      variance: their variances, nonnegative, in units of a logit squared; broadcast to the shape of
        `mean` by NumPy's rules, so that one variance per point has shape `(..., 1)`, one per class
        `(C,)`, and one for everything `()`.
      order: even order of the Taylor polynomial `f`, or `None` for `f = exp`, softmax itself.

    Returns:
      Probabilities, shape `(..., C)`; nonnegative, with sum 1.

    Raises:
      TypeError: `order` is not an integer, or the arguments are not real.
      ValueError: `order` is odd or below 2, `mean` has no axis of classes, or `variance` does not
        broadcast to the shape of `mean`.
    """
    return _moments(mean, variance, order, covariance=False).mean


def class_probability_covariance(
    mean: Validated[ArrayLike],
    variance: Validated[ArrayLike],
    *,
    order: Validated[int | None] = None,
) -> Float[Array, "*batch classes classes"]:
    """`Cov[y_i, y_j]` of `y = f(z) / sum_j f(z_j)` for independent Gaussian logits.

    From `E[y_i y_j] = int_0^inf t phi_i' phi_j' prod_{k != i, j} phi_k dt` (for `i = j`:
    `t phi_i'' prod_{k != i} phi_k`), in a form in which nothing cancels: see the docstring of the
    module `taylor_softmax._probabilities.moments`. Symmetric; positive semi-definite and with rows
    that sum to 0 up to rounding. As accurate as `class_probabilities`, whose
    arguments and errors it has.

    Returns:
      Covariances, shape `(..., C, C)`. They are of the probabilities; that of the one-hot label is
      `diag(p) - p p^T` with `p` the `class_probabilities`.
    """
    return _covariance(_moments(mean, variance, order, covariance=True))


def expected_log_normalizer(
    mean: Validated[ArrayLike], variance: Validated[ArrayLike]
) -> Float[Array, "*batch"]:
    """`E[log sum_j exp z_j]` for independent Gaussian logits `z_j ~ N(mean_j, variance_j)`.

    With it the expected log-likelihood of a label is `mean_y - E[log sum_j exp z_j]`, as
    variational inference needs it. One integral, that of `class_probabilities`: see the docstring
    of the module `taylor_softmax._probabilities.log_normalizer`.

    Largest error for up to 1,000 classes and variances up to 1e4, over the larger of 1 and the
    value: 1e-6 in float64, 1e-5 in float32.

    Differentiable to any order. The gradient in the means is `class_probabilities(mean, variance)`
    and that in the variances `E[y (1 - y)] / 2`; both come at the cost of the value.

    Args:
      mean: means of the logits, shape `(..., C)`; `-inf` excludes a class.
      variance: their variances, nonnegative; broadcast to the shape of `mean`.

    Returns:
      Expectations in nats, shape `(...)`.

    Raises:
      TypeError: the arguments are not real.
      ValueError: `mean` has no axis of classes, or `variance` does not broadcast to its shape.
    """
    batch, mean, variance = _rows(mean, variance)
    return log_normalizer.expected_log_normalizer(mean, variance).reshape(batch)


def class_posterior(gaussian: Any, *, order: Validated[int | None] = None) -> ClassPosterior:
    """Class probabilities of a posterior over logits as neural-tangents returns it.

    For a network without its last softmax, whose outputs are independent over classes:

        predict_fn = nt.predict.gradient_descent_mse_ensemble(kernel_fn, x_train, y_train)
        posterior = class_posterior(predict_fn(x_test=x_test, get="ntk", compute_cov=True))

    Args:
      gaussian: what a function of `nt.predict.gradient_descent_mse_ensemble` or `gp_inference`
        returns for one kernel with the covariance asked for: `mean` of shape `(..., N, C)` for `N`
        points (leading axes are times), `covariance` of shape `(..., N, N)`, over points and the
        same for every class. Only its diagonal is used.
      order: even order of the Taylor polynomial `f`, or `None` for softmax itself.

    Returns:
      `(probabilities, covariance)`, of shapes `(..., N, C)` and `(..., N, C, C)`.

    Raises:
      TypeError: `gaussian` has no `mean` and `covariance`, or `order` is not an integer.
      ValueError: their shapes are not those above, or `order` is odd or below 2.
    """
    if not (hasattr(gaussian, "mean") and hasattr(gaussian, "covariance")):
        kinds = [kind for kind in ("nngp", "ntk") if hasattr(gaussian, kind)]
        hint = (
            f" It holds one result per kernel: pass `gaussian.{kinds[0]}`."
            if kinds
            else " Ask the predict function for it with `compute_cov=True` or `k_test_test`."
        )
        raise TypeError(
            "`gaussian` must have `mean` and `covariance`, got "
            f"{type(gaussian).__name__} without them.{hint}"
        )
    mean, covariance = jnp.asarray(gaussian.mean), jnp.asarray(gaussian.covariance)
    if mean.ndim < 2 or covariance.shape != (*mean.shape[:-1], mean.shape[-2]):
        raise ValueError(
            "`gaussian` must have a mean of shape (..., N, C) and a covariance of shape "
            f"(..., N, N), got {mean.shape} and {covariance.shape}. Classes of kernels with "
            "`trace_axes=()` are not independent: pass their marginal means and variances to "
            "`class_probabilities`, which takes them as if they were."
        )
    # At training points the variance is a difference of nearly equal numbers: -1e-16 stands for 0.
    variance = jnp.maximum(jnp.diagonal(covariance, axis1=-2, axis2=-1), 0)
    moments = _moments(mean, variance[..., None], order, covariance=True)
    return ClassPosterior(moments.mean, _covariance(moments))


def _moments(
    mean: Validated[ArrayLike],
    variance: Validated[ArrayLike],
    order: Validated[int | None],
    *,
    covariance: bool,
) -> class_moments.Moments:
    surrogate = parse(order)
    batch, mean, variance = _rows(mean, variance)
    moments = class_moments.moments(mean, variance, surrogate, covariance)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), moments)


def _rows(
    mean: Validated[ArrayLike], variance: Validated[ArrayLike]
) -> tuple[tuple[int, ...], Array, Array]:
    """The shape of the batch, means and variances `(N, C)`, or what is wrong with them."""
    mean, variance = jnp.asarray(mean), jnp.asarray(variance)
    for name, array in (("mean", mean), ("variance", variance)):
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise TypeError(f"`{name}` must be real, got {array.dtype}. Pass its real part.")
    if mean.ndim == 0 or mean.shape[-1] == 0:
        raise ValueError(
            f"`mean` must have shape (..., C) with C >= 1 classes, got {mean.shape}. "
            "Pass the logits of a point as one row."
        )
    try:
        fits = jnp.broadcast_shapes(mean.shape, variance.shape) == mean.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"`variance` must broadcast to the shape {mean.shape} of `mean`, got {variance.shape}. "
            "Give one variance per point the shape (..., 1): `variance[..., None]`."
        )
    batch = mean.shape[:-1]
    dtype = jnp.result_type(float, mean, variance)
    variance = jnp.broadcast_to(variance, mean.shape)
    mean, variance = (x.astype(dtype).reshape(-1, mean.shape[-1]) for x in (mean, variance))
    return batch, mean, variance


def _covariance(moments: class_moments.Moments) -> Array:
    assert moments.covariance is not None
    return moments.covariance
