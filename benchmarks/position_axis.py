"""Error, time and memory of softmax over positions.

Run `python -m benchmarks.position_axis` on an otherwise idle machine; `--quick` tries it out.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from benchmarks.report import environment, progress, publish, table
from taylor_softmax import joint_second_moment, monte_carlo, stax
from taylor_softmax.methods import QuasiMonteCarlo, Series

VARIANCES = (0.5, 1.0, 4.0)
CORRELATIONS = (0.5, 0.8, 0.95)
ORDERS = (8, None)
N_INPUTS = 100  # of which memory is reported


def name(order: int | None) -> str:
    return "softmax" if order is None else f"order {order}"


def covariances(size: int, variance: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random `K11, K12, K22`, one of each cross-correlation, with equal variances."""
    rng = np.random.default_rng(size)
    blocks = []
    for rho in CORRELATIONS:
        first, second = rng.standard_normal((2, size, 2 * size))
        joint = np.concatenate([first, rho * first + np.sqrt(1 - rho**2) * second])
        joint *= np.sqrt(variance) / np.linalg.norm(joint, axis=1, keepdims=True)
        blocks.append(joint @ joint.T)
    joint = np.stack(blocks)
    return joint[:, :size, :size], joint[:, :size, size:], joint[:, size:, size:]


def error_table(sizes: tuple[int, ...], n_samples: int) -> str:
    """Largest error over the largest entry, with the standard error of what it is held against."""
    rows = []
    for size in sizes:
        for variance in VARIANCES:
            row, given = [f"{size}", f"{variance:g}"], covariances(size, variance)
            for order in ORDERS:
                progress(f"{size} positions, variance {variance:g}, {name(order)}")
                mean, stderr = (
                    np.asarray(each)
                    for each in monte_carlo.joint_second_moment(
                        random.key(0), *given, order=order, n_samples=n_samples
                    )
                )
                largest = np.max(mean, axis=(1, 2), keepdims=True)
                for method in (Series(), QuasiMonteCarlo(1024), None):
                    value = joint_second_moment(*given, order=order, method=method)
                    row.append(f"{np.max(np.abs(value - mean) / largest):.1e}")
                row.append(f"{np.max(stderr / largest):.0e}")
            rows.append(row)
    columns = ("series", "1,024", "default", "sampling")
    header = ["positions", "variance", *(f"{name(o)}: {c}" for o in ORDERS for c in columns)]
    return table(header, rows)


def time_table(sizes: tuple[int, ...], repetitions: int) -> str:
    """Time per pair of inputs of NNGP and NTK, and memory of the kernel of `N_INPUTS` inputs."""
    rows = []
    for size in sizes:
        for order in (2, None):
            layer = stax.Softmax(axis=1) if order is None else stax.TaylorSoftmax(2, axis=1)
            *_, kernel_fn = stax.serial(stax.Conv(8, (1,)), layer)

            def compute(x1: Any, x2: Any, kernel_fn: Any = kernel_fn) -> Any:
                kernel = kernel_fn(x1, x2)
                return kernel.nngp, kernel.ntk

            progress(f"{size} positions, {name(order)}")
            # Few pairs beside many: the difference is free of what every input costs once.
            times = {}
            for n in (2, 6):
                x1, x2 = (random.normal(random.key(i), (n, size, 2 * size)) for i in (1, 2))
                function = jax.jit(compute).lower(x1, x2).compile()
                jax.block_until_ready(function(x1, x2))
                measured = []
                for _ in range(repetitions):
                    start = time.perf_counter()
                    jax.block_until_ready(function(x1, x2))
                    measured.append(time.perf_counter() - start)
                times[n] = statistics.median(measured)
            # n^2 pairs of both, and one of every input with itself.
            per_pair = (times[6] - 3 * times[2]) / (6**2 - 3 * 2**2)
            per_input = (times[2] - 2**2 * per_pair) / (2 * 2)
            x = jax.ShapeDtypeStruct((N_INPUTS, size, 2 * size), jnp.float64)
            memory: Any = jax.jit(compute).lower(x, x).compile().memory_analysis()
            used = memory.temp_size_in_bytes + memory.output_size_in_bytes
            row = [name(order), f"{size}", f"{per_pair * 1e3:.2f}", f"{per_input * 1e3:.1f}"]
            rows.append([*row, f"{used / 2**30:.2f}"])
    header = ["", "positions", "per pair (ms)", "per input (ms)"]
    return table([*header, f"memory, {N_INPUTS} x {N_INPUTS} inputs (GiB)"], rows)


EXPLANATION = """\
Largest error of `joint_second_moment` over the largest entry, against {samples:,} samples, for
random covariances with cross-correlations of {correlations}: the series to degree 2 alone, with
1,024 points per pair, and with the default number. "sampling" is the largest standard error of what
they are compared with."""

TIMES = """\
## Time and memory

NNGP and NTK with full spatial covariance under `jit`, float64, default number of points. Memory:
outputs and temporaries of the compiled function."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.position_axis", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer samples, to try it out")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/position_axis.md"))
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    n_samples, repetitions = (100_000, 1) if arguments.quick else (10_000_000, 3)
    sizes = ((4,), (8,)) if arguments.quick else ((4, 8, 16), (8, 16, 32))
    listed = ", ".join(f"{rho:g}" for rho in CORRELATIONS)
    parts = ["# Positions", environment("benchmarks.position_axis", sys.argv[1:])]
    parts += [EXPLANATION.format(samples=n_samples, correlations=listed)]
    parts += [error_table(sizes[0], n_samples), TIMES, time_table(sizes[1], repetitions)]
    publish(parts, arguments.output)


if __name__ == "__main__":
    main()
