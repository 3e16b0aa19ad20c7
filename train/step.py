"""The state of a run and one update of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from train.model.auxiliary import DRAWS, LOSSES, total_loss
from train.model.loss import LossSums, cross_entropy
from train.model.moe import COLLECTION, RouterMetrics, Routing, rebalanced, router_metrics
from train.model.transformer import Transformer, layer_stacks, output_kernel


class TrainState(NamedTuple):
    """Everything that a step reads and writes, and that a checkpoint holds."""

    step: Int[Array, ""]  # updates made
    params: Any  # float32
    opt_state: optax.OptState
    rng: Array  # key data, split once per step


class StepMetrics(NamedTuple):
    """Of one step, over its whole batch."""

    sums: LossSums
    grad_norm: Array  # before clipping
    router: RouterMetrics | None  # of a model with experts
    of_layers: Array | float = 0.0  # what the losses of layers add to the objective; 0 where there are none


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
    return _forward(model, params, batch)[0]


def _forward(
    model: Transformer, params: Any, batch: dict[str, Array], key: Array | None = None
) -> tuple[LossSums, Array, Routing | None]:
    """The loss of a batch, the losses of its layers, and where its tokens went if there are experts.

    Tokens of weight 0 do not count in the loss, nor among the tokens of the experts. Losses of layers that need random
    numbers are there only with a key.
    """
    out: Any = model.apply(
        {"params": params},
        batch["tokens"],
        segment_ids=batch.get("segment_ids"),
        counted=batch["weights"] > 0,
        mutable=[COLLECTION, LOSSES],
        rngs={} if key is None else {DRAWS: key},
    )
    hidden, left = out
    kernel = output_kernel(params, model.config)
    sums = cross_entropy(hidden, kernel, batch["targets"], batch["weights"], batch["target_bytes"])
    routed = None
    if COLLECTION in left:
        routed = layer_stacks(model.config)["layers"].collect(left[COLLECTION]["layers"], "mlp", "sums")
    return sums, total_loss(left), routed


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int,
    z_loss: float,
    opening: Callable[[Any, Array], Any] | None = None,
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, StepMetrics]]:
    """One update, from a batch that is cut into `accumulate` microbatches along its rows.

    The gradient is that of the sum of all tokens' losses over the sum of all weights, however many tokens count in
    each microbatch. The losses of layers (`train.model.auxiliary`) are those of each microbatch by itself, weighted by
    the tokens that count in it. The balancing bias of experts moves once, by the loads of the whole batch.

    `opening` is a function from parameters, and the steps made before, to those that the model uses, as in
    `train.annealing`. Its Jacobian must be the identity.
    """
    moe = model.config.moe

    def objective(
        params: Any, batch: dict[str, Array], key: Array, total_weight: Array, total_tokens: Array
    ) -> tuple[Array, tuple[LossSums, Array, Routing | None]]:
        sums, of_layers, routing = _forward(model, params, batch, key)
        of_layers = of_layers * _num_counted(batch) / total_tokens
        return (sums.nll + z_loss * sums.z) / total_weight + of_layers, (sums, of_layers, routing)

    gradient = jax.value_and_grad(objective, has_aux=True)

    def step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, StepMetrics]:
        total_weight = jnp.sum(batch["weights"])
        total_weight = jnp.where(total_weight > 0, total_weight, 1.0)
        total_tokens = jnp.maximum(_num_counted(batch), 1.0)

        next_key, key = jax.random.split(jax.random.wrap_key_data(state.rng))
        used = state.params if opening is None else opening(state.params, state.step)

        def parts(batch: dict[str, Array]) -> Any:
            (_, sums), grads = gradient(used, batch, key, total_weight, total_tokens)
            return sums, grads

        if accumulate == 1:
            (sums, of_layers, routing), grads = parts(batch)
        else:
            # Every accumulate-th row instead of neighbouring ones, so that each device keeps its rows.
            split = {key: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1) for key, x in batch.items()}

            def add(total: Any, microbatch: dict[str, Array]) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, parts(microbatch)), None

            sums_shapes, _ = jax.eval_shape(parts, {key: x[0] for key, x in split.items()})
            zero_sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums_shapes)
            zero = (zero_sums, jax.tree.map(jnp.zeros_like, state.params))  # with the sharding of the parameters
            ((sums, of_layers, routing), grads), _ = jax.lax.scan(add, zero, split)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        router = None
        if routing is not None:
            router = router_metrics(routing, moe)
            stack, place = layer_stacks(model.config)["layers"], ("mlp", "balance_bias")
            # The optimiser does not change it, because its gradient is zero and biases do not decay.
            bias = rebalanced(stack.collect(params["layers"], *place), routing.assignments, moe.bias_speed)
            params = {**params, "layers": stack.replace(params["layers"], bias, *place)}
        metrics = StepMetrics(sums, optax.tree.norm(grads), router, of_layers)
        return TrainState(state.step + 1, params, opt_state, jax.random.key_data(next_key)), metrics

    return step


def _num_counted(batch: dict[str, Array]) -> Array:
    return jnp.sum(batch["weights"] > 0, dtype=jnp.float32)
