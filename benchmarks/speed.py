"""Time, memory and error of the softmax layers' kernels beside neural-tangents' own layers.

Run `python -m benchmarks.speed` on an otherwise idle machine; `--quick` tries it out.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.report import environment, progress, publish, table
from taylor_softmax import monte_carlo, stax
from taylor_softmax.methods import Direct

N_CLASSES = 10
# Inputs of few dimensions: pairs of them have all correlations, not only those near 0.
DIMENSION = 8
# Ranges of the logits' variances. Six decades go up to 4, where the documented error changes.
SPREADS = {"equal": (1.0, 1.0), "factor 10": (10**-0.5, 10**0.5), "six decades": (4e-6, 4.0)}
BODY = (stax.Dense(512, W_std=2**0.5), stax.Relu(), stax.Dense(N_CLASSES))
BODY_KERNEL = jax.jit(stax.serial(*BODY)[2])
# One repetition that takes long says enough: no more begin after this many seconds of a case.
SECONDS_PER_CASE = 20.0
TARGET = 1e-3  # relative standard error of Monte Carlo


class Layer(NamedTuple):
    name: str
    layer: Any
    reference: Any  # the same layer, evaluated as accurately as it can be
    mean: float = 0.0  # of an output


@dataclass
class Case:
    """A compiled kernel function and its arguments."""

    layer: Layer
    scope: str
    spread: str
    executable: Any
    arguments: tuple[Any, ...]
    compile_time: float
    memory: int
    times: list[float] = field(default_factory=list)

    def median(self) -> float:
        return statistics.median(self.times)


def taylor(order: int) -> Layer:
    layer, reference = stax.TaylorSoftmax(order), stax.TaylorSoftmax(order, method=Direct())
    return Layer(f"TaylorSoftmax({order})", layer, reference, 1 / N_CLASSES)


def numerical(deg: int) -> Any:
    with warnings.catch_warnings():
        # Given to every user of the layer: that it is inexact, and that it differentiates.
        warnings.filterwarnings("ignore", message="Numerical Activation Layer")
        warnings.filterwarnings("ignore", message="Using JAX autodiff")
        return stax.ElementwiseNumerical(jax.nn.sigmoid, deg=deg)


ERF = Layer("Erf", stax.Erf(), stax.Erf())
TAYLOR_2, TAYLOR_8 = taylor(2), taylor(8)
SOFTMAX = Layer("Softmax", stax.Softmax(), stax.Softmax(method=Direct()), 1 / N_CLASSES)
NUMERICAL = Layer("ElementwiseNumerical", numerical(10), numerical(60), 0.5)


def inputs(n: int, spread: str, dtype: Any, seed: int) -> Array:
    """Inputs, in random order, at which the logits' variances are spread geometrically."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, DIMENSION))
    # Without biases the variance of the logits is the mean square of the input.
    x /= np.sqrt(np.mean(x**2, axis=1, keepdims=True))
    variances = rng.permutation(np.geomspace(*SPREADS[spread], n))
    return jnp.asarray(x * np.sqrt(variances)[:, None], dtype)


def on_logits(layer: Any, kernel: Any) -> tuple[Array, Array]:
    result = layer[2](kernel)
    return result.nngp, result.ntk


def compiled(layer: Any, scope: str, arguments: tuple[Any, ...]) -> tuple[Any, float, int]:
    """Compiled function, seconds for tracing and compilation, bytes of outputs and temporaries."""
    network = stax.serial(*BODY, layer)[2]
    functions = {
        "layer": lambda kernel: on_logits(layer, kernel),
        "network": lambda x1, x2: network(x1, x2, ("nngp", "ntk")),
    }
    start = time.perf_counter()
    executable = jax.jit(functions[scope]).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory: Any = executable.memory_analysis()
    return executable, seconds, memory.temp_size_in_bytes + memory.output_size_in_bytes


def free_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def make_cases(
    n: int,
    dtype: Any,
    layers: Sequence[Layer],
    spreads: Iterable[str] = ("factor 10",),
    scopes: Sequence[str] = ("layer",),
) -> list[Case]:
    data = {s: (inputs(n, s, dtype, 1), inputs(n, s, dtype, 2)) for s in spreads}
    given = {"layer": {s: (BODY_KERNEL(*x),) for s, x in data.items()}, "network": data}
    cases = []
    for layer, scope in itertools.product(layers, scopes):
        progress(f"{np.dtype(dtype).name}, {n} inputs: compiling {layer.name}, {scope}")
        # One executable for every spread: it only sees numbers.
        arguments = next(iter(given[scope].values()))
        executable, seconds, memory = compiled(layer.layer, scope, arguments)
        if jax.default_backend() == "cpu" and memory > 0.8 * free_memory():
            progress(f"left out, since it needs {memory / 2**30:.0f} GiB of free memory")
            continue
        for spread, arguments in given[scope].items():
            cases.append(Case(layer, scope, spread, executable, arguments, seconds, memory))
    return cases


def measure(cases: list[Case], repetitions: int) -> None:
    """Times every case once per round, so that drift of the machine hits all of them alike."""
    for repetition in range(repetitions):
        progress(f"round {repetition + 1} of {repetitions}")
        for case in cases:
            if sum(case.times) < SECONDS_PER_CASE:
                seconds = run(case)
                # The first run after another function's also pays for getting memory back from the
                # system: after one that needs gigabytes, several times its own cost.
                case.times.append(run(case) if seconds < 1 else seconds)


def run(case: Case) -> float:
    start = time.perf_counter()
    jax.block_until_ready(case.executable(*case.arguments))
    return time.perf_counter() - start


def errors(case: Case) -> tuple[float, float]:
    """Largest errors of NNGP and NTK on a subset of entries, relative to correlation 1.

    That is, to what the layer gives for perfectly correlated logits of the same variances and the
    same incoming NTK; of the NNGP the part beyond the square of the mean output.
    """
    (kernel,) = case.arguments
    chosen = np.random.default_rng(3).permutation(len(kernel.cov1))[:24]

    def block(matrix: Any) -> np.ndarray:
        return np.asarray(matrix, np.float64)[np.ix_(chosen, chosen)]

    nngp, ntk = map(block, case.executable(kernel))
    x64 = jax.config.read("jax_enable_x64")
    # The reference is in float64 whatever the precision, at the very numbers the layer was given.
    jax.config.update("jax_enable_x64", True)
    try:
        var1, var2 = (jnp.asarray(np.asarray(v, float)[chosen]) for v in (kernel.cov1, kernel.cov2))
        aligned = kernel.replace(
            cov1=var1,
            cov2=var2,
            # Just below 1: derivatives of numerical quadrature are not finite there.
            nngp=jnp.sqrt(jnp.outer(var1, var2)) * (1 - 1e-12),
            ntk=jnp.asarray(block(kernel.ntk)),
        )
        given = aligned.replace(nngp=jnp.asarray(block(kernel.nngp)))
        # NumPy's before JAX goes back to float32, which would round them.
        exact = [np.asarray(x) for x in on_logits(case.layer.reference, given)]
        largest = [np.asarray(x) for x in on_logits(case.layer.reference, aligned)]
    finally:
        jax.config.update("jax_enable_x64", x64)
    return (
        float(np.max(np.abs((nngp - exact[0]) / (largest[0] - case.layer.mean**2)))),
        float(np.max(np.abs((ntk - exact[1]) / largest[1]))),
    )


def layers_table(cases: list[Case]) -> str:
    header = ["layer", "scope", "variances", "compile (s)", "min (ms)", "median (ms)", "/ Erf"]
    header += ["memory (MiB)", "/ Erf", "NNGP error", "NTK error"]
    references = {(c.scope, c.spread): c for c in cases if c.layer is ERF}
    rows = []
    for case in cases:
        reference = references[case.scope, case.spread]
        row = [case.layer.name, case.scope, case.spread, f"{case.compile_time:.1f}"]
        row += [f"{min(case.times) * 1e3:.1f}", f"{case.median() * 1e3:.1f}"]
        row += [f"{case.median() / reference.median():.1f}", f"{case.memory / 2**20:.0f}"]
        row += [f"{case.memory / reference.memory:.1f}"]
        row += [f"{e:.0e}" for e in errors(case)] if case.scope == "layer" else ["", ""]
        rows.append(row)
    return table(header, rows)


def growth_table(sizes: list[int], dtype: Any, layers: list[Layer], repetitions: int) -> str:
    rows = []
    for n in sizes:
        cases = make_cases(n, dtype, layers)
        measure(cases, repetitions)
        rows.append([f"{n:,}", *(f"{case.median() / n**2 * 1e9:.1f}" for case in cases)])
    return table(["inputs", *(f"{layer.name} (ns/pair)" for layer in layers)], rows)


def pair_by_pair(order: int | None, dtype: Any) -> tuple[float, float]:
    """Samples needed for `TARGET` at the median pair, and seconds per sample and pair."""
    side, n_samples = 8, 20_000
    kernel = BODY_KERNEL(*(inputs(side, "factor 10", dtype, seed) for seed in (1, 2)))
    pairs = kernel.cov1[:, None], kernel.nngp, kernel.cov2
    for seed in (0, 1):  # the first compiles
        start = time.perf_counter()
        mean, stderr = monte_carlo.class_second_moment(
            jax.random.key(seed), *pairs, n_classes=N_CLASSES, order=order, n_samples=n_samples
        )
        relative = np.asarray(stderr / mean)[..., 0, 0]
        seconds = time.perf_counter() - start
    return n_samples * float(np.median(relative) / TARGET) ** 2, seconds / side**2 / n_samples


def shared(layer: Layer, dtype: Any) -> tuple[float, float]:
    """The same where all pairs share samples of all inputs' outputs, averaged over classes."""
    side, n_samples = 512, 256
    x = jnp.concatenate([inputs(side, "factor 10", dtype, seed) for seed in (1, 2)])
    covariance: Any = BODY_KERNEL(x, None).nngp
    root = jnp.linalg.cholesky(covariance + 1e-6 * jnp.eye(2 * side, dtype=dtype))

    @jax.jit
    def outputs(key: Array) -> tuple[Array, Array]:
        normal = jax.random.normal(key, (n_samples, N_CLASSES, 2 * side), dtype)
        y = layer.layer[1]((), jnp.moveaxis(normal @ root.T, 1, 2))
        return y[:, :side], y[:, side:]

    @jax.jit
    def estimate(key: Array) -> Array:
        return jnp.einsum("sic,sjc->ij", *outputs(key)) / (n_samples * N_CLASSES)

    few = [y[:, :32] for y in outputs(jax.random.key(0))]
    samples = np.asarray(jnp.einsum("sic,sjc->sij", *few)) / N_CLASSES
    relative = np.std(samples, axis=0) / np.mean(samples, axis=0)
    for seed in (0, 1):  # the first compiles
        start = time.perf_counter()
        jax.block_until_ready(estimate(jax.random.key(seed)))
        seconds = time.perf_counter() - start
    return float(np.median(relative) / TARGET) ** 2, seconds / side**2 / n_samples


def monte_carlo_table(cases: list[Case], n: int, dtype: Any) -> str:
    rows = []
    for layer, order in ((TAYLOR_2, 2), (TAYLOR_8, 8), (SOFTMAX, None)):
        times = [
            case.median() / n**2
            for case in cases
            if (case.layer, case.scope, case.spread) == (layer, "layer", "factor 10")
        ]
        for analytic, method in itertools.product(times, ("pair by pair", "shared samples")):
            progress(f"Monte Carlo for {layer.name}, {method}")
            measured = shared(layer, dtype) if "shared" in method else pair_by_pair(order, dtype)
            seconds = measured[0] * measured[1]
            row = [layer.name, method, f"{measured[0]:.0e}", f"{seconds * 1e9:.1e}"]
            row += [f"{seconds * n**2:,.0f}", f"{analytic * 1e9:.0f}"]
            rows.append([*row, f"{seconds / analytic:.0e}"])
    header = ["layer", "sampling", "samples needed", "extrapolated (ns/pair)"]
    header += [f"extrapolated, {n:,} x {n:,} (s)", "analytic (ns/pair)", "ratio"]
    return table(header, rows)


EXPLANATION = """\
NNGP and NTK of {n:,} x {n:,} inputs under `jit`, up to {repetitions} interleaved repetitions.
Scope "network" is `Dense(512), Relu(), Dense({classes})` and the layer; "layer" is the layer alone,
on the logits' kernel. Variances of the logits: all 1; spread geometrically over a factor 10 around
1; over six decades up to 4. Compilation includes tracing. Memory: outputs and temporaries of the
compiled function. "/ Erf": ratio of medians, and of memory, to the `Erf` row of the same scope and
variances. Error: the largest on 24 x 24 entries, relative to the value at correlation 1 (the
NNGP's less the squared mean output), against `method=Direct()` in float64. In float32 the NNGP
contains 1/n^2, whose rounding alone is large beside the covariance at variances of 1e-5.

`ElementwiseNumerical` is `stax.ElementwiseNumerical(jax.nn.sigmoid, deg=10)`: an elementwise layer,
no softmax nor an approximation of one. Its error is that against its own rule of deg=60."""

GROWTH = """\
### Growth

Layer alone, variances spread over a factor 10. A time per pair that does not rise is growth no
faster than the number of pairs."""

MONTE_CARLO = """\
### Monte Carlo

NNGP by sampling to a relative standard error of 1e-3 of the same-class entry, for the median pair
at variances spread over a factor 10; beside it the measured time of the analytic NNGP and NTK.
Extrapolated from the spread and the time of fewer samples on a small block. "Pair by pair" is
`monte_carlo.class_second_moment`, 8 x 8 pairs, which estimates every pair of classes; "shared
samples" draws the outputs at all of 512 + 512 inputs jointly, and averages over classes."""


def benchmark(arguments: argparse.Namespace, x64: bool) -> str:
    jax.config.update("jax_enable_x64", x64)
    dtype: Any = np.float64 if x64 else np.float32
    n, repetitions, quick = arguments.inputs, arguments.repetitions, arguments.quick
    layers = [ERF, TAYLOR_2, NUMERICAL] if quick else [ERF, TAYLOR_2, TAYLOR_8, SOFTMAX, NUMERICAL]
    cases = make_cases(n, dtype, layers, SPREADS, ("layer", "network"))
    measure(cases, repetitions)
    sections = [f"## {np.dtype(dtype).name}", layers_table(cases)]
    if x64 or arguments.x64 is False:  # once
        growing, sizes = [ERF, TAYLOR_2], [n // 2, n]
        if not quick:
            growing, sizes = [*growing, SOFTMAX], [*sizes, 2 * n]
        sections += [GROWTH, growth_table(sizes, dtype, growing, repetitions)]
        sections += [MONTE_CARLO, monte_carlo_table(cases, n, dtype)]
    return "\n\n".join(sections)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, help="per side of the matrix (2000)")
    parser.add_argument("--repetitions", type=int, help="of every measurement (7)")
    x64 = argparse.BooleanOptionalAction
    parser.add_argument("--x64", action=x64, help="one precision only (both; quick: float64)")
    parser.add_argument("--quick", action="store_true", help="fewer layers, small, to try it out")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/speed.md"))
    arguments = parser.parse_args(argv)
    arguments.inputs = arguments.inputs or (200 if arguments.quick else 2000)
    arguments.repetitions = arguments.repetitions or (3 if arguments.quick else 7)
    if arguments.quick and arguments.x64 is None:
        arguments.x64 = True
    return arguments


def main() -> None:
    arguments = parse(sys.argv[1:])
    n, repetitions = arguments.inputs, arguments.repetitions
    explanation = EXPLANATION.format(n=n, repetitions=repetitions, classes=N_CLASSES)
    parts = ["# Speed", environment("benchmarks.speed", sys.argv[1:]), explanation]
    precisions = (True, False) if arguments.x64 is None else (arguments.x64,)
    parts += [benchmark(arguments, x64) for x64 in precisions]
    publish(parts, arguments.output)


if __name__ == "__main__":
    main()
