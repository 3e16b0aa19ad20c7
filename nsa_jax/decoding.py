"""The attention layers over a cache, as plain functions. The Linen and the NNX modules both wrap these.

`*_layer_prefill` processes a prompt or its next chunk. `*_layer_decode_step` adds one token or a few. Both return the
layer's output and a new cache.

Rows of the batch may get different numbers of tokens. Of the T tokens given, the first `num_tokens` count; the outputs
of the others are finite and mean nothing. Shapes depend on T alone, so under `jax.jit` one program serves a whole
generation. If the cache is donated, XLA updates it in place.

Lengths are data. A row that outgrows its cache therefore raises an error only outside `jit`. Inside `jit`, tokens that
do not fit are dropped without a message, so the caller has to count on the host.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, DTypeLike, Float, Int

from nsa_jax import arguments
from nsa_jax.attention import (
    BranchKV,
    compressed_attention,
    decode_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa_jax.cache import (
    POOLS,
    DenseCache,
    NSACache,
    checked_cache,
    init_dense_cache,
    init_nsa_cache,
    next_compressed,
    read_pages,
    read_ring,
    step_tokens,
    with_int32,
    write_dense_tokens,
    write_nsa_tokens,
)
from nsa_jax.config import num_blocks
from nsa_jax.dense import causal_attention, dense_attention
from nsa_jax.explicit import in_explicit_mesh, split_like
from nsa_jax.layer import (
    HeadConfig,
    NSALayerConfig,
    compressed_tokens,
    gates,
    join_heads,
    layer_inputs,
    layer_on_mesh,
    project_branches,
    project_dense,
)
from nsa_jax.sharding import devices_along, place
from nsa_jax.visibility import gated_sum

NumTokens = int | Int[Array, " B"] | None


def nsa_layer_cache(config: NSALayerConfig, *, dtype: DTypeLike | None = None, **sizes: Any) -> NSACache:
    """An empty cache for a layer.

    On a mesh with Explicit axes, rows are split over the layer's `batch_axes` and heads over its `head_axes`, where
    these divide them. Every device then has all pages, of its heads. Prefill and steps keep the split of a cache.

    Args:
      config: of the layer.
      dtype: of the computation, for a layer that takes it from its input. None: the layer's dtype, or float32 if it has
        none.
      sizes: `batch_size`, `max_length` and the other arguments of `nsa_jax.init_nsa_cache`.
    """
    return _placed(init_nsa_cache(config.config, **_heads(config, dtype), **sizes), config)


def full_layer_cache(config: HeadConfig, *, dtype: DTypeLike | None = None, **sizes: Any) -> DenseCache:
    """An empty cache for a full-attention layer; `sizes` are those of `nsa_jax.init_dense_cache`."""
    return _placed(init_dense_cache(**_heads(config, dtype), **sizes), config)


def _split(arguments: Mapping[str, Any]) -> tuple[Any, Any]:
    """The output is split as x is, and the new cache as the old one, so that steps can be the body of a loop."""
    return split_like((arguments["x"], arguments["cache"]))


@layer_on_mesh(_split)
def nsa_layer_prefill(
    parameters: Mapping[str, Array],
    x: Float[Array, "B T E"],
    cache: NSACache,
    *,
    config: NSALayerConfig,
    num_tokens: NumTokens = None,
    continuing: bool = False,
) -> tuple[Float[Array, "B T E"], NSACache]:
    """Processes T tokens of each row and adds them to the cache. T may be any number.

    Args:
      parameters: of the layer.
      x: [B, T, E], padded on the right if rows differ in length.
      cache: of the layer. What its rows hold is forgotten, unless `continuing`.
      config: of the layer.
      num_tokens: int32 [B] (or one int), how many of the T tokens count. None: all of them.
      continuing: the tokens follow those in the cache (chunked prefill) instead of beginning a sequence. Attention then
        processes one row after the other, each at its own position.

    Returns:
      y [B, T, E], equal to the same rows of `nsa_layer` on the whole sequence, and the new cache.

    Raises:
      ValueError: an argument does not fit, named with what was expected.
    """
    x, weights = layer_inputs(x, parameters, config)
    before = cache if continuing else _emptied(cache)
    before, x, counts = _checked(before, NSACache, x, num_tokens, config)
    q, new, cache = _take_in(weights, x, before, counts, config, continuing=continuing)
    if continuing:
        o, _ = _attend_continuing(q, new, before, cache, gates(x, weights), config)
    else:
        o = nsa_attention(q, new, gates(x, weights), config=config.config, implementation=config.implementation)
    return join_heads(o, weights["o_kernel"]), cache


@layer_on_mesh(_split)
def nsa_layer_decode_step(
    parameters: Mapping[str, Array],
    x: Float[Array, "B m E"],
    cache: NSACache,
    *,
    config: NSALayerConfig,
    num_tokens: NumTokens = None,
) -> tuple[Float[Array, "B m E"], NSACache]:
    """Adds m tokens to each row, at most the cache's `step_tokens`, and reads only what they attend to.

    One token in a step is plain decoding. Several are drafts to be verified; `nsa_jax.rollback` takes back the rejected
    ones. A row with `num_tokens` 0 stays as it is. For arguments, result and errors, see `nsa_layer_prefill`.
    """
    x, weights = layer_inputs(x, parameters, config)
    cache, x, counts = _checked(cache, NSACache, x, num_tokens, config)
    if x.shape[1] > step_tokens(cache, config.config):
        raise ValueError(
            f"x: {x.dtype} {x.shape}: expected at most {step_tokens(cache, config.config)} tokens a row, the cache's "
            f"step_tokens; prefill takes more"
        )
    offsets = cache.lengths
    q, _, cache = _take_in(weights, x, cache, counts, config, continuing=True)
    o, _ = decode_attention(
        q, cache, gates(x, weights), offsets, config=config.config, implementation=config.implementation
    )
    return join_heads(o, weights["o_kernel"]), cache


@layer_on_mesh(_split)
def full_layer_prefill(
    parameters: Mapping[str, Array],
    x: Float[Array, "B T E"],
    cache: DenseCache,
    *,
    config: HeadConfig,
    window: int | None = None,
    num_tokens: NumTokens = None,
    continuing: bool = False,
) -> tuple[Float[Array, "B T E"], DenseCache]:
    """`nsa_layer_prefill` for `full_layer`."""
    window = arguments.optional_size("window", window)
    x, weights = layer_inputs(x, parameters, config)
    before = cache if continuing else _emptied(cache)
    before, x, counts = _checked(before, DenseCache, x, num_tokens, config)
    q, k, v = project_dense(weights, x, _positions(before, x), config)
    cache = write_dense_tokens(before, k, v, counts)
    o = _attend_to_dense(q, before, cache, window) if continuing else causal_attention(q, k, v, window=window)
    return join_heads(o, weights["o_kernel"]), cache


@layer_on_mesh(_split)
def full_layer_decode_step(
    parameters: Mapping[str, Array],
    x: Float[Array, "B m E"],
    cache: DenseCache,
    *,
    config: HeadConfig,
    window: int | None = None,
    num_tokens: NumTokens = None,
) -> tuple[Float[Array, "B m E"], DenseCache]:
    """`nsa_layer_decode_step` for `full_layer`. It reads the whole cache; one query per row runs on cuDNN if it can."""
    window = arguments.optional_size("window", window)
    x, weights = layer_inputs(x, parameters, config)
    before, x, counts = _checked(cache, DenseCache, x, num_tokens, config)
    q, k, v = project_dense(weights, x, _positions(before, x), config)
    cache = write_dense_tokens(before, k, v, counts)
    if x.shape[1] == 1 and window is None:
        o = dense_attention(q, cache.k, cache.v, lengths=cache.lengths)
    else:
        o = _attend_to_dense(q, before, cache, window)
    return join_heads(o, weights["o_kernel"]), cache


def _take_in(
    weights: Mapping[str, Array],
    x: Float[Array, "B T E"],
    cache: NSACache,
    num_tokens: Int[Array, " B"],
    config: NSALayerConfig,
    *,
    continuing: bool,
) -> tuple[Float[Array, "B T H Dk"], BranchKV, NSACache]:
    """Queries, keys and values of the new tokens (and the compressed tokens they may finish), and the cache."""
    l, d, T = config.config.compress_block, config.config.compress_stride, x.shape[1]  # noqa: E741
    q, raw = project_branches(weights, x, _positions(cache, x), config)
    raw_k, raw_v = raw.cmp_k, raw.cmp_v
    most = -(-T // d)  # compressed tokens that T tokens can finish
    index = next_compressed(cache.lengths, config.config)
    if continuing:
        # The tokens from the first one of compressed token `index` on. At most l - 1 of them are in the ring.
        held = cache.lengths - (l - 1)
        begin = index * d - held
        take = begin[:, None] + jnp.arange(l + (most - 1) * d, dtype=jnp.int32)[None, :]
        take = jnp.minimum(take, l - 1 + T - 1)[:, :, None, None]  # tokens beyond finish no compressed token
        raw_k, raw_v = (
            jnp.take_along_axis(jnp.concatenate([read_ring(ring, held, l - 1), new], axis=1), take, axis=1)
            for ring, new in ((cache.tail_k, raw_k), (cache.tail_v, raw_v))
        )
    positions = index[:, None] * d + jnp.arange(raw_k.shape[1], dtype=jnp.int32)[None, :]
    compressed = compressed_tokens(weights, raw_k, raw_v, positions, config)
    cache = write_nsa_tokens(
        cache,
        (raw.cmp_k, raw.cmp_v),
        compressed,
        (raw.slc_k, raw.slc_v),
        (raw.win_k, raw.win_v),
        num_tokens,
        config=config.config,
    )
    return q, raw._replace(cmp_k=compressed[0], cmp_v=compressed[1]), cache


def _attend_continuing(
    q: Float[Array, "B T H Dk"],
    new: BranchKV,
    before: NSACache,
    after: NSACache,
    gates: Float[Array, "B T H 3"],
    config: NSALayerConfig,
) -> tuple[Float[Array, "B T H Dv"], Int[Array, "B K T n"]]:
    """NSA of a chunk that follows the tokens in `before`, and the blocks that it selects.

    For each row, this lays out the row's pages in order and calls the ops for whole sequences with a `query_offset`.
    """
    T, w = q.shape[1], config.config.window
    options: dict[str, Any] = {"config": config.config, "implementation": config.implementation}

    o_win = None
    if w:
        # The chunk may have overwritten ring entries that its first queries see. Read them from `before`. Positions
        # below 0 become a segment of their own, which contains no query.
        first = before.lengths - (w - 1)
        keys = jnp.concatenate([read_ring(before.win_k, first, w - 1), new.win_k], axis=1)
        values = jnp.concatenate([read_ring(before.win_v, first, w - 1), new.win_v], axis=1)
        exists = first[:, None] + jnp.arange(w - 1 + T, dtype=jnp.int32)[None, :] >= 0
        o_win = window_attention(q, keys, values, segment_ids=exists.astype(jnp.int32), query_offset=w - 1, **options)

    # Padding of the chunk may lie beyond the last page, so add entries for keys that no query sees.
    tables = jnp.pad(after.block_tables, ((0, 0), (0, num_blocks(T, config.config))))

    compressed = next_compressed(after.lengths, config.config)

    def one_row(row: tuple[Array, ...]) -> tuple[Array, Array | None, Array]:
        q, offset, length, finished, table = row
        k, v = (read_pages(pool, table[None], finished[None]) for pool in (after.cmp_k, after.cmp_v))
        o_cmp, lse = compressed_attention(q[None], k, v, query_offset=offset, **options)
        if not config.config.num_selected:
            return o_cmp[0], None, jnp.zeros((k.shape[2], T, 0), jnp.int32)
        keys, values = (read_pages(pool, table[None], length[None]) for pool in (after.slc_k, after.slc_v))
        block_indices = select_blocks(q[None], k, lse, query_offset=offset, **options)
        o_slc = selected_attention(q[None], keys, values, block_indices, query_offset=offset, **options)
        return o_cmp[0], o_slc[0], block_indices[0]

    o_cmp, o_slc, block_indices = jax.lax.map(one_row, (q, before.lengths, after.lengths, compressed, tables))
    return gated_sum(gates, o_cmp, o_slc, o_win), block_indices


def _attend_to_dense(
    q: Float[Array, "B T H Dk"], before: DenseCache, after: DenseCache, window: int | None
) -> Float[Array, "B T H Dv"]:
    """Causal attention, windowed or not, of the newest tokens to everything in the cache."""
    position = (before.lengths[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None, :])[:, None, :, None]
    key = jnp.arange(after.k.shape[1], dtype=jnp.int32)[None, None, None, :]
    mask = key <= position
    if window is not None:
        mask &= key > position - window
    return dense_attention(q, after.k, after.v, mask=mask, lengths=after.lengths)


def _heads(config: HeadConfig, dtype: DTypeLike | None) -> dict[str, Any]:
    return {
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "v_head_dim": config.v_head_dim,
        "dtype": dtype or config.dtype or jnp.float32,
    }


def _placed(cache: Any, config: HeadConfig) -> Any:
    """The cache, split over the Explicit axes of the mesh in context."""
    if not in_explicit_mesh():
        return cache

    def put(name: str, x: Array) -> Array:
        over = (None, config.head_axes) if name in POOLS else (config.batch_axes, None, config.head_axes)
        fitting = (axes if size % devices_along(axes) == 0 else None for axes, size in zip(over, x.shape, strict=False))
        return place(x, PartitionSpec(*fitting))

    return cache._replace(**{name: put(name, x) for name, x in cache._asdict().items()})


def _emptied(cache: Any) -> Any:
    """A cache of the same shapes that holds nothing. A dense one is cleared, because cuDNN may read past a length."""
    cache = with_int32(cache)
    cache = cache._replace(lengths=jnp.zeros_like(cache.lengths))
    if isinstance(cache, DenseCache):
        cache = cache._replace(k=jnp.zeros_like(cache.k), v=jnp.zeros_like(cache.v))
    return cache


def _positions(cache: NSACache | DenseCache, x: Array) -> Int[Array, "B T"]:
    return cache.lengths[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]


def _checked(
    cache: Any, kind: type, x: Array, num_tokens: NumTokens, config: HeadConfig
) -> tuple[Any, Float[Array, "B T E"], Int[Array, " B"]]:
    """The cache, `x` with zeros in place of tokens that do not count, and how many of each row count."""
    if devices_along(config.context_axes) > 1:
        raise ValueError(f"context_axes = {config.context_axes!r}: a cache's tokens are not split over devices")
    sizes = {"K": config.num_kv_heads, "Dk": config.head_dim, "Dv": config.value_dim}
    cache, counts = checked_cache(cache, kind, x, num_tokens, **sizes)
    if isinstance(config, NSALayerConfig):
        s, d = config.config.select_block, config.config.compress_stride
        if (cache.slc_k.shape[2], cache.cmp_k.shape[2]) != (s, s // d):
            raise ValueError(
                f"cache has pages of {cache.slc_k.shape[2]} tokens and {cache.cmp_k.shape[2]} compressed tokens: "
                f"expected select_block = {s} and select_block / compress_stride = {s // d}"
            )
        if step_tokens(cache, config.config) < 1:
            raise ValueError(
                f"cache has rings of {cache.win_k.shape[1]} and {cache.tail_k.shape[1]} positions: expected at least "
                f"window = {config.config.window} and compress_block = {config.config.compress_block}"
            )
    if num_tokens is None:
        return cache, x, counts
    counted = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :] < counts[:, None]
    return cache, jnp.where(counted[:, :, None], x, 0), counts
