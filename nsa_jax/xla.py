"""Pure JAX in chunks of queries: memory linear in T, differentiable, runs on any device.

The backward pass rematerialises each chunk of queries, so that the scores of only one chunk exist at a time. Keys and
values are held in float32 at least, so that their gradients are summed in float32 over the chunks. They are multiplied
in the dtype of the queries. What is not finite reaches only who sees it, see `nsa_jax.finite`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Array, Bool, Float, Int

from nsa_jax.cache import (
    NSACache,
    appended_gates,
    appended_heads,
    next_compressed,
    pooled_tokens,
    read_pages,
    write_nsa_tokens,
)
from nsa_jax.compression import compress
from nsa_jax.config import NSAConfig, num_blocks
from nsa_jax.finite import finite_part, is_finite
from nsa_jax.precision import wide_dtype
from nsa_jax.quantization import dequantize
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

CHUNK_ELEMENTS = 1 << 22  # the most scores, or gathered key elements, of one chunk of queries


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
    Nc = k.shape[1]
    keys = _keys(k, v)

    def attend(positions: Array, q: Array, starts: Array) -> tuple[Array, Array]:
        return _attend(q, keys, compressed_visible(positions, starts, Nc, config)[:, None], scale)

    o, lse = map_query_chunks(attend, query_offset, _elements(q.shape[0], q.shape[2], Nc), q, starts)
    return o, jnp.moveaxis(lse, 1, 2)


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
    """The n blocks of highest importance (equations 8 to 12)."""
    starts = starts_or_zeros(starts, q)
    B, _, H, _ = q.shape
    _, Nc, K, _ = k.shape

    def choose(positions: Array, q: Array, lse: Array, starts: Array) -> Array:
        visible = compressed_visible(positions, starts, Nc, config)[:, None, None]
        lse = jnp.moveaxis(lse, 1, 2).reshape(B, K, H // K, lse.shape[1], 1)
        p = jnp.exp(jnp.where(visible, _logits(q, k, scale) - jnp.where(visible, lse, 0), -jnp.inf))
        importance = pool_importance(p.sum(axis=2), blocks_scored(Nc, config), config)
        return jnp.moveaxis(choose_blocks(importance, positions, starts, config), 2, 1)

    chosen = map_query_chunks(choose, query_offset, _elements(B, H, Nc), q, jnp.moveaxis(lse, 2, 1), starts)
    return jnp.moveaxis(chosen, 1, 2)


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
    n, length = block_indices.shape[3], config.select_block
    blocks = num_blocks(k.shape[1], config)
    tail = blocks * length - k.shape[1]
    (B, _, K, Dk), Dv = k.shape, v.shape[-1]

    def in_blocks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, tail), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x, 2, 1).reshape(B, K, blocks, length, *x.shape[3:])

    blocked = Keys(*map(in_blocks, _keys(k, v)))
    gather = jax.vmap(jax.vmap(lambda x, index: x[index]))

    def attend(positions: Array, q: Array, indices: Array, starts: Array) -> tuple[Array, Array]:
        _, C, H, D = q.shape
        indices = jnp.moveaxis(indices, 1, 2)
        chosen = jnp.maximum(indices, 0)
        keys = Keys(*(gather(x, chosen).reshape(B * K * C, n * length, 1, *x.shape[4:]) for x in blocked))
        key = chosen[..., None] * length + jnp.arange(length, dtype=jnp.int32)[None, None, None, None, :]
        visible = (key <= positions[None, None, :, None, None]) & (key >= starts[:, None, :, None, None])
        visible = (visible & (indices >= 0)[..., None]).reshape(B * K * C, 1, 1, n * length)
        rows = jnp.moveaxis(q.reshape(B, C, K, H // K, D), 1, 2).reshape(B * K * C, 1, H // K, D)
        o, lse = _attend(rows, keys, visible, scale)
        o, lse = (
            jnp.moveaxis(x.reshape(B, K, C, H // K, *x.shape[3:]), 1, 2).reshape(B, C, H, *x.shape[3:])
            for x in (o, lse)
        )
        return o, lse

    elements = _elements(B, K, n, length, Dk + Dv)
    o, lse = map_query_chunks(attend, query_offset, elements, q, jnp.moveaxis(block_indices, 2, 1), starts)
    return o, jnp.moveaxis(lse, 1, 2)


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
    window = min(config.window, k.shape[1])
    # With as many queries as the window is wide, half of the scores that a chunk computes are used.
    chunk = min(q.shape[1], max(window, 64))
    before, after = window - 1, chunk  # the last chunk's padding rows may look past the end
    padded = [jnp.pad(x, ((0, 0), (before, after), *((0, 0),) * (x.ndim - 2))) for x in _keys(k, v)]

    def attend(positions: Array, q: Array, starts: Array) -> tuple[Array, Array]:
        span = positions.shape[0] + before
        keys = Keys(*(jax.lax.dynamic_slice_in_dim(x, positions[0], span, axis=1) for x in padded))
        key = positions[0] - before + jnp.arange(span, dtype=jnp.int32)
        near = (key[None, :] > positions[:, None] - window) & (key[None, :] <= positions[:, None])
        return _attend(q, keys, (near[None] & (key[None, None, :] >= starts[:, :, None]))[:, None], scale)

    o, lse = map_query_chunks(attend, query_offset, 0, q, starts, chunk=chunk)
    return o, jnp.moveaxis(lse, 1, 2)


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

    This copies each row's compressed tokens and selected blocks out of the pool, and no other page.
    """

    def one_row(
        q: Array, win_k: Array, win_v: Array, gates: Array, offset: Array, length: Array, table: Array
    ) -> tuple[Array, Array]:
        q, positions = q[None], offset + jnp.arange(q.shape[0], dtype=jnp.int32)
        k, v = (read_pages(pool, table[None], next_compressed(length[None], config)) for pool in (cmp_k, cmp_v))
        o_cmp, lse = compressed_attention(q, k, v, None, offset, config=config, scale=scale)
        o_slc = o_win = None
        indices = jnp.zeros((1, k.shape[2], q.shape[1], 0), jnp.int32)
        if config.num_selected:
            indices = select_blocks(q, k, lse, None, offset, config=config, scale=scale)
            o_slc = _attend_to_pages(q, slc_k, slc_v, indices[0], positions, length, table, scale)
        if config.window:
            # The ring's slots hold the positions that lead up to the last query's.
            ring, slot = win_k.shape[0], jnp.arange(win_k.shape[0], dtype=jnp.int32)
            key = positions[-1] - (positions[-1] - slot) % ring
            near = (key[None, :] > positions[:, None] - config.window) & (key[None, :] <= positions[:, None])
            near &= ((key >= 0) & (key < length))[None, :]
            o_win, _ = masked_attention(q, win_k[None], win_v[None], near[None, None], scale)
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
    """Rotated queries, gates, and a cache's arrays with new tokens and with the compressed tokens that they finish."""
    new = (pooled_k, pooled_v, selected_k, selected_v, window_k, window_v)
    rotated, tokens = appended_heads(q, new, rotation, places, num_heads)
    pooled, selected, window = ((tokens[i], tokens[i + 1]) for i in (0, 2, 4))

    def finished(given: Array | None, tail: Array, x: Array) -> Array:
        return compress(pooled_tokens(tail, x, lengths, config), config=config) if given is None else given

    compressed = finished(finished_k, places.tail_k, pooled[0]), finished(finished_v, places.tail_v, pooled[1])
    cache = NSACache(*places, lengths, block_tables)
    written = write_nsa_tokens(cache, pooled, compressed, selected, window, num_tokens, config=config)
    return rotated, appended_gates(gates), Places._make(written[: len(places)])


def _attend_to_pages(
    q: Float[Array, "1 m H Dk"],
    k: Float[Array, "P K s Dk"] | Quantized,
    v: Float[Array, "P K s Dv"] | Quantized,
    indices: Int[Array, "K m n"],
    positions: Int[Array, " m"],
    length: Int[Array, ""],
    table: Int[Array, " N"],
    scale: float,
) -> Float[Array, "1 m H Dv"]:
    """Selected attention of one row's queries. The blocks are found through the row's block table."""
    K, m, n = indices.shape
    s = k.shape[2]
    chosen = jnp.maximum(indices, 0)
    pages, heads = jnp.maximum(table[chosen], 0), jnp.arange(K)[:, None, None]
    gathered = jax.tree.map(lambda x: x[pages, heads].reshape(K * m, n * s, 1, x.shape[3]), (k, v))
    keys, values = map(dequantize, gathered)
    key = chosen[..., None] * s + jnp.arange(s, dtype=jnp.int32)[None, None, None, :]
    last = jnp.minimum(positions, length - 1)
    visible = (key <= last[None, :, None, None]) & (indices >= 0)[..., None]
    rows = jnp.moveaxis(q.reshape(m, K, -1, q.shape[-1]), 0, 1).reshape(K * m, 1, -1, q.shape[-1])
    o, _ = masked_attention(rows, keys, values, visible.reshape(K * m, 1, 1, n * s), scale)
    o = o.reshape(K, m, -1, v.shape[-1])
    return jnp.moveaxis(o, 0, 1).reshape(1, m, -1, v.shape[-1])


def masked_attention(
    q: Float[Array, "B C H Dk"],
    k: Float[Array, "B S K Dk"],
    v: Float[Array, "B S K Dv"],
    mask: Bool[Array, " B #K C S"],
    scale: float,
) -> tuple[Float[Array, "B C H Dv"], Float[Array, "B C H"]]:
    """Softmax attention under a mask, all queries at once, and its lse."""
    return _attend(q, _keys(k, v), mask, scale)


def map_query_chunks(
    f: Callable[..., Any],
    query_offset: QueryOffset,
    elements_per_query: int,
    *arrays: Array,
    chunk: int | None = None,
) -> Any:
    """Applies f(positions [C], *chunks of the arrays along axis 1) chunk by chunk, and joins the results on axis 1.

    A chunk holds as many queries as fit in `CHUNK_ELEMENTS`, unless `chunk` says how many.
    """
    T = arrays[0].shape[1]
    if chunk is None:
        most = min(T, max(16, CHUNK_ELEMENTS // max(elements_per_query, 1)))
        chunk = -(-T // -(-T // most))  # evened out over the chunks
    steps = -(-T // chunk)
    query_offset = jnp.asarray(query_offset, jnp.int32)
    if steps == 1:
        return f(query_offset + jnp.arange(T, dtype=jnp.int32), *arrays)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, steps * chunk - T), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], steps, chunk, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], steps * chunk, *x.shape[3:])[:, :T]

    def step(_: None, inputs: tuple[Array, ...]) -> tuple[None, Any]:
        begin, *chunks = inputs
        return None, f(begin + jnp.arange(chunk, dtype=jnp.int32), *chunks)

    begins = query_offset + chunk * jnp.arange(steps, dtype=jnp.int32)
    _, out = jax.lax.scan(jax.checkpoint(step), None, (begins, *map(split, arrays)))
    return jax.tree.map(join, out)


def _elements(*sizes: int) -> int:
    """The product of sizes. A symbolic one, of `jax.export`, counts as 1: chunks are then as large for every batch."""
    return math.prod(size for size in sizes if not is_symbolic_dim(size))


class Keys(NamedTuple):
    """Keys and values of which all numbers are finite, and which of the keys were so, in key and value."""

    k: Float[Array, "B S K Dk"]
    v: Float[Array, "B S K Dv"]
    finite: Bool[Array, "B S K"]


def _keys(k: Float[Array, "B S K Dk"], v: Float[Array, "B S K Dv"]) -> Keys:
    """Keys and values to be multiplied and accumulated, in float32 at least."""
    return Keys(_accumulable(finite_part(k)), _accumulable(finite_part(v)), is_finite(k) & is_finite(v))


def _attend(
    q: Float[Array, "B C H Dk"], keys: Keys, mask: Bool[Array, " B #K C S"], scale: float
) -> tuple[Float[Array, "B C H Dv"], Float[Array, "B C H"]]:
    """Masked softmax attention and its lse. An empty row gives 0 and -inf, with zero gradients.

    A row that sees a number that is not finite gives NaN, with zero gradients.
    """
    (B, C, H, _), K = q.shape, keys.k.shape[2]
    mask = mask[:, :, None]
    finite_query = jnp.moveaxis(is_finite(q).reshape(B, C, K, H // K, 1), 1, 3)
    finite_key = jnp.moveaxis(keys.finite, 2, 1)[:, :, None, None, :]
    logits = jnp.where(finite_query & finite_key, _logits(finite_part(q), keys.k, scale), jnp.nan)
    logits = jnp.where(mask, logits, -jnp.inf)
    lost = ~jnp.all(logits < jnp.inf, axis=-1, keepdims=True)  # the maximum of numbers and NaN may be a number
    logits = jnp.where(lost, -jnp.inf, logits)
    highest = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    highest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(highest), highest, 0))
    p = jnp.exp(logits - highest)
    total = p.sum(axis=-1, keepdims=True)
    safe = jnp.where(total == 0, 1, total)
    weights = jnp.where(mask, p / safe, 0)  # the gradient of what is masked may be infinite
    o = _product("bkgcs,bskd->bkgcd", weights.astype(q.dtype), keys.v.astype(q.dtype))
    o = jnp.where(lost, jnp.nan, o)
    lse = jnp.where(lost, jnp.nan, jnp.where(total == 0, -jnp.inf, jnp.log(safe) + highest))[..., 0]
    o = jnp.moveaxis(o, 3, 1).reshape(B, C, H, keys.v.shape[-1]).astype(q.dtype)
    return o, jnp.moveaxis(lse, 3, 1).reshape(B, C, H)


def _logits(q: Float[Array, "B C H D"], k: Float[Array, "B S K D"], scale: float) -> Float[Array, "B K G C S"]:
    B, C, H, D = q.shape
    K = k.shape[2]
    return _product("bckgd,bskd->bkgcs", q.reshape(B, C, K, H // K, D), k.astype(q.dtype)) * scale


def _accumulable(x: Array) -> Array:
    return x.astype(wide_dtype(x.dtype))


def _product(equation: str, a: Array, b: Array) -> Array:
    """An einsum accumulated in float32 at least; float32 inputs are not rounded to TF32."""
    dtype = wide_dtype(a.dtype)
    precision = jax.lax.Precision.HIGHEST if a.dtype == dtype else None
    return jnp.einsum(equation, a, b, preferred_element_type=dtype, precision=precision)
