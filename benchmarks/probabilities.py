"""Errors and times of class probabilities under Gaussian logits, beside what is used elsewhere.

Run `python -m benchmarks.probabilities` on an otherwise idle machine; `--quick` tries it out.
"""

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats
from jax import Array

from benchmarks.report import options, progress, run, table
from benchmarks.timing import interleaved, medians
from oracles import probabilities as oracle
from taylor_softmax.predict import (
    class_probabilities,
    class_probability_covariance,
    expected_log_normalizer,
)

COMMAND = "benchmarks.probabilities"
N_SAMPLES = 100
N_CLASSES = 10  # of what is timed
CLASSES = (2, 3, 10, 100)
VARIANCES = (0.1, 1.0, 4.0, 10.0, 100.0)
CORRELATED_CLASSES = (3, 10, 30)
CORRELATED_VARIANCES = (1.0, 10.0, 100.0)
N_POINTS = 40  # of each number of classes and variance

Method = Callable[[Array, Array], Array]


def exact(mean: Array, variance: Array) -> Array:
    return class_probabilities(mean, variance)


def probit(mean: Array, variance: Array) -> Array:
    """MacKay 1992, eq. 26, by class: laplace-torch's `probit`, mean-field-0 of Lu, Ie & Sha."""
    return jax.nn.softmax(mean / jnp.sqrt(1 + jnp.pi / 8 * variance))


def mean_field(mean: Array, variance: Array) -> Array:
    """Mean-field-1 of Lu, Ie & Sha (arXiv 2006.07584), as laplax has it: need not sum to 1.

    Mean-field-2 takes covariances of the logits into account, and is the same without any.
    """
    difference = mean[..., :, None] - mean[..., None, :]
    variances = variance[..., :, None] + variance[..., None, :]
    return 1 / jnp.sum(jnp.exp(-difference / jnp.sqrt(1 + jnp.pi / 8 * variances)), axis=-1)


def laplace_bridge(mean: Array, variance: Array, *, corrected: bool = False) -> Array:
    """Hobbhahn, Kristiadi & Hennig (arXiv 2003.01227), eqs. 5 to 7, as in laplace-torch.

    The logits are first conditioned on summing to 0. `corrected` scales them as laplace-torch's
    `bridge_norm` does.
    """
    n = mean.shape[-1]
    total = jnp.sum(variance, axis=-1, keepdims=True)
    mean = mean - variance * jnp.sum(mean, axis=-1, keepdims=True) / total
    variance = variance - variance**2 / total
    if corrected:
        scale = jnp.mean(variance, axis=-1, keepdims=True) / np.sqrt(n / 2)
        mean, variance = mean / jnp.sqrt(scale), variance / scale
    product = jnp.exp(mean) * jnp.sum(jnp.exp(-mean), axis=-1, keepdims=True)
    alpha = (1 - 2 / n + product / n**2) / variance
    # As laplace-torch does where exponentials overflow.
    return jnp.nan_to_num(alpha / jnp.sum(alpha, axis=-1, keepdims=True), nan=1.0)


def corrected_bridge(mean: Array, variance: Array) -> Array:
    return laplace_bridge(mean, variance, corrected=True)


def monte_carlo(mean: Array, variance: Array) -> Array:
    """The mean of 100 samples; one after the other, which is faster than all at once."""
    root, key = jnp.sqrt(variance), jax.random.key(0)

    def add(i: Any, total: Array) -> Array:
        noise = jax.random.normal(jax.random.fold_in(key, i), mean.shape, mean.dtype)
        return total + jax.nn.softmax(mean + root * noise)

    return jax.lax.fori_loop(0, N_SAMPLES, add, jnp.zeros_like(mean)) / N_SAMPLES


METHODS: dict[str, Method] = {
    "class_probabilities": exact,
    "probit (mean-field-0)": probit,
    "mean-field-1 (and 2)": mean_field,
    "Laplace bridge": laplace_bridge,
    "Laplace bridge, corrected": corrected_bridge,
    f"Monte Carlo, {N_SAMPLES} samples": monte_carlo,
}


def points(n_points: int, n_classes: int, variance: float, rng: Any) -> tuple[Any, Any]:
    """Means of scale 0 to 5 and variances of up to `variance`, equal within every second point."""
    mean = rng.normal(size=(n_points, n_classes)) * rng.uniform(0, 5, (n_points, 1))
    factors = 10 ** rng.uniform(-2, 0, (n_points, n_classes))
    factors[::2] = 1
    # Representable in float32, which otherwise would be given another problem.
    return mean.astype(np.float32), (variance * factors).astype(np.float32)


def error_table(n_points: int, dtype: Any) -> str:
    rng = np.random.default_rng(0)
    problems: dict[float, list[Any]] = {variance: [] for variance in VARIANCES}
    for variance in VARIANCES:
        for n_classes in CLASSES:
            progress(f"brute force: {n_classes} classes, variance {variance:g}")
            mean, v = points(max(2, n_points * 3 // (2 + n_classes)), n_classes, variance, rng)
            want = [oracle.moments(*point) for point in zip(mean, v, strict=True)]
            sums = np.array([moments.log_normalizer for moments in want])
            problems[variance].append((mean, v, np.stack([m.first for m in want]), sums))
    rows = []
    for name, method in METHODS.items():
        method = jax.jit(method)
        row = []
        for variance in VARIANCES:
            errors = [
                np.abs(
                    np.asarray(method(jnp.asarray(m, dtype), jnp.asarray(v, dtype))) - want
                ).max()
                for m, v, want, _ in problems[variance]
            ]
            row.append(f"{max(errors):.0e}")
        rows.append([name, *row])
    row = ["expected_log_normalizer (relative above 1)"]
    for variance in VARIANCES:
        errors = [
            np.max(
                np.abs(np.asarray(expected_log_normalizer(m.astype(dtype), v.astype(dtype))) - sums)
                / np.maximum(1, np.abs(sums))
            )
            for m, v, _, sums in problems[variance]
        ]
        row.append(f"{max(errors):.0e}")
    rows.append(row)
    return table(["largest error", *(f"variance {v:g}" for v in VARIANCES)], rows)


def time_table(n_points: int, n_classes: int, repetitions: int, dtype: Any) -> str:
    rng = np.random.default_rng(1)
    mean = jnp.asarray(rng.normal(size=(n_points, n_classes)) * 3, dtype)
    methods = {
        "class_probabilities": exact,
        "class_probabilities, order=2": lambda m, v: class_probabilities(m, v, order=2),
        "class_probability_covariance": class_probability_covariance,
        "expected_log_normalizer": expected_log_normalizer,
        f"Monte Carlo, {N_SAMPLES} samples": monte_carlo,
        "probit": probit,
    }
    # Of one variance per point, as posteriors have: spread over a decade up to these.
    ranges = (1.0, 10.0, 100.0)
    spread = 10 ** rng.uniform(-1, 0, (n_points, 1))
    variances = {
        top: jnp.broadcast_to(jnp.asarray(top * spread, dtype), mean.shape) for top in ranges
    }
    compiled, rows = {}, {}
    for name, method in methods.items():
        progress(f"{np.dtype(dtype).name}: compiling {name}")
        start = time.perf_counter()
        compiled[name] = jax.jit(method).lower(mean, variances[1.0]).compile()
        rows[name] = [f"{time.perf_counter() - start:.1f}"]
    for top, variance in variances.items():
        calls = {name: partial(function, mean, variance) for name, function in compiled.items()}
        times = medians(interleaved(calls, repetitions))
        progress(f"{np.dtype(dtype).name}: variances of up to {top:g}")
        for name, seconds in times.items():
            rows[name].append(f"{seconds * 1e3:.0f}")
    header = ["", "compile (s)", *(f"variances to {top:g} (ms)" for top in ranges)]
    return table(header, [[name, *row] for name, row in rows.items()])


def correlated_probit(mean: Array, covariance: Array) -> Array:
    return probit(mean, jnp.diagonal(covariance))


def correlated_mean_field(mean: Array, covariance: Array) -> Array:
    """Mean-field-2 of Lu, Ie & Sha (arXiv 2006.07584)."""
    variance = jnp.diagonal(covariance)
    variances = variance[:, None] + variance - 2 * covariance
    difference = mean[:, None] - mean
    return 1 / jnp.sum(jnp.exp(-difference / jnp.sqrt(1 + jnp.pi / 8 * variances)), axis=-1)


def correlated_monte_carlo(mean: Array, covariance: Array) -> Array:
    noise = jax.random.normal(jax.random.key(0), (N_SAMPLES, len(mean)), mean.dtype)
    root = jnp.linalg.cholesky(covariance)
    return jnp.mean(jax.nn.softmax(mean + noise @ root.T), axis=0)


def correlated_exact(mean: Array, covariance: Array) -> Array:
    return class_probabilities(mean, covariance=covariance)


CORRELATED_METHODS: dict[str, Method] = {
    "class_probabilities": correlated_exact,
    "probit (mean-field-0)": correlated_probit,
    "mean-field-2": correlated_mean_field,
    f"Monte Carlo, {N_SAMPLES} samples": correlated_monte_carlo,
}


def correlated_table(n_points: int, log2_samples: int) -> str:
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(2)
    rows: dict[str, list[str]] = {name: [] for name in (*CORRELATED_METHODS, "reference")}
    for n_classes in CORRELATED_CLASSES:
        for variance in CORRELATED_VARIANCES:
            progress(f"full covariance: {n_classes} classes, variance {variance:g}")
            worst = dict.fromkeys(rows, 0.0)
            for _ in range(n_points):
                mean = rng.standard_normal(n_classes) * rng.uniform(0, 3)
                factor = rng.standard_normal((n_classes, 3))
                covariance = factor @ factor.T + 0.2 * np.eye(n_classes)
                covariance *= variance / np.max(np.diagonal(covariance))
                first, second = (
                    scipy.special.softmax(
                        scipy.stats.qmc.MultivariateNormalQMC(mean, covariance, rng=seed).random(
                            1 << log2_samples
                        ),
                        axis=1,
                    ).mean(0)
                    for seed in (0, 1)
                )
                want = (first + second) / 2
                worst["reference"] = max(worst["reference"], np.max(np.abs(first - want)))
                for name, method in CORRELATED_METHODS.items():
                    got = np.asarray(method(jnp.asarray(mean), jnp.asarray(covariance)))
                    worst[name] = max(worst[name], np.max(np.abs(got - want)))
            for name, error in worst.items():
                rows[name].append(f"{error:.0e}")
    header = [f"{n}, {v:g}" for n in CORRELATED_CLASSES for v in CORRELATED_VARIANCES]
    return table(["classes, variance", *header], [[name, *row] for name, row in rows.items()])


CORRELATED = """\
## Full covariance over classes

Largest absolute errors of `E[softmax(z)]` in float64. The covariance of the logits is a random
matrix of rank 3 plus 0.2 times the identity, scaled so that its largest variance is the one in the
column. The reference is the mean of two sets of {samples:,} quasi-random normal numbers of SciPy,
and half of their difference is its error."""

EXPLANATION = """\
Errors and times of `E[softmax(z)]` for independent Gaussian logits.

Errors are absolute. Each is the largest over random points of 2, 3, 10 and 100 classes, with means
of scale 0 to 5. In half of the points all classes have the variance in the column. In the others,
variances lie between a hundredth of it and itself. The reference is a trapezoidal rule in `log t`
and in the logits, which is fine enough to be exact to rounding. The approximations are written from
their sources, which `benchmarks/probabilities.py` names.

Times are medians of {repetitions} interleaved runs under `jit`, of {n} points of {classes} classes.
Each point has one variance, which lies between a tenth of the one in the column and itself. Monte
Carlo computes the probabilities alone."""


def main() -> None:
    arguments = options(COMMAND, __doc__).parse_args()
    n, repetitions, n_errors = (1000, 3, 4) if arguments.quick else (10_000, 9, N_POINTS)
    explanation = EXPLANATION.format(n=f"{n:,}", repetitions=repetitions, classes=N_CLASSES)

    def independent(x64: bool) -> list[str]:
        jax.config.update("jax_enable_x64", x64)
        dtype = jnp.float64 if x64 else jnp.float32
        tables = error_table(n_errors, dtype), time_table(n, N_CLASSES, repetitions, dtype)
        return [f"## {np.dtype(dtype).name}", *tables]

    n_correlated, log2_samples = (1, 12) if arguments.quick else (4, 19)
    parts: dict[str, Callable[[], Iterable[str]]] = {
        "float64": lambda: (explanation, *independent(x64=True)),
        "float32": lambda: independent(x64=False),
        "covariance": lambda: (
            CORRELATED.format(samples=1 << log2_samples),
            correlated_table(n_correlated, log2_samples),
        ),
    }
    run("Class probabilities", COMMAND, parts, arguments)


if __name__ == "__main__":
    main()
