"""What the trainer must know of a kind of attention, and the layer that a config asks for."""

import abc
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from nsa_jax.cache import Cache
from nsa_jax.context import received_bytes
from train.config import KVDtype, ModelConfig, TrainConfig
from train.model.attention import attention_kind
from train.parallel.sharding import RULES


class Split(NamedTuple):
    """How the tokens and heads of a layer are split over devices."""

    length: int  # tokens of a row, on all devices together
    context: int  # devices along the context axis
    tensor: int  # devices along the tensor axis
    itemsize: int  # bytes of a number


class AttentionKind(abc.ABC):
    """One kind of attention. All figures are those of one layer.

    The methods that are not abstract describe a layer that projects x [B, T, E] to queries, and once to keys and
    values, and that has no other parameters.
    """

    decodes: bool = True  # whether the layer has a cache and can generate text

    @abc.abstractmethod
    def layer(self, config: ModelConfig, **common: Any) -> Any:
        """The Flax Linen layer, with the interface of `nsa_jax.FullAttention`.

        Args:
          config: of the model.
          **common: heads, rotary embedding, dtype, mesh axes and name, as `nsa_jax.FullAttention` takes them.
        """

    @abc.abstractmethod
    def keys_read(self, config: ModelConfig, length: int) -> Int[np.ndarray, " length"]:
        """Keys that the query at each position of a sequence attends to."""

    @abc.abstractmethod
    def received_over_context(self, config: ModelConfig, split: Split) -> float:
        """Bytes that a device receives in the forward pass of one row; none where `split.context` is 1."""

    def received_again_over_context(self, config: ModelConfig, split: Split) -> float:
        """Bytes that the backward pass fetches once more, besides those of a rematerialised forward pass."""
        return 0

    def kv_projections(self, config: ModelConfig) -> tuple[int, int]:
        """How often x is projected to keys, and how often to values."""
        return 1, 1

    def other_multiply_adds(self, config: ModelConfig, length: int) -> float:
        """Multiply-adds per token of matrix products besides projections, scores and values."""
        return 0.0

    def multiply_adds_without_backward(self, config: ModelConfig, length: int) -> float:
        """Multiply-adds per token of matrix products through which no gradient goes, and which count nowhere else."""
        return 0.0

    def other_hidden_size(self, config: ModelConfig) -> int:
        """Numbers per token, besides x, whose gradient is summed over the tensor axis."""
        return 0

    def is_replicated_over_tensor(self, name: str) -> bool:
        """Whether the parameter of this name is whole on all devices along the tensor axis, though heads use it."""
        return False

    def decoded_bytes(
        self, config: ModelConfig, length: int, union: float = 1.0, kv_dtype: KVDtype | None = None
    ) -> float:
        """Bytes that the heads of a group read together to decode the last of `length` tokens.

        Args:
          config: of the model.
          length: tokens of the row, the new one included.
          union: tokens that a group reads in its selected branch, over those that one of its heads reads there.
          kv_dtype: of the cache's pages, for a kind that has them; see `nsa_jax.init_nsa_cache`.
        """
        return float(self.keys_read(config, length)[-1]) * sum(head_dims(config)) * itemsize(config)

    def init_cache(self, layer: Any, *, step_tokens: int, **sizes: Any) -> Cache:
        """An empty cache of a layer of this kind, for steps of up to `step_tokens` tokens.

        Args:
          layer: as `layer` makes it.
          step_tokens: that a step may add to each row, and `rollback` take back.
          sizes: `batch_size`, `max_length` and `kv_dtype`.
        """
        return layer.init_cache(**sizes)

    def rollback(self, cache: Cache, num_rejected: Int[Array, " B"], config: ModelConfig) -> Cache:
        """The cache without the last tokens of each row, which the step before added."""
        return cache._replace(lengths=cache.lengths - num_rejected)

    def check(self, config: TrainConfig, mesh: Mapping[str, int]) -> None:  # noqa: B027, most have nothing to check
        """Raises ValueError, naming the setting, where this kind cannot do what the config and the mesh ask for."""

    def multiply_adds(self, config: ModelConfig, length: int) -> float:
        """Multiply-adds of matrix products with a backward pass per token, averaged over a sequence's positions."""
        E, H, K, Dk, Dv = config.embed_dim, config.num_heads, config.num_kv_heads, *head_dims(config)
        keys, values = self.kv_projections(config)
        projections = E * H * Dk + H * Dv * E + E * K * (keys * Dk + values * Dv)
        scores_and_values = H * (Dk + Dv) * float(self.keys_read(config, length).mean())
        return projections + scores_and_values + self.other_multiply_adds(config, length)


def head_dims(config: ModelConfig) -> tuple[int, int]:
    """Sizes of a key head and of a value head."""
    return config.head_dim, config.head_dim if config.v_head_dim is None else config.v_head_dim


def itemsize(config: ModelConfig) -> int:
    """Bytes of a number of the compute dtype."""
    return jnp.dtype(config.dtype).itemsize


def received_as(kind: Literal["nsa", "full", "window"], config: ModelConfig, split: Split) -> int:
    """What `nsa_jax.context` says a device receives for one of the library's own layers."""
    Dk, Dv = head_dims(config)
    return received_bytes(
        kind,
        config.nsa,
        T=split.length,
        devices=split.context,
        num_heads=config.num_heads // split.tensor,
        num_kv_heads=config.num_kv_heads // split.tensor,
        head_dim=Dk,
        v_head_dim=Dv,
        itemsize=split.itemsize,
    )


def make_attention(config: ModelConfig, name: str | None = None) -> Any:
    """The attention layer that `config.attention` names."""
    mesh_axes = dict(RULES)
    return attention_kind(config.attention).layer(
        config,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        v_head_dim=config.v_head_dim,
        rope_theta=config.rope_theta,
        rope_scaling=config.rope_scaling,
        qk_norm=config.qk_norm,
        qkv_bias=config.qkv_bias,
        output_init_scale=config.output_init_scale,
        dtype=jnp.dtype(config.dtype),
        batch_axes=mesh_axes["batch"],
        head_axes=mesh_axes["kv_heads"],
        context_axes=mesh_axes["sequence"],
        name=name,
    )
