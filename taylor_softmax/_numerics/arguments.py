"""Checks of arguments that several modules take."""

import operator
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

if TYPE_CHECKING:
    T = TypeVar("T")
    Validated = Annotated[T, "validated"]
else:

    class Validated:
        """A public argument that the library validates itself, with errors of its own.

        The check of annotations at run time, which the test suite switches on, leaves it alone.
        """

        def __class_getitem__(cls, hint: Any) -> Any:
            return Any


def check_integer(name: str, value: Any, *, least: int, hint: str = "") -> int:
    """Returns `value`, the argument `name`, as an `int`, or says what is wrong with it.

    Raises:
      TypeError: it is not an integer (booleans are not).
      ValueError: it is less than `least`.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.{hint}")
    if (integer := operator.index(value)) < least:
        raise ValueError(f"`{name}` must be at least {least}, got {integer}.{hint}")
    return integer


def check_n_classes(n_classes: Any) -> int:
    """Returns `n_classes` as an `int`, or says what is wrong with it."""
    hint = " It sets the shape of the result, so under `jit` it must be static."
    return check_integer("n_classes", n_classes, least=1, hint=hint)


def as_real(**arguments: Any) -> tuple[list[Array], Any]:
    """Public array arguments, given by name, in the dtype to compute in, and that of the result.

    Integers, booleans and (nested) lists of them are taken. float16 and bfloat16 are computed in
    float32, whose rounding their own hides, and results come back as the arguments came.

    Raises:
      TypeError: an argument is complex, or no array of numbers.
    """
    arrays = {}
    for name, value in arguments.items():
        hint = f"`{name}` must be a real number or an array of them, got"
        try:
            if isinstance(value, str | bytes):
                raise TypeError("text")
            array = jnp.asarray(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{hint} {value!r} of type {type(value).__name__}: {error}") from None
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise TypeError(f"{hint} dtype {array.dtype}. Pass its real part.")
        if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
            raise TypeError(f"{hint} dtype {array.dtype}.")
        arrays[name] = array
    dtype = jnp.result_type(float, *arrays.values())
    compute = jnp.promote_types(dtype, jnp.float32)
    return [array.astype(compute) for array in arrays.values()], dtype


def broadcast_covariances(
    cov11: Validated[ArrayLike], cov12: Validated[ArrayLike], cov22: Validated[ArrayLike]
) -> tuple[Array, Array, Array, Any]:
    """The three covariances with a common shape, and the dtype of the result; see `as_real`.

    Raises:
      TypeError: one of them is complex, or no array of numbers.
      ValueError: they are not of shape `(..., S, S)` with the same `S`.
    """
    arrays, dtype = as_real(cov11=cov11, cov12=cov12, cov22=cov22)
    covs = dict(zip(("cov11", "cov12", "cov22"), arrays, strict=True))
    sizes = {cov.shape[-2:] for cov in covs.values()}
    if len(sizes) != 1 or len(size := sizes.pop()) != 2 or size[0] != size[1] or size[0] < 1:
        given = ", ".join(f"`{name}` {cov.shape}" for name, cov in covs.items())
        raise ValueError(
            f"Covariances must have shape (..., S, S) with the same S, got {given}. For inputs of "
            f"different sizes mark the missing positions with `mask_constant` in the layer."
        )
    first, second, third = jnp.broadcast_arrays(*arrays)
    return first, second, third, dtype
