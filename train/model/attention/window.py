"""Causal attention to the last `model.nsa.window` tokens."""

from typing import Any

import numpy as np
from jaxtyping import Int

from nsa_jax import FullAttention
from train.config import ModelConfig
from train.model.attention.kind import AttentionKind, Split, received_as


class Window(AttentionKind):
    """`nsa_jax.FullAttention` with a window."""

    def layer(self, config: ModelConfig, **common: Any) -> FullAttention:
        """The dense layer, with the window of the sparse branches."""
        return FullAttention(**common, window=config.nsa.window)

    def keys_read(self, config: ModelConfig, length: int) -> Int[np.ndarray, " length"]:
        """The window, which is shorter at the start of the sequence."""
        return np.minimum(np.arange(length) + 1, config.nsa.window)

    def received_over_context(self, config: ModelConfig, split: Split) -> float:
        """The tokens before a device's own that its window reaches."""
        return received_as("window", config, split)


KIND = Window()
