"""The training loop: step, evaluate, save, stop and resume."""

import contextlib
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.benchmarks.provenance import provenance
from train import annealing, determinism, run_folder
from train.checkpoints.checkpointer import Checkpointer
from train.checkpoints.saved import starting_parameters
from train.config import TrainConfig
from train.console import Console
from train.data.corpus import describe
from train.evaluate import evaluate, evaluate_positions, position_sums
from train.generation.generator import generate
from train.generation.sampling import Sampling
from train.metrics import MetricsLog
from train.model.attention import attention_kind
from train.model.flops import active_parameters, device_peak_flops, total_parameters, train_flops_per_token
from train.model.loss import LossSums, bits_per_byte
from train.model.transformer import Transformer
from train.optimizer import learning_rate_schedule
from train.parallel.distributed import Stop, in_turn, together
from train.parallel.sharding import on_mesh, put_batch
from train.plot import plot_curves
from train.prepare import Prepared, checkpoints_of
from train.pretrained import chat_template
from train.selection import is_measured, logged, make_selection_step
from train.step import StepMetrics, TrainState, loss_sums, make_init, make_train_step


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


def run(prepared: Prepared, *, plain: bool | None = None) -> Result:
    """Trains to the last step, from the start or from the newest checkpoint in the run's folder.

    Every process of a run makes the same call. Only the first one prints and writes, except for the arrays of
    checkpoints.

    Args:
      prepared: by `prepare`, for this one call.
      plain: lines instead of a progress line; None: where standard output is no terminal.

    Raises:
      InUseError: another process trains in the run's folder.
      CheckpointError: a checkpoint could not be written or read.
      NonFiniteError: the loss or the gradient became NaN or infinite.
      Interrupted: SIGTERM or SIGINT came after the first step of this process; the state is saved.
    """
    config, silent = prepared.config, jax.process_index() != 0
    console = Console(config.steps, plain=plain, silent=silent)
    _introduce(prepared, console)
    with contextlib.ExitStack() as stack:
        stack.callback(prepared.train_batches.close)
        _lock(prepared, stack, console)
        checkpointer = stack.enter_context(checkpoints_of(config, prepared.data_shard))
        done, state = _starting_state(prepared, checkpointer, console)
        first_step = 0 if checkpointer.latest_step is None else done + 1
        log = stack.enter_context(contextlib.closing(_open_log(prepared, first_step=first_step, silent=silent)))
        stop = stack.enter_context(contextlib.closing(Stop(prepared.mesh)))
        stack.enter_context(console)
        state, held_out = _train(prepared, done, state, checkpointer=checkpointer, log=log, stop=stop, console=console)
    return _report(prepared, state, held_out, console)


def _lock(prepared: Prepared, stack: contextlib.ExitStack, console: Console) -> None:
    """Keeps the run's folder from other processes until the stack is closed."""
    with together(run_folder.InUseError):
        if jax.process_index() == 0:
            left = stack.enter_context(run_folder.locked(prepared.config.run_dir))
            if left is not None:
                console.print(f"{left} left {prepared.config.run_dir} without ending by itself: taken over")


def _starting_state(prepared: Prepared, checkpointer: Checkpointer, console: Console) -> tuple[int, TrainState]:
    """The number of steps made before and the state after them; the data iterator is put where it was then."""
    config = prepared.config
    restored = checkpointer.restore_latest(prepared.abstract_state, prepared.train_batches)
    if restored is not None:
        console.print(f"resuming after step {restored[0]}, saved in {config.run_dir / 'checkpoints'}")
        return restored
    init = make_init(prepared.model, prepared.optimizer)
    state = jax.jit(lambda key: nn.meta.unbox(init(key)), out_shardings=_shardings(prepared))(
        jax.random.key(config.seed)
    )
    if config.init_from is not None:
        state = state._replace(params=starting_parameters(config, state.params))
        console.print(f"starting from the parameters of {config.init_from}")
    return 0, state


def _shardings(prepared: Prepared) -> TrainState:
    return jax.tree.map(lambda x: x.sharding, prepared.abstract_state)


def _open_log(prepared: Prepared, *, first_step: int, silent: bool) -> MetricsLog:
    """Writes what a run's folder says of the run, and opens its log."""
    config = prepared.config
    with together(RuntimeError, ImportError):
        if not silent:
            run_folder.describe(config, prepared.facts)
            chat_template.inherit(config)
            run_folder.write(config.run_dir / "metrics.meta.json", json.dumps(_origin(config), indent=1) + "\n")
        return MetricsLog(config, first_step=first_step, silent=silent)


def _origin(config: TrainConfig) -> dict[str, Any]:
    """What stands beside the metrics when they are kept as a result."""
    return {
        "provenance": provenance(["python", "-m", "train", *sys.argv[1:]]),
        "attention": config.model.attention_name,
        "tokens_per_step": config.data.batch_size * config.data.sequence_length,
    }


def _train(
    prepared: Prepared,
    done: int,
    state: TrainState,
    *,
    checkpointer: Checkpointer,
    log: MetricsLog,
    stop: Stop,
    console: Console,
) -> tuple[TrainState, dict[str, float]]:
    """Makes the steps that are left, and returns the last state and its held-out figures.

    What a run starts from is evaluated as step 0, if it is another run's.
    """
    config, mesh, batches = prepared.config, prepared.mesh, prepared.train_batches
    stride = config.model.nsa.compress_stride
    train_step, held_out_figures = _programs(prepared)
    measure_selection, by_position = _selection(prepared), _by_position(prepared)
    reader = _StepReader(prepared, checkpointer, console)
    pending: tuple[int, StepMetrics] | None = None  # dispatched and not yet looked at
    held_out: dict[str, float] = {}
    if checkpointer.latest_step is None and (config.init_from is not None or not config.steps):
        held_out = held_out_figures(0, state.params)
        selection = measure_selection(state.params)
        console.evaluated(0, held_out | selection)
        log.write(0, held_out | selection | by_position(state.params))
        if not config.steps:
            checkpointer.save(0, state, batches, held_out)
            checkpointer.wait()
        reader.restart_clock()
    for step in range(done + 1, config.steps + 1):
        state, metrics = train_step(step)(state, put_batch(next(batches), mesh, stride))
        # The step before is looked at only now, so that the device never waits for the host.
        if pending is not None:
            log.write(pending[0], reader.read(*pending))
        pending = step, metrics
        signalled = stop.requested()
        evaluating = step % config.eval_every == 0 or step == config.steps
        saving = step % config.checkpoint.every == 0 or step == config.steps or signalled is not None
        if not (evaluating or saving):
            continue
        values = reader.read(step, metrics)
        pending = None
        evaluated = {}
        if evaluating:
            evaluated = held_out = held_out_figures(step, state.params)
            selection = measure_selection(state.params)
            console.evaluated(step, evaluated | selection)
            values |= selection
        log.write(step, values | evaluated | (by_position(state.params) if step == config.steps else {}))
        if saving:
            checkpointer.save(step, state, batches, evaluated or None)
        if signalled is not None or step == config.steps:
            checkpointer.wait()
            signalled = signalled or stop.requested() or stop.requested()  # the second knows what came meanwhile
        if signalled is not None:
            raise Interrupted(signalled, step)
        reader.restart_clock()  # evaluating and saving are not training
    if not held_out:  # there was no step left to make
        held_out = held_out_figures(done, state.params)
    return state, held_out


def _programs(prepared: Prepared) -> tuple[Callable[[int], Callable], Callable[[int, Any], dict[str, float]]]:
    """The update of a step, which takes over the state that it is given, and the held-out figures after a step.

    These figures are those of the ordinary model. As long as the run goes over to it, "held_out_loss_as_trained" is
    that of the model that the next step trains.
    """
    config, mesh, model = prepared.config, prepared.mesh, prepared.model
    options, opening = determinism.compiler_options(config.deterministic), annealing.opening(config)
    stride = config.model.nsa.compress_stride

    def train_step(model: Transformer) -> Callable:
        update = make_train_step(
            model,
            prepared.optimizer,
            accumulate=config.optimizer.accumulate,
            z_loss=config.optimizer.z_loss,
            opening=opening,
        )
        jitted = jax.jit(update, donate_argnums=0, out_shardings=(_shardings(prepared), None), compiler_options=options)
        return in_turn(on_mesh(jitted, mesh))

    def eval_step(model: Transformer) -> Callable:
        def sums(params: Any, step: jax.Array, batch: dict[str, jax.Array]) -> LossSums:
            return loss_sums(model, params if opening is None else opening(params, step), batch)

        return in_turn(on_mesh(jax.jit(sums, compiler_options=options), mesh))

    first_model = annealing.first_model(model, config)
    train_first, train_ordinary = train_step(first_model), train_step(model)
    eval_first, eval_ordinary = eval_step(first_model), eval_step(model)

    def held_out_figures(step: int, params: Any) -> dict[str, float]:
        def figures(eval_step: Callable, step: int) -> dict[str, float]:
            def after(params: Any, batch: dict[str, jax.Array]) -> LossSums:
                return eval_step(params, np.int32(step), batch)

            return evaluate(after, params, prepared.held_out, mesh, stride)

        found = figures(eval_ordinary, config.anneal_steps)
        if step < config.anneal_steps:
            eval_next = eval_first if annealing.in_first_half(step + 1, config) else eval_ordinary
            found["held_out_loss_as_trained"] = figures(eval_next, step)["held_out_loss"]
        return found

    return lambda step: train_first if annealing.in_first_half(step, config) else train_ordinary, held_out_figures


class _StepReader:
    """Waits for steps, checks them, and says what is logged of them."""

    def __init__(self, prepared: Prepared, checkpointer: Checkpointer, console: Console):
        config = prepared.config
        self._checkpointer, self._console, self._anneal_steps = checkpointer, console, config.anneal_steps
        # Computed beforehand: a device that is asked for one in the loop answers only after the step in flight.
        schedule = learning_rate_schedule(config.optimizer, config.steps)
        self._learning_rates = np.asarray(schedule(np.arange(config.steps)))
        length = config.data.sequence_length
        self._tokens_per_step = config.data.batch_size * length
        self._flops_per_token = train_flops_per_token(config.model, length, prepared.model.vocab_size)
        self._peak = device_peak_flops()
        self.restart_clock()

    def restart_clock(self) -> None:
        """The next step begins now."""
        self._last_time = time.perf_counter()

    def read(self, step: int, metrics: StepMetrics) -> dict[str, float]:
        """What is logged of a step, which is shown too.

        Raises:
          NonFiniteError: its loss or gradient is NaN or infinite.
        """
        sums, grad_norm, router, of_layers = jax.device_get(metrics)
        loss = float(sums.nll) / max(float(sums.weight), 1.0)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise self._not_finite(step, loss, float(grad_norm))
        now = time.perf_counter()
        speed = self._tokens_per_step / (now - self._last_time)
        self._last_time = now
        values = {
            "loss": loss,
            "bits_per_byte": bits_per_byte(float(sums.nll), float(sums.bytes)),
            "grad_norm": float(grad_norm),
            "learning_rate": float(self._learning_rates[step - 1]),
            "tokens_per_second": speed,
        }
        if self._anneal_steps:
            values["annealed"] = min(1.0, (step - 1) / self._anneal_steps)
        if router is not None:
            values |= {name: float(value) for name, value in router._asdict().items()}
        if of_layers:
            values["loss_of_layers"] = float(of_layers)
        if self._peak is not None:
            values["model_flop_utilisation"] = speed * self._flops_per_token / self._peak
        self._console.update(step, values)
        return values

    def _not_finite(self, step: int, loss: float, grad_norm: float) -> NonFiniteError:
        self._checkpointer.wait()
        good = self._checkpointer.latest_step
        remains = "there is no checkpoint yet" if good is None else f"the last good checkpoint is step {good}"
        return NonFiniteError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; {remains} in {self._checkpointer.directory}"
        )


def _by_position(prepared: Prepared) -> Callable[[Any], dict[str, float]]:
    """A function from parameters to held-out bits per byte by position, as they are logged."""
    model, mesh, buckets = prepared.model, prepared.mesh, prepared.config.position_buckets
    stride, length = model.config.nsa.compress_stride, prepared.config.data.sequence_length
    if not buckets:
        return lambda params: {}

    def loss(params: Any, batch: dict[str, jax.Array]) -> LossSums:
        return loss_sums(model, params, batch)

    whole = NamedSharding(mesh, PartitionSpec())  # every host reads all buckets
    jitted = jax.jit(lambda params, batch: position_sums(loss, params, batch, buckets, length), out_shardings=whole)
    step = in_turn(on_mesh(jitted, mesh))

    def by_position(params: Any) -> dict[str, float]:
        batches = (put_batch(batch, mesh, stride) for batch in prepared.held_out)
        found = evaluate_positions(step, params, batches, length)
        return {f"held_out_bits_per_byte/{bucket.begin}-{bucket.end - 1}": bucket.bits_per_byte for bucket in found}

    return by_position


def _selection(prepared: Prepared) -> Callable[[Any], dict[str, float]]:
    """A function from parameters to what is logged of the selection, measured on one held-out batch."""
    config, mesh = prepared.config, prepared.mesh
    if not (is_measured(config) and prepared.held_out):
        return lambda params: {}
    whole = NamedSharding(mesh, PartitionSpec())
    step = in_turn(on_mesh(jax.jit(make_selection_step(prepared.model), out_shardings=whole), mesh))
    batch = prepared.held_out[0]
    stride = config.model.nsa.compress_stride
    return lambda params: logged(jax.device_get(step(params, put_batch(batch, mesh, stride))), config)


def _introduce(prepared: Prepared, console: Console) -> None:
    """Says what is trained, on what."""
    config = prepared.config
    for line in describe(prepared.corpus):
        console.print(line)
    total = total_parameters(prepared.abstract_state.params)
    active = active_parameters(total, config.model)
    flops = train_flops_per_token(config.model, config.data.sequence_length, prepared.model.vocab_size)
    console.print(
        f"{total / 1e6:.2f}M parameters{'' if active == total else f', {active / 1e6:.2f}M of them active per token'}, "
        f"{flops / 1e6:.2f} MFLOPs per token of training"
    )
    console.print(
        f"attention = {config.model.attention_name}, {jax.device_count()} x {jax.devices()[0].device_kind} in "
        f"{jax.process_count()} process(es), mesh {dict(prepared.mesh.shape)}"
    )
    console.print(determinism.describe(config.deterministic))


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
    elif not all(attention_kind(kind).decodes for kind in config.model.attention_of_layers):
        del files["sample"]
        console.print(f"no sample: attention = {config.model.attention_name} is for training only")
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
            _leave(
                files, "curve", lambda path: plot_curves({config.model.attention_name: config.run_dir}, path), console
            )
            _leave(files, "sample", lambda path: run_folder.write(path, sample), console)
    console.finished(held_out, sample, files)
    return Result(state, held_out, sample, files)


def _leave(files: dict[str, Path], name: str, write: Callable[[Path], None], console: Console) -> None:
    """Writes one of the files, if it is among them; one that cannot be written is no reason for a run to fail."""
    if name not in files:
        return
    try:
        write(files[name])
    except OSError as error:
        console.print(f"could not write {files.pop(name)}: {error.strerror}")
