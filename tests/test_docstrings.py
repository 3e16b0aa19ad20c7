"""Docstring examples run as written, every public name has one, and the documentation builds without a warning."""

import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import nsa_jax
import nsa_jax.nnx

ROOT = Path(__file__).parents[1]
MODULES = sorted(f"nsa_jax.{path.stem}" for path in (ROOT / "nsa_jax").glob("[!_]*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_public_name_has_an_example():
    public = [getattr(nsa_jax, name) for name in nsa_jax.__all__]
    twins = ("NSAttention", "NSACore", "NSAttentionFn", "FullAttention")
    public += [*(getattr(nsa_jax.nnx, name) for name in twins), nsa_jax.sharding.sharded]
    # What holds arrays has nothing to show.
    missing = [x.__name__ for x in public if not hasattr(x, "_fields") and ">>>" not in inspect.getdoc(x)]
    assert missing == []


def test_the_documentation_builds_without_a_warning(tmp_path):
    """Strictly: a link that leads nowhere or a docstring that cannot be read is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {page.stem for page in (tmp_path / "reference").glob("*.html")}
    assert {"nsa_jax", "pallas_kernels", "train", *MODULES} <= pages
    assert "select_blocks" in (tmp_path / "reference" / "nsa_jax.html").read_text()
