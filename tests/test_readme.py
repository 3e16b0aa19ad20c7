"""The examples of README.md and of the docstrings run as written."""

import doctest
import re
from pathlib import Path

import nsa_jax.linen

README = Path(__file__).parents[1] / "README.md"


def test_readme_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    namespace = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["y"].shape == namespace["x"].shape


def test_docstring_examples_run():
    results = doctest.testmod(nsa_jax.linen, extraglobs={"NSAttention": nsa_jax.NSAttention})
    assert results.attempted > 0
    assert results.failed == 0
