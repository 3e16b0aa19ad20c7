"""Every notebook runs as a user gets it, equals its text form, and comes with outputs that are small."""

import json
import os
import site
import venv
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest
from helpers.compiling import QUICKLY
from helpers.packaging import ROOT, build_wheel, copy_sources

TEXTS = sorted((ROOT / "notebooks").glob("*.py"))
LARGEST = 600_000  # bytes of a notebook with its outputs
OURS = ("nsa_jax", "pallas_kernels", "__editable__")


def test_there_are_five():
    assert [text.stem[:2] for text in TEXTS] == ["01", "02", "03", "04", "05"]


def test_all_install_alike():
    def install(text):
        source = next(cell.source for cell in jupytext.read(text).cells if "INSTALL_FROM" in cell.source)
        return source[source.index("INSTALL_FROM") : source.index("        raise RuntimeError(f")]

    assert len({install(text) for text in TEXTS}) == 1


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """A folder with its kernel: an environment that has all that this one has, JAX too, but for this package."""
    folder = tmp_path_factory.mktemp("colab")
    packages = folder / "packages"
    packages.mkdir()
    for installed in map(Path, site.getsitepackages()):
        for entry in installed.iterdir():
            if not entry.name.startswith(OURS) and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    venv.create(folder / "environment", symlinks=True)
    (own,) = (folder / "environment" / "lib").glob("python*/site-packages")
    (own / "colab.pth").write_text(f"{packages}\n")
    kernel = folder / "kernels" / "colab"
    kernel.mkdir(parents=True)
    python = str(folder / "environment" / "bin" / "python")
    started = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": started, "display_name": "Colab", "language": "python"}))
    return folder


# What the others show is also in the tests of the kernels, of the layers and of the trainer.
BY_DEFAULT = [
    pytest.param(text, marks=() if text.stem[:2] in ("01", "04") else pytest.mark.exhaustive) for text in TEXTS
]
TRAIN = ("04", "05")  # and the trainer runs from a clone only


@pytest.mark.parametrize("text", BY_DEFAULT, ids=lambda path: path.stem)
def test_notebook_runs_in_an_environment_with_jax_and_without_us(text, colab, monkeypatch, tmp_path):
    monkeypatch.setenv("NSA_JAX_NOTEBOOK_FAST", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PATH", str(colab))
    # One device, as a reader has, and code that is compiled quickly rather than well.
    monkeypatch.setenv("XLA_FLAGS", QUICKLY)
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # which means that nothing is fetched for a build
    install_from = (copy_sources if text.stem.startswith(TRAIN) else build_wheel)(tmp_path / "nsa-jax")
    notebook = jupytext.read(text)
    for cell in notebook.cells:
        cell.source = cell.source.replace('INSTALL_FROM = ".."', f"INSTALL_FROM = {str(install_from)!r}")
    folder = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="colab", resources=folder).execute()
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
