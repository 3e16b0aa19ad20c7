"""Whether the blocks that a model selects hold its attention, as a run logs it."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nsa_jax.selection import SelectionRecall, selection_recall
from nsa_jax.tracing import trace_attention
from train.config import TrainConfig
from train.model.transformer import Transformer

QUERIES = 64  # of a row, evenly over its second half
SHARES = ("chosen", "random", "best")


def is_measured(config: TrainConfig) -> bool:
    """Whether a run can measure its selection: it has one, and no device has but a part of a row."""
    selects = "nsa" in config.model.attention_of_layers and config.model.nsa.num_selected > 0
    return config.eval_selection and selects and config.mesh.context == 1


def make_selection_step(model: Transformer) -> Callable[[Any, dict[str, jax.Array]], list[SelectionRecall]]:
    """A function from parameters and a batch to the `SelectionRecall` of each layer, in their order."""

    def step(params: Any, batch: dict[str, jax.Array]) -> list[SelectionRecall]:
        tokens = batch["tokens"]
        positions = jnp.asarray(np.linspace(tokens.shape[1] // 2, tokens.shape[1] - 1, QUERIES), jnp.int32)
        layers = trace_attention(model, {"params": params}, tokens, segment_ids=batch.get("segment_ids"))
        return [selection_recall(inputs, model.config.nsa, positions) for inputs in layers.values()]

    return step


def logged(layers: list[SelectionRecall]) -> dict[str, float]:
    """What is logged: "selection_chosen/2/0" is the share that the chosen blocks hold in layer 2 for K/V head 0.

    Heads that attend to nothing beyond their windows, where there is no such share, are left out.
    """
    return {
        f"selection_{name}/{layer}/{head}": float(share)
        for layer, recall in enumerate(layers)
        for name in SHARES
        for head, share in enumerate(np.asarray(getattr(recall, name)))
        if np.isfinite(share)
    }


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
