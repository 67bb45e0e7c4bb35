"""Names that one module sees in another, for good or during an import."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax.core
import jax.extend.core


class Overlay(types.ModuleType):
    """`module` with a few names replaced, for one importer to see; the module does not change.

    It is pickled as part of functions of the importer. Unpickled, it is what the importer sees in
    that process.
    """

    # The importer and the name that it sees this as.
    _place: tuple[str, str]

    def __init__(self, module: types.ModuleType, **names: Any):
        super().__init__(module.__name__, module.__doc__)
        self._overlaid = module
        put(self, **names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._overlaid, name)

    def __reduce__(self) -> Any:
        return _seen_by, self._place


def put(module: types.ModuleType, **names: Any) -> None:
    for name, value in names.items():
        setattr(module, name, value)
        # Not `isinstance`, which asks a lazy module for its class, and loads it.
        if type(value) is Overlay and type(module) is not Overlay:
            value._place = (module.__name__, name)


def _seen_by(importer: str, name: str) -> Any:
    return getattr(importlib.import_module(importer), name)


# What `jax.util`'s functions of these names do: return a list, raise where lengths differ.
def _safe_zip(*args: Any) -> list[tuple[Any, ...]]:
    return list(zip(*args, strict=True))


def _safe_map(f: Callable[..., Any], *args: Any) -> list[Any]:
    return [f(*xs) for xs in zip(*args, strict=True)]


@contextlib.contextmanager
def lent_names() -> Iterator[None]:
    """Lends JAX's modules the names that neural_tangents imports from where they used to be.

    - `jax.core.Jaxpr`, `JaxprEqn`, `Literal`, `Primitive`, `Var` were deprecated in JAX 0.4.36 and
      removed in 0.6. The same classes are in `jax.extend.core`.
    - `jax.util.safe_map`, `safe_zip` were deprecated in JAX 0.6 and removed in 0.7, and `jax.util`
      in 0.8.
    - `jax.interpreters.ad.zeros_like_p` has not been used by JAX since 0.4.24, and was removed in
      0.9. neural_tangents registers rules for it. A new primitive, which no function contains,
      serves as well.

    A deprecated name counts as missing: the module's `__getattr__` makes it up, so it is not in
    `vars(module)`. Lending its successor avoids the warning.
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
