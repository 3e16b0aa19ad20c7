"""Every setting of a run, as typed dataclasses: the command line, the saved run and the code all read these."""

import dataclasses
import json
import operator
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from nsa_jax.config import NSAConfig
from nsa_jax.rope import RopeScaling
from train.data.formats import FORMATS
from train.model.attention import KINDS

# What the command line offers, from the tables that implement it.
if TYPE_CHECKING:
    Attention = str
    DataFormat = str
else:
    Attention = Literal[tuple(KINDS)]
    DataFormat = Literal["auto", *FORMATS]
Remat = Literal["none", "dots", "attention", "full"]
KVDtype = Literal["int8"]  # of a cache's pages, if it is not that of the computation


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of the SwiGLU (arXiv 2401.06066)."""

    num_routed: int = 0  # experts of which every token chooses `top_k`; 0: no experts, every layer is dense
    num_shared: int = 0  # experts that every token uses
    top_k: int = 2  # routed experts that a token uses
    expert_dim: int = 128  # hidden width of one expert's SwiGLU
    first_dense: int = 0  # layers at the start that keep the dense SwiGLU of mlp_dim
    score: Literal["softmax", "sigmoid"] = "softmax"  # from router logits to scores
    normalise: bool = False  # the weights of the chosen experts are divided by their sum
    routed_scaling: float = 1.0  # factor on those weights
    aux_loss: float = 0.0  # weight of the balancing loss in each layer; 0: off
    bias_speed: float = 1e-3  # by which the balancing bias moves in a step (arXiv 2408.15664); 0: off


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
    moe: MoEConfig = MoEConfig()  # experts in its place
    # The one flag that comparisons change; also --attention.
    attention: Annotated[Attention, tyro.conf.arg(aliases=("--attention",))] = "nsa"
    # Instead, kinds for the layers in turn, repeated to the last one: nsa window is NSA in every other layer.
    pattern: Annotated[tuple[Attention, ...], tyro.conf.arg(aliases=("--pattern",))] = ()
    implementation: Literal["reference", "xla", "triton", "mosaic"] | None = None  # of the attention; None: the fastest
    nsa: NSAConfig = NSAConfig()  # sizes of the sparse branches; `window` is also what attention = window uses
    compression: Literal["mean", "linear", "mlp"] = "mean"  # phi, which makes the compressed keys and values
    share_kv: bool = True  # one key/value projection for the three branches instead of one each, as in the paper
    tie_keys: bool = False  # compressed keys are means of the selected branch's keys; phi is for values alone
    selection_loss: float = 0.0  # weight of what teaches NSA's selection (`nsa_jax.selection.selection_loss`); 0: off
    selection_loss_queries: int = 32  # of every row, drawn anew in each step, from which it is computed
    selection_loss_moves_queries: bool = True  # whether its gradient goes to the queries too, which all branches share
    qk_norm: bool = False  # RMSNorm of every query and key head before the rotary embedding
    qkv_bias: bool = False  # biases of the query, key and value projections
    rope_theta: float = 10_000.0  # base of the rotary position embedding
    rope_scaling: RopeScaling = RopeScaling()  # its stretching to contexts longer than those trained on
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    tie_embeddings: bool = True  # the output layer is the transposed embedding
    embedding_init: float = 0.02  # standard deviation of the initial embedding
    # Initial output projections of attention and dense MLPs: as other matrices, or 1 / sqrt(2 num_layers) as large.
    output_init: Literal["plain", "depth"] = "plain"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters are always float32
    # What the backward pass computes again: nothing, all but matmuls and attention, all but attention, everything.
    remat: Remat = "none"

    @property
    def attention_of_layers(self) -> tuple[str, ...]:
        """The kind of attention of each layer."""
        kinds = self.pattern or (self.attention,)
        return tuple(kinds[layer % len(kinds)] for layer in range(self.num_layers))

    @property
    def attention_name(self) -> str:
        """The kinds of attention in a word, for tables and legends."""
        return "+".join(self.pattern or (self.attention,))

    @property
    def output_init_scale(self) -> float:
        """Factor on the initial output projections, of which 2 num_layers are added to the residual stream."""
        return (2 * self.num_layers) ** -0.5 if self.output_init == "depth" else 1.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches."""

    path: str | None = None  # file, folder or glob; None: the Python source of the interpreter's standard library
    format: DataFormat = "auto"  # auto: by the file's ending; chat: see train.data.chat
    suffix: str | None = (
        None  # in a folder, only files whose name ends so; None: .py for the default path, all files for others
    )
    text_field: str = "text"  # JSONL key or Parquet column that holds the text
    chat_start: str = "<|im_start|>"  # before the role of a turn: a token if the tokenizer has it, otherwise text
    chat_end: str = "<|im_end|>"  # after the content of a turn
    tokenizer: str = "byte"  # "byte", or the path of a Hugging Face tokenizers JSON file
    sequence_length: int = 512  # T, tokens per row
    batch_size: int = 8  # rows per optimiser step over all hosts, before gradient accumulation splits them
    isolate_documents: bool = True  # a token sees its own document only; documents start on a selection block
    held_out_fraction: float = 0.05  # of the documents, never trained on
    held_out_by: Literal["document", "file"] = "document"  # file: all documents of a file are on the same side
    neighbours: int = 1  # documents that follow one another in their files stay together in the shuffle
    seed: int = 0  # of the shuffle and of the held-out split
    workers: int = 0  # Grain worker processes; 0: in the training process


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, with warm-up and decay."""

    # muon: matrices inside the layers by Muon, its updates scaled to the size of AdamW's; all else by AdamW.
    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3  # at the end of warm-up
    schedule: Literal["cosine", "wsd"] = "cosine"  # after warm-up; wsd: constant, then linear over decay_fraction
    decay_fraction: float = 0.2  # of all steps, at the end, in which wsd decays
    final_fraction: float = 0.1  # of learning_rate, at the last step
    warmup_steps: int = 20  # linear from 0
    muon_beta: float = 0.95  # decay of Muon's momentum
    muon_rms: float = 0.2  # root mean square of Muon's updates before the learning rate; AdamW's are about as large
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
    context: int = 1  # devices that split the sequence, and share the parameters too
    tensor: int = 1  # devices that split K/V heads (with their groups), MLP and vocabulary
    explicit: bool = (
        False  # axes of JAX's Explicit type, where the program has every transfer; otherwise Auto, where XLA adds them
    )


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """The processes of the run, for launchers that JAX does not know; SLURM, Open MPI and Kubernetes need nothing."""

    coordinator_address: str | None = None  # host:port of the first process, on which it will listen
    num_processes: int | None = None  # of the run; 1: this process alone, even under a launcher
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
    steps: int = 300  # optimiser steps; 0: only evaluates what the run starts from, and saves it
    seed: int = 0  # of the parameters and of sampling
    deterministic: bool = True  # gradients repeat bit for bit on GPUs too, where XLA_FLAGS does not say otherwise
    eval_every: int = 100  # steps between held-out evaluations; the last step is always evaluated
    eval_batches: int = 16  # held-out batches per evaluation
    eval_selection: bool = True  # evaluations of NSA also measure which share of the attention its blocks hold
    init_from: Path | None = None  # folder of a run whose parameters this one starts from; its data begin anew
    init_step: int | None = None  # of that run's checkpoint; None: the newest
    anneal_steps: int = 0  # in which NSA that starts from full attention goes over to its own; 0: at once
    position_buckets: int = 16  # parts of the sequence whose held-out loss is logged at the end; 0: none
    sample_prompt: str = "def "  # what the sample at the end continues
    sample_tokens: int = 200  # its length in tokens
    tensorboard: bool = False  # also write TensorBoard events (extra: tensorboard)
    wandb: str | None = None  # also log to this Weights & Biases project (extra: wandb)


AT_LEAST = {
    "model.num_layers": 1,
    "model.embed_dim": 1,
    "model.num_heads": 1,
    "model.num_kv_heads": 1,
    "model.head_dim": 1,
    "model.mlp_dim": 1,
    "model.selection_loss": 0,
    "model.selection_loss_queries": 1,
    "model.moe.num_routed": 0,
    "model.moe.num_shared": 0,
    "model.moe.top_k": 1,
    "model.moe.expert_dim": 1,
    "model.moe.first_dense": 0,
    "model.moe.aux_loss": 0,
    "model.moe.bias_speed": 0,
    "data.sequence_length": 1,
    "data.batch_size": 1,
    "data.neighbours": 1,
    "optimizer.accumulate": 1,
    "optimizer.warmup_steps": 0,
    "checkpoint.every": 1,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": 0,
    "steps": 0,
    "eval_every": 1,
    "eval_batches": 1,
    "anneal_steps": 0,
    "position_buckets": 0,
    "sample_tokens": 0,
}
POSITIVE = (
    "model.rope_theta",
    "model.norm_eps",
    "model.embedding_init",
    "model.moe.routed_scaling",
    "optimizer.learning_rate",
    "optimizer.clip_norm",
    "optimizer.muon_rms",
)
NOT_EMPTY = ("data.chat_start", "data.chat_end")


def check(config: TrainConfig) -> None:
    """Raises ValueError, naming the setting, where a value is impossible or two contradict each other."""
    for name, least in AT_LEAST.items():
        if (value := operator.attrgetter(name)(config)) < least:
            raise ValueError(f"{name} = {value}: expected at least {least}")
    for name in POSITIVE:
        if not (value := operator.attrgetter(name)(config)) > 0:
            raise ValueError(f"{name} = {value}: expected a positive number")
    _check_heads(config.model)
    _check_pattern(config.model)
    _check_experts(config.model)
    _check_selection_loss(config)
    _check_rows(config)
    for name in NOT_EMPTY:
        if not operator.attrgetter(name)(config):
            raise ValueError(f"{name} = '': expected some text")
    _check_start_and_end(config)
    if any("\ud800" <= character <= "\udfff" for character in config.sample_prompt):
        raise ValueError(f"sample_prompt = {config.sample_prompt!r}: expected text that UTF-8 can hold")


def _check_heads(model: ModelConfig) -> None:
    if model.num_heads % model.num_kv_heads:
        raise ValueError(
            f"model.num_heads = {model.num_heads}: expected a multiple of model.num_kv_heads = {model.num_kv_heads}"
        )
    if model.head_dim % 2:
        raise ValueError(f"model.head_dim = {model.head_dim}: expected an even number, for the rotary embedding")


def _check_pattern(model: ModelConfig) -> None:
    period = max(1, len(model.pattern))
    for name, layers in (("num_layers", model.num_layers), ("moe.first_dense", model.moe.first_dense)):
        if layers % period:
            raise ValueError(f"model.{name} = {layers}: expected a multiple of {period}, the layers of model.pattern")


def _check_experts(model: ModelConfig) -> None:
    moe = model.moe
    if moe.num_routed and moe.top_k > moe.num_routed:
        raise ValueError(
            f"model.moe.top_k = {moe.top_k}: expected at most model.moe.num_routed = {moe.num_routed}, the experts to "
            "choose from"
        )
    if moe.num_routed and moe.first_dense >= model.num_layers:
        raise ValueError(
            f"model.moe.first_dense = {moe.first_dense}: expected fewer than model.num_layers = {model.num_layers}, so "
            "that a layer has experts"
        )
    if not moe.num_routed and (moe.num_shared or moe.first_dense):
        raise ValueError(
            f"model.moe.num_routed = 0 with model.moe.num_shared = {moe.num_shared} and model.moe.first_dense = "
            f"{moe.first_dense}: expected routed experts too, or none of these"
        )


def _check_selection_loss(config: TrainConfig) -> None:
    model, length = config.model, config.data.sequence_length
    if not model.selection_loss:
        return
    if "nsa" not in model.attention_of_layers:
        raise ValueError(
            f"model.selection_loss = {model.selection_loss}: expected 0 with model.attention = {model.attention_name}, "
            "where no layer chooses by the compressed branch's scores as nsa does"
        )
    if not model.nsa.num_selected:
        raise ValueError(f"model.selection_loss = {model.selection_loss}: expected 0 with model.nsa.num_selected = 0")
    if model.selection_loss_queries > length:
        raise ValueError(
            f"model.selection_loss_queries = {model.selection_loss_queries}: expected at most data.sequence_length = "
            f"{length}"
        )


def _check_rows(config: TrainConfig) -> None:
    data, block, accumulate = config.data, config.model.nsa.select_block, config.optimizer.accumulate
    if data.isolate_documents and data.sequence_length % block:
        raise ValueError(
            f"data.sequence_length = {data.sequence_length}: expected a multiple of model.nsa.select_block = "
            f"{block}, because data.isolate_documents starts every document on one"
        )
    if data.batch_size % accumulate:
        raise ValueError(
            f"data.batch_size = {data.batch_size}: expected a multiple of optimizer.accumulate = {accumulate}"
        )


def _check_start_and_end(config: TrainConfig) -> None:
    warmup_steps = config.optimizer.warmup_steps
    if config.init_from is not None and config.init_from.absolute() == config.run_dir.absolute():
        raise ValueError(f"init_from = {config.init_from}: expected another folder than run_dir")
    if config.init_step is not None and config.init_from is None:
        raise ValueError(f"init_step = {config.init_step}: expected init_from, the run whose step this is")
    if config.anneal_steps > config.steps:
        raise ValueError(f"anneal_steps = {config.anneal_steps}: expected at most steps = {config.steps}")
    if config.anneal_steps and config.init_from is None:
        raise ValueError(f"anneal_steps = {config.anneal_steps}: expected init_from, a run with full attention")
    if not 0 <= config.optimizer.decay_fraction <= 1:
        raise ValueError(f"optimizer.decay_fraction = {config.optimizer.decay_fraction}: expected a number from 0 to 1")
    if config.steps and warmup_steps >= config.steps:
        raise ValueError(f"optimizer.warmup_steps = {warmup_steps}: expected fewer than steps = {config.steps}")


def to_json(config: TrainConfig) -> str:
    """The config as indented JSON; `from_json` reads it back."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str)


def from_json(text: str) -> TrainConfig:
    """A config that `to_json` wrote.

    Raises ValueError naming a setting that this version does not know. Settings that are missing have their defaults.
    """
    return _build(TrainConfig, json.loads(text), "")


def model_from_dict(values: dict[str, Any]) -> ModelConfig:
    """A model's settings from what `dataclasses.asdict` made of them; errors as those of `from_json`."""
    return _build(ModelConfig, values, "model.")


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
    if hint == Path | None:
        return None if value is None else Path(value)
    if typing.get_origin(hint) is tuple:
        return tuple(value)
    return Path(value) if hint is Path else value


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for name, value in new.items():
        if isinstance(value, dict):
            yield from _differences(old[name], value, f"{prefix}{name}.")
        elif value != old[name]:
            yield prefix + name, old[name], value
