"""Validates every analytic kernel of the library against Monte Carlo ground truth.

Saves one result file, a report and figures; exits 1 if a kernel differs from what sampling finds by
more than chance. An interrupted run goes on where it stopped.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import sys
import time
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, random

import taylor_softmax
from benchmarks.accuracy.problems import Problem, layer_problems, network_problems
from benchmarks.accuracy.sampling import Estimate, Sampler
from benchmarks.accuracy.tables import beside_section, checks_table, sections
from benchmarks.accuracy.verdict import Result, verdict
from benchmarks.report import cores, environment, progress, publish, steps

PACKAGES = ("taylor-softmax", "jax", "jaxlib", "neural-tangents", "numpy", "scipy")
RESULTS = Path("benchmarks/results")
COMMAND = "benchmarks.accuracy"


class Prepared(NamedTuple):
    """All that a problem needs but its draws.

    Attributes:
      kernels: NNGP and NTK.
      scales: what errors of both are relative to.
      departures: of both from softmax's.
      sampler: compiled.
    """

    kernels: tuple[np.ndarray, np.ndarray]
    scales: tuple[float, float]
    departures: tuple[float | None, float | None]
    sampler: Sampler


def prepare(problem: Problem, n_samples: int, devices: list[Any]) -> Prepared:
    # Each thread has a default device of its own.
    with jax.default_device(devices[0]):
        kernels = problem.analytic()
        sampler = Sampler(problem, n_samples, devices, entries=problem.is_estimated)
        sampler.compile()
        return Prepared(kernels, problem.scales(kernels), problem.departure(kernels), sampler)


def key_of(problem: Problem, seed: int) -> Array:
    """One that the problem's place in the grid does not change."""
    return random.fold_in(random.key(seed), zlib.crc32(problem.name.encode()))


def results_of(problem: Problem, prepared: Prepared, estimate: Estimate) -> list[Result]:
    """Analytic and sampled kernels of one problem."""
    estimated = problem.is_estimated
    mean, stderr, n_draws = estimate
    kernels, scales, departures, _ = prepared
    results = []
    for i, (kernel, matrix) in enumerate(zip(("nngp", "ntk"), kernels, strict=True)):
        if estimated:
            worst = np.unravel_index(np.argmax(np.abs(matrix - mean[i])), matrix.shape)
            analytic, sampled, error = matrix[worst], mean[i][worst], stderr[i][worst]
        else:
            analytic = np.sum(problem.weights() * matrix)
            sampled, error = mean[i], stderr[i]
        results.append(
            Result(
                name=problem.name,
                group=problem.group,
                kernel=kernel,
                analytic=float(analytic),
                mean=float(sampled),
                stderr=float(error),
                scale=scales[i],
                entries=matrix.size if estimated else 1,
                tolerance=problem.tolerance(kernel),
                n_draws=n_draws,
                departure=departures[i],
                problem=dataclasses.asdict(problem),
            )
        )
    return results


def source_digest() -> str:
    """Of all that results depend on: those of other code are not continued."""
    library, program = Path(taylor_softmax.__file__).parent, Path(__file__).parent
    files = [*sorted(library.rglob("*.py")), program / "problems.py", program / "sampling.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def settings(arguments: argparse.Namespace, devices: list[Any]) -> dict[str, Any]:
    """What a saved result depends on: only results with the same are continued."""
    return {
        "samples": arguments.samples,
        "seconds": arguments.seconds,
        "seed": arguments.seed,
        "quick": arguments.quick,
        "devices": [f"{d.platform} ({d.device_kind})" for d in devices],
        "source": source_digest(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def load(path: Path, expected: dict[str, Any]) -> list[Result]:
    """Results that an earlier run with the same settings has saved."""
    if not path.exists():
        return []
    saved = json.loads(path.read_text())
    if saved["settings"] != expected:
        progress(f"{path} has results of other settings: starting anew")
        return []
    return [Result(**result) for result in saved["results"]]


def save(path: Path, given: dict[str, Any], results: Iterable[Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: an interruption leaves the old file or the new one.
    beside = path.with_suffix(".part")
    content = {"settings": given, "results": [r._asdict() for r in results]}
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def grid(quick: bool) -> list[Problem]:
    return [*layer_problems(quick), *network_problems(quick)]


def run(arguments: argparse.Namespace, devices: list[Any]) -> list[Result]:
    """Results of the whole grid, or of what there was time for, those on file among them."""
    given = settings(arguments, devices)
    on_file = [] if arguments.restart else load(arguments.output, given)
    done: dict[str, list[Result]] = {}
    for result in on_file:
        done.setdefault(result.name, []).append(result)
    new = [problem for problem in grid(arguments.quick) if problem.name not in done]
    end = float("inf") if arguments.seconds is None else time.monotonic() + arguments.seconds
    rounds: Iterable[Sequence[Problem]] = [new]
    if arguments.seconds is not None and (again := [p for p in new if not p.is_biased]):
        rounds = itertools.chain([new], itertools.repeat(again))
    estimates: dict[str, Estimate] = {}
    # Where cores are many, most of the time goes into compiling, otherwise.
    pool = ThreadPoolExecutor(cores())
    try:
        coming = {p.name: pool.submit(prepare, p, arguments.samples, devices) for p in new}
        for n, problems in enumerate(rounds):
            for problem in steps(problems, lambda p: p.name, quiet=arguments.no_progress):
                name = problem.name
                prepared = coming[name].result()
                if time.monotonic() > end:
                    return list(itertools.chain.from_iterable(done.values()))
                drawn = prepared.sampler.draw(key_of(problem, arguments.seed + n))
                known = estimates.get(name)
                estimates[name] = drawn if known is None else known.with_more(drawn)
                done[name] = results_of(problem, prepared, estimates[name])
                save(arguments.output, given, itertools.chain.from_iterable(done.values()))
    finally:
        pool.shutdown(cancel_futures=True)
    return list(itertools.chain.from_iterable(done.values()))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {COMMAND}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="(JAX's default)")
    parser.add_argument("--samples", type=int, help="a setting (CPU: 1e6, quick 1e5; else 1e8)")
    parser.add_argument(
        "--seconds",
        type=float,
        help="rounds over the grid, each of so many samples, until then; ends the first one, too",
    )
    parser.add_argument("--seed", type=int, default=0, help="(0; a second round has the next one)")
    parser.add_argument("--quick", action="store_true", help="a small grid, one minute")
    parser.add_argument("--output", type=Path, help=f"result file ({RESULTS}/accuracy.json)")
    parser.add_argument("--restart", action="store_true", help="use no saved results")
    parser.add_argument("--beside", type=Path, help="result file to set the results beside")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument(
        "--perturb",
        metavar="TEXT",
        help="negative control: kernels whose name contains TEXT are taken 1 %% too large; nothing "
        "but the verdict is printed, from saved results where there are any",
    )
    arguments = parser.parse_args(argv)
    arguments.given = argv
    if arguments.output is None:
        # The quick run does not replace the results of the full one.
        quick = Path("build/accuracy-quick.json")
        arguments.output = quick if arguments.quick else RESULTS / "accuracy.json"
    try:
        arguments.devices = jax.devices(arguments.device)
    except RuntimeError as error:
        parser.error(f"--device {arguments.device}: JAX has none here ({error})")
    if arguments.samples is None:
        on_cpu = arguments.devices[0].platform == "cpu"
        arguments.samples = (100_000 if arguments.quick else 1_000_000) if on_cpu else 100_000_000
    if arguments.samples < 1000:
        parser.error(f"--samples {arguments.samples}: at least 1000 are needed for a z-score")
    return arguments


def pictures(results: list[Result], output: Path) -> list[Path]:
    """Of a run, beside its results: where they are, or none without matplotlib."""
    try:
        from benchmarks.accuracy.figures import draw_all
    except ModuleNotFoundError as error:
        progress(f"No figures: {error}")
        return []
    return draw_all(results, output.parent, output.stem)


def main(argv: list[str] | None = None) -> int:
    jax.config.update("jax_enable_x64", True)
    arguments = parse(sys.argv[1:] if argv is None else argv)
    devices = arguments.devices
    with jax.default_device(devices[0]):
        results = run(arguments, devices)
        if arguments.perturb is not None:
            results = [r.perturbed(0.01) if arguments.perturb in r.name else r for r in results]
            checks = verdict(results)
            print(checks_table(checks))
        else:
            checks = verdict(results)
            where = " on a GPU" if devices[0].platform == "gpu" else ""
            parts = [f"# Report: Accuracy{where}", environment(COMMAND, arguments.given)]
            if len(results) < 2 * (n := len(grid(arguments.quick))):
                parts.append(f"There was time for {len(results) // 2} of {n} problems.")
            paths = pictures(results, arguments.output)
            beside = []
            if arguments.beside:
                other = json.loads(arguments.beside.read_text())
                theirs = [Result(**result) for result in other["results"]]
                beside.append(beside_section(results, theirs, other["settings"]))
            given = arguments.samples, arguments.seed
            parts += sections(results, checks, *given, paths, beside)
            publish(parts, arguments.output.with_suffix(".md"))
    failed = [check.name for check in checks if not check.passed]
    for name in failed:
        progress(f"FAILED {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
