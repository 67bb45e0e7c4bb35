"""What the site has beyond its pages: executed notebooks, and the figures of reports."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
from jupyter_client import AsyncKernelManager
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

DOCS = Path(__file__).parents[1]
FIGURES = DOCS.parent / "benchmarks" / "results"
# Seconds for one cell; a whole notebook takes less than two minutes.
TIMEOUT = 600

log = logging.getLogger("mkdocs.notebooks")


def on_files(files: Files, config: Any) -> Files:
    """Adds the notebooks as pages, and the figures beside the reports that show them."""
    paths = sorted((DOCS / "notebooks").glob("*.py"))
    for number, path in enumerate(paths, 1):
        if config.extra["execute"]:
            log.info(f"Executing notebook {number} of {len(paths)}: {path.name}")
        for name, content in page(path, execute=config.extra["execute"]):
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    for path in sorted(FIGURES.glob("*.png")):
        files.append(File.generated(config, f"reports/{path.name}", abs_src_path=str(path)))
    return files


def page(path: Path, *, execute: bool) -> Iterator[tuple[str, str | bytes]]:
    """The page of a notebook in jupytext's form, then its figures.

    The last figure comes a second time, as `<notebook>.png`: it is the picture of the gallery.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell fails.
    """
    notebook = jupytext.read(path)
    if execute:
        # Figures go into the page, whatever the environment says of a screen.
        env = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc")
        # A cell prints in several messages; `coalesce_streams` makes one block of them.
        client = NotebookClient(notebook, timeout=TIMEOUT, km=kernel, coalesce_streams=True)
        # A kernel that is left running finds its parent gone, and says so after the prompt.
        client.execute(env=env, cleanup_kc=True)
    text, resources = MarkdownExporter().from_notebook_node(
        notebook, {"unique_key": path.stem, "output_files_dir": path.stem}
    )
    yield f"{path.stem}.md", text
    figures = resources["outputs"]
    yield from figures.items()
    if figures:
        yield f"{path.stem}.png", list(figures.values())[-1]
