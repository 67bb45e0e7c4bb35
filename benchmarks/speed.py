"""Time and memory of softmax over classes beside neural-tangents' `Erf`, first calls included.

Run `python -m benchmarks.speed` on an otherwise idle machine; `--quick` tries it out.
"""

import argparse
import functools
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import taylor_softmax
from benchmarks.report import name, options, precision, progress, run, table
from benchmarks.timing import interleaved, medians, memory, seconds
from taylor_softmax import monte_carlo, stax

COMMAND = "benchmarks.speed"
ORDERS = (2, 8, 32, None)
CLASSES = (2, 10, 1000)
# Ranges of the logits' variances.
SPREADS = {
    "equal": (1.0, 1.0),
    "factor 10": (10**-0.5, 10**0.5),
    "to 4": (4e-6, 4.0),
    "to 100": (1e-4, 100.0),
    "to 1e4": (1e-2, 1e4),
}
# Inputs of few dimensions: pairs of them have all correlations, not only those near 0.
DIMENSION = 8
BIAS = 0.1


def softmax(order: int | None) -> Any:
    return stax.Softmax() if order is None else stax.TaylorSoftmax(order)


def inputs(n: int, spread: str, dtype: Any, seed: int = 0) -> Array:
    """Inputs, in random order, at which the logits' variances are spread geometrically."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, DIMENSION))
    # Without biases the variance of the logits is the mean square of the input.
    x /= np.sqrt(np.mean(x**2, axis=1, keepdims=True))
    variances = rng.permutation(np.geomspace(*SPREADS[spread], n))
    return jnp.asarray(x * np.sqrt(variances)[:, None], dtype)


def compiled(layer: Any, n_classes: int, x: Array) -> tuple[Callable[[Any], Any], int]:
    """The layer's NNGP and NTK of kernels like `logits`, and bytes of results and temporaries."""

    def kernels(logits: Any) -> tuple[Array, Array]:
        kernel = layer[2](logits)
        return kernel.nngp, kernel.ntk

    executable = jax.jit(kernels).lower(logits(n_classes, x)).compile()
    return executable, memory(executable)


def logits(n_classes: int, x: Array) -> Any:
    """Their kernel, of all pairs."""
    return stax.Dense(n_classes)[2](x, x[::-1])


def layers(
    n: int,
    repetitions: int,
    classes: tuple[int, ...],
    orders: tuple[int | None, ...] = ORDERS,
) -> Iterator[str]:
    """Time and memory of the layer alone over those of Erf, in one run."""
    for x64 in (False, True):
        dtype, rows = precision(x64), []
        x = {spread: inputs(n, spread, dtype) for spread in SPREADS}
        for n_classes in classes:
            kernels = {spread: logits(n_classes, x[spread]) for spread in SPREADS}
            erf, erf_size = compiled(stax.Erf(), n_classes, x["equal"])
            for order in orders:
                progress(f"{np.dtype(dtype).name}, {n_classes} classes, {name(order)}")
                one, size = compiled(softmax(order), n_classes, x["equal"])
                row, times = [f"{name(order)}, {n_classes}"], {"erf": 0.0}
                for kernel in kernels.values():
                    functions = {
                        key: functools.partial(function, kernel)
                        for key, function in {"one": one, "erf": erf}.items()
                    }
                    times = medians(interleaved(functions, repetitions, limit=5.0))
                    row.append(f"{times['one'] / times['erf']:.2f}")
                rows.append([*row, f"{times['erf'] * 1e3:.2f}", f"{size / erf_size:.2f}"])
        header = ["surrogate, classes", *SPREADS, "Erf (ms)", "memory"]
        yield f"### {np.dtype(dtype).name}\n\n{table(header, rows)}"


def first_call(order: str, n: int, jit: bool, x64: bool) -> str:
    """Seconds, in this process, of the first calls of Erf, of a layer, and of another order."""
    x = inputs(n, "factor 10", precision(x64))
    stax.Dense(10)[2](x, None)
    surrogate = None if order == "softmax" else int(order)
    times = []
    for layer in (stax.Erf(), softmax(surrogate), softmax(4)):
        kernel_fn = stax.serial(stax.Dense(10), layer)[2]

        def call(kernel_fn: Any = kernel_fn) -> Any:
            return kernel_fn(x, None, ("nngp", "ntk"))

        times.append(seconds(jax.jit(call) if jit else call))
    return " ".join(f"{each:.2f}" for each in times)


def first_calls(quick: bool) -> str:
    rows = []
    sizes = (5, 50) if quick else (5, 50, 2000)
    for n, order, jit, x64 in itertools.product(
        sizes, ("2", "softmax"), (False, True), (False, True)
    ):
        arguments = ["--first-call", order, str(n), str(int(jit)), str(int(x64))]
        command = [sys.executable, "-m", "benchmarks.speed", *arguments]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        erf, one, other = map(float, result.stdout.split())
        label = f"{n} x {n}, {order if order == 'softmax' else f'order {order}'}"
        row = [label, "jit" if jit else "eager", "float64" if x64 else "float32"]
        rows.append([*row, f"{erf:.2f}", f"{one - erf:+.2f}", f"{other - erf:+.2f}"])
        progress(f"first call: {', '.join(rows[-1])}")
    header = ["inputs, layer", "call", "dtype", "Erf (s)", "softmax", "then order 4"]
    return table(header, rows)


def hyperparameters(sizes: list[int], repetitions: int) -> str:
    """A Gaussian marginal likelihood and its gradient in `W_std`, `b_std`, beside Erf's."""
    rows = []
    for x64, n in itertools.product((False, True), sizes):
        dtype = precision(x64)
        x = inputs(n, "equal", dtype)
        y = jnp.asarray(np.random.default_rng(1).choice([-1.0, 1.0], n), dtype)

        def evidence(scales: Array, layer: Any, x: Array = x, y: Array = y) -> Array:
            kernel_fn = stax.serial(
                stax.Dense(1, W_std=scales[0], b_std=scales[1]),
                stax.Relu(),
                stax.Dense(10, W_std=scales[0], b_std=scales[1]),
                layer,
            )[2]
            nngp: Any = kernel_fn(x, None, "nngp")
            root = jnp.linalg.cholesky(nngp + 1e-2 * jnp.eye(len(x), dtype=x.dtype))
            solved = jax.scipy.linalg.solve_triangular(root, y, lower=True)
            return -0.5 * solved @ solved - jnp.sum(jnp.log(jnp.diagonal(root)))

        scales = jnp.asarray([1.4, BIAS], dtype)
        functions, first = {}, {}
        for key, layer in {
            "erf": stax.Erf(),
            "order 2": softmax(2),
            "softmax": softmax(None),
        }.items():
            gradient = jax.jit(jax.value_and_grad(lambda s, layer=layer: evidence(s, layer)))
            functions[key] = lambda gradient=gradient, scales=scales: gradient(scales)
            first[key] = seconds(functions[key])
        times = medians(interleaved(functions, repetitions, limit=10.0))
        for key in ("order 2", "softmax"):
            row = [f"{key}, {n:,} inputs", np.dtype(dtype).name, f"{first[key]:.1f}"]
            row += [f"{times[key] * 1e3:.0f}", f"{times['erf'] * 1e3:.0f}"]
            rows.append([*row, f"{times[key] / times['erf']:.2f}"])
    return table(["layer", "dtype", "first call (s)", "ms", "Erf (ms)", "ratio"], rows)


def growth(sizes: list[int], repetitions: int) -> str:
    rows, dtype = [], precision(False)
    for n in sizes:
        x = inputs(n, "factor 10", dtype)
        functions = {
            key: functools.partial(compiled(layer, 10, x)[0], logits(10, x))
            for key, layer in {2: softmax(2), None: softmax(None), "erf": stax.Erf()}.items()
        }
        times = medians(interleaved(functions, repetitions, limit=10.0))
        rows.append([f"{n:,}", *(f"{each / n**2 * 1e9:.1f}" for each in times.values())])
    return table(["inputs", "order 2 (ns/pair)", "softmax (ns/pair)", "Erf (ns/pair)"], rows)


def definiteness(n: int) -> str:
    """Smallest over largest eigenvalue; duplicates, near duplicates, norms over three decades."""
    rows = []
    for x64, order, n_classes in itertools.product((False, True), (2, 8, None), (2, 10)):
        dtype = precision(x64)
        rng = np.random.default_rng(2)
        x = rng.standard_normal((n, 20)) * 10 ** rng.uniform(-2, 1, (n, 1))
        x[: n // 10] = x[n // 10 : 2 * (n // 10)]
        x[-n // 10 :] = x[: n // 10] + 1e-4 * rng.standard_normal((n // 10, 20))
        layer = softmax(order)
        kernel: Any = stax.serial(stax.Dense(n_classes), layer)[2](jnp.asarray(x, dtype), None)
        row = [f"{name(order)}, {n_classes} classes", np.dtype(dtype).name]
        for matrix in (kernel.nngp, kernel.ntk):
            eigenvalues = np.linalg.eigvalsh(np.asarray(matrix, float))
            row.append(f"{eigenvalues[0] / eigenvalues[-1]:.0e}")
        rows.append(row)
    return table(["surrogate", "dtype", "NNGP", "NTK"], rows)


def fuzz(size: int) -> str:
    """Values and gradients at random arguments, some of them at the edges."""
    rows = []
    for x64, order, n in itertools.product(
        (False, True), (None, 2, 4, 8, 20, 32), (2, 3, 10, 1000, 1_000_000)
    ):
        dtype = precision(x64)
        rng = np.random.default_rng(n)
        var1, var2 = 10 ** rng.uniform(-8, 6, (2, size // 60))
        var1[::7], var2[::11] = 0, var1[::11]
        rho = rng.uniform(-1, 1, var1.size)
        rho[::5], rho[1::5] = 1 + 2 * float(jnp.finfo(dtype).eps), -1
        rho[2::5] = 1 - 10 ** rng.uniform(-8, 0, rho[2::5].size)
        a, b = jnp.asarray(var1, dtype), jnp.asarray(var2, dtype)
        c = jnp.asarray(rho, dtype) * jnp.sqrt(a) * jnp.sqrt(b)

        def total(a: Array, c: Array, b: Array, order: Any = order, n: int = n) -> Any:
            value = taylor_softmax.class_covariance(a, c, b, n_classes=n, order=order)
            return jnp.sum(value), value

        gradients, value = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(a, c, b)
        scaled = n * np.asarray(value, float)
        finite = all(np.all(np.isfinite(each)) for each in (value, *gradients))
        low = -np.min(scaled[rho >= 0], initial=0.0) if order is None else 0.0
        over = np.max(np.abs(scaled)) - 1
        rows.append((order, np.dtype(dtype).name, finite, over, low))
    lines = []
    for order, dtype in itertools.product((None, 2, 4, 8, 20, 32), ("float32", "float64")):
        chosen = [row for row in rows if row[:2] == (order, dtype)]
        line = [name(order), dtype, "yes" if all(row[2] for row in chosen) else "NO"]
        line += [f"{max(row[k] for row in chosen):.0e}" for k in (3, 4)]
        lines.append(line)
    return table(["surrogate", "dtype", "all finite", "n abs(I) - 1", "below 0 (softmax)"], lines)


def sampling(repetitions: int) -> str:
    """Samples that Monte Carlo needs for a relative standard error of 1e-3, and their time."""
    rows, dtype, side, n_samples = [], precision(True), 8, 20_000
    for order in (2, 8, None):
        x = inputs(side, "factor 10", dtype)
        logits: Any = stax.Dense(10)[2](x, x[::-1])
        pairs = logits.cov1[:, None], logits.nngp, logits.cov2

        def draw(pairs: Any = pairs, order: Any = order) -> Any:
            return monte_carlo.class_second_moment(
                jax.random.key(0), *pairs, n_classes=10, order=order, n_samples=n_samples
            )

        mean, stderr = draw()
        time = statistics.median(seconds(draw) for _ in range(repetitions))
        needed = n_samples * float(np.median(np.asarray(stderr / mean)[..., 0, 0]) / 1e-3) ** 2
        per_pair = time / side**2 / n_samples * needed
        rows.append([name(order), f"{needed:.0e}", f"{per_pair:.1e}"])
    return table(["surrogate", "samples", "seconds a pair"], rows)


EXPLANATION = """\
How long a layer takes for NNGP and NTK of {n:,} x {n:,} inputs, over what `stax.Erf` takes. The
kernel of the logits is given, and `jit` has compiled both. Times are medians of {repetitions}
interleaved rounds. Columns are the variances of the logits: all 1 ("equal"), spread geometrically
over a factor of 10 around 1, or over six decades that end at 4, 100 and 1e4. "memory" is that of
results and temporaries, over that of Erf."""

FIRST = """\
## First calls

Seconds of the first NNGP and NTK of `Dense(10)` and a layer. Every row comes from a fresh process,
which has evaluated a dense layer before. It calls Erf first, then the layer in the first column,
then order 4. The last two columns are what these take longer than Erf."""

HYPERPARAMETERS = """\
## Hyperparameters

A Gaussian marginal likelihood and its gradient in `W_std` and `b_std`, by
`jax.jit(jax.value_and_grad(...))`. The network is `Dense, Relu, Dense` and the layer."""

GROWTH = """\
## Growth

Time for each pair of inputs, in float32 and with 10 classes. The kernel of the logits is given, and
their variances are spread over a factor of 10."""

DEFINITENESS = """\
## Definiteness

The smallest eigenvalue over the largest, of kernels of {n:,} inputs. A tenth of the inputs are
duplicates of others, another tenth differ from others by 1e-4, and norms are spread over three
decades."""

FUZZ = """\
## Fuzz

{size:,} random arguments of `class_covariance`, of 2 to 1e6 classes. Variances go from 1e-8 to
1e6, and some are 0. Correlations go from -1 to 1, and some are above 1 by two units of rounding.
"all finite" counts values and gradients. The last two columns say by how much values leave their
bounds."""

SAMPLING = """\
## Monte Carlo

Samples and seconds that `monte_carlo.class_second_moment` takes until the median pair has a
relative standard error of 1e-3."""


def main() -> None:
    parser = options(COMMAND, __doc__)
    parser.add_argument("--first-call", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.first_call:
        order, n, jit, x64 = arguments.first_call
        print(first_call(order, int(n), bool(int(jit)), bool(int(x64))))
        return
    quick = arguments.quick
    n, repetitions, size = (300, 3, 60_000) if quick else (2000, 7, 1_000_000)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    parts: dict[str, Callable[[], Iterable[str]]] = {
        "layers": lambda: (
            *("## Layers", EXPLANATION.format(n=n, repetitions=repetitions)),
            *layers(n, repetitions, CLASSES[:1] if quick else CLASSES),
        ),
        "first": lambda: (FIRST, first_calls(quick)),
        "hyperparameters": lambda: (
            HYPERPARAMETERS,
            hyperparameters([100] if quick else [300, 1000], repetitions),
        ),
        "growth": lambda: (
            GROWTH,
            growth([200, 400] if quick else [1000, 2000, 4000, 8000], repetitions),
        ),
        "definiteness": lambda: (DEFINITENESS.format(n=n // 2), definiteness(n // 2)),
        "fuzz": lambda: (FUZZ.format(size=size), fuzz(size)),
        "sampling": lambda: (SAMPLING, sampling(3)),
    }
    run("Speed", COMMAND, parts, arguments)


if __name__ == "__main__":
    main()
