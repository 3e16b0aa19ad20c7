"""Runs made before: their settings, model and parameters, to generate from, evaluate or start another run with."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nsa_jax import RopeScaling
from train import annealing
from train.checkpoints.checkpointer import Checkpointer
from train.config import MeshConfig, TrainConfig, differences
from train.data.tokenizer import Tokenizer
from train.model.transformer import Transformer, padded_vocabulary
from train.parallel.sharding import check_divisible, make_mesh, tree_shardings
from train.run_folder import load_run_tokenizer, read_config, read_facts

# Model settings that may differ from those of `init_from`. They change no parameter, and continued training adapts to
# other positions, arithmetic and kernels.
MAY_DIFFER = ("model.rope_theta", "model.rope_scaling.", "model.implementation", "model.remat", "model.dtype")


class SavedModel(NamedTuple):
    """The model of a run."""

    config: TrainConfig
    tokenizer: Tokenizer
    model: Transformer
    params: Any
    mesh: Mesh | None = None  # that splits them; None: they are on one device


def load_model(
    run: Path, *, step: int | None = None, rope_scaling: RopeScaling | None = None, tensor: int | None = 1
) -> SavedModel:
    """The model of a run, from its newest undamaged checkpoint or that of `step`.

    Args:
      run: its folder.
      step: of the checkpoint.
      rope_scaling: instead of the run's own.
      tensor: devices that split heads, MLP and vocabulary. None: as many as in training, or one if there are fewer.

    Raises:
      ValueError: there is no such run, or not as many devices, or they do not divide what they split.
      CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    config = read_config(run)
    if rope_scaling is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, rope_scaling=rope_scaling))
    tokenizer = load_run_tokenizer(run, config)
    model = Transformer(config.model, tokenizer.vocab_size)
    mesh = _mesh(config, padded_vocabulary(tokenizer.vocab_size), tensor)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, config.model.nsa.select_block), jnp.int32))
    boxed, device = shapes["params"], jax.sharding.SingleDeviceSharding(jax.devices()[0])
    unboxed = nn.meta.unbox(boxed)
    shardings = jax.tree.map(lambda _: device, unboxed) if mesh is None else tree_shardings(boxed, mesh)
    abstract = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), unboxed, shardings)
    params = Checkpointer(run / "checkpoints", config.checkpoint).restore_parameters(abstract, step)
    return SavedModel(config, tokenizer, model, params, mesh)


def _mesh(config: TrainConfig, vocab_rows: int, tensor: int | None) -> Mesh | None:
    """The mesh of so many devices that split heads; None for one."""
    devices = jax.devices()
    if tensor is None:
        tensor = config.mesh.tensor if config.mesh.tensor <= len(devices) else 1
    if not 1 <= tensor <= len(devices):
        raise ValueError(f"tensor = {tensor}: expected 1 to {len(devices)}, the number of devices")
    if tensor == 1:
        return None
    sizes = MeshConfig(data=1, tensor=tensor)
    check_divisible(dataclasses.replace(config, mesh=sizes), vocab_rows, tensor)
    return make_mesh(sizes, devices[:tensor])


def check_start(config: TrainConfig, facts: dict[str, Any]) -> None:
    """Raises ValueError where a run cannot start from `init_from`: no run, no checkpoint, or a model that differs.

    `facts` are those of the run that is to start.
    """
    assert config.init_from is not None
    old = read_config(config.init_from, "init_from")
    may_differ: tuple[str, ...] = MAY_DIFFER
    if annealing.goes_over(old.model, config.model):
        may_differ += annealing.OF_ATTENTION
        annealing.check_window(old.model, config)
    elif config.anneal_steps:
        raise ValueError(
            f"anneal_steps = {config.anneal_steps}: expected 0, because attention = {old.model.attention_name} of "
            f"init_from does not go over to {config.model.attention_name}; full attention goes over to NSA"
        )
    changed = [
        change
        for change in differences(old, config)
        if change[0].startswith("model.") and not change[0].startswith(may_differ)
    ]
    before = read_facts(config.init_from, "init_from")
    for name, words in (("vocab_size", "the size of the vocabulary"), ("tokenizer", "the tokenizer (SHA-256)")):
        if before.get(name, facts[name]) != facts[name]:
            changed.append((words, before[name], facts[name]))
    if changed:
        shown = "; ".join(f"{name} was {before!r}, is {now!r}" for name, before, now in changed)
        raise ValueError(f"init_from = {config.init_from} holds another model: {shown}")
    checkpoints = Checkpointer(config.init_from / "checkpoints", config.checkpoint)
    if checkpoints.latest_step is None:
        raise ValueError(f"init_from = {config.init_from}: expected a run with a checkpoint, found none")
    if config.init_step is not None and not (checkpoints.directory / str(config.init_step)).is_dir():
        raise ValueError(
            f"init_step = {config.init_step}: expected the step of a checkpoint in {checkpoints.directory}"
        )


def starting_parameters(config: TrainConfig, fresh: Any) -> Any:
    """The parameters that a run with `init_from` starts from, with the shardings of `fresh`, its initial parameters.

    Those that `init_from` lacks, because its attention is dense and the run's is NSA, are the fresh ones.

    Raises:
      CheckpointError: the checkpoint cannot be read.
    """
    assert config.init_from is not None
    checkpoints = Checkpointer(config.init_from / "checkpoints", config.checkpoint)
    if not annealing.goes_over(read_config(config.init_from, "init_from").model, config.model):
        return checkpoints.restore_parameters(fresh, config.init_step)
    dense = checkpoints.restore_parameters(annealing.dense_shapes(fresh, config.model), config.init_step)
    return annealing.from_dense(dense, fresh, config.model)
