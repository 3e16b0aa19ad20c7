"""The wheel holds the library and its kernels, needs what it says, and works where there is no clone."""

import email
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest
from helpers.packaging import ROOT, build_wheel

import nsa_jax

NEEDED = {"jax", "flax", "chex", "jaxtyping", "numpy"}

# Forward and gradient on a CPU; importing what only an extra brings is an error.
PROGRAM = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    names = {"grain", "orbax", "tokenizers", "tyro", "matplotlib", "docs", "tests", "train"}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

sys.meta_path.insert(0, Absent())

from pathlib import Path
import jax
import nsa_jax, nsa_jax.context, nsa_jax.nnx, nsa_jax.sharding, pallas_kernels
from nsa_jax import NSAConfig, nsa_attention
from nsa_jax.testing import random_inputs

for package in (nsa_jax, pallas_kernels):
    assert Path(package.__file__).is_relative_to(sys.argv[1]), package.__file__
config = NSAConfig(compress_block=8, compress_stride=4, select_block=8, num_selected=4, window=16)
inputs = random_inputs(jax.random.key(0), config, T=64, num_heads=4, num_kv_heads=2, head_dim=8)
loss = jax.jit(jax.value_and_grad(lambda q, kv, gates: nsa_attention(q, kv, gates, config=config).sum(), (0, 1, 2)))
value, gradients = loss(*inputs[:3])
assert all(bool(jax.numpy.isfinite(x).all()) for x in jax.tree.leaves((value, gradients)))
try:
    import nsa_jax.visualize
except ImportError as error:
    assert "nsa-jax[plot]" in str(error), error
else:
    raise AssertionError("nsa_jax.visualize was imported without matplotlib")
assert list((Path(pallas_kernels.__file__).parent / "benchmarks" / "results").glob("*.json"))
print("works", nsa_jax.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("package"))


def run(python, folder, *arguments, **environment):
    """A program's output, where it is run in a folder with none of our environment."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(
        [python, *arguments],
        cwd=folder,
        env={**inherited, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_library_and_the_kernels_only(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in held if name.split("/")[0] == f"nsa_jax-{nsa_jax.__version__}.dist-info"}
    sources = {
        str(path.relative_to(ROOT))
        for package in ("nsa_jax", "pallas_kernels")
        for pattern in ("*.py", "*.json", "py.typed")
        for path in (ROOT / package).rglob(pattern)
    }
    assert held - info == sources
    assert {"nsa_jax/py.typed", "pallas_kernels/py.typed"} <= held


def test_the_wheel_needs_little(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"nsa_jax-{nsa_jax.__version__}.dist-info/METADATA"))
    requirements = metadata.get_all("Requires-Dist")
    assert {re.match(r"[\w-]+", each)[0] for each in requirements if "extra ==" not in each} == NEEDED
    extras = {"cuda12", "cuda13", "plot", "train", "pretrained", "transformers", "qwix", "parquet", "tensorboard"}
    extras |= {"wandb", "docs", "notebooks", "mutation", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras | {"dev", "mutation"}
    assert metadata["Version"] == nsa_jax.__version__
    assert metadata["License-Expression"] == "Apache-2.0"


def test_the_wheel_works_by_itself(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    printed = run(sys.executable, work, "-c", PROGRAM, site, PYTHONPATH=str(site))
    assert printed == f"works {nsa_jax.__version__}\n"


@pytest.mark.exhaustive  # installs what the wheel needs, from the network
def test_the_wheel_works_in_an_empty_environment_beside_folders_of_the_users_own(wheel, tmp_path):
    venv.create(tmp_path / "environment", with_pip=True)
    python = tmp_path / "environment" / "bin" / "python"
    run(python, tmp_path, "-m", "pip", "install", "--quiet", wheel)
    project, other = tmp_path / "project", tmp_path / "other"
    for folder in (project / "train", other / "pallas_kernels"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("mine = True\n")
    assert run(python, project, "-c", "import train; print(train.mine)") == "True\n"
    printed = run(python, project, "-c", PROGRAM, tmp_path / "environment")
    assert printed == f"works {nsa_jax.__version__}\n"
    installed = run(python, project, "-m", "pip", "list", "--format=freeze")
    names = {line.split("==")[0].lower() for line in installed.splitlines()}
    assert not names & {"grain", "tokenizers", "tyro", "matplotlib"}


def test_papers_of_the_release_name_its_version():
    assert f'version: "{nsa_jax.__version__}"' in (ROOT / "CITATION.cff").read_text()
    assert f"## [{nsa_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
