"""Flax NNX twins of the Linen modules: same parameter names, shapes and numbers."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from nsa_jax.layer import (
    HeadConfig,
    NSALayerConfig,
    Parameter,
    full_layer,
    nsa_layer,
    nsa_parameters,
    projection_parameters,
)


class NSAttention(nnx.Module):
    """Native Sparse Attention layer; see `nsa_jax.NSAttention` for what it computes.

    Args:
      embed_dim: E, the width of its input.
      param_dtype: dtype of the parameters.
      rngs: its `params` stream initialises them.
      fields: as of `nsa_jax.NSAttention` (num_heads, num_kv_heads, head_dim, config, ...).
    """

    def __init__(self, embed_dim: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32, **fields):
        self.layer_config = NSALayerConfig(**fields)
        _declare(self, nsa_parameters(self.layer_config, embed_dim), rngs, param_dtype)

    def __call__(
        self, x: Float[Array, "B T E"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T E"]:
        """Attention output [B, T, E]."""
        return nsa_layer(_values(self), x, config=self.layer_config, segment_ids=segment_ids)


class FullAttention(nnx.Module):
    """Causal grouped-query attention; see `nsa_jax.FullAttention`. Arguments as of `NSAttention` above."""

    def __init__(
        self,
        embed_dim: int,
        *,
        rngs: nnx.Rngs,
        window: int | None = None,
        param_dtype: DTypeLike = jnp.float32,
        **fields,
    ):
        self.layer_config = HeadConfig(**fields)
        self.window = window
        _declare(self, projection_parameters(self.layer_config, embed_dim, ("",)), rngs, param_dtype)

    def __call__(
        self, x: Float[Array, "B T E"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T E"]:
        """Attention output [B, T, E]."""
        return full_layer(_values(self), x, config=self.layer_config, window=self.window, segment_ids=segment_ids)


def _declare(module: nnx.Module, parameters: dict[str, Parameter], rngs: nnx.Rngs, dtype: DTypeLike) -> None:
    # The logical names are metadata for the user's own axis rules. Sharding at creation would need a mesh and rules.
    for name, p in parameters.items():
        value = p.init(rngs.params(), p.shape, dtype)
        setattr(module, name, nnx.Param(value, out_sharding=p.axes, eager_sharding=False))


def _values(module: nnx.Module) -> dict[str, Array]:
    return {name: value[...] for name, value in vars(module).items() if isinstance(value, nnx.Param)}
