"""Imports neural_tangents, with the names that it misses and without TensorFlow."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

from taylor_softmax._compat.lending import lent_names, put

_EXPERIMENTAL = "neural_tangents.experimental"


class _RegisterOnUse(importlib.abc.Loader):
    """Loads a lazy module, which enters `sys.modules` only now.

    Sooner would be a trap: `inspect.stack()`, `unittest`'s `assertWarns` and others ask every
    module in `sys.modules` for some attribute. That would load TensorFlow, or fail without it.
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
    put(package, experimental=module)


def import_neural_tangents() -> None:
    """Imports neural_tangents, unless somebody has, with `experimental` lazy.

    `neural_tangents/__init__.py` imports `experimental`, which needs TensorFlow and tf2jax. An
    empty module takes its place during the import. It is not the lazy one itself because the import
    statement looks at the `__spec__` of what it finds in `sys.modules`, which would load it.

    An earlier `import neural_tangents` that failed has left behind the submodules that it could
    import. They are removed first, so that all modules come from one import.
    """
    if "neural_tangents" in sys.modules:
        return
    for name in [name for name in sys.modules if name.startswith("neural_tangents.")]:
        del sys.modules[name]
    sys.modules[_EXPERIMENTAL] = types.ModuleType(_EXPERIMENTAL)
    try:
        with lent_names():
            package = importlib.import_module("neural_tangents")
    finally:
        del sys.modules[_EXPERIMENTAL]
    _make_experimental_lazy(package)
