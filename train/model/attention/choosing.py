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
from nsa_jax.config import NSAConfig, num_blocks
from nsa_jax.explicit import split_like
from nsa_jax.layer import (
    NSALayerConfig,
    Parameter,
    join_heads,
    layer_inputs,
    layer_on_mesh,
    nsa_layer_inputs,
    nsa_parameters,
)
from nsa_jax.selection import SelectionRecall, probabilities, selection_recall
from nsa_jax.sharding import sharded
from nsa_jax.visibility import candidate_blocks, choose_blocks, gated_sum, segment_starts
from nsa_jax.xla import map_query_chunks, masked_attention
from train.config import ModelConfig, TrainConfig
from train.model.attention.kind import Split, itemsize
from train.model.attention.nsa import NSA
from train.model.auxiliary import LOSSES, leave_loss

QUERIES = 64  # of a row, evenly over its second half, at which a selection is measured
# The most scores of one chunk of queries. It is larger than in `nsa_jax.xla`: a query here may score all tokens.
CHUNK_ELEMENTS = 1 << 26


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


class Choosing(NSA):
    """A kind of attention that is NSA but for what the selected branch reads."""

    decodes = False

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

    def imbalance(self, choice: Choice, config: NSALayerConfig) -> Float[Array, " K"]:
        """The fullest of the units that are stored and read together over the mean of them: 1 for blocks and tokens."""
        return jnp.ones(choice.kv.slc_k.shape[2])

    def loss(self, choice: Choice, config: NSALayerConfig) -> Float[Array, ""] | None:
        """What is added to the objective for this layer, a mean over tokens; None: nothing."""
        return None

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

    def decoded_bytes(self, config: ModelConfig, length: int, union: float = 1.0) -> float:
        """What NSA reads, with the selected branch's part times `union`, and what is read to choose."""
        return super().decoded_bytes(config, length, union) + (
            self.numbers_read_to_choose(config, length) * itemsize(config)
        )

    def received_over_context(self, config: ModelConfig, split: Split) -> float:
        """Nothing: `check` refuses a split of the tokens."""
        return 0

    def received_again_over_context(self, config: ModelConfig, split: Split) -> float:
        """Nothing."""
        return 0

    def check(self, config: TrainConfig, mesh: Mapping[str, int]) -> None:
        """Rows must be whole."""
        if mesh["context"] > 1:
            name = ", ".join(config.model.pattern or (config.model.attention,))
            raise ValueError(f"mesh.context = {mesh['context']}: expected 1 with model.attention = {name}")


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
        return jnp.any(indices[..., None] == block, axis=3) & _seen(positions, choice.starts[:, positions], key)


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
    o_win = sharded(window_attention, **config.mesh_axes)(q, kv.win_k, kv.win_v, **options)
    starts = jnp.zeros(x.shape[:2], jnp.int32) if segment_ids is None else segment_starts(segment_ids)
    choice = Choice(q, kv, lse, starts, segment_ids, kind.own(parameters, x, segment_ids, config))
    y = join_heads(gated_sum(gates, o_cmp, kind.attend(choice, config), o_win), weights["o_kernel"])
    loss = kind.loss(choice, config) if learning else None
    return y, loss, measured_selection(kind, choice, inputs, config) if measured else None


def measured_selection(kind: Choosing, choice: Choice, inputs: AttentionInputs, config: NSALayerConfig) -> Selection:
    """How a layer selects, at `sampled_positions`; `inputs` are those that NSA would give to the attention."""
    positions = sampled_positions(choice.q.shape[1])
    tokens = kind.tokens_read(choice, positions, config)
    B, N, S, T = tokens.shape
    K = choice.kv.slc_k.shape[2]
    by_head = tokens.reshape(B, K, N // K, S, T)
    together = jnp.any(by_head, axis=2).sum(axis=(0, 2, 3))
    union = together * (N // K) / by_head.sum(axis=(0, 2, 3, 4))
    recall = selection_recall(inputs, config.config, positions, tokens=tokens)
    return Selection(recall, union, kind.imbalance(choice, config))


def sampled_positions(length: int) -> Int[Array, " S"]:
    """The queries of a row at which a selection is measured."""
    return jnp.asarray(np.linspace(length // 2, length - 1, QUERIES), jnp.int32)


def repeated(x: Float[Array, "B T K D"], heads: int) -> Float[Array, "B T N D"]:
    """Keys or values with each head as often in turn as makes `heads` of them."""
    return jnp.repeat(x, heads // x.shape[2], axis=2)


def seen_whole(
    positions: Int[Array, " C"], starts: Int[Array, "B C"], blocks: int, config: NSAConfig
) -> Bool[Array, "B C Nb"]:
    """The blocks of which a query sees every token. What is made of a whole block may score no other."""
    first = config.select_block * jnp.arange(blocks, dtype=jnp.int32)[None, None, :]
    last = first + config.select_block - 1
    return (first >= starts[:, :, None]) & (last <= positions[None, :, None])


def group_sum(q: Float[Array, "B T H D"], groups: int) -> Float[Array, "B T K D"]:
    """The sum of the queries of a group, in float32. Its product with a key is the sum of theirs."""
    B, T, H, D = q.shape
    return q.astype(jnp.float32).reshape(B, T, groups, H // groups, D).sum(axis=3)


def in_whole_blocks(x: Float[Array, "B T K D"], config: NSAConfig) -> Float[Array, "B Nb s K D"]:
    """Cut into blocks, the last one filled up with zeros."""
    B, T, K, D = x.shape
    blocks, s = num_blocks(T, config), config.select_block
    return jnp.pad(x, ((0, 0), (0, blocks * s - T), (0, 0), (0, 0))).reshape(B, blocks, s, K, D)


def accumulable(x: Float[Array, "B T K D"], config: NSAConfig) -> Float[Array, "B S K D"]:
    """Up to whole blocks, and in float32, so that the gradients of chunks are added up in it."""
    return in_whole_blocks(x.astype(jnp.float32), config).reshape(x.shape[0], -1, *x.shape[2:])


def product(equation: str, a: Array, b: Array) -> Float[Array, "..."]:
    """An einsum in float32, which is not rounded to TF32."""
    return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def blocks_of_highest_product(
    q: Float[Array, "B T K D"], k: Float[Array, "B Nb K D"], starts: Int[Array, "B T"], config: NSAConfig
) -> Int[Array, "B K T n"]:
    """The n blocks whose one key has the highest products with a group's one query, forced blocks included.

    A block is a candidate beyond the forced ones only if the query sees it whole.
    """

    def choose(positions: Array, q: Array, starts: Array) -> Array:
        score = product("bckd,bnkd->bkcn", q, k)
        whole = seen_whole(positions, starts, k.shape[1], config)[:, None]
        return jnp.moveaxis(choose_blocks(jnp.where(whole, score, -jnp.inf), positions, starts, config), 2, 1)

    elements = q.shape[0] * k.shape[1] * k.shape[2]
    return jnp.moveaxis(in_chunks(choose, elements, q, starts), 1, 2)


def attention_mass(
    positions: Int[Array, " C"],
    q: Float[Array, "B C H Dk"],
    starts: Int[Array, "B C"],
    k: Float[Array, "B S K Dk"],
) -> Float[Array, "B K C S"]:
    """The probability of every token up to a query's own in the softmax over all of them, summed over the group."""
    seen = _seen(positions, starts, jnp.arange(k.shape[1], dtype=jnp.int32))
    return probabilities(q, k, seen[:, None], q.shape[-1] ** -0.5).sum(axis=2)


def best_tokens(
    importance: Float[Array, "B K C S"], positions: Int[Array, " C"], starts: Int[Array, "B C"], config: NSAConfig
) -> Bool[Array, "B K C S"]:
    """The n s tokens of highest importance that a query reads, those of the forced blocks included.

    As in NSA, the tokens of the query's own block that come after it take up places and are not read. Ties go to the
    lower position. S is a multiple of s.
    """
    s, S = config.select_block, importance.shape[3]
    key = jnp.arange(S, dtype=jnp.int32)
    seen = _seen(positions, starts, key)
    _, forced = candidate_blocks(positions, starts, S // s, config)
    forced = jnp.repeat(forced, s, axis=2)[:, None]
    score = jnp.where(forced, jnp.inf, jnp.where(seen, importance, -jnp.inf))
    count = min(config.num_selected * s, S)
    threshold = jnp.sort(score, axis=-1)[..., S - count, None]
    above, equal = score > threshold, score == threshold
    places = count - above.sum(axis=-1, keepdims=True, dtype=jnp.int32)
    return (above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= places))) & seen


def _seen(positions: Int[Array, " C"], starts: Int[Array, "B C"], key: Int[Array, " S"]) -> Bool[Array, "B 1 C S"]:
    """The tokens of a query's segment up to its own."""
    return ((key[None, None, :] <= positions[None, :, None]) & (key[None, None, :] >= starts[:, :, None]))[:, None]


def attend_to_tokens(
    mask: Callable[[Array, Array, Array], Bool[Array, "B K C S"]],
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B S K Dk"],
    v: Float[Array, "B S K Dv"],
    starts: Int[Array, "B Tq"],
    query_offset: int | Int[Array, ""] = 0,
) -> Float[Array, "B Tq H Dv"]:
    """Attention under mask(positions [C], queries [B, C, H, Dk], starts [B, C]), a chunk of queries at a time.

    This scores every key: for training it costs no more than dense attention, and gathers nothing.
    """

    def attend(positions: Array, q: Array, starts: Array) -> Array:
        chosen = mask(positions, jax.lax.stop_gradient(q), starts)
        return masked_attention(q, k, v, chosen, q.shape[-1] ** -0.5)[0]

    return in_chunks(attend, q.shape[0] * q.shape[2] * k.shape[1], q, starts, query_offset=query_offset)


def in_chunks(
    f: Callable[..., Any], elements_per_query: int, *arrays: Array, query_offset: int | Int[Array, ""] = 0
) -> Any:
    """`nsa_jax.xla.map_query_chunks` in chunks of `CHUNK_ELEMENTS`."""
    chunk = max(1, min(arrays[0].shape[1], CHUNK_ELEMENTS // elements_per_query))
    return map_query_chunks(f, query_offset, elements_per_query, *arrays, chunk=chunk)
