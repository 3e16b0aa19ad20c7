"""A checkpoint on disk: its metadata with the checksums, and its arrays.

A checkpoint is the folder `<directory>/<step>`, which Orbax writes under a temporary name and renames when it is whole:

    state/      the arrays, each under its path in the state ("params/embedding")
    metadata/   one JSON: format, step, metrics, data position, and shape, dtype and checksum of every array

The checksums tell damage that decompresses well (a flipped bit, a block of zeros) from what was saved.
"""

import contextlib
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from train.checkpoints.errors import (
    CheckpointError,
    DamagedError,
    is_of_this_machine,
    reason_of,
    release,
    without_echoes,
)
from train.parallel.distributed import in_turn, together

FORMAT = 1
SCORE = "held_out_bits_per_byte"  # the metric that makes a checkpoint one of the best; lower is better


def committed_steps(directory: Path) -> list[int]:
    """Steps whose checkpoints are on disk, ascending."""
    # Until a folder is whole its name has a suffix. One that a kill left half deleted fails the checks of reading.
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def score_of(step: int, metrics: Mapping[str, float]) -> dict[int, float]:
    """The score of a step under its number; nothing where it was not evaluated."""
    value = metrics.get(SCORE, math.nan)
    return {} if math.isnan(value) else {step: value}


def read_scores(directory: Path) -> dict[int, float]:
    """Scores of the checkpoints in a folder, by step."""
    scores: dict[int, float] = {}
    for step in committed_steps(directory):
        with contextlib.suppress(DamagedError):
            scores |= score_of(step, read_metadata(directory, step)["metrics"])
    return scores


def best_first(scores: Mapping[int, float]) -> list[int]:
    """Steps by their scores; of equal ones the newest first."""
    return sorted(scores, key=lambda step: (scores[step], -step))


def flatten(state: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths ("params/embedding")."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def described(array: Any) -> dict[str, Any]:
    """Shape and dtype of an array, as metadata has them."""
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


def checksums_of(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """The checksum of each array."""
    # One after the other: on simulated devices, more sums over devices in flight than there are threads wait for each
    # other for ever.
    return {name: int(checksum(array)) for name, array in arrays.items()}


@in_turn
@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """The checksum of an array as a uint32 scalar, whatever its sharding."""
    # A sum modulo 2^32 does not depend on its order, hence not on the sharding. The bits are mixed first, so that
    # two flipped sign bits do not cancel.
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    bits = (bits ^ (bits >> 16)) * np.uint32(0x45D9F3B)
    bits = (bits ^ (bits >> 16)) * np.uint32(0x45D9F3B)
    return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as it is stored."""
    return {"crc32": zlib.crc32(json.dumps(content, sort_keys=True).encode()), "content": content}


def read_metadata(directory: Path, step: int) -> dict[str, Any]:
    """The metadata of a checkpoint.

    Raises:
      DamagedError: it cannot be read, or is not what was saved.
      CheckpointError: this process may not read it, or it has another format.
    """
    path = directory / str(step) / "metadata" / "metadata"  # Orbax names a JSON item's file so
    try:
        stored = json.loads(path.read_text())
        intact = stored == with_checksum(stored["content"])
    except PermissionError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"its metadata cannot be read: {reason_of(error)}") from error
    if not intact:
        raise DamagedError("its metadata is not what was saved")
    content = stored["content"]
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {content['format']}, this version reads format {FORMAT}")
    return content


def read_checkpoint(
    directory: Path, step: int, expected: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Metadata and expected arrays of one checkpoint, with the same verdict on every host."""
    with together(CheckpointError, DamagedError):  # before the arrays, which all hosts read together
        content = read_metadata(directory, step)
    _check_architecture(directory, step, content["arrays"], expected)
    with together(CheckpointError, DamagedError):
        arrays = _read_arrays(directory / str(step) / "state", expected, content["arrays"])
    return content, arrays


def _check_architecture(
    directory: Path, step: int, found: Mapping[str, Any], expected: Mapping[str, Any], shown: int = 4
) -> None:
    roots = {name.split("/")[0] for name in expected}
    differences = []
    vocabulary = False
    for name in [*expected, *(name for name in found if name not in expected and name.split("/")[0] in roots)]:
        saved = {key: value for key, value in found.get(name, {}).items() if key != "checksum"}
        wanted = described(expected[name]) if name in expected else {}
        if saved != wanted:
            differences.append(f"{name}: {_in_words(saved)} in the checkpoint, {_in_words(wanted)} expected")
            vocabulary |= "embed" in name and bool(saved) and bool(wanted)
    if differences:
        more = f"; and {len(differences) - shown} more" if len(differences) > shown else ""
        hint = " (the tokenizer's vocabulary or the model's width differs)" if vocabulary else ""
        raise CheckpointError(
            f"checkpoint of step {step} in {directory} is of another architecture{hint}:"
            f" {'; '.join(differences[:shown])}{more}"
        )


def _in_words(description: Mapping[str, Any]) -> str:
    return f"{description['shape']} {description['dtype']}" if description else "absent"


def _read_arrays(path: Path, expected: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, jax.Array]:
    # An uncommitted array must come back uncommitted, or it cannot meet arrays on other devices; the way there is
    # over the host.
    shardings = {name: x.sharding if getattr(x, "committed", True) else None for name, x in expected.items()}
    structs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name]) for name, x in expected.items()}
    restore_args = {
        name: ocp.RestoreArgs(restore_type=np.ndarray)
        if shardings[name] is None
        else ocp.ArrayRestoreArgs(sharding=shardings[name], global_shape=struct.shape, dtype=struct.dtype)
        for name, struct in structs.items()
    }
    with without_echoes():
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                arrays = reader.restore(
                    path, args=ocp.args.PyTreeRestore(structs, restore_args=restore_args, partial_restore=True)
                )
            arrays = {name: jnp.asarray(arrays[name]) for name in expected}
            checksums = checksums_of(arrays)
        except Exception as error:
            release(error)
            if is_of_this_machine(error):
                raise CheckpointError(f"cannot read {path}: {reason_of(error)}") from error
            raise DamagedError(f"its arrays cannot be read: {reason_of(error)}") from error
    for name, checksum in checksums.items():
        if checksum != saved[name]["checksum"]:
            raise DamagedError(f"{name} is not what was saved")
    return arrays
