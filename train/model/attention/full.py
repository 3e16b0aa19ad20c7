"""Causal attention to all earlier tokens."""

from typing import Any

import numpy as np
from jaxtyping import Int

from nsa_jax import FullAttention
from train.config import ModelConfig
from train.model.attention.kind import AttentionKind, Split, received_as


class Full(AttentionKind):
    """`nsa_jax.FullAttention`."""

    def layer(self, config: ModelConfig, **common: Any) -> FullAttention:
        """The dense layer."""
        return FullAttention(**common)

    def keys_read(self, config: ModelConfig, length: int) -> Int[np.ndarray, " length"]:
        """Every token up to the query's own."""
        return np.arange(length) + 1

    def received_over_context(self, config: ModelConfig, split: Split) -> float:
        """The exchange of heads for tokens, and back."""
        return received_as("full", config, split)


KIND = Full()
