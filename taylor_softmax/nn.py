"""Taylor softmax as functions, as `jax.nn.softmax` and `log_softmax` are, for all networks; ALiBi.

In flax, haiku or equinox they are the last line of a network; `stax.TaylorSoftmax` is the layer.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from taylor_softmax._numerics.arguments import Validated, as_real, check_axes, fits
from taylor_softmax._numerics.surrogate import Surrogate, parse
from taylor_softmax._position_axis.attention_rows import alibi

__all__ = ["alibi", "log_taylor_softmax", "taylor_softmax"]


def taylor_softmax(
    z: Validated[ArrayLike],
    order: Validated[int | None] = None,
    axis: Validated[int | tuple[int, ...]] = -1,
    where: Validated[ArrayLike | None] = None,
) -> Float[Array, "*shape"]:
    """`y_i = f(z_i) / sum_j f(z_j)` with `f(z) = sum_{k <= order} z^k / k!`, or `f = exp`.

    Of de Brebisson & Vincent 2016 (arXiv 1511.05042, eq. 5). Values and gradients are finite for
    `|z|` up to 1e37, at every order. A logit of `-inf` excludes its class, whatever the order.
    float16 and bfloat16 are computed in float32. NaN and infinity make a row NaN.

    Differs from other implementations, which sum powers: those of odd order can be negative, or
    divide by 0, and are refused; `f` is a product of positive quadratics, so that float32 keeps its
    digits at order 32, where the sum turns negative at `z = -10.5`, and nothing overflows.

    Args:
      z: logits.
      order: even order of the Taylor polynomial, at most 32; None for softmax itself.
      axis: to normalise over, one or several.
      where: boolean, broadcasts with `z`: entries where it is False leave the sum and are 0.

    Returns:
      Of the shape of `z`; where nothing is left of a row, zeros.

    Raises:
      TypeError: `z` is not real, `order` or `axis` not an integer, or `where` not boolean.
      ValueError: `order` is odd or below 2, `axis` is out of range, or `where` does not broadcast.
      NotImplementedError: `order` is beyond 32.
    """
    surrogate, z, axis, present, dtype = _prepare(z, order, axis, where)
    return surrogate.softmax(z, axis=axis, where=present).astype(dtype)


def log_taylor_softmax(
    z: Validated[ArrayLike],
    order: Validated[int | None] = None,
    axis: Validated[int | tuple[int, ...]] = -1,
    where: Validated[ArrayLike | None] = None,
) -> Float[Array, "*shape"]:
    """`log f(z_i) - log sum_j f(z_j)`, the logarithm of `taylor_softmax` without its underflow.

    Arguments and errors are those of `taylor_softmax`; what `where` excludes is `-inf`.
    """
    surrogate, z, axis, present, dtype = _prepare(z, order, axis, where)
    log_f = surrogate.log_value(z)
    log_sum = jax.nn.logsumexp(log_f, axis=axis, keepdims=True, where=present)
    return jnp.where(present, log_f - jnp.where(present, log_sum, 0), -jnp.inf).astype(dtype)


def _prepare(
    z: Any, order: Any, axis: Any, where: Any
) -> tuple[Surrogate, Array, int | tuple[int, ...], Array, Any]:
    """The surrogate, finite logits, axes, which logits there are, and the dtype of the result."""
    surrogate, axis = parse(order), check_axes(axis)
    (z,), dtype = as_real(z=z)
    if any(not -z.ndim <= i < z.ndim for i in (axis if isinstance(axis, tuple) else (axis,))):
        raise ValueError(f"`axis={axis!r}` is out of range for `z` of shape {z.shape}.")
    present = ~jnp.isneginf(z)
    if where is not None:
        (where,), _ = as_real(where=where)
        if not fits(where.shape, z.shape):
            raise ValueError(
                f"`where` must broadcast to the shape {z.shape} of `z`, got {where.shape}."
            )
        present = present & (where != 0)
    # Before anything is computed: what is excluded has gradient 0, not that of an infinity.
    return surrogate, jnp.where(present, z, 0), axis, present, dtype
