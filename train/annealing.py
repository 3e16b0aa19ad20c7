"""From full attention to NSA: how a run starts from a dense model's parameters, and the steps in which it goes over.

With one projection to keys and values for all branches, a layer of NSA has the parameters of a dense layer, and gates
besides. A window as long as the sequence is full attention. So with that window, its gate at 1 and the others at 0, the
model is exactly the dense one. From there, `anneal_steps` lead to the ordinary model in two halves:

    step                      gates (compressed, selected, window)     window
    0                         0, 0, 1: the dense model                 as long as the sequence
    1/2 anneal_steps          0.02, 0.98, 0                            model.nsa.window from here on
    anneal_steps              0.02, 0.96, 0.02: ordinary NSA           model.nsa.window

Gates go from one line to the next in proportion to the steps, and always add up to 1. The window changes its length
while its gate is 0, so that the model does not notice. There are two programs, one for each half.

The gates of the table are those of parameters as they are at the start. The logits of the gates are what is learnt; a
schedule adds to these, which changes nothing else and no gradient. At the end it adds 0.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from train.config import ModelConfig, TrainConfig
from train.model.transformer import Transformer, layer_stacks

# Of a layer that was a dense one: compressed, selected, window. What a dense model reads is mostly in the blocks that
# are selected; in docs/experiments.md, a larger share of the other branches makes the loss at the end larger.
GATES = (0.02, 0.96, 0.02)
STAGES = ((0.0, 0.0, 1.0), (0.02, 0.98, 0.0), GATES)  # at the start, half way and at the end
LARGEST = 100.0  # logit; in float32 and in bfloat16 the sigmoid of it is 1, and of its negative nothing beside 1
NSA = "nsa"
# Settings of the model that belong to its attention alone.
OF_ATTENTION = (
    "model.attention",
    "model.pattern",
    "model.nsa.",
    "model.compression",
    "model.share_kv",
    "model.tie_keys",
    "model.selection_loss",
)


def goes_over(old: ModelConfig, new: ModelConfig) -> bool:
    """Whether a model takes over a dense model's parameters, in layers of NSA and others of the dense kind.

    Other settings than those in `OF_ATTENTION` are not compared.
    """
    (dense, *others) = set(old.attention_of_layers)
    kinds = set(new.attention_of_layers)
    return dense in ("full", "window") and not others and not old.pattern and NSA in kinds and kinds <= {NSA, dense}


def check_window(old: ModelConfig, config: TrainConfig) -> None:
    """Raises ValueError where `anneal_steps` would not begin with the dense model."""
    length = config.data.sequence_length
    if config.anneal_steps and old.attention == "window" and old.nsa.window < length:
        raise ValueError(
            f"anneal_steps = {config.anneal_steps}: expected 0, because the window of init_from, {old.nsa.window}, is "
            f"shorter than data.sequence_length = {length}"
        )


def dense_shapes(fresh: Any, config: ModelConfig) -> Any:
    """The dense model's parameters as `jax.ShapeDtypeStruct`, split over the mesh as those of the new model are."""
    shapes: dict[str, Any] = {}
    for path, leaf in _leaves(fresh):
        place = _dense_place(path, config)
        if place is None:
            continue
        size = leaf.shape
        if path[0] in layer_stacks(config):
            size = (size[0] * len(layer_stacks(config)[path[0]].layers), *size[1:])
        *folders, name = place
        tree = shapes
        for folder in folders:
            tree = tree.setdefault(folder, {})
        tree[name] = jax.ShapeDtypeStruct(size, leaf.dtype, sharding=leaf.sharding)
    return shapes


def from_dense(dense: Any, fresh: Any, config: ModelConfig) -> Any:
    """The parameters of a model that starts from a dense one.

    Args:
      dense: parameters of the dense model.
      fresh: initial parameters of the new one, of which those stay that the dense one lacks. Gates have no weights at
        the start, so that they are `GATES` for every token.
      config: of the new model.

    Returns:
      Parameters with the shapes and shardings of `fresh`.
    """

    def start(path: tuple[Any, ...], leaf: Array) -> Array:
        names = _names(path)
        place = _dense_place(names, config)
        if place is None:
            return _start_of_gate(names[-1], leaf)
        value = dense
        for name in place:
            value = value[name]
        stack = layer_stacks(config).get(names[0])
        if stack is not None and len(stack.layers) > 1:
            value = value[int(names[1]) :: len(stack.layers)]
        return jax.device_put(value, leaf.sharding)

    return jax.tree_util.tree_map_with_path(start, fresh)


def first_model(model: Transformer, config: TrainConfig) -> Transformer:
    """The model of the first half, whose windows are as long as the sequence."""
    nsa = dataclasses.replace(config.model.nsa, window=config.data.sequence_length)
    return model.clone(config=dataclasses.replace(config.model, nsa=nsa))


def in_first_half(step: int, config: TrainConfig) -> bool:
    """Whether a step, of which the first is 1, is one of the first half."""
    return 2 * (step - 1) < config.anneal_steps


def opening(config: TrainConfig) -> Callable[[Any, Int[Array, ""]], Any] | None:
    """A function from parameters, and the steps made before, to the parameters that a step uses; None: the same."""
    if not config.anneal_steps:
        return None

    def opened(params: Any, step: Int[Array, ""]) -> Any:
        shift = gate_shift(step / config.anneal_steps)

        def shifted(path: tuple[Any, ...], leaf: Array) -> Array:
            return leaf + shift.reshape((1,) * (leaf.ndim - 1) + (3,)) if _is_gate_bias(_names(path)) else leaf

        return jax.tree_util.tree_map_with_path(shifted, params)

    return opened


def gate_shift(progress: Float[Array, ""]) -> Float[Array, "3"]:
    """What is added to the logits of the gates when a part `progress` of `anneal_steps` is made; 0 from 1 on."""
    times, stages = jnp.array([0.0, 0.5, 1.0]), np.array(STAGES).T
    # A compiled `interp` may round a gate of 0 to less than 0, which has no logit.
    targets = jnp.stack([jnp.interp(progress, times, jnp.array(stage)) for stage in stages]).clip(0, 1)
    return jnp.where(progress < 1, jnp.clip(_logit(targets) - _logit(jnp.array(GATES)), -LARGEST, LARGEST), 0.0)


def _logit(gate: Float[Array, "3"]) -> Float[Array, "3"]:
    return jnp.log(gate) - jnp.log1p(-gate)


def _dense_place(path: tuple[str, ...], config: ModelConfig) -> tuple[str, ...] | None:
    """Where the dense model has a parameter; None: it has no such parameter."""
    stack = layer_stacks(config).get(path[0])
    if stack is not None and len(stack.layers) > 1:
        path = (path[0], *path[2:])
    if path[-2:-1] != ("attention",):
        return path
    name = path[-1]
    if name.startswith(("gate_", "phi_")):
        return None
    for branch in ("cmp_", "slc_", "win_"):
        name = name.removeprefix(branch)
    return (*path[:-1], name)


def _start_of_gate(name: str, leaf: Array) -> Array:
    if name == "gate_out_kernel":
        return jnp.zeros_like(leaf)
    if name == "gate_out_bias":
        return jax.device_put(jnp.broadcast_to(_logit(jnp.array(GATES)), leaf.shape), leaf.sharding)
    return leaf


def _is_gate_bias(path: tuple[str, ...]) -> bool:
    return path[-2:] == ("attention", "gate_out_bias")


def _leaves(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    return [(_names(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(entry.key) for entry in path)
