"""What layers check of their arguments, and the precision they compute in."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# `(init_fn, apply_fn, kernel_fn)`.
Layer = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]


def check_batch_axis(batch_axis: Any) -> int:
    """`batch_axis` as an `int`.

    Raises:
      TypeError: it is no integer.
    """
    if isinstance(batch_axis, bool) or not hasattr(batch_axis, "__index__"):
        raise TypeError(f"`batch_axis` must be an integer, got {batch_axis!r}.")
    return operator.index(batch_axis)


def resolve_axis(axis: int | tuple[int, ...], batch_axis: int, ndim: int) -> tuple[int, ...]:
    """`axis` as a tuple of nonnegative integers for inputs with `ndim` axes.

    Raises:
      ValueError: an axis is out of range, is that of the batch, or comes twice.
    """
    axes = axis if isinstance(axis, tuple) else (axis,)
    for name, given in (("axis", axes), ("batch_axis", (batch_axis,))):
        if any(not -ndim <= value < ndim for value in given):
            shown = axis if name == "axis" else batch_axis
            raise ValueError(
                f"`{name}={shown!r}` is out of range for inputs with {ndim} axes. Choose from "
                f"{-ndim} to {ndim - 1}."
            )
    resolved = tuple(value % ndim for value in axes)
    if batch_axis % ndim in resolved:
        raise ValueError(
            f"`axis={axis!r}` is the batch axis of inputs with {ndim} axes. A softmax normalises "
            f"over the channel axis (`axis=-1`) of each input; pass `batch_axis` if yours is "
            f"another than {batch_axis}."
        )
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"`axis={axis!r}` names an axis twice.")
    return resolved


def in_single_at_least(kernel_fn: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel_fn` of a kernel or several, which computes float16 and bfloat16 in float32.

    The kernel that it returns is in the precision of what came.
    """

    @functools.wraps(kernel_fn)
    def computed(k: Any, **kwargs: Any) -> Any:
        kernels = k if isinstance(k, list | tuple) else [k]
        dtype = jnp.result_type(*(each.nngp for each in kernels))
        if jnp.finfo(dtype).bits >= 32:
            return kernel_fn(k, **kwargs)
        return _cast(kernel_fn(_cast(k, jnp.float32), **kwargs), dtype)

    return computed


def _cast(k: Any, dtype: Any) -> Any:
    # Leaves of a kernel are its flags, too.
    def each(x: Any) -> Any:
        is_real = isinstance(x, Array) and jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(dtype) if is_real else x

    return jax.tree.map(each, k)
