"""Losses for training in function space, `nt.predict.gradient_descent`."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from taylor_softmax._numerics.arguments import Validated, as_real, check_boolean
from taylor_softmax._numerics.precision import log_tiny
from taylor_softmax._numerics.surrogate import Surrogate, parse
from taylor_softmax.nn import log_taylor_softmax

__all__ = ["cross_entropy"]


def cross_entropy(
    order: Validated[int | None] = None,
    *,
    probabilities: Validated[bool] = False,
    margin: Validated[float] = 0.0,
) -> Callable[[Array, Array], Any]:
    """The cross-entropy `-sum_i y_i log p_i`, averaged over all axes but the last.

    Use it with `nt.predict.gradient_descent(loss, k_train_train, y_train, trace_axes=())` and the
    kernel `nt.empirical_ntk_fn(apply_fn, trace_axes=())` of a network.

    - The network ends in logits. Then `p` is their softmax, or their Taylor softmax if `order` is
      given (de Brebisson & Vincent 2016, arXiv 1511.05042, eq. 5). The loss is computed from
      `log f(z_i) - log sum_j f(z_j)`. It and its gradient are finite for logits of any size up to
      1e37. A logit of `-inf` excludes its class: the loss is infinite where that class is the
      target, and does not see the class otherwise.
    - The network ends in `stax.Softmax` or `stax.TaylorSoftmax`. Pass `probabilities=True`. Then
      `p` is the output. A linearised network can leave the simplex. Below `eps`, the rounding error
      of 1, the logarithm is replaced by its tangent. The loss stays convex and differentiable, and
      drives outputs back.

    A `margin` `m > 0` makes it the soft-margin softmax (Liang et al. 2017), or with an `order` the
    SM-Taylor softmax (Banerjee et al. 2020, arXiv 2011.11538). The logit of each target must exceed
    the others by `m` for the same loss:

        p_i = f(z_i - m) / (f(z_i - m) + sum_{j != i} f(z_j)).

    Args:
      order: even order of the Taylor softmax that is applied to logits, or `None` for softmax.
      probabilities: whether the network's outputs are probabilities already.
      margin: `m`, in units of a logit; nonnegative and finite.

    Returns:
      `loss(fx, y)`, a scalar in nats, of outputs and targets of the same shape `(..., C)`. The
      targets are one-hot, or probabilities.

    Raises:
      TypeError: `order` is not an integer, `probabilities` no boolean, or `margin` no number.
      ValueError: `order` is odd or below 2, `margin` is negative or not finite, or one of them is
        given although the outputs are probabilities.
    """
    log_probabilities = _log_probabilities(parse(order), probabilities, margin)

    def loss(fx: Validated[Array], y: Validated[Array]) -> Array:
        (fx, y), dtype = as_real(fx=fx, y=y)
        if jnp.shape(fx) != jnp.shape(y):
            raise ValueError(
                f"`y` must have the shape of `fx`, {jnp.shape(fx)}, got {jnp.shape(y)}. Pass "
                "one-hot targets, such as `jax.nn.one_hot(labels, n_classes)`."
            )
        log_p = log_probabilities(fx)
        # Where the target is 0 the term is, also of a class that can't be: 0 times -inf is not.
        terms = y * jnp.where((y == 0) & jnp.isneginf(log_p), 0, log_p)
        return -jnp.mean(jnp.sum(terms, axis=-1)).astype(dtype)

    return loss


def _log_probabilities(
    surrogate: Surrogate, probabilities: Any, margin: Any
) -> Callable[[Array], Array]:
    """What takes outputs to `log p`, or what is wrong with the arguments of the loss."""
    probabilities = check_boolean("probabilities", probabilities)
    if isinstance(margin, bool) or not isinstance(margin, int | float):
        raise TypeError(f"`margin` must be a number, got {margin!r}.")
    if not 0 <= margin < math.inf:
        raise ValueError(f"`margin` must be nonnegative and finite, got {margin}.")
    if not probabilities:
        if margin:
            return functools.partial(_log_soft_margin, surrogate=surrogate, margin=margin)
        return functools.partial(log_taylor_softmax, order=surrogate.order)
    for name, value in (("order", surrogate.order), ("margin", margin)):
        if value:
            raise ValueError(
                f"`{name}` applies to logits, got {value} with `probabilities=True`: the network "
                "has applied its softmax already."
            )
    return _log_of_probabilities


def _log_soft_margin(fx: Array, *, surrogate: Surrogate, margin: float) -> Array:
    present = ~jnp.isneginf(fx)
    z = jnp.where(present, fx, 0)
    log_f = jnp.where(present, surrogate.log_value(z), -jnp.inf)
    total = jax.nn.logsumexp(log_f, axis=-1, keepdims=True)
    largest = jax.nn.one_hot(jnp.argmax(log_f, -1), fx.shape[-1], dtype=bool)
    # The sum without the largest, which the total would cancel; of a class alone, nearly nothing.
    rest = jnp.where(largest, total + log_tiny(fx.dtype), log_f)
    rest = jax.nn.logsumexp(rest, axis=-1, keepdims=True)
    # Any other is at most half of the total.
    share = jnp.exp(jnp.where(largest, -1.0, log_f - total))
    others = jnp.where(largest, rest, total + jnp.log1p(-share))
    own = surrogate.log_value(z - margin)
    return jnp.where(present, own - jnp.logaddexp(own, others), -jnp.inf)


def _log_of_probabilities(fx: Array) -> Array:
    eps = jnp.finfo(fx.dtype).eps
    inside = jnp.maximum(fx, eps)
    return jnp.log(inside) + (fx - inside) / eps
