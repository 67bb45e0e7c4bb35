"""Strict JAX for the whole suite: float64, and (in pyproject.toml) warnings as errors.

Most of the suite's time goes into compiling. What XLA has compiled is kept in pytest's cache, from
run to run and for all workers; `pytest --cache-clear` starts anew. The quick tests alone
(`-m quick`) are compiled in about half the time, with fewer optimisations; all others as users
compile.
"""

import ctypes
import importlib.util
import mmap
import os
import pathlib
import sys

# Two host devices, for the tests of sharding. Read when JAX starts its CPU backend.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)

import jax
import jaxtyping
import psutil
import pytest

# Flags of XLA with which it compiles in half the time. Its newer code generator for CPUs takes
# twice as long as its older one. The second level of optimisation takes a tenth longer than the
# first. No optimisation at all would slow down the tests by more than it saves.
_QUICK_TO_COMPILE = {"xla_cpu_use_fusion_emitters": "false", "xla_backend_optimization_level": "1"}

# Bytes a worker may hold before it lets go of what it compiled; a test may take as much again.
_LARGEST_MEMORY = 2e9

jax.config.update("jax_enable_x64", True)

# Checks shapes and types of what is annotated, under pytest only. This import makes neural_tangents
# importable for the test modules, too, which import it in alphabetical order.
with jaxtyping.install_import_hook("taylor_softmax", "beartype.beartype"):
    import taylor_softmax  # noqa: F401


def pytest_configure(config):
    if config.option.markexpr == "quick":
        # XLA reads them when it first compiles.
        for flag, value in _QUICK_TO_COMPILE.items():
            if _is_flag_of_xla(flag):
                os.environ["XLA_FLAGS"] += f" --{flag}={value}"
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _is_flag_of_xla(name):
    """Whether this version of XLA has a flag; one that it does not have would end the process."""
    package = importlib.util.find_spec("jaxlib")
    return any(
        _contains(path, name.encode()) for path in pathlib.Path(package.origin).parent.glob("*.so")
    )


def _contains(path, text):
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(text) >= 0


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item):
    """Takes `quick(order=2)` off the cases of a parametrised test that have another order."""

    def applies(mark):
        return mark.name != "quick" or all(
            item.callspec.params[name] == value for name, value in mark.kwargs.items()
        )

    item.own_markers = [mark for mark in item.own_markers if applies(mark)]


@pytest.fixture(autouse=True)
def _memory_is_bounded():
    """A worker that kept all compiled functions would hold several gigabytes by its end."""
    yield
    if psutil.Process().memory_info().rss > _LARGEST_MEMORY:
        jax.clear_caches()
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            # What compiling took and gave back, glibc keeps: most of it.
            libc.malloc_trim(0)
