"""Kernels by tiles: time, memory, what dask costs over one `jit` call, and least squares with them.

Run `python -m benchmarks.distributed` on an otherwise idle machine with a few GB of disk;
`--quick` tries it out.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import dask.array
import jax
import numpy as np
from dask.base import compute

from benchmarks.report import options, progress, run, table
from benchmarks.timing import interleaved, medians
from taylor_softmax import stax
from taylor_softmax.distributed import (
    Cholesky,
    ConjugateGradients,
    kernel_array,
    solve,
    store,
)

COMMAND = "benchmarks.distributed"
GET = ("nngp", "ntk")
LAYERS = {"Softmax": stax.Softmax, "Erf": stax.Erf}
DIAG_REG = 1e-2


def network(layer: str) -> Callable[..., Any]:
    """Two hidden layers, logits of variance about 4, and the layer."""
    hidden = [each for _ in range(2) for each in (stax.Dense(512, 2**0.5, 0.1), stax.Relu())]
    return stax.serial(*hidden, stax.Dense(10, W_std=2.0), LAYERS[layer]())[2]


def inputs(n: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, 64)).astype(np.float32)


def stored(layer: str, n: int, chunks: int) -> str:
    """Seconds to store both kernels, in this process, and its peak of memory in GB."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        store(folder, network(layer), inputs(n), chunks=chunks)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return f"{seconds:.2f} {peak:.3f}"


def sizes(counts: list[int], chunks: int) -> str:
    rows = []
    for n in counts:
        for layer in LAYERS:
            command = [sys.executable, "-m", COMMAND, "--stored", layer, str(n), str(chunks)]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds, peak = map(float, result.stdout.split())
            row = [f"{layer}, {n:,} inputs", f"{seconds:.1f}", f"{seconds / n**2 * 1e9:.0f}"]
            rows.append([*row, f"{8 * n**2 / 1e9:.2f}", f"{peak:.2f}"])
            progress(", ".join(rows[-1]))
    return table(["network ends in", "seconds", "ns an entry", "kernels (GB)", "peak (GB)"], rows)


def overhead(n: int, chunks: int, repetitions: int) -> str:
    x1, x2 = inputs(n), inputs(2 * n)[n:]
    rows = []
    for layer in LAYERS:
        kernel_fn, row, ratios = network(layer), [layer], []
        jitted = jax.jit(lambda x1, x2, kernel_fn=kernel_fn: kernel_fn(x1, x2, GET))
        # One after the other: each leaves the heap as the next finds it.
        for other in (x2, None):
            tiles = kernel_array(kernel_fn, x1, other, chunks=chunks)
            functions: dict[str, Callable[[], Any]] = {
                "jit": lambda jitted=jitted, other=other: jitted(x1, other),
                "dask": lambda tiles=tiles: compute(*tiles),
            }
            times = medians(interleaved(functions, repetitions))
            row += [f"{times[key]:.2f}" for key in functions]
            ratios.append(f"{times['dask'] / times['jit'] - 1:+.0%}")
        rows.append([*row, *ratios])
        progress(f"overhead: {', '.join(rows[-1])}")
    header = ["network ends in", "jit (s)", "dask", "jit, x2=None", "dask, x2=None"]
    return table([*header, "overhead", "x2=None"], rows)


def least_squares(counts: list[int], chunks: int) -> str:
    rows = []
    methods = {"Cholesky": Cholesky(), "conjugate gradients": ConjugateGradients(tol=1e-4)}
    for n in counts:
        x = inputs(n)
        y = np.sin(x[:, :10])
        with tempfile.TemporaryDirectory() as folder:
            kernel = store(folder, network("Softmax"), x, get="ntk", chunks=chunks)
            ridge = DIAG_REG * float(dask.array.diagonal(kernel).mean().compute())  # pyright: ignore
            for name, method in methods.items():
                start = time.perf_counter()
                alpha = solve(kernel, y, diag_reg=DIAG_REG, method=method).compute()
                seconds = time.perf_counter() - start
                residual = (kernel @ alpha).compute() + ridge * alpha - y
                relative = np.linalg.norm(residual) / np.linalg.norm(y)
                rows.append([f"{name}, {n:,} inputs", f"{seconds:.1f}", f"{relative:.0e}"])
                progress(f"least squares: {', '.join(rows[-1])}")
    return table(["method", "seconds", "residual"], rows)


SIZES = """\
## Time and memory

What it takes to write NNGP and NTK into a zarr store, in float32, by tiles of {chunks:,} inputs.
The network is `Dense, Relu, Dense, Relu, Dense` and the layer in the first column. Every row comes
from a fresh process with dask's threads, and its time includes compilation. Kernels are symmetric.
"ns an entry" counts entries that are computed and those that are copied across the diagonal. "peak"
is the largest resident memory of the process, JAX and dask included."""

OVERHEAD = """\
## Overhead

One `jit` call beside dask, for NNGP and NTK in memory: of {n:,} inputs with {n:,} others, and of
{n:,} inputs with themselves (`x2=None`), where dask computes half of the tiles. Times are medians
of {repetitions} interleaved rounds, without compilation."""

LEAST_SQUARES = """\
## Least squares

Ten right-hand sides, solved with the stored NTK of the softmax network and a `diag_reg` of {reg},
in float32. The residual is relative to the norm of the right-hand sides."""


def main() -> None:
    parser = options(COMMAND, __doc__)
    parser.add_argument("--stored", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stored:
        layer, n, chunks = arguments.stored
        print(stored(layer, int(n), int(chunks)))
        return
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    quick = arguments.quick
    chunks, n, repetitions = (128, 500, 3) if quick else (2048, 4000, 5)
    counts, solved = ([500, 1000], [500]) if quick else ([5000, 10_000, 20_000], [5000, 10_000])
    parts: dict[str, Callable[[], Iterable[str]]] = {
        "sizes": lambda: (SIZES.format(chunks=chunks), sizes(counts, chunks)),
        "overhead": lambda: (
            OVERHEAD.format(n=n, repetitions=repetitions),
            overhead(n, chunks, repetitions),
        ),
        "least-squares": lambda: (
            LEAST_SQUARES.format(reg=DIAG_REG),
            least_squares(solved, chunks),
        ),
    }
    run("Kernels by tiles", COMMAND, parts, arguments)


if __name__ == "__main__":
    main()
