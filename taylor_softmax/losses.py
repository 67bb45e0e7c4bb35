"""Losses for training in function space, `nt.predict.gradient_descent`."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, nn

from taylor_softmax._numerics.arguments import Validated
from taylor_softmax._numerics.surrogate import Surrogate, parse


def cross_entropy(
    order: Validated[int | None] = None, *, probabilities: Validated[bool] = False
) -> Callable[[Array, Array], Any]:
    """The cross-entropy `-sum_i y_i log p_i`, averaged over all axes but the last.

    For `nt.predict.gradient_descent(loss, k_train_train, y_train, trace_axes=())` with the kernel
    `nt.empirical_ntk_fn(apply_fn, trace_axes=())` of a network that ends

    - in logits: `p` is their softmax, or their Taylor softmax (de Brebisson & Vincent 2016, arXiv
      1511.05042, eq. 5) if `order` is given. Computed from `log f(z_i) - log sum_j f(z_j)`: finite,
      as is its gradient, for logits of any size up to 1e37. A logit of `-inf` excludes its class:
      infinite where that is the target, and as if it were not there otherwise.
    - in `stax.Softmax` or `stax.TaylorSoftmax`: pass `probabilities=True`; `p` is the output. A
      linearised network can leave the simplex. Below `eps`, the rounding error of 1, the logarithm
      goes on along its tangent: the loss stays convex and differentiable, and drives outputs back.

    Args:
      order: even order of the Taylor softmax that is applied to logits, or `None` for softmax.
      probabilities: whether the network's outputs are probabilities already.

    Returns:
      `loss(fx, y)` for outputs and targets of the same shape `(..., C)`, the targets one-hot or
      probabilities; a scalar, in nats.

    Raises:
      TypeError: `order` is not an integer.
      ValueError: `order` is odd or below 2, or given although outputs are probabilities.
    """
    surrogate = parse(order)
    if probabilities and order is not None:
        raise ValueError(
            f"`order` must be None with `probabilities=True`, got {order}: the network has applied "
            "its softmax already."
        )
    log_probabilities = _log_of_probabilities if probabilities else _log_softmax(surrogate)

    def loss(fx: Array, y: Array) -> Array:
        if jnp.shape(fx) != jnp.shape(y):
            raise ValueError(
                f"`y` must have the shape of `fx`, {jnp.shape(fx)}, got {jnp.shape(y)}. Pass "
                "one-hot targets, such as `jax.nn.one_hot(labels, n_classes)`."
            )
        log_p = log_probabilities(fx)
        # Where the target is 0 the term is, also of a class that can't be: 0 times -inf is not.
        terms = y * jnp.where((y == 0) & jnp.isneginf(log_p), 0, log_p)
        return -jnp.mean(jnp.sum(terms, axis=-1))

    return loss


def _log_softmax(surrogate: Surrogate) -> Callable[[Array], Array]:
    def log_softmax(fx: Array) -> Array:
        # `-inf` excludes a class; a Taylor polynomial of it would be infinite.
        excluded = jnp.isneginf(fx)
        log_f = surrogate.log_value(jnp.where(excluded, 0, fx))
        return nn.log_softmax(jnp.where(excluded, -jnp.inf, log_f))

    return log_softmax


def _log_of_probabilities(fx: Array) -> Array:
    eps = jnp.finfo(fx.dtype).eps
    inside = jnp.maximum(fx, eps)
    return jnp.log(inside) + (fx - inside) / eps
