"""Causal attention to the last `model.nsa.window` tokens."""

from typing import Any

import numpy as np
from jaxtyping import Int

from nsa_jax import FullAttention
from nsa_jax.context import received_bytes
from train.config import ModelConfig
from train.model.attention.kind import AttentionKind, split_heads


class Window(AttentionKind):
    """`nsa_jax.FullAttention` with a window."""

    def layer(self, config: ModelConfig, **common: Any) -> FullAttention:
        """The dense layer, with the window of the sparse branches."""
        return FullAttention(**common, window=config.nsa.window)

    def keys_read(self, config: ModelConfig, length: int) -> Int[np.ndarray, " length"]:
        """The window, which is shorter at the start of the sequence."""
        return np.minimum(np.arange(length) + 1, config.nsa.window)

    def received_over_context(
        self, config: ModelConfig, *, length: int, devices: int, tensor: int, itemsize: int
    ) -> float:
        """The tokens before a device's own that its window reaches."""
        heads = split_heads(config, tensor)
        return received_bytes("window", config.nsa, T=length, devices=devices, **heads, itemsize=itemsize)


KIND = Window()
