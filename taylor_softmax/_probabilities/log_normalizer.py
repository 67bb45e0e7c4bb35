"""`E[log sum_j exp z_j]` of independent Gaussian logits, and its derivatives.

Let `g_j` be independent standard Gumbel variables. The largest of `z_j + g_j` exceeds
`log sum_j exp z_j` by a standard Gumbel variable, and lies below `-s` with probability `w(s)`
(notation of `moments`). With Euler's constant `gamma`,

    E[log sum_j exp z_j] = -gamma - int s w m ds,

which is one more sum in the rule of the probabilities. The derivatives in the means are `p`. By the
heat equation, the derivatives in the variances are half of

    lambda_i = E[y_i (1 - y_i)] = int w a_i (m - a_i) ds,

which needs no second moments.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from taylor_softmax._numerics.arguments import known
from taylor_softmax._numerics.surrogate import Exponential, Surrogate
from taylor_softmax._probabilities.blocks import in_blocks
from taylor_softmax._probabilities.moments import integrand
from taylor_softmax._probabilities.rules import Logits, Rule


class LogNormalizer(NamedTuple):
    """The expected log-normaliser of `N` points, and its gradients.

    A column that stands for several classes has the sum of their gradients.

    Attributes:
      value: `E[log sum_j exp z_j]`, in nats, `(N,)`.
      mean: `p = E[y]`, the gradient of `value` in the means, `(N, C)`.
      curvature: `E[y (1 - y)]`, twice the gradient of `value` in the variances, `(N, C)`.
    """

    value: Array
    mean: Array
    curvature: Array


def log_normalizer(mean: Array, variance: Array) -> LogNormalizer:
    """`LogNormalizer` for logits of the given means and variances, both `(N, C)`.

    A mean of `-inf` excludes its class.
    """
    # The rules shift the logits so that the largest mean is 0.
    shifted: LogNormalizer = in_blocks(_by_rule, mean, variance, Exponential())
    return shifted._replace(value=shifted.value + known(mean).max(axis=1))


@jax.custom_jvp
def expected_log_normalizer(mean: Array, variance: Array) -> Array:
    """`E[log sum_j exp z_j]` of means and variances `(N, C)`, in nats, `(N,)`; differentiable."""
    return log_normalizer(mean, variance).value


@expected_log_normalizer.defjvp
def _expected_log_normalizer_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    value, p, curvature = log_normalizer(*primals)
    return value, jnp.sum(p * tangents[0] + curvature * tangents[1] / 2, axis=1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def of_equal_logits(variance: Array, n_classes: int) -> Array:
    """`E[log sum_j exp z_j]` of `n_classes` logits `N(0, variance)`, for each entry of `variance`.

    It costs as much as one class, however many there are.
    """
    return _of_equal_logits(variance, n_classes).value.reshape(variance.shape)


@of_equal_logits.defjvp
def _of_equal_logits_jvp(n_classes: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (variance,), (tangent,) = primals, tangents
    result = _of_equal_logits(variance, n_classes)
    value, slope = (x.reshape(variance.shape) for x in (result.value, result.curvature / 2))
    return value, slope * tangent


def _of_equal_logits(variance: Array, n_classes: int) -> LogNormalizer:
    column = variance.reshape(-1, 1)
    return in_blocks(_by_rule, jnp.zeros_like(column), column, Exponential(), n_classes)


def _by_rule(logits: Logits, rule: Rule, surrogate: Surrogate) -> LogNormalizer:
    """`LogNormalizer`, as `in_blocks` calls it; names as in the docstring of the module."""
    s, w, of_classes = integrand(logits, rule, surrogate, second=False)
    a = of_classes.mean
    m = jnp.sum(a, axis=2, keepdims=True)
    p = jnp.sum(w[..., None] * a, axis=0)
    total = jnp.sum(p, axis=1)
    p, w = p / total[:, None], w / total
    # A column of several classes has the sum of their equal `a`.
    a_of_one_class = a / jnp.maximum(logits.multiplicity, 1)
    curvature = jnp.sum(w[..., None] * a * (m - a_of_one_class), axis=0)
    value = -np.euler_gamma - jnp.sum(w * m[..., 0] * s, axis=0)
    return LogNormalizer(value, p, curvature)
