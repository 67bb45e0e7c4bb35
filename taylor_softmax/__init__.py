"""Softmax layers for infinitely wide neural networks: analytic NNGP and NTK kernels.

Importing this package makes `neural_tangents` importable on today's JAX and without TensorFlow.
"""

# First: what follows imports neural_tangents.
from taylor_softmax import _compat as _compat  # isort: skip
from taylor_softmax import losses as losses
from taylor_softmax import monte_carlo as monte_carlo
from taylor_softmax import predict as predict
from taylor_softmax import stax as stax
from taylor_softmax._class_axis.covariance import class_covariance as class_covariance
from taylor_softmax._position_axis.moments import joint_second_moment as joint_second_moment
from taylor_softmax.stax import ClassKernel as ClassKernel
from taylor_softmax.stax import class_kernel as class_kernel
