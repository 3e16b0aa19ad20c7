"""The update of a run without its data: shapes and shardings, the program for GPUs, the program compiled here."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh

from train.config import TrainConfig
from train.determinism import compiler_options
from train.model.transformer import Transformer
from train.optimizer import make_optimizer
from train.parallel.sharding import MESH_AXES, batch_sharding, mesh_shape, padded_length, tree_shardings
from train.step import TrainState, make_init, make_train_step


@dataclasses.dataclass(frozen=True)
class Step:
    """A jitted update and the shapes that it takes."""

    update: Any
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]


def abstract_state(
    model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state on a mesh."""
    # They are the same whoever computes attention; kernels by name would be interpreted here, if there is no GPU.
    model = Transformer(dataclasses.replace(model.config, implementation=None), model.vocab_size)
    boxed = jax.eval_shape(make_init(model, optimizer), jax.random.key(0))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        tree_shardings(boxed, mesh),
    )


def abstract_step(config: TrainConfig, vocab_size: int, mesh: Mesh | AbstractMesh) -> Step:
    """The update of a run as it is on a mesh, from a whole batch."""
    model, optimizer = Transformer(config.model, vocab_size), make_optimizer(config.optimizer, config.steps)
    state = abstract_state(model, optimizer, mesh)
    shape = (
        config.data.batch_size,
        padded_length(config.data.sequence_length, mesh.shape["context"], config.model.nsa.compress_stride),
    )
    dtypes = {"weights": jnp.float32} | dict.fromkeys(("tokens", "targets", "target_bytes"), jnp.int32)
    if config.data.isolate_documents:
        dtypes["segment_ids"] = jnp.int32
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh)) for name, dtype in dtypes.items()}
    update = make_train_step(model, optimizer, accumulate=config.optimizer.accumulate, z_loss=config.optimizer.z_loss)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    options = compiler_options(config.deterministic)
    jitted = jax.jit(update, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)
    return Step(jitted, state, batch)


def lower_for_gpus(config: TrainConfig, vocab_size: int, *, devices: int, device_kind: str) -> jax.stages.Lowered:
    """The update lowered for a mesh of GPUs, kernels included, on any machine."""
    kind = AxisType.Explicit if config.mesh.explicit else AxisType.Auto
    mesh = AbstractMesh(
        mesh_shape(config.mesh, devices),
        MESH_AXES,
        axis_types=(kind,) * len(MESH_AXES),
        abstract_device=jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=None, platform="gpu"),
    )
    step = abstract_step(config, vocab_size, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        return step.update.trace(step.state, step.batch).lower(lowering_platforms=("cuda",))


def compile_here(config: TrainConfig, vocab_size: int, mesh: Mesh) -> jax.stages.Compiled:
    """The update compiled for a mesh of devices of this machine."""
    step = abstract_step(config, vocab_size, mesh)
    with jax.set_mesh(mesh):
        return step.update.lower(step.state, step.batch).compile()
