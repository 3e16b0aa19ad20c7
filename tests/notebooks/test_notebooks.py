"""Every notebook runs as a user gets it, equals its text form, and comes with outputs that are small."""

import importlib.metadata
import importlib.util
import json
import os
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import jax
import jupytext
import nbclient
import nbformat
import pytest
from helpers.compiling import QUICKLY
from helpers.packaging import ROOT, build_wheel, copy_sources
from helpers.pretrained import MODELS
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TEXTS = sorted((ROOT / "notebooks").glob("*.py"))
LARGEST = 600_000  # bytes of a notebook with its outputs
OURS = ("nsa_jax", "pallas_kernels", "__editable__")


def test_there_are_five():
    assert [text.stem[:2] for text in TEXTS] == ["01", "02", "03", "04", "05"]


def first_code(text):
    """The cell that installs."""
    return next(cell.source for cell in jupytext.read(text).cells if cell.cell_type == "code")


def test_all_install_alike():
    def install(text):
        source = first_code(text)
        return source[source.index("import importlib.metadata") : source.index("        raise RuntimeError(f")]

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
    add_kernel(folder, str(folder / "environment" / "bin" / "python"))
    return folder


def add_kernel(folder, python):
    kernel = folder / "kernels" / "colab"
    kernel.mkdir(parents=True)
    started = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": started, "display_name": "Colab", "language": "python"}))


@pytest.fixture
def user(monkeypatch, tmp_path):
    """The environment variables of somebody who runs a notebook, with a kernel in `tmp_path`."""
    monkeypatch.setenv("NSA_JAX_NOTEBOOK_FAST", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    # One device, as a reader has, and code that is compiled quickly rather than well.
    monkeypatch.setenv("XLA_FLAGS", QUICKLY)


# What the others show is also in the tests of the kernels, of the layers and of the trainer.
BY_DEFAULT = [pytest.param(text, marks=() if text.stem[:2] == "01" else pytest.mark.exhaustive) for text in TEXTS]
TRAIN = ("04", "05")  # and the trainer runs from a clone only


@pytest.mark.parametrize("text", BY_DEFAULT, ids=lambda path: path.stem)
def test_notebook_runs_in_an_environment_with_jax_and_without_us(text, colab, user, monkeypatch, tmp_path):
    monkeypatch.setenv("JUPYTER_PATH", str(colab))
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # which means that nothing is fetched for a build
    install_from = (copy_sources if text.stem.startswith(TRAIN) else build_wheel)(tmp_path / "nsa-jax")
    execute(text, install_from, tmp_path)


@pytest.mark.exhaustive
def test_the_notebook_of_checkpoints_runs_with_one(colab, user, monkeypatch, tmp_path):
    """A tiny one, whose tokens are bytes: more of them than a pretrained model makes of a text."""
    monkeypatch.setenv("JUPYTER_PATH", str(colab))
    monkeypatch.setenv("CHECKPOINT", str(MODELS / "llama2"))
    (text,) = (text for text in TEXTS if text.stem.startswith("05"))
    execute(text, copy_sources(tmp_path / "nsa-jax"), tmp_path)


@pytest.mark.exhaustive  # installs from the network, as Colab does
@pytest.mark.parametrize(
    "text", [text for text in TEXTS if not text.stem.startswith(TRAIN)], ids=lambda path: path.stem
)
def test_notebook_runs_where_pip_has_to_find_what_we_need(text, user, tmp_path):
    """In an environment with JAX and what draws, the cell installs a wheel and all that it needs, and JAX stays."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")

    def pip(*arguments):
        done = subprocess.run([python, "-m", "pip", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    pip("install", "--quiet", f"jax=={jax.__version__}", "numpy", "matplotlib", "ipykernel")
    before = set(pip("list", "--format=freeze").splitlines())
    assert not {"flax", "chex", "jaxtyping"} & {line.split("==")[0] for line in before}
    add_kernel(tmp_path, python)
    execute(text, build_wheel(tmp_path / "nsa-jax"), tmp_path)
    after = set(pip("list", "--format=freeze").splitlines())
    assert {line for line in before if line.startswith("jax")} <= after
    assert {line.split("==")[0] for line in after} >= {"nsa-jax", "flax", "chex", "jaxtyping"}


def execute(text, install_from, folder):
    """Runs a notebook in a folder with the kernel of `add_kernel`, to its last line."""
    notebook = jupytext.read(text)
    for cell in notebook.cells:
        cell.source = cell.source.replace('INSTALL_FROM = ".."', f"INSTALL_FROM = {str(install_from)!r}")
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="colab", resources=resources).execute()
    printed = "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "stream"
    )
    assert "This notebook took" in printed


# Runs a notebook's imports where some modules are not to be found.
IMPORTS = """
import json, sys
from importlib.machinery import PathFinder

absent = set(json.loads(sys.argv[1]))

class Others(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in absent else super().find_spec(name, path, target)

sys.meta_path = [Others if finder is PathFinder else finder for finder in sys.meta_path]
exec(sys.argv[2])
assert nsa_jax.__file__.startswith(sys.argv[3]), nsa_jax.__file__
"""


def test_the_wheel_names_all_that_its_notebooks_import(tmp_path):
    """Their imports succeed without any distribution that installing the wheel does not bring."""
    texts = [text for text in TEXTS if not text.stem.startswith(TRAIN)]
    assert all('install("plot")' in first_code(text) for text in texts)
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(build_wheel(tmp_path)).extractall(unpacked)
    (metadata,) = importlib.metadata.distributions(path=[str(unpacked)])
    brought = required(metadata.requires, "plot")
    assert {"jax", "flax", "matplotlib"} <= brought
    tops = importlib.metadata.packages_distributions()
    absent = [top for top, names in tops.items() if not {canonicalize_name(name) for name in names} & brought]
    assert {"grain", "hypothesis", "pytest", "tokenizers"} <= set(absent)
    code = "\n".join(cell.source for text in texts for cell in jupytext.read(text).cells if cell.cell_type == "code")
    statements = [line for line in code.splitlines() if line.startswith(("import ", "from "))]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            IMPORTS,
            json.dumps([top for top in absent if top not in OURS]),
            "\n".join(statements),
            unpacked,
        ],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def required(requirements, extra):
    """Names of all distributions that requirements bring, with an extra, as far as they are installed here."""
    found, todo = set(), [(requirements, extra)]
    while todo:
        requirements, extra = todo.pop()
        for each in map(Requirement, requirements or ()):
            if each.marker is not None and not each.marker.evaluate({"extra": extra}):
                continue
            for name in [(canonicalize_name(each.name), wanted) for wanted in ("", *each.extras)]:
                if name not in found:
                    found.add(name)
                    todo.append((importlib.metadata.requires(name[0]), name[1]))
    return {name for name, _ in found}


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_where_there_is_no_clone_the_first_cell_says_what_to_set(text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    source = first_code(text)
    install = source[: source.index("import jax\n")]
    with pytest.raises(FileNotFoundError, match=r"^INSTALL_FROM = '\.\.': expected a clone .*set it to a git URL"):
        exec(install, {})
    if text.stem.startswith(TRAIN):
        a_wheel = install.replace('INSTALL_FROM = ".."', 'INSTALL_FROM = "nsa_jax-0.1.0-py3-none-any.whl"')
        with pytest.raises(FileNotFoundError, match=r"\.whl': expected a clone of .*; the trainer is in no wheel"):
            exec(a_wheel, {})


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


def test_recorded_results_are_shown_as_they_are_now(capsys):
    """By the cells of notebook 02 that read a file, which a new measurement replaces."""
    notebook = nbformat.read(ROOT / "notebooks" / "02_pallas_against_the_reference.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and 'record["rows"]' in cell.source]
    namespace = {"Path": Path}
    for cell in cells:
        exec(cell.source, namespace)
    stored = [output.text for cell in cells for output in cell.outputs if output.output_type == "stream"]
    assert capsys.readouterr().out == "".join(stored) != ""
