"""A Llama-style decoder: RMSNorm, rotary grouped-query attention, SwiGLU, layers under one scan."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nsa_jax import save_attention
from nsa_jax.cache import Cache
from nsa_jax.layer import JOINED
from nsa_jax.one_row import multiply_rows, rms_norm
from nsa_jax.sharding import devices_along
from pallas_kernels.one_row_product.contract import Norm
from train.config import KVDtype, ModelConfig, MoEConfig
from train.model.attention import attention_kind
from train.model.attention.kind import make_attention
from train.model.auxiliary import DRAWS, LOSSES
from train.model.embedding import embed
from train.model.moe import COLLECTION, MoE
from train.parallel.sharding import activation, logical, weight

# The embedding has a multiple of this many rows, which suits matrix units and a mesh that splits the vocabulary.
VOCABULARY_MULTIPLE = 64

Caches = tuple[Cache, ...]  # one for each layer

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, save_attention
    ),
    "attention": save_attention,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def padded_vocabulary(vocab_size: int) -> int:
    """Rows of the embedding for a tokenizer of `vocab_size` tokens; the ones beyond it stand for no token."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def output_kernel(params: Any, config: ModelConfig) -> Float[Array, "E V"]:
    """The matrix from final hidden states to logits, in the compute dtype."""
    if config.tie_embeddings:
        return weight(params["embedding"], ("vocab", "embed"), config.dtype).T
    return weight(params["output_kernel"], ("embed", "vocab"), config.dtype)


def logits(params: Any, hidden: Float[Array, "*B E"], config: ModelConfig) -> Float[Array, "*B V"]:
    """Float32 logits of final hidden states; V is the padded vocabulary."""
    return jnp.dot(hidden, output_kernel(params, config), preferred_element_type=jnp.float32)


class RMSNorm(nn.Module):
    """x / rms(x) times a learned scale, with the statistics in float32 (arXiv 1910.07467)."""

    epsilon: float

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Normalised x, in the dtype of x."""
        return rms_norm(x, self.of(x))

    @nn.compact
    def of(self, x: Float[Array, "B T E"]) -> Norm:
        """The norm, for those that normalise x themselves."""
        init = nn.initializers.ones_init()
        return Norm(_weight(self, "scale", init, (x.shape[-1],), ("embed",), jnp.float32), self.epsilon)


class SwiGLU(nn.Module):
    """(silu(x W_gate) * x W_up) W_down (arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"], norm: Norm) -> Float[Array, "B T E"]:
        """The feed-forward part of a block: that of the norm of x, added to x."""
        E, M = self.config.embed_dim, self.config.mlp_dim
        init = nn.initializers.lecun_normal()
        scaled = nn.initializers.variance_scaling(self.config.output_init_scale**2, "fan_in", "truncated_normal")
        if self.has_variable("params", JOINED):  # of `decoding_parameters`
            joined = _weight(self, JOINED, init, (2 * M, E), ("mlp", "embed"), x.dtype)
            down = _weight(self, "down_weight", scaled, (E, M), ("embed", "mlp"), x.dtype)
            return multiply_rows(multiply_rows(x, joined, norm=norm, gated=True), down, residual=x)
        normalised = rms_norm(x, norm)
        gate = normalised @ _weight(self, "gate_kernel", init, (E, M), ("embed", "mlp"), x.dtype)
        up = normalised @ _weight(self, "up_kernel", init, (E, M), ("embed", "mlp"), x.dtype)
        down = _weight(self, "down_kernel", scaled, (M, E), ("mlp", "embed"), x.dtype)
        hidden = jax.nn.silu(gate) * up
        # On Explicit axes the sharding of the sum over the split hidden width must be given: that of the input.
        return x + jnp.einsum("btm,me->bte", hidden, down, out_sharding=jax.typeof(x).sharding)


class Block(nn.Module):
    """Attention, then SwiGLU or a mixture of experts, each on the normalised residual stream and added to it."""

    config: ModelConfig
    verifies: bool = False  # whether several new tokens over a cache are drafts, and not the next chunk of a prompt
    begins: bool = False  # whether they begin their rows, and what the cache held is forgotten

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        cache: Cache | None,
        segment_ids: Int[Array, "B T"] | None,
        num_tokens: Int[Array, " B"] | None,
        counted: Bool[Array, "B T"] | None,
    ) -> tuple[Array, Cache | None]:
        """The residual stream after the block and the cache, if there is one, with `num_tokens` of each row added."""
        config = self.config
        # Without this, the compiler may split activations as "fsdp" splits the parameters.
        x = activation(x, "batch", "sequence", None)
        attention = make_attention(config, name="attention")
        norm = RMSNorm(config.norm_eps, name="attention_norm").of(x)
        if cache is None:
            x = x + attention(rms_norm(x, norm), segment_ids=segment_ids)
        elif self.verifies or (x.shape[1] == 1 and not self.begins):
            x, cache = attention.decode_step(x, cache, num_tokens=num_tokens, norm=norm)
        else:
            options = {"num_tokens": num_tokens, "continuing": not self.begins}
            attended, cache = attention.prefill(rms_norm(x, norm), cache, **options)
            x = x + attended
        norm = RMSNorm(config.norm_eps, name="mlp_norm").of(x)
        if config.moe.num_routed:
            return x + MoE(config, name="mlp")(rms_norm(x, norm), counted), cache
        return SwiGLU(config, name="mlp")(x, norm), cache


class Group(nn.Module):
    """Neighbouring blocks that differ in their attention, one after another; see `Stack`."""

    layers: tuple[ModelConfig, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"], cache: None, *inputs: Any) -> tuple[Array, None]:
        """The residual stream after the blocks; for the inputs see `Block`."""
        for index, config in enumerate(self.layers):
            x, _ = _rematerialised(config)(config, name=str(index))(x, cache, *inputs)
        return x, None


def _rematerialised(config: ModelConfig) -> type[nn.Module]:
    if config.remat == "none":
        return Block
    return nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)


class Stack(NamedTuple):
    """Equal groups of layers, whose parameters are stacked: [groups, ...].

    With `model.pattern` a group is as many layers as the pattern, and the parameters of layer i of each group lie under
    the name str(i). Otherwise a group is one layer, without such a name.
    """

    layers: tuple[ModelConfig, ...]  # the config of each layer of a group
    groups: int

    def of_layer(self, stacked: Any, group: int, index: int) -> Any:
        """Parameters of one layer."""
        own = stacked if len(self.layers) == 1 else stacked[str(index)]
        return jax.tree.map(lambda x: x[group], own)

    def collect(self, stacked: Any, *path: str) -> Any:
        """What lies at a path in every layer, stacked in the order of the layers."""
        parts = [stacked] if len(self.layers) == 1 else [stacked[str(index)] for index in range(len(self.layers))]
        for name in path:
            parts = [part[name] for part in parts]
        return jax.tree.map(lambda *x: jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *parts)

    def replace(self, stacked: Any, value: Array, *path: str) -> Any:
        """The inverse of `collect`: `stacked` with an array at a path of every layer."""
        if len(self.layers) == 1:
            return _replaced(stacked, value, path)
        parts = value.reshape(self.groups, len(self.layers), *value.shape[1:])
        return {
            **stacked,
            **{str(i): _replaced(stacked[str(i)], parts[:, i], path) for i in range(len(self.layers))},
        }


def _replaced(tree: Any, value: Array, path: tuple[str, ...]) -> Any:
    return {**tree, path[0]: _replaced(tree[path[0]], value, path[1:])} if path else value


def layer_stacks(config: ModelConfig) -> dict[str, Stack]:
    """The stacks of layers in order, by the name of their parameters."""
    dense = config.moe.first_dense if config.moe.num_routed else 0
    period = max(1, len(config.pattern))
    group = tuple(
        dataclasses.replace(config, attention=kind, pattern=()) for kind in config.attention_of_layers[:period]
    )
    without = tuple(dataclasses.replace(layer, moe=MoEConfig()) for layer in group)
    stacks = {"dense_layers": Stack(without, dense // period)} if dense else {}
    return {**stacks, "layers": Stack(group, (config.num_layers - dense) // period)}


def init_caches(
    config: ModelConfig,
    *,
    batch_size: int,
    max_length: int,
    step_tokens: int = 1,
    kv_dtype: KVDtype | None = None,
) -> Caches:
    """An empty cache for each layer.

    Args:
      config: of the model.
      batch_size: rows.
      max_length: the most tokens a row can hold.
      step_tokens: the most tokens that a step adds to a row: one, and drafts.
      kv_dtype: in which pages hold keys and values; None: the dtype of the computation.

    Raises:
      ValueError: a kind of attention of the model has no cache, or none of this `kv_dtype`.
    """
    for kind in config.attention_of_layers:
        if not attention_kind(kind).decodes:
            raise ValueError(f"model.attention = {kind}: expected a kind that decodes; this one is for training only")
    sizes: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "step_tokens": step_tokens}
    sizes["kv_dtype"] = kv_dtype
    attentions = [make_attention(dataclasses.replace(config, attention=kind)) for kind in config.attention_of_layers]
    named = zip(config.attention_of_layers, attentions, strict=True)
    return tuple(attention_kind(kind).init_cache(attention, **sizes) for kind, attention in named)


def rollback_caches(config: ModelConfig, caches: Caches, num_rejected: Int[Array, " B"]) -> Caches:
    """The caches without the last tokens of each row, which the step before added."""
    named = zip(config.attention_of_layers, caches, strict=True)
    return tuple(attention_kind(kind).rollback(cache, num_rejected, config) for kind, cache in named)


class Transformer(nn.Module):
    """The decoder. Call it with tokens int32 [B, T] for the final hidden states [B, T, E]; `logits` does the rest.

    Hidden states rather than logits, so that the loss can go through the vocabulary in chunks. Every parameter has
    logical axis names: those of the attention, and "embed", "mlp", "vocab" and "layers".
    """

    config: ModelConfig
    vocab_size: int  # of the tokenizer; the embedding has `padded_vocabulary` rows

    def setup(self) -> None:
        """Declares the parameters."""
        config, V = self.config, padded_vocabulary(self.vocab_size)
        init = nn.initializers.normal(config.embedding_init)
        self.embedding = _parameter(self, "embedding", init, (V, config.embed_dim), ("vocab", "embed"))
        if not config.tie_embeddings:
            init = nn.initializers.lecun_normal()
            self.output_kernel = _parameter(self, "output_kernel", init, (config.embed_dim, V), ("embed", "vocab"))
        for name, stack in layer_stacks(config).items():
            alone = len(stack.layers) == 1
            scanned = nn.scan(
                _rematerialised(config) if alone else Group,
                variable_axes={"params": 0, COLLECTION: 0, LOSSES: 0, "intermediates": 0},
                split_rngs={"params": True, DRAWS: True},
                in_axes=(nn.broadcast,) * 4,
                length=stack.groups,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            setattr(self, name, scanned(stack.layers[0] if alone else stack.layers))
        self.final_norm = RMSNorm(config.norm_eps)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        counted: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T E"]:
        """Final hidden states, in the compute dtype; `counted` as in `MoE`."""
        return self.decode(self.embed(tokens), segment_ids=segment_ids, counted=counted)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """Token embeddings, in the compute dtype."""
        return embed(weight(self.embedding, ("vocab", "embed"), self.config.dtype), tokens)

    def decode(
        self,
        x: Float[Array, "B T E"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        counted: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T E"]:
        """Final hidden states from embeddings."""
        for name in layer_stacks(self.config):
            x, _ = getattr(self, name)(x, None, segment_ids, None, counted)
        return activation(self.final_norm(x), "batch", "sequence", None)


@functools.partial(jax.jit, static_argnames="config")
def decoding_parameters(params: Any, config: ModelConfig) -> Any:
    """A model's parameters as `extend` reads them, made once for all of its steps.

    They are in the compute dtype, except norms and routers, which keep float32. Those of each layer are arrays of their
    own, so that a step does not copy them out of a stack. What makes one number of a result lies together. What is
    multiplied with the same input is one array, unless the mesh in context splits heads, which lie apart in it.

    Args:
      params: of the `Transformer`.
      config: of the model.

    Returns:
      The same names, except for "layers", which are a tuple of the parameters of each layer, in order.
    """

    def cast(tree: Any) -> Any:
        kept = ("scale", "router_kernel", "balance_bias")
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x if path[-1].key in kept else x.astype(config.dtype), tree
        )

    def joined(layer: ModelConfig, block: Any) -> Any:
        if devices_along(logical("heads")[0]) > 1:
            return block
        block = block | {"attention": make_attention(layer).join_projections(block["attention"])}
        if layer.moe.num_routed:
            return block
        mlp = block["mlp"]
        gate_and_up = jnp.concatenate([mlp["gate_kernel"].T, mlp["up_kernel"].T])
        return block | {"mlp": {JOINED: gate_and_up, "down_weight": mlp["down_kernel"].T}}

    stacks = layer_stacks(config)
    layers = tuple(
        joined(layer, cast(stack.of_layer(params[name], group, index)))
        for name, stack in stacks.items()
        for group, (index, layer) in itertools.product(range(stack.groups), enumerate(stack.layers))
    )
    return cast({name: value for name, value in params.items() if name not in stacks}) | {"layers": layers}


def extend(
    params: Any,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    caches: Caches,
    *,
    num_tokens: Int[Array, " B"] | None = None,
    verifies: bool = False,
    begins: bool = False,
) -> tuple[Float[Array, "B T E"], Caches]:
    """Final hidden states of T more tokens of each row, and the caches with them.

    T = 1 is a decoding step; more tokens are the next chunk of a prompt, or, if it `verifies`, a step too. This goes
    layer by layer and not through a scan, which would copy the caches instead of updating them in place.

    Args:
      params: as `decoding_parameters` makes them.
      config: of the model.
      tokens: int32 [B, T].
      caches: as `init_caches` makes them.
      num_tokens: int32 [B], how many of the T tokens of a row count, from the left; the hidden states of the others
        mean nothing. None: all.
      verifies: whether the tokens are one and its drafts, at most the caches' `step_tokens`.
      begins: whether the tokens are the first of every row, and what the caches held is forgotten. Attention is then
        that of training, of these tokens alone.
    """
    x = jnp.take(params["embedding"], tokens, axis=0)
    extended: list[Cache] = []
    layers = [layer for stack in layer_stacks(config).values() for layer in stack.layers * stack.groups]
    for layer, block, cache in zip(layers, params["layers"], caches, strict=True):
        out: Any = Block(layer, verifies, begins).apply({"params": block}, x, cache, None, num_tokens, None)
        x = out[0]
        extended.append(out[1])
    hidden: Any = RMSNorm(config.norm_eps).apply({"params": params["final_norm"]}, x)
    return hidden, tuple(extended)


def _weight(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...], axes: tuple[str, ...], dtype: Any):
    """Declares a parameter and returns it as the model uses it."""
    return weight(_parameter(module, name, init, shape, axes), axes, dtype)


def _parameter(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...], axes: tuple[str, ...]) -> Array:
    """Declares a float32 parameter with logical axis names."""
    parameter: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    return parameter
