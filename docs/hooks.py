"""What mkdocs makes of more than the pages: executed notebooks, figures of reports, formulas."""

import html
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import latex2mathml.converter
from jupyter_client import AsyncKernelManager
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

DOCS = Path(__file__).parent
FIGURES = DOCS.parent / "benchmarks" / "results"
# Of a cell; a notebook takes less than two minutes.
TIMEOUT = 600
# What pymdownx.arithmatex leaves of `$...$` and `$$...$$`.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds notebooks as pages, and figures beside the reports that show them."""
    for path in sorted((DOCS / "notebooks").glob("*.py")):
        for name, content in executed(path):
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    for path in sorted(FIGURES.glob("*.png")):
        files.append(File.generated(config, f"reports/{path.name}", abs_src_path=str(path)))
    return files


def executed(path: Path) -> Iterator[tuple[str, str | bytes]]:
    """The page of a notebook in jupytext's form, and its figures; a cell that fails raises."""
    notebook = jupytext.read(path)
    # Figures into the page, whatever the environment says of a screen.
    env = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    kernel = AsyncKernelManager(kernel_name="python3", transport="ipc")
    NotebookClient(notebook, timeout=TIMEOUT, km=kernel).execute(env=env)
    exporter = MarkdownExporter()
    page, resources = exporter.from_notebook_node(
        notebook, {"unique_key": path.stem, "output_files_dir": path.stem}
    )
    yield f"{path.stem}.md", page
    yield from resources["outputs"].items()


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers show by themselves."""
    return FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match[2] == "[" else "inline"
    return latex2mathml.converter.convert(html.unescape(match[3]).strip(), display=display)
