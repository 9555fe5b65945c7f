"""Executes the notebooks and writes them with their outputs.

python scripts/write_notebooks.py [NN_name ...]

The source of each is `notebooks/NN_name.py` (jupytext's percent format). Progress and warnings, which depend on the
machine, are left out of what is written, and an output that names a folder of this machine is refused.
"""

import re
import resource
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"

QUIET = """
import warnings
from misdirection.progress import console
from transformers.utils import logging
warnings.simplefilter("ignore")
logging.set_verbosity_error()
console.quiet = True
"""
"""A cell that runs first and is not written."""

MOST_SECONDS = 3600


def sources() -> list[Path]:
    """Every notebook's source, in order."""
    return sorted(FOLDER.glob("[0-9]*.py"))


def execute(source: Path) -> NotebookNode:
    """The notebook of a source with its outputs; it runs in an empty folder."""
    notebook = jupytext.read(source)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(QUIET))
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=MOST_SECONDS, resources={"metadata": {"path": folder}})
        client.execute()
    del notebook.cells[0]
    return without_traces(notebook)


def without_traces(notebook: NotebookNode) -> NotebookNode:
    """The notebook without what differs from machine to machine, or from run to run."""
    for number, cell in enumerate(notebook.cells):
        # Random ids would make every file differ each time.
        cell.id = f"cell-{number}"
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.pop("execution_count", None)
                if output.output_type == "execute_result":
                    output.execution_count = None
    notebook.metadata.pop("language_info", None)
    return notebook


def require_no_paths(notebook: NotebookNode, name: str) -> None:
    """Raises `ValueError` for an output that names a folder of this machine."""
    text = nbformat.writes(notebook)
    folders = {tempfile.gettempdir(), str(Path.home()), str(FOLDER.parent)}
    for folder in folders:
        if re.search(rf"{re.escape(folder)}(?![\w-])", text):
            raise ValueError(f"{name}: an output names {folder}")


def processor_seconds() -> float:
    """What the kernels that have ended used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Execute those that are named, or all."""
    for source in sources():
        if not sys.argv[1:] or source.stem in sys.argv[1:]:
            started, before = time.monotonic(), processor_seconds()
            notebook = execute(source)
            require_no_paths(notebook, source.stem)
            nbformat.write(notebook, source.with_suffix(".ipynb"))
            passed, used = time.monotonic() - started, processor_seconds() - before
            print(f"{source.stem}: {passed:.0f} seconds, {used:.0f} of a processor", flush=True)


if __name__ == "__main__":
    main()
