"""Held-out loss by position in the sequence: how much a longer context helps, and where it begins to hurt.

`python -m train positions --run FOLDER --sequence-length N --out lengths.json` evaluates a run at any length;
`python -m train report picture.png name=lengths.json ...` draws several such files into one picture.
"""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import jax

from nsa_jax import RopeScaling
from nsa_jax.rope import ScalingKind
from pallas_kernels.benchmarks.provenance import provenance
from train.checkpoints.checkpointer import Checkpointer
from train.checkpoints.saved import load_model
from train.commands.output import check_output
from train.config import TrainConfig
from train.data.corpus import describe, load_corpus
from train.data.loader import held_out_batches
from train.evaluate import evaluate_positions, position_sums
from train.run_folder import read_config, write
from train.step import loss_sums


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Held-out loss of a run's model by position, at the length it was trained on or another."""

    run: Path  # the run's folder
    step: int | None = None  # of the checkpoint; None: the newest
    sequence_length: int | None = None  # T, tokens per row; None: the run's
    batch_size: int | None = None  # rows at a time; None: the run's
    batches: int | None = None  # held-out batches; None: the run's
    buckets: int = 16  # parts that the sequence is cut into
    rope_scaling: ScalingKind | None = None  # how to scale the rotary embedding; None: as the run does
    factor: float | None = None  # of the scaling; None: sequence_length over original_length
    original_length: int | None = None  # tokens of the context trained on; None: the run's own, or its sequence length
    out: Path | None = None  # JSON file to write


def positions(arguments: Arguments) -> None:
    """Prints held-out loss by position as a table, and writes it as JSON where asked.

    Raises:
      ValueError: there is no such run, or a setting is impossible.
      CheckpointError: the run has no such checkpoint, or it cannot be read.
    """
    for name in ("sequence_length", "batch_size", "batches"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: expected at least 1")
    if arguments.out is not None:
        check_output("out", arguments.out)
    config = read_config(arguments.run)
    length = arguments.sequence_length or config.data.sequence_length
    data = dataclasses.replace(
        config.data, sequence_length=length, batch_size=arguments.batch_size or config.data.batch_size
    )
    count = arguments.batches or config.eval_batches
    if not 1 <= arguments.buckets <= length:
        raise ValueError(f"buckets = {arguments.buckets}: expected 1 to sequence_length = {length}")
    step = arguments.step
    if step is None:
        step = Checkpointer(arguments.run / "checkpoints", config.checkpoint).latest_step
    saved = load_model(arguments.run, step=step, rope_scaling=_scaling(arguments, config, length))
    align = config.model.nsa.select_block
    corpus = load_corpus(data)
    print(*describe(corpus), sep="\n")
    batches = held_out_batches(corpus, saved.tokenizer, data, align=align)
    found = evaluate_positions(
        jax.jit(
            lambda params, batch: position_sums(
                lambda params, batch: loss_sums(saved.model, params, batch), params, batch, arguments.buckets, length
            )
        ),
        saved.params,
        itertools.islice(batches, count),
        length,
    )
    print(f"{'positions':>15} {'bits per byte':>15} {'nats per token':>15} {'tokens':>10}")
    for bucket in found:
        name = f"{bucket.begin}-{bucket.end - 1}"
        print(f"{name:>15} {bucket.bits_per_byte:15.4f} {bucket.nats_per_token:15.4f} {bucket.tokens:10.0f}")
    if arguments.out is not None:
        content = {
            "provenance": provenance(["python", "-m", "train", *sys.argv[1:]]),
            "step": step,
            "sequence_length": length,
            "rope_scaling": dataclasses.asdict(saved.config.model.rope_scaling),
            "buckets": [bucket._asdict() for bucket in found],
        }
        write(arguments.out, json.dumps(content, indent=1) + "\n")


def _scaling(arguments: Arguments, config: TrainConfig, length: int) -> RopeScaling | None:
    """What the command line asks for; None: as the run has it."""
    kind, own = arguments.rope_scaling, config.model.rope_scaling
    if kind is None or kind == "none":
        for name in ("factor", "original_length"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"{name} = {getattr(arguments, name)}: expected rope_scaling linear, ntk or yarn")
        return None if kind is None else RopeScaling()
    original = arguments.original_length or own.original_length or config.data.sequence_length
    factor = max(1.0, length / original) if arguments.factor is None else arguments.factor
    return dataclasses.replace(own, kind=kind, factor=factor, original_length=original)
