"""Does the selection select? How much attention the chosen blocks hold, and a loss that teaches it to hold more.

The selected branch can only read what the compressed branch's scores choose for it. This module asks how well they
choose: of the attention that the selected branch's queries and keys would give to the whole past, how much lies in the
blocks that were chosen (`selection_recall`), and how far the scores are from that attention (`selection_loss`).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nsa_jax import arguments
from nsa_jax.attention import AttentionInputs, score_scale
from nsa_jax.config import NSAConfig, check_config, num_blocks
from nsa_jax.visibility import (
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
    positions = _checked(inputs, config, positions)
    scale = score_scale(inputs.q, scale)
    q, starts, kv = inputs.q[:, positions], _starts(inputs, positions), inputs.kv
    B, S, H, _ = q.shape
    T, K = kv.slc_k.shape[1:3]

    s, Nb = config.select_block, num_blocks(T, config)
    importance, _ = _importance(q, kv.cmp_k, positions, starts, Nb, config, scale)
    indices = choose_blocks(importance, positions, starts, config)  # [B, K, S, n]

    by_head = _attention(q, kv.slc_k, positions, starts, scale)
    block = jnp.arange(Nb, dtype=jnp.int32)[None, None, :]
    candidate, forced = candidate_blocks(positions, starts, Nb, config)
    free = candidate & ~forced
    mass = jnp.where(free[:, None], _mass_beyond_window(by_head, positions, config), 0)

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
        counted = _beyond_window(T, positions, config) & jnp.repeat(free, s, axis=2)[..., :T]
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


def selection_loss(
    inputs: AttentionInputs,
    config: NSAConfig,
    positions: Int[Array, " S"],
    *,
    scale: float | None = None,
) -> Float[Array, ""]:
    """The divergence of the importance of blocks from the attention that they get, for a sample of queries.

    For each query and K/V head it is KL(m || p) = sum_j m_j log(m_j / p_j), over the blocks j among which the scores
    decide. m_j is the mass of block j in the selected branch, as `selection_recall` counts it: the softmax of a query
    and all keys up to its own, summed over the block's keys before the window and over the heads of the group. p_j is
    the importance of the block (equations 8 to 10). Both are divided by their sum over these blocks, which are those
    that are not always read, begin before the window, and have a compressed token that the query sees. What lies inside
    the window is left out whatever `select_in_window` says: the window reads it anyway.

    The gradient goes through the importance alone: to the compressed keys and to the queries as they score them. The
    attention m is a target, through which no gradient flows. Nothing here grows with T squared; the largest array is
    float32 [B, H, S, T].

    Example:
      >>> from nsa_jax.testing import random_inputs
      >>> config = NSAConfig(compress_block=8, compress_stride=4, select_block=8, num_selected=4, window=16)
      >>> inputs = random_inputs(jax.random.key(0), config, T=128, num_heads=4, num_kv_heads=2, head_dim=8)
      >>> bool(selection_loss(inputs, config, jnp.arange(64, 128, 8)) > 0)
      True

    Args:
      inputs: of one layer, as from `nsa_jax.layer.nsa_layer_inputs`, for whole sequences (query_offset 0).
      config: sizes of the branches.
      positions: int32 [S], the queries to look at, ascending and each once.
      scale: see `nsa_attention`.

    Returns:
      A float32 number: the mean over rows, queries and K/V heads. A query without such blocks counts as 0.

    Raises:
      ValueError: an argument does not fit, or there is no selected branch.
    """
    positions = _checked(inputs, config, positions)
    scale, starts = score_scale(inputs.q, scale), _starts(inputs, positions)
    # Said to be unique, so that on GPUs the gradient is added up without a sort where it has to repeat bit for bit.
    q = inputs.q.at[:, positions].get(unique_indices=True, indices_are_sorted=True)
    Nb = num_blocks(inputs.kv.slc_k.shape[1], config)
    importance, scored = _importance(q, inputs.kv.cmp_k, positions, starts, Nb, config, scale)
    candidate, forced = candidate_blocks(positions, starts, Nb, dataclasses.replace(config, select_in_window=False))
    free = (candidate & ~forced & scored)[:, None]

    attention = _attention(*jax.lax.stop_gradient((q, inputs.kv.slc_k)), positions, starts, scale)
    mass = _mass_beyond_window(attention, positions, config)
    logits = jnp.log(jnp.maximum(importance, jnp.finfo(jnp.float32).tiny))
    return divergence(jnp.where(free, mass, 0), logits, free).mean()


def divergence(
    mass: Float[Array, "*N Nb"], logits: Float[Array, "*N Nb"], free: Bool[Array, "*N Nb"]
) -> Float[Array, "*N"]:
    """KL(mass / sum || softmax(logits)) over the free entries; 0 where there are none. Other entries have mass 0."""
    total = mass.sum(axis=-1, keepdims=True)
    target = mass / jnp.where(total > 0, total, 1)
    logits = jnp.where(free, logits, -jnp.inf)
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min))
    normaliser = jnp.exp(logits - highest).sum(axis=-1, keepdims=True)
    log_softmax = logits - highest - jnp.log(jnp.where(normaliser > 0, normaliser, 1))
    log_softmax = jnp.where(free, log_softmax, 0)
    return (jax.scipy.special.xlogy(target, target) - target * log_softmax).sum(axis=-1)


def _checked(inputs: AttentionInputs, config: NSAConfig, positions: Int[Array, " S"]) -> Int[Array, " S"]:
    """The positions as int32; ValueError for arguments that do not fit."""
    check_config(config, "num_selected")
    if not isinstance(inputs, AttentionInputs):
        raise ValueError(f"inputs = {type(inputs).__name__}: expected nsa_jax.AttentionInputs")
    positions = arguments.array("positions", positions)
    return arguments.integers("positions", positions, positions.shape[:1], "(S,)")


def _starts(inputs: AttentionInputs, positions: Int[Array, " S"]) -> Int[Array, "B S"]:
    """The position of the first token of each query's segment."""
    if inputs.segment_ids is None:
        return jnp.zeros((inputs.q.shape[0], positions.shape[0]), jnp.int32)
    return segment_starts(inputs.segment_ids)[:, positions]


def _importance(
    q: Float[Array, "B S H Dk"],
    k: Float[Array, "B Nc K Dk"],
    positions: Int[Array, " S"],
    starts: Int[Array, "B S"],
    blocks: int,
    config: NSAConfig,
    scale: float,
) -> tuple[Float[Array, "B K S Nb"], Bool[Array, "B S Nb"]]:
    """The importance of blocks (equations 8 to 10), and whether the query sees a compressed token of the block."""
    visible = compressed_visible(positions, starts, k.shape[1], config)
    p = probabilities(q, k, visible[:, None, None], scale).sum(axis=2)
    return pool_importance(p, blocks, config), pool_importance(visible.astype(jnp.int32), blocks, config) > 0


def _attention(
    q: Float[Array, "B S H Dk"],
    k: Float[Array, "B T K Dk"],
    positions: Int[Array, " S"],
    starts: Int[Array, "B S"],
    scale: float,
) -> Float[Array, "B K G S T"]:
    """The softmax of each query and all keys of its segment up to its own."""
    key = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None, :]
    causal = (key <= positions[None, :, None]) & (key >= starts[:, :, None])
    return probabilities(q, k, causal[:, None, None], scale)


def _beyond_window(T: int, positions: Int[Array, " S"], config: NSAConfig) -> Bool[Array, "1 S T"]:
    """The keys before a query's window."""
    return jnp.arange(T, dtype=jnp.int32)[None, None, :] <= positions[None, :, None] - config.window


def _mass_beyond_window(
    p: Float[Array, "B K G S T"], positions: Int[Array, " S"], config: NSAConfig
) -> Float[Array, "B K S Nb"]:
    """What a query gives to the keys of each block that lie before its window, summed over the group."""
    B, K, _, S, T = p.shape
    s, Nb = config.select_block, num_blocks(T, config)
    far = jnp.where(_beyond_window(T, positions, config)[:, None], p.sum(axis=2), 0)
    return jnp.pad(far, ((0, 0),) * 3 + ((0, Nb * s - T),)).reshape(B, K, S, Nb, s).sum(axis=-1)


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
    highest = jax.lax.stop_gradient(highest)
    p = jnp.exp(logits - highest)
    return p / jnp.maximum(p.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
