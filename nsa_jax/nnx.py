"""Flax NNX versions of the Linen modules, with the same parameter names, shapes and numbers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import PrecisionLike
from jaxtyping import Array, DTypeLike, Float, Int

from nsa_jax import arguments
from nsa_jax.adapters import attend, check_core, of_all_heads
from nsa_jax.attention import AttentionInputs
from nsa_jax.cache import DenseCache, NSACache
from nsa_jax.core import Branches, CoreConfig, Parameter, core_attention, core_attention_inputs, core_parameters
from nsa_jax.decoding import (
    NumTokens,
    core_cache,
    core_decode_step,
    core_prefill,
    full_layer_cache,
    full_layer_decode_step,
    full_layer_prefill,
    nsa_layer_decode_step,
    nsa_layer_prefill,
)
from nsa_jax.foreign import refuse_foreign
from nsa_jax.layer import LayerConfig, NSALayerConfig, full_layer, layer_parameters, nsa_layer, nsa_layer_inputs
from nsa_jax.naming import renamed


class NSACore(nnx.Module):
    """Native Sparse Attention below the projections; see `nsa_jax.NSACore` for what it computes.

    Example:
      >>> heads = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 16}
      >>> core = NSACore(64, rngs=nnx.Rngs(0), **heads)
      >>> x, q, k, v = jnp.ones((1, 100, 64)), jnp.ones((1, 100, 8, 16)), *(jnp.ones((2, 1, 100, 2, 16)))
      >>> nnx.jit(core)(x, q, k, v).shape
      (1, 100, 8, 16)

    Args:
      embed_dim: E, the width of x, of which the gates are made; unused with `constant_gates`.
      param_dtype: dtype of the parameters.
      logical_axes: other names for those of `nsa_jax.naming.LOGICAL_AXES`.
      rngs: the `params` stream initialises the parameters.
      fields: num_heads, num_kv_heads, head_dim, config and so on, see `nsa_jax.NSACore`.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        logical_axes: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        self.core_config = _config(CoreConfig, fields)
        self.embed_dim = arguments.size("embed_dim", embed_dim)
        _declare(self, self._parameters(), rngs, param_dtype, logical_axes)

    def __call__(
        self,
        x: Float[Array, "B T E"] | None,
        q: Float[Array, "B T H Dk"],
        k: Float[Array, "B T K Dk"] | Branches,
        v: Float[Array, "B T K Dv"] | Branches,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T H Dv"]:
        """Attention output [B, T, H, Dv]; see `nsa_jax.core.core_attention`."""
        options: dict[str, Any] = {"positions": positions, "segment_ids": segment_ids}
        return core_attention(self._values(), x, q, k, v, config=self.core_config, **options)

    def attention_inputs(
        self,
        x: Float[Array, "B T E"] | None,
        q: Float[Array, "B T H Dk"],
        k: Float[Array, "B T K Dk"] | Branches,
        v: Float[Array, "B T K Dv"] | Branches,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> AttentionInputs:
        """The queries, keys, values and gates that the core gives to `nsa_jax.nsa_attention`."""
        options: dict[str, Any] = {"positions": positions, "segment_ids": segment_ids}
        return core_attention_inputs(self._values(), x, q, k, v, config=self.core_config, **options)

    def init_cache(self, **sizes: Any) -> NSACache:
        """An empty cache. For `batch_size`, `max_length` and more, see `nsa_jax.decoding.core_cache`."""
        return core_cache(self.core_config, **sizes)

    def prefill(
        self,
        x: Float[Array, "B T E"] | None,
        q: Float[Array, "B T H Dk"],
        k: Float[Array, "B T K Dk"] | Branches,
        v: Float[Array, "B T K Dv"] | Branches,
        cache: NSACache,
        *,
        positions: Int[Array, "B T"] | None = None,
        num_tokens: NumTokens = None,
        continuing: bool = False,
    ) -> tuple[Float[Array, "B T H Dv"], NSACache]:
        """Output and new cache after a prompt or its next chunk; see `nsa_jax.decoding.core_prefill`."""
        options: dict[str, Any] = {"positions": positions, "num_tokens": num_tokens, "continuing": continuing}
        return core_prefill(self._values(), x, q, k, v, cache, config=self.core_config, **options)

    def decode_step(
        self,
        x: Float[Array, "B m E"] | None,
        q: Float[Array, "B m H Dk"],
        k: Float[Array, "B m K Dk"] | Branches,
        v: Float[Array, "B m K Dv"] | Branches,
        cache: NSACache,
        *,
        positions: Int[Array, "B m"] | None = None,
        num_tokens: NumTokens = None,
    ) -> tuple[Float[Array, "B m H Dv"], NSACache]:
        """Output and new cache after one token or a few; see `nsa_jax.decoding.core_decode_step`."""
        options: dict[str, Any] = {"positions": positions, "num_tokens": num_tokens}
        return core_decode_step(self._values(), x, q, k, v, cache, config=self.core_config, **options)

    def _parameters(self) -> dict[str, Parameter]:
        return core_parameters(self.core_config, self.embed_dim)

    def _values(self) -> dict[str, Array]:
        return _values(self, self._parameters())


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
      logical_axes: other names for those of `nsa_jax.naming.LOGICAL_AXES`.
      rngs: the `params` stream initialises the parameters.
      fields: num_heads, num_kv_heads, head_dim, config and so on, see `nsa_jax.NSAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        logical_axes: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        self.layer_config = _config(NSALayerConfig, fields)
        self.embed_dim = arguments.size("embed_dim", embed_dim)
        _declare(self, self._parameters(), rngs, param_dtype, logical_axes)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T E"]:
        """Attention output [B, T, E]. `positions` are those of the rotary embedding; see `docs/layers.md`."""
        options: dict[str, Any] = {"positions": positions, "segment_ids": segment_ids}
        return nsa_layer(self._values(), x, config=self.layer_config, **options)

    def attention_inputs(
        self,
        x: Float[Array, "B T E"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> AttentionInputs:
        """The queries, keys, values and gates that the layer gives to `nsa_jax.nsa_attention`."""
        options: dict[str, Any] = {"positions": positions, "segment_ids": segment_ids}
        return nsa_layer_inputs(self._values(), x, config=self.layer_config, **options)

    def init_cache(self, **sizes: Any) -> NSACache:
        """An empty cache. For `batch_size`, `max_length` and more, see `nsa_jax.decoding.core_cache`."""
        return core_cache(self.layer_config, **sizes)

    def prefill(
        self,
        x: Float[Array, "B T E"],
        cache: NSACache,
        *,
        positions: Int[Array, "B T"] | None = None,
        num_tokens: NumTokens = None,
        continuing: bool = False,
    ) -> tuple[Float[Array, "B T E"], NSACache]:
        """Output and new cache after a prompt or its next chunk; see `nsa_jax.decoding.core_prefill`."""
        options: dict[str, Any] = {"positions": positions, "num_tokens": num_tokens, "continuing": continuing}
        return nsa_layer_prefill(self._values(), x, cache, config=self.layer_config, **options)

    def decode_step(
        self,
        x: Float[Array, "B m E"],
        cache: NSACache,
        *,
        positions: Int[Array, "B m"] | None = None,
        num_tokens: NumTokens = None,
    ) -> tuple[Float[Array, "B m E"], NSACache]:
        """Output and new cache after one token or a few; see `nsa_jax.decoding.core_decode_step`."""
        options: dict[str, Any] = {"positions": positions, "num_tokens": num_tokens}
        return nsa_layer_decode_step(self._values(), x, cache, config=self.layer_config, **options)

    def _parameters(self) -> dict[str, Parameter]:
        return layer_parameters(self.layer_config, self.embed_dim)

    def _values(self) -> dict[str, Array]:
        return _values(self, self._parameters())


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
        logical_axes: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        self.layer_config = _config(LayerConfig, fields)
        self.window = arguments.optional_size("window", window)
        self.embed_dim = arguments.size("embed_dim", embed_dim)
        _declare(self, self._parameters(), rngs, param_dtype, logical_axes)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T E"]:
        """As `NSAttention.__call__`."""
        options: dict[str, Any] = {"window": self.window, "positions": positions, "segment_ids": segment_ids}
        return full_layer(self._values(), x, config=self.layer_config, **options)

    def init_cache(self, **sizes: Any) -> DenseCache:
        """An empty cache of `batch_size` rows of `max_length` tokens, optionally with a `dtype`."""
        return full_layer_cache(self.layer_config, **sizes)

    def prefill(
        self,
        x: Float[Array, "B T E"],
        cache: DenseCache,
        *,
        positions: Int[Array, "B T"] | None = None,
        num_tokens: NumTokens = None,
        continuing: bool = False,
    ) -> tuple[Float[Array, "B T E"], DenseCache]:
        """As `NSAttention.prefill`."""
        options: dict[str, Any] = {"positions": positions, "num_tokens": num_tokens, "continuing": continuing}
        options |= {"config": self.layer_config, "window": self.window}
        return full_layer_prefill(self._values(), x, cache, **options)

    def decode_step(
        self,
        x: Float[Array, "B m E"],
        cache: DenseCache,
        *,
        positions: Int[Array, "B m"] | None = None,
        num_tokens: NumTokens = None,
    ) -> tuple[Float[Array, "B m E"], DenseCache]:
        """As `NSAttention.decode_step`."""
        options: dict[str, Any] = {"positions": positions, "num_tokens": num_tokens, "window": self.window}
        return full_layer_decode_step(self._values(), x, cache, config=self.layer_config, **options)

    def _parameters(self) -> dict[str, Parameter]:
        return layer_parameters(self.layer_config, self.embed_dim)

    def _values(self) -> dict[str, Array]:
        return _values(self, self._parameters())


class NSAttentionFn(nnx.Module):
    """An `attention_fn` for `flax.nnx.MultiHeadAttention`; see `nsa_jax.NSAttentionFn` for what it does.

    Example:
      >>> rngs = nnx.Rngs(0)
      >>> core = NSACore(8 * 16, rngs=rngs, num_heads=8, num_kv_heads=2, head_dim=16)
      >>> heads = {"num_heads": 8, "num_kv_heads": 2, "qkv_features": 128}
      >>> layer = nnx.MultiHeadAttention(**heads, in_features=64, attention_fn=NSAttentionFn(core), rngs=rngs)
      >>> nnx.jit(lambda layer, x: layer(x, decode=False))(layer, jnp.ones((1, 100, 64))).shape
      (1, 100, 64)

    Args:
      core: whose `embed_dim` is num_heads * head_dim, because its gates are made of the queries.

    Raises:
      ValueError: another core; and when it is called, as `nsa_jax.NSAttentionFn`.
    """

    def __init__(self, core: NSACore) -> None:
        check_core(core, NSACore, "nsa_jax.nnx.NSACore")
        config = core.core_config
        width = config.num_heads * config.head_dim
        if config.constant_gates is None and core.embed_dim != width:
            raise ValueError(f"core.embed_dim = {core.embed_dim}: expected num_heads * head_dim = {width}")
        self.core = core

    def __call__(
        self,
        query: Float[Array, "B T H Dk"],
        key: Float[Array, "B T K Dk"],
        value: Float[Array, "B T K Dv"],
        bias: Array | None = None,
        mask: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        dtype: DTypeLike | None = None,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        is_causal: bool = True,
        module: Any = None,
        dropout_rng: Array | None = None,
        broadcast_dropout: bool = True,
        precision: PrecisionLike = None,
    ) -> Float[Array, "B T H Dv"]:
        """Attention output, as `flax.nnx.dot_product_attention` gives it; causal whether `is_causal` or not."""
        return attend(
            self.core,
            query,
            key,
            value,
            mask=mask,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            dtype=dtype,
            others={"bias": bias, "module": module},
            positions=positions,
            segment_ids=segment_ids,
        )

    def init_cache(self, **sizes: Any) -> NSACache:
        """As `NSACore.init_cache`."""
        return self.core.init_cache(**sizes)

    def prefill(
        self,
        query: Float[Array, "B T H Dk"],
        key: Float[Array, "B T K Dk"],
        value: Float[Array, "B T K Dv"],
        cache: NSACache,
        **options: Any,
    ) -> tuple[Float[Array, "B T H Dv"], NSACache]:
        """As `NSACore.prefill`, from what the layer projects."""
        return self.core.prefill(of_all_heads(query), query, key, value, cache, **options)

    def decode_step(
        self,
        query: Float[Array, "B m H Dk"],
        key: Float[Array, "B m K Dk"],
        value: Float[Array, "B m K Dv"],
        cache: NSACache,
        **options: Any,
    ) -> tuple[Float[Array, "B m H Dv"], NSACache]:
        """As `NSACore.decode_step`, from what the layer projects."""
        return self.core.decode_step(of_all_heads(query), query, key, value, cache, **options)


def _config(kind: type, fields: Mapping[str, Any]) -> Any:
    """A config of a kind; ValueError for fields that other libraries have."""
    refuse_foreign([field.name for field in dataclasses.fields(kind)], fields)
    return kind(**fields)


def _declare(
    module: Any,
    declared: Mapping[str, Parameter],
    rngs: nnx.Rngs,
    dtype: DTypeLike,
    logical_axes: Mapping[str, Any] | None,
) -> None:
    # Our own names are metadata for the user's axis rules. To make split arrays, Flax needs names that these rules or
    # the mesh have, and a mesh in context.
    eager = logical_axes is not None and bool(jax.sharding.get_abstract_mesh().axis_names)
    for name, p in declared.items():
        value = p.init(rngs.params(), p.shape, dtype)
        setattr(module, name, nnx.Param(value, out_sharding=renamed(p.axes, logical_axes), eager_sharding=eager))


def _values(module: Any, declared: Mapping[str, Parameter]) -> dict[str, Array]:
    """The parameters that were declared. Other libraries may have added some of their own."""
    return {name: getattr(module, name)[...] for name in declared}
