"""Every setting of a run, as typed dataclasses: the command line, the saved run and the code all read these."""

import dataclasses
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from nsa_jax.config import NSAConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder-only transformer."""

    num_layers: int = 4  # transformer blocks
    embed_dim: int = 256  # width of the residual stream
    num_heads: int = 8  # query heads
    num_kv_heads: int = 2  # key/value heads; the heads of a group share keys, values and selected blocks
    head_dim: int = 32  # size of a query/key head
    v_head_dim: int | None = None  # size of a value head; None: head_dim
    mlp_dim: int = 768  # hidden width of the SwiGLU
    # The one flag that comparisons change; also --attention.
    attention: Annotated[Literal["nsa", "full", "window"], tyro.conf.arg(aliases=("--attention",))] = "nsa"
    implementation: Literal["reference", "xla", "triton", "mosaic"] | None = None  # of the attention; None: the fastest
    nsa: NSAConfig = NSAConfig()  # sizes of the sparse branches; `window` is also what attention = window uses
    compression: Literal["mlp", "linear", "mean"] = "mlp"  # phi, which makes the compressed keys and values
    share_kv: bool = False  # one key/value projection for the three branches instead of one each
    rope_theta: float = 10_000.0  # base of the rotary position embedding
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    tie_embeddings: bool = True  # the output layer is the transposed embedding
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters are always float32
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes: nothing, all but matmuls, all


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches."""

    path: str | None = None  # file, folder or glob; None: the Python source of the interpreter's standard library
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"  # auto: by the file's ending
    suffix: str | None = None  # in a folder, only files whose name ends so; None: .py for the default path, else all
    text_field: str = "text"  # JSONL key or Parquet column that holds the text
    tokenizer: str = "byte"  # "byte", or the path of a Hugging Face tokenizers JSON file
    sequence_length: int = 512  # T, tokens per row
    batch_size: int = 8  # rows per optimiser step over all hosts, before gradient accumulation splits them
    isolate_documents: bool = True  # a token sees its own document only; documents start on a selection block
    held_out_fraction: float = 0.05  # of the documents, never trained on
    seed: int = 0  # of the shuffle and of the held-out split
    workers: int = 0  # Grain worker processes; 0: in the training process


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay."""

    learning_rate: float = 1e-3  # at the end of warm-up
    final_fraction: float = 0.1  # of learning_rate, at the last step
    warmup_steps: int = 20  # linear from 0
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    weight_decay: float = 0.1  # decoupled, on matrices only
    clip_norm: float = 1.0  # global norm of the gradient
    accumulate: int = 1  # microbatches a step is split into
    z_loss: float = 0.0  # weight of the squared log-normaliser of the softmax


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is saved and how long it is kept."""

    every: int = 100  # steps between checkpoints; the last step is always saved
    keep_last: int = 2  # newest checkpoints kept
    keep_best: int = 1  # checkpoints kept for the lowest held-out bits per byte


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis."""

    data: int = -1  # copies of the model, each on its part of the batch; -1: the devices that are left
    fsdp: int = 1  # devices that share one copy's parameters, and split the batch too
    expert: int = 1  # devices that share the routed experts, and split the batch too
    context: int = 1  # devices that split the sequence
    tensor: int = 1  # devices that split K/V heads (with their groups), MLP and vocabulary


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """The processes of the run, for launchers that JAX does not know; SLURM, Open MPI and Kubernetes need nothing."""

    coordinator_address: str | None = None  # host:port of the first process, on which it will listen
    num_processes: int | None = None  # of the run; 1: alone, whatever started it
    process_id: int | None = None  # of this process, from 0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run."""

    model: ModelConfig = ModelConfig()  # the network
    data: DataConfig = DataConfig()  # the text
    optimizer: OptimizerConfig = OptimizerConfig()  # the update
    checkpoint: CheckpointConfig = CheckpointConfig()  # the saves
    mesh: MeshConfig = MeshConfig()  # the devices
    distributed: DistributedConfig = DistributedConfig()  # the processes
    run_dir: Path = Path("runs/tiny")  # everything this run writes; a run found there is resumed
    steps: int = 300  # optimiser steps
    seed: int = 0  # of the parameters and of sampling
    eval_every: int = 100  # steps between held-out evaluations; the last step is always evaluated
    eval_batches: int = 16  # held-out batches per evaluation
    sample_prompt: str = "def "  # what the sample at the end continues
    sample_tokens: int = 200  # its length in tokens
    tensorboard: bool = False  # also write TensorBoard events (extra: tensorboard)
    wandb: str | None = None  # also log to this Weights & Biases project (extra: wandb)


def check(config: TrainConfig) -> None:
    """Raises ValueError, naming the setting, where a value is impossible or two contradict each other."""
    model, data, optimizer, checkpoint = config.model, config.data, config.optimizer, config.checkpoint
    for name, value, least in (
        ("model.num_layers", model.num_layers, 1),
        ("model.embed_dim", model.embed_dim, 1),
        ("model.num_heads", model.num_heads, 1),
        ("model.num_kv_heads", model.num_kv_heads, 1),
        ("model.head_dim", model.head_dim, 1),
        ("model.mlp_dim", model.mlp_dim, 1),
        ("data.sequence_length", data.sequence_length, 1),
        ("data.batch_size", data.batch_size, 1),
        ("optimizer.accumulate", optimizer.accumulate, 1),
        ("optimizer.warmup_steps", optimizer.warmup_steps, 0),
        ("checkpoint.every", checkpoint.every, 1),
        ("checkpoint.keep_last", checkpoint.keep_last, 1),
        ("checkpoint.keep_best", checkpoint.keep_best, 0),
        ("steps", config.steps, 1),
        ("eval_every", config.eval_every, 1),
        ("eval_batches", config.eval_batches, 1),
        ("sample_tokens", config.sample_tokens, 0),
    ):
        if value < least:
            raise ValueError(f"{name} = {value}: expected at least {least}")
    for name, positive in (
        ("model.rope_theta", model.rope_theta),
        ("model.norm_eps", model.norm_eps),
        ("optimizer.learning_rate", optimizer.learning_rate),
        ("optimizer.clip_norm", optimizer.clip_norm),
    ):
        if not positive > 0:
            raise ValueError(f"{name} = {positive}: expected a positive number")
    if model.num_heads % model.num_kv_heads:
        raise ValueError(
            f"model.num_heads = {model.num_heads}: expected a multiple of model.num_kv_heads = {model.num_kv_heads}"
        )
    if model.head_dim % 2:
        raise ValueError(f"model.head_dim = {model.head_dim}: expected an even number, for the rotary embedding")
    if data.isolate_documents and data.sequence_length % model.nsa.select_block:
        raise ValueError(
            f"data.sequence_length = {data.sequence_length}: expected a multiple of model.nsa.select_block = "
            f"{model.nsa.select_block}, because data.isolate_documents starts every document on one"
        )
    if data.batch_size % optimizer.accumulate:
        raise ValueError(
            f"data.batch_size = {data.batch_size}: expected a multiple of optimizer.accumulate = {optimizer.accumulate}"
        )
    if optimizer.warmup_steps >= config.steps:
        raise ValueError(
            f"optimizer.warmup_steps = {optimizer.warmup_steps}: expected fewer than steps = {config.steps}"
        )


def to_json(config: TrainConfig) -> str:
    """The config as indented JSON; `from_json` reads it back."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str)


def from_json(text: str) -> TrainConfig:
    """A config that `to_json` wrote.

    Raises ValueError naming a setting that this version does not know. Settings that are missing have their defaults.
    """
    return _build(TrainConfig, json.loads(text), "")


def differences(old: TrainConfig, new: TrainConfig) -> Iterator[tuple[str, Any, Any]]:
    """Settings that differ, as (dotted name, old value, new value)."""
    yield from _differences(dataclasses.asdict(old), dataclasses.asdict(new), "")


def _build(kind: Any, value: Any, prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    unknown = [prefix + name for name in value if name not in hints]
    if unknown:
        raise ValueError(f"unknown setting {', '.join(unknown)}")
    return kind(**{name: _convert(hints[name], item, f"{prefix}{name}.") for name, item in value.items()})


def _convert(hint: Any, value: Any, prefix: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, prefix)
    return Path(value) if hint is Path else value


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for name, value in new.items():
        if isinstance(value, dict):
            yield from _differences(old[name], value, f"{prefix}{name}.")
        elif value != old[name]:
            yield prefix + name, old[name], value
