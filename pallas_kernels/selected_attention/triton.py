"""Selected attention through Pallas Triton: the query-major forward kernel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Sizes
from pallas_kernels.selected_attention.block_major import BlockMajorTile, block_major_forward, block_major_tile
from pallas_kernels.selected_attention.block_union import by_overlap
from pallas_kernels.tiles import (
    LEAST,
    LOG2_E,
    accumulate,
    dot_pieces,
    launch,
    load_rows,
    next_power_of_two,
    softmax_finish,
    softmax_step,
    store_rows,
    zeros,
)
from pallas_kernels.triton.problem import check_select_block, check_supported, heads_first, offset_array


@dataclasses.dataclass(frozen=True)
class ForwardTile:
    """One program's work: `num_queries` adjacent queries of one K/V head over the union of their blocks."""

    num_queries: int
    num_warps: int
    num_stages: int


def forward_tiles(group_size: int, head_dim: int, itemsize: int) -> tuple[ForwardTile, ForwardTile | None]:
    """Tiles for selections that neighbours do not share, and for those they share (None: the same).

    By the heads in a group, the larger head size, and the bytes of an element.
    """
    lone = max(1, 16 // next_power_of_two(group_size))
    if itemsize == 4:
        return ForwardTile(lone, 4, 1), None
    if head_dim > 128:
        return ForwardTile(lone, 4, 2), None
    if group_size > 16:
        return ForwardTile(1, 4, 2), None
    if group_size > 8:  # H100, G = 16, D = 128, 64k: 17.2 ms on random selections, 9.6 on local ones.
        return ForwardTile(2, 2, 2), ForwardTile(4, 4, 3)
    return ForwardTile(lone, 2, 2), None


def _forward_kernel(
    q_ref,
    k_ref,
    v_ref,
    union_ref,
    offset_ref,
    starts_ref,
    o_ref,
    lse_ref,
    *,
    num_queries: int,
    padded_group: int,
    select_block: int,
    scale: float,
    interpret: bool,
):
    tile, bk = pl.program_id(0), pl.program_id(1)
    (_, Tq, H, Dk), (_, T, K, Dv) = q_ref.shape, v_ref.shape
    G = H // K
    b, kv_head = lax.div(bk, jnp.int32(K)), lax.rem(bk, jnp.int32(K))
    row = jnp.arange(num_queries * padded_group, dtype=jnp.int32)
    query, g = lax.div(row, jnp.int32(padded_group)), lax.rem(row, jnp.int32(padded_group))
    t = tile * num_queries + query
    valid = (t < Tq) & (g < G)
    head = jnp.where(g < G, kv_head * G + g, H)
    position = offset_ref[0] + t
    first_position = offset_ref[0] + tile * num_queries
    start = None if starts_ref is None else plgpu.load(starts_ref.at[b, t], mask=t < Tq, other=0)

    # The list ascends, so that the blocks which lie wholly before the tile come first, and need no causal mask.
    size = union_ref.shape[-1]
    place = jnp.arange(next_power_of_two(size), dtype=jnp.int32)
    entries = plgpu.load(union_ref.at[bk, tile, place], mask=place < size, other=-1)
    num_entries = jnp.sum((entries >= 0).astype(jnp.int32))
    shift = num_queries if num_queries > 1 else 0
    past = lax.shift_right_arithmetic(entries, jnp.int32(shift)) < lax.div(first_position + 1, jnp.int32(select_block))
    num_past = jnp.sum(((entries >= 0) & past).astype(jnp.int32))

    q = load_rows(q_ref, (b,), t, head, Dk, valid)
    key = jnp.arange(next_power_of_two(select_block), dtype=jnp.int32)
    whole = key.shape[0] == select_block

    def step(i, carry, *, edge):
        m, total, acc = carry
        entry = union_ref[bk, tile, i]
        key_position = lax.shift_right_arithmetic(entry, jnp.int32(shift)) * select_block + key
        in_block = None if whole else key < select_block
        if edge:
            in_block = key_position < T if whole else in_block & (key_position < T)
        k = load_rows(k_ref, (b,), key_position, kv_head, Dk, in_block)
        s = dot_pieces(q, k)
        if edge:
            s = jnp.where(key_position[None, :] <= position[:, None], s, -jnp.inf)
        if not whole:
            s = jnp.where((key < select_block)[None, :], s, -jnp.inf)
        if start is not None:
            s = jnp.where(key_position[None, :] >= start[:, None], s, -jnp.inf)
        member = None
        if num_queries > 1:
            member = (lax.shift_right_logical(jnp.broadcast_to(entry, query.shape), query) & 1) == 1
        p, m, total, decay = softmax_step(s, m, total, scale * LOG2_E, interpret, member)
        v = load_rows(v_ref, (b,), key_position, kv_head, Dv, in_block)
        return m, total, accumulate(acc, p, v, decay)

    carry = (jnp.full(row.shape, LEAST, jnp.float32), jnp.zeros(row.shape, jnp.float32), zeros(row.shape[0], Dv))
    carry = lax.fori_loop(0, num_past, functools.partial(step, edge=False), carry)
    m, total, acc = lax.fori_loop(num_past, num_entries, functools.partial(step, edge=True), carry)
    o, lse = softmax_finish(m, total, acc, scale)
    store_rows(o_ref, (b,), t, head, Dv, o, valid)
    plgpu.store(lse_ref.at[bk, t, jnp.where(g < G, g, G)], lse, mask=valid)


def selected_attention_forward(q, k, v, union, starts, offset, *, select_block, scale, tile, interpret):
    """Output [B, Tq, H, Dv] and natural-log lse [B * K, Tq, G], query-major over the `block_union` of `tile`."""
    (B, Tq, H, _), (_, _, K, Dv) = q.shape, v.shape
    G = H // K
    kernel = functools.partial(
        _forward_kernel,
        num_queries=tile.num_queries,
        padded_group=max(next_power_of_two(G), 16 // tile.num_queries),
        select_block=select_block,
        scale=scale,
        interpret=interpret,
    )
    return launch(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct((B, Tq, H, Dv), q.dtype),
            jax.ShapeDtypeStruct((B * K, Tq, G), jnp.float32),
        ),
        grid=(pl.cdiv(Tq, tile.num_queries), B * K),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=interpret,
        name="selected_attention_forward",
    )(q, k, v, union, offset, starts)


def forward(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    block_indices: Int[Array, "B K Tq n"],
    segment_starts: Int[Array, "B Tq"] | None,
    query_offset: int | Int[Array, ""],
    *,
    config: Sizes,
    scale: float,
    interpret: bool = False,
    tile: ForwardTile | BlockMajorTile | None = None,
) -> tuple[Float[Array, "B Tq H Dv"], Float[Array, "B H Tq"]]:
    """(o, lse), by the way that is fastest for the group size; see the contract. `tile` decides the way, too.

    Raises:
      NotImplementedError: a dtype, head size, group size, scale or size of blocks that the kernels do not support.
    """
    check_supported(q, k, v, scale=scale)
    check_select_block(config)
    (_, _, H, Dk), (_, _, K, Dv) = q.shape, v.shape
    sizes = (H // K, max(Dk, Dv), q.dtype.itemsize)
    options = dict(select_block=config.select_block, scale=float(scale), interpret=interpret)
    starts, offset = segment_starts, offset_array(query_offset)
    block_indices = block_indices.astype(jnp.int32)
    block_major = block_major_tile(*sizes) if tile is None else tile
    if isinstance(block_major, BlockMajorTile):
        o, lse = block_major_forward(q, k, v, block_indices, starts, offset, tile=block_major, **options)
        return o, heads_first(lse, K)

    def attend(union, tile):
        return selected_attention_forward(q, k, v, union, starts, offset, tile=tile, **options)

    rows = block_indices.reshape(-1, *block_indices.shape[2:])
    tiles = forward_tiles(*sizes) if tile is None else (tile, None)
    o, lse = by_overlap(rows, *tiles, attend, interpret=interpret)
    return o, heads_first(lse, K)
