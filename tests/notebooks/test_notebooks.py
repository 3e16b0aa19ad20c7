"""Every notebook runs, equals its text form, and comes with outputs that are small."""

import os
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest
from helpers.compiling import QUICKLY

ROOT = Path(__file__).parents[2]
TEXTS = sorted((ROOT / "notebooks").glob("*.py"))
LARGEST = 600_000  # bytes of a notebook with its outputs


def test_there_are_four():
    assert [text.stem[:2] for text in TEXTS] == ["01", "02", "03", "04"]


# What the second and the third one show is also in the tests of the kernels and of the layers.
BY_DEFAULT = [pytest.param(text, marks=pytest.mark.exhaustive if text.stem[:2] in "02 03" else ()) for text in TEXTS]


@pytest.mark.parametrize("text", BY_DEFAULT, ids=lambda path: path.stem)
def test_notebook_runs(text, monkeypatch, tmp_path):
    monkeypatch.setenv("NSA_JAX_NOTEBOOK_FAST", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    # One device, as a reader has, and code that is compiled quickly rather than well.
    monkeypatch.setenv("XLA_FLAGS", QUICKLY)
    notebook = jupytext.read(text)
    folder = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    printed = "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "stream"
    )
    assert "This notebook took" in printed


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_notebook_equals_its_text_form_and_shows_its_outputs(text):
    path = text.with_suffix(".ipynb")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in jupytext.read(text).cells
    ]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert all(cell.execution_count for cell in code)
    assert outputs
    assert not any(output.output_type == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert os.path.getsize(path) < LARGEST
