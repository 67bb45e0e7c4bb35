"""The parts of `benchmarks.gpu` but accuracy: each yields its section as far as it has come."""

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks import attention as attentions
from benchmarks import position_axis, speed
from benchmarks.report import environment, keep, precision, progress, steps, table
from benchmarks.timing import interleaved, memory, per_pair
from taylor_softmax import stax
from taylor_softmax.methods import QuasiMonteCarlo

T = TypeVar("T")
BOTH = "nngp", "ntk"
# What products of float32 matrices are made of: the names of `jax.default_matmul_precision`.
PRODUCTS = {"float32": "float32", "TF32": "tensorfloat32"}
REPETITIONS = 5

ERRORS = """\
Errors of NNGP / NTK over the largest entry, in float32 by the default method, against {points:,}
points in float64 on the same {few} x {few} inputs. Milliseconds of NNGP and NTK together, from
{few} x {few} and {many} x {many} inputs, inputs' own costs left out. Both with products of
matrices in float32 and in TF32, `jax.default_matmul_precision`: the library's own products are in
float32 either way, those that neural_tangents makes of the inputs as this says. Memory: outputs
and temporaries of {many} x {many} inputs."""

ATTENTION = "## Attention\n\nAll pairs of queries of one pair of inputs.\n\n" + ERRORS
POSITIONS = "## Positions\n\n" + ERRORS

LAYERS = """\
## Softmax over classes beside Erf

NNGP and NTK of {n:,} x {n:,} inputs under `jit`, the layer alone on its logits' kernel: time over
that of `stax.Erf`; columns as in the report of speed on a CPU."""

TILES = """\
## {n:,} inputs

NNGP and NTK of `Dense, Relu, Dense(10)` and the last layer, {n:,} inputs of {features} features,
float32: the products of both kernels with a vector, by tiles of {size:,} x {size:,} of which none
is stored; compilation left out. The memory of this device moves {rate:,.0f} GB/s (`a = b + 2 c`,
bytes read and written); "bytes" are those that it would move in the time of a pair: with 8, the two
numbers of a pair, it would be the memory that is waited for."""

INFERENCE = """\
## Inference

`categorical_inference` of {n:,} digits, shifted by a pixel, in float64; {n_test} others for the
test. The network is that of the report of inference; time of one fit, without compilation."""


def together(makes: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """The results of all of them, from a thread each: what they do is compile."""
    with ThreadPoolExecutor() as pool:
        futures = {name: pool.submit(make) for name, make in makes.items()}
        return {name: future.result() for name, future in futures.items()}


def with_products(products: str, make: Callable[[int], T], n: int) -> T:
    with jax.default_matmul_precision(PRODUCTS[products]):
        return make(n)


def measured(
    exact: Callable[[int], Any], make: Callable[[int], Any], counts: tuple[int, int]
) -> list[str]:
    """Errors and milliseconds for each of `PRODUCTS`, and memory.

    Args:
      exact, make: the number of inputs to a call for the kernel of all pairs of them; `exact` in
        float64.
      counts: small and large numbers of inputs.
    """

    def kernels(call: Callable[[], Any]) -> list[np.ndarray]:
        kernel = call()
        return [np.asarray(kernel.nngp, float), np.asarray(kernel.ntk, float)]

    precision(x64=True)
    truth = kernels(exact(counts[0]))
    precision(x64=False)
    calls = together(
        {
            f"{products}, {n}": functools.partial(with_products, products, make, n)
            for products in PRODUCTS
            for n in counts
        }
    )
    cells = []
    for products in PRODUCTS:
        values = zip(kernels(calls[f"{products}, {counts[0]}"]), truth, strict=True)
        errors = (np.max(np.abs(value - x)) / np.max(np.abs(x)) for value, x in values)
        cells.append(" / ".join(f"{error:.0e}" for error in errors))
    for products in PRODUCTS:
        seconds = per_pair(
            lambda n, products=products: calls[f"{products}, {n}"], counts, REPETITIONS
        )
        cells.append(f"{seconds * 1e3:.3f}")
    used = memory(calls[f"float32, {counts[1]}"].func)
    return [*cells, f"{used / 2**30:.2f}"]


HEADER = [
    *(f"error, {products}" for products in PRODUCTS),
    *(f"ms, {products}" for products in PRODUCTS),
    "GiB",
]


def attention(quick: bool) -> Iterator[list[str]]:
    sizes, counts, points = ((4,), (1, 2), 256) if quick else ((16, 32, 64, 128), (2, 8), 1 << 14)
    few, many = counts
    text, rows = ATTENTION.format(points=points, few=few, many=many), []
    cases = [(size, causal) for size in sizes for causal in (False, True)]
    for size, causal in steps(cases, str):
        kind = "causal" if causal else "equal scales"
        make: Any = functools.partial(attentions.compiled, kind, size, get=BOTH)
        exact = functools.partial(make, method=QuasiMonteCarlo(points))
        rows.append([f"{size}", "causal" if causal else "none", *measured(exact, make, counts)])
        yield [text, table(["tokens", "mask", *HEADER], rows)]


def positions(quick: bool) -> Iterator[list[str]]:
    sizes, counts, points = ((4,), (1, 2), 256) if quick else ((16, 32, 64, 128), (2, 8), 1 << 15)
    few, many = counts
    text, rows = POSITIONS.format(points=points, few=few, many=many), []
    for size in steps(sizes, str):
        make = functools.partial(position_axis.kernel, size, None, BOTH, np.float32)
        exact: Any = functools.partial(
            position_axis.kernel, size, None, BOTH, np.float64, method=QuasiMonteCarlo(points)
        )
        rows.append([f"{size}", *measured(exact, make, counts)])
        yield [text, table(["positions", *HEADER], rows)]


def layers(quick: bool) -> Iterator[list[str]]:
    n, repetitions, orders = (50, 1, (None,)) if quick else (2000, 7, speed.ORDERS)
    lines = [LAYERS.format(n=n)]
    for each in speed.layers(n, repetitions, (10,), orders):
        lines.append(each)
        yield lines


def memory_rate(size: int) -> float:
    """Bytes a second that a device's memory moves, of three arrays of `size` floats."""
    b, c = jnp.ones((2, size), jnp.float32)
    triad = jax.jit(lambda b, c: b + 2 * c)
    times = interleaved({0: functools.partial(triad, b, c)}, REPETITIONS)[0]
    return 3 * b.nbytes / min(times)


def kernel_products(kernel_fn: Any, size: int) -> Callable[[Array, Array], Array]:
    """`(x, v)` to `K v` of NNGP and NTK of all pairs of inputs `x`, `(2, len(x))`.

    By tiles of `size x size`, whose number has to be whole. One row of tiles is compiled.
    """

    @jax.jit
    def row(x1: Array, x: Array, v: Array) -> Array:
        def add(total: Array, tile: tuple[Array, Array]) -> tuple[Array, None]:
            kernel = kernel_fn(x1, tile[0], BOTH)
            return total + jnp.stack([kernel.nngp @ tile[1], kernel.ntk @ tile[1]]), None

        return lax.scan(add, jnp.zeros((2, size), x.dtype), (x, v))[0]

    def product(x: Array, v: Array) -> Array:
        x, v = x.reshape(-1, size, x.shape[-1]), v.reshape(-1, size)
        return jnp.concatenate([row(each, x, v) for each in x], axis=1)

    return product


def network(last: Any) -> Any:
    body = stax.Dense(512, 2**0.5, 0.1), stax.Relu(), stax.Dense(10, 2.0)
    return stax.serial(*body, last)[2]


def tiles(quick: bool) -> Iterator[list[str]]:
    n, features, size, floats = (200, 10, 100, 1 << 16) if quick else (60_000, 784, 6_000, 1 << 28)
    precision(x64=False)
    rate = memory_rate(floats)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((n, features)), jnp.float32)
    x *= jnp.asarray(rng.uniform(0.5, 1.5, (n, 1)), jnp.float32)
    v = jnp.asarray(rng.standard_normal(n), jnp.float32)
    text = TILES.format(n=n, features=features, size=size, rate=rate / 1e9)
    rows = []
    layers = {"Softmax()": stax.Softmax(), "Erf()": stax.Erf()}
    for last, products in steps([(last, p) for last in layers for p in PRODUCTS], str):
        with jax.default_matmul_precision(PRODUCTS[products]):
            product = kernel_products(network(layers[last]), size)
            (seconds,) = interleaved({0: functools.partial(product, x, v)}, 1)[0]
        row = [last, products, f"{seconds:.2f}", f"{n**2 / seconds:.2e}"]
        rows.append([*row, f"{rate * seconds / n**2:,.0f}"])
        header = ["last layer", "products", "seconds", "pairs a second", "bytes"]
        yield [text, table(header, rows)]


def inference(quick: bool) -> Iterator[list[str]]:
    from benchmarks import inference as inferences

    n, n_test = (40, 20) if quick else (2000, 500)
    precision(x64=True)
    images, labels = inferences.shuffled()
    images = images - images.mean(0)
    images = images / np.sqrt(np.mean(images**2))
    x, y = inferences.shifts(images[n_test:], labels[n_test:])
    some = np.random.default_rng(0).permutation(len(x))[:n]
    row = inferences.fit((x[some], y[some]), (images[:n_test], labels[:n_test]))
    yield [
        INFERENCE.format(n=n, n_test=n_test),
        table(["inputs", *inferences.FIT], [[str(n), *row]]),
    ]


PARTS = {
    "attention": attention,
    "positions": positions,
    "layers": layers,
    "tiles": tiles,
    "inference": inference,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.parts", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args(argv)
    on_gpu = jax.devices()[0].platform == "gpu"
    heading = (
        "# Report: all parts on a GPU"
        if on_gpu
        else "# Report: what the program for GPUs does without one"
    )
    given = ["--only", arguments.part, *(["--quick"] if arguments.quick else [])]
    for lines in PARTS[arguments.part](arguments.quick):
        # The command of the whole, which a reader can repeat.
        section = [*lines, environment("benchmarks.gpu", given)]
        keep(arguments.part, section, heading, PARTS, arguments.to / "gpu.md")
    progress(f"{arguments.part}: done")


if __name__ == "__main__":
    main()
