"""Native Sparse Attention (arXiv 2502.11089)."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from nsa_jax import NSAttention, rollback
from nsa_jax.cache import Cache
from nsa_jax.core import attend
from nsa_jax.explicit import split_like
from nsa_jax.layer import NSALayerConfig, join_heads, layer_inputs, layer_on_mesh, nsa_layer_inputs
from nsa_jax.selection import selection_loss
from pallas_kernels.quantized import head_bytes
from train.config import KVDtype, ModelConfig, TrainConfig
from train.model.attention.kind import AttentionKind, Split, head_dims, itemsize, received_as
from train.model.auxiliary import DRAWS, LOSSES, leave_loss
from train.parallel.sharding import padded_length


class TaughtNSAttention(NSAttention):
    """`nsa_jax.NSAttention` whose selection a loss of its own teaches, from a few queries of every row."""

    selection_loss: float = 0.0  # weight
    num_queries: int = 32  # of every row
    moves_queries: bool = True  # whether its gradient goes to the queries too

    def __call__(
        self,
        x: Float[Array, "B T E"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T E"]:
        """Attention output; leaves the loss, if there are random numbers to draw the queries with."""
        if not (self.has_rng(DRAWS) and self.is_mutable_collection(LOSSES)):
            return super().__call__(x, positions=positions, segment_ids=segment_ids)
        queries = drawn_positions(self.make_rng(DRAWS), x.shape[1], self.num_queries)
        y, loss = _layer_and_loss(
            self.declared_parameters(x),
            x,
            queries,
            config=self._config(),
            moves_queries=self.moves_queries,
            positions=positions,
            segment_ids=segment_ids,
        )
        leave_loss(self, self.selection_loss * loss)
        return y


@layer_on_mesh(lambda given: (split_like(given["x"]), PartitionSpec()))
def _layer_and_loss(
    parameters: Mapping[str, Array],
    x: Float[Array, "B T E"],
    queries: Int[Array, " S"],
    *,
    config: NSALayerConfig,
    moves_queries: bool,
    positions: Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[Float[Array, "B T E"], Float[Array, ""]]:
    """`nsa_jax.layer.nsa_layer`, and its `selection_loss` from the same queries and keys."""
    x, weights = layer_inputs(x, parameters, config)
    inputs = nsa_layer_inputs(weights, x, config=config, positions=positions, segment_ids=segment_ids)
    taught = inputs if moves_queries else inputs._replace(q=jax.lax.stop_gradient(inputs.q))
    loss = selection_loss(taught, config.config, queries, scale=config.scale)
    return join_heads(attend(inputs, config), weights, config), loss


def drawn_positions(key: Array, length: int, count: int) -> Int[Array, " count"]:
    """A random position from each of `count` parts of a row, which are as long as one another, in ascending order."""
    edges = np.arange(count + 1) * length // count
    return jax.random.randint(key, (count,), edges[:-1], edges[1:])


class NSA(AttentionKind):
    """`nsa_jax.NSAttention`."""

    def layer(self, config: ModelConfig, **common: Any) -> Any:
        """The layer with its three branches."""
        if config.selection_loss:
            common |= {
                "selection_loss": config.selection_loss,
                "num_queries": config.selection_loss_queries,
                "moves_queries": config.selection_loss_moves_queries,
            }
        return (TaughtNSAttention if config.selection_loss else NSAttention)(
            **common,
            config=config.nsa,
            compression=config.compression,
            share_kv=config.share_kv,
            tie_keys=config.tie_keys,
            implementation=config.implementation,
        )

    def init_cache(self, layer: Any, *, step_tokens: int, **sizes: Any) -> Cache:
        """The rings hold what a step may overwrite."""
        return layer.init_cache(**sizes, step_tokens=step_tokens)

    def rollback(self, cache: Any, num_rejected: Int[Array, " B"], config: ModelConfig) -> Cache:
        """By `nsa_jax.rollback`."""
        return rollback(cache, num_rejected, config=config.nsa)

    def keys_read(self, config: ModelConfig, length: int) -> Int[np.ndarray, " length"]:
        """The visible compressed tokens, the tokens of the selected blocks up to the query's own, and the window."""
        window = np.minimum(np.arange(length) + 1, config.nsa.window)
        return _visible_compressed(config, length) + selected_tokens(config, length) + window

    def decoded_bytes(
        self, config: ModelConfig, length: int, union: float = 1.0, kv_dtype: KVDtype | None = None
    ) -> float:
        """The keys read, of which `union` multiplies those of the selected branch. Those of the window are exact."""
        exact = sum(head_dims(config)) * itemsize(config)
        of_pages = exact if kv_dtype is None else sum(map(head_bytes, head_dims(config)))
        paged = _visible_compressed(config, length)[-1] + union * float(selected_tokens(config, length)[-1])
        return float(paged) * of_pages + min(length, config.nsa.window) * exact

    def kv_projections(self, config: ModelConfig) -> tuple[int, int]:
        """One for each branch, unless they share it; the compressed branch has no keys of its own if they are tied."""
        if config.share_kv:
            return 1, 1
        return 3 - config.tie_keys, 3

    def other_multiply_adds(self, config: ModelConfig, length: int) -> float:
        """The gates' MLP for each token, and phi for each compressed token and key/value head."""
        E, l = config.embed_dim, config.nsa.compress_block  # noqa: E741
        gate_hidden = self.other_hidden_size(config)
        sizes_of_phi = head_dims(config)[1:] if config.tie_keys else head_dims(config)
        phi = {
            "mlp": sum(l * D * 2 * D + 2 * D * D for D in sizes_of_phi),
            "linear": sum(l * D * D for D in sizes_of_phi),
            "mean": 0,
        }[config.compression]
        compressed = _visible_compressed(config, length)[-1]
        return E * gate_hidden + gate_hidden * 3 * config.num_heads + phi * config.num_kv_heads * compressed / length

    def other_hidden_size(self, config: ModelConfig) -> int:
        """The hidden width of the gates' MLP."""
        return max(1, config.embed_dim // 4)

    def is_replicated_over_tensor(self, name: str) -> bool:
        """The parameters of phi, which all heads share."""
        return name.startswith("phi_")

    def received_over_context(self, config: ModelConfig, split: Split) -> float:
        """Compressed and selected keys and values, and the tokens that the window reaches."""
        return received_as("nsa", config, split)

    def received_again_over_context(self, config: ModelConfig, split: Split) -> float:
        """The selected keys and values, unless remat keeps what attention computed."""
        heads = config.num_kv_heads // split.tensor
        # A loop over one head is none, and the compiler sees that its second pass gathers the same.
        if config.remat == "attention" or not config.nsa.num_selected or heads == 1:
            return 0
        keys_and_values = split.length * heads * sum(head_dims(config))
        return (split.context - 1) / split.context * keys_and_values * split.itemsize

    def check(self, config: TrainConfig, mesh: Mapping[str, int]) -> None:
        """A chunk of a device's tokens must hold the overlap of two compressed blocks; a row that teaches is whole."""
        nsa, length, context = config.model.nsa, config.data.sequence_length, mesh["context"]
        if context > 1 and config.model.selection_loss:
            raise ValueError(
                f"mesh.context = {context}: expected 1 with model.selection_loss = {config.model.selection_loss}"
            )
        chunk = padded_length(length, context, nsa.compress_stride) // (2 * context)
        needed = nsa.compress_block - nsa.compress_stride
        if context > 1 and chunk < needed:
            raise ValueError(
                f"data.sequence_length = {length}: expected more for mesh.context = {context}, whose chunks of {chunk} "
                f"tokens are shorter than model.nsa.compress_block - model.nsa.compress_stride = {needed}"
            )


def selected_tokens(config: ModelConfig, length: int) -> Int[np.ndarray, " length"]:
    """Tokens that the query at each position reads in the selected branch, if its own block is always among them."""
    position, s = np.arange(length), config.nsa.select_block
    if not config.nsa.num_selected:
        return np.zeros_like(position)
    return position % s + 1 + s * np.minimum(position // s, config.nsa.num_selected - 1)


def _visible_compressed(config: ModelConfig, length: int) -> Int[np.ndarray, " length"]:
    """Compressed tokens that the query at each position sees."""
    position, l, d = np.arange(length), config.nsa.compress_block, config.nsa.compress_stride  # noqa: E741
    return np.where(position >= l - 1, (position - l + 1) // d + 1, 0)


class ForTraining(NSA):
    """A kind of attention that is NSA but for one thing, without a cache, on devices that have whole rows."""

    decodes = False

    def received_over_context(self, config: ModelConfig, split: Split) -> float:
        """Nothing: `check` refuses a split of the tokens."""
        return 0

    def received_again_over_context(self, config: ModelConfig, split: Split) -> float:
        """Nothing."""
        return 0

    def check(self, config: TrainConfig, mesh: Mapping[str, int]) -> None:
        """Rows must be whole, and there must be something to choose."""
        name = config.model.attention_name
        if not config.model.nsa.num_selected:
            raise ValueError(f"model.nsa.num_selected = 0: expected at least 1 with model.attention = {name}")
        if mesh["context"] > 1:
            raise ValueError(f"mesh.context = {mesh['context']}: expected 1 with model.attention = {name}")


KIND = NSA()
