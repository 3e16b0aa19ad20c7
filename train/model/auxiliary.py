"""Losses of layers, beside that of the next token: a layer leaves its own, and a training step adds them up."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOSSES = "losses"  # where a layer leaves its loss, if the caller says that this collection may change
DRAWS = "draws"  # random numbers of a training step, from which a layer draws what its loss is computed from


def leave_loss(layer: nn.Module, loss: Float[Array, ""]) -> None:
    """Adds a loss of a layer, a mean over tokens with its weight in it, to what the model is trained on."""
    layer.sow(LOSSES, "loss", loss, init_fn=lambda: None, reduce_fn=lambda _, new: new)


def total_loss(left: Any) -> Float[Array, ""]:
    """The sum of all losses that the layers of a model left, float32; 0 if there are none.

    Args:
      left: the collections that changed in a call of the model.
    """
    return sum((jnp.sum(loss) for loss in jax.tree.leaves(left.get(LOSSES, {}))), jnp.zeros((), jnp.float32))
