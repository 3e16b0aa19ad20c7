"""Flax Linen modules. Every parameter carries logical axis names."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from nsa_jax.attention import Implementation
from nsa_jax.cache import DenseCache, NSACache
from nsa_jax.compression import Compression
from nsa_jax.config import NSAConfig
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
    Parameter,
    checked_input,
    full_layer,
    layer_parameters,
    nsa_layer,
    nsa_layer_inputs,
)
from nsa_jax.rope import RopeScaling
from nsa_jax.sharding import MeshAxes


class NSAttention(nn.Module):
    """Native Sparse Attention layer (arXiv 2502.11089): projections, phi, gates, rotary embedding, attention.

    Call it with x [B, T, E] and, for packed sequences, segment_ids [B, T], integers. A run of equal ones is a
    segment. It returns [B, T, E] in the compute dtype. `nsa_jax.nnx.NSAttention` is the same layer for NNX, with the
    same parameters and the same numbers. If the collection "intermediates" is mutable, the layer sows its
    `AttentionInputs` there, which `nsa_jax.visualize` draws.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> layer = NSAttention(num_heads=8, num_kv_heads=2, head_dim=16)
      >>> x = jnp.ones((1, 100, 64))
      >>> variables = jax.jit(layer.init)(jax.random.key(0), x)
      >>> jax.jit(layer.apply)(variables, x).shape
      (1, 100, 64)

    To generate, use `init_cache`, `prefill` and `decode_step`:
      >>> cache = layer.init_cache(batch_size=1, max_length=128)
      >>> prefill, decode_step = (
      ...     jax.jit(functools.partial(layer.apply, method=name)) for name in ("prefill", "decode_step")
      ... )
      >>> y, cache = prefill(variables, x, cache)
      >>> y, cache = decode_step(variables, x[:, :1], cache)
      >>> y.shape, cache.lengths.tolist()
      ((1, 1, 64), [101])

    Raises:
      ValueError: a field or an input does not fit, named with what was expected.
    """

    num_heads: int  # H, query heads
    num_kv_heads: int  # K, key/value heads; divides num_heads
    head_dim: int  # Dk
    v_head_dim: int | None = None  # Dv; None: head_dim
    config: NSAConfig = NSAConfig()  # sizes of the branches
    compression: Compression = "mean"  # phi: "mean", "linear" or, as in the paper, "mlp"
    compression_hidden_dim: int | None = None  # hidden width of an mlp phi; None: twice the head size
    gate_hidden_dim: int | None = None  # hidden width of the gate MLP; None: a quarter of the embedding
    share_kv: bool = True  # one key/value projection for all three branches; in the paper each has its own
    tie_keys: bool = False  # compressed keys are means of the selected branch's keys; phi is for values alone
    rope_theta: float | None = 10_000.0  # base of the rotary embedding; None: no positions
    rope_scaling: RopeScaling = RopeScaling()  # for contexts longer than those trained on
    qk_norm: bool = False  # RMSNorm of every query and key head before the rotary embedding
    qkv_bias: bool = False  # biases of the query, key and value projections
    output_init_scale: float = 1.0  # factor on the initial output projection
    implementation: Implementation | None = None  # of the attention; None: the fastest
    batch_axes: MeshAxes = ()  # mesh axes that split B; see `nsa_jax.sharding.sharded`
    head_axes: MeshAxes = ()  # mesh axes that split the K/V heads
    context_axes: MeshAxes = ()  # mesh axes that split T, which is then in the order of `nsa_jax.context.zigzag_order`
    dtype: DTypeLike | None = None  # of the computation; None: the input's dtype
    param_dtype: DTypeLike = jnp.float32  # of the parameters

    def __call__(
        self, x: Float[Array, "B T E"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T E"]:
        """Attention output [B, T, E]."""
        config = _layer_config(self, NSALayerConfig)
        parameters = self.declared_parameters(x)
        if self.is_mutable_collection("intermediates"):
            inputs = nsa_layer_inputs(parameters, x, config=config, segment_ids=segment_ids)
            self.sow("intermediates", "attention_inputs", inputs)
        return nsa_layer(parameters, x, config=config, segment_ids=segment_ids)

    @nn.compact
    def declared_parameters(self, x: Float[Array, "B T E"]) -> dict[str, Array]:
        """The layer's parameters by name, whichever method is called first."""
        return _declare(self, x)

    def init_cache(self, **sizes: Any) -> NSACache:
        """An empty cache. For `batch_size`, `max_length` and more, see `nsa_jax.decoding.nsa_layer_cache`."""
        return nsa_layer_cache(_layer_config(self, NSALayerConfig), **sizes)

    def prefill(
        self, x: Float[Array, "B T E"], cache: NSACache, *, num_tokens: NumTokens = None, continuing: bool = False
    ) -> tuple[Float[Array, "B T E"], NSACache]:
        """Output and new cache after a prompt or its next chunk; see `nsa_jax.decoding.nsa_layer_prefill`."""
        options = {"config": _layer_config(self, NSALayerConfig), "num_tokens": num_tokens, "continuing": continuing}
        return nsa_layer_prefill(self.declared_parameters(x), x, cache, **options)

    def decode_step(
        self, x: Float[Array, "B m E"], cache: NSACache, *, num_tokens: NumTokens = None
    ) -> tuple[Float[Array, "B m E"], NSACache]:
        """Output and new cache after one token or a few; see `nsa_jax.decoding.nsa_layer_decode_step`."""
        config = _layer_config(self, NSALayerConfig)
        return nsa_layer_decode_step(self.declared_parameters(x), x, cache, config=config, num_tokens=num_tokens)


class FullAttention(nn.Module):
    """The dense baseline: causal grouped-query attention with the interface of `NSAttention`.

    It runs on cuDNN if it can, and otherwise in plain XLA. On a GPU, our own kernels compute what cuDNN does not take.
    With `window` it is sliding-window attention, which always runs our own implementation.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = FullAttention(num_heads=8, num_kv_heads=2, head_dim=16)
      >>> x = jnp.ones((1, 100, 64))
      >>> jax.jit(layer.init_with_output)(jax.random.key(0), x)[0].shape
      (1, 100, 64)
    """

    num_heads: int  # H, query heads
    num_kv_heads: int  # K, key/value heads; divides num_heads
    head_dim: int  # Dk
    v_head_dim: int | None = None  # Dv; None: head_dim
    window: int | None = None  # positions a query sees, its own included; None: all before it
    rope_theta: float | None = 10_000.0  # base of the rotary embedding; None: no positions
    rope_scaling: RopeScaling = RopeScaling()  # for contexts longer than those trained on
    qk_norm: bool = False  # RMSNorm of every query and key head before the rotary embedding
    qkv_bias: bool = False  # biases of the query, key and value projections
    output_init_scale: float = 1.0  # factor on the initial output projection
    batch_axes: MeshAxes = ()  # mesh axes that split B; see `nsa_jax.sharding.sharded`
    head_axes: MeshAxes = ()  # mesh axes that split the K/V heads
    context_axes: MeshAxes = ()  # mesh axes that split T, which is then in the order of `nsa_jax.context.zigzag_order`
    dtype: DTypeLike | None = None  # of the computation; None: the input's dtype
    param_dtype: DTypeLike = jnp.float32  # of the parameters

    def __call__(
        self, x: Float[Array, "B T E"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T E"]:
        """Attention output [B, T, E]."""
        config = _layer_config(self, HeadConfig)
        return full_layer(self.declared_parameters(x), x, config=config, window=self.window, segment_ids=segment_ids)

    @nn.compact
    def declared_parameters(self, x: Float[Array, "B T E"]) -> dict[str, Array]:
        """The layer's parameters by name, whichever method is called first."""
        return _declare(self, x)

    def init_cache(self, **sizes: Any) -> DenseCache:
        """An empty cache of `batch_size` rows of `max_length` tokens, optionally with a `dtype`."""
        return full_layer_cache(_layer_config(self, HeadConfig), **sizes)

    def prefill(
        self, x: Float[Array, "B T E"], cache: DenseCache, *, num_tokens: NumTokens = None, continuing: bool = False
    ) -> tuple[Float[Array, "B T E"], DenseCache]:
        """As `NSAttention.prefill`."""
        config = _layer_config(self, HeadConfig)
        options = {"config": config, "window": self.window, "num_tokens": num_tokens, "continuing": continuing}
        return full_layer_prefill(self.declared_parameters(x), x, cache, **options)

    def decode_step(
        self, x: Float[Array, "B m E"], cache: DenseCache, *, num_tokens: NumTokens = None
    ) -> tuple[Float[Array, "B m E"], DenseCache]:
        """As `NSAttention.decode_step`."""
        config = _layer_config(self, HeadConfig)
        return full_layer_decode_step(
            self.declared_parameters(x), x, cache, config=config, window=self.window, num_tokens=num_tokens
        )


def _layer_config(module: nn.Module, kind: type) -> Any:
    return kind(**{field.name: getattr(module, field.name) for field in dataclasses.fields(kind)})


class LogicalNames(nn.LogicallyPartitioned):
    """Logical axis names of a parameter, which stay names when `nnx.bridge` takes the module.

    A plain `nn.LogicallyPartitioned` becomes an NNX variable that is split when it is made, which needs a mesh.
    """

    def to_nnx_metadata(self) -> dict[str, Any]:
        """What `nnx.bridge.ToNNX` makes a variable of."""
        names = {"out_sharding": self.names, "sharding_rules": self.rules}
        return {"value": self.value, "mesh": self.mesh, **names, "eager_sharding": False}


def _named(parameter: Parameter, *arguments: Any) -> LogicalNames:
    return LogicalNames(parameter.init(*arguments), parameter.axes)


def _declare(module: nn.Module, x: Any) -> dict[str, Any]:
    config = _layer_config(module, NSALayerConfig if isinstance(module, NSAttention) else HeadConfig)
    return {
        name: module.param(name, functools.partial(_named, p), p.shape, module.param_dtype)
        for name, p in layer_parameters(config, checked_input(x).shape[2]).items()
    }
