"""What the reports of all benchmarks have in common: progress, tables, and where they were run."""

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np


def progress(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


T = TypeVar("T")


def steps(items: Sequence[T], name: Callable[[T], str], *, quiet: bool = False) -> Iterator[T]:
    """Yields the items and shows progress: a bar where `tqdm` is installed, otherwise lines."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        for i, item in enumerate(items):
            if not quiet:
                progress(f"{i + 1} of {len(items)}: {name(item)}")
            yield item
        return
    bar = tqdm(items, disable=quiet, file=sys.stderr)
    for item in bar:
        bar.set_postfix_str(name(item))
        yield item


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column and those of words to the left, numbers to the right."""
    columns = []
    for i, (head, *cells) in enumerate(zip(header, *rows, strict=True)):
        width = max(map(len, (head, *cells)))
        is_text = i == 0 or any(cell[:1].isalpha() for cell in cells)
        rule = "-" * width if is_text else "-" * (width - 1) + ":"
        place = str.ljust if is_text else str.rjust
        columns.append([place(cell, width) for cell in (head, rule, *cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


def name(order: int | None) -> str:
    """The name of softmax or of an order in tables."""
    return "softmax" if order is None else f"order {order}"


def precision(x64: bool) -> Any:
    """Switches JAX to double or single precision, and returns that dtype."""
    jax.config.update("jax_enable_x64", x64)
    return np.float64 if x64 else np.float32


def environment(module: str, given: Sequence[str]) -> str:
    """The command `python -m module *given`, the device, and the versions of what it ran on."""
    given = list(given)
    if "--output" in given:  # does not change what the report says
        index = given.index("--output")
        given = given[:index] + given[index + 2 :]
    # A folder of this machine by its name alone.
    given = [Path(each).name if Path(each).is_absolute() else each for each in given]
    device, info = jax.devices()[0], Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = next(names, platform.processor() or platform.machine())
    packages = ", ".join(f"{p} {version(p)}" for p in ("jax", "jaxlib", "neural-tangents", "numpy"))
    lines = [
        f"Command: `{' '.join(['python -m', module, *given])}`.",
        f"Device: {device.platform} ({device.device_kind}); host: {processor}, {cores()} cores. "
        f"Python {platform.python_version()}, {packages}.",
        *([f"Commit: {name}."] if (name := commit()) else []),
    ]
    return "\n".join(lines)


def commit() -> str:
    """The commit of this checkout, and whether files changed since; empty outside a checkout."""

    def git(*command: str) -> str:
        folder = ["git", "-C", str(Path(__file__).parents[1])]
        return subprocess.run(
            [*folder, *command], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "taylor_softmax")
        last = git("log", "-1", "--format=%h (%cs)")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{last} and changes since" if changed else last


def options(command: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of the options that all benchmarks have."""
    parser = argparse.ArgumentParser(prog=f"python -m {command}", description=description)
    parser.add_argument("--quick", action="store_true", help="small, to try it out")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="these parts alone")
    parser.add_argument("--output", type=Path, help="report (benchmarks/results/...)")
    return parser


def run(
    title: str,
    command: str,
    parts: Mapping[str, Callable[[], Iterable[str]]],
    arguments: argparse.Namespace,
) -> None:
    """Runs the parts asked for, all by default, and saves the report after each of them.

    The report has the name of the program, on a GPU with `_gpu` behind it. Parts that are not asked
    for stay as they are. Below each part stand the command and the versions that it comes from.
    """
    unknown = set(arguments.only) - set(parts)
    if unknown:
        sys.exit(f"--only {' '.join(sorted(unknown))}: there are {', '.join(parts)}")
    on_gpu = jax.devices()[0].platform == "gpu"
    file = f"{command.rpartition('.')[2]}{'_gpu' if on_gpu else ''}.md"
    output = arguments.output or Path("benchmarks/results") / file
    heading = f"# Report: {title}{' on a GPU' if on_gpu else ''}"
    for part in arguments.only or parts:
        lines = [*parts[part](), environment(command, sys.argv[1:])]
        keep(part, lines, heading, parts, output)
    print(output.read_text(), end="")


def keep(part: str, lines: Sequence[str], heading: str, order: Iterable[str], output: Path) -> None:
    """Puts a part into the report at `output`, and keeps its other parts, all in `order`."""
    report = sections(output.read_text()) if output.exists() else {}
    report[part] = "\n\n".join([f"<!-- part {part} -->", *lines])
    save([heading, *(report[name] for name in order if name in report)], output)


def sections(report: str) -> dict[str, str]:
    """The parts of a report that `run` wrote, by name."""
    _, *parts = re.split(r"^(?=<!-- part [\w-]+ -->$)", report, flags=re.MULTILINE)
    return {part.split(maxsplit=3)[2]: part.strip() for part in parts}


def publish(parts: Sequence[str], output: Path) -> None:
    """Prints the parts of a report and writes them to `output`."""
    save(parts, output)
    print(output.read_text(), end="")


def save(parts: Sequence[str], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n\n".join(parts) + "\n")
    progress(f"saved {output}")
