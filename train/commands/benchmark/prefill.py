"""Time to the first token, NSA and full attention side by side: `python -m train benchmark prefill`.

Prints and writes how long the model of a preset or a run, with random parameters, takes to read a prompt of random
tokens into empty caches and to find the likeliest token after it. The prompt is read whole, which is one program, or in
chunks, which are one program after the other, as in generation.
"""

import dataclasses
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from rich.console import Console
from rich.table import Table

from nsa_jax import cache_bytes
from train.commands.benchmark.figures import ATTENTIONS, random_parameters, vocab_size, write_figures
from train.config import Attention, ModelConfig
from train.model.transformer import Caches, extend, init_caches, logits
from train.presets import named


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    preset: str = "h100-350m"  # or the folder of a run: its model
    context: int = 65536  # tokens of the prompt
    chunks: tuple[int, ...] = (0, 8192)  # tokens of it that are read at a time; 0: all
    batches: tuple[int, ...] = (1,)  # prompts that are read together
    attentions: tuple[Attention, ...] = ATTENTIONS  # of the model
    kv_heads: int | None = None  # key/value heads; None: the preset's
    repeats: int = 5  # of each measurement
    out: Path = Path("prefill_speed.json")  # where the figures go


@functools.partial(jax.jit, static_argnames=("config", "vocabulary", "begins"), donate_argnames="caches")
def read(
    params: Any, caches: Caches, tokens: Int[Array, "B T"], *, config: ModelConfig, vocabulary: int, begins: bool
) -> tuple[Int[Array, " B"], Caches]:
    """The likeliest token after T more tokens of each prompt, and the caches with these."""
    hidden, caches = extend(params, config, tokens, caches, begins=begins)
    return jnp.argmax(logits(params, hidden[:, -1], config)[:, :vocabulary], axis=-1), caches


def measure(
    config: ModelConfig, vocabulary: int, batch: int, context: int, chunk: int, *, repeats: int
) -> dict[str, Any]:
    """One row of figures. For the arguments, see `Arguments`."""
    params = random_parameters(config, vocabulary)
    caches = init_caches(config, batch_size=batch, max_length=context)
    tokens = jax.random.randint(jax.random.key(1), (batch, context), 0, vocabulary)
    size = chunk or context
    parts = jax.block_until_ready([tokens[:, begin : begin + size] for begin in range(0, context, size)])
    seconds = []
    for _ in range(1 + repeats):  # the first compiles
        jax.block_until_ready(caches)
        start = time.perf_counter()
        for index, part in enumerate(parts):
            options = {"config": config, "vocabulary": vocabulary, "begins": index == 0}
            first, caches = read(params, caches, part, **options)
        jax.device_get(first)
        seconds.append(time.perf_counter() - start)
    taken = sorted(seconds[1:])
    return {
        "attention": config.attention_name,
        "batch": batch,
        "context": context,
        "chunk": size,
        "kv_heads": config.num_kv_heads,
        "seconds": statistics.median(taken),
        "lowest": taken[0],
        "highest": taken[-1],
        "tokens_per_second": batch * context / statistics.median(taken),
        "cache_gib": cache_bytes(caches) / 2**30,
    }


def benchmark(arguments: Arguments) -> None:
    """Measures, prints and writes.

    Raises:
      ValueError: the preset is unknown, or a size is out of range.
    """
    sizes = (("context", 1, (arguments.context,)), ("chunks", 0, arguments.chunks), ("batches", 1, arguments.batches))
    for name, least, values in (*sizes, ("repeats", 1, (arguments.repeats,))):
        if min(values, default=least) < least:
            raise ValueError(f"{name} = {min(values)}: expected at least {least}")
    config = named(arguments.preset)
    rows: list[dict[str, Any]] = []
    for attention in arguments.attentions:
        model = dataclasses.replace(config.model, attention=attention)
        if arguments.kv_heads is not None:
            model = dataclasses.replace(model, num_kv_heads=arguments.kv_heads)
        for batch in arguments.batches:
            for chunk in arguments.chunks:
                repeats = {"repeats": arguments.repeats}
                rows.append(measure(model, vocab_size(config), batch, arguments.context, chunk, **repeats))
                write_figures(arguments, rows)
    Console().print(_table(rows))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("attention", "prompts", "tokens", "at a time", "ms to the first token", "lowest", "highest")
    for row in rows:
        milliseconds = (f"{1e3 * row[name]:,.1f}" for name in ("seconds", "lowest", "highest"))
        counts = (f"{row[name]:,}" for name in ("batch", "context", "chunk"))
        table.add_row(row["attention"], *counts, *milliseconds)
    return table
