"""Docstring examples run as written, every public name has one, and the API reference builds without a warning."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pdoc
import pytest

import nsa_jax
import nsa_jax.nnx

ROOT = Path(__file__).parents[1]
DOCUMENTED = re.search(r"^DOCUMENTED = (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
MODULES = sorted(f"nsa_jax.{path.stem}" for path in (ROOT / "nsa_jax").glob("[!_]*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_public_name_has_an_example():
    public = [getattr(nsa_jax, name) for name in nsa_jax.__all__]
    public += [nsa_jax.nnx.NSAttention, nsa_jax.nnx.FullAttention, nsa_jax.sharding.sharded]
    # What holds arrays has nothing to show.
    missing = [x.__name__ for x in public if not hasattr(x, "_fields") and ">>>" not in inspect.getdoc(x)]
    assert missing == []


def test_the_reference_builds_without_a_warning(tmp_path):
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*DOCUMENTED, output_directory=tmp_path)
    pages = {str(page.relative_to(tmp_path).with_suffix("")) for page in tmp_path.rglob("*.html")}
    assert {name.replace(".", "/") for name in DOCUMENTED} <= pages
    assert "select_blocks" in (tmp_path / "nsa_jax.html").read_text()
