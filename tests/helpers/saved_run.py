"""Run folders without a run: an untrained model in checkpoints with the settings beside them, or metrics alone."""

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax

from train.checkpoints.checkpointer import Checkpointer
from train.config import TrainConfig
from train.prepare import Prepared, prepare
from train.run_folder import describe
from train.step import make_init


def save_untrained(config: TrainConfig, steps: tuple[int, ...] = (1,)) -> Prepared:
    """Writes what a run of `config` would have left after each of `steps`, every time with other parameters."""
    prepared = prepare(config)
    init = jax.jit(lambda key: nn.meta.unbox(make_init(prepared.model, prepared.optimizer)(key)))
    with Checkpointer(config.run_dir / "checkpoints", config.checkpoint) as checkpointer:
        for step in steps:
            checkpointer.save(step, init(jax.random.key(step)), prepared.train_batches)
    prepared.train_batches.close()
    describe(dataclasses.replace(config, steps=max(steps)), prepared.facts)
    return prepared


def write_run(folder: Path, offset: float) -> Path:
    """The metrics of a run of ten steps, in a new folder."""
    folder.mkdir()
    entries = [{"step": step, "bits_per_byte": 8 / step + offset} for step in range(1, 11)]
    entries[-1]["held_out_bits_per_byte"] = 1.0 + offset
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder
