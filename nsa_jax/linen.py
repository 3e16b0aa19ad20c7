"""Flax Linen modules. Every parameter carries logical axis names."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import PrecisionLike
from jaxtyping import Array, DTypeLike, Float, Int

from nsa_jax.adapters import attend, check_core, of_all_heads
from nsa_jax.attention import Implementation
from nsa_jax.cache import DenseCache, NSACache
from nsa_jax.compression import Compression
from nsa_jax.config import NSAConfig
from nsa_jax.core import (
    Branches,
    CoreConfig,
    HeadConfig,
    Parameter,
    Rotate,
    checked_input,
    core_attention,
    core_attention_inputs,
    core_parameters,
)
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
from nsa_jax.layer import (
    JOINED,
    LayerConfig,
    NSALayerConfig,
    declared_in,
    full_layer,
    join_projections,
    nsa_layer,
    nsa_layer_inputs,
)
from nsa_jax.naming import renamed
from nsa_jax.rope import RopeScaling
from nsa_jax.sharding import MeshAxes
from pallas_kernels.one_row_product.contract import Norm


class HeadFields(nn.Module):
    """Fields of every module here: heads, scores, dtypes, mesh axes and names of axes."""

    num_heads: int  # H, query heads
    num_kv_heads: int  # K, key/value heads; divides num_heads
    head_dim: int  # Dk
    v_head_dim: int | None = None  # Dv; None: head_dim
    rotate: Rotate | None = None  # rotate(x [B, T, heads, Dk], positions [B, T]), one's own rotary embedding
    scale: float | None = None  # factor of the scores; None: head_dim ** -0.5
    precision: PrecisionLike = None  # of matrix products with parameters; the attention has that of its implementation
    batch_axes: MeshAxes = ()  # mesh axes that split B; see `nsa_jax.sharding.sharded`
    head_axes: MeshAxes = ()  # mesh axes that split the K/V heads
    context_axes: MeshAxes = ()  # mesh axes that split T, which is then in the order of `nsa_jax.context.zigzag_order`
    logical_axes: Mapping[str, Any] | None = None  # other names for those of `nsa_jax.naming.LOGICAL_AXES`
    dtype: DTypeLike | None = None  # of the computation; None: the input's dtype
    param_dtype: DTypeLike = jnp.float32  # of the parameters

    config_kind: ClassVar[type[HeadConfig]]

    def __new__(cls, *args: Any, **fields: Any) -> Any:
        """Refuses fields that other libraries have, and says what there is instead."""
        refuse_foreign(cls.__dataclass_fields__, fields)
        return super().__new__(cls)

    def _config(self) -> Any:
        kind = self.config_kind
        return kind(**{field.name: getattr(self, field.name) for field in dataclasses.fields(kind)})

    def _declare(self, declared: Mapping[str, Parameter]) -> dict[str, Array]:
        return {
            name: self.param(name, functools.partial(_named, p, self.logical_axes), p.shape, self.param_dtype)
            for name, p in declared.items()
        }


class CoreFields(HeadFields):
    """Fields of Native Sparse Attention below the projections."""

    config: NSAConfig = NSAConfig()  # sizes of the branches
    compression: Compression = "mean"  # phi: "mean", "linear" or, as in the paper, "mlp"
    compression_hidden_dim: int | None = None  # hidden width of an mlp phi; None: twice the head size
    gate_hidden_dim: int | None = None  # hidden width of the gate MLP; None: a quarter of the embedding
    constant_gates: tuple[float, float, float] | None = None  # of the three branches; None: an MLP of x
    tie_keys: bool = False  # compressed keys are means of the selected branch's keys; phi is for values alone
    implementation: Implementation | None = None  # of the attention; None: the fastest


class LayerFields(HeadFields):
    """Fields of projections, their norms and the rotary embedding."""

    rope_theta: float | None = 10_000.0  # base of the rotary embedding; None: no positions. Unused with `rotate`
    rope_scaling: RopeScaling = RopeScaling()  # for contexts longer than those trained on
    qk_norm: bool = False  # RMSNorm of every query and key head before the rotary embedding
    use_bias: bool = False  # in all projections
    qkv_bias: bool = False  # in those of queries, keys and values, as Qwen 2 has them
    kernel_init: Callable | None = None  # of projections, as [inputs, outputs]; None: lecun_normal
    output_init_scale: float = 1.0  # factor on the initial output projection

    @nn.compact
    def declared_parameters(self, x: Float[Array, "B T E"]) -> dict[str, Array]:
        """The layer's parameters by name, whichever method is called first."""
        given = (JOINED,) if self.has_variable("params", JOINED) else ()
        return self._declare(declared_in(given, self._config(), checked_input(x).shape[2]))

    def join_projections(self, parameters: Mapping[str, Any]) -> dict[str, Array]:
        """Parameters with which `prefill` and `decode_step` are faster; see `nsa_jax.layer.join_projections`."""
        return join_projections(nn.unbox(parameters), self._config())


class NSACore(CoreFields):
    """Native Sparse Attention (arXiv 2502.11089) below the projections: phi, gates, rotary embedding, attention.

    It is for models with projections, norms and positions of their own. Call it with the layer's input x [B, T, E], of
    which the gates are made, and with projected queries [B, T, H, Dk], keys [B, T, K, Dk] and values [B, T, K, Dv]. It
    returns [B, T, H, Dv]. `nsa_jax.nnx.NSACore` is the same for NNX.

    Give your rotary embedding as `rotate`, and pass queries and keys that are not rotated. Without `rotate`, they are
    attended to as they are: rotated by you, or without positions. Both are the same with compression "mean", which
    averages rotated keys. A phi with weights ("linear", "mlp") compresses keys that are not rotated and needs `rotate`
    for what it makes of them.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> from nsa_jax.rope import apply_rope
      >>> heads = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 16}
      >>> core = NSACore(**heads, rotate=functools.partial(apply_rope, theta=10_000.0))
      >>> x, q, k, v = jnp.ones((1, 100, 64)), jnp.ones((1, 100, 8, 16)), *(jnp.ones((2, 1, 100, 2, 16)))
      >>> variables = jax.jit(core.init)(jax.random.key(0), x, q, k, v)
      >>> jax.jit(core.apply)(variables, x, q, k, v).shape
      (1, 100, 8, 16)

    To generate, project the new tokens and use `init_cache`, `prefill` and `decode_step`:
      >>> cache = core.init_cache(batch_size=1, max_length=128)
      >>> o, cache = core.apply(variables, x, q, k, v, cache, method="prefill")
      >>> o, cache = core.apply(variables, x[:, :1], q[:, :1], k[:, :1], v[:, :1], cache, method="decode_step")
      >>> o.shape, cache.lengths.tolist()
      ((1, 1, 8, 16), [101])

    Raises:
      ValueError: a field or an input does not fit, named with what was expected.
    """

    config_kind: ClassVar = CoreConfig

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
        arguments = self.declared_parameters(x), x, q, k, v
        options: dict[str, Any] = {"config": self._config(), "positions": positions, "segment_ids": segment_ids}
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "attention_inputs", core_attention_inputs(*arguments, **options))
        return core_attention(*arguments, **options)

    @nn.compact
    def declared_parameters(self, x: Float[Array, "B T E"] | None) -> dict[str, Array]:
        """The parameters by name, whichever method is called first."""
        config = self._config()
        embed_dim = checked_input(x).shape[2] if config.constant_gates is None else 0
        return self._declare(core_parameters(config, embed_dim))

    def init_cache(self, **sizes: Any) -> NSACache:
        """An empty cache. For `batch_size`, `max_length` and more, see `nsa_jax.decoding.core_cache`."""
        return core_cache(self._config(), **sizes)

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
        return core_prefill(self.declared_parameters(x), x, q, k, v, cache, config=self._config(), **options)

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
        return core_decode_step(self.declared_parameters(x), x, q, k, v, cache, config=self._config(), **options)


class NSAttention(LayerFields, CoreFields):
    """Native Sparse Attention layer (arXiv 2502.11089): projections around what `NSACore` computes.

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

    share_kv: bool = True  # one key/value projection for all three branches; in the paper each has its own

    config_kind: ClassVar = NSALayerConfig
    layer_function: ClassVar = staticmethod(nsa_layer)  # what a call computes

    def __call__(
        self,
        x: Float[Array, "B T E"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T E"]:
        """Attention output [B, T, E]. `positions` are those of the rotary embedding; see `docs/layers.md`."""
        parameters = self.declared_parameters(x)
        options: dict[str, Any] = {"config": self._config(), "positions": positions, "segment_ids": segment_ids}
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "attention_inputs", nsa_layer_inputs(parameters, x, **options))
        return self.layer_function(parameters, x, **options)

    def init_cache(self, **sizes: Any) -> NSACache:
        """An empty cache. For `batch_size`, `max_length` and more, see `nsa_jax.decoding.core_cache`."""
        return core_cache(self._config(), **sizes)

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
        return nsa_layer_prefill(self.declared_parameters(x), x, cache, config=self._config(), **options)

    def decode_step(
        self,
        x: Float[Array, "B m E"],
        cache: NSACache,
        *,
        positions: Int[Array, "B m"] | None = None,
        num_tokens: NumTokens = None,
        norm: Norm | None = None,
    ) -> tuple[Float[Array, "B m E"], NSACache]:
        """Output and new cache after one token or a few; see `nsa_jax.decoding.core_decode_step`.

        With a `norm` (`nsa_jax.one_row.Norm`: scale [E], and epsilon), the layer is a pre-normalised residual block:
        the output is x + layer(x / sqrt(mean(x^2) + epsilon) * scale).
        """
        options: dict[str, Any] = {"positions": positions, "num_tokens": num_tokens, "norm": norm}
        return nsa_layer_decode_step(self.declared_parameters(x), x, cache, config=self._config(), **options)


class FullAttention(LayerFields):
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

    window: int | None = None  # positions a query sees, its own included; None: all before it

    config_kind: ClassVar = LayerConfig

    def __call__(
        self,
        x: Float[Array, "B T E"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T E"]:
        """As `NSAttention.__call__`."""
        options: dict[str, Any] = {"window": self.window, "positions": positions, "segment_ids": segment_ids}
        return full_layer(self.declared_parameters(x), x, config=self._config(), **options)

    def init_cache(self, **sizes: Any) -> DenseCache:
        """An empty cache of `batch_size` rows of `max_length` tokens, optionally with a `dtype`."""
        return full_layer_cache(self._config(), **sizes)

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
        options |= {"config": self._config(), "window": self.window}
        return full_layer_prefill(self.declared_parameters(x), x, cache, **options)

    def decode_step(
        self,
        x: Float[Array, "B m E"],
        cache: DenseCache,
        *,
        positions: Int[Array, "B m"] | None = None,
        num_tokens: NumTokens = None,
        norm: Norm | None = None,
    ) -> tuple[Float[Array, "B m E"], DenseCache]:
        """As `NSAttention.decode_step`."""
        options: dict[str, Any] = {
            "positions": positions,
            "num_tokens": num_tokens,
            "norm": norm,
            "window": self.window,
        }
        return full_layer_decode_step(self.declared_parameters(x), x, cache, config=self._config(), **options)


class NSAttentionFn(nn.Module):
    """An `attention_fn` for `flax.linen.MultiHeadDotProductAttention`: Native Sparse Attention with learnt gates.

    The layer keeps its projections, and so its checkpoints. This module adds the parameters of its core. An
    `attention_fn` sees queries, keys and values only, so gates are made of the queries of all heads; with the core's
    `constant_gates` there are no parameters. Positions are those of the core's `rotate`.

    Causal masks that are known when tracing are taken, because NSA is causal by itself. For packed documents, bind
    `segment_ids` (or `positions`) with `functools.partial`, in the compact method that makes the layer.
    `nsa_jax.nnx.NSAttentionFn` is the same for NNX.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> core = NSACore(num_heads=4, num_kv_heads=4, head_dim=16)
      >>> layer = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=NSAttentionFn(core))
      >>> x = jnp.ones((1, 100, 64))
      >>> y, variables = jax.jit(layer.init_with_output)(jax.random.key(0), x)
      >>> y.shape, sorted(variables["params"])
      ((1, 100, 64), ['attention_fn', 'key', 'out', 'query', 'value'])

    Raises:
      ValueError: a mask, bias or dropout that NSA does not have, heads that are not those of the core, or another core.
    """

    core: NSACore

    def __post_init__(self) -> None:
        check_core(self.core, NSACore, "nsa_jax.NSACore")
        super().__post_init__()

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
        module: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
    ) -> Float[Array, "B T H Dv"]:
        """Attention output, as `flax.linen.dot_product_attention` gives it."""
        return attend(
            self.core,
            query,
            key,
            value,
            mask=mask,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            dtype=dtype,
            others={
                "bias": bias,
                "module": module,
                "qk_attn_weights_einsum": qk_attn_weights_einsum,
                "attn_weights_value_einsum": attn_weights_value_einsum,
            },
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


class LogicalNames(nn.LogicallyPartitioned):
    """Logical axis names of a parameter, which stay names when `nnx.bridge` takes the module.

    A plain `nn.LogicallyPartitioned` becomes an NNX variable that is split when it is made, which needs a mesh. And it
    does not go through `nn.scan` or `nn.vmap` without `metadata_params`, which name the axis of the layers.
    """

    def add_axis(self, index: int, params: dict[Any, Any]) -> Any:
        """The names with that of a new axis, which has none if `params` name none."""
        return super().add_axis(index, {nn.PARTITION_NAME: None} | params)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Any:
        """The names without that of an axis which `add_axis` has added."""
        return super().remove_axis(index, {nn.PARTITION_NAME: None} | params)

    def to_nnx_metadata(self) -> dict[str, Any]:
        """What `nnx.bridge.ToNNX` makes a variable of."""
        names = {"out_sharding": self.names, "sharding_rules": self.rules}
        return {"value": self.value, "mesh": self.mesh, **names, "eager_sharding": False}


def _named(parameter: Parameter, logical_axes: Mapping[str, Any] | None, *arguments: Any) -> Any:
    return LogicalNames(parameter.init(*arguments), renamed(parameter.axes, logical_axes))
