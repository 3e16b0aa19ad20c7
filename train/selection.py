"""Whether the blocks that a model selects hold its attention, as a run logs it."""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nsa_jax.selection import selection_recall
from train.config import ModelConfig, TrainConfig
from train.model.attention import attention_kind
from train.model.attention.choosing import Selection, sampled_positions
from train.model.attention.nsa import NSA
from train.model.transformer import Transformer, layer_stacks

SHARES = ("chosen", "random", "best")


def is_measured(config: TrainConfig) -> bool:
    """Whether a run can measure its selection: it has one, and no device has but a part of a row."""
    selects = bool(_selecting(config.model)) and config.model.nsa.num_selected > 0
    return config.eval_selection and selects and config.mesh.context == 1


def make_selection_step(model: Transformer) -> Callable[[Any, dict[str, jax.Array]], list[Selection]]:
    """A function from parameters and a batch to the `Selection` of each layer that selects, in their order."""

    def step(params: Any, batch: dict[str, jax.Array]) -> list[Selection]:
        tokens = batch["tokens"]
        _, left = model.apply(
            {"params": params}, tokens, segment_ids=batch.get("segment_ids"), mutable=["intermediates"]
        )
        return [_selection(layer, model.config) for layer in _selecting_layers(left["intermediates"], model.config)]

    return step


def _selecting(config: ModelConfig) -> list[NSA]:
    """The kinds of the layers that select, in their order."""
    kinds = [attention_kind(name) for name in config.attention_of_layers]
    return [kind for kind in kinds if isinstance(kind, NSA)]


def _selecting_layers(left: Any, config: ModelConfig) -> Iterator[dict[str, Any]]:
    """What each layer that selects left, in their order."""
    for name, stack in layer_stacks(config).items():
        for group, (index, layer) in itertools.product(range(stack.groups), enumerate(stack.layers)):
            if isinstance(attention_kind(layer.attention), NSA):
                own = left[name] if len(stack.layers) == 1 else left[name][str(index)]
                yield jax.tree.map(lambda x, group=group: x[group], own["attention"])


def _selection(left: dict[str, Any], config: ModelConfig) -> Selection:
    """A layer's own measurement; for NSA itself, one of what it gave to the attention."""
    if "selection" in left:
        return left["selection"][0]
    inputs = left["attention_inputs"][0]
    recall = selection_recall(inputs, config.nsa, sampled_positions(inputs.q.shape[1]))
    return Selection(recall, union=jnp.ones_like(recall.chosen), imbalance=jnp.ones_like(recall.chosen))


def logged(layers: list[Selection], config: TrainConfig) -> dict[str, float]:
    """What is logged: "selection_chosen/2/0" is the share that the chosen blocks hold in layer 2 for K/V head 0.

    Heads that attend to nothing beyond their windows, where there is no such share, are left out. "decoded_bytes/2/0"
    are the bytes that the group reads to decode a token at the end of a row, and "selection_imbalance/2/0" is the
    `Selection.imbalance`.
    """
    values: dict[str, float] = {}
    for layer, (selection, kind) in enumerate(zip(layers, _selecting(config.model), strict=True)):
        for name in SHARES:
            for head, share in enumerate(np.asarray(getattr(selection.recall, name))):
                if np.isfinite(share):
                    values[f"selection_{name}/{layer}/{head}"] = float(share)
        for head, (union, imbalance) in enumerate(zip(selection.union, selection.imbalance, strict=True)):
            read = kind.decoded_bytes(config.model, config.data.sequence_length, float(union))
            values[f"decoded_bytes/{layer}/{head}"] = read
            values[f"selection_imbalance/{layer}/{head}"] = float(imbalance)
    return values


def skills(values: dict[str, float]) -> dict[tuple[int, int], float]:
    """From logged values, by layer and K/V head: 0 for blocks as good as random ones, 1 for the best possible."""
    found = {}
    for name, chosen in values.items():
        if place := re.fullmatch(r"selection_chosen/(\d+)/(\d+)", name):
            layer, head = place.groups()
            random, best = (values[f"selection_{kind}/{layer}/{head}"] for kind in SHARES[1:])
            if best > random:
                found[int(layer), int(head)] = (chosen - random) / (best - random)
    return found
