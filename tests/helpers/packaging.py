"""The package as others get it: its sources without a repository, and the wheel."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("LICENSE", "README.md", "pyproject.toml", "nsa_jax", "pallas_kernels", "tests", "train")


def copy_sources(folder: Path) -> Path:
    """A clone without Git's own files, which a build may write into."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


def build_wheel(folder: Path) -> Path:
    """A wheel in the folder, built without the network."""
    source, out = copy_sources(folder / "source"), folder / "wheel"
    program = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    built = subprocess.run([sys.executable, "-c", program, out], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return path
