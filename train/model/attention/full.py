"""Causal attention to all earlier tokens."""

from typing import Any

import numpy as np
from jaxtyping import Int

from nsa_jax import FullAttention
from nsa_jax.context import received_bytes
from train.config import ModelConfig
from train.model.attention.kind import AttentionKind, split_heads


class Full(AttentionKind):
    """`nsa_jax.FullAttention`."""

    def layer(self, config: ModelConfig, **common: Any) -> FullAttention:
        """The dense layer."""
        return FullAttention(**common)

    def keys_read(self, config: ModelConfig, length: int) -> Int[np.ndarray, " length"]:
        """Every token up to the query's own."""
        return np.arange(length) + 1

    def received_over_context(
        self, config: ModelConfig, *, length: int, devices: int, tensor: int, itemsize: int
    ) -> float:
        """The exchange of heads for tokens, and back."""
        heads = split_heads(config, tensor)
        return received_bytes("full", config.nsa, T=length, devices=devices, **heads, itemsize=itemsize)


KIND = Full()
