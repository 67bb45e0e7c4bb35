"""Strict JAX for the whole suite: float64, and (in pyproject.toml) warnings as errors.

Most of the suite's time goes into compiling. What XLA has compiled is kept in pytest's cache, from
run to run and for all workers; `pytest --cache-clear` starts anew.
"""

import ctypes
import os
import sys

# Two host devices, for the tests of sharding. Read when JAX starts its CPU backend.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)

import jax
import jaxtyping
import psutil
import pytest

# Bytes a worker may hold before it lets go of what it compiled; a test may take as much again.
_LARGEST_MEMORY = 2e9

jax.config.update("jax_enable_x64", True)

# Checks shapes and types of what is annotated, under pytest only. This import makes neural_tangents
# importable for the test modules, too, which import it in alphabetical order.
with jaxtyping.install_import_hook("taylor_softmax", "beartype.beartype"):
    import taylor_softmax  # noqa: F401


def pytest_configure(config):
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


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
