"""Mends `neural_tangents.predict`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.extend.core
import scipy
import scipy.linalg
from neural_tangents._src import predict
from neural_tangents._src.stax import linear

from taylor_softmax._compat.lending import Overlay, put

# In `jax.core` before JAX 0.10, which deprecates it there.
_trace_state: Callable[..., Any] = (
    getattr(jax.extend.core, "get_opaque_trace_state", None) or jax.core.get_opaque_trace_state  # pyright: ignore[reportAttributeAccessIssue]
)


def _cache_within_trace(maxsize: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Replaces `functools.lru_cache`, in which the predict functions keep their factorisations.

    When the first call comes inside `jit` or `scan`, `lru_cache` keeps a tracer, which is no longer
    valid at the next call. This function keeps only what was computed in the trace in which the
    predict function was made, or outside any trace if it was made there: such a value is valid as
    long as the kernel. `maxsize` is never reached: the keys are the names of the few kernels.
    """
    del maxsize

    def decorate(f: Callable[..., Any]) -> Callable[..., Any]:
        made_in = _trace_state(convention="flax")
        kept: dict[tuple[Any, ...], Any] = {}

        @functools.wraps(f)
        def cached(*args: Any) -> Any:
            if args in kept:
                return kept[args]
            value = f(*args)
            if _trace_state(convention="flax") == made_in:
                kept[args] = value
            return value

        return cached

    return decorate


def _eigvalsh(a: Any, eigvals: tuple[int, int]) -> Any:
    """`scipy.linalg.eigvalsh` with the argument that SciPy 1.14 removed, as it was.

    For `predict.max_learning_rate`. `subset_by_index`, there since 1.5, means the same range.
    """
    return scipy.linalg.eigvalsh(a, subset_by_index=eigvals)


def mend() -> None:
    """Installs the above, and replaces `jax.core.eval_context` where it is used.

    `predict` and `GlobalSelfAttention` use it to compute once, also inside `jit`, what depends on
    constants only. Since JAX 0.4.36 it refuses tracers (UnexpectedTracerError), so a kernel
    computed inside `jit` or `vmap` had no predictions. `jax.ensure_compile_time_eval` does what
    `eval_context` did: constants are evaluated at once, tracers are traced.
    """
    core = Overlay(jax.core, eval_context=jax.ensure_compile_time_eval)
    put(linear, jax=Overlay(jax, core=core))
    scipy_linalg = Overlay(scipy.linalg, eigvalsh=_eigvalsh)
    put(
        predict,
        jax=Overlay(jax, core=core),
        sp=Overlay(scipy, linalg=scipy_linalg),
        lru_cache=_cache_within_trace,
    )
