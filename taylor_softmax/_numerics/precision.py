"""Products in full precision, and what keeps floats away from underflow and from roots at 0."""

import contextlib
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

# Accelerators' default of fewer bits would show in a kernel.
matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def single_at_least(dtype: DTypeLike) -> Any:
    """In which to compute what comes in `dtype`: float32 for half precision, otherwise as it is.

    Under strict promotion float64 and float32 have no common type, so that none is asked for.
    """
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def enable_x64(enable: bool) -> contextlib.AbstractContextManager[Any]:
    """A context with or without float64, for the thread that enters it."""
    # JAX before 0.8 has it in `jax.experimental`, later versions no longer.
    module: Any = jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")
    return module.enable_x64(enable)


def log_tiny(dtype: DTypeLike) -> float:
    """The logarithm of the smallest normal number: below it `exp` underflows."""
    return float(np.log(jnp.finfo(dtype).tiny))


def off_zero(variance: Array) -> Array:
    """`variance + eps`, for rules that see a variance through its root, which has no slope at 0.

    Where the result is a smooth function of the variance the shift changes it by eps relative to
    its value at variance 1, and makes every derivative at 0 that of the smooth function.
    """
    return variance + jnp.finfo(variance.dtype).eps
