"""The notebooks: their text is their source's, and every source runs, here on a tiny random model."""

import jupytext
import nbformat
import pytest

from scripts import write_notebooks

SOURCES = write_notebooks.sources()
MOST_BYTES = 2_500_000

names = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_are_notebooks():
    assert len(SOURCES) == 6
    assert sum(source.with_suffix(".ipynb").stat().st_size for source in SOURCES) < MOST_BYTES


@names
def test_a_notebook_is_in_step_with_its_source(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert jupytext.writes(notebook, fmt="py:percent") == source.read_text()


@names
def test_its_outputs_are_figures_and_nothing_of_the_machine(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs and all(output.output_type != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs) or source.stem.startswith("01")
    write_notebooks.require_no_paths(notebook, source.stem)


@names
def test_every_cell_runs(source, merging_folder, tmp_path, monkeypatch):
    """As the kernel does, cell by cell, but in this process."""
    monkeypatch.setenv("MISDIRECTION_QUICK", "1")
    monkeypatch.setenv("MISDIRECTION_BASE", str(merging_folder))
    monkeypatch.delenv("MISDIRECTION_PAPER", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    variables = {"__name__": "__main__"}
    for number, cell in enumerate(jupytext.read(source).cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{source.name}, cell {number}", "exec"), variables)


@pytest.mark.notebooks
@names
def test_a_notebook_runs_whole(source):
    notebook = write_notebooks.execute(source)
    write_notebooks.require_no_paths(notebook, source.stem)
    assert cells(notebook) == cells(jupytext.read(source))
