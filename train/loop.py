"""The training loop: step, evaluate, save, stop and resume."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.checkpoints.checkpointer import Checkpointer
from train.checkpoints.saved import check_start, starting_parameters
from train.commands.positions import evaluate_positions, position_sums
from train.config import TrainConfig, check, differences, from_json, to_json
from train.console import Console
from train.data.corpus import Corpus, load_corpus
from train.data.loader import Batch, held_out_batches, train_batches
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.evaluate import evaluate
from train.generation.generator import generate
from train.generation.sampling import Sampling
from train.metrics import MetricsLog, active_parameters, device_peak_flops, total_parameters, train_flops_per_token
from train.model.loss import LossSums, bits_per_byte
from train.model.transformer import Transformer, padded_vocabulary
from train.optimizer import learning_rate_schedule, make_optimizer
from train.parallel.distributed import gather, in_turn, stop_signals, together
from train.parallel.sharding import check_divisible, data_shards, make_mesh, on_mesh, put_batch, tree_shardings
from train.plot import plot_curves
from train.step import StepMetrics, TrainState, loss_sums, make_init, make_train_step

# What a resumed run may change. Everything else would make it another run.
CHANGEABLE = (
    "run_dir",
    "steps",
    "eval_every",
    "eval_batches",
    "position_buckets",
    "sample_prompt",
    "sample_tokens",
    "tensorboard",
    "wandb",
    "checkpoint.",
    "mesh.",
    "distributed.",
    "model.implementation",
    "model.remat",
)


class NonFiniteError(RuntimeError):
    """The loss or the gradient became NaN or infinite."""


class Interrupted(Exception):
    """A signal asked the run to stop; it has saved and can be resumed."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} after step {step}; saved, run again to go on"
        )
        self.signal_number = signal_number


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run leaves."""

    state: TrainState
    held_out: dict[str, float]  # at the last step
    sample: str
    files: dict[str, Path]  # by what they hold


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run whose settings have been found to fit together, its data and its model."""

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
      ValueError: a setting is impossible, contradicts another, or differs from the run in the folder or, as may its
        data and what it sees in the folder, from those of another process.
    """
    with together(ValueError):
        prepared = _prepare(config)
    _check_alike(prepared)
    return prepared


def _prepare(config: TrainConfig) -> Prepared:
    check(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_divisible(config, padded_vocabulary(tokenizer.vocab_size), jax.device_count())
    mesh = make_mesh(config.mesh)
    index, count = data_shards(mesh)
    corpus = load_corpus(config.data)
    facts = {"vocab_size": tokenizer.vocab_size, "data_fingerprint": corpus.fingerprint}
    _check_same_run(config, facts)
    if config.init_from is not None and _checkpoints(config).latest_step is None:
        check_start(config, tokenizer.vocab_size)  # a run that has begun no longer reads it
    model = Transformer(config.model, tokenizer.vocab_size)
    optimizer = make_optimizer(config.optimizer, config.steps)
    boxed = jax.eval_shape(make_init(model, optimizer), jax.random.key(config.seed))
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        tree_shardings(boxed, mesh),
    )
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
        abstract_state=abstract,
        train_batches=train_batches(corpus, tokenizer, config.data, **share),
        held_out=list(held_out),
    )


def run(prepared: Prepared, *, plain: bool | None = None) -> Result:
    """Trains, from the start or from where the run's folder stands, to the last step.

    Every process of a run makes the same call. The first alone prints and writes, but for the checkpoints' arrays.

    Args:
      prepared: by `prepare`, for this one call.
      plain: lines instead of a progress line; None: where standard output is no terminal.

    Raises:
      CheckpointError: a checkpoint could not be written or read.
      NonFiniteError: the loss or the gradient became NaN or infinite.
      Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    config, mesh, model, abstract = prepared.config, prepared.mesh, prepared.model, prepared.abstract_state
    silent = jax.process_index() != 0
    console = Console(config.steps, plain=plain, silent=silent)
    _introduce(prepared, console)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    # Worked out beforehand: a device asked for one in the loop would answer only when the step in flight is done.
    learning_rates = np.asarray(learning_rate_schedule(config.optimizer, config.steps)(np.arange(config.steps)))
    batches, stride = prepared.train_batches, config.model.nsa.compress_stride

    with contextlib.ExitStack() as stack:
        stack.callback(batches.close)
        checkpointer = stack.enter_context(_checkpoints(config, prepared.data_shard))
        restored = checkpointer.restore_latest(abstract, batches)
        if restored is None:
            init = make_init(model, prepared.optimizer)
            state = jax.jit(lambda key: nn.meta.unbox(init(key)), out_shardings=shardings)(jax.random.key(config.seed))
            first = 0
            if config.init_from is not None:
                state = state._replace(params=starting_parameters(config, abstract.params))
                console.print(f"starting from the parameters of {config.init_from}")
        else:
            first, state = restored
            console.print(f"resuming after step {first}, saved in {config.run_dir / 'checkpoints'}")
        with together(RuntimeError, ImportError):
            if not silent:
                config.run_dir.mkdir(parents=True, exist_ok=True)
                _write(config.run_dir / "config.json", to_json(config))
                _write(config.run_dir / "facts.json", json.dumps(prepared.facts, indent=2))
            log = MetricsLog(config, first_step=first + 1, silent=silent)
        stack.callback(log.close)
        stop = stack.enter_context(stop_signals(mesh))

        update = make_train_step(
            model, prepared.optimizer, accumulate=config.optimizer.accumulate, z_loss=config.optimizer.z_loss
        )
        train_step = in_turn(on_mesh(jax.jit(update, donate_argnums=0, out_shardings=(shardings, None)), mesh))
        eval_step = in_turn(on_mesh(jax.jit(lambda params, batch: loss_sums(model, params, batch)), mesh))
        tokens_per_step = config.data.batch_size * config.data.sequence_length
        flops_per_token = train_flops_per_token(config.model, config.data.sequence_length, model.vocab_size)
        peak = device_peak_flops()
        pending: tuple[int, StepMetrics] | None = None  # dispatched and not yet looked at
        last_time = time.perf_counter()
        held_out_values: dict[str, float] = {}
        stack.enter_context(console)

        def finish(step: int, metrics: StepMetrics) -> dict[str, float]:
            """Waits for a step, checks it and returns what is logged of it."""
            nonlocal last_time
            sums, grad_norm, router = jax.device_get(metrics)
            loss = float(sums.nll) / max(float(sums.weight), 1.0)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                checkpointer.wait()
                good = checkpointer.latest_step
                remains = "there is no checkpoint yet" if good is None else f"the last good checkpoint is step {good}"
                raise NonFiniteError(
                    f"step {step}: loss {loss}, gradient norm {float(grad_norm)}; {remains} in {checkpointer.directory}"
                )
            now = time.perf_counter()
            speed = tokens_per_step / (now - last_time)
            last_time = now
            values = {
                "loss": loss,
                "bits_per_byte": bits_per_byte(float(sums.nll), float(sums.bytes)),
                "grad_norm": float(grad_norm),
                "learning_rate": float(learning_rates[step - 1]),
                "tokens_per_second": speed,
            }
            if router is not None:
                values |= {name: float(value) for name, value in router._asdict().items()}
            if peak is not None:
                values["model_flop_utilisation"] = speed * flops_per_token / peak
            console.update(step, values)
            return values

        for step in range(first + 1, config.steps + 1):
            state, metrics = train_step(state, put_batch(next(batches), mesh, stride))
            # The step before is looked at only now, so that the device never waits for the host.
            if pending is not None:
                log.write(pending[0], finish(*pending))
            pending = step, metrics
            signalled = stop.requested()
            evaluating = step % config.eval_every == 0 or step == config.steps
            saving = step % config.checkpoint.every == 0 or step == config.steps or signalled is not None
            if not (evaluating or saving):
                continue
            values = finish(step, metrics)
            pending = None
            evaluated = {}
            if evaluating:
                evaluated = held_out_values = evaluate(eval_step, state.params, prepared.held_out, mesh, stride)
                console.evaluated(step, evaluated)
            by_position = _by_position(prepared, state.params) if step == config.steps else {}
            log.write(step, values | evaluated | by_position)
            if saving:
                checkpointer.save(step, state, batches, evaluated or None)
            if signalled is not None and step < config.steps:
                checkpointer.wait()
                raise Interrupted(signalled, step)
            last_time = time.perf_counter()  # evaluating and saving are not training
        checkpointer.wait()
        if not held_out_values:  # there was no step left to make
            held_out_values = evaluate(eval_step, state.params, prepared.held_out, mesh, stride)
    return _report(prepared, state, held_out_values, console)


def _by_position(prepared: Prepared, params: Any) -> dict[str, float]:
    """Held-out bits per byte by position, as they are logged."""
    model, mesh, buckets = prepared.model, prepared.mesh, prepared.config.position_buckets
    stride, length = model.config.nsa.compress_stride, prepared.config.data.sequence_length
    if not buckets:
        return {}

    def loss(params: Any, batch: dict[str, jax.Array]) -> LossSums:
        return loss_sums(model, params, batch)

    whole = NamedSharding(mesh, PartitionSpec())  # every host reads all buckets
    step = jax.jit(lambda params, batch: position_sums(loss, params, batch, buckets, length), out_shardings=whole)
    found = evaluate_positions(
        in_turn(on_mesh(step, mesh)), params, (put_batch(batch, mesh, stride) for batch in prepared.held_out), length
    )
    return {f"held_out_bits_per_byte/{bucket.begin}-{bucket.end - 1}": bucket.bits_per_byte for bucket in found}


def _introduce(prepared: Prepared, console: Console) -> None:
    """Says what is trained, on what."""
    corpus, config = prepared.corpus, prepared.config
    console.print(
        f"{corpus.name}: {len(corpus.train)} documents to train on, {len(corpus.held_out)} held out, "
        f"{corpus.num_bytes / 1e6:.1f} MB, {len(corpus.skipped)} skipped"
    )
    for where, reason in corpus.skipped[:5]:
        console.print(f"  skipped {where}: {reason}")
    total = total_parameters(prepared.abstract_state.params)
    active = active_parameters(total, config.model)
    flops = train_flops_per_token(config.model, config.data.sequence_length, prepared.model.vocab_size)
    console.print(
        f"{total / 1e6:.2f}M parameters{'' if active == total else f', {active / 1e6:.2f}M of them active per token'}, "
        f"{flops / 1e6:.2f} MFLOPs per token of training"
    )
    console.print(
        f"attention = {config.model.attention}, {jax.device_count()} x {jax.devices()[0].device_kind} in "
        f"{jax.process_count()} process(es), mesh {dict(prepared.mesh.shape)}"
    )


def _report(prepared: Prepared, state: TrainState, held_out: dict[str, float], console: Console) -> Result:
    """Samples, draws the curve and says where everything is."""
    config = prepared.config
    files = {
        "curve": config.run_dir / "loss.png",
        "sample": config.run_dir / "sample.txt",
        "metrics": config.run_dir / "metrics.jsonl",
        "config": config.run_dir / "config.json",
        "checkpoints": config.run_dir / "checkpoints",
    }
    sample = ""
    if jax.process_count() > 1:
        # No process has all parameters, and they need not fit into one.
        del files["sample"]
        console.print(f"several processes make no sample; for one: python -m train generate --run {config.run_dir}")
    elif config.sample_tokens:
        seed = int(np.asarray(state.rng)[-1] % 2**31)
        sample = generate(
            state.params,
            prepared.model,
            prepared.tokenizer,
            config.sample_prompt,
            Sampling(max_tokens=config.sample_tokens, seed=seed),
        )
    with together(RuntimeError):
        if jax.process_index() == 0:
            plot_curves({config.model.attention: config.run_dir}, files["curve"])
            if "sample" in files:
                _write(files["sample"], sample)
    console.finished(held_out, sample, files)
    return Result(state, held_out, sample, files)


def _check_same_run(config: TrainConfig, facts: dict[str, Any]) -> None:
    """Raises ValueError where the run in the folder is another one."""
    saved = config.run_dir / "config.json"
    if not saved.exists():
        return
    path = config.run_dir / "facts.json"
    old_facts = json.loads(path.read_text()) if path.exists() else {}
    changed = _changes((from_json(saved.read_text()), old_facts), (config, facts), CHANGEABLE)
    if changed:
        shown = "; ".join(f"{name} was {before!r}, is {now!r}" for name, before, now in changed)
        raise ValueError(f"run_dir = {config.run_dir} holds a run with other settings: {shown}. Choose another run_dir")
    reached = _checkpoints(config).latest_step
    if reached is not None and config.steps < reached:
        raise ValueError(
            f"steps = {config.steps}: expected at least {reached}, the last step saved in {config.run_dir}"
        )


def _check_alike(prepared: Prepared) -> None:
    """Raises ValueError where processes have other settings, read other data or see another run in the folder."""
    config = prepared.config
    facts = prepared.facts | {"last saved step": _checkpoints(config).latest_step}
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


def _checkpoints(config: TrainConfig, data_shard: tuple[int, int] | None = None) -> Checkpointer:
    return Checkpointer(config.run_dir / "checkpoints", config.checkpoint, data_shard)


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)
