"""Flax NNX versions of the Linen modules, with the same parameter names, shapes and numbers."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from nsa_jax import arguments
from nsa_jax.attention import AttentionInputs
from nsa_jax.cache import DenseCache, NSACache
from nsa_jax.decoding import (
    NumTokens,
    full_layer_cache,
    full_layer_decode_step,
    full_layer_prefill,
    nsa_layer_cache,
    nsa_layer_decode_step,
    nsa_layer_prefill,
)
from nsa_jax.layer import (
    HeadConfig,
    NSALayerConfig,
    full_layer,
    layer_parameters,
    nsa_layer,
    nsa_layer_inputs,
)


class NSAttention(nnx.Module):
    """Native Sparse Attention layer; see `nsa_jax.NSAttention` for what it computes.

    Example:
      >>> layer = NSAttention(64, rngs=nnx.Rngs(0), num_heads=8, num_kv_heads=2, head_dim=16)
      >>> x = jnp.ones((1, 100, 64))
      >>> nnx.jit(layer)(x).shape
      (1, 100, 64)

    Args:
      embed_dim: E, the width of the input.
      param_dtype: dtype of the parameters.
      rngs: the `params` stream initialises the parameters.
      fields: num_heads, num_kv_heads, head_dim, config and so on, see `nsa_jax.NSAttention`.
    """

    def __init__(self, embed_dim: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32, **fields: Any) -> None:
        self.layer_config = NSALayerConfig(**fields)
        self.embed_dim = arguments.size("embed_dim", embed_dim)
        _declare(self, rngs, param_dtype)

    def __call__(
        self, x: Float[Array, "B T E"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T E"]:
        """Attention output [B, T, E]."""
        return nsa_layer(_values(self), x, config=self.layer_config, segment_ids=segment_ids)

    def attention_inputs(
        self, x: Float[Array, "B T E"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> AttentionInputs:
        """The queries, keys, values and gates that the layer gives to `nsa_jax.nsa_attention`."""
        return nsa_layer_inputs(_values(self), x, config=self.layer_config, segment_ids=segment_ids)

    def init_cache(self, **sizes: Any) -> NSACache:
        """An empty cache. For `batch_size`, `max_length` and more, see `nsa_jax.decoding.nsa_layer_cache`."""
        return nsa_layer_cache(self.layer_config, **sizes)

    def prefill(
        self, x: Float[Array, "B T E"], cache: NSACache, *, num_tokens: NumTokens = None, continuing: bool = False
    ) -> tuple[Float[Array, "B T E"], NSACache]:
        """Output and new cache after a prompt or its next chunk; see `nsa_jax.decoding.nsa_layer_prefill`."""
        options: dict[str, Any] = {"num_tokens": num_tokens, "continuing": continuing}
        return nsa_layer_prefill(_values(self), x, cache, config=self.layer_config, **options)

    def decode_step(
        self, x: Float[Array, "B m E"], cache: NSACache, *, num_tokens: NumTokens = None
    ) -> tuple[Float[Array, "B m E"], NSACache]:
        """Output and new cache after one token or a few; see `nsa_jax.decoding.nsa_layer_decode_step`."""
        return nsa_layer_decode_step(_values(self), x, cache, config=self.layer_config, num_tokens=num_tokens)


class FullAttention(nnx.Module):
    """Causal grouped-query attention; see `nsa_jax.FullAttention`. For the arguments, see `NSAttention` above.

    Example:
      >>> FullAttention(64, rngs=nnx.Rngs(0), num_heads=8, num_kv_heads=2, head_dim=16)(jnp.ones((1, 100, 64))).shape
      (1, 100, 64)
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        rngs: nnx.Rngs,
        window: int | None = None,
        param_dtype: DTypeLike = jnp.float32,
        **fields: Any,
    ) -> None:
        self.layer_config = HeadConfig(**fields)
        self.window = arguments.optional_size("window", window)
        self.embed_dim = arguments.size("embed_dim", embed_dim)
        _declare(self, rngs, param_dtype)

    def __call__(
        self, x: Float[Array, "B T E"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T E"]:
        """Attention output [B, T, E]."""
        return full_layer(_values(self), x, config=self.layer_config, window=self.window, segment_ids=segment_ids)

    def init_cache(self, **sizes: Any) -> DenseCache:
        """An empty cache of `batch_size` rows of `max_length` tokens, optionally with a `dtype`."""
        return full_layer_cache(self.layer_config, **sizes)

    def prefill(
        self, x: Float[Array, "B T E"], cache: DenseCache, *, num_tokens: NumTokens = None, continuing: bool = False
    ) -> tuple[Float[Array, "B T E"], DenseCache]:
        """As `NSAttention.prefill`."""
        options: dict[str, Any] = {"window": self.window, "num_tokens": num_tokens, "continuing": continuing}
        return full_layer_prefill(_values(self), x, cache, config=self.layer_config, **options)

    def decode_step(
        self, x: Float[Array, "B m E"], cache: DenseCache, *, num_tokens: NumTokens = None
    ) -> tuple[Float[Array, "B m E"], DenseCache]:
        """As `NSAttention.decode_step`."""
        return full_layer_decode_step(
            _values(self), x, cache, config=self.layer_config, window=self.window, num_tokens=num_tokens
        )


def _declare(module: Any, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
    # The logical names are metadata for the user's own axis rules. Creating sharded arrays would need a mesh and rules.
    for name, p in layer_parameters(module.layer_config, module.embed_dim).items():
        value = p.init(rngs.params(), p.shape, dtype)
        setattr(module, name, nnx.Param(value, out_sharding=p.axes, eager_sharding=False))


def _values(module: Any) -> dict[str, Array]:
    """The parameters that were declared. Other libraries may have added some of their own."""
    names = layer_parameters(module.layer_config, module.embed_dim)
    return {name: getattr(module, name)[...] for name in names}
