"""Decoding speed of a whole model, NSA and full attention side by side: `python -m train benchmark decoding`.

Prints and writes tokens per second of the model of a preset or a run, with random parameters, and with caches that are
full of random keys and values to a few tokens below the context. All steps are one program, as in generation, sampling
included. The bandwidth is what a step must read, all parameters and what the attention reads of the caches, over its
time.

With `--profile`, one more run is traced: the kernels of a step, how often each is launched and for how long, and how
long the GPU waits between them.
"""

import collections
import dataclasses
import functools
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from nsa_jax import cache_bytes
from nsa_jax.quantization import quantize
from pallas_kernels.quantized import Quantized
from train.commands.benchmark.figures import ATTENTIONS, random_parameters, vocab_size, write_figures
from train.config import Attention, KVDtype, ModelConfig
from train.generation.generator import NOT_FORCED, Rows, advance
from train.generation.sampling import Draw
from train.model.attention import attention_kind
from train.model.transformer import Transformer, init_caches
from train.presets import named
from train.trace import Kernel, kernels, length, record, union


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    preset: str = "h100-350m"  # or the folder of a run: its model
    context: int = 65536  # tokens of each row at the end
    batches: tuple[int, ...] = (1, 16)  # rows
    attentions: tuple[Attention, ...] = ATTENTIONS  # of the model
    kv_heads: int | None = None  # key/value heads; None: the preset's
    kv_dtype: KVDtype | None = None  # int8: caches of half the bytes, which only nsa has
    steps: int = 64  # of one program, which is run five times
    bandwidth: float = 3350.0  # the card's, in GB/s; the default is an H100 SXM's
    profile: bool = False  # also a table of the kernels of a step, which needs a GPU
    out: Path = Path("decode_speed.json")  # where the figures go


def measure(
    config: ModelConfig,
    vocabulary: int,
    batch: int,
    context: int,
    steps: int,
    *,
    bandwidth: float,
    profile: bool = False,
    kv_dtype: KVDtype | None = None,
) -> dict[str, Any]:
    """One row of figures. For the arguments, see `Arguments`.

    Raises:
      ValueError: a profile is asked for, and there is no GPU.
    """
    model = Transformer(config, vocabulary)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def fill(shape: tuple[int, ...], dtype: Any, key: jax.Array) -> Any:
        return quantize(jax.random.normal(key, shape)) if dtype == jnp.int8 else jax.random.normal(key, shape, dtype)

    params = random_parameters(config, vocabulary)
    empty = init_caches(config, batch_size=batch, max_length=context, kv_dtype=kv_dtype)
    leaves, structure = jax.tree.flatten(empty, is_leaf=lambda x: isinstance(x, Quantized))
    del empty
    filled = [x if x.dtype == jnp.int32 else fill(x.shape, x.dtype, jax.random.key(i)) for i, x in enumerate(leaves)]
    caches = jax.tree.unflatten(structure, filled)
    del leaves, filled
    size = cache_bytes(caches)
    same = functools.partial(jnp.full, (batch,))
    draw = Draw(same(0.8), None, None, same(1.0), same(0), same(0))
    seen, ends = jnp.zeros((2, batch, vocabulary), bool)  # no token ends a row
    rows = Rows(caches, seen, ends, jnp.zeros((batch, 0), jnp.int32))
    del caches
    tokens, limits = jnp.zeros((batch,), jnp.int32), jnp.full((batch,), steps, jnp.int32)
    forced, seconds = jnp.full((batch, steps), NOT_FORCED, jnp.int32), []

    def run(rows: Rows) -> Any:
        return advance(params, rows, tokens, limits, forced, draw, model=model)

    def rewound(rows: Rows) -> Rows:
        caches = (x._replace(lengths=jnp.full_like(x.lengths, context - steps)) for x in rows.caches)
        return jax.block_until_ready(rows._replace(caches=tuple(caches)))

    for _ in range(6):  # the first compiles
        rows = rewound(rows)
        begin = time.perf_counter()
        sampled, _, rows = run(rows)
        jax.block_until_ready(sampled)
        seconds.append((time.perf_counter() - begin) / steps)
    speeds = sorted(batch / s for s in seconds[1:])
    speed = statistics.median(speeds)
    read = _bytes_read(params, config, batch, context - steps // 2, kv_dtype)
    row = {
        "attention": config.attention_name,
        "batch": batch,
        "context": context,
        "kv_heads": config.num_kv_heads,
        "kv_dtype": kv_dtype or config.dtype,
        "tokens_per_second": speed,
        "lowest": speeds[0],
        "highest": speeds[-1],
        "read_gb": read / 1e9,
        "bandwidth_share": read * speed / batch / 1e9 / bandwidth,
        "cache_gib": size / 2**30,
    }
    if profile:
        _, trace = record(functools.partial(run, rewound(rows)))
        row["profile"] = step_profile(kernels(trace)[0], steps)
    return row


def _bytes_read(params: Any, config: ModelConfig, batch: int, tokens: int, kv_dtype: KVDtype | None) -> float:
    """What a step must read, with so many tokens in each row of the caches."""
    unused = {"embedding"} if not config.tie_embeddings else set()  # of which a step reads a row for each token
    parameters = sum(x.nbytes for name, part in params.items() if name not in unused for x in jax.tree.leaves(part))
    kinds = [attention_kind(name) for name in config.attention_of_layers]
    of_a_head = sum(kind.decoded_bytes(config, tokens, kv_dtype=kv_dtype) for kind in kinds)
    return parameters + batch * config.num_kv_heads * of_a_head


def step_profile(traced: Sequence[Kernel], steps: int) -> dict[str, Any]:
    """What a GPU does in one of several equal steps, in microseconds.

    Args:
      traced: its kernels, in the order in which they began.
      steps: how many.

    Returns:
      "launches", the number of kernels and copies; "busy_us", in which one of them runs, and "idle_us", between the
      first and the last of them, in which none does; "kernels", of each name its launches and time, the longest first.
      Kernels whose names differ by a number at the end are counted together.
    """
    busy = length(union((kernel.begin_ns, kernel.end_ns) for kernel in traced))
    span = max(kernel.end_ns for kernel in traced) - traced[0].begin_ns
    times: dict[str, list[float]] = collections.defaultdict(list)
    for kernel in traced:
        times[re.sub(r"([._]\d+)+$", "", kernel.name)].append(kernel.end_ns - kernel.begin_ns)
    of_names = [
        {"name": name, "launches": len(taken) / steps, "us": sum(taken) / steps / 1e3} for name, taken in times.items()
    ]
    return {
        "launches": len(traced) / steps,
        "busy_us": busy / steps / 1e3,
        "idle_us": (span - busy) / steps / 1e3,
        "kernels": sorted(of_names, key=lambda row: -row["us"]),
    }


def benchmark(arguments: Arguments) -> None:
    """Measures, prints and writes.

    Raises:
      ValueError: the preset is unknown, an attention has no caches of the `kv_dtype`, or `profile` is asked for where
        there is no GPU.
    """
    if arguments.profile and jax.default_backend() != "gpu":
        raise ValueError(f"profile: expected a GPU, whose kernels it lists; found {jax.default_backend()}")
    config, console = named(arguments.preset), Console()
    if arguments.kv_heads is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_kv_heads=arguments.kv_heads))
    sizes: dict[str, Any] = {name: getattr(arguments, name) for name in ("bandwidth", "profile", "kv_dtype")}
    models = [dataclasses.replace(config.model, attention=attention) for attention in arguments.attentions]
    for model in models:  # refused before anything is measured
        caches = functools.partial(init_caches, model, batch_size=1, max_length=arguments.context)
        jax.eval_shape(functools.partial(caches, kv_dtype=arguments.kv_dtype))
    rows: list[dict[str, Any]] = []
    for model in models:
        for batch in arguments.batches:
            rows.append(measure(model, vocab_size(config), batch, arguments.context, arguments.steps, **sizes))
            write_figures(arguments, rows)
            profile = rows[-1].get("profile")
            console.print({name: value for name, value in rows[-1].items() if name != "profile"})
            if profile is not None:
                console.print(_table(rows[-1]["tokens_per_second"] / batch, profile))


def _table(steps_per_second: float, profile: dict[str, Any]) -> Table:
    title = (
        f"a step: {1e6 / steps_per_second:,.0f} us, of which kernels take {profile['busy_us']:,.0f} us, with "
        f"{profile['idle_us']:,.0f} us between them while traced"
    )
    table = Table("kernel", "launches", "us", title=title)
    for row in profile["kernels"]:
        table.add_row(row["name"], f"{row['launches']:.4g}", f"{row['us']:.1f}")
    return table
