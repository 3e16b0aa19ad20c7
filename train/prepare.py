"""Everything that can be found wrong with a run before it starts."""

import dataclasses
import itertools
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from train.checkpoints.checkpointer import Checkpointer
from train.checkpoints.saved import check_start
from train.config import TrainConfig, check, differences, from_json, to_json
from train.data.corpus import Corpus, load_corpus
from train.data.loader import held_out_batches, train_batches
from train.data.packing import Batch
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.model.transformer import Transformer, padded_vocabulary
from train.optimizer import make_optimizer
from train.parallel.distributed import gather, together
from train.parallel.lowering import abstract_state
from train.parallel.sharding import check_divisible, data_shards, make_mesh
from train.run_folder import (
    absolute,
    check_place,
    holds_run,
    read_config,
    read_facts,
    tokenizer_digest,
    tokenizer_file,
)
from train.step import TrainState

# Settings that a resumed run may change. With any other setting changed it would be another run.
CHANGEABLE = (
    "run_dir",
    "steps",
    "deterministic",
    "eval_every",
    "eval_batches",
    "eval_selection",
    "position_buckets",
    "sample_prompt",
    "sample_tokens",
    "tensorboard",
    "wandb",
    "checkpoint.",
    "data.path",  # the fingerprint says whether it is the same text
    "mesh.",
    "distributed.",
    "model.implementation",
    "model.remat",
)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run whose settings fit together, with its data and its model."""

    config: TrainConfig
    facts: dict[str, Any]  # what else must not change between the processes of one run
    tokenizer: Tokenizer
    corpus: Corpus
    mesh: Mesh
    data_shard: tuple[int, int]  # which share of the rows this process loads, of how many
    model: Transformer
    optimizer: optax.GradientTransformation
    abstract_state: TrainState  # shapes, dtypes and shardings
    train_batches: Any  # a Grain iterator
    held_out: list[Batch]


def prepare(config: TrainConfig) -> Prepared:
    """Everything that can be found wrong with a run before it starts. Writes nothing.

    Raises, in every process or in none:
      ValueError: a setting is impossible, contradicts another, or differs from the run in the folder. With several
        processes: settings, data or what lies in the folder differ between them.
    """
    with together(ValueError):
        prepared = _prepare(config)
    _check_alike(prepared)
    return prepared


def _prepare(config: TrainConfig) -> Prepared:
    check(config)
    check_place(config.run_dir)
    file = tokenizer_file(config)
    tokenizer = load_tokenizer("byte" if file is None else str(file))
    check_divisible(config, padded_vocabulary(tokenizer.vocab_size), jax.device_count())
    mesh = make_mesh(config.mesh)
    index, count = data_shards(mesh)
    corpus = load_corpus(config.data)
    facts = {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer_digest(file),
        "data_fingerprint": corpus.fingerprint,
    }
    _check_same_run(config, facts)
    if config.init_from is not None and checkpoints_of(config).latest_step is None:
        check_start(config, facts)  # a run that has begun no longer reads it
    model = Transformer(config.model, tokenizer.vocab_size)
    optimizer = make_optimizer(config.optimizer, config.steps)
    share: dict[str, int] = {"align": config.model.nsa.select_block, "process_index": index, "process_count": count}
    held_out = itertools.islice(held_out_batches(corpus, tokenizer, config.data, **share), config.eval_batches)
    return Prepared(
        config=config,
        facts=facts,
        tokenizer=tokenizer,
        corpus=corpus,
        mesh=mesh,
        data_shard=(index, count),
        model=model,
        optimizer=optimizer,
        abstract_state=abstract_state(model, optimizer, mesh),
        train_batches=train_batches(corpus, tokenizer, config.data, **share),
        held_out=list(held_out),
    )


def _check_same_run(config: TrainConfig, facts: dict[str, Any]) -> None:
    """Raises ValueError where the run in the folder is another one."""
    if not holds_run(config.run_dir):
        return
    old, old_facts = read_config(config.run_dir, "run_dir"), read_facts(config.run_dir, "run_dir")
    # A file of another name is the same tokenizer if it has the same digest.
    allowed = (*CHANGEABLE, "data.tokenizer") if "tokenizer" in old_facts else CHANGEABLE
    changed = _changes((absolute(old), old_facts), (absolute(config), facts), allowed)
    if changed:
        shown = "; ".join(f"{name} was {before!r}, is {now!r}" for name, before, now in changed)
        raise ValueError(f"run_dir = {config.run_dir} holds a run with other settings: {shown}. Choose another run_dir")
    reached = checkpoints_of(config).latest_step
    if reached is not None and config.steps < reached:
        raise ValueError(
            f"steps = {config.steps}: expected at least {reached}, the last step saved in {config.run_dir}"
        )


def _check_alike(prepared: Prepared) -> None:
    """Raises ValueError where processes have other settings, read other data or see another run in the folder."""
    config = prepared.config
    facts = prepared.facts | {"last saved step": checkpoints_of(config).latest_step}
    first, *others = ((from_json(text), facts) for text, facts in gather([to_json(config), facts]))
    for index, other in enumerate(others, start=1):
        for name, here, there in _changes(first, other, ("distributed.",)):
            raise ValueError(
                f"{name} is {here!r} in process 0 and {there!r} in process {index}: expected the same settings and data"
                f" in all processes, and run_dir = {config.run_dir} on a file system that they share"
            )


def _changes(
    old: tuple[TrainConfig, dict[str, Any]], new: tuple[TrainConfig, dict[str, Any]], allowed: tuple[str, ...]
) -> list[tuple[str, Any, Any]]:
    """Settings and facts that differ, as (name, old value, new value), without the settings that may."""
    changed = [change for change in differences(old[0], new[0]) if not change[0].startswith(allowed)]
    return changed + [(name, old[1][name], value) for name, value in new[1].items() if old[1].get(name, value) != value]


def checkpoints_of(config: TrainConfig, data_shard: tuple[int, int] | None = None) -> Checkpointer:
    """The checkpoints in a run's folder; `data_shard` as in `Prepared`, for a run that will save some."""
    return Checkpointer(config.run_dir / "checkpoints", config.checkpoint, data_shard)
