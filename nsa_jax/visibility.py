"""Which query sees which keys: the index arithmetic that the implementations share. All indices are 0-based.

Segments are runs of equal ids. One number therefore says what a query at position t may see: `starts`, the
position of the first token of its segment. The query sees keys at positions starts .. t, and the compressed tokens and
blocks that follow from these.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nsa_jax.config import NSAConfig
from nsa_jax.finite import finite_part
from nsa_jax.precision import wide_dtype

QueryOffset = int | Int[Array, ""]  # position of the first query


def segment_starts(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of the first token of each token's segment, int32."""
    positions = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None, :]
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)


def segment_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each token within its segment, int32."""
    return jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None, :] - segment_starts(segment_ids)


def starts_or_zeros(starts: Int[Array, "B T"] | None, q: Float[Array, "B T H D"]) -> Int[Array, "B T"]:
    """Without segments, every query's segment starts at 0."""
    return jnp.zeros(q.shape[:2], jnp.int32) if starts is None else starts


def compressed_visible(
    positions: Int[Array, " T"], starts: Int[Array, "B T"], num_compressed: int, config: NSAConfig
) -> Bool[Array, "B T Nc"]:
    """Compressed token i is visible iff all its tokens, i d .. i d + l - 1, lie in starts .. t."""
    first = jnp.arange(num_compressed, dtype=jnp.int32)[None, None, :] * config.compress_stride
    last = first + config.compress_block - 1
    return (first >= starts[:, :, None]) & (last <= positions[None, :, None])


def overlap_weights(config: NSAConfig) -> tuple[int, list[int]]:
    """How compressed scores are pooled into block scores: imp_j = sum_r weights[r] p[j s/d + first + r].

    A weight is c(i, j), the number of strides (of d tokens) that compressed token i and block j share. For l, d, s =
    32, 16, 64 the result is first = -1 and weights 1, 2, 2, 2, 1. (This is equation 9 of the paper, read 0-based.)
    """
    per_token = config.compress_block // config.compress_stride
    per_block = config.select_block // config.compress_stride
    first = 1 - per_token
    return first, [min(i + per_token, per_block) - max(i, 0) for i in range(first, per_block)]


def pool_importance(p: Float[Array, "*rows Nc"], num_blocks: int, config: NSAConfig) -> Float[Array, "*rows Nb"]:
    """Importance of selection blocks from the (group-summed) probabilities of compressed tokens (equations 9 and 10).

    The weighted terms are added one by one and in order, so that equal probabilities give exactly equal importance.
    """
    first, weights = overlap_weights(config)
    per_block = config.select_block // config.compress_stride
    width = per_block * num_blocks + len(weights)
    rows = [(0, 0)] * (p.ndim - 1)
    p = jnp.pad(p, [*rows, (-first, max(0, width + first - p.shape[-1]))])
    pooled = jnp.zeros((*p.shape[:-1], num_blocks), p.dtype)
    for tap, weight in enumerate(weights):
        pooled = pooled + weight * p[..., tap : tap + per_block * num_blocks : per_block]
    return pooled


def blocks_scored(num_compressed: int, config: NSAConfig) -> int:
    """Blocks of the longest sequence that has `num_compressed` compressed tokens; at least 1."""
    longest = num_compressed * config.compress_stride + config.compress_block - 1
    return max(1, -(-longest // config.select_block))


def candidate_blocks(
    positions: Int[Array, " T"], starts: Int[Array, "B T"], num_blocks: int, config: NSAConfig
) -> tuple[Bool[Array, "B T Nb"], Bool[Array, "B T Nb"]]:
    """The blocks that a query may read, from the first of its segment to its own, and the forced ones of them.

    Without `select_in_window`, a block that is not forced has to begin before the query's window.
    """
    block = jnp.arange(num_blocks, dtype=jnp.int32)[None, None, :]
    own = (positions // config.select_block)[None, :, None]
    first = (starts // config.select_block)[:, :, None]
    candidate = (block >= first) & (block <= own)
    forced = candidate & ((block < first + config.num_init) | (block > own - config.num_local))
    if not config.select_in_window:
        candidate &= forced | (block * config.select_block <= positions[None, :, None] - config.window)
    return candidate, forced


def choose_blocks(
    importance: Float[Array, "B K T Nb"],
    positions: Int[Array, " T"],
    starts: Int[Array, "B T"],
    config: NSAConfig,
) -> Int[Array, "B K T n"]:
    """The n best blocks, forced ones included: ascending, ties to the lower index, -1 where candidates run out."""
    candidate, forced = candidate_blocks(positions, starts, importance.shape[-1], config)
    score = jnp.where(forced[:, None], jnp.inf, jnp.where(candidate[:, None], importance, -jnp.inf))
    missing = max(0, config.num_selected - score.shape[-1])
    score = jnp.pad(score, ((0, 0),) * 3 + ((0, missing),), constant_values=-jnp.inf)
    best, indices = jax.lax.top_k(score, config.num_selected)
    none = jnp.iinfo(jnp.int32).max
    indices = jnp.sort(jnp.where(best > -jnp.inf, indices.astype(jnp.int32), none), axis=-1)
    return jnp.where(indices == none, -1, indices)


def gated_sum(
    gates: Float[Array, "B T H 3"],
    o_cmp: Float[Array, "B T H Dv"],
    o_slc: Float[Array, "B T H Dv"] | None,
    o_win: Float[Array, "B T H Dv"] | None,
) -> Float[Array, "B T H Dv"]:
    """The sum of the branches' outputs, each times its gate (equation 5). It is summed in float32 at least.

    None stands for a branch that there is not; its gate is not read. What is not finite makes the sum NaN and sends no
    gradient (`nsa_jax.finite`).
    """
    branches = [(gates[..., i : i + 1], o) for i, o in enumerate((o_cmp, o_slc, o_win)) if o is not None]
    wide = wide_dtype(o_cmp.dtype)
    finite = functools.reduce(jnp.logical_and, (jnp.isfinite(gate) & jnp.isfinite(o) for gate, o in branches))
    parts = (finite_part(gate.astype(wide)) * finite_part(o).astype(wide) for gate, o in branches)
    return jnp.where(finite, functools.reduce(jnp.add, parts), jnp.nan).astype(o_cmp.dtype)
