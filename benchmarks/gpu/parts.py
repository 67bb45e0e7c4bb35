"""The parts of `benchmarks.gpu` but accuracy: each yields its section as far as it has come."""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks import attention as attentions
from benchmarks import speed
from benchmarks.report import environment, keep, precision, progress, steps, table
from benchmarks.timing import interleaved, memory
from taylor_softmax import stax
from taylor_softmax.methods import QuasiMonteCarlo

BOTH = "nngp", "ntk"
# What products of float32 matrices are made of: the names of `jax.default_matmul_precision`.
PRODUCTS = {"float32": "float32", "TF32": "tensorfloat32"}
REPETITIONS = 5

ERRORS = """\
Errors of NNGP / NTK over the largest entry, by the default method, against {points:,} points on the
same {few} x {few} inputs; all of it in float32, whose rounding is far below these errors.
Milliseconds: of NNGP and NTK of {many} x {many} inputs, over the number of pairs, the inputs' own
costs included. Both with products of matrices in float32 and in TF32,
`jax.default_matmul_precision`: the library's own products are in float32 either way, those that
neural_tangents makes of the inputs as this says. Memory: outputs and temporaries of {many} x {many}
inputs."""

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


def tokens(size: int, n: int) -> Array:
    """Two times `n` inputs of tokens of one norm, which are the first ones of a larger `n`."""
    x = np.random.default_rng(size).standard_normal((n, 2, size, 2 * size))
    x *= np.sqrt(2 * size) / np.linalg.norm(x, axis=-1, keepdims=True)
    return jnp.asarray(np.moveaxis(x, 1, 0), jnp.float32)


def compiled(kernel_fn: Any, size: int, n: int, products: str) -> functools.partial[Any]:
    """NNGP and NTK of two times `n` inputs."""
    x1, x2 = tokens(size, n)
    with jax.default_matmul_precision(PRODUCTS[products]):
        function = jax.jit(lambda x1, x2: kernel_fn(x1, x2, BOTH)).lower(x1, x2).compile()
    return functools.partial(function, x1, x2)


def measured(
    cases: Sequence[tuple[int, Any]], counts: tuple[int, int], points: int
) -> Iterator[list[str]]:
    """Of each case errors and milliseconds for each of `PRODUCTS`, and memory.

    All programs are compiled beside each other, which takes longer than to run them.

    Args:
      cases: numbers of tokens, and kernel functions of a method.
      counts: small and large numbers of inputs.
      points: of what the errors are differences from.
    """
    precision(x64=False)
    few, many = counts
    with ThreadPoolExecutor() as pool:
        exact = [
            pool.submit(compiled, kernel_fn(QuasiMonteCarlo(points)), size, few, "float32")
            for size, kernel_fn in cases
        ]
        calls = [
            {p: pool.submit(compiled, kernel_fn(None), size, many, p) for p in PRODUCTS}
            for size, kernel_fn in cases
        ]
        for truth, by_products in zip(exact, calls, strict=True):
            kernels = {p: call.result() for p, call in by_products.items()}
            wanted, errors = truth.result()(), []
            for call in kernels.values():
                pairs = (
                    (getattr(call(), kernel)[:few, :few], getattr(wanted, kernel))
                    for kernel in BOTH
                )
                each = (float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))) for x, y in pairs)
                errors.append(" / ".join(f"{error:.0e}" for error in each))
            times = interleaved(kernels, REPETITIONS)
            used = memory(kernels["float32"].func)
            yield [
                *errors,
                *(f"{min(times[p]) / many**2 * 1e3:.3f}" for p in PRODUCTS),
                f"{used / 2**30:.2f}",
            ]


HEADER = [
    *(f"error, {products}" for products in PRODUCTS),
    *(f"ms, {products}" for products in PRODUCTS),
    "GiB",
]


def table_of(
    text: str, names: Sequence[str], cases: Sequence[tuple[list[str], Any]], quick: bool
) -> Iterator[list[str]]:
    """Args: `cases` what names a row, the number of tokens first, and the kernel of a method."""
    points, counts = (256, (1, 2)) if quick else (1 << 14, (2, 16))
    lines = [text.format(points=points, few=counts[0], many=counts[1])]
    found = measured([(int(name[0]), kernel) for name, kernel in cases], counts, points)
    rows = []
    for name, _ in steps(cases, lambda case: " ".join(case[0])):
        rows.append([*name, *next(found)])
        yield [*lines, table([*names, *HEADER], rows)]


def sizes(quick: bool) -> tuple[int, ...]:
    return (4,) if quick else (16, 32, 64, 128)


def attention(quick: bool) -> Iterator[list[str]]:
    kinds = {"none": "equal scales", "causal": "causal"}
    cases = [
        ([f"{size}", mask], functools.partial(attentions.layer, kind))
        for size in sizes(quick)
        for mask, kind in kinds.items()
    ]
    yield from table_of(ATTENTION, ["tokens", "mask"], cases, quick)


def positions(quick: bool) -> Iterator[list[str]]:
    def layer(method: Any) -> Any:
        return stax.serial(stax.Conv(8, (1,)), stax.Softmax(axis=1, method=method))[2]

    cases = [([f"{size}"], layer) for size in sizes(quick)]
    yield from table_of(POSITIONS, ["positions"], cases, quick)


def layers(quick: bool) -> Iterator[list[str]]:
    n, repetitions, orders = (50, 1, (None,)) if quick else (2000, 7, (2, None))
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
