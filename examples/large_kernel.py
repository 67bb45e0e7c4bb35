"""NNGP and NTK of many digits, tile by tile into a zarr store.

The program repeats digits with noise to as many inputs as wanted. The network
ends in softmax. You can stop the program at any time: `--resume` goes on from
the tiles that are on disk. `--scheduler ADDRESS` computes on a dask cluster,
whose workers have to reach `--out`. Memory does not grow with the kernel.
"""

import argparse
import contextlib
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import dask.config
import numpy as np
from dask.diagnostics.progress import ProgressBar
from distributed import Client, progress
from sklearn.datasets import load_digits

from taylor_softmax import stax
from taylor_softmax.distributed import store

NOISE = 0.3  # of pixels, whose mean square is 1

KERNEL_FN = stax.serial(
    stax.Dense(512, W_std=2**0.5, b_std=0.1),
    stax.Relu(),
    stax.Dense(512, W_std=2**0.5, b_std=0.1),
    stax.Relu(),
    stax.Dense(10, W_std=2.0),
    stax.Softmax(),
)[2]


def inputs(n: int) -> np.ndarray:
    """Digits, `(n, 64)` in float32, repeated, each time with other noise."""
    images, _ = load_digits(return_X_y=True)
    images = images - images.mean(0)
    images = images / np.sqrt(np.mean(images**2))
    rng = np.random.default_rng(0)
    repeated = images[np.arange(n) % len(images)]
    return (repeated + NOISE * rng.standard_normal(repeated.shape)).astype(
        np.float32
    )


def peak_memory() -> float:
    """Of this process, in GB."""
    # Kilobytes, but on macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1e9 if sys.platform == "darwin" else 1e6
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--inputs", type=int, default=20_000, help="how many (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("kernel"), help="store (./%(default)s)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from what the store has"
    )
    parser.add_argument(
        "--chunks", type=int, default=2048, help="rows of a tile (%(default)s)"
    )
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help="of a dask cluster"
    )
    # A tile keeps several cores busy by itself, and each one at work takes
    # memory.
    threads = min(4, os.cpu_count() or 1)
    parser.add_argument(
        "--threads", type=int, default=threads, help="without a cluster"
    )
    given = parser.parse_args()

    with contextlib.ExitStack() as stack:
        client = (
            stack.enter_context(Client(given.scheduler))
            if given.scheduler
            else None
        )
        if client is None:
            stack.enter_context(
                dask.config.set(scheduler="threads", num_workers=given.threads)
            )
        start = time.perf_counter()
        writing = store(
            given.out,
            KERNEL_FN,
            inputs(given.inputs),
            chunks=given.chunks,
            resume=given.resume,
            compute=False,
        )
        if client is None:
            with ProgressBar():
                writing.compute()
        else:
            future: Any = client.compute(writing)
            progress(future, notebook=False)
            future.result()
    seconds, pairs = (
        time.perf_counter() - start,
        given.inputs * (given.inputs + 1) / 2,
    )
    print(f"\nNNGP and NTK of {given.inputs:,} inputs are in {given.out}.")
    print(
        f"{seconds:.1f} s, {seconds / pairs * 1e9:.0f} ns a pair; this process "
        f"took {peak_memory():.2f} GB at most, the two kernels "
        f"{8 * given.inputs**2 / 1e9:.2f} GB."
    )


if __name__ == "__main__":
    main()
