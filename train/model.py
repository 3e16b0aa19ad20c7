"""A Llama-style decoder: RMSNorm, rotary grouped-query attention, SwiGLU, layers under one scan."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nsa_jax import FullAttention, NSAttention
from nsa_jax.cache import Cache
from train.config import ModelConfig
from train.sharding import RULES

# Rows of the embedding come in this multiple: matrix units like it, and so does a mesh that splits the vocabulary.
VOCABULARY_MULTIPLE = 64

Caches = tuple[Cache, ...]  # one for each layer

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def padded_vocabulary(vocab_size: int) -> int:
    """Rows of the embedding for a tokenizer of `vocab_size` tokens; the ones beyond it stand for no token."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def output_kernel(params: Any, config: ModelConfig) -> Float[Array, "E V"]:
    """The matrix from final hidden states to logits, in the compute dtype."""
    kernel = params["embedding"].T if config.tie_embeddings else params["output_kernel"]
    return kernel.astype(config.dtype)


def logits(params: Any, hidden: Float[Array, "*B E"], config: ModelConfig) -> Float[Array, "*B V"]:
    """Float32 logits of final hidden states; V is the padded vocabulary."""
    return jnp.dot(hidden, output_kernel(params, config), preferred_element_type=jnp.float32)


class RMSNorm(nn.Module):
    """x / rms(x) times a learned scale, with the statistics in float32 (arXiv 1910.07467)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Normalised x, in the dtype of x."""
        scale = _parameter(self, "scale", nn.initializers.ones_init(), (x.shape[-1],), ("embed",))
        x_float = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x_float), axis=-1, keepdims=True)
        return (x_float * jax.lax.rsqrt(mean_square + self.epsilon) * scale[None, None, :]).astype(x.dtype)


class SwiGLU(nn.Module):
    """(silu(x W_gate) * x W_up) W_down (arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The feed-forward part of a block."""
        E, M = self.config.embed_dim, self.config.mlp_dim
        init = nn.initializers.lecun_normal()
        gate = _parameter(self, "gate_kernel", init, (E, M), ("embed", "mlp")).astype(x.dtype)
        up = _parameter(self, "up_kernel", init, (E, M), ("embed", "mlp")).astype(x.dtype)
        down = _parameter(self, "down_kernel", init, (M, E), ("mlp", "embed")).astype(x.dtype)
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down


class Block(nn.Module):
    """Attention, then SwiGLU, each on the normalised residual stream and added to it."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        cache: Cache | None,
        segment_ids: Int[Array, "B T"] | None,
        num_tokens: Int[Array, " B"] | None,
    ) -> tuple[Array, Cache | None]:
        """The residual stream after the block and the cache, if there is one, with `num_tokens` of each row added."""
        config = self.config
        # Rows stay where they are: without this, parameters that are split over "fsdp" can pull activations along.
        x = nn.with_logical_constraint(x, ("batch", None, None))
        attention = make_attention(config, name="attention")
        normalised = RMSNorm(config.norm_eps, name="attention_norm")(x)
        if cache is None:
            attended = attention(normalised, segment_ids=segment_ids)
        elif x.shape[1] == 1:
            attended, cache = attention.decode_step(normalised, cache, num_tokens=num_tokens)
        else:
            attended, cache = attention.prefill(normalised, cache, num_tokens=num_tokens, continuing=True)
        x = x + attended
        x = x + SwiGLU(config, name="mlp")(RMSNorm(config.norm_eps, name="mlp_norm")(x))
        return x, cache


def init_caches(config: ModelConfig, *, batch_size: int, max_length: int) -> Caches:
    """An empty cache for each layer.

    Args:
      config: of the model.
      batch_size: rows.
      max_length: the most tokens a row can hold.
    """
    attention = make_attention(config)
    return tuple(attention.init_cache(batch_size=batch_size, max_length=max_length) for _ in range(config.num_layers))


def make_attention(config: ModelConfig, name: str | None = None) -> Any:
    """The attention layer that `config.attention` names; nothing else in the model depends on it."""
    heads: dict[str, Any] = {
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "v_head_dim": config.v_head_dim,
        "rope_theta": config.rope_theta,
        "dtype": jnp.dtype(config.dtype),
        "name": name,
    }
    if config.attention == "nsa":
        mesh_axes: dict[str, Any] = dict(RULES)
        return NSAttention(
            **heads,
            config=config.nsa,
            compression=config.compression,
            share_kv=config.share_kv,
            implementation=config.implementation,
            batch_axes=mesh_axes["batch"],
            head_axes=mesh_axes["kv_heads"],
        )
    return FullAttention(**heads, window=config.nsa.window if config.attention == "window" else None)


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
        init = nn.initializers.normal(0.02)
        self.embedding = _parameter(self, "embedding", init, (V, config.embed_dim), ("vocab", "embed"))
        if not config.tie_embeddings:
            init = nn.initializers.lecun_normal()
            self.output_kernel = _parameter(self, "output_kernel", init, (config.embed_dim, V), ("embed", "vocab"))
        block = Block
        if config.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config)
        self.final_norm = RMSNorm(config.norm_eps)

    def __call__(
        self, tokens: Int[Array, "B T"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T E"]:
        """Final hidden states, in the compute dtype."""
        return self.decode(self.embed(tokens), segment_ids=segment_ids)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """Token embeddings, in the compute dtype."""
        return jnp.take(self.embedding.astype(self.config.dtype), tokens, axis=0)

    def decode(
        self, x: Float[Array, "B T E"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T E"]:
        """Final hidden states from embeddings."""
        x, _ = self.layers(x, None, segment_ids, None)
        return nn.with_logical_constraint(self.final_norm(x), ("batch", None, None))


def extend(
    params: Any,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    caches: Caches,
    *,
    num_tokens: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T E"], Caches]:
    """Final hidden states of T more tokens of each row, and the caches with them.

    T = 1 is a decode step, more is the next chunk of a prompt. Layer by layer and not under a scan, which would copy
    what it should update in place.

    Args:
      params: of the `Transformer`.
      config: of the model.
      tokens: int32 [B, T].
      caches: as `init_caches` makes them.
      num_tokens: int32 [B], how many of the T tokens of a row count, from the left; the hidden states of the others
        mean nothing. None: all.
    """
    x = jnp.take(params["embedding"].astype(config.dtype), tokens, axis=0)
    extended = []
    for layer, cache in enumerate(caches):
        variables = {"params": jax.tree.map(lambda x, layer=layer: x[layer], params["layers"])}
        out: Any = Block(config).apply(variables, x, cache, None, num_tokens)
        x = out[0]
        extended.append(out[1])
    hidden: Any = RMSNorm(config.norm_eps).apply({"params": params["final_norm"]}, x)
    return hidden, tuple(extended)


def _parameter(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...], axes: tuple[str, ...]) -> Array:
    """Declares a float32 parameter with logical axis names."""
    parameter: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    return parameter
