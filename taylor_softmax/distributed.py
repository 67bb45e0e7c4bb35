"""Kernels of more inputs than one machine's memory holds, as lazy `dask.array`s of tiles.

This module needs the extra `taylor-softmax[dask]`. dask schedules tiles, tries them again and shows
progress; zarr keeps a kernel on disk.
"""

from taylor_softmax._distributed.arrays import kernel_array
from taylor_softmax._distributed.solving import Cholesky, ConjugateGradients, solve
from taylor_softmax._distributed.storage import store

__all__ = ["Cholesky", "ConjugateGradients", "kernel_array", "solve", "store"]
