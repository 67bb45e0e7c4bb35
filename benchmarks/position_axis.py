"""Error, time and smallest eigenvalue of softmax over positions.

Run `python -m benchmarks.position_axis` on an otherwise idle machine; `--quick` tries it out.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from benchmarks.report import name, options, precision, progress, run, table
from benchmarks.timing import interleaved, medians, per_pair
from oracles import position_axis as oracle
from taylor_softmax import class_covariance, joint_second_moment, monte_carlo, stax
from taylor_softmax._numerics.surrogate import parse
from taylor_softmax._position_axis import moments
from taylor_softmax.methods import QuasiMonteCarlo, Series

COMMAND = "benchmarks.position_axis"
VARIANCES = (0.25, 1.0, 4.0)
CORRELATIONS = (-0.9, 0.5, 0.95, 0.999)
ORDERS = (4, 8, None)
ASKED_CORRELATIONS = (-1.0, 0.0, 0.5, 0.95, 1.0)
N_EIGEN = 30


def covariances(size: int, kind: str, variance: float) -> tuple[np.ndarray, ...]:
    """`K11, K12, K22`, one of each cross-correlation."""
    problems = [oracle.problem(size, kind, variance, rho, size) for rho in CORRELATIONS]
    return tuple(np.stack(each) for each in list(zip(*problems, strict=True))[:3])


def unit(one: Any, two: Any) -> Any:
    """What errors are relative to: of the largest entries of both inputs' own kernels."""
    return np.sqrt(one) * np.sqrt(two)


def error_table(sizes: tuple[int, ...], n_samples: int) -> str:
    """Largest error, with the standard error of what it is held against."""
    rows = []
    for size in sizes:
        for kind in ("random", "singular", "low rank"):
            for variance in VARIANCES:
                row = [f"{size}", kind, f"{variance:g}"]
                given = covariances(size, kind, variance)
                for order in ORDERS:
                    progress(f"{size} positions, {kind}, variance {variance:g}, {name(order)}")
                    mean, stderr = (
                        np.asarray(each)
                        for each in monte_carlo.joint_second_moment(
                            random.key(0), *given, order=order, n_samples=n_samples
                        )
                    )
                    own = (joint_second_moment(x, x, x, order=order) for x in given[::2])
                    largest = unit(*(np.max(x, (1, 2), keepdims=True) for x in own))
                    for method in (Series(), QuasiMonteCarlo(1024), None):
                        value = joint_second_moment(*given, order=order, method=method)
                        row.append(f"{np.max(np.abs(value - mean) / largest):.1e}")
                    row.append(f"{np.max(stderr / largest):.0e}")
                rows.append(row)
    columns = ("series", "1,024", "default", "sampling")
    header = [f"{name(o)}: {c}" for o in ORDERS for c in columns]
    return table(["positions", "covariances", "variance", *header], rows)


def layer_kernels(of: oracle.Problem, order: int | None) -> list[np.ndarray]:
    """NNGP and NTK of the layer on logits as in `of`, whose NTK is their covariance."""
    joint = np.block([[of.cov11, of.cov12], [of.cov12.T, of.cov22]])
    values, vectors = np.linalg.eigh(joint)
    # `Conv` divides by the number of channels.
    x = vectors * np.sqrt(np.maximum(values, 0) * len(joint))
    x1, x2 = (jnp.asarray(each)[None] for each in np.split(x, 2))
    kernel_fn = stax.serial(stax.Conv(1, (1,)), stax.TaylorSoftmax(order, axis=1))[2]
    kernel: Any = kernel_fn(x1, x2, ("nngp", "ntk"))
    return [np.asarray(each[0, 0]) for each in (kernel.nngp, kernel.ntk)]


def ntk_table(sizes: tuple[int, ...], n_samples: int) -> str:
    """Largest errors of the layer's kernels, and the standard error."""
    rows = []
    for size in sizes:
        for variance in VARIANCES:
            row = [f"{size}", f"{variance:g}"]
            of = oracle.problem(size, variance=variance, rho=0.95, seed=size)
            of = of._replace(theta=of.cov12)
            for order in (2, *ORDERS):
                progress(f"NTK, {size} positions, variance {variance:g}, {name(order)}")
                sampled = oracle.sample(of, order=order, n_samples=n_samples)
                each = (of._replace(cov11=k, cov12=k, cov22=k) for k in (of.cov11, of.cov22))
                own = ([np.max(k) for k in layer_kernels(one, order)] for one in each)
                units = map(unit, *own)
                kernels = layer_kernels(of, order)
                for value, (mean, stderr), largest in zip(kernels, sampled, units, strict=True):
                    error, noise = np.max(np.abs(value - mean)), np.max(stderr)
                    row.append(f"{error / largest:.1e} ({noise / largest:.0e})")
            rows.append(row)
    header = [f"{name(o)}: {kernel}" for o in (2, *ORDERS) for kernel in ("NNGP", "NTK")]
    return table(["positions", "variance", *header], rows)


def asked_table(sizes: tuple[int, ...], asked: tuple[float, ...], repetitions: int) -> str:
    """Errors that were asked for beside true ones, of i.i.d. positions, and time."""
    surrogate, rows = parse(None), []
    index = np.arange(len(ASKED_CORRELATIONS))

    for size in sizes:
        of_classes = functools.partial(class_covariance, n_classes=size)
        exact = jax.vmap(jax.value_and_grad(of_classes, 1), (None, 0, None))
        centred = np.eye(size) - 1 / size
        for variance in (*VARIANCES, 20.0):
            row = [f"{size}", f"{variance:g}"]
            cov12 = variance * np.array(ASKED_CORRELATIONS)
            at = exact(variance, cov12, variance)
            # Value and NTK, of which the last pair, at correlation 1, is the unit.
            wanted = [np.asarray(x)[:, None, None] * centred for x in (at[0], variance * at[1])]
            wanted[0] += 1 / size**2
            dtype = precision(False)
            covs = jnp.asarray(variance * np.eye(size), dtype)[None]
            cross = jnp.asarray(cov12[:, None, None] * np.eye(size), dtype)
            theta = jnp.broadcast_to(covs, cross.shape)
            for error in (None, *asked):
                progress(f"asked, {size} positions, variance {variance:g}, {error}")
                method = QuasiMonteCarlo(error=error)
                one = moments.prepare(
                    covs, jnp.ones((1, size), dtype), surrogate=surrogate, method=method
                )
                draw = functools.partial(
                    moments.second_moments,
                    *(one, one, 0 * index, 0 * index, cross, theta, surrogate, method),
                )
                seconds = medians(interleaved({0: draw}, repetitions))[0] / len(index)
                found = draw()
                for got, want, said in zip(found[:2], wanted, np.max(found.error, 0), strict=True):
                    true = np.max(np.abs(got - want)) / np.max(want[-1])
                    row.append(f"{true:.1e} ({said:.0e})")
                row.append(f"{seconds * 1e3:.2g}")
            precision(True)
            rows.append(row)
    what = ("default", *(f"{error:g}" for error in asked))
    columns = ("NNGP", "NTK", "ms")
    return table(["positions", "variance", *(f"{w}: {c}" for w in what for c in columns)], rows)


def kernel(
    size: int,
    order: int | None,
    get: str | tuple[str, ...],
    dtype: Any,
    n: int,
    method: Any = None,
) -> Any:
    """The layer's kernel of two times `n` inputs, compiled."""
    layer = stax.TaylorSoftmax(order, axis=1, method=method)
    kernel_fn = stax.serial(stax.Conv(8, (1,)), layer)[2]
    # The same in both precisions.
    shape = n, size, 2 * size
    x1, x2 = (random.normal(random.key(i), shape, np.float32).astype(dtype) for i in (1, 2))
    function = jax.jit(lambda x1, x2: kernel_fn(x1, x2, get)).lower(x1, x2).compile()
    return functools.partial(function, x1, x2)


def time_table(sizes: tuple[int, ...], repetitions: int, counts: tuple[int, int]) -> str:
    """Time per pair of inputs."""
    rows = []
    for size in sizes:
        for order in (2, None):
            row = [name(order), f"{size}"]
            for x64 in (False, True):
                # Where there is float64 at all, neural_tangents makes it of everything.
                dtype = precision(x64)
                for get in ("nngp", ("nngp", "ntk")):
                    progress(f"{size} positions, {name(order)}, {get}")
                    make = functools.partial(kernel, size, order, get, dtype)
                    row.append(f"{per_pair(make, counts, repetitions) * 1e3:.2f}")
            progress(f"{size} positions, sampling")
            row.append(_sampling(size, order, repetitions))
            rows.append(row)
    header = [f"{d}, {what} (ms)" for d in ("float32", "float64") for what in ("NNGP", "both")]
    return table(["", "positions", *header, "sampling, NNGP (ms)"], rows)


def _sampling(size: int, order: int | None, repetitions: int) -> str:
    """Time per pair of plain sampling with a standard error of 2e-3 of the largest entry."""
    given = tuple(jnp.asarray(x, jnp.float32) for x in oracle.problem(size)[:3])
    n_samples = 20_000

    def draw() -> Any:
        return monte_carlo.joint_second_moment(
            random.key(0), *given, order=order, n_samples=n_samples
        )

    mean, stderr = draw()
    seconds = medians(interleaved({0: draw}, repetitions))[0]
    needed = (float(jnp.max(stderr) / jnp.max(mean)) / 2e-3) ** 2
    return f"{seconds * needed * 1e3:.0f}"


def eigenvalue_table(sizes: tuple[int, ...], n: int) -> str:
    """Smallest eigenvalue over the largest of the kernel of `n` inputs, flattened."""
    rows = []
    for size in sizes:
        for order in (2, None):
            progress(f"eigenvalues, {size} positions, {name(order)}")
            layer = stax.TaylorSoftmax(order, axis=1)
            kernel_fn = stax.serial(stax.Conv(8, (1,)), layer, stax.Flatten())[2]
            x = random.normal(random.key(1), (n, size, 2 * size))
            kernel: Any = kernel_fn(x, None, ("nngp", "ntk"))
            values = [np.linalg.eigvalsh(np.asarray(k)) for k in (kernel.nngp, kernel.ntk)]
            rows.append([name(order), f"{size}", *(f"{v[0] / v[-1]:.1e}" for v in values)])
    return table(["", "positions", "NNGP", "NTK"], rows)


EXPLANATION = """\
## Errors

Largest errors of `joint_second_moment` against {samples:,} samples, at cross-correlations of
{correlations}: of the series to degree 2 alone, with 1,024 points for each pair, and with the
default number of points. "sampling" is the largest standard error of the samples. All are relative
to the geometric mean of the largest entries of both inputs' own kernels."""

ASKED = """\
## Errors asked for

Largest errors at correlations {correlations}, of the default and of `QuasiMonteCarlo(error=...)`.
Positions are i.i.d., so kernels over classes are an exact reference. The error that the library
itself states is in brackets. If it is larger than what was asked for, the library has drawn all the
points that it may; `n_points` allows more. Errors are relative to the largest entry at correlation
1. The incoming NTK is as large as the covariance. Times are milliseconds a pair for both kernels,
in float32."""

LAYERS = """\
## NNGP and NTK

Largest errors of the layer with the default method, against {samples:,} samples by NumPy and their
negatives. The largest standard error of the samples is in brackets. Logits have a correlation of
0.95, and their NTK is their covariance. Errors are relative to the geometric mean of the largest
entries of both inputs' own kernels."""

TIMES = """\
## Time per pair

Time for each pair of inputs under `jit`, with the covariance of all positions and the default
number of points, from {few} x {few} and {many} x {many} inputs. The last column is what plain
sampling takes for a standard error of 2e-3 of the largest entry."""

EIGENVALUES = """\
## Smallest eigenvalue

The smallest eigenvalue over the largest, of the kernel of {n} inputs behind `Flatten`."""


def main() -> None:
    arguments = options(COMMAND, __doc__).parse_args()
    jax.config.update("jax_enable_x64", True)
    quick = arguments.quick
    n_samples, repetitions = (50_000, 1) if quick else (10_000_000, 3)
    sizes = ((2,), (4,), (4,), (4,))
    if not quick:
        sizes = ((2, 8, 16, 64), (8, 16, 32, 64), (8, 16), (2, 16, 64))
    asked = (1e-2,) if quick else (1e-2, 3e-3)
    (few, many), n = ((2, 3), 4) if quick else ((4, 12), N_EIGEN)
    n_pairs = 5_000 if quick else 400_000
    listed, asked_correlations = (
        ", ".join(f"{rho:g}" for rho in each) for each in (CORRELATIONS, ASKED_CORRELATIONS)
    )
    parts: dict[str, Callable[[], Iterable[str]]] = {
        "errors": lambda: (
            EXPLANATION.format(samples=n_samples, correlations=listed),
            error_table(sizes[0], n_samples),
        ),
        "layers": lambda: (LAYERS.format(samples=n_pairs), ntk_table(sizes[2], n_pairs)),
        "asked": lambda: (
            ASKED.format(correlations=asked_correlations),
            asked_table(sizes[3], asked, repetitions),
        ),
        "times": lambda: (
            TIMES.format(few=few, many=many),
            time_table(sizes[1], repetitions, (few, many)),
        ),
        "eigenvalues": lambda: (EIGENVALUES.format(n=n), eigenvalue_table(sizes[2], n)),
    }
    run("Positions", COMMAND, parts, arguments)


if __name__ == "__main__":
    main()
