"""Softmax layers for infinitely wide neural networks: analytic NNGP and NTK kernels.

Importing this package makes `neural_tangents` importable on today's JAX and without TensorFlow; it
is here as `taylor_softmax.nt`.
"""

import importlib.metadata

# First: what follows imports neural_tangents.
from taylor_softmax import _compat as _compat  # isort: skip
import neural_tangents as nt

from taylor_softmax import losses, methods, monte_carlo, nn, predict, stax
from taylor_softmax._attention.moments import AttentionMoments, attention_second_moment
from taylor_softmax._class_axis.covariance import class_covariance
from taylor_softmax._layers.class_kernel import ClassKernel, class_kernel
from taylor_softmax._position_axis.moments import joint_second_moment

__all__ = [
    "AttentionMoments",
    "ClassKernel",
    "attention_second_moment",
    "class_covariance",
    "class_kernel",
    "joint_second_moment",
    "losses",
    "methods",
    "monte_carlo",
    "nn",
    "nt",
    "predict",
    "stax",
]

__version__ = importlib.metadata.version("taylor-softmax")
