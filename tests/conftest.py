"""Strict JAX for the whole suite: float64, and (in pyproject.toml) warnings as errors."""

import os

# Two host devices, for the tests of sharding. Read when JAX starts its CPU backend.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)

import jax
import jaxtyping
import pytest

jax.config.update("jax_enable_x64", True)

# Checks shapes and types of what is annotated, under pytest only. This import makes neural_tangents
# importable for the test modules, too, which import it in alphabetical order.
with jaxtyping.install_import_hook("taylor_softmax", "beartype.beartype"):
    import taylor_softmax  # noqa: F401


@pytest.fixture(autouse=True, scope="module")
def _compiled_functions_end_with_their_module():
    """A worker that kept them all would hold several gigabytes by the end of the suite."""
    yield
    jax.clear_caches()
