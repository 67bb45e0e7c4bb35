"""Lets neural-tangents 0.6.5 import and work on today's JAX and SciPy, without TensorFlow.

0.6.5 is the last release of neural-tangents, so what it misses stays missing. Importing this module
imports neural_tangents and mends it:

- Names that neural_tangents only *imports* are lent to JAX's modules meanwhile, then taken back.
- Names that it *uses when called* are replaced in the namespace of the one private neural_tangents
  module that uses them.

So JAX and SciPy look the same to everybody else, and the mends hold too when neural_tangents was
imported first. They ask what is missing, never for a version number; those that ask nothing replace
private API of JAX, which changes, by public API that every JAX from 0.4.38 on has.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.core
import jax.extend.core
import jax.extend.source_info_util
import jax.numpy as jnp
import scipy
import scipy.linalg
from jax.interpreters import ad


class _Overlay(types.ModuleType):
    """`module` with a few names replaced, for one importer to see; the module does not change."""

    def __init__(self, module: types.ModuleType, **names: Any):
        super().__init__(module.__name__, module.__doc__)
        self._overlaid = module
        _put(self, **names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._overlaid, name)


def _put(module: types.ModuleType, **names: Any) -> None:
    for name, value in names.items():
        setattr(module, name, value)


# Importing neural_tangents


# What `jax.util`'s functions of these names do: return a list, raise where lengths differ.
def _safe_zip(*args: Any) -> list[tuple[Any, ...]]:
    return list(zip(*args, strict=True))


def _safe_map(f: Callable[..., Any], *args: Any) -> list[Any]:
    return [f(*xs) for xs in zip(*args, strict=True)]


@contextlib.contextmanager
def _lent_names() -> Iterator[None]:
    """Lends JAX's modules the names that neural_tangents imports from where they used to be.

    - `jax.core.Jaxpr`, `JaxprEqn`, `Literal`, `Primitive`, `Var`: deprecated in JAX 0.4.36, gone in
      0.6; the same classes are in `jax.extend.core`.
    - `jax.util.safe_map`, `safe_zip`: deprecated in JAX 0.6, gone in 0.7, and `jax.util` in 0.8.
    - `jax.interpreters.ad.zeros_like_p`: unused by JAX since 0.4.24, gone in 0.9. neural_tangents
      registers rules for it; a primitive of its own that no function contains is as good.

    A deprecated name counts as missing: JAX makes those up in the module's `__getattr__`, so they
    are not in `vars(module)`, and lending the successor means that nothing warns.
    """
    core_names = ("Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var")
    wanted: dict[str, dict[str, Any]] = {
        "jax.core": {name: getattr(jax.extend.core, name) for name in core_names},
        "jax.util": {"safe_map": _safe_map, "safe_zip": _safe_zip},
        "jax.interpreters.ad": {"zeros_like_p": jax.extend.core.Primitive("zeros_like")},
    }
    with contextlib.ExitStack() as take_back:
        for module_name, names in wanted.items():
            try:
                module = importlib.import_module(module_name)
            except ModuleNotFoundError:
                module = sys.modules[module_name] = types.ModuleType(module_name)
                take_back.callback(sys.modules.pop, module_name)
            for name, value in names.items():
                if name not in vars(module):
                    setattr(module, name, value)
                    take_back.callback(delattr, module, name)
        yield


_EXPERIMENTAL = "neural_tangents.experimental"


class _RegisterOnUse(importlib.abc.Loader):
    """Loads a lazy module, which enters `sys.modules` only now.

    Sooner would be a trap: `inspect.stack()`, `unittest`'s `assertWarns` and others ask every
    module in `sys.modules` for some attribute, which would load TensorFlow or fail for want of it.
    """

    def __init__(self, package: types.ModuleType, loader: importlib.abc.Loader):
        self._package, self._loader = package, loader

    def exec_module(self, module: types.ModuleType) -> None:
        sys.modules[_EXPERIMENTAL] = module
        try:
            self._loader.exec_module(module)
        except BaseException:
            del sys.modules[_EXPERIMENTAL]
            # A module that failed to load is left an empty shell, whose next use would end in a
            # puzzling AttributeError; a fresh one repeats the ModuleNotFoundError.
            _make_experimental_lazy(self._package)
            raise


def _make_experimental_lazy(package: types.ModuleType) -> None:
    """Binds `neural_tangents.experimental` to a module that loads when it is first used."""
    spec = importlib.machinery.PathFinder.find_spec(_EXPERIMENTAL, package.__path__)
    assert spec is not None
    assert spec.loader is not None
    spec.loader = importlib.util.LazyLoader(_RegisterOnUse(package, spec.loader))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _put(package, experimental=module)


def _import_neural_tangents() -> None:
    """Imports neural_tangents, unless somebody has, with `experimental` lazy.

    `neural_tangents/__init__.py` imports `experimental`, which needs TensorFlow and tf2jax. An
    empty module stands in for it meanwhile. It is not the lazy one itself because the import
    statement looks at the `__spec__` of what it finds in `sys.modules`, which would load it.

    An earlier `import neural_tangents` that failed has left those of its submodules behind that did
    import. They go first, so that all come from one import.
    """
    if "neural_tangents" in sys.modules:
        return
    for name in [name for name in sys.modules if name.startswith("neural_tangents.")]:
        del sys.modules[name]
    sys.modules[_EXPERIMENTAL] = types.ModuleType(_EXPERIMENTAL)
    try:
        with _lent_names():
            package = importlib.import_module("neural_tangents")
    finally:
        del sys.modules[_EXPERIMENTAL]
    _make_experimental_lazy(package)


_import_neural_tangents()

# These have to come after: nothing of neural_tangents can be imported before.
from neural_tangents._src import empirical, predict  # noqa: E402
from neural_tangents._src.stax import linear  # noqa: E402

# neural_tangents.predict


# In `jax.core` before JAX 0.10, which deprecates it there.
_trace_state: Callable[..., Any] = (
    getattr(jax.extend.core, "get_opaque_trace_state", None) or jax.core.get_opaque_trace_state  # pyright: ignore[reportAttributeAccessIssue]
)


def _cache_within_trace(maxsize: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Replaces `functools.lru_cache`, in which the predict functions keep their factorisations.

    When the first call comes inside `jit` or `scan`, `lru_cache` keeps a tracer, which is dead at
    the next call. This keeps only what was computed in the trace in which the predict function was
    made (or, as there, outside any), where it lives as long as the kernel. `maxsize` is never
    reached: the keys are the few kernels' names.
    """
    del maxsize

    def decorate(f: Callable[..., Any]) -> Callable[..., Any]:
        born_in = _trace_state(convention="flax")
        kept: dict[tuple[Any, ...], Any] = {}

        @functools.wraps(f)
        def cached(*args: Any) -> Any:
            if args in kept:
                return kept[args]
            value = f(*args)
            if _trace_state(convention="flax") == born_in:
                kept[args] = value
            return value

        return cached

    return decorate


def _eigvalsh(a: Any, eigvals: tuple[int, int]) -> Any:
    """`scipy.linalg.eigvalsh` with the argument that SciPy 1.14 removed, as it was.

    For `predict.max_learning_rate`. `subset_by_index`, there since 1.5, means the same range.
    """
    return scipy.linalg.eigvalsh(a, subset_by_index=eigvals)


def _mend_predict() -> None:
    """Installs the above, and replaces `jax.core.eval_context` where it is used.

    That is in `predict` and `GlobalSelfAttention`, to compute once and for all, also inside `jit`,
    what depends on constants only. Since JAX 0.4.36 it refuses tracers (UnexpectedTracerError), so
    a kernel computed inside `jit` or `vmap` had no predictions. `jax.ensure_compile_time_eval` does
    what it did: constants are evaluated at once, tracers are traced.
    """
    core = _Overlay(jax.core, eval_context=jax.ensure_compile_time_eval)
    _put(linear, jax=_Overlay(jax, core=core))
    scipy_linalg = _Overlay(scipy.linalg, eigvalsh=_eigvalsh)
    _put(
        predict,
        jax=_Overlay(jax, core=core),
        sp=_Overlay(scipy, linalg=scipy_linalg),
        lru_cache=_cache_within_trace,
    )


# neural_tangents.empirical


# `jnp.shape` and `jnp.size` of a ShapeDtypeStruct are deprecated by some JAX versions since 0.5,
# `jnp.dtype` of an array since 0.8; all three are errors to be. `empirical` uses them so.
def _shape(x: Any) -> tuple[int, ...]:
    return x.shape if hasattr(x, "shape") else jnp.shape(x)


def _size(x: Any) -> int:
    return math.prod(_shape(x))


def _dtype(x: Any) -> Any:
    return jnp.dtype(getattr(x, "dtype", x))


def _get_flops(f: Callable[..., Any], optimize: bool, *args: Any, **kwargs: Any) -> float:
    """Replaces its namesake, by which implementation 0 (AUTO) chooses among the others.

    `Compiled.cost_analysis()` is a dictionary since JAX 0.5, not a list of one, and has no "flops"
    where there are none. An implementation that does not support the network is not the best.
    """
    try:
        lowered = jax.jit(f).lower(*args, **kwargs)
    except NotImplementedError:
        return math.inf
    analysis: Any = lowered.compile().cost_analysis() if optimize else lowered.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis).get("flops", 0.0)


def _get_primals_out_and_pullback(
    fn: Callable[..., Any],
    mode: Any,
    _j_rules: bool,
    _s_rules: bool,
    _fwd: bool | None,
    *primals: Any,
) -> tuple[Any, Callable[..., Any]]:
    """Replaces its namesake, for implementation 3 (STRUCTURED_DERIVATIVES).

    That one calls `ad.linearize` with the signature it had before JAX 0.10, and
    `linear_util.wrap_init` without the `DebugInfo` that is due since 0.5. It wants the jaxpr of the
    linearised `fn`, to walk through it backwards; `make_jaxpr` of what `jax.linearize` returns is
    just that. As there, `disable_jit` keeps calls of inner functions out of it.
    """
    with jax.disable_jit():
        out, pushforward = jax.linearize(fn, *primals)
        closed = jax.make_jaxpr(pushforward)(*primals)

    def pullback(*cotangents: Any) -> Any:
        flat = empirical._backward_pass(
            closed.jaxpr,  # pyright: ignore[reportArgumentType]  (named by where it used to be)
            mode=mode,
            consts=closed.consts,
            primals_in=[ad.UndefinedPrimal(v.aval) for v in closed.jaxpr.invars],
            cotangents_in=tuple(jax.tree_util.tree_leaves(cotangents)),
            _j_rules=_j_rules,
            _s_rules=_s_rules,
            _fwd=_fwd,
        )
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(primals), flat)

    return out, pullback


def _eqn_vjp_fn(eqn: Any, cotangent: Any, *operands: Any) -> list[Any]:
    """Replaces its namesake, for implementation 3: an equation's cotangents, None where known.

    That one looks up transposition rules, of which JAX 0.10 keeps some elsewhere (slice, scan), and
    `Primitive.map_primitive` and `ad.reducing_transposes`, gone in 0.10. `jax.linear_transpose` of
    the primitive finds the rule by itself.
    """
    if eqn is None:  # the identity
        return [cotangent]
    unknown = [i for i, x in enumerate(operands) if ad.is_undefined_primal(x)]

    def apply(*args: Any) -> Any:
        # neural_tangents passes a bare shape for a known operand of which nothing else matters.
        filled = [
            jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.core.ShapedArray) else x
            for x in operands
        ]
        for i, x in zip(unknown, args, strict=True):
            filled[i] = x
        out = eqn.primitive.bind(*filled, **eqn.params)
        return out[0] if eqn.primitive.multiple_results else out

    avals = [operands[i].aval for i in unknown]
    transpose = jax.linear_transpose(
        apply, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals)
    )
    found = dict(zip(unknown, transpose(ad.instantiate_zeros(cotangent)), strict=True))
    return [found.get(i) for i in range(len(operands))]


def _mend_empirical() -> None:
    """Installs the above, and gives implementation 3 what it looks up in JAX's modules.

    - `ad.source_info_util`, gone before JAX 0.4.38, is `jax.extend.source_info_util`.
    - `ad.config`, gone likewise, is asked whether to check types with `core.lattice_join`, gone in
      0.6: a check of JAX's internals on themselves, left out.
    - `core.DShapedArray`, gone in 0.8 with the arrays of dynamic shape: no variable has this type.
    """
    _put(
        empirical,
        jnp=_Overlay(jnp, shape=_shape, size=_size, dtype=_dtype),
        ad=_Overlay(
            ad,
            source_info_util=jax.extend.source_info_util,
            config=types.SimpleNamespace(jax_enable_checks=False),
        ),
        _get_flops=_get_flops,
        _get_primals_out_and_pullback=_get_primals_out_and_pullback,
        _eqn_vjp_fn=_eqn_vjp_fn,
    )
    if "DShapedArray" not in vars(jax.core):
        _put(empirical, core=_Overlay(jax.core, DShapedArray=type("DShapedArray", (), {})))


_mend_predict()
_mend_empirical()
