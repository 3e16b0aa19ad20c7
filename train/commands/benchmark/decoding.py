"""Decoding speed of a whole model, NSA and full attention side by side: `python -m train benchmark decoding`.

Prints and writes tokens per second of the sampling step of a preset's model, with caches that are full of random keys
and values to a few tokens below the context, random parameters, and the memory of the caches.
"""

import dataclasses
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nsa_jax import cache_bytes
from train.commands.benchmark.figures import ATTENTIONS, VOCABULARY, write_figures
from train.config import ModelConfig
from train.generation.generator import NOT_FORCED, advance, in_compute_dtype
from train.generation.sampling import Draw
from train.model.transformer import Transformer, init_caches
from train.presets import named


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    preset: str = "h100-350m"  # its model
    context: int = 65536  # tokens of each row at the end
    batches: tuple[int, ...] = (1, 16)  # rows
    steps: int = 64  # of one program, which is run five times
    out: Path = Path("decode_speed.json")  # where the figures go


def measure(config: ModelConfig, batch: int, context: int, steps: int) -> dict[str, Any]:
    """One row of figures."""
    model = Transformer(config, VOCABULARY)

    @jax.jit
    def make(key: jax.Array) -> Any:
        params = model.init(key, jnp.zeros((1, config.nsa.select_block), jnp.int32))["params"]
        return in_compute_dtype(nn.meta.unbox(params), model)

    @functools.partial(jax.jit, static_argnums=0)
    def fill(shape: Any, key: jax.Array) -> jax.Array:
        return jax.random.normal(key, shape.shape, shape.dtype)

    params = make(jax.random.key(0))
    leaves, structure = jax.tree.flatten(init_caches(config, batch_size=batch, max_length=context))
    filled = [
        fill(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.random.key(i)) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for i, x in enumerate(leaves)
    ]
    caches = jax.tree.unflatten(structure, filled)
    del leaves, filled
    size = cache_bytes(caches)
    draw = Draw(*(jnp.full((batch,), value) for value in (0.8, VOCABULARY, 1.0, 1.0, 0, 0)))
    seen, ends = jnp.zeros((2, batch, VOCABULARY), bool)  # no token ends a row
    tokens, limits = jnp.zeros((batch,), jnp.int32), jnp.full((batch,), steps, jnp.int32)
    forced, seconds = jnp.full((batch, steps), NOT_FORCED, jnp.int32), []
    for _ in range(6):  # the first compiles
        caches = tuple(x._replace(lengths=jnp.full_like(x.lengths, context - steps)) for x in caches)
        jax.block_until_ready(caches)
        begin = time.perf_counter()
        sampled, caches, seen = advance(params, caches, seen, ends, tokens, limits, forced, draw, model=model)
        jax.block_until_ready(sampled)
        seconds.append((time.perf_counter() - begin) / steps)
    speeds = sorted(batch / s for s in seconds[1:])
    return {
        "attention": config.attention_name,
        "batch": batch,
        "context": context,
        "tokens_per_second": statistics.median(speeds),
        "lowest": speeds[0],
        "highest": speeds[-1],
        "cache_gib": size / 2**30,
    }


def benchmark(arguments: Arguments) -> None:
    """Measures, prints and writes."""
    config = named(arguments.preset).model
    rows: list[dict[str, Any]] = []
    for attention in ATTENTIONS:
        for batch in arguments.batches:
            model = dataclasses.replace(config, attention=attention)
            rows.append(measure(model, batch, arguments.context, arguments.steps))
            print(rows[-1], flush=True)
            write_figures(arguments, rows)
