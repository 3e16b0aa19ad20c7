"""Which device holds what: the mesh, and one table from logical axes to mesh axes."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import DTypeLike

from nsa_jax.context import to_zigzag
from nsa_jax.sharding import free_split, place
from train.config import MeshConfig, TrainConfig
from train.model.attention import attention_kind

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
SHARE_AXES = ("fsdp", "context")

# Every logical axis of every parameter and activation. A group of query heads goes with its key/value head. Devices
# that hold parts of the same sequences share the parameters too, like those along "fsdp".
RULES: tuple[tuple[str, Any], ...] = (
    ("batch", BATCH_AXES),
    ("sequence", "context"),
    ("embed", SHARE_AXES),
    ("expert", "expert"),
    ("router", None),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("compress_block", None),
    ("phi_hidden", None),
    ("phi_out", None),
    ("gate_hidden", None),
    ("branch", None),
    ("layers", None),
)


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Devices along `MESH_AXES`, with data = -1 worked out.

    Raises:
      ValueError: a size is neither positive nor, for data, -1, or the sizes do not multiply to `num_devices`.
    """
    for name in MESH_AXES:
        size = getattr(config, name)
        if size < 1 and not (name == "data" and size == -1):
            expected = "at least 1, or -1 for the devices that are left" if name == "data" else "at least 1"
            raise ValueError(f"mesh.{name} = {size}: expected {expected}")
    others = [getattr(config, name) for name in MESH_AXES[1:]]
    data = num_devices // math.prod(others) if config.data == -1 else config.data
    if data * math.prod(others) != num_devices:
        sizes = ", ".join(f"{name} {getattr(config, name)}" for name in MESH_AXES)
        raise ValueError(f"mesh = ({sizes}): expected a product of {num_devices}, the number of devices")
    return data, *others


def check_divisible(config: TrainConfig, vocab_rows: int, num_devices: int) -> None:
    """Raises ValueError where a mesh axis does not divide what is split along it, or the attention refuses the mesh."""
    sizes = dict(zip(MESH_AXES, mesh_shape(config.mesh, num_devices), strict=True))
    tensor, moe = sizes["tensor"], config.model.moe
    rows = config.data.batch_size // config.optimizer.accumulate
    for what, size, along, devices in (
        (
            "data.batch_size / optimizer.accumulate",
            rows,
            "mesh.data * mesh.fsdp * mesh.expert",
            math.prod(sizes[name] for name in BATCH_AXES),
        ),
        (
            "model.embed_dim",
            config.model.embed_dim,
            "mesh.fsdp * mesh.context",
            math.prod(sizes[name] for name in SHARE_AXES),
        ),
        ("model.num_kv_heads", config.model.num_kv_heads, "mesh.tensor", tensor),
        ("model.mlp_dim", config.model.mlp_dim, "mesh.tensor", tensor),
        ("rows of the embedding", vocab_rows, "mesh.tensor", tensor),
        ("model.moe.num_routed", moe.num_routed, "mesh.expert", sizes["expert"]),
        ("model.moe.expert_dim", moe.expert_dim if moe.num_routed else 0, "mesh.tensor", tensor),
    ):
        if size % devices:
            raise ValueError(f"{what} = {size}: expected a multiple of {along} = {devices}")
    for name in sorted(set(config.model.attention_of_layers)):
        attention_kind(name).check(config, sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over the given devices; None: over all devices."""
    devices = jax.devices() if devices is None else devices
    kind = AxisType.Explicit if config.explicit else AxisType.Auto
    return jax.make_mesh(
        mesh_shape(config, len(devices)), MESH_AXES, axis_types=(kind,) * len(MESH_AXES), devices=devices
    )


def tree_shardings(boxed: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings of a tree whose arrays carry logical axis names (flax's boxes); arrays without are replicated.

    Raises:
      ValueError: a name is not in `RULES`.
    """
    specs = nn.get_partition_spec(jax.tree.map(_without_empty_box, boxed, is_leaf=_is_box))
    known = {name for name, _ in RULES}
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, PartitionSpec)):
        unknown = [name for name in spec or () if name is not None and name not in known]
        if unknown:
            raise ValueError(f"parameter {jax.tree_util.keystr(path)}: logical axes {unknown} are not in RULES")
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, free_split(logical(*spec), mesh)),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.meta.AxisMetadata)


def _without_empty_box(x: Any) -> Any:
    """What is in a box that holds no array: an optimiser leaves such where another one updates the parameter."""
    return nn.meta.unbox(x) if _is_box(x) and not jax.tree.leaves(x) else x


def activation(x: jax.Array, *names: str | None) -> jax.Array:
    """An array of the model, split by `RULES` with these names of its axes."""
    return place(x, logical(*names))


def logical(*names: str | None) -> PartitionSpec:
    """The mesh axes of logical axes."""
    rules = dict(RULES)
    return PartitionSpec(*(name and rules[name] for name in names))


def weight(parameter: jax.Array, axes: tuple[str, ...], dtype: DTypeLike) -> jax.Array:
    """A parameter as the model uses it: in the compute dtype, and split along "tensor" only.

    What `SHARE_AXES` split is gathered after rounding.
    """
    return activation(parameter.astype(dtype), *(None if axis == "embed" else axis for axis in axes))


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Rows over `BATCH_AXES`, tokens over context."""
    return NamedSharding(mesh, free_split(logical("batch", "sequence"), mesh))


def data_shards(mesh: Mesh, process_index: int | None = None) -> tuple[int, int]:
    """Which share of a batch's rows a process must load, as (index, count).

    Processes whose devices have the same coordinates along `BATCH_AXES` hold the same rows and have the same index.

    Args:
      process_index: default: of this process.

    Raises:
      ValueError: the rows of some process are not one contiguous share, equal to or apart from every other's.
    """
    process_index = jax.process_index() if process_index is None else process_index
    batch_dims = [mesh.axis_names.index(axis) for axis in BATCH_AXES]
    held: dict[int, set[int]] = {}  # coordinates along the batch axes, in the order of rows, by process
    for coordinates, device in np.ndenumerate(mesh.devices):
        rows = np.ravel_multi_index([coordinates[i] for i in batch_dims], [mesh.devices.shape[i] for i in batch_dims])
        held.setdefault(device.process_index, set()).add(int(rows))
    parts = math.prod(mesh.devices.shape[i] for i in batch_dims)
    size = len(held[process_index])
    for process, places in sorted(held.items()):
        first = min(places)
        if len(places) != size or first % size or places != set(range(first, first + size)):
            raise ValueError(
                f"mesh = {dict(mesh.shape)}: of the {parts} equal parts of a batch process {process} holds "
                f"{sorted(places)}; expected one contiguous share of {size}, as long as that of process "
                f"{process_index}. Choose mesh axes that divide the devices of a process or are multiples of them"
            )
    return min(held[process_index]) // size, parts // size


_data_shards_of_this_process = functools.cache(data_shards)  # asked for every batch


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, stride: int) -> dict[str, jax.Array]:
    """This process's share of a batch's rows (`data_shards`) as arrays over the whole mesh.

    Where "context" splits the tokens, rows are first padded with tokens of weight 0 to a multiple of 2 * context *
    `stride`, where `stride` is the model's compress_stride. Then the tokens are brought into zigzag order
    (`nsa_jax.context`).
    """
    sharding, context = batch_sharding(mesh), mesh.shape["context"]
    index, count = _data_shards_of_this_process(mesh)
    if context > 1:
        batch = {key: to_zigzag(_padded(key, value, context, stride), context) for key, value in batch.items()}

    def put(value: np.ndarray) -> jax.Array:
        rows = len(value)

        def part(where: Any) -> np.ndarray:
            begin, end, _ = where[0].indices(rows * count)
            return value[begin - index * rows : end - index * rows, where[1]]

        return jax.make_array_from_callback((rows * count, *value.shape[1:]), sharding, part)

    return {key: put(value) for key, value in batch.items()}


def padded_length(length: int, context: int, stride: int) -> int:
    """Tokens of a row once `put_batch` has padded it."""
    return length if context == 1 else length + -length % (2 * context * stride)


def _padded(key: str, value: np.ndarray, context: int, stride: int) -> np.ndarray:
    missing = padded_length(value.shape[1], context, stride) - value.shape[1]
    # Padding belongs to the document before it, which cannot see it.
    return np.pad(value, ((0, 0), (0, missing)), mode="edge" if key == "segment_ids" else "constant")


def on_mesh(jitted: Callable, mesh: Mesh) -> Callable:
    """A jitted function that is traced and run with the mesh in context."""

    def call(*arguments: Any) -> Any:
        with jax.set_mesh(mesh):
            return jitted(*arguments)

    return call
