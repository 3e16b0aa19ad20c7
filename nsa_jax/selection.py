"""Does the selection select? How much attention the chosen blocks hold, beside random and the best possible blocks.

The selected branch can only read what the compressed branch's scores choose for it. This module asks how well they
choose: of the attention that the selected branch's queries and keys would give to the whole past, how much lies in the
blocks that were chosen.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nsa_jax import arguments
from nsa_jax.attention import AttentionInputs, score_scale
from nsa_jax.config import NSAConfig, check_config, num_blocks
from nsa_jax.visibility import (
    blocks_scored,
    candidate_blocks,
    choose_blocks,
    compressed_visible,
    pool_importance,
    segment_starts,
)


class SelectionRecall(NamedTuple):
    """Shares of the selected branch's attention mass beyond the window and the forced blocks, for each K/V head."""

    chosen: Float[Array, " K"]  # held by the blocks that the scores choose
    random: Float[Array, " K"]  # held, on average, by as many blocks chosen at random
    best: Float[Array, " K"]  # held by as many blocks chosen by that mass itself, for all heads of a group together
    beyond: Float[Array, " K"]  # of all the mass, what lies beyond the window and the forced blocks

    @property
    def skill(self) -> Float[Array, " K"]:
        """0 for a random choice, 1 for the best: (chosen - random) / (best - random)."""
        return (self.chosen - self.random) / (self.best - self.random)


def selection_recall(
    inputs: AttentionInputs,
    config: NSAConfig,
    positions: Int[Array, " S"],
    *,
    scale: float | None = None,
    tokens: Bool[Array, "B N S T"] | None = None,
) -> SelectionRecall:
    """The share of attention mass that the chosen blocks hold, for a sample of queries.

    The mass of a block is the softmax of a query and all keys of the selected branch up to the query's own (as if the
    branch read everything), summed over the block's keys and the heads of a group. What the query sees anyway does not
    count: the last `window` keys, and the blocks that are always read. Shares are sums of mass over sums of mass, so a
    query that attends to nothing that far away hardly counts. Memory grows with S T.

    Example:
      >>> from nsa_jax.testing import random_inputs
      >>> config = NSAConfig(compress_block=8, compress_stride=4, select_block=8, num_selected=4, window=16)
      >>> inputs = random_inputs(jax.random.key(0), config, T=128, num_heads=4, num_kv_heads=2, head_dim=8)
      >>> recall = selection_recall(inputs, config, jnp.arange(64, 128, 8))
      >>> bool((recall.chosen <= recall.best).all()), recall.random.shape
      (True, (2,))

    Args:
      inputs: of one layer, as `nsa_jax.tracing.trace_attention` finds them, for whole sequences (query_offset 0).
      config: sizes of the branches.
      positions: int32 [S], the queries to look at; those in their segment's first `window` tokens have no such mass.
      scale: see `nsa_attention`.
      tokens: bool [B, N, S, T], what another choice than NSA's reads, for each K/V head (N = K) or each query head
        (N = H). `random` and `best` are those of NSA's number of blocks for a group still, so that a choice of tokens,
        or of each head for itself, can be better than the best. None: NSA's own choice.

    Returns:
      Float32 arrays [K]; NaN where no query of the sample has anything beyond its window.
    """
    check_config(config, "num_selected")
    if not isinstance(inputs, AttentionInputs):
        raise ValueError(f"inputs = {type(inputs).__name__}: expected nsa_jax.AttentionInputs")
    positions = arguments.array("positions", positions)
    positions = arguments.integers("positions", positions, positions.shape[:1], "(S,)")
    q, kv = inputs.q[:, positions], inputs.kv
    B, S, H, _ = q.shape
    T, K = kv.slc_k.shape[1:3]
    scale = score_scale(inputs.q, scale)
    starts = jnp.zeros((B, S), jnp.int32)
    if inputs.segment_ids is not None:
        starts = segment_starts(inputs.segment_ids)[:, positions]

    Nc = kv.cmp_k.shape[1]
    visible = compressed_visible(positions, starts, Nc, config)[:, None, None]
    importance = pool_importance(
        probabilities(q, kv.cmp_k, visible, scale).sum(axis=2), blocks_scored(Nc, config), config
    )
    indices = choose_blocks(importance, positions, starts, config)  # [B, K, S, n]

    s, Nb = config.select_block, num_blocks(T, config)
    key = jnp.arange(T, dtype=jnp.int32)[None, None, :]
    causal = (key <= positions[None, :, None]) & (key >= starts[:, :, None])
    by_head = probabilities(q, kv.slc_k, causal[:, None, None], scale)  # [B, K, G, S, T]
    p = by_head.sum(axis=2)

    block = jnp.arange(Nb, dtype=jnp.int32)[None, None, :]
    candidate, forced = candidate_blocks(positions, starts, Nb, config)
    free = candidate & ~forced
    far = key <= positions[None, :, None] - config.window
    mass = jnp.pad(jnp.where(far[:, None], p, 0), ((0, 0),) * 3 + ((0, Nb * s - T),))
    mass = jnp.where(free[:, None], mass.reshape(B, K, S, Nb, s).sum(axis=-1), 0)

    is_chosen = (indices[..., None] == block[:, None, :, None, :]).any(axis=3) & free[:, None]
    count = is_chosen.sum(axis=-1)  # blocks that the query was free to choose
    descending = -jnp.sort(-mass, axis=-1)
    taken = jnp.arange(Nb)[None, None, None, :] < count[..., None]
    share = count / jnp.maximum(free.sum(axis=-1), 1)[:, None]

    def total(x: Float[Array, "B K S"]) -> Float[Array, " K"]:
        return x.sum(axis=(0, 2))

    held = jnp.where(is_chosen, mass, 0).sum(axis=-1)
    if tokens is not None:
        tokens = arguments.array("tokens", tokens)
        if tokens.dtype != bool or tokens.shape not in ((B, K, S, T), (B, H, S, T)):
            raise ValueError(f"tokens: {arguments.describe(tokens)}: expected bool [B, K or H, S, T] with T = {T}")
        counted = far & jnp.repeat(free, s, axis=2)[..., :T]
        read = tokens.reshape(B, K, -1, S, T) & counted[:, None, None]
        held = jnp.where(read, by_head, 0).sum(axis=(2, 4))
    all_mass = mass.sum(axis=-1)
    beyond = total(all_mass)
    return SelectionRecall(
        chosen=total(held) / beyond,
        random=total(all_mass * share) / beyond,
        best=total(jnp.where(taken, descending, 0).sum(axis=-1)) / beyond,
        beyond=beyond / (B * S * (H // K)),
    )


def probabilities(
    q: Float[Array, "B S H Dk"], k: Float[Array, "B N K Dk"], visible: Bool[Array, "#B #K #G S N"], scale: float
) -> Float[Array, "B K G S N"]:
    """Probabilities in float32 of each query over keys [B, N, K, Dk]; a query that sees no key has zeros."""
    B, S, H, Dk = q.shape
    K = k.shape[2]
    logits = jnp.einsum(
        "bskgd,bnkd->bkgsn",
        q.astype(jnp.float32).reshape(B, S, K, H // K, Dk),
        k.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    logits = jnp.where(visible, scale * logits, -jnp.inf)
    highest = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.finfo(jnp.float32).max)
    p = jnp.exp(logits - highest)
    return p / jnp.maximum(p.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
