"""The oracle: every op from its equation, with plain masks, in float32 or float64. Memory is quadratic in T.

The functions are those of a backend (see `nsa_jax.backends`). Their contracts are in `pallas_kernels.<op>.contract`.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nsa_jax.cache import appended_gates, appended_heads, next_compressed, read_pages
from nsa_jax.config import NSAConfig
from nsa_jax.finite import finite_part, is_finite
from nsa_jax.precision import wide_dtype
from nsa_jax.quantization import as_held
from nsa_jax.visibility import (
    QueryOffset,
    blocks_scored,
    choose_blocks,
    compressed_visible,
    gated_sum,
    pool_importance,
    starts_or_zeros,
)
from pallas_kernels.append_tokens.contract import Gates, Heads, Places
from pallas_kernels.quantized import Quantized

HIGHEST = jax.lax.Precision.HIGHEST


def compressed_attention(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B Nc K Dk"],
    v: Float[Array, "B Nc K Dv"],
    starts: Int[Array, "B Tq"] | None,
    query_offset: QueryOffset,
    *,
    config: NSAConfig,
    scale: float,
) -> tuple[Float[Array, "B Tq H Dv"], Float[Array, "B H Tq"]]:
    """Attention to the compressed tokens: (o [B, T, H, Dv], lse [B, H, T])."""
    starts = starts_or_zeros(starts, q)
    positions = _positions(q, query_offset)
    visible = compressed_visible(positions, starts, k.shape[1], config)
    return masked_attention(q, k, v, visible[:, None], scale)


def select_blocks(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B Nc K Dk"],
    lse: Float[Array, "B H Tq"],
    starts: Int[Array, "B Tq"] | None,
    query_offset: QueryOffset,
    *,
    config: NSAConfig,
    scale: float,
) -> Int[Array, "B K Tq n"]:
    """The n blocks of highest importance (equations 11 and 12)."""
    starts = starts_or_zeros(starts, q)
    importance = block_importance(q, k, lse, starts, query_offset, config=config, scale=scale)
    return choose_blocks(importance, _positions(q, query_offset), starts, config)


def block_importance(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B Nc K Dk"],
    lse: Float[Array, "B H Tq"],
    starts: Int[Array, "B Tq"] | None,
    query_offset: QueryOffset,
    *,
    config: NSAConfig,
    scale: float,
) -> Float[Array, "B K Tq Nb"]:
    """Importance of every block, before any is forced or ruled out (equations 8 to 10)."""
    starts = starts_or_zeros(starts, q)
    B, T, H, _ = q.shape
    _, Nc, K, _ = k.shape
    visible = compressed_visible(_positions(q, query_offset), starts, Nc, config)[:, None, None]
    lse = lse.reshape(B, K, H // K, T, 1)
    p = jnp.exp(jnp.where(visible, _logits(q, k, scale) - jnp.where(visible, lse, 0), -jnp.inf))
    return pool_importance(p.sum(axis=2), blocks_scored(Nc, config), config)


def selected_attention(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    block_indices: Int[Array, "B K Tq n"],
    starts: Int[Array, "B Tq"] | None,
    query_offset: QueryOffset,
    *,
    config: NSAConfig,
    scale: float,
) -> tuple[Float[Array, "B Tq H Dv"], Float[Array, "B H Tq"]]:
    """Attention to the tokens of the selected blocks up to the query's own: (o [B, T, H, Dv], lse [B, H, T])."""
    starts = starts_or_zeros(starts, q)
    positions = _positions(q, query_offset)
    key = jnp.arange(k.shape[1], dtype=jnp.int32)
    visible = _causal(positions, starts, key)[:, None]
    chosen = jnp.any(block_indices[..., None] == (key // config.select_block)[None, None, None, None, :], axis=3)
    return masked_attention(q, k, v, visible & chosen, scale)


def window_attention(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    starts: Int[Array, "B Tq"] | None,
    query_offset: QueryOffset,
    *,
    config: NSAConfig,
    scale: float,
) -> tuple[Float[Array, "B Tq H Dv"], Float[Array, "B H Tq"]]:
    """Attention to positions t - w + 1 .. t: (o [B, T, H, Dv], lse [B, H, T])."""
    starts = starts_or_zeros(starts, q)
    positions = _positions(q, query_offset)
    key = jnp.arange(k.shape[1], dtype=jnp.int32)
    near = key[None, :] > positions[:, None] - config.window
    return masked_attention(q, k, v, (_causal(positions, starts, key) & near[None])[:, None], scale)


def decode_attention(
    q: Float[Array, "B m H Dk"],
    cmp_k: Float[Array, "P K s/d Dk"] | Quantized,
    cmp_v: Float[Array, "P K s/d Dv"] | Quantized,
    slc_k: Float[Array, "P K s Dk"] | Quantized,
    slc_v: Float[Array, "P K s Dv"] | Quantized,
    win_k: Float[Array, "B W K Dk"],
    win_v: Float[Array, "B W K Dv"],
    gates: Float[Array, "B m H 3"],
    query_offsets: Int[Array, " B"],
    lengths: Int[Array, " B"],
    block_tables: Int[Array, "B N"],
    *,
    config: NSAConfig,
    scale: float,
) -> tuple[Float[Array, "B m H Dv"], Int[Array, "B K m n"]]:
    """All branches of a few queries of each row over a cache: (o [B, m, H, Dv], block_indices [B, K, m, n]).

    This copies everything that a row has into one sequence and calls the functions above.
    """
    positions = jnp.arange(block_tables.shape[1] * config.select_block, dtype=jnp.int32)

    def one_row(
        q: Array, win_k: Array, win_v: Array, gates: Array, offset: Array, length: Array, table: Array
    ) -> tuple[Array, Array]:
        sizes: dict[str, Any] = {"config": config, "scale": scale}
        k, v = (read_pages(pool, table[None], next_compressed(length[None], config)) for pool in (cmp_k, cmp_v))
        o_cmp, lse = compressed_attention(q[None], k, v, None, offset, **sizes)
        o_slc = o_win = None
        indices = jnp.zeros((1, k.shape[2], q.shape[0], 0), jnp.int32)
        if config.num_selected:
            indices = select_blocks(q[None], k, lse, None, offset, **sizes)
            keys, values = (read_pages(pool, table[None], length[None]) for pool in (slc_k, slc_v))
            o_slc, _ = selected_attention(q[None], keys, values, indices, None, offset, **sizes)
        if config.window:
            # Positions that the ring no longer holds are outside the window.
            recent_keys, recent_values = (
                jnp.where((positions < length)[None, :, None, None], ring[None, positions % ring.shape[0]], 0)
                for ring in (win_k, win_v)
            )
            o_win, _ = window_attention(q[None], recent_keys, recent_values, None, offset, **sizes)
        return gated_sum(gates[None], o_cmp, o_slc, o_win)[0], indices[0]

    return jax.vmap(one_row)(q, win_k, win_v, gates, query_offsets, lengths, block_tables)


def append_tokens(
    q: Heads | None,
    pooled_k: Heads,
    pooled_v: Heads,
    selected_k: Heads,
    selected_v: Heads,
    window_k: Heads,
    window_v: Heads,
    finished_k: Float[Array, "B C K Dk"] | None,
    finished_v: Float[Array, "B C K Dv"] | None,
    rotation: tuple[Float[Array, "B m Dk/2"], Float[Array, "B m Dk/2"]] | None,
    gates: Gates | None,
    places: Places,
    lengths: Int[Array, " B"],
    num_tokens: Int[Array, " B"],
    block_tables: Int[Array, "B N"],
    *,
    config: NSAConfig,
    num_heads: int,
) -> tuple[Float[Array, "B m H Dk"] | None, Float[Array, "B m H 3"] | None, Places]:
    """Rotated queries, gates, and a cache's arrays with new tokens and with the compressed tokens that they finish.

    This asks of every place which of the tokens it shall hold.
    """
    (B, m), P = pooled_k.array.shape[:2], places.cmp_k.shape[0]
    new = (pooled_k, pooled_v, selected_k, selected_v, window_k, window_v)
    rotated, tokens = appended_heads(q, new, rotation, places, num_heads)
    l, d, s = config.compress_block, config.compress_stride, config.select_block  # noqa: E741
    ends = lengths + num_tokens
    number = jnp.arange(m, dtype=jnp.int32)[None, :]
    positions = jnp.where(number < num_tokens[:, None], lengths[:, None] + number, -1)  # [B, m]
    which = jnp.arange(-(-m // d), dtype=jnp.int32)[None, :]
    starts = (next_compressed(lengths, config)[:, None] + which) * d  # of compressed tokens, [B, C]

    def in_pages(pool: Any, values: Array, positions: Array) -> Any:
        """Values [B, n, K, D] of what starts at positions [B, n], which are -1 for none."""
        values = as_held(values, pool)
        stride = s // pool.shape[2]
        start = jnp.arange(s // stride, dtype=jnp.int32) * stride
        blocks = jnp.arange(block_tables.shape[1], dtype=jnp.int32)
        for b, i in itertools.product(range(B), range(values.shape[1])):
            page = jnp.arange(P, dtype=jnp.int32)[:, None]
            holds = (block_tables[b][None, :] == page) & (blocks == positions[b, i] // s)[None, :]  # [P, N]
            here = jnp.any(holds, axis=1)[:, None] & (start == positions[b, i] % s)[None, :] & (positions[b, i] >= 0)
            new = jax.tree.map(lambda x: x[b, i][None, :, None, :], values)  # noqa: B023, called at once
            pool = jax.tree.map(lambda x, old: jnp.where(here[:, None, :, None], x, old), new, pool)  # noqa: B023
        return pool

    def in_ring(ring: Array, values: Array) -> Array:
        slots = jnp.arange(ring.shape[1], dtype=jnp.int32)[None, :]
        for i in range(m):
            position = positions[:, i, None]
            here = (slots == position % ring.shape[1]) & (position >= 0)
            ring = jnp.where(here[:, :, None, None], values[:, i, None], ring)
        return ring

    def mean(tail: Array, x: Array) -> Array:
        """Of the l tokens from each start on."""
        entries = starts[:, :, None] + jnp.arange(l, dtype=jnp.int32)[None, None, :]
        rows = jnp.arange(B, dtype=jnp.int32)[:, None, None]
        new = x[rows, jnp.clip(entries - lengths[:, None, None], 0, m - 1)]
        old = tail[rows, entries % tail.shape[1]]
        each = jnp.where((entries < lengths[:, None, None])[..., None, None], old, new)
        return jnp.mean(each.astype(wide_dtype(x.dtype)), axis=2).astype(x.dtype)

    finished = jnp.where(starts + l <= ends[:, None], starts, -1)
    cmp_k = mean(places.tail_k, tokens[0]) if finished_k is None else finished_k
    cmp_v = mean(places.tail_v, tokens[1]) if finished_v is None else finished_v
    selects = config.num_selected > 0
    return (
        rotated,
        appended_gates(gates),
        Places(
            slc_k=in_pages(places.slc_k, tokens[2], positions) if selects else places.slc_k,
            slc_v=in_pages(places.slc_v, tokens[3], positions) if selects else places.slc_v,
            cmp_k=in_pages(places.cmp_k, cmp_k, finished),
            cmp_v=in_pages(places.cmp_v, cmp_v, finished),
            tail_k=in_ring(places.tail_k, tokens[0]),
            tail_v=in_ring(places.tail_v, tokens[1]),
            win_k=in_ring(places.win_k, tokens[4]) if config.window else places.win_k,
            win_v=in_ring(places.win_v, tokens[5]) if config.window else places.win_v,
        ),
    )


def masked_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S K Dk"],
    v: Float[Array, "B S K Dv"],
    mask: Bool[Array, " B #K T S"],
    scale: float,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
    """Softmax attention under a mask, and the natural logarithm of the softmax's sum.

    A row with an empty mask gives output 0 and lse = -inf, with zero gradients. A row that sees a number that is not
    finite gives NaN, with zero gradients; to the others it is as if the number were not there (`nsa_jax.finite`).
    """
    B, T, H, _ = q.shape
    K = k.shape[2]
    mask = mask[:, :, None]
    finite_key = jnp.moveaxis(is_finite(k) & is_finite(v), 2, 1)[:, :, None, None, :]
    finite_query = jnp.moveaxis(is_finite(q), 2, 1).reshape(B, K, H // K, T, 1)
    q, k, v = finite_part(q), finite_part(k), finite_part(v)
    logits = jnp.where(finite_key & finite_query, _logits(q, k, scale), jnp.nan)
    logits = jnp.where(mask, logits, -jnp.inf)
    lost = ~jnp.all(logits < jnp.inf, axis=-1, keepdims=True)  # the maximum of numbers and NaN may be a number
    logits = jnp.where(lost, -jnp.inf, logits)
    highest = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    highest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(highest), highest, 0))
    p = jnp.exp(logits - highest)
    total = p.sum(axis=-1, keepdims=True)
    empty = total == 0
    safe = jnp.where(empty, 1, total)
    weights = jnp.where(mask, p / safe, 0)  # the gradient of what is masked may be infinite
    o = jnp.einsum("bkgts,bskd->bkgtd", weights, v.astype(p.dtype), precision=HIGHEST)
    o = jnp.moveaxis(jnp.where(lost, jnp.nan, o), 3, 1)
    lse = jnp.where(lost, jnp.nan, jnp.where(empty, -jnp.inf, jnp.log(safe) + highest))
    return o.reshape(B, T, H, v.shape[-1]).astype(q.dtype), lse.reshape(B, H, T)


def _logits(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], scale: float) -> Float[Array, "B K G T S"]:
    """Scaled scores, at least in float32."""
    B, T, H, D = q.shape
    K = k.shape[2]
    dtype = wide_dtype(q.dtype)
    q = q.astype(dtype).reshape(B, T, K, H // K, D)
    return jnp.einsum("btkgd,bskd->bkgts", q, k.astype(dtype), precision=HIGHEST) * scale


def _positions(q: Float[Array, "B T H D"], query_offset: QueryOffset) -> Int[Array, " T"]:
    return query_offset + jnp.arange(q.shape[1], dtype=jnp.int32)


def _causal(positions: Int[Array, " T"], starts: Int[Array, "B T"], key: Int[Array, " S"]) -> Bool[Array, "B T S"]:
    """Keys of the query's segment up to its own position."""
    return (key[None, None, :] <= positions[None, :, None]) & (key[None, None, :] >= starts[:, :, None])
