"""Checks of arguments that several modules take."""

import operator
import reprlib
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from taylor_softmax._numerics.precision import single_at_least

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


class _OneLine(reprlib.Repr):
    def repr_instance(self, x: Any, level: int) -> str:
        if getattr(x, "shape", None) and hasattr(x, "dtype"):
            return f"an array of shape {tuple(x.shape)} and dtype {x.dtype}"
        text = repr(x)
        return text if len(text) <= 60 and "\n" not in text else f"{type(x).__name__}(...)"


shown = _OneLine().repr
"""A value for a message, on one line: shape and dtype of arrays, a part of long values."""


def summary(record: Any) -> str:
    """The `repr` of a named tuple or dataclass of arrays, on one line."""
    names = getattr(record, "_fields", None) or record.__dataclass_fields__
    fields = ", ".join(f"{name}={_briefly(getattr(record, name))}" for name in names)
    return f"{type(record).__name__}({fields})"


def _briefly(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"{value.dtype}{list(shape)}" if shape else shown(value)


def check_integer(name: str, value: Any, *, least: int, hint: str = "") -> int:
    """Returns `value`, the argument `name`, as an `int`, or says what is wrong with it.

    Raises:
      TypeError: it is not an integer (booleans are not).
      ValueError: it is less than `least`.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"`{name}` must be an integer, got {shown(value)}.{hint}")
    if (integer := operator.index(value)) < least:
        raise ValueError(f"`{name}` must be at least {least}, got {integer}.{hint}")
    return integer


def check_n_classes(n_classes: Any) -> int:
    """Returns `n_classes` as an `int`, or says what is wrong with it."""
    hint = " It sets the shape of the result, so under `jit` it must be static."
    return check_integer("n_classes", n_classes, least=1, hint=hint)


def as_real(**arguments: Any) -> tuple[list[Array], Any]:
    """Public array arguments, given by name, in the dtype to compute in, and that of the result.

    Integers, booleans and (nested) lists of them are accepted. float16 and bfloat16 are computed in
    float32, whose rounding is far below theirs. Results have the dtype of the arguments.

    Raises:
      TypeError: an argument is complex, or no array of numbers.
    """
    arrays = {}
    for name, value in arguments.items():
        hint = f"`{name}` must be a real number or an array of them, got"
        try:
            # JAX 0.4 takes a None inside for NaN, such as that of a kernel without NTK, and warns.
            parts = jax.tree.leaves(value, is_leaf=lambda part: part is None)
            if any(part is None or isinstance(part, str | bytes) for part in parts):
                raise TypeError("not a number")
            # What is concrete stays so, and can be checked, inside `jit` too.
            with jax.ensure_compile_time_eval():
                array = jnp.asarray(value)
        except (TypeError, ValueError):
            # JAX's own message may hold the whole value.
            raise TypeError(f"{hint} {shown(value)} of type {type(value).__name__}.") from None
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise TypeError(f"{hint} dtype {array.dtype}. Pass its real part.")
        if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
            raise TypeError(f"{hint} dtype {array.dtype}.")
        arrays[name] = array
    # Integers and booleans follow; under strict promotion they would be refused.
    floats = [x for x in arrays.values() if jnp.issubdtype(x.dtype, jnp.floating)]
    dtype = jnp.result_type(float, *floats)
    compute = single_at_least(dtype)
    with jax.ensure_compile_time_eval():
        return [array.astype(compute) for array in arrays.values()], dtype


def concrete(array: Any) -> Any:
    """`array` as one of NumPy, unless it is traced.

    Checks of NumPy's arrays compile nothing, and also run inside `jit`.
    """
    return array if isinstance(array, Tracer) else np.asarray(array)


def known(array: Any) -> Any:
    """The numbers of an array, which are also known while it is traced for derivatives only."""
    return concrete(lax.stop_gradient(array) if isinstance(array, Tracer) else array)


def constant(array: Any) -> Any:
    """`array`, as a constant for derivatives."""
    return lax.stop_gradient(array) if isinstance(array, Array) else array


def namespace(*arrays: Any) -> Any:
    """`numpy` where no array is one of JAX, otherwise `jax.numpy`."""
    return jnp if any(isinstance(array, Array) for array in arrays) else np


def check_entries(name: str, array: Any, valid: Any, must: str) -> Any:
    """Returns `valid`, the validity of every entry of `array`, or raises for one that is not.

    Nothing is known of traced arrays: callers return NaN for their entries that are not valid.

    Args:
      name: of the argument.
      must: what entries have to be, for the message.

    Raises:
      ValueError: an entry of a concrete array is not valid.
    """
    if not isinstance(valid, Tracer) and not np.all(valid):
        where = tuple(int(i) for i in np.argwhere(~np.asarray(valid))[0])
        at = f" at {where}" if where else ""
        raise ValueError(f"`{name}` must be {must}, got {np.asarray(array)[where]}{at}.")
    return valid


def check_variances(name: str, array: Any) -> Any:
    """Where variances are valid, nonnegative and finite; see `check_entries`."""
    valid = namespace(array).isfinite(array) & (array >= 0)
    return check_entries(name, array, valid, "nonnegative and finite")


def check_pairs(var1: Array, cov12: Array, var2: Array, *, dtype: DTypeLike) -> Any:
    """Where variances and covariances of pairs are those of Gaussian variables.

    Args:
      dtype: in which they were given.

    Raises:
      ValueError: shapes don't broadcast, or an entry of a concrete array is not valid.
    """
    check_broadcast(var1=var1, cov12=cov12, var2=var2)
    valid = check_variances("var1", var1) & check_variances("var2", var2)
    must = "at most sqrt(var1 * var2) in size"
    # Rounding, and kernels of finite samples, exceed the limit by this much.
    slack = max(1e-3, 2 * float(jnp.finfo(dtype).eps))
    return valid & check_covariances("cov12", cov12, var1, var2, slack, must)


def check_covariances(name: str, cov12: Any, var1: Any, var2: Any, slack: float, must: str) -> Any:
    """Where covariances are finite, and may be those of variables with these variances.

    Args:
      slack: how far they may be beyond the root of the product of the variances, relative to it.

    Raises:
      ValueError: an entry of a concrete array is not valid.
    """
    xp = namespace(cov12, var1, var2)
    finite = check_entries(name, cov12, xp.isfinite(cov12), "finite")
    largest = xp.sqrt(xp.maximum(var1, 0)) * xp.sqrt(xp.maximum(var2, 0))
    # Rounding of a sum of terms is relative to the larger variance, where the other is small.
    limit = (1 + slack) * largest + 1e-6 * xp.maximum(var1, var2)
    cov12, inside = xp.broadcast_arrays(cov12, ~finite | ~(xp.abs(cov12) > limit))
    return finite & check_entries(name, cov12, inside, must)


def check_broadcast(**arrays: Array) -> tuple[int, ...]:
    """The shape that named arrays broadcast to.

    Raises:
      ValueError: they don't.
    """
    try:
        return jnp.broadcast_shapes(*(array.shape for array in arrays.values()))
    except ValueError:
        given = ", ".join(f"`{name}` {array.shape}" for name, array in arrays.items())
        raise ValueError(f"Shapes must broadcast by NumPy's rules, got {given}.") from None


def fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether arrays of `shape` broadcast to `target`."""
    try:
        return jnp.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


def check_axes(axis: Any) -> int | tuple[int, ...]:
    """`axis` as an `int` or a tuple of them; NumPy's and JAX's integers are taken.

    Raises:
      TypeError: it is neither.
      ValueError: it names no axis.
    """
    several = isinstance(axis, tuple | list)
    values = tuple(axis) if several else (axis,)
    axes = []
    for value in values:
        try:
            if isinstance(value, bool | np.bool_):
                raise TypeError("boolean")
            axes.append(operator.index(value))
        except TypeError:
            raise TypeError(
                f"`axis` must be an integer or a tuple of them, got {shown(axis)}."
            ) from None
    if not axes:
        raise ValueError("`axis` must name at least one axis, got none.")
    return tuple(axes) if several else axes[0]


def check_boolean(name: str, value: Any) -> bool:
    """`value`, the argument `name`, if it is a boolean.

    Raises:
      TypeError: it is not.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be a boolean, got {shown(value)}.")
    return bool(value)


def broadcast_covariances(
    cov11: Validated[ArrayLike], cov12: Validated[ArrayLike], cov22: Validated[ArrayLike]
) -> tuple[Array, Array, Array, Any]:
    """The three covariances with a common shape, and the dtype of the result; see `as_real`.

    Raises:
      TypeError: one of them is complex, or no array of numbers.
      ValueError: they are not of shape `(..., S, S)` with the same `S`, or are concrete, and not
        finite or of negative variance. Traced ones give NaN.
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
    check_broadcast(**covs)
    for name, cov in covs.items():
        check_entries(name, cov, jnp.isfinite(cov), "finite")
    for name in ("cov11", "cov22"):
        variance = jnp.diagonal(covs[name], axis1=-2, axis2=-1)
        # Of inputs that differ by nothing but rounding it may be below 0.
        slack = 1e-4 * jnp.max(jnp.abs(variance), -1, keepdims=True)
        check_entries(name, variance, ~(variance < -slack), "nonnegative along its diagonal")
    first, second, third = jnp.broadcast_arrays(*arrays)
    return first, second, third, dtype
