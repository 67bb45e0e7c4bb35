"""Error, time and memory of attention at 1/sqrt(d).

Run `python -m benchmarks.attention` on an otherwise idle machine; `--quick` tries it out.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
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
VARIANCES = (0.25, 1.0, 4.0, 20.0)
ASKED = 2e-3  # error
MANY_POINTS = 1 << 14
N_PROBLEMS = 2  # random ones, of which the largest error is reported
# Inputs of which blocks are timed: as many as make blocks count beside the preparation of inputs,
# and few where a block takes long.
MANY, FEW = (2, 8), (1, 4)
N_INPUTS, N_TOKENS = 100, 64  # of which memory is reported

# Arguments of attention, and how much the variances of tokens differ.
KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "equal scales": ({}, 1.0),
    "scales by 6": ({}, 6.0),
    "causal": ({"causal": True}, 6.0),
    "window of 9": ({"window": 4}, 1.0),
    "ALiBi, causal": ({"causal": True, "bias": functools.partial(nn.alibi, 1)}, 1.0),
    "rotary": ({"rotary": 10000.0}, 1.0),
    "rotary, causal": ({"rotary": 10000.0, "causal": True}, 1.0),
    "cross": ({}, 1.0),
}


def problem_of(name: str, size: int, variance: float, seed: int) -> oracle.Problem:
    """A random problem; queries of half as many tokens for cross-attention."""
    if name == "cross":
        n_queries, n_keys = (size // 2, size // 2), (size, size)
        return oracle.crossing_problem(n_queries, n_keys, variance=variance, seed=seed)
    return oracle.random_problem(size, variance=variance, ratio=KINDS[name][1], seed=seed)


def kernels(name: str, problem: oracle.Problem, method: QuasiMonteCarlo) -> list[np.ndarray]:
    given: dict[str, Any] = {**problem.covariances(), **KINDS[name][0]}
    moments = attention_second_moment(**given, scale=problem.scale, method=method)
    return [np.asarray(moments.nngp), np.asarray(moments.ntk)]


def scales(name: str, problem: oracle.Problem) -> np.ndarray:
    """Of NNGP and NTK: geometric means of the inputs' largest entries with themselves.

    Values and NTKs have the shape of the covariance and the size of those between the inputs.
    """
    given, both = problem.covariances(), []
    crossing = "queries12" in given
    for side in ("11", "22"):
        keys = given[f"cov{side}"]
        own: dict[str, Any] = dict.fromkeys(("cov11", "cov12", "cov22"), keys)
        for of in ("values12", "ntk12", "values_ntk12"):
            own[of] = keys * np.linalg.norm(given[of]) / np.linalg.norm(keys)
        if crossing:
            queries = given[f"queries{side}"]
            own |= {f"queries{sides}": queries for sides in ("11", "12", "22")}
            largest = np.max(np.abs(given["queries_ntk12"])) / np.max(queries)
            own["queries_ntk12"] = queries * largest
        options = {**KINDS[name][0], "scale": problem.scale}
        moments = attention_second_moment(**own, **options, method=QuasiMonteCarlo(1024))
        both.append([np.max(np.diagonal(np.asarray(x))) for x in moments])
    return np.sqrt(np.prod(both, 0))


def errors_of(
    name: str, problem: oracle.Problem, methods: Sequence[QuasiMonteCarlo]
) -> list[np.ndarray]:
    """Largest errors of NNGP and NTK over their scales, of each method."""
    # An error that cannot be reached: all points are drawn, and polynomials are of a higher degree.
    truths = kernels(name, problem, QuasiMonteCarlo(MANY_POINTS, error=1e-9))
    of = scales(name, problem)
    return [
        np.array([np.max(np.abs(x - y)) for x, y in zip(values, truths, strict=True)]) / of
        for values in (kernels(name, problem, method) for method in methods)
    ]


def error_table(cases: Sequence[tuple[int, str]]) -> str:
    """Args: `cases` numbers of tokens, and kinds."""
    precision(x64=True)
    # What is not reached warns, and is in the table.
    warnings.filterwarnings("ignore", message="Attention: ")
    methods = [QuasiMonteCarlo(), QuasiMonteCarlo(error=ASKED)]
    rows = []
    for size, name in cases:
        for variance in VARIANCES:
            progress(f"{size} tokens, variance {variance:g}, {name}")
            problems = (problem_of(name, size, variance, 10 * seed) for seed in range(N_PROBLEMS))
            worst = np.max([errors_of(name, problem, methods) for problem in problems], 0)
            listed = (f"{nngp:.0e} / {ntk:.0e}" for nngp, ntk in worst)
            rows.append([f"{size}", name, f"{variance:g}", *listed])
    return table(["tokens", "attention", "variance", "default", f"{ASKED:g} asked for"], rows)


def sampling_table(sizes: tuple[int, ...], n_samples: int) -> str:
    """The default against plain sampling, with its standard error."""
    precision(x64=True)
    rows = []
    for size in sizes:
        for variance in VARIANCES:
            progress(f"{size} tokens, variance {variance:g}, sampling")
            given = "equal scales", problem_of("equal scales", size, variance, 0)
            _, problem = given
            truth = oracle.kernels(problem, n_samples=n_samples)
            values, of = kernels("equal scales", problem, QuasiMonteCarlo()), scales(*given)
            pairs = zip(values, (truth.nngp, truth.ntk), of, strict=True)
            errors = [np.max(np.abs(value - mean)) / scale for value, mean, scale in pairs]
            pairs = zip((truth.nngp_stderr, truth.ntk_stderr), of, strict=True)
            spread = [np.max(stderr) / scale for stderr, scale in pairs]
            listed = (f"{e:.0e} ({s:.0e})" for e, s in zip(errors, spread, strict=True))
            rows.append([f"{size}", f"{variance:g}", *listed])
    return table(["tokens", "variance", "NNGP", "NTK"], rows)


def layer(name: str, method: QuasiMonteCarlo | None = None) -> Any:
    given = {**KINDS[name][0], "method": method}
    if name == "cross":
        both = stax.parallel(stax.Dense(8), stax.Dense(8))
        attend = stax.GlobalCrossAttention(8, 8, 8, 2, **given)
        return stax.serial(stax.FanOut(2), both, attend)[2]
    attend = stax.GlobalSelfAttention(8, 8, 8, 2, linear_scaling=False, **given)
    return stax.serial(stax.Dense(8), attend)[2]


def compiled(name: str, size: int, n: int) -> Any:
    """The layer's kernels of two times `n` inputs."""
    x = np.random.default_rng(size).standard_normal((2, n, size, 2 * size))
    x *= np.sqrt(2 * size) / np.linalg.norm(x, axis=-1, keepdims=True)
    if KINDS[name][1] > 1:
        x *= np.linspace(0.6, 1.5, size)[:, None]
    x1, x2 = jnp.asarray(x, jnp.float32)
    kernel_fn = layer(name)
    function = jax.jit(lambda x1, x2: kernel_fn(x1, x2, ("nngp", "ntk"))).lower(x1, x2).compile()
    return functools.partial(function, x1, x2)


# Rotary embeddings have a block of queries for each distance: of more tokens than these, one
# measurement takes minutes.
LARGEST = {"rotary": 32, "rotary, causal": 16}


def time_table(sizes: tuple[int, ...], repetitions: int) -> str:
    """Milliseconds a block, of one pair of inputs and all pairs of queries, and an input."""
    # Where there is float64 at all, neural_tangents makes it of everything.
    precision(x64=False)
    rows = []
    for size in sizes:
        for name in KINDS:
            if size > LARGEST.get(name, size):
                rows.append([f"{size}", name, "-", "-"])
                continue
            progress(f"{size} tokens, {name}")
            make = functools.partial(compiled, name, size)
            counts = FEW if size > 32 or name in LARGEST else MANY
            pair, once = timing.per_pair_and_input(make, counts, repetitions, limit=10.0)
            # Beside two inputs there are two pairs of inputs with themselves.
            an_input = once / 2 - pair
            prepared = f"{an_input * 1e3:.1f}" if an_input > 0 else "-"
            rows.append([f"{size}", name, f"{pair * 1e3:.1f}", prepared])
            progress(", ".join(rows[-1]))
    return table(["tokens", "attention", "a block", "an input"], rows)


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

Largest errors of NNGP / NTK over {n} random problems, with the default number of points and with an
error that is asked for. The reference has {many:,} points and one node more in the correlation of
queries. Inputs have a correlation of 0.5. Values and NTKs have covariances of their own. Errors are
relative to the geometric mean of the two inputs' largest entries with themselves. Rotary embeddings
are left out: with so many points they take an hour. The suite tests theirs."""

SAMPLING = """\
## Against plain sampling

Largest errors with the default number of points, against {n:,} samples of all logits. The largest
standard error of the samples is in brackets."""

TIMES = """\
## Time

Milliseconds for NNGP and NTK together in float32, with the default number of points. A block is all
pairs of queries of one pair of inputs. Every input is also prepared, once: a dash stands where that
is too little beside a block to be measured, or where nothing was. Cross-attention has as many
queries as keys. Earlier, each pair of queries had a sample of its own. A causal block then took
456 ms at 16 tokens, 2,400 ms at 32 and 26 s at 64, on two other cores and with the preparation of
its inputs."""


def main() -> None:
    arguments = options(COMMAND, __doc__).parse_args()
    quick = arguments.quick
    n_samples, repetitions = (20_000, 1) if quick else (2_000_000, 3)
    parts: dict[str, Callable[[], Iterable[str]]] = {
        "errors": lambda: (
            ERRORS.format(n=N_PROBLEMS, many=MANY_POINTS),
            error_table(
                [(8, "causal")]
                if quick
                else [*((16, x) for x in KINDS if x not in LARGEST), (64, "equal scales")]
            ),
        ),
        "sampling": lambda: (
            SAMPLING.format(n=n_samples),
            sampling_table((8,) if quick else (8, 16), n_samples),
        ),
        "times": lambda: (TIMES, time_table((16,) if quick else (16, 32, 64), repetitions)),
        "memory": lambda: (memory(),),
    }
    run("Attention", COMMAND, parts, arguments)


if __name__ == "__main__":
    main()
