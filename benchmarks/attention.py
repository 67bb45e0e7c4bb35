"""Error, time and memory of attention at 1/sqrt(d).

Run `python -m benchmarks.attention` on an otherwise idle machine; `--quick` tries it out.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.report import options, precision, progress, run, table
from oracles import attention as oracle
from taylor_softmax import attention_second_moment, stax
from taylor_softmax.methods import QuasiMonteCarlo

COMMAND = "benchmarks.attention"
VARIANCES = (0.25, 1.0, 4.0)
POINTS = (512, 2048, 8192)
DEFAULT_POINTS = 2048
MANY_POINTS = 1 << 15
N_PROBLEMS = 4  # random ones, of which the largest error is reported
COUNTS = 2, 6  # inputs, of which blocks are timed
N_INPUTS, N_TOKENS = 100, 64  # of which memory is reported


def kernels(problem: oracle.Problem, n_points: int, causal: bool = False) -> list[np.ndarray]:
    size = problem.present.shape[1]
    own = (slice(size),) * 2, (slice(size), slice(size, None)), (slice(size, None),) * 2
    moments = attention_second_moment(
        *(problem.keys[of] for of in own),
        values12=problem.values[own[1]],
        ntk12=problem.keys_ntk[own[1]],
        values_ntk12=problem.values_ntk[own[1]],
        scale=problem.scale,
        causal=causal,
        method=QuasiMonteCarlo(n_points),
    )
    return [np.asarray(moments.nngp), np.asarray(moments.ntk)]


def deviation(values: list[np.ndarray], truths: Any) -> list[float]:
    """Largest error over the largest entry, of NNGP and NTK."""
    return [
        float(np.max(np.abs(value - truth)) / np.max(np.abs(truth)))
        for value, truth in zip(values, truths, strict=True)
    ]


def error_table(sizes: tuple[int, ...]) -> str:
    precision(x64=True)
    rows = []
    for size in sizes:
        for name, ratio, causal in (("equal", 1.0, False), ("by 6", 6.0, False), ("", 6.0, True)):
            if causal and size > sizes[0]:
                continue
            for variance in VARIANCES:
                progress(f"{size} tokens, variance {variance:g}, {name or 'causal'}")
                errors = []
                for seed in range(N_PROBLEMS):
                    problem = oracle.random_problem(
                        size, variance=variance, ratio=ratio, seed=10 * seed
                    )
                    truth = kernels(problem, MANY_POINTS, causal)
                    errors.append([deviation(kernels(problem, n, causal), truth) for n in POINTS])
                worst = np.max(errors, 0)
                listed = (f"{nngp:.0e} / {ntk:.0e}" for nngp, ntk in worst)
                rows.append([f"{size}", name or "causal", f"{variance:g}", *listed])
    header = ["tokens", "variances of queries", "of logits", *(f"{n:,} points" for n in POINTS)]
    return table(header, rows)


def sampling_table(sizes: tuple[int, ...], n_samples: int) -> str:
    """The default against plain sampling, with its standard error."""
    precision(x64=True)
    rows = []
    for size in sizes:
        for variance in VARIANCES:
            progress(f"{size} tokens, variance {variance:g}, sampling")
            problem = oracle.random_problem(size, variance=variance)
            truth = oracle.kernels(problem, n_samples=n_samples)
            errors = deviation(kernels(problem, DEFAULT_POINTS), (truth.nngp, truth.ntk))
            spread = (
                float(np.max(stderr) / np.max(np.abs(mean)))
                for mean, stderr in zip(truth[::2], truth[1::2], strict=True)
            )
            listed = (f"{e:.0e} ({s:.0e})" for e, s in zip(errors, spread, strict=True))
            rows.append([f"{size}", f"{variance:g}", *listed])
    return table(["tokens", "variance", "NNGP", "NTK"], rows)


def layer(causal: bool, method: Any = None) -> Any:
    attention = stax.GlobalSelfAttention(
        8, 8, 8, 2, linear_scaling=False, causal=causal, method=method
    )
    return stax.serial(stax.Dense(8), attention)[2]


def compiled(size: int, n: int, get: Any, causal: bool, varying: bool, method: Any = None) -> Any:
    """The layer's kernel of two times `n` inputs."""
    x = np.random.default_rng(size).standard_normal((2, n, size, 2 * size))
    x *= np.sqrt(2 * size) / np.linalg.norm(x, axis=-1, keepdims=True)
    if varying:
        x *= np.linspace(0.6, 1.5, size)[:, None]
    x1, x2 = jnp.asarray(x, jnp.float32)
    kernel_fn = layer(causal, method)
    function = jax.jit(lambda x1, x2: kernel_fn(x1, x2, get)).lower(x1, x2).compile()
    return functools.partial(function, x1, x2)


def time_table(sizes: tuple[int, ...], repetitions: int) -> str:
    """Milliseconds a block, of one pair of inputs and all pairs of queries."""
    # Where there is float64 at all, neural_tangents makes it of everything.
    precision(x64=False)
    rows = []
    for size in sizes:
        for name, causal, varying in (
            ("equal", False, False),
            ("varying", False, True),
            ("causal", True, True),
        ):
            if causal and size > 16:
                continue
            row = [f"{size}", name]
            for get in ("nngp", ("nngp", "ntk")):
                progress(f"{size} tokens, {name}, {get}")
                make = functools.partial(compiled, size, get=get, causal=causal, varying=varying)
                row.append(f"{timing.per_pair(make, COUNTS, repetitions) * 1e3:.2f}")
            rows.append(row)
    return table(["tokens", "scales of queries", "NNGP", "NNGP and NTK"], rows)


def memory() -> str:
    precision(x64=False)
    kernel_fn = layer(causal=False)
    x = jax.ShapeDtypeStruct((N_INPUTS, N_TOKENS, 8), jnp.float32)
    function = jax.jit(lambda x1, x2: kernel_fn(x1, x2, ("nngp", "ntk")))
    used = timing.memory(function.lower(x, x).compile()) / 2**30
    return (
        "## Memory\n\n"
        f"NNGP and NTK of {N_INPUTS} x {N_INPUTS} inputs of {N_TOKENS} tokens, outputs and "
        f"temporaries: {used:.2f} GiB."
    )


ERRORS = """\
## Errors

Largest error over the largest entry, NNGP / NTK, of {n} random problems (correlation 0.5 between
inputs, values and NTKs with covariances of their own), against {many:,} points."""

SAMPLING = """\
## Against plain sampling

With the default number of points, against {n:,} samples of all logits (standard errors)."""

TIMES = """\
## Time

Milliseconds a block: all pairs of queries of one pair of inputs; float32, default number of points.
Each input costs as much as a few blocks besides."""


def main() -> None:
    arguments = options(COMMAND, __doc__).parse_args()
    quick = arguments.quick
    n_samples, repetitions = (20_000, 1) if quick else (2_000_000, 5)
    parts: dict[str, Callable[[], Iterable[str]]] = {
        "errors": lambda: (
            ERRORS.format(n=N_PROBLEMS, many=MANY_POINTS),
            error_table((8,) if quick else (8, 16, 32, 64)),
        ),
        "sampling": lambda: (
            SAMPLING.format(n=n_samples),
            sampling_table((8,) if quick else (8, 16), n_samples),
        ),
        "times": lambda: (TIMES, time_table((16,) if quick else (8, 16, 32, 64), repetitions)),
        "memory": lambda: (memory(),),
    }
    run("Attention", COMMAND, parts, arguments)


if __name__ == "__main__":
    main()
