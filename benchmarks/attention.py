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
from taylor_softmax import attention_second_moment, nn, stax
from taylor_softmax.methods import QuasiMonteCarlo

COMMAND = "benchmarks.attention"
VARIANCES = (0.25, 1.0, 4.0)
POINTS = (512, 2048, 8192)
MANY_POINTS = 1 << 15
N_PROBLEMS = 4  # random ones, of which the largest error is reported
COUNTS = 2, 6  # inputs, of which blocks are timed
N_INPUTS, N_TOKENS = 100, 64  # of which memory is reported

# Arguments of attention, how much the variances of tokens differ, and up to how many tokens errors
# and times are reported.
KINDS: dict[str, tuple[dict[str, Any], float, int, int]] = {
    "equal scales": ({}, 1.0, 64, 64),
    "scales by 6": ({}, 6.0, 64, 64),
    "causal": ({"causal": True}, 6.0, 32, 64),
    "window of 9": ({"window": 4}, 1.0, 16, 64),
    "ALiBi, causal": ({"causal": True, "bias": functools.partial(nn.alibi, 1)}, 1.0, 16, 64),
    "rotary": ({"rotary": 10000.0}, 1.0, 16, 64),
    "rotary, causal": ({"rotary": 10000.0, "causal": True}, 1.0, 8, 32),
    "cross": ({}, 1.0, 16, 64),
}


def problem_of(name: str, size: int, variance: float, seed: int) -> oracle.Problem:
    """A random problem; queries of half as many tokens for cross-attention."""
    if name == "cross":
        n_queries, n_keys = (size // 2, size // 2), (size, size)
        return oracle.crossing_problem(n_queries, n_keys, variance=variance, seed=seed)
    return oracle.random_problem(size, variance=variance, ratio=KINDS[name][1], seed=seed)


def kernels(name: str, problem: oracle.Problem, n_points: int | None) -> list[np.ndarray]:
    given: dict[str, Any] = {**problem.covariances(), **KINDS[name][0]}
    method = QuasiMonteCarlo(n_points)
    moments = attention_second_moment(**given, scale=problem.scale, method=method)
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
        for name, (_, _, largest, _) in KINDS.items():
            if size > largest:
                continue
            for variance in VARIANCES:
                progress(f"{size} tokens, variance {variance:g}, {name}")
                errors = []
                for seed in range(N_PROBLEMS):
                    problem = problem_of(name, size, variance, 10 * seed)
                    truth = kernels(name, problem, MANY_POINTS)
                    errors.append([deviation(kernels(name, problem, n), truth) for n in POINTS])
                worst = np.max(errors, 0)
                listed = (f"{nngp:.0e} / {ntk:.0e}" for nngp, ntk in worst)
                rows.append([f"{size}", name, f"{variance:g}", *listed])
    return table(["tokens", "attention", "variance", *(f"{n:,} points" for n in POINTS)], rows)


def sampling_table(sizes: tuple[int, ...], n_samples: int) -> str:
    """The default against plain sampling, with its standard error."""
    precision(x64=True)
    rows = []
    for size in sizes:
        for variance in VARIANCES:
            progress(f"{size} tokens, variance {variance:g}, sampling")
            problem = problem_of("equal scales", size, variance, 0)
            truth = oracle.kernels(problem, n_samples=n_samples)
            values = kernels("equal scales", problem, None)
            errors = deviation(values, (truth.nngp, truth.ntk))
            spread = (
                float(np.max(stderr) / np.max(np.abs(mean)))
                for mean, stderr in zip(truth[::2], truth[1::2], strict=True)
            )
            listed = (f"{e:.0e} ({s:.0e})" for e, s in zip(errors, spread, strict=True))
            rows.append([f"{size}", f"{variance:g}", *listed])
    return table(["tokens", "variance", "NNGP", "NTK"], rows)


def layer(name: str, method: Any = None) -> Any:
    given = {**KINDS[name][0], "method": method}
    if name == "cross":
        both = stax.parallel(stax.Dense(8), stax.Dense(8))
        attend = stax.GlobalCrossAttention(8, 8, 8, 2, **given)
        return stax.serial(stax.FanOut(2), both, attend)[2]
    attend = stax.GlobalSelfAttention(8, 8, 8, 2, linear_scaling=False, **given)
    return stax.serial(stax.Dense(8), attend)[2]


def compiled(name: str, size: int, n: int, get: Any, method: Any = None) -> Any:
    """The layer's kernel of two times `n` inputs."""
    x = np.random.default_rng(size).standard_normal((2, n, size, 2 * size))
    x *= np.sqrt(2 * size) / np.linalg.norm(x, axis=-1, keepdims=True)
    if KINDS[name][1] > 1:
        x *= np.linspace(0.6, 1.5, size)[:, None]
    x1, x2 = jnp.asarray(x, jnp.float32)
    kernel_fn = layer(name, method)
    function = jax.jit(lambda x1, x2: kernel_fn(x1, x2, get)).lower(x1, x2).compile()
    return functools.partial(function, x1, x2)


def time_table(sizes: tuple[int, ...], repetitions: int) -> str:
    """Milliseconds a block, of one pair of inputs and all pairs of queries, and an input."""
    # Where there is float64 at all, neural_tangents makes it of everything.
    precision(x64=False)
    rows = []
    for size in sizes:
        for name, (_, _, _, largest) in KINDS.items():
            if size > largest:
                continue
            row = [f"{size}", name]
            for get in ("nngp", ("nngp", "ntk")):
                progress(f"{size} tokens, {name}, {get}")
                make = functools.partial(compiled, name, size, get=get)
                pair = timing.per_pair(make, COUNTS, repetitions)
                row.append(f"{pair * 1e3:.2f}")
            # n^2 pairs of both and 2 n of inputs with themselves, beside 2 n inputs.
            n = COUNTS[0]
            whole = min(timing.interleaved({n: make(n)}, repetitions)[n])
            rows.append([*row, f"{(whole - n * (n + 2) * pair) / (2 * n) * 1e3:.1f}"])
    return table(["tokens", "attention", "NNGP", "NNGP and NTK", "an input"], rows)


def memory() -> str:
    precision(x64=False)
    kernel_fn = layer("causal")
    x = jax.ShapeDtypeStruct((N_INPUTS, N_TOKENS, 8), jnp.float32)
    function = jax.jit(lambda x1, x2: kernel_fn(x1, x2, ("nngp", "ntk")))
    used = timing.memory(function.lower(x, x).compile()) / 2**30
    return (
        "## Memory\n\n"
        f"NNGP and NTK of {N_INPUTS} x {N_INPUTS} inputs of {N_TOKENS} tokens, causal, outputs and "
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

Milliseconds of a block, all pairs of queries of one pair of inputs, and of the preparation of one
input; float32, default number of points. Cross-attention has as many queries as keys. Before one
sample served all pairs of queries, a causal block of 16 tokens took 92 ms (NNGP) and 180 ms (both)
on two cores."""


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
