"""Training speed against length and devices, NSA and full attention side by side: `python -m train benchmark speed`.

Prints a table and writes JSON: tokens per second, model FLOP utilisation, the compiler's count of memory and what a
device receives from others, of the whole update of the model of a preset or a run, on random tokens and from random
parameters.
"""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from train.commands.benchmark.figures import ATTENTIONS, vocab_size, write_figures
from train.config import Attention, MeshConfig, Remat, TrainConfig
from train.determinism import describe
from train.model.flops import peak_flops, total_parameters, train_flops_per_token
from train.model.transformer import Transformer, padded_vocabulary
from train.optimizer import make_optimizer
from train.parallel.communication import collectives, overlap, received_bytes
from train.parallel.lowering import abstract_step
from train.parallel.sharding import MESH_AXES, check_divisible, make_mesh, tree_shardings
from train.parallel.traffic import predicted_bytes
from train.presets import named
from train.step import TrainState, make_init
from train.trace import record

TRACED = 2  # steps of a trace


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    preset: str = "h100-350m"  # or the folder of a run: its model and optimiser
    attentions: tuple[Attention, ...] = ATTENTIONS  # of the model
    lengths: tuple[int, ...] = (8192, 16384, 32768, 65536)  # T
    meshes: tuple[str, ...] = ("data=1",)  # sizes of mesh axes, as in "fsdp=2,context=4", on the first of the devices
    tokens_per_device: int = 65536  # of a step; rows are as many as make up this
    steps: int = 8  # timed, after two that are not
    remat: Remat | None = None  # of the model; None: the preset's
    deterministic: tuple[bool, ...] = (True,)  # whether gradients repeat; `True False` times both, one after the other
    trace: bool = False  # two steps more, for how much of the communication is hidden behind computation
    out: Path = Path("train_speed.json")  # where the figures go


def parse_mesh(text: str) -> MeshConfig:
    """A mesh from the sizes of its axes, of which those left out are 1.

    Raises:
      ValueError: the text has another form or names another axis.
    """
    sizes: dict[str, Any] = dict.fromkeys(MESH_AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"meshes: {text!r}: expected AXIS=SIZE,... with axes of {', '.join(MESH_AXES)}")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def measure(
    config: TrainConfig, lengths: Sequence[int], tokens_per_device: int, steps: int, *, trace: bool = False
) -> list[dict[str, Any]]:
    """One row of figures for each length, with the attention and on the mesh (every size given) that the config names.

    Raises:
      ValueError: a length does not divide the tokens of a step, there are too few devices, or the mesh does not fit.
    """
    sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    count = math.prod(sizes.values())
    if count > jax.device_count():
        raise ValueError(f"meshes: {sizes}: expected at most {jax.device_count()} devices, those that there are")
    tokens = tokens_per_device * count
    for T in lengths:
        if T < 1 or tokens % T:
            raise ValueError(f"lengths: {T}: expected a divisor of {tokens}, the tokens of a step")
    configs = [_at_length(config, T, tokens // T) for T in lengths]
    for each in configs:
        check_divisible(each, padded_vocabulary(vocab_size(each)), count)
    mesh = make_mesh(config.mesh, jax.devices()[:count])
    planned = [abstract_step(each, vocab_size(each), mesh) for each in configs]
    state = _initial_state(config, mesh)
    with jax.set_mesh(mesh):
        lowered = [each.update.lower(each.state, each.batch) for each in planned]
    with ThreadPoolExecutor() as pool:
        compiled = list(pool.map(lambda each: each.compile(), lowered))
    rows, parameters = [], total_parameters(state.params)
    for each, plan, step in zip(configs, planned, compiled, strict=True):
        batch = _random_batch(plan.batch, vocab_size(each))
        state, seconds, loss = _time(step, state, batch, 2 + steps)
        speeds = [tokens / s for s in seconds[2:]]
        row = _row(each, sizes, step, speeds, parameters=parameters, loss=loss)
        if trace:
            state, row["seconds_of_a_step"] = _overlap(step, state, batch)
        rows.append(row)
    return rows


def _row(
    config: TrainConfig,
    sizes: dict[str, int],
    step: jax.stages.Compiled,
    speeds: list[float],
    *,
    parameters: int,
    loss: float,
) -> dict[str, Any]:
    """Figures of a compiled step that ran at these speeds, in tokens per second of all devices."""
    T, count = config.data.sequence_length, math.prod(sizes.values())
    speed, flops = statistics.median(speeds), train_flops_per_token(config.model, T, vocab_size(config))
    memory, peak = cast(Any, step.memory_analysis()), peak_flops(jax.devices()[0].device_kind)
    row = {
        "attention": config.model.attention_name,
        "length": T,
        "rows": config.data.batch_size,
        "remat": config.model.remat,
        "mesh": {axis: size for axis, size in sizes.items() if size > 1},
        "devices": count,
        "determinism": describe(config.deterministic),
        "parameters": parameters,
        "tokens_per_second": speed,
        "lowest": min(speeds),
        "highest": max(speeds),
        "model_flop_utilisation": speed * flops / (count * peak) if peak else None,
        "memory_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
        "loss": loss,
    }
    if count > 1:
        row["received_bytes"] = received_bytes(collectives(step.as_text() or ""))
        row["predicted_bytes"] = predicted_bytes(config, vocab_size(config), sizes)
    return row


def _overlap(step: Any, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, float]]:
    """The state after some traced steps, and the seconds of one of them in which devices communicate and compute."""
    (state, _, _), profile = record(lambda: _time(step, state, batch, TRACED))
    return state, {name: seconds / TRACED for name, seconds in overlap(profile).items()}


def _at_length(config: TrainConfig, T: int, rows: int) -> TrainConfig:
    """The config with one microbatch of `rows` random rows of T tokens."""
    data = dataclasses.replace(config.data, sequence_length=T, batch_size=rows, isolate_documents=False)
    return dataclasses.replace(config, data=data, optimizer=dataclasses.replace(config.optimizer, accumulate=1))


def _initial_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    init = make_init(Transformer(config.model, vocab_size(config)), make_optimizer(config.optimizer, config.steps))
    key = jax.random.key(config.seed)
    shardings = tree_shardings(jax.eval_shape(init, key), mesh)
    return jax.jit(lambda key: nn.meta.unbox(init(key)), out_shardings=shardings)(key)


def _random_batch(shapes: dict[str, jax.ShapeDtypeStruct], vocabulary: int) -> dict[str, jax.Array]:
    """Every token counts, and as one byte. Which position a token has makes no difference."""
    batch = {name: jnp.ones(x.shape, x.dtype) for name, x in shapes.items()}
    for i, name in enumerate(("tokens", "targets")):
        batch[name] = jax.random.randint(jax.random.key(i), shapes[name].shape, 0, vocabulary)
    return {name: jax.device_put(x, shapes[name].sharding) for name, x in batch.items()}


def _time(
    step: Any, state: TrainState, batch: dict[str, jax.Array], steps: int
) -> tuple[TrainState, list[float], float]:
    """The state after some steps, the seconds of each and the last loss."""
    seconds, loss = [], float("nan")
    for _ in range(steps):
        begin = time.perf_counter()
        state, metrics = step(state, batch)
        loss = float(metrics.sums.nll) / batch["tokens"].size  # waits for the step
        seconds.append(time.perf_counter() - begin)
    return state, seconds, loss


def benchmark(arguments: Arguments) -> None:
    """Measures, prints and writes."""
    preset = named(arguments.preset)
    rows: list[dict[str, Any]] = []
    for attention, mesh, repeats in itertools.product(arguments.attentions, arguments.meshes, arguments.deterministic):
        remat = arguments.remat or preset.model.remat
        model = dataclasses.replace(preset.model, attention=attention, remat=remat)
        config = dataclasses.replace(preset, model=model, mesh=parse_mesh(mesh), deterministic=repeats)
        rows += measure(config, arguments.lengths, arguments.tokens_per_device, arguments.steps, trace=arguments.trace)
        write_figures(arguments, rows)
    Console().print(_table(rows))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "attention",
        "mesh",
        "length",
        "rows",
        "deterministic",
        "tokens/s/device",
        "spread",
        "MFU",
        "GiB",
        "MB received",
        "ms hidden",
    )
    for row in rows:
        count, utilisation = row["devices"], row["model_flop_utilisation"]
        table.add_row(
            row["attention"],
            " ".join(f"{axis} {size}" for axis, size in row["mesh"].items()) or "1 device",
            str(row["length"]),
            str(row["rows"]),
            "no" if "not" in row["determinism"] else "yes",
            f"{row['tokens_per_second'] / count:,.0f}",
            f"{row['lowest'] / count:,.0f} to {row['highest'] / count:,.0f}",
            "" if utilisation is None else f"{100 * utilisation:.1f}%",
            f"{row['memory_gib']:.1f}",
            f"{sum(row['received_bytes'].values()) / 1e6:,.0f}" if count > 1 else "",
            _hidden(row),
        )
    return table


def _hidden(row: dict[str, Any]) -> str:
    """Milliseconds of communication in a step, and of these the ones hidden behind computation."""
    if "seconds_of_a_step" not in row:
        return ""
    seconds = row["seconds_of_a_step"]
    return f"{1e3 * seconds['hidden_s']:.1f} of {1e3 * seconds['communication_s']:.1f}"
