"""One decoding step through Pallas Triton, in four kernels that are split along the keys, so that few rows fill a GPU.

1. Scores and partial sums of the compressed tokens and of the window, a chunk of keys per program.
2. Importance from these scores, a few blocks per program.
3. The best blocks, and partial sums of them, a tile of keys per program.
4. The partial sums of each branch joined, and the branches added with their gates.

Numbers of 8 bits are multiplied as they are, in the dtype of the queries. The factor of a key multiplies its scores,
and that of a value its weights: tiles of these have fewer rows than a key has numbers.

A partial sum is (m, total, acc): the largest score of a query head over some keys, the sum of its weights relative to
that, and the weighted values.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.block_selection.best_blocks import best_blocks
from pallas_kernels.contract import Sizes
from pallas_kernels.decode_attention import tiles
from pallas_kernels.decode_attention.step import Step
from pallas_kernels.quantized import MOST, Quantized
from pallas_kernels.tiles import find_tile, key_of
from pallas_kernels.triton.heads import SMALLEST_SIDE, accumulate, dot_pieces, head_pieces
from pallas_kernels.triton.integers import cdiv, div, iota, loop, next_power_of_two, rem
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.problem import LOG2_E, check_num_blocks, check_supported, problem_of
from pallas_kernels.triton.rows import Pair, load_rows, program_pair, store_rows
from pallas_kernels.triton.softmax import LEAST, NEVER, exp2, softmax_start, softmax_step
from pallas_kernels.triton.tiles import DecodeTile

IMPORTANCE_BLOCKS = 64  # whose importance a program sums


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
    config: Sizes,
    scale: float,
    interpret: bool = False,
    tile: DecodeTile | None = None,
) -> tuple[Float[Array, "B m H Dv"], Int[Array, "B K m n"]]:
    """All branches of one decoding step; see the contract. `tile` overrides the table, for tests and tuning.

    Raises:
      NotImplementedError: a dtype, head size, group size, scale or number of blocks that the kernels do not take.
    """
    check_supported(q, win_k, win_v, scale=scale)
    for name in ("num_selected", "window"):
        if getattr(config, name) == 0:
            raise NotImplementedError(f"config.{name} = 0: expected all three branches")
    for name, pool in {"cmp_k": cmp_k, "cmp_v": cmp_v, "slc_k": slc_k, "slc_v": slc_v}.items():
        if not isinstance(pool, Quantized) and pool.dtype != q.dtype:
            raise NotImplementedError(f"{name}.dtype = {pool.dtype}: expected q's, {q.dtype}")
    (B, m, H, Dk), (K, s, Dv), N = q.shape, slc_v.shape[1:], block_tables.shape[1]
    check_num_blocks(N)
    tile = tile or find_tile(tiles.STEP, key_of(q, win_k, win_v))
    chunk = tile.chunk or next(chunk for most_pairs, chunk in tiles.CHUNKS if most_pairs >= B * K)
    if tile.chunk is None:  # at most 128 programs along the compressed tokens of the longest row
        chunk = max(chunk, next_power_of_two(pl.cdiv(N * s // config.compress_stride, 128)))
    step = Step(
        batch=B,
        num_queries=m,
        num_heads=H,
        num_kv_heads=K,
        num_blocks=N,
        ring=win_k.shape[1],
        problem=problem_of(config, scale, interpret),
        tile=tile,
        chunk=chunk,
    )
    q = q.reshape(B * m * H, Dk)
    cmp_k, cmp_v, slc_k, slc_v = jax.tree.map(lambda x: x.reshape(-1, x.shape[3]), (cmp_k, cmp_v, slc_k, slc_v))
    places = (query_offsets, lengths)
    first, scores = _first_partials(q, cmp_k, cmp_v, win_k, win_v, places, block_tables, step)
    importance = _importance(first, scores, places, step)
    second, indices = _selected_partials(q, slc_k, slc_v, importance, places, block_tables, step)
    o = _join(first, second, gates.reshape(B * m * H, 3), places, q.dtype, step)
    return o.reshape(B, m, H, Dv), indices.reshape(B, K, m, config.num_selected)


def _partials_shape(splits: int, head_dim: int, step: Step) -> tuple[jax.ShapeDtypeStruct, ...]:
    rows = step.batch * step.num_queries * step.num_heads
    shapes = ((splits, rows), (splits, rows), (splits, rows, head_dim))
    return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)


def _store_partials(refs: Any, split: Any, row: Any, valid: Any, m: Any, total: Any, acc: Any) -> None:
    m_ref, total_ref, acc_ref = refs
    plgpu.store(m_ref.at[split, row], m, mask=valid)
    plgpu.store(total_ref.at[split, row], total, mask=valid)
    store_rows(acc_ref, (split, row), head_pieces(acc_ref.shape[-1]), acc, valid)


class _Heads(NamedTuple):
    """Heads [rows, D] in pieces, as they are multiplied, and the factor of each row; None: 1."""

    pieces: tuple[Any, ...]
    scale: Any = None


def _load_pool(pool: Any, at: Any, pieces: Any, exists: Any, dtype: Any) -> _Heads:
    """Rows of a pool. Numbers of 8 bits become a `dtype`, which holds them exactly, without their factors."""
    if not isinstance(pool, Quantized):
        return _Heads(load_rows(pool, (at,), pieces, exists))
    values_ref, scale_ref = cast(Any, pool)
    values = load_rows(values_ref, (at,), pieces, exists)
    return _Heads(tuple(x.astype(dtype) for x in values), plgpu.load(scale_ref.at[at, 0], mask=exists, other=0))


def _scores(q: Any, k: _Heads) -> Any:
    s = dot_pieces(q, k.pieces)
    return s if k.scale is None else s * k.scale[None, :]


def _attend(carry: Any, s: Any, visible: Any, v: _Heads, step: Step) -> tuple[Any, Any, Any]:
    """One step of the online softmax of the scores s over the values of the keys that are visible."""
    m, total, acc = carry
    s = jnp.where(visible, s, -jnp.inf)
    p, m, total, decay = softmax_step(s, m, total, step.problem.scale_log2, step.problem.interpret)
    if v.scale is None:
        return m, total, accumulate(acc, p, v.pieces, decay)
    # The largest magnitude of a value, as 16 bits may not hold a factor that is 127 times less.
    return m, total, accumulate(acc, p * (v.scale * MOST)[None, :], v.pieces, decay, factor=1 / MOST)


def _rows(pair: Pair, query: Any, group_head: Any, step: Step) -> tuple[Any, Any]:
    """(row of the flattened [B, m, H], whether there is such a query and head)."""
    valid = (query < step.num_queries) & (group_head < step.group)
    row = (pair.batch * step.num_queries + query) * step.num_heads + pair.kv_head * step.group + group_head
    return jnp.where(valid, row, step.batch * step.num_queries * step.num_heads), valid


def _position(offset_ref: Any, length_ref: Any, batch: Any, query: Any) -> Any:
    """Where a query stands. One beyond what its row holds is taken for the last, so that nothing beyond is read."""
    return jnp.minimum(offset_ref[batch] + query, length_ref[batch] - 1)


def _first_kernel(
    q_ref: Any,
    cmp_k_ref: Any,
    cmp_v_ref: Any,
    win_k_ref: Any,
    win_v_ref: Any,
    offset_ref: Any,
    length_ref: Any,
    table_ref: Any,
    m_ref: Any,
    total_ref: Any,
    acc_ref: Any,
    score_ref: Any,
    *,
    step: Step,
) -> None:
    split, part = pl.program_id(0), pl.program_id(2)
    key_pieces, value_pieces = head_pieces(q_ref.shape[-1]), head_pieces(cmp_v_ref.shape[-1])
    num_keys, window = step.tile.keys, step.problem.window
    pair = program_pair(step.num_kv_heads)
    num_rows = step.tile_queries * step.padded_group
    first_query = part * step.tile_queries
    tile_row = iota(num_rows)
    query = first_query + div(tile_row, step.padded_group)
    row, valid = _rows(pair, query, rem(tile_row, step.padded_group), step)
    position = _position(offset_ref, length_ref, pair.batch, query)
    last_query = jnp.minimum(first_query + step.tile_queries, step.num_queries) - 1
    last = _position(offset_ref, length_ref, pair.batch, last_query)
    key = iota(num_keys)
    refs = (m_ref, total_ref, acc_ref)
    begin = split * step.chunk
    end = jnp.minimum(step.visible(last), begin + step.chunk)
    score_columns = score_ref.shape[1] // step.per_block

    @pl.when((split < step.compressed_splits) & (begin < end))
    def _compressed() -> None:
        q = load_rows(q_ref, (row,), key_pieces, valid)
        seen = step.visible(position)

        def walk(i: Any, carry: Any) -> Any:
            index = begin + i * num_keys + key
            exists = index < end
            block, inner = div(index, step.per_block), rem(index, step.per_block)
            page = plgpu.load(table_ref.at[pair.batch, block], mask=exists, other=0)
            at = (jnp.maximum(page, 0) * step.num_kv_heads + pair.kv_head) * step.per_block + inner
            k = _load_pool(cmp_k_ref, at, key_pieces, exists, q_ref.dtype)
            v = _load_pool(cmp_v_ref, at, value_pieces, exists, q_ref.dtype)
            s = _scores(q, k)
            visible = index[None, :] < seen[:, None]
            column = jnp.where(exists, inner * score_columns + block, score_ref.shape[1])
            plgpu.store(score_ref.at[row[:, None], column[None, :]], s, mask=visible & valid[:, None])
            return _attend(carry, s, visible, v, step)

        carry = loop(0, cdiv(end - begin, num_keys), walk, softmax_start(num_rows, value_pieces))
        _store_partials(refs, split, row, valid, *carry)

    @pl.when(split >= step.compressed_splits)
    def _window() -> None:
        q = load_rows(q_ref, (row,), key_pieces, valid)
        lowest = _position(offset_ref, length_ref, pair.batch, first_query) - window + 1
        at = lowest + (split - step.compressed_splits) * num_keys + key
        exists = (at >= 0) & (at <= last)
        slot = rem(jnp.maximum(at, 0), step.ring)
        k = load_rows(win_k_ref, (pair.batch, slot, pair.kv_head), key_pieces, exists)
        v = load_rows(win_v_ref, (pair.batch, slot, pair.kv_head), value_pieces, exists)
        visible = (at[None, :] <= position[:, None]) & (at[None, :] > position[:, None] - window)
        start = softmax_start(num_rows, value_pieces)
        carry = _attend(start, dot_pieces(q, k), visible & exists[None, :], _Heads(v), step)
        _store_partials(refs, split, row, valid, *carry)


def _first_partials(
    q: jax.Array,
    cmp_k: jax.Array | Quantized,
    cmp_v: jax.Array | Quantized,
    win_k: jax.Array,
    win_v: jax.Array,
    places: tuple[jax.Array, jax.Array],
    tables: jax.Array,
    step: Step,
) -> tuple[Any, jax.Array]:
    """Partial sums of the compressed tokens and the window, and scores [rows, per block x blocks] of the former.

    Splits beyond a row's last compressed token, and scores that it does not see, are not written.
    """
    columns = step.per_block * next_power_of_two(step.num_blocks)
    splits = step.compressed_splits + step.window_splits
    *partials, scores = launch(
        functools.partial(_first_kernel, step=step),
        out_shape=(
            *_partials_shape(splits, cmp_v.shape[-1], step),
            jax.ShapeDtypeStruct((q.shape[0], columns), jnp.float32),
        ),
        grid=(splits, step.batch * step.num_kv_heads, pl.cdiv(step.num_queries, step.tile_queries)),
        num_warps=step.tile.num_warps,
        num_stages=2,
        interpret=step.problem.interpret,
        name="decode_attention_first",
    )(q, cmp_k, cmp_v, win_k, win_v, *places, tables)
    return tuple(partials), scores


def _importance_kernel(
    m_ref: Any, total_ref: Any, score_ref: Any, offset_ref: Any, length_ref: Any, importance_ref: Any, *, step: Step
) -> None:
    first_block, query = pl.program_id(0) * IMPORTANCE_BLOCKS, pl.program_id(2)
    problem = step.problem
    pair = program_pair(step.num_kv_heads)
    position = _position(offset_ref, length_ref, pair.batch, query)
    seen = step.visible(position)

    @pl.when(first_block <= div(position, problem.select_block))
    def _sum() -> None:
        row, valid = _rows(pair, query, iota(step.padded_group), step)
        split = iota(next_power_of_two(step.compressed_splits))
        there = (split * step.chunk < seen)[:, None] & valid[None, :]
        m = plgpu.load(m_ref.at[split[:, None], row[None, :]], mask=there, other=LEAST)
        total = plgpu.load(total_ref.at[split[:, None], row[None, :]], mask=there, other=0)
        top = jnp.max(m, axis=0)
        total = jnp.sum(total * exp2((m - top[None, :]) * problem.scale_log2, problem.interpret), axis=0)
        lse_log2 = top * problem.scale_log2 + jnp.log(jnp.where(total > 0, total, 1)) * LOG2_E
        lse_log2 = jnp.where(total > 0, lse_log2, NEVER)
        block = first_block + iota(IMPORTANCE_BLOCKS)
        columns = score_ref.shape[1] // step.per_block
        overlap = problem.compress_block // problem.compress_stride
        importance = jnp.zeros((IMPORTANCE_BLOCKS,), jnp.float32)
        for shift in range(1 - overlap, step.per_block):
            # Compressed token j s/d + shift and block j share this many strides of d tokens.
            weight = float(min(shift + overlap, step.per_block) - max(shift, 0))
            index = block * step.per_block + shift
            mask = valid[:, None] & ((index >= 0) & (index < seen))[None, :]
            column = (shift % step.per_block) * columns + block + shift // step.per_block
            s = plgpu.load(score_ref.at[row[:, None], column[None, :]], mask=mask, other=-jnp.inf)
            p = exp2(s * problem.scale_log2 - lse_log2[:, None], problem.interpret)
            importance += weight * jnp.sum(p, axis=0)
        at = jnp.full((IMPORTANCE_BLOCKS,), pair.index * step.num_queries + query)
        plgpu.store(importance_ref.at[at, block], importance)


def _importance(partials: Any, scores: jax.Array, places: tuple[jax.Array, jax.Array], step: Step) -> jax.Array:
    """The importance of the blocks up to each query's, [B K m, blocks]; others are not written."""
    m, total, _ = partials
    pairs = step.batch * step.num_kv_heads
    width = max(IMPORTANCE_BLOCKS, next_power_of_two(step.num_blocks))
    return launch(
        functools.partial(_importance_kernel, step=step),
        out_shape=jax.ShapeDtypeStruct((pairs * step.num_queries, width), jnp.float32),
        grid=(pl.cdiv(step.num_blocks, IMPORTANCE_BLOCKS), pairs, step.num_queries),
        num_warps=4,
        num_stages=1,
        interpret=step.problem.interpret,
        name="decode_attention_importance",
    )(m, total, scores, *places)


def _chosen(importance_ref: Any, row: Any, position: Any, step: Step) -> jax.Array:
    """The blocks of a query, int32 [slots]: ascending, then -1."""
    block = iota(importance_ref.shape[1])
    at = importance_ref.at[jnp.full(block.shape, row), block]
    importance = plgpu.load(at, mask=block <= div(position, step.problem.select_block), other=-jnp.inf)
    first, positions = jnp.zeros((1,), jnp.int32), jnp.full((1,), position)
    chosen = best_blocks(importance[:, None], first, positions, step.num_blocks, step.problem)
    return jnp.sum(chosen, axis=1, dtype=jnp.int32)  # of its one query


def _selected_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    importance_ref: Any,
    offset_ref: Any,
    length_ref: Any,
    table_ref: Any,
    m_ref: Any,
    total_ref: Any,
    acc_ref: Any,
    indices_ref: Any,
    *,
    step: Step,
) -> None:
    split, query = pl.program_id(0), pl.program_id(2)
    s, num_keys = step.problem.select_block, step.tile.keys
    key_pieces, value_pieces = head_pieces(q_ref.shape[-1]), head_pieces(v_ref.shape[-1])
    pair = program_pair(step.num_kv_heads)
    group_head = iota(max(SMALLEST_SIDE, step.padded_group))
    row, valid = _rows(pair, query, group_head, step)
    position = _position(offset_ref, length_ref, pair.batch, query)
    # Every split chooses for itself, instead of waiting for a kernel in which a single program does.
    query_row = pair.index * step.num_queries + query
    chosen = _chosen(importance_ref, query_row, position, step)
    slot = iota(chosen.shape[0])

    @pl.when(split == 0)
    def _store_indices() -> None:
        at = indices_ref.at[jnp.full(slot.shape, query_row), slot]
        plgpu.store(at, chosen, mask=slot < step.problem.num_selected)

    padded_block = next_power_of_two(s)
    key = split * num_keys + iota(num_keys)
    key_slot, inner = div(key, padded_block), rem(key, padded_block)
    of_key = (slot[:, None] == key_slot[None, :]) & (slot < step.problem.num_selected)[:, None]
    block = jnp.sum(jnp.where(of_key, chosen[:, None] + 1, 0), axis=0, dtype=jnp.int32) - 1
    visible = (block >= 0) & (inner < s) & (block * s + inner <= position)
    page = plgpu.load(table_ref.at[pair.batch, jnp.maximum(block, 0)], mask=visible, other=0)
    at = (jnp.maximum(page, 0) * step.num_kv_heads + pair.kv_head) * s + inner
    q = load_rows(q_ref, (row,), key_pieces, valid)
    k = _load_pool(k_ref, at, key_pieces, visible, q_ref.dtype)
    v = _load_pool(v_ref, at, value_pieces, visible, q_ref.dtype)
    start = softmax_start(group_head.shape[0], value_pieces)
    carry = _attend(start, _scores(q, k), visible[None, :], v, step)
    _store_partials((m_ref, total_ref, acc_ref), split, row, valid, *carry)


def _selected_partials(
    q: jax.Array,
    k: jax.Array | Quantized,
    v: jax.Array | Quantized,
    importance: jax.Array,
    places: tuple[jax.Array, jax.Array],
    tables: jax.Array,
    step: Step,
) -> tuple[Any, jax.Array]:
    """Partial sums of the selected blocks, and which they are, int32 [B K m, n]."""
    indices_shape = (importance.shape[0], step.problem.num_selected)
    *partials, indices = launch(
        functools.partial(_selected_kernel, step=step),
        out_shape=(
            *_partials_shape(step.selected_splits, v.shape[-1], step),
            jax.ShapeDtypeStruct(indices_shape, jnp.int32),
        ),
        grid=(step.selected_splits, step.batch * step.num_kv_heads, step.num_queries),
        num_warps=step.tile.num_warps,
        num_stages=1,
        interpret=step.problem.interpret,
        name="decode_attention_selected",
    )(q, k, v, importance, *places, tables)
    return tuple(partials), indices


def _join_kernel(
    m_ref: Any,
    total_ref: Any,
    acc_ref: Any,
    slc_m_ref: Any,
    slc_total_ref: Any,
    slc_acc_ref: Any,
    gate_ref: Any,
    offset_ref: Any,
    length_ref: Any,
    o_ref: Any,
    *,
    step: Step,
) -> None:
    row = pl.program_id(0)
    batch = div(row, step.num_queries * step.num_heads)
    position = _position(offset_ref, length_ref, batch, rem(div(row, step.num_heads), step.num_queries))
    pieces = head_pieces(o_ref.shape[-1])

    def joined(refs: Any, first: int, count: int, written: Any, gate: int) -> Any:
        m_ref, total_ref, acc_ref = refs
        split = iota(next_power_of_two(count))
        there = (split < count) & written(split)
        at = first + split
        m = plgpu.load(m_ref.at[at, row], mask=there, other=LEAST)
        total = plgpu.load(total_ref.at[at, row], mask=there, other=0)
        weight = exp2((m - jnp.max(m)) * step.problem.scale_log2, step.problem.interpret)
        total = jnp.sum(total * weight)
        gated = jnp.where(total > 0, gate_ref[row, gate].astype(jnp.float32) / jnp.where(total > 0, total, 1), 0)
        acc = load_rows(acc_ref, (at, row), pieces, there)
        return tuple(jnp.sum(piece * (weight * gated)[:, None], axis=0) for piece in acc)

    first, second = (m_ref, total_ref, acc_ref), (slc_m_ref, slc_total_ref, slc_acc_ref)
    seen = step.visible(position)
    branches = (
        joined(first, 0, step.compressed_splits, lambda split: split * step.chunk < seen, 0),
        joined(second, 0, step.selected_splits, lambda split: split >= 0, 1),
        joined(first, step.compressed_splits, step.window_splits, lambda split: split >= 0, 2),
    )
    o = tuple((x + y + z)[None, :] for x, y, z in zip(*branches, strict=True))
    one = jnp.zeros((1,), jnp.int32)
    store_rows(o_ref, (row + one,), pieces, o)


def _join(
    first: Any, second: Any, gates: jax.Array, places: tuple[jax.Array, jax.Array], dtype: Any, step: Step
) -> jax.Array:
    """The gated sum of the branches, [rows, Dv]."""
    rows, Dv = first[2].shape[1:]
    return launch(
        functools.partial(_join_kernel, step=step),
        out_shape=jax.ShapeDtypeStruct((rows, Dv), dtype),
        grid=(rows,),
        num_warps=2,
        num_stages=1,
        interpret=step.problem.interpret,
        name="decode_attention_join",
    )(*first, *second, gates, *places)
