"""Functions for networks of any library: Taylor softmax, its logarithm, and biases of ALiBi.

They are used as `jax.nn.softmax` is, at the end of a network in flax, haiku or equinox for example.
The layer for infinitely wide networks is `stax.TaylorSoftmax`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from taylor_softmax._attention.rows import alibi
from taylor_softmax._numerics.arguments import Validated, as_real, check_axes, fits
from taylor_softmax._numerics.surrogate import Surrogate, parse

__all__ = ["alibi", "log_taylor_softmax", "taylor_softmax"]


def taylor_softmax(
    z: Validated[ArrayLike],
    order: Validated[int | None] = None,
    axis: Validated[int | tuple[int, ...]] = -1,
    where: Validated[ArrayLike | None] = None,
) -> Float[Array, "*shape"]:
    """`y_i = f(z_i) / sum_j f(z_j)` with `f(z) = sum_{k <= order} z^k / k!`, or `f = exp`.

    The function is due to de Brebisson & Vincent 2016 (arXiv 1511.05042, eq. 5). Values and
    gradients are finite for `|z|` up to 1e37, at every order. A logit of `-inf` excludes its class,
    whatever the order. Arguments in float16 and bfloat16 are computed in float32. NaN or infinity
    in a row makes the row NaN.

    Other implementations sum powers of `z`. Here `f` is a product of positive quadratics. So
    nothing overflows, and float32 keeps its digits at order 32, where a sum of powers is negative
    from `z = -10.5` on. Odd orders are refused: their polynomials have negative values, and their
    sums can be 0.

    Args:
      z: logits, of any shape.
      order: even order of the Taylor polynomial, at most 32; None for softmax itself.
      axis: the axis to normalise over, or a tuple of axes.
      where: booleans that broadcast to the shape of `z`. Entries where it is False leave the sum
        and become 0.

    Returns:
      The softmax, of the shape and dtype of `z`. A row in which every class is excluded is 0.

    Raises:
      TypeError: `z` or `where` is not real, or `order` or `axis` is not an integer.
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

    Arguments and errors are those of `taylor_softmax`. Entries that are excluded become `-inf`.
    """
    surrogate, z, axis, present, dtype = _prepare(z, order, axis, where)
    log_f = surrogate.log_value(z)
    log_sum = jax.nn.logsumexp(log_f, axis=axis, keepdims=True, where=present)
    return jnp.where(present, log_f - jnp.where(present, log_sum, 0), -jnp.inf).astype(dtype)


def _prepare(
    z: Any, order: Any, axis: Any, where: Any
) -> tuple[Surrogate, Array, int | tuple[int, ...], Array, Any]:
    """Reads the arguments of `taylor_softmax`.

    Returns:
      The surrogate; the logits, 0 where they are excluded; the axes; which logits are present; and
      the dtype of the result.
    """
    surrogate, axis = parse(order), check_axes(axis)
    (z,), dtype = as_real(z=z)
    if any(not -z.ndim <= i < z.ndim for i in (axis if isinstance(axis, tuple) else (axis,))):
        raise ValueError(
            f"`axis={axis!r}` is out of range for `z` of shape {z.shape}. Axes count from 0, or "
            "from -1 backwards."
        )
    present = ~jnp.isneginf(z)
    if where is not None:
        (where,), _ = as_real(where=where)
        if not fits(where.shape, z.shape):
            raise ValueError(
                f"`where` must broadcast to the shape {z.shape} of `z`, got shape {where.shape}."
            )
        present = present & (where != 0)
    # Excluded logits are set to 0 before anything is computed, so that their gradient is 0, and not
    # that of an infinity.
    return surrogate, jnp.where(present, z, 0), axis, present, dtype
