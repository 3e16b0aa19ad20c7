"""Trains a preset's model on multi-query associative recall: `python -m train mqar tiny --attention full`.

Nothing is read and no run folder is written. Of the preset's settings, those of the model, the optimiser, the rows
(`data.sequence_length`, `data.batch_size`), `steps`, `eval_every` and `seed` count.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.benchmarks.provenance import provenance
from train.commands.output import check_output
from train.config import TrainConfig, check
from train.determinism import compiler_options
from train.model.flops import total_parameters
from train.model.transformer import Transformer, logits
from train.optimizer import make_optimizer
from train.run_folder import write
from train.step import make_init, make_train_step
from train.tasks.mqar import make_rows, vocabulary


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The task; then a preset and its settings."""

    pairs: int = 32  # of key and value in a row
    eval_rows: int = 64  # rows of an evaluation, at least, which are not trained on
    out: Path | None = None  # JSON file to write


def mqar(arguments: Arguments, config: TrainConfig) -> None:
    """Prints loss and accuracy over the steps, and writes them as JSON where asked.

    Raises:
      ValueError: a setting is impossible.
    """
    for name in ("pairs", "eval_rows"):
        if (value := getattr(arguments, name)) < 1:
            raise ValueError(f"{name} = {value}: expected at least 1")
    if arguments.out is not None:
        check_output("out", arguments.out)
    check(config)
    length, rows = config.data.sequence_length, config.data.batch_size
    model = Transformer(config.model, vocabulary(arguments.pairs))
    optimizer = make_optimizer(config.optimizer, config.steps)
    update = jax.jit(
        make_train_step(model, optimizer, accumulate=config.optimizer.accumulate, z_loss=config.optimizer.z_loss),
        donate_argnums=0,
        compiler_options=compiler_options(config.deterministic),
    )
    accuracy = jax.jit(lambda params, batch: _right(model, params, batch))
    init = make_init(model, optimizer)
    state = jax.jit(lambda key: nn.meta.unbox(init(key)))(jax.random.key(config.seed))
    train_draw, held_out_draw = (np.random.default_rng([config.seed, side]) for side in (0, 1))

    def batch(draw: np.random.Generator) -> dict[str, Any]:
        made = make_rows(draw, rows=rows, length=length, pairs=arguments.pairs)
        return {name: jnp.asarray(x) for name, x in made.items()}

    held_out = [batch(held_out_draw) for _ in range(-(-arguments.eval_rows // rows))]
    print(f"{total_parameters(state.params):,} parameters, {rows} rows of {length} tokens and {arguments.pairs} pairs")
    print(f"{'step':>8}{'loss':>10}{'accuracy':>10}")
    curve = []
    for step in range(1, config.steps + 1):
        state, metrics = update(state, batch(train_draw))
        if step % config.eval_every and step != config.steps:
            continue
        right = float(np.mean([accuracy(state.params, each) for each in held_out]))
        loss = float(metrics.sums.nll / metrics.sums.weight)
        curve.append({"step": step, "loss": loss, "accuracy": right})
        print(f"{step:8}{loss:10.4f}{right:10.3f}", flush=True)
    if arguments.out is not None:
        content = {
            "provenance": provenance(["python", "-m", "train", *sys.argv[1:]]),
            "attention": config.model.attention_name,
            "pairs": arguments.pairs,
            "length": length,
            "curve": curve,
        }
        write(arguments.out, json.dumps(content, indent=1) + "\n")


def _right(model: Transformer, params: Any, batch: dict[str, Any]) -> jax.Array:
    """The share of the second places of keys at which the value is the model's first choice."""
    hidden: Any = model.apply({"params": params}, batch["tokens"])
    chosen = jnp.argmax(logits(params, hidden, model.config)[..., : model.vocab_size], axis=-1)
    return jnp.sum((chosen == batch["targets"]) * batch["weights"]) / jnp.sum(batch["weights"])
