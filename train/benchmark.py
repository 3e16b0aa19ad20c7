"""Training speed against length, NSA and full attention side by side: `python -m train.benchmark`.

Prints a table and writes JSON: tokens per second, model FLOP utilisation and the compiler's count of memory of the
whole update of a preset's model, on random tokens and from random parameters.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from train.config import TrainConfig
from train.metrics import device_peak_flops, train_flops_per_token
from train.model import Transformer
from train.optimizer import make_optimizer
from train.presets import PRESETS
from train.step import TrainState, make_init, make_train_step

VOCABULARY = 258  # of the byte tokenizer
ATTENTIONS: tuple[Literal["nsa", "full"], ...] = ("nsa", "full")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    preset: str = "h100-350m"  # its model and optimiser
    lengths: tuple[int, ...] = (8192, 16384, 32768, 65536)  # T
    tokens_per_step: int = 65536  # rows are as many as make up this
    steps: int = 8  # timed, after two that are not
    out: Path = Path("train_speed.json")  # where the figures go


def measure(config: TrainConfig, lengths: Sequence[int], tokens_per_step: int, steps: int) -> list[dict[str, Any]]:
    """One row of figures for each length, with the attention that the config names.

    Raises:
      ValueError: a length does not divide `tokens_per_step`.
    """
    for T in lengths:
        if T < 1 or tokens_per_step % T:
            raise ValueError(f"lengths: {T}: expected a divisor of tokens_per_step = {tokens_per_step}")
    model = Transformer(config.model, VOCABULARY)
    optimizer = make_optimizer(config.optimizer, config.steps)
    init = make_init(model, optimizer)
    state: TrainState = jax.jit(lambda key: nn.meta.unbox(init(key)))(jax.random.key(config.seed))
    update = jax.jit(make_train_step(model, optimizer, accumulate=1, z_loss=config.optimizer.z_loss), donate_argnums=0)
    batches = [_random_batch(tokens_per_step // T, T) for T in lengths]
    with ThreadPoolExecutor() as pool:
        compiled = list(pool.map(lambda batch: update.lower(state, batch).compile(), batches))
    num_params = sum(x.size for x in jax.tree.leaves(state.params))
    rows = []
    for T, batch, step in zip(lengths, batches, compiled, strict=True):
        seconds = []
        for _ in range(2 + steps):
            begin = time.perf_counter()
            state, metrics = step(state, batch)
            loss = float(metrics.sums.nll) / tokens_per_step  # waits for the step
            seconds.append(time.perf_counter() - begin)
        speeds = sorted(tokens_per_step / s for s in seconds[2:])
        speed = statistics.median(speeds)
        flops = train_flops_per_token(config.model, T, VOCABULARY)
        peak = device_peak_flops()
        memory: Any = step.memory_analysis()
        rows.append(
            {
                "attention": config.model.attention,
                "length": T,
                "rows": tokens_per_step // T,
                "parameters": num_params,
                "tokens_per_second": speed,
                "lowest": speeds[0],
                "highest": speeds[-1],
                "model_flop_utilisation": None if peak is None else speed * flops / peak,
                "memory_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
                "loss": loss,
            }
        )
    return rows


def _random_batch(rows: int, T: int) -> dict[str, jax.Array]:
    tokens = jax.random.randint(jax.random.key(T), (rows, T + 1), 0, 256)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": jnp.ones((rows, T), jnp.float32),
        "target_bytes": jnp.ones((rows, T), jnp.int32),
    }


def main(arguments: Arguments) -> None:
    """Measures, prints and writes."""
    if arguments.preset not in PRESETS:
        raise SystemExit(f"error: preset = {arguments.preset!r}: expected one of {', '.join(PRESETS)}")
    config = PRESETS[arguments.preset]()
    rows = []
    for attention in ATTENTIONS:
        model = dataclasses.replace(config.model, attention=attention)
        rows += measure(
            dataclasses.replace(config, model=model), arguments.lengths, arguments.tokens_per_step, arguments.steps
        )
    table = Table("attention", "length", "rows", "tokens/s", "spread", "MFU", "GiB")
    for row in rows:
        utilisation = row["model_flop_utilisation"]
        table.add_row(
            row["attention"],
            str(row["length"]),
            str(row["rows"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['lowest']:,.0f} to {row['highest']:,.0f}",
            "" if utilisation is None else f"{100 * utilisation:.1f}%",
            f"{row['memory_gib']:.1f}",
        )
    Console().print(table)
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    arguments.out.write_text(
        json.dumps({**device, **dataclasses.asdict(arguments), "rows": rows}, indent=1, default=str)
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
