"""Strict JAX for the whole suite: float64, and (in pyproject.toml) warnings as errors."""

import os

# Two host devices, for the tests of sharding. Read when JAX starts its CPU backend.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)

import jax

jax.config.update("jax_enable_x64", True)

# Makes neural_tangents importable for the test modules, which import it in alphabetical order.
import taylor_softmax  # noqa: F401
