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


def broadcast_covariances(
    cov11: Validated[ArrayLike], cov12: Validated[ArrayLike], cov22: Validated[ArrayLike]
) -> tuple[Array, Array, Array]:
    """The three covariances with a common shape and dtype, or what is wrong with them."""
    arrays = {"cov11": cov11, "cov12": cov12, "cov22": cov22}
    covs = {name: jnp.asarray(cov) for name, cov in arrays.items()}
    sizes = {cov.shape[-2:] for cov in covs.values()}
    if len(sizes) != 1 or len(size := sizes.pop()) != 2 or size[0] != size[1] or size[0] < 1:
        given = ", ".join(f"`{name}` {cov.shape}" for name, cov in covs.items())
        raise ValueError(
            f"Covariances must have shape (..., S, S) with the same S, got {given}. For inputs of "
            f"different sizes mark the missing positions with `mask_constant` in the layer."
        )
    dtype = jnp.result_type(float, *covs.values())
    first, second, third = jnp.broadcast_arrays(*(cov.astype(dtype) for cov in covs.values()))
    return first, second, third
