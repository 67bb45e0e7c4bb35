"""Kernels of more inputs than one machine's memory holds, as lazy `dask.array`s of tiles.

Needs the extra `taylor-softmax[dask]`. What schedules, retries and shows progress is dask; what
keeps a kernel on disk is zarr.
"""

from taylor_softmax._distributed.arrays import kernel_array
from taylor_softmax._distributed.solving import Cholesky, ConjugateGradients, solve
from taylor_softmax._distributed.storage import store

__all__ = ["Cholesky", "ConjugateGradients", "kernel_array", "solve", "store"]
