"""The notebooks run, and what is saved in them is what running them gives."""

import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def kinds(notebook):
    """What each code cell puts out: streams by name, the rest by kind and MIME type."""
    return [
        {(o.output_type, o.get("name"), *sorted(o.get("data", ()))) for o in cell.outputs}
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def words(notebook_or_output):
    """Its JSON without the pictures: base64 holds any four letters sooner or later."""
    return re.sub(r'"image/png": ".*?"', "", json.dumps(notebook_or_output))


def may_fail(cell):
    return "raises-exception" in cell.metadata.get("tags", ())


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """The kernel's environment: nothing of the user's own Jupyter and IPython."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # conftest's eight devices
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    for kind in ("CONFIG", "DATA", "RUNTIME"):
        monkeypatch.setenv(f"JUPYTER_{kind}_DIR", str(tmp_path / kind.lower()))
    return dict(os.environ)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_run_gives_the_kinds_of_output_that_are_saved(path, environment, tmp_path):
    notebook = read(path)
    saved = kinds(notebook)
    check = f"import sys; assert sys.prefix == {sys.prefix!r}, sys.prefix"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(check))
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute(env=environment)
    assert kinds(notebook)[1:] == saved


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_were_run_once_from_top_to_bottom(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_saved_outputs_hold_no_error_and_no_warning(path):
    for cell in read(path).cells:
        if cell.cell_type != "code" or may_fail(cell):
            continue
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", output.text
            assert "Traceback" not in words(output), cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_names_the_machine_that_it_was_made_on(path):
    notebook = read(path)
    found = re.search(r"/(home|tmp|work|root|Users)\b.{0,40}", words(notebook))
    assert not found, found[0]
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any("execution" in cell.metadata for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_small_enough_to_be_shown(path):
    assert path.stat().st_size < 1_000_000
