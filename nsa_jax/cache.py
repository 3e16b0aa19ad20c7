"""Caches for decoding: explicit pytrees of fixed shapes. A function takes a cache and returns a new one.

A cache holds one layer's keys and values of B sequences ("rows") of different lengths. This module computes no
attention; `nsa_jax.decoding` does.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from nsa_jax import arguments
from nsa_jax.config import NSAConfig, check_config, num_blocks
from nsa_jax.explicit import on_auto_axes, split_like, split_of
from nsa_jax.gating import open_gates
from nsa_jax.quantization import as_held, dequantize, quantized_zeros
from nsa_jax.rope import rotate_pairs
from pallas_kernels.append_tokens.contract import Gates, Heads, Places
from pallas_kernels.quantized import Quantized

Pair = tuple[Array, Array]  # of keys and values


class NSACache(NamedTuple):
    """What one Native Sparse Attention layer remembers of B sequences.

    *Pages.* A page holds the tokens of one selection block (s tokens). All rows share a pool of P pages. Block j of row
    b is page `block_tables[b, j]`. A compressed token lies in the page in which it starts, and compressed keys are
    stored rotated. In a contiguous cache, `init_nsa_cache` fills the tables. In a paged cache, they come from the
    caller's allocator, as in serving engines. A table entry is read only after a token lies in its block. Until then it
    may be -1 (no page); what is written there is dropped.

    *Rings.* A ring holds the last R positions of each row, with position p in slot p mod R. `win_*` hold the sliding
    window, R = w + step_tokens - 1. `tail_*` hold the keys and values from which phi makes the next compressed tokens,
    R = l + step_tokens - 1: keys that are rotated for a mean, and not yet for a phi with weights. A step of up to
    `step_tokens` tokens finds everything it needs there, even after the step before it was taken back by `rollback`.

    *Bytes.* Let z be the bytes of a number. Pages take z K (Dk + Dv) (1 + 1/d) per token, where full attention takes
    z K (Dk + Dv). Rings take z K (Dk + Dv) (w + l + 2 step_tokens - 2) per row. In bfloat16 with K = 4, Dk = Dv = 128
    and the default sizes, that is 2176 bytes per token (full attention: 2048) and 1.1 MB per row. A step reads
    z K (Dk + Dv) (Nc + n s + w) per row. For a branch that is off there are arrays without places.

    *8 bits.* With `kv_dtype="int8"`, the arrays of the pages are `Quantized`: int8 numbers, and a factor in float32 for
    each token, head, and key or value. Rings are not, so that the window is exact, and compressed tokens are made from
    exact ones. Pages then take K (Dk + Dv + 8) (1 + 1/d) per token, 1122 bytes with the sizes above.
    """

    slc_k: Float[Array, "P K s Dk"] | Quantized
    slc_v: Float[Array, "P K s Dv"] | Quantized
    cmp_k: Float[Array, "P K s/d Dk"] | Quantized
    cmp_v: Float[Array, "P K s/d Dv"] | Quantized
    tail_k: Float[Array, "B R K Dk"]
    tail_v: Float[Array, "B R K Dv"]
    win_k: Float[Array, "B W K Dk"]
    win_v: Float[Array, "B W K Dv"]
    lengths: Int[Array, " B"]  # tokens of each row
    block_tables: Int[Array, "B N"]  # pages of each row, by block


class DenseCache(NamedTuple):
    """What one full-attention (or sliding-window) layer remembers of B sequences: every key and value, contiguous.

    Bytes: z K (Dk + Dv) per token, with item size z.
    """

    k: Float[Array, "B T K Dk"]
    v: Float[Array, "B T K Dv"]
    lengths: Int[Array, " B"]  # tokens of each row


Cache = NSACache | DenseCache
POOLS = ("slc_k", "slc_v", "cmp_k", "cmp_v")  # the arrays of an NSACache that all rows share


def init_nsa_cache(
    config: NSAConfig,
    *,
    batch_size: int,
    max_length: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    dtype: DTypeLike = jnp.float32,
    kv_dtype: DTypeLike | None = None,
    step_tokens: int = 1,
    num_pages: int | None = None,
    block_tables: Int[Array, "B N"] | None = None,
) -> NSACache:
    """An empty cache.

    Example:
      >>> cache = init_nsa_cache(NSAConfig(), batch_size=2, max_length=1000, num_kv_heads=4, head_dim=128)
      >>> cache.slc_k.shape, cache.block_tables.shape, cache_bytes(cache)
      ((32, 4, 64, 128), (2, 16), 13369480)

    Args:
      config: sizes of the branches; s is the page size.
      batch_size: B, rows.
      max_length: the most tokens that a row can hold, rounded up to whole pages: N = ceil(max_length / s) of them.
      num_kv_heads, head_dim, v_head_dim: K, Dk and Dv. If `v_head_dim` is None, Dv = Dk.
      dtype: of keys and values; the dtype of the layer's computation.
      kv_dtype: in which pages hold keys and values. None: `dtype`; or int8, with a factor for each token and head.
      step_tokens: the most tokens that one decode step adds, and that `rollback` can take back.
      num_pages: P, the pages of the pool. None: B N.
      block_tables: int32 [B, N], the page of each block of each row, -1 for none. As rows grow, replace it by
        `cache._replace(block_tables=...)`. None: row b has pages b N .. (b + 1) N - 1, which is a contiguous cache.

    Raises:
      ValueError: a size is not an integer of at least 1, the tables do not fit, or `kv_dtype` is another.
    """
    batch_size, max_length, step_tokens = (
        arguments.size(name, value)
        for name, value in (("batch_size", batch_size), ("max_length", max_length), ("step_tokens", step_tokens))
    )
    num_pages = arguments.optional_size("num_pages", num_pages)
    num_kv_heads, Dk, Dv = _head_sizes(num_kv_heads, head_dim, v_head_dim)
    check_config(config)
    N = num_blocks(max_length, config)
    if block_tables is None:
        if num_pages is not None and num_pages < batch_size * N:
            raise ValueError(
                f"num_pages = {num_pages}: expected at least batch_size * ceil(max_length / s) = {batch_size * N}, "
                f"or block_tables"
            )
        block_tables = jnp.arange(batch_size * N, dtype=jnp.int32).reshape(batch_size, N)
    P = batch_size * N if num_pages is None else num_pages
    block_tables = arguments.integers(
        "block_tables", block_tables, (batch_size, N), "(batch_size, ceil(max_length / s))"
    )
    if not isinstance(block_tables, jax.core.Tracer):
        known = np.asarray(block_tables)  # under `jit`, JAX would trace what follows
        if not -1 <= known.min() <= known.max() < P:
            raise ValueError(
                f"block_tables holds {known.min()} to {known.max()}: expected -1 (no page) to num_pages - 1 = {P - 1}"
            )

    dtype, quantizes = arguments.float_dtype("dtype", dtype), _is_int8(kv_dtype)

    def zeros(*shape: int) -> list[Array]:
        return [jnp.zeros((*shape, D), dtype) for D in (Dk, Dv)]

    def pages(*shape: int) -> list[Any]:
        return [quantized_zeros((*shape, D), dtype) for D in (Dk, Dv)] if quantizes else zeros(*shape)

    slc_k, slc_v = pages(P if config.num_selected else 0, num_kv_heads, config.select_block)
    cmp_k, cmp_v = pages(P, num_kv_heads, config.select_block // config.compress_stride)
    tail_k, tail_v = zeros(batch_size, config.compress_block + step_tokens - 1, num_kv_heads)
    win_k, win_v = zeros(batch_size, config.window + step_tokens - 1 if config.window else 0, num_kv_heads)
    lengths = jnp.zeros((batch_size,), jnp.int32)
    # A copy, so that the cache can be donated while the caller keeps its own tables.
    block_tables = jnp.array(block_tables, copy=True)
    return NSACache(slc_k, slc_v, cmp_k, cmp_v, tail_k, tail_v, win_k, win_v, lengths, block_tables)


def init_dense_cache(
    *,
    batch_size: int,
    max_length: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> DenseCache:
    """An empty cache for full or sliding-window attention. For the arguments, see `init_nsa_cache`.

    Example:
      >>> init_dense_cache(batch_size=2, max_length=1000, num_kv_heads=4, head_dim=128).k.shape
      (2, 1000, 4, 128)
    """
    batch_size, max_length = arguments.size("batch_size", batch_size), arguments.size("max_length", max_length)
    num_kv_heads, Dk, Dv = _head_sizes(num_kv_heads, head_dim, v_head_dim)
    dtype = arguments.float_dtype("dtype", dtype)
    k, v = (jnp.zeros((batch_size, max_length, num_kv_heads, D), dtype) for D in (Dk, Dv))
    return DenseCache(k, v, jnp.zeros((batch_size,), jnp.int32))


def max_length(cache: Cache) -> int:
    """The most tokens a row of this cache can hold."""
    if isinstance(cache, NSACache):
        return cache.block_tables.shape[1] * cache.slc_k.shape[2]
    return cache.k.shape[1]


def step_tokens(cache: NSACache, config: NSAConfig) -> int:
    """The most tokens that one decode step may add to this cache."""
    ring, least = (cache.win_k, config.window) if config.window else (cache.tail_k, config.compress_block)
    return ring.shape[1] - least + 1


def cache_bytes(caches: Any) -> int:
    """Bytes of a cache or of any tree of caches. The leaves may also be shapes, as from `jax.eval_shape`.

    Example:
      >>> cache_bytes(init_dense_cache(batch_size=1, max_length=1024, num_kv_heads=1, head_dim=64, dtype=jnp.bfloat16))
      262148
    """
    return sum(int(np.prod(x.shape)) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(caches))


@on_auto_axes(lambda given: split_like(given["cache"]))
def rollback(cache: NSACache, num_rejected: int | Int[Array, " B"], *, config: NSAConfig) -> NSACache:
    """Takes back the last tokens of each row, for example drafts that speculative decoding rejected.

    Example:
      >>> config = NSAConfig()
      >>> sizes = {"batch_size": 1, "max_length": 100, "num_kv_heads": 1, "head_dim": 16}
      >>> cache = init_nsa_cache(config, **sizes, step_tokens=4)
      >>> cache = cache._replace(lengths=cache.lengths + 7)
      >>> rollback(cache, 3, config=config).lengths.tolist()
      [4]

    Args:
      cache: after a decode step.
      num_rejected: int32 [B] (or one int), how many of the tokens that the last step added are taken back: 0 to
        `step_tokens`. Their entries stay in the cache, but no query sees them, and later tokens overwrite them.
      config: of the layer.

    Raises:
      ValueError: `num_rejected` has another shape or, where it is known, is out of range.
    """
    check_config(config)
    if not isinstance(cache, NSACache):
        raise ValueError(f"cache = {type(cache).__name__}: expected an nsa_jax.NSACache")
    counts = token_counts("num_rejected", num_rejected, cache.lengths.shape[0])
    most = step_tokens(cache, config)
    if not isinstance(counts, jax.core.Tracer):
        known = np.asarray(counts)
        if not 0 <= known.min() <= known.max() <= most:
            raise ValueError(f"num_rejected = {known.tolist()}: expected 0 to {most}, the cache's step_tokens")
    return cache._replace(lengths=cache.lengths - counts)


def _row_split(given: Mapping[str, Any]) -> Any:
    """One row is on every device. Pools stay where they are."""
    cache = given["cache"]
    rows = {
        name: PartitionSpec(None, *split_of(x, *range(1, np.ndim(x))))
        for name, x in cache._asdict().items()
        if name not in POOLS
    }
    return split_like(cache)._replace(**rows)


@on_auto_axes(_row_split)
def take_row(cache: Cache, row: int | Int[Array, ""]) -> Cache:
    """One row as a cache of its own that still contains the whole pool. `put_row` puts it back."""
    row = _checked_row(row, cache)
    rows = {name: jax.lax.dynamic_slice_in_dim(x, row, 1) for name, x in cache._asdict().items() if name not in POOLS}
    return cache._replace(**rows)


@on_auto_axes(lambda given: split_like(given["cache"]))
def put_row(cache: Cache, row: int | Int[Array, ""], one: Cache) -> Cache:
    """The cache with one row, and the pool, replaced by those of `one`, which came from `take_row`."""
    row, new = _checked_row(row, cache), one._asdict()
    return cache._replace(
        **{
            name: new[name] if name in POOLS else jax.lax.dynamic_update_slice_in_dim(x, new[name], row, axis=0)
            for name, x in cache._asdict().items()
        }
    )


def _checked_row(row: int | Int[Array, ""], cache: Cache) -> int | Int[Array, ""]:
    row, B = arguments.offset("row", row), cache.lengths.shape[0]
    if not isinstance(row, jax.core.Tracer) and not 0 <= row < B:
        raise ValueError(f"row = {row}: expected 0 to {B - 1}")
    return row


def next_positions(cache: Cache, num_tokens: int) -> Int[Array, "B T"]:
    """Where the next tokens of each row stand: `cache.lengths` .. `cache.lengths` + num_tokens - 1, int32.

    These are the positions at which queries and keys are rotated before a decoding step or the next chunk of a prompt.

    Example:
      >>> cache = init_dense_cache(batch_size=2, max_length=8, num_kv_heads=1, head_dim=4)
      >>> next_positions(cache._replace(lengths=jnp.array([5, 0])), 2).tolist()
      [[5, 6], [0, 1]]
    """
    num_tokens = arguments.size("num_tokens", num_tokens)
    return with_int32(cache).lengths[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)[None, :]


def next_compressed(lengths: Int[Array, " B"], config: NSAConfig) -> Int[Array, " B"]:
    """The index of the compressed token that each row finishes next, which is `num_compressed` of its length."""
    return jnp.maximum(0, (lengths - config.compress_block) // config.compress_stride + 1)


def pooled_tokens(
    ring: Float[Array, "B R K D"], x: Float[Array, "B T K D"], lengths: Int[Array, " B"], config: NSAConfig
) -> Float[Array, "B P K D"]:
    """The tokens of the ring and T new ones, from the first one of each row's next compressed token on.

    P = l + (ceil(T / d) - 1) d, so that they hold all compressed tokens that the new ones can finish. What lies beyond
    the new tokens finishes none, and may be anything.
    """
    l, d, T = config.compress_block, config.compress_stride, x.shape[1]  # noqa: E741
    held = lengths - (l - 1)  # at most l - 1 of the tokens are in the ring
    begin = next_compressed(lengths, config) * d - held
    take = begin[:, None] + jnp.arange(l + (-(-T // d) - 1) * d, dtype=jnp.int32)[None, :]
    tokens = jnp.concatenate([read_ring(ring, held, l - 1), x], axis=1)
    return jnp.take_along_axis(tokens, jnp.minimum(take, l - 1 + T - 1)[:, :, None, None], axis=1)


def appended_heads(
    q: Heads | None,
    new: Sequence[Heads],
    rotation: tuple[Float[Array, "B m Dk/2"], Float[Array, "B m Dk/2"]] | None,
    places: Places,
    num_heads: int,
) -> tuple[Float[Array, "B m H Dk"] | None, list[Array]]:
    """Rotated queries, and new keys and values [B, m, K, D] as a cache holds them, of what `append_tokens` is given."""
    K, Dk = places.tail_k.shape[2:]

    def taken(heads: Heads, count: int, size: int, rotates: bool) -> Array:
        columns = heads.array[:, :, heads.column : heads.column + count * size]
        x = columns.reshape(*columns.shape[:2], count, size)
        return x if rotation is None or not rotates else rotate_pairs(x, *rotation)

    sizes = (Dk, places.tail_v.shape[3]) * (len(new) // 2)
    tokens = [taken(heads, K, size, i % 2 == 0) for i, (heads, size) in enumerate(zip(new, sizes, strict=True))]
    return None if q is None else taken(q, num_heads, Dk, True), tokens


def appended_gates(gates: Gates | None) -> Float[Array, "B m H 3"] | None:
    """The gates that `append_tokens` opens."""
    if gates is None:
        return None
    begin, F = gates.hidden.column, gates.in_bias.shape[0]
    return open_gates(gates.hidden.array[:, :, begin : begin + F], *gates[1:])


def read_ring(ring: Float[Array, "B R K D"], first: Int[Array, " B"], count: int) -> Float[Array, "B count K D"]:
    """Positions first .. first + count - 1 of each row; zeros for negative positions."""
    positions = (first[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :])[:, :, None, None]
    return jnp.where(positions >= 0, jnp.take_along_axis(ring, positions % ring.shape[1], axis=1), 0)


def read_pages(
    pool: Float[Array, "P K slots D"] | Quantized, block_tables: Int[Array, "B N"], held: Int[Array, " B"]
) -> Float[Array, "B N*slots K D"]:
    """What the pages of each row hold, in order: `held` entries, and zeros in all other places.

    What is held in 8 bits is read in float32 at least.
    """
    pages = dequantize(jax.tree.map(lambda x: x[jnp.maximum(block_tables, 0)], pool))
    pages = jnp.moveaxis(pages, 2, 3)
    entries = pages.reshape(pages.shape[0], pages.shape[1] * pages.shape[2], *pages.shape[3:])
    exists = jnp.arange(entries.shape[1], dtype=jnp.int32)[None, :] < held[:, None]
    return jnp.where(exists[:, :, None, None], entries, 0)


def write_nsa_tokens(
    cache: NSACache,
    raw: tuple[Float[Array, "B T K Dk"], Float[Array, "B T K Dv"]],
    compressed: tuple[Float[Array, "B C K Dk"], Float[Array, "B C K Dv"]],
    selected: tuple[Float[Array, "B T K Dk"], Float[Array, "B T K Dv"]],
    window: tuple[Float[Array, "B T K Dk"], Float[Array, "B T K Dv"]],
    num_tokens: Int[Array, " B"],
    *,
    config: NSAConfig,
) -> NSACache:
    """The cache after the first `num_tokens` of the T new tokens of each row, and the compressed tokens they finish.

    Args:
      cache: the cache before these tokens.
      raw, selected, window: keys and values of the new tokens for the three branches. `raw` is for the compressed
        branch, as phi takes them.
      compressed: C compressed tokens, from index `next_compressed(cache.lengths)` on. Those that end beyond the new
        tokens are not written.
      num_tokens: int32 [B].
      config: of the layer.
    """
    T, C = raw[0].shape[1], compressed[0].shape[1]
    d, s = config.compress_stride, config.select_block
    offsets = jnp.arange(T, dtype=jnp.int32)[None, :]
    positions, new = cache.lengths[:, None] + offsets, offsets < num_tokens[:, None]
    lengths = cache.lengths + num_tokens
    index = next_compressed(cache.lengths, config)[:, None] + jnp.arange(C, dtype=jnp.int32)[None, :]
    finished = index * d + config.compress_block <= lengths[:, None]

    def to_pages(pools: tuple[Any, Any], values: Pair, first: Array, written: Array) -> tuple[Any, Any]:
        block = first // s
        page = jnp.take_along_axis(cache.block_tables, jnp.minimum(block, cache.block_tables.shape[1] - 1), axis=1)
        exists = (block < cache.block_tables.shape[1]) & (page >= 0)
        row, column = (jax.lax.broadcasted_iota(jnp.int32, page.shape, i) for i in range(2))
        page = jnp.where(written & exists, page, pools[0].shape[0] + row * page.shape[1] + column)
        slot = first % s // (s // pools[0].shape[2])
        k, v = (_put(p, (page, slice(None), slot), x) for p, x in zip(pools, values, strict=True))
        return k, v

    def to_rings(rings: Pair, values: Pair) -> Pair:
        k, v = (_write_ring(ring, x, positions, new, lengths) for ring, x in zip(rings, values, strict=True))
        return k, v

    slc_k, slc_v = to_pages((cache.slc_k, cache.slc_v), selected, positions, new)
    cmp_k, cmp_v = to_pages((cache.cmp_k, cache.cmp_v), compressed, index * d, finished)
    tail_k, tail_v = to_rings((cache.tail_k, cache.tail_v), raw)
    win_k, win_v = to_rings((cache.win_k, cache.win_v), window) if config.window else (cache.win_k, cache.win_v)
    return NSACache(slc_k, slc_v, cmp_k, cmp_v, tail_k, tail_v, win_k, win_v, lengths, cache.block_tables)


def write_dense_tokens(
    cache: DenseCache, k: Float[Array, "B T K Dk"], v: Float[Array, "B T K Dv"], num_tokens: Int[Array, " B"]
) -> DenseCache:
    """The cache after the first `num_tokens` of the T new tokens of each row."""
    offsets = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :]
    slots = jnp.where(offsets < num_tokens[:, None], cache.lengths[:, None] + offsets, cache.k.shape[1] + offsets)
    rows = jnp.arange(k.shape[0])[:, None]
    k, v = (_put(old, (rows, slots), x) for old, x in ((cache.k, k), (cache.v, v)))
    return DenseCache(k, v, cache.lengths + num_tokens)


def with_int32(cache: Any) -> Any:
    """The cache with lengths and block tables, which the caller may have put there, as int32 arrays."""
    if not isinstance(cache, NSACache | DenseCache):
        raise ValueError(f"cache = {type(cache).__name__}: expected an nsa_jax.NSACache or an nsa_jax.DenseCache")
    lengths = arguments.array("cache.lengths", cache.lengths)
    cache = cache._replace(lengths=arguments.integers("cache.lengths", lengths, lengths.shape[:1], "(B,)"))
    if isinstance(cache, DenseCache):
        return cache
    tables = arguments.array("cache.block_tables", cache.block_tables)
    shape = (*cache.lengths.shape, *tables.shape[1:2])
    return cache._replace(block_tables=arguments.integers("cache.block_tables", tables, shape, "(B, N)"))


def checked_cache(
    cache: Cache, kind: type, x: Array, num_tokens: Any, *, K: int, Dk: int, Dv: int
) -> tuple[Any, Int[Array, " B"]]:
    """The cache and `num_tokens` with int32 arrays, after checking that the T new tokens of `x` fit it and the layer.

    Raises:
      ValueError: the cache has another type, batch, dtype or head shape; `num_tokens` does not fit; or, if the lengths
        are known (outside `jit`), a row would outgrow its cache.
    """
    if not isinstance(cache, kind):
        raise ValueError(f"cache = {type(cache).__name__}: expected an nsa_jax.{kind.__name__}")
    cache = with_int32(cache)
    B, T = x.shape[:2]
    k, v = (cache.win_k, cache.win_v) if isinstance(cache, NSACache) else (cache.k, cache.v)
    if cache.lengths.shape != (B,):
        raise ValueError(f"cache has {cache.lengths.shape[0]} rows: expected {B}, the batch of x")
    if k.shape[2:] != (K, Dk) or v.shape[2:] != (K, Dv) or k.dtype != x.dtype:
        raise ValueError(
            f"cache holds {k.dtype} keys {k.shape[2:]} and values {v.shape[2:]} (heads, head size): expected "
            f"{x.dtype} {(K, Dk)} and {(K, Dv)}"
        )
    counts = token_counts("num_tokens", T if num_tokens is None else num_tokens, B)
    if not isinstance(counts, jax.core.Tracer):
        known = np.asarray(counts)  # under `jit`, JAX would trace what follows
        if not 0 <= known.min() <= known.max() <= T:
            raise ValueError(f"num_tokens = {known.tolist()}: expected 0 to {T}, the tokens of x")
        if not isinstance(cache.lengths, jax.core.Tracer):
            lengths = np.asarray(cache.lengths)
            row = int(np.argmax(lengths + known))
            if lengths[row] + known[row] > max_length(cache):
                raise ValueError(
                    f"cache: row {row} holds {lengths[row]} tokens and gets {known[row]} more: expected at most "
                    f"{max_length(cache)}, the length it was made for"
                )
    return cache, counts


def _write_ring(
    ring: Float[Array, "B R K D"],
    x: Float[Array, "B T K D"],
    positions: Int[Array, "B T"],
    new: Bool[Array, "B T"],
    lengths: Int[Array, " B"],
) -> Float[Array, "B R K D"]:
    R = ring.shape[1]
    kept = new & (positions >= lengths[:, None] - R)  # if there are more than R new tokens, only the last R
    nowhere = R + jax.lax.broadcasted_iota(jnp.int32, positions.shape, 1)
    slots = jnp.where(kept, positions % R, nowhere)
    return _put(ring, (jnp.arange(x.shape[0])[:, None], slots), x)


def _put(places: Any, indices: Any, x: Array) -> Any:
    """The places with x at indices of which no two are the same; what lies outside is dropped.

    Otherwise XLA could not write all of them at once where programs are to be deterministic.
    """
    return jax.tree.map(
        lambda old, new: old.at[indices].set(new, mode="drop", unique_indices=True), places, as_held(x, places)
    )


def token_counts(name: str, value: Any, B: int) -> Int[Array, " B"]:
    """A number of tokens for each row, int32, from one for all or one for each."""
    counts = arguments.array(name, value)
    return arguments.integers(name, jnp.broadcast_to(counts, (B,)) if counts.ndim == 0 else counts, (B,))


def _is_int8(kv_dtype: Any) -> bool:
    """Whether keys and values are held in 8 bits."""
    if kv_dtype is None:
        return False
    try:
        known = jnp.dtype(kv_dtype) == jnp.int8
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"kv_dtype = {arguments.shown(kv_dtype)}: expected int8, or None for the dtype")
    return True


def _head_sizes(num_kv_heads: int, head_dim: int, v_head_dim: int | None) -> tuple[int, int, int]:
    """K, Dk and Dv."""
    Dk, Dv = arguments.size("head_dim", head_dim), arguments.optional_size("v_head_dim", v_head_dim)
    return arguments.size("num_kv_heads", num_kv_heads), Dk, Dk if Dv is None else Dv
