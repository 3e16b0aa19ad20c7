"""Native Sparse Attention whose selected branch reads something else: the designs that the paper argues against.

Section 6.1 of the paper and its introduction name other ways to choose what a query reads. Each is a kind of attention
here, with everything of `nsa_jax.NSAttention` but that choice: projections, rotary embedding, all three branches,
gates, and as many tokens read, the forced blocks included. A run with one of them differs from a run with NSA in the
choice alone. (In the papers that they come from, these designs have no compressed branch beside them.)

They are for training: there is no cache, and a row lies whole on every device.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from nsa_jax import compressed_attention, selected_attention, window_attention
from nsa_jax.attention import AttentionInputs, BranchKV
from nsa_jax.core import Parameter
from nsa_jax.explicit import split_like
from nsa_jax.layer import (
    NSALayerConfig,
    join_heads,
    layer_inputs,
    layer_on_mesh,
    nsa_layer_inputs,
    nsa_parameters,
)
from nsa_jax.selection import SelectionRecall, selection_recall
from nsa_jax.sharding import free_axes, manual_axes, sharded
from nsa_jax.visibility import gated_sum, segment_starts
from train.config import KVDtype, ModelConfig
from train.model.attention.kind import itemsize
from train.model.attention.nsa import ForTraining
from train.model.attention.scores import repeated, seen_tokens
from train.model.auxiliary import LOSSES, leave_loss

QUERIES = 64  # of a row, evenly over its second half, at which a selection is measured


class Choice(NamedTuple):
    """What a choice is made from."""

    q: Float[Array, "B T H Dk"]
    kv: BranchKV
    lse: Float[Array, "B H T"]  # of the compressed branch
    starts: Int[Array, "B T"]  # position of the first token of each token's segment
    segment_ids: Int[Array, "B T"] | None
    own: Mapping[str, Array]  # what the design makes of the layer's input


class Selection(NamedTuple):
    """How a layer selects, for each K/V head, over a sample of queries."""

    recall: SelectionRecall
    union: Float[Array, " K"]  # tokens that a group reads in the selected branch, over those that one head reads there
    imbalance: Float[Array, " K"]  # of what is stored and read together: the largest over the mean


class Choosing(ForTraining):
    """A kind of attention that is NSA but for what the selected branch reads."""

    has_loss = False

    def parameters(self, config: NSALayerConfig, embed_dim: int) -> dict[str, Parameter]:
        """Parameters of the design itself, beside those of NSA."""
        return {}

    def own(
        self,
        parameters: Mapping[str, Array],
        x: Float[Array, "B T E"],
        segment_ids: Int[Array, "B T"] | None,
        config: NSALayerConfig,
    ) -> dict[str, Array]:
        """What the design makes of the layer's input."""
        return {}

    @abc.abstractmethod
    def attend(self, choice: Choice, config: NSALayerConfig) -> Float[Array, "B T H Dv"]:
        """Attention to what is chosen. No gradient flows through the choice."""

    @abc.abstractmethod
    def tokens_read(
        self, choice: Choice, positions: Int[Array, " S"], config: NSALayerConfig
    ) -> Bool[Array, "B N S T"]:
        """The tokens that the queries at some positions read, for each K/V head (N = K) or each query head (N = H)."""

    def imbalance(self, choice: Choice, config: NSALayerConfig) -> Float[Array, "B K"]:
        """The fullest of the units that are stored and read together over the mean of them: 1 for blocks and tokens."""
        return jnp.ones((choice.q.shape[0], choice.kv.slc_k.shape[2]))

    def loss(self, choice: Choice, config: NSALayerConfig) -> Float[Array, "B K"]:
        """With `has_loss`, a mean over the tokens of each row and K/V head, whose mean the layer leaves as its loss."""
        raise NotImplementedError

    def numbers_read_to_choose(self, config: ModelConfig, length: int) -> int:
        """Numbers that a group reads to choose for the last of `length` tokens, besides the compressed tokens."""
        return 0

    def layer(self, config: ModelConfig, **common: Any) -> Any:
        """The layer with its three branches."""
        name = common.pop("name")
        layer = NSALayerConfig(
            **common,
            config=config.nsa,
            compression=config.compression,
            share_kv=config.share_kv,
            tie_keys=config.tie_keys,
            implementation=config.implementation,
        )
        return ChoosingLayer(layer, self, name=name)

    def decoded_bytes(
        self, config: ModelConfig, length: int, union: float = 1.0, kv_dtype: KVDtype | None = None
    ) -> float:
        """What NSA reads, with the selected branch's part times `union`, and what is read to choose."""
        return super().decoded_bytes(config, length, union, kv_dtype) + (
            self.numbers_read_to_choose(config, length) * itemsize(config)
        )


class ChoosingBlocks(Choosing):
    """A kind that chooses blocks, as NSA does."""

    @abc.abstractmethod
    def blocks(self, choice: Choice, config: NSALayerConfig) -> Int[Array, "B N T n"]:
        """The blocks that every query reads, as from `nsa_jax.select_blocks`; N is K, or H for blocks of each head."""

    def attend(self, choice: Choice, config: NSALayerConfig) -> Float[Array, "B T H Dv"]:
        """`nsa_jax.selected_attention` to the blocks. For blocks of each head, every head has its keys to itself."""
        indices = self.blocks(jax.lax.stop_gradient(choice), config)
        k, v = (repeated(x, indices.shape[1]) for x in (choice.kv.slc_k, choice.kv.slc_v))
        return sharded(selected_attention, **config.mesh_axes)(
            choice.q,
            k,
            v,
            indices,
            config=config.config,
            segment_ids=choice.segment_ids,
            implementation=config.implementation,
        )

    def tokens_read(
        self, choice: Choice, positions: Int[Array, " S"], config: NSALayerConfig
    ) -> Bool[Array, "B N S T"]:
        """The tokens of the blocks that the queries see."""
        key = jnp.arange(choice.q.shape[1], dtype=jnp.int32)
        indices = self.blocks(choice, config)[:, :, positions]
        block = (key // config.config.select_block)[None, None, None, None, :]
        return jnp.any(indices[..., None] == block, axis=3) & seen_tokens(positions, choice.starts[:, positions], key)


class ChoosingLayer(nn.Module):
    """`nsa_jax.NSAttention` but for what its selected branch reads. The parameters of NSA have the same names."""

    config: NSALayerConfig
    kind: Choosing

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T E"]:
        """Attention output; leaves the design's loss and, among "intermediates", its `Selection`."""
        described = nsa_parameters(self.config, x.shape[2]) | self.kind.parameters(self.config, x.shape[2])
        parameters: dict[str, Any] = {
            name: self.param(name, nn.with_logical_partitioning(p.init, p.axes), p.shape, jnp.float32)
            for name, p in described.items()
        }
        measured = self.is_mutable_collection("intermediates")
        y, loss, selection = _layer(
            parameters,
            x,
            config=self.config,
            kind=self.kind,
            segment_ids=segment_ids,
            learning=self.is_mutable_collection(LOSSES),
            measured=measured,
        )
        if loss is not None:
            leave_loss(self, loss)
        if measured:
            self.sow("intermediates", "selection", selection)
        return y


@layer_on_mesh(lambda arguments: (split_like(arguments["x"]), PartitionSpec(), PartitionSpec()))
def _layer(
    parameters: Mapping[str, Array],
    x: Float[Array, "B T E"],
    *,
    config: NSALayerConfig,
    kind: Choosing,
    segment_ids: Int[Array, "B T"] | None,
    learning: bool,
    measured: bool,
) -> tuple[Float[Array, "B T E"], Float[Array, ""] | None, Selection | None]:
    """`nsa_jax.layer.nsa_layer` with another choice; the design's loss, if `learning`; its selection, if `measured`."""
    x, weights = layer_inputs(x, parameters, config)
    inputs = nsa_layer_inputs(weights, x, config=config, segment_ids=segment_ids)
    q, kv, gates, segment_ids, _ = inputs
    options: dict[str, Any] = {
        "config": config.config,
        "segment_ids": segment_ids,
        "implementation": config.implementation,
    }
    o_cmp, lse = sharded(compressed_attention, **config.mesh_axes)(q, kv.cmp_k, kv.cmp_v, **options)
    o_win = None
    if config.config.window:
        o_win = sharded(window_attention, **config.mesh_axes)(q, kv.win_k, kv.win_v, **options)
    starts = jnp.zeros(x.shape[:2], jnp.int32) if segment_ids is None else segment_starts(segment_ids)
    choice = Choice(q, kv, lse, starts, segment_ids, kind.own(parameters, x, segment_ids, config))
    o_slc = _on_each_device(kind.attend, choice, config, _TOKENS)
    y = join_heads(gated_sum(gates, o_cmp, o_slc, o_win), weights, config)
    loss = _on_each_device(kind.loss, choice, config, _ROWS_AND_HEADS).mean() if learning and kind.has_loss else None
    return y, loss, measured_selection(kind, choice, inputs, config) if measured else None


# How arrays are split over the mesh: rows as "batch", K/V heads with their groups as "heads".
_TOKENS = PartitionSpec("batch", None, "heads", None)
_ROWS_AND_HEADS = PartitionSpec("batch", "heads")
_SPLITS = {
    "q": _TOKENS,
    "kv": _TOKENS,
    "lse": PartitionSpec("batch", "heads", None),
    "starts": PartitionSpec("batch", None),
    "segment_ids": PartitionSpec("batch", None),
    "own": _TOKENS,
}


def _on_each_device(
    f: Callable[[Choice, NSALayerConfig], Array], choice: Choice, config: NSALayerConfig, results: PartitionSpec
) -> Array:
    """f(choice, config), where every device of the mesh in context has its rows and heads. Nothing is sent."""
    axes = {"batch": free_axes(config.batch_axes), "heads": free_axes(config.head_axes)}
    if not any(axes.values()):
        return f(choice, config)

    def placed(split: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*(name and (axes[name] or None) for name in split))

    splits: dict[str, Any] = {name: placed(split) for name, split in _SPLITS.items()}
    run = jax.shard_map(
        lambda choice: f(choice, config),
        in_specs=(Choice(**splits),),
        out_specs=placed(results),
        axis_names=manual_axes(sum(axes.values(), ()), jax.sharding.get_abstract_mesh()),
        check_vma=False,  # the kernels inside do not say over which axes their outputs vary
    )
    return jax.jit(run)(choice)  # outside of jit, `shard_map` knows no Auto axes


def measured_selection(kind: Choosing, choice: Choice, inputs: AttentionInputs, config: NSALayerConfig) -> Selection:
    """How a layer selects, at `sampled_positions`; `inputs` are those that NSA would give to the attention."""
    positions = sampled_positions(choice.q.shape[1])

    def read(choice: Choice, config: NSALayerConfig) -> Array:
        return kind.tokens_read(choice, positions, config)

    tokens = _on_each_device(read, choice, config, PartitionSpec("batch", "heads", None, None))
    B, N, S, T = tokens.shape
    K = choice.kv.slc_k.shape[2]
    by_head = tokens.reshape(B, K, N // K, S, T)
    together = jnp.any(by_head, axis=2).sum(axis=(0, 2, 3))
    union = together * (N // K) / by_head.sum(axis=(0, 2, 3, 4))
    recall = selection_recall(inputs, config.config, positions, tokens=tokens)
    imbalance = _on_each_device(kind.imbalance, choice, config, _ROWS_AND_HEADS).mean(axis=0)
    return Selection(recall, union, imbalance)


def sampled_positions(length: int) -> Int[Array, " S"]:
    """The queries of a row at which a selection is measured."""
    return jnp.asarray(np.linspace(length // 2, length - 1, QUERIES), jnp.int32)
