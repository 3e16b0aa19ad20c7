"""The state of a run and one update of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from train.loss import LossSums, cross_entropy
from train.model import Transformer, output_kernel


class TrainState(NamedTuple):
    """All that a step reads and writes, and a checkpoint holds."""

    step: Int[Array, ""]  # updates made
    params: Any  # float32
    opt_state: optax.OptState
    rng: Array  # key data, split once per step


class StepMetrics(NamedTuple):
    """Of one step, over its whole batch."""

    sums: LossSums
    grad_norm: Array  # before clipping


def make_init(model: Transformer, optimizer: optax.GradientTransformation) -> Callable[[Array], TrainState]:
    """A function from a key to the state before the first step, with flax's boxes around the parameters."""

    def init(key: Array) -> TrainState:
        params_key, rng = jax.random.split(key)
        tokens = jnp.zeros((1, model.config.nsa.select_block), jnp.int32)
        params = model.init(params_key, tokens)["params"]
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.random.key_data(rng))

    return init


def loss_sums(model: Transformer, params: Any, batch: dict[str, Array]) -> LossSums:
    """The loss of a batch, as sums."""
    hidden: Any = model.apply({"params": params}, batch["tokens"], segment_ids=batch.get("segment_ids"))
    kernel = output_kernel(params, model.config)
    return cross_entropy(hidden, kernel, batch["targets"], batch["weights"], batch["target_bytes"])


def make_train_step(
    model: Transformer, optimizer: optax.GradientTransformation, *, accumulate: int, z_loss: float
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, StepMetrics]]:
    """One update, from a batch that is cut into `accumulate` microbatches along its rows.

    The gradient is that of the sum of all tokens' losses over the sum of all weights, however many tokens count in
    each microbatch.
    """

    def objective(params: Any, batch: dict[str, Array], total_weight: Array) -> tuple[Array, LossSums]:
        sums = loss_sums(model, params, batch)
        return (sums.nll + z_loss * sums.z) / total_weight, sums

    gradient = jax.value_and_grad(objective, has_aux=True)

    def step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, StepMetrics]:
        total_weight = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
        if accumulate == 1:
            (_, sums), grads = gradient(state.params, batch, total_weight)
        else:
            # Every accumulate-th row, not neighbouring ones: then each device's rows stay on it.
            split = {key: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1) for key, x in batch.items()}

            def add(total: Any, microbatch: dict[str, Array]) -> tuple[Any, None]:
                (_, sums), grads = gradient(state.params, microbatch, total_weight)
                return jax.tree.map(jnp.add, total, (sums, grads)), None

            zero = (LossSums(*[jnp.zeros((), jnp.float32)] * 4), jax.tree.map(jnp.zeros_like, state.params))
            (sums, grads), _ = jax.lax.scan(add, zero, split)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rng = jax.random.key_data(jax.random.split(jax.random.wrap_key_data(state.rng), 1)[0])
        return TrainState(state.step + 1, params, opt_state, rng), StepMetrics(sums, optax.tree.norm(grads))

    return step
