"""What a run would take, without the machines for it: parameters, FLOPs, memory and traffic of a device.

`python -m train plan --devices 64 PRESET [--field value ...]` lowers the step for a mesh of GPUs, with their kernels,
and compiles it for as many simulated CPU devices, where the compiler says how much memory a device needs. There
attention is `xla`'s and everything is float32, because compilers for CPUs fail at sums of 16-bit numbers over devices:
activations, and what is sent, take up to twice as much as on a GPU.
"""

import contextlib
import dataclasses
import math
from typing import Any

import jax

from train.config import TrainConfig, check
from train.data.tokenizer import load_tokenizer
from train.model.flops import active_parameters, total_parameters, train_flops_per_token
from train.model.transformer import padded_vocabulary
from train.parallel.communication import collectives, received_bytes
from train.parallel.lowering import Step, abstract_step, compile_here, lower_for_gpus
from train.parallel.sharding import MESH_AXES, check_divisible, make_mesh, mesh_shape
from train.parallel.traffic import predicted_bytes


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to plan for; then a preset and its flags."""

    devices: int = 8  # GPUs
    device_kind: str = "NVIDIA H100"  # as JAX names them
    vocab_size: int | None = None  # tokens; None: those of the tokenizer
    compile: bool = True  # for simulated CPU devices too, which takes minutes for a large model


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
    mesh = make_mesh(config.mesh, devices)
    _say_kernels(arguments, config, vocab_size)
    _say_sizes(config, vocab_size, abstract_step(config, vocab_size, mesh))
    predicted = predicted_bytes(config, vocab_size, sizes)
    print(f"a device receives per step in {config.model.dtype}, by formula, {_parts(predicted)}")
    if arguments.compile:
        model = dataclasses.replace(config.model, implementation="xla", dtype="float32")
        wide = dataclasses.replace(config, model=model)
        _say_compiled(compile_here(wide, vocab_size, mesh), predicted_bytes(wide, vocab_size, sizes))


def _say_kernels(arguments: Arguments, config: TrainConfig, vocab_size: int) -> None:
    """How many kernels the step calls on the GPUs that are planned for."""
    try:
        lowered = lower_for_gpus(config, vocab_size, devices=arguments.devices, device_kind=arguments.device_kind)
        kernels = lowered.as_text().count("__gpu$xla.gpu.triton")
        print(f"lowered for {arguments.devices} x {arguments.device_kind}: {kernels} calls of Triton kernels")
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        print(f"not lowered for {arguments.device_kind}: full attention is cuDNN's, which JAX does not find here")


def _say_sizes(config: TrainConfig, vocab_size: int, step: Step) -> None:
    """Parameters, FLOPs, and the state's part of a device."""
    total = total_parameters(step.state.params)
    flops = train_flops_per_token(config.model, config.data.sequence_length, vocab_size)
    state_bytes = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(step.state)
    )
    print(f"{total:,} parameters, {active_parameters(total, config.model):,} of them active per token of a vocabulary")
    print(f"of {vocab_size}; {flops / 1e9:.2f} GFLOPs per token of training")
    print(f"parameters and optimiser of a device: {state_bytes / 1e9:.2f} GB")


def _say_compiled(compiled: jax.stages.Compiled, predicted: dict[str, float]) -> None:
    """Memory of a device, and what it receives by formula and by the compiled program."""
    memory: Any = compiled.memory_analysis()
    kept, temporary = memory.argument_size_in_bytes / 1e9, memory.temp_size_in_bytes / 1e9
    print(
        f"compiled for CPUs in float32, a device needs {kept + temporary:.2f} GB: {kept:.2f} of arguments, which "
        f"results replace, and {temporary:.2f} of temporaries"
    )
    print(f"and receives per step, by formula, {_parts(predicted)}")
    print(f"by the compiled program, {_parts(received_bytes(collectives(compiled.as_text() or '')))}")


def _parts(sizes: dict[str, float]) -> str:
    parts = ", ".join(f"{name} {size / 1e6:,.2f}" for name, size in sizes.items() if size)
    return f"MB: {parts}; {sum(sizes.values()) / 1e6:.2f} in all"
