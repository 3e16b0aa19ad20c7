"""Which device holds what: the mesh, and one table from logical axes to mesh axes."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.config import MeshConfig, TrainConfig

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")

# Every logical axis of every parameter and activation. A group of query heads goes with its key/value head.
RULES = (
    ("batch", BATCH_AXES),
    ("sequence", "context"),
    ("embed", "fsdp"),
    ("expert", "expert"),
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
    """Raises ValueError where a mesh axis does not divide what is split along it."""
    sizes = dict(zip(MESH_AXES, mesh_shape(config.mesh, num_devices), strict=True))
    fsdp, tensor = sizes["fsdp"], sizes["tensor"]
    rows = config.data.batch_size // config.optimizer.accumulate
    for what, size, along, devices in (
        (
            "data.batch_size / optimizer.accumulate",
            rows,
            "mesh.data * mesh.fsdp * mesh.expert",
            math.prod(sizes[name] for name in BATCH_AXES),
        ),
        ("model.embed_dim", config.model.embed_dim, "mesh.fsdp", fsdp),
        ("model.num_kv_heads", config.model.num_kv_heads, "mesh.tensor", tensor),
        ("model.mlp_dim", config.model.mlp_dim, "mesh.tensor", tensor),
        ("rows of the embedding", vocab_rows, "mesh.tensor", tensor),
    ):
        if size % devices:
            raise ValueError(f"{what} = {size}: expected a multiple of {along} = {devices}")


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh over all devices."""
    shape = mesh_shape(config, jax.device_count())
    # Auto: XLA places intermediate results by itself. make_mesh's own default is Explicit.
    return jax.make_mesh(shape, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))


def tree_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a tree whose arrays carry logical axis names (flax's boxes); arrays without are replicated.

    Raises:
      ValueError: a name is not in `RULES`.
    """
    specs = nn.get_partition_spec(boxed)
    known = {name for name, _ in RULES}
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, PartitionSpec)):
        unknown = [name for name in spec or () if name is not None and name not in known]
        if unknown:
            raise ValueError(f"parameter {jax.tree_util.keystr(path)}: logical axes {unknown} are not in RULES")
    return nn.logical_to_mesh_sharding(specs, mesh, RULES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `BATCH_AXES`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def data_shards(mesh: Mesh, process_index: int | None = None) -> tuple[int, int]:
    """Which share of a batch's rows a process must load, and of how many: (index, count).

    Processes whose devices stand at the same places along `BATCH_AXES` hold the same rows and have the same index.

    Args:
      process_index: default: of this process.

    Raises:
      ValueError: the rows of some process are not one contiguous share, equal to or apart from every other's.
    """
    process_index = jax.process_index() if process_index is None else process_index
    batch_dims = [mesh.axis_names.index(axis) for axis in BATCH_AXES]
    held: dict[int, set[int]] = {}  # places along the batch axes, in the order of rows, by process
    for place, device in np.ndenumerate(mesh.devices):
        rows = np.ravel_multi_index([place[i] for i in batch_dims], [mesh.devices.shape[i] for i in batch_dims])
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


def put_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch as arrays over the whole mesh."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


def on_mesh(jitted: Callable, mesh: Mesh) -> Callable:
    """A jitted function that is traced and run with the mesh and `RULES` in force."""

    def call(*arguments: Any) -> Any:
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            return jitted(*arguments)

    return call
