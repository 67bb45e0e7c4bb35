"""Validates every analytic kernel of the library against Monte Carlo ground truth.

Saves one result file, a report and figures; exits 1 if a kernel differs from what sampling finds by
more than chance. An interrupted run goes on where it stopped.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import zlib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import random
from tqdm import tqdm

import taylor_softmax
from benchmarks.accuracy.figures import draw_all
from benchmarks.accuracy.problems import Problem, layer_problems, network_problems
from benchmarks.accuracy.sampling import sample
from benchmarks.accuracy.tables import checks_table, sections
from benchmarks.accuracy.verdict import Result, verdict
from benchmarks.report import environment, progress, publish

PACKAGES = ("taylor-softmax", "jax", "jaxlib", "neural-tangents", "numpy", "scipy")
RESULTS = Path("benchmarks/results")
COMMAND = "benchmarks.accuracy"


def results_of(problem: Problem, seed: int, n_samples: int, devices: list[Any]) -> list[Result]:
    """Analytic and sampled kernels of one problem."""
    estimated = problem.is_estimated
    # A key that the problem's place in the grid does not change.
    key = random.fold_in(random.key(seed), zlib.crc32(problem.name.encode()))
    mean, stderr, n_draws = sample(problem, key, n_samples, devices, entries=estimated)
    kernels = problem.analytic()
    departures = problem.departure(kernels)
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
                scale=float(np.max(np.abs(matrix))),
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


def run(arguments: argparse.Namespace, devices: list[Any]) -> list[Result]:
    """Results of the whole grid, those on file among them."""
    given = settings(arguments, devices)
    problems = [*layer_problems(arguments.quick), *network_problems(arguments.quick)]
    done = [] if arguments.restart else load(arguments.output, given)
    known = {result.name for result in done}
    bar = tqdm(problems, unit="kernel pair", disable=arguments.no_progress, file=sys.stderr)
    for problem in bar:
        bar.set_postfix_str(problem.name)
        if problem.name not in known:
            done += results_of(problem, arguments.seed, arguments.samples, devices)
            save(arguments.output, given, done)
    return done


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {COMMAND}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="(JAX's default)")
    parser.add_argument("--samples", type=int, help="a setting (CPU: 1e6, quick 1e5; else 1e8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small grid, one minute")
    parser.add_argument("--output", type=Path, help=f"result file ({RESULTS}/accuracy.json)")
    parser.add_argument("--restart", action="store_true", help="use no saved results")
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
            parts = ["# Accuracy", environment(COMMAND, arguments.given)]
            paths = draw_all(results, arguments.output.parent, arguments.output.stem)
            parts += sections(results, checks, arguments.samples, arguments.seed, paths)
            publish(parts, arguments.output.with_suffix(".md"))
    failed = [check.name for check in checks if not check.passed]
    for name in failed:
        progress(f"FAILED {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
