"""What a run would take, before there are machines for it: parameters, FLOPs, memory and traffic of a device.

`python -m train plan --devices 64 PRESET [--field value ...]` lowers the step for a mesh of GPUs, with their kernels,
and compiles it for as many simulated CPU devices, where the compiler says how much memory a device needs. There
attention is `xla`'s and everything is float32, because compilers for CPUs fail at sums of 16-bit numbers over devices:
activations, and what is sent, take up to twice as much as on a GPU.
"""

import contextlib
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from train.config import TrainConfig, check
from train.data.tokenizer import load_tokenizer
from train.metrics import active_parameters, total_parameters, train_flops_per_token
from train.model.transformer import Transformer, padded_vocabulary
from train.optimizer import make_optimizer
from train.parallel.communication import collectives, predicted_bytes, received_bytes
from train.parallel.sharding import (
    MESH_AXES,
    batch_sharding,
    check_divisible,
    make_mesh,
    mesh_shape,
    padded_length,
    tree_shardings,
)
from train.step import make_init, make_train_step


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to plan for; then a preset and its flags."""

    devices: int = 8  # GPUs
    device_kind: str = "NVIDIA H100"  # as JAX names them
    vocab_size: int | None = None  # tokens; None: those of the tokenizer
    compile: bool = True  # for simulated CPU devices too, which takes minutes for a large model


@dataclasses.dataclass(frozen=True)
class Step:
    """The update of a run without its data: a jitted function and the shapes that it takes."""

    update: Any
    state: Any
    batch: dict[str, jax.ShapeDtypeStruct]


def abstract_step(config: TrainConfig, vocab_size: int, mesh: Mesh | AbstractMesh) -> Step:
    """The update of a run as it is on a mesh, from a whole batch."""
    model, optimizer = Transformer(config.model, vocab_size), make_optimizer(config.optimizer, config.steps)
    boxed = jax.eval_shape(make_init(model, optimizer), jax.random.key(0))
    shardings = tree_shardings(boxed, mesh)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), nn.meta.unbox(boxed), shardings
    )
    shape = (
        config.data.batch_size,
        padded_length(config.data.sequence_length, mesh.shape["context"], config.model.nsa.compress_stride),
    )
    dtypes = {"weights": jnp.float32} | dict.fromkeys(("tokens", "targets", "target_bytes"), jnp.int32)
    if config.data.isolate_documents:
        dtypes["segment_ids"] = jnp.int32
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh)) for name, dtype in dtypes.items()}
    update = make_train_step(model, optimizer, accumulate=config.optimizer.accumulate, z_loss=config.optimizer.z_loss)
    return Step(jax.jit(update, donate_argnums=0, out_shardings=(shardings, None)), state, batch)


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


def plan(arguments: Arguments, config: TrainConfig) -> None:
    """Prints what a step takes.

    Raises:
      ValueError: a setting is impossible, or the mesh does not fit the model or the devices.
    """
    check(config)
    with contextlib.suppress(RuntimeError):  # JAX runs already, and the devices that it has must do
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.devices)
    vocab_size = arguments.vocab_size or load_tokenizer(config.data.tokenizer).vocab_size
    check_divisible(config, padded_vocabulary(vocab_size), arguments.devices)
    devices = jax.devices("cpu")[: arguments.devices]
    if len(devices) < arguments.devices:
        raise ValueError(f"devices = {arguments.devices}: expected at most {len(devices)}, those that JAX runs with")
    sizes = dict(zip(MESH_AXES, mesh_shape(config.mesh, arguments.devices), strict=True))
    print(f"mesh {sizes}, {config.data.batch_size} rows of {config.data.sequence_length} tokens a step")

    try:
        lowered = lower_for_gpus(config, vocab_size, devices=arguments.devices, device_kind=arguments.device_kind)
        kernels = lowered.as_text().count("__gpu$xla.gpu.triton")
        print(f"lowered for {arguments.devices} x {arguments.device_kind}: {kernels} calls of Triton kernels")
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        print(f"not lowered for {arguments.device_kind}: full attention is cuDNN's, which JAX does not find here")

    step = abstract_step(config, vocab_size, make_mesh(config.mesh, devices))
    total = total_parameters(step.state.params)
    flops = train_flops_per_token(config.model, config.data.sequence_length, vocab_size)
    state_bytes = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(step.state)
    )
    print(f"{total:,} parameters, {active_parameters(total, config.model):,} of them active per token of a vocabulary")
    print(f"of {vocab_size}; {flops / 1e9:.2f} GFLOPs per token of training")
    print(f"parameters and optimiser of a device: {state_bytes / 1e9:.2f} GB")
    predicted = predicted_bytes(config, vocab_size, sizes)
    print(f"a device receives per step in {config.model.dtype}, by formula, {_parts(predicted)}")
    if arguments.compile:
        model = dataclasses.replace(config.model, implementation="xla", dtype="float32")
        wide = dataclasses.replace(config, model=model)
        compiled = compile_here(wide, vocab_size, make_mesh(config.mesh, devices))
        predicted = predicted_bytes(wide, vocab_size, sizes)
        memory: Any = compiled.memory_analysis()
        counted = received_bytes(collectives(compiled.as_text() or ""))
        kept, temporary = memory.argument_size_in_bytes / 1e9, memory.temp_size_in_bytes / 1e9
        print(
            f"compiled for CPUs in float32, a device needs {kept + temporary:.2f} GB: {kept:.2f} of arguments, which "
            f"results replace, and {temporary:.2f} of temporaries"
        )
        print(f"and receives per step, by formula, {_parts(predicted)}")
        print(f"by the compiled program, {_parts(counted)}")


def _parts(sizes: dict[str, float]) -> str:
    parts = ", ".join(f"{name} {size / 1e6:,.2f}" for name, size in sizes.items() if size)
    return f"MB: {parts}; {sum(sizes.values()) / 1e6:.2f} in all"
