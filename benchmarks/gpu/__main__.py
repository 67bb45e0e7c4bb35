"""Accuracy, errors, times and memory on a GPU, in nine minutes.

Run `python -m benchmarks.gpu` on a machine with a GPU; `--quick` tries it out anywhere, a CPU
included. Every part is a process of its own, which a limit ends and whose failure ends no other.
What a part has measured is saved line by line: whatever happens, the tables on file are whole.
"""

# JAX is imported by the parts alone: in this process it would take the GPU's memory.
import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

COMMAND = "benchmarks.gpu"
RESULTS = Path("benchmarks/results")
# What everything needs, and what of a package is imported where its name is another.
REQUIRED = ("jax", "neural_tangents", "numpy", "scipy", "mpmath", "jaxtyping")
PACKAGES = {"neural_tangents": "neural-tangents", "sklearn": "scikit-learn"}
# Without which something is left out.
OPTIONAL = {
    "matplotlib": "the figures of accuracy are left out",
    "tqdm": "progress is in lines, not in bars",
    "sklearn": "inference is left out, since the digits come with it",
}
SECONDS = 240  # of accuracy, compilation included
SAMPLES = 10_000_000
# Seconds of each part of a quick run, which takes three minutes in all on two idle cores.
QUICK_LIMIT = 600
PROBE = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='|')"


class Part(NamedTuple):
    """One process.

    Attributes:
      name: for `--only`.
      what: it measures.
      limit: seconds; what it leaves of them the next ones may take.
      needs: optional packages that it cannot do without.
    """

    name: str
    what: str
    limit: int
    needs: tuple[str, ...] = ()


# Together with the start not above nine minutes.
PARTS = (
    Part("accuracy", "every kernel of the grid against sampling", SECONDS + 20),
    Part("attention", "errors, ms a block and memory, 16 to 128 tokens", 110),
    Part("positions", "errors, ms a pair and memory, 16 to 128 positions", 45),
    Part("layers", "softmax over classes beside Erf, 2,000 inputs", 50),
    Part("tiles", "NNGP and NTK of 60,000 inputs of 784 features, as a reduction", 40),
    Part("inference", "one fit of 2,000 digits", 30, ("sklearn",)),
)


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def missing(names: Sequence[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def command(part: Part, to: Path, quick: bool) -> list[str]:
    if part.name != "accuracy":
        module = ["benchmarks.gpu.parts", part.name, "--to", str(to)]
        return [sys.executable, "-m", *module, *(["--quick"] if quick else [])]
    options = ["--output", str(to / "accuracy_gpu.json")]
    if quick:
        options += ["--quick", "--samples", "5000"]
    else:
        options += ["--device", "gpu", "--samples", str(SAMPLES), "--seconds", str(SECONDS)]
    if (cpu := RESULTS / "accuracy.json").exists():
        options += ["--beside", str(cpu)]
    return [sys.executable, "-m", "benchmarks.accuracy", *options]


def run(part: Part, to: Path, quick: bool, end: float) -> str:
    """Runs it until `end` on the monotonic clock at the latest; returns how it went."""
    start = time.monotonic()
    process = subprocess.Popen(command(part, to, quick), stdout=subprocess.DEVNULL)
    try:
        status = process.wait(max(1.0, end - start))
    except subprocess.TimeoutExpired:
        status = None
    finally:
        # After an interruption, too.
        process.kill()
        process.wait()
    took = f"{time.monotonic() - start:.0f} s"
    if status is None:
        return f"ended by its limit after {took}; what it had measured is saved"
    return f"done in {took}" if status == 0 else f"FAILED after {took}, with status {status}"


def chosen(arguments: argparse.Namespace) -> list[Part]:
    """The parts to run; says beforehand what they are, how long they take, and what is missing."""
    if absent := missing(REQUIRED):
        packages = " ".join(PACKAGES.get(name, name) for name in absent)
        sys.exit(f"Missing, and needed by everything: {packages}. Install them first.")
    platform, kind = subprocess.run(
        [sys.executable, "-c", PROBE], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.split("|")
    if platform != "gpu" and not arguments.quick:
        sys.exit(
            f"JAX finds no GPU here, but {platform} ({kind.strip()}). On a machine with one, JAX "
            'has to be installed for it: pip install "jax[cuda12]". --quick tries the program out '
            "without a GPU."
        )
    absent = missing(list(OPTIONAL))
    for name in absent:
        say(f"{PACKAGES.get(name, name)} is not installed: {OPTIONAL[name]}")
    parts = [part for part in PARTS if part.name in (arguments.only or [p.name for p in PARTS])]
    parts = [part for part in parts if not set(part.needs) & set(absent)]
    say(f"On {kind.strip()}, into {arguments.to}:")
    for part in parts:
        limit = "" if arguments.quick else f", at most {part.limit} s"
        say(f"  {part.name}: {part.what}{limit}")
    if arguments.quick:
        say("All of it small, as a trial: about three minutes on two idle cores.")
        return [part._replace(limit=QUICK_LIMIT) for part in parts]
    say(f"At most {sum(part.limit for part in parts) / 60:.0f} minutes in all.")
    return parts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {COMMAND}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--quick", action="store_true", help="small, to try it out")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--to", type=Path, help=f"folder for reports ({RESULTS}; quick: build/gpu)")
    arguments = parser.parse_args(argv)
    # The quick run does not replace the results of the full one.
    arguments.to = arguments.to or (Path("build/gpu") if arguments.quick else RESULTS)
    # Parts are run from here, wherever the library is.
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *sys.path])
    end = time.monotonic()
    parts = chosen(arguments)
    outcomes = {}
    for part in parts:
        end += part.limit
        say(f"{part.name}: until {max(1, end - time.monotonic()):.0f} s from now at the latest")
        outcomes[part.name] = run(part, arguments.to, arguments.quick, end)
        say(f"{part.name}: {outcomes[part.name]}")
    print("\n".join(f"{name}: {outcome}" for name, outcome in outcomes.items()))
    return 0 if all(outcome.startswith("done") for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
