"""Regenerates `taylor_softmax/_generated/`, or checks that it is up to date.

python -m derivations           write the modules
python -m derivations --check   exit 1 with a diff if a module is stale, missing or an orphan
"""

import argparse
import difflib
import pathlib
import sys

from derivations import class_axis, infinite_width, position_axis, probabilities
from derivations.emit import COMMAND

TARGET = pathlib.Path(__file__).parents[1] / "taylor_softmax" / "_generated"

PACKAGE_DOCSTRING = f'"""Closed forms emitted by `{COMMAND}`: do not edit."""\n'


def render() -> dict[str, str]:
    """File name to content, of everything that belongs into the generated package."""
    infinite_width.verify()
    sources = (class_axis, position_axis, probabilities)
    modules = [source.module() for source in sources]
    return {"__init__.py": PACKAGE_DOCSTRING} | {f"{m.name}.py": m.render() for m in modules}


def differences(target: pathlib.Path, rendered: dict[str, str]) -> str:
    """Unified diff from the files in `target` to `rendered`; empty if they agree."""
    present = {path.name: path.read_text() for path in sorted(target.glob("*.py"))}
    diffs = []
    for name in sorted(present.keys() | rendered.keys()):
        old, new = present.get(name), rendered.get(name)
        if old != new:
            path = f"{target.name}/{name}"
            diffs += difflib.unified_diff(
                (old or "").splitlines(keepends=True),
                (new or "").splitlines(keepends=True),
                "/dev/null" if old is None else path,
                "/dev/null" if new is None else path,
            )
    return "".join(diffs)


def write(target: pathlib.Path, rendered: dict[str, str]) -> None:
    target.mkdir(exist_ok=True)
    for path in target.glob("*.py"):
        if path.name not in rendered:
            path.unlink()
    for name, text in rendered.items():
        (target / name).write_text(text)


def main(arguments: list[str] | None = None, target: pathlib.Path = TARGET) -> int:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(arguments)
    rendered = render()
    if not options.check:
        write(target, rendered)
        return 0
    diff = differences(target, rendered)
    if diff:
        sys.stdout.write(diff)
        print(f"{target.name}/ is out of date: run `{COMMAND}`.", file=sys.stderr)
    return int(bool(diff))


if __name__ == "__main__":
    sys.exit(main())
