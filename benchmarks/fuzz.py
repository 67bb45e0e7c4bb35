"""Random arguments, edges among them: whether values and gradients are finite and in bounds.

Run `python -m benchmarks.fuzz`; `--quick` tries it out. Softmax over classes: `benchmarks.speed`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.report import name, options, precision, progress, run, table
from taylor_softmax import joint_second_moment
from taylor_softmax.methods import QuasiMonteCarlo
from taylor_softmax.predict import (
    class_probabilities,
    class_probability_covariance,
    expected_log_normalizer,
)

COMMAND = "benchmarks.fuzz"
ORDERS = (None, 2, 8)
CLASSES = (2, 3, 10, 100)
POSITIONS = (2, 5, 7, 16, 28)
N_POINTS = 256  # a pair of inputs


def row(results: Iterator[tuple[list[Array], Array]]) -> list[str]:
    """What a table says of arrays that must be finite, and of what must be 1 or less."""
    finite, worst, size = True, 0.0, 0
    for arrays, excess in results:
        finite &= all(bool(jnp.all(jnp.isfinite(each))) for each in arrays)
        worst = max(worst, float(jnp.max(excess)))
        size += excess.size
    return [f"{size:,}", "yes" if finite else "NO", f"{worst:.0e}"]


def by_surrogate(what: str, results: Callable[..., Iterator[tuple[list[Array], Array]]]) -> str:
    """The table of `results(order, dtype)`."""
    rows = []
    for x64 in (False, True):
        dtype = precision(x64)
        for order in ORDERS:
            progress(f"{what}, {name(order)}, {np.dtype(dtype).name}")
            rows.append([name(order), np.dtype(dtype).name, *row(results(order, dtype))])
    return table(["surrogate", "dtype", what, "all finite", "sum - 1"], rows)


def logits(rng: Any, n: int, n_classes: int, dtype: Any) -> tuple[Array, Array]:
    """Means to 100 and variances to 1e4, of all sizes; equal ones, zeros, excluded classes."""
    mean = rng.standard_normal((n, n_classes)) * 10 ** rng.uniform(-3, 2, (n, 1))
    variance = 10 ** (rng.uniform(-30, 4, (n, 1)) + rng.uniform(-3, 0, (n, n_classes)))
    mean[::5] = mean[::5, :1]
    variance[1::5] = variance[1::5, :1]
    variance[2::7] = 0
    variance[3::7, 0] = 0
    mean[4::11, 0] = -np.inf
    return jnp.asarray(mean, dtype), jnp.asarray(variance, dtype)


def probabilities(size: int) -> str:
    """`size` rows of logits in all, for each order and precision."""

    def summed(mean: Array, variance: Array, order: int | None) -> tuple[Array, list[Array]]:
        p = class_probabilities(mean, variance, order=order)
        outputs = [p]
        if mean.shape[-1] <= 10:
            outputs.append(class_probability_covariance(mean, variance, order=order))
        if order is None:
            outputs.append(expected_log_normalizer(mean, variance))
        weights = jnp.cos(jnp.arange(p.shape[-1], dtype=p.dtype))
        return jnp.sum(p * weights) + sum(map(jnp.sum, outputs[1:])), outputs

    def results(order: int | None, dtype: Any) -> Iterator[tuple[list[Array], Array]]:
        gradient = jax.jit(jax.grad(summed, (0, 1), has_aux=True), static_argnums=2)
        for n_classes in CLASSES:
            rng = np.random.default_rng(n_classes)
            for _ in range(4):
                n = size // (4 * len(CLASSES))
                mean, variance = logits(rng, n, n_classes, dtype)
                gradients, outputs = gradient(mean, variance, order)
                yield [*gradients, *outputs], jnp.abs(jnp.sum(outputs[0], -1) - 1)

    return by_surrogate("rows", results)


def covariances(rng: Any, n: int, size: int, dtype: Any) -> tuple[Array, ...]:
    """Of pairs of inputs: any rank, constant and duplicated positions, a large common part."""
    rank = int(rng.integers(1, 2 * size + 1))
    x = rng.standard_normal((n, 2, size, rank)) * 10 ** rng.uniform(-4, 1, (n, 1, 1, 1))
    x[::5] = x[::5, :, :1]
    x[1::5, :, 1:2] = x[1::5, :, :1]
    x[2::5, 1] = x[2::5, 0]
    x[3::5, :, 0] = 0
    common = np.where(np.arange(n) % 3 == 0, 10 ** rng.uniform(-2, 4, n), 0.0)[:, None, None]
    # Rounded in the precision in which users compute them.
    x = x.astype(dtype)
    first, second = x[:, 0], x[:, 1]
    pairs = (first, first), (first, second), (second, second)
    # NumPy, which computes in `dtype` too.
    made = ((a @ b.swapaxes(-1, -2) + common).astype(dtype) for a, b in pairs)
    return tuple(map(jnp.asarray, made))


def positions(size: int) -> str:
    """`size` pairs of inputs in all, for each order and precision."""

    def summed(order: int | None, *given: Array) -> tuple[Array, Array]:
        method = None if order == 2 else QuasiMonteCarlo(N_POINTS)
        moment = joint_second_moment(*given, order=order, method=method)
        weights = jnp.cos(jnp.arange(moment[0].size, dtype=moment.dtype))
        return jnp.sum(moment.reshape(len(moment), -1) * weights), moment

    def results(order: int | None, dtype: Any) -> Iterator[tuple[list[Array], Array]]:
        gradient = jax.jit(
            lambda *given: jax.grad(lambda *g: summed(order, *g), (0, 1, 2), has_aux=True)(*given)
        )
        shares = 1 / np.array(POSITIONS)
        for n_positions, share in zip(POSITIONS, shares / shares.sum(), strict=True):
            rng = np.random.default_rng(n_positions)
            at_once = max(20, 400 // n_positions)
            for _ in range(int(np.ceil(size * share / at_once))):
                given = covariances(rng, at_once, n_positions, dtype)
                gradients, moment = gradient(*given)
                yield [*gradients, moment], jnp.abs(jnp.sum(moment, (-2, -1)) - 1)

    return by_surrogate("pairs", results)


PROBABILITIES = """\
## Class probabilities

Random logits of 2 to 100 classes go through `class_probabilities`, through its covariance (up to 10
classes) and, for softmax, through `expected_log_normalizer`. Means have any size up to a few
hundred, and variances go from 1e-33 to 1e4. Some logits are equal, some have variance 0, some are
excluded (`-inf`). "all finite" counts gradients in means and variances, too. "sum - 1" is the
largest distance of a sum of probabilities from 1."""

SECOND_MOMENTS = """\
## Positions

Random covariances of 2 to 28 positions go through `joint_second_moment`; there are fewer pairs of
inputs where there are more positions. Covariances have any rank. Some positions are constant, zero
or duplicates, some inputs are paired with themselves, and some logits share a part with a variance
of up to 1e4. "all finite" counts gradients in the three covariances, too. "sum - 1" is the largest
distance of the sum of a matrix from 1."""


def main() -> None:
    arguments = options(COMMAND, __doc__).parse_args()
    n_rows, n_pairs = (1_600, 600) if arguments.quick else (170_000, 17_000)
    parts: dict[str, Callable[[], Iterable[str]]] = {
        "probabilities": lambda: (PROBABILITIES, probabilities(n_rows)),
        "positions": lambda: (SECOND_MOMENTS, positions(n_pairs)),
    }
    run("Fuzzing", COMMAND, parts, arguments)


if __name__ == "__main__":
    main()
