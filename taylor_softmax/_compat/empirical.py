"""Mends `neural_tangents.empirical`."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.extend.source_info_util
import jax.numpy as jnp
from jax.interpreters import ad
from neural_tangents._src import empirical

from taylor_softmax._compat.lending import Overlay, put


# Some JAX versions since 0.5 deprecate `jnp.shape` and `jnp.size` of a ShapeDtypeStruct, and since
# 0.8 `jnp.dtype` of an array. All three will become errors. `empirical` calls them in this way.
def _shape(x: Any) -> tuple[int, ...]:
    return x.shape if hasattr(x, "shape") else jnp.shape(x)


def _size(x: Any) -> int:
    return math.prod(_shape(x))


def _dtype(x: Any) -> Any:
    return jnp.dtype(getattr(x, "dtype", x))


def _get_flops(f: Callable[..., Any], optimize: bool, *args: Any, **kwargs: Any) -> float:
    """Replaces its namesake, by which implementation 0 (AUTO) chooses among the others.

    `Compiled.cost_analysis()` is a dictionary since JAX 0.5, not a list of one, and has no "flops"
    where there are none. An implementation that does not support the network counts as infinitely
    expensive.
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

    The original calls `ad.linearize` with the signature it had before JAX 0.10, and
    `linear_util.wrap_init` without the `DebugInfo` that is required since 0.5. It needs the jaxpr
    of the linearised `fn`, to walk through it backwards. `make_jaxpr` of what `jax.linearize`
    returns is that jaxpr. As in the original, `disable_jit` keeps calls of inner functions out.
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

    The original looks up transposition rules, some of which JAX 0.10 keeps elsewhere (slice, scan),
    and uses `Primitive.map_primitive` and `ad.reducing_transposes`, which 0.10 removed.
    `jax.linear_transpose` of the primitive finds the rule by itself.
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
    cotangents = dict(zip(unknown, transpose(ad.instantiate_zeros(cotangent)), strict=True))
    return [cotangents.get(i) for i in range(len(operands))]


def mend() -> None:
    """Installs the above, and gives implementation 3 what it looks up in JAX's modules.

    - `ad.source_info_util` was removed before JAX 0.4.38, and is `jax.extend.source_info_util`.
    - `ad.config` was removed then, too. It says whether to check types with `core.lattice_join`,
      which 0.6 removed: JAX checks its internals, which is left out.
    - `core.DShapedArray` was removed in 0.8 with the arrays of dynamic shape: no variable has this
      type.
    """
    put(
        empirical,
        jnp=Overlay(jnp, shape=_shape, size=_size, dtype=_dtype),
        ad=Overlay(
            ad,
            source_info_util=jax.extend.source_info_util,
            config=types.SimpleNamespace(jax_enable_checks=False),
        ),
        _get_flops=_get_flops,
        _get_primals_out_and_pullback=_get_primals_out_and_pullback,
        _eqn_vjp_fn=_eqn_vjp_fn,
    )
    if "DShapedArray" not in vars(jax.core):
        put(empirical, core=Overlay(jax.core, DShapedArray=type("DShapedArray", (), {})))
