"""Whether the gradients of a step repeat bit for bit, and what makes them.

On a GPU, operations may add numbers in memory in whatever order they arrive. Ours do not: all kernels of this
repository have a fixed order, and so has the gradient of the embeddings (`train.model.embedding`). XLA has an option
that allows no others either, which also asks cuDNN's attention for a fixed order.
"""

import os
import re

import jax

OPTION = "xla_gpu_exclude_nondeterministic_ops"
# Options with the same effect. The second one also fixes which kernel XLA takes where several would do, which otherwise
# it measures in every process anew.
OPTIONS = (OPTION, "xla_gpu_deterministic_ops")


def compiler_options(deterministic: bool) -> dict[str, bool]:
    """What `jax.jit` is given as `compiler_options` for a program whose results should repeat, if they should.

    Where the environment variable XLA_FLAGS says something about it, nothing is given.
    """
    wanted = deterministic and jax.default_backend() == "gpu" and not _given()
    return {OPTION: True} if wanted else {}


def describe(deterministic: bool) -> str:
    """Whether gradients repeat, in words, where programs are compiled with `compiler_options(deterministic)`."""
    given = _given()
    if jax.default_backend() != "gpu" or any(given.values()) or (deterministic and not given):
        return "gradients repeat bit for bit"
    reason = f"XLA_FLAGS has {next(iter(given))}=false" if given else "deterministic = False"
    return f"gradients do not repeat bit for bit: {reason}"


def _given() -> dict[str, bool]:
    """Those of `OPTIONS` that XLA_FLAGS sets, and to what; the last word counts."""
    found = re.findall(rf"--({'|'.join(OPTIONS)})(?:=(\S*))?(?=\s|$)", os.environ.get("XLA_FLAGS", ""))
    return {name: value.lower() in ("", "true", "1") for name, value in found}
