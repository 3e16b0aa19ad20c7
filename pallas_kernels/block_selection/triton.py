"""Block selection on the Pallas Triton backend: a scoring kernel and a top-n kernel, over chunks of queries.

The scores of one chunk, summed over the group and pooled, are all that reaches memory: a float32 scratch of bounded
size. A compressed token shares strides with its own block and, overlapping, with the next one, so the scoring kernel
leaves two sums per block and the top-n kernel adds a block's first to its predecessor's second. Keys lie along the rows
of the score tile, so that the heads of a query are neighbours within a thread and their sum costs few shuffles.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.block_selection import tiles
from pallas_kernels.block_selection.best_blocks import best_blocks
from pallas_kernels.compressed_attention.visibility import Visibility, first_visible, visible_end, walk
from pallas_kernels.contract import Sizes
from pallas_kernels.tiles import find_tile, key_of
from pallas_kernels.triton.heads import dot_pieces, head_pieces
from pallas_kernels.triton.integers import div, iota, next_power_of_two, rem
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.problem import Problem, check_num_blocks, check_supported, offset_array, problem_of
from pallas_kernels.triton.rows import load_rows, load_starts, packed_rows, program_pair
from pallas_kernels.triton.softmax import exp2, load_lse_log2
from pallas_kernels.triton.tiles import Tile

_SCRATCH_BYTES = 128 * 2**20  # of float32 scores; half of it costs 5% more at T 65536
_TOP_N_ELEMENTS = 8192  # of importance that a program of the top-n kernel holds
_TOP_N_WARPS = 4
_LEAST_BLOCKS_TO_CUT = 256


def select_blocks(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B Nc K Dk"],
    lse: Float[Array, "B H Tq"],
    segment_starts: Int[Array, "B Tq"] | None,
    query_offset: int | Int[Array, ""],
    *,
    config: Sizes,
    scale: float,
    interpret: bool = False,
    tile: Tile | None = None,
) -> Int[Array, "B K Tq n"]:
    """Indices of the blocks that each query reads; see the contract. `tile` overrides the scoring kernel's.

    Raises:
      NotImplementedError: a dtype, head size, group size, scale or number of blocks that the kernels do not support.
    """
    check_supported(q, k, None, scale=scale)
    (B, Tq, _, _), (_, Nc, K, _) = q.shape, k.shape
    # The longest sequence with Nc compressed tokens bounds the blocks there can be.
    num_blocks = pl.cdiv(Nc * config.compress_stride + config.compress_block - 1, config.select_block)
    check_num_blocks(num_blocks)
    if 0 in (B, Tq, Nc):
        first = jnp.zeros((B, K, Tq, 1), jnp.int32)
        return jnp.pad(first, ((0, 0), (0, 0), (0, 0), (0, config.num_selected - 1)), constant_values=-1)
    problem = problem_of(config, scale, interpret)
    tile = tile or find_tile(tiles.SCORE, key_of(q, k))
    if isinstance(query_offset, int):
        by_reach = {Tq + query_offset: query_ranges(Tq, Nc, num_blocks, query_offset, problem)}
    else:
        by_reach = ranges_by_reach(Tq, Nc, num_blocks, problem)

    def run(q: jax.Array, k: jax.Array, lse: jax.Array, starts: jax.Array | None, offset: jax.Array) -> jax.Array:
        sized = [functools.partial(choose, problem=problem, ranges=x, tile=tile) for x in by_reach.values()]
        beyond = [(offset[0] + Tq > reach).astype(jnp.int32) for reach in list(by_reach)[:-1]]
        chosen = functools.partial(lax.switch, sum(beyond), sized) if beyond else sized[0]
        return chosen(q, k, lse, starts, offset)

    # JAX 0.11 keeps a bare `pallas_call` whose result nothing uses, which flax's scan over layers takes for an error.
    return jax.jit(run)(*lax.stop_gradient((q, k, lse)), segment_starts, offset_array(query_offset))


@dataclasses.dataclass(frozen=True)
class QueryRange:
    """Queries [begin, end) that share kernels sized for `num_keys` compressed tokens and `num_blocks` blocks."""

    begin: int
    end: int
    num_keys: int
    num_blocks: int


def query_ranges(
    num_queries: int, num_keys: int, num_blocks: int, query_offset: int, problem: Problem
) -> list[QueryRange]:
    """Cuts a long sequence at a half and a quarter, because early queries have few blocks to choose from."""
    cuts = [reach - query_offset for reach in _shorter_reaches(num_blocks, problem)]
    bounds = [0, *(cut for cut in cuts if 0 < cut < num_queries), num_queries]
    return [
        _range(begin, end, query_offset + end, num_keys, num_blocks, problem)
        for begin, end in itertools.pairwise(bounds)
    ]


def ranges_by_reach(num_queries: int, num_keys: int, num_blocks: int, problem: Problem) -> dict[int, list[QueryRange]]:
    """Of queries whose offset is found when running: ranges for a quarter, a half and all of the blocks.

    By the position, ascending, that the last query must stand before.
    """
    shorter = [reach for reach in _shorter_reaches(num_blocks, problem) if num_queries <= reach]
    return {
        reach: [_range(0, num_queries, reach, num_keys, num_blocks, problem)]
        for reach in (*shorter, num_blocks * problem.select_block)
    }


def _shorter_reaches(num_blocks: int, problem: Problem) -> list[int]:
    """Lengths of sequences, ascending, that are worth kernels of their own beside those for all blocks."""
    whole = num_blocks * problem.select_block
    return [whole // 4, whole // 2] if num_blocks >= _LEAST_BLOCKS_TO_CUT else []


def _range(begin: int, end: int, reach: int, num_keys: int, num_blocks: int, problem: Problem) -> QueryRange:
    """The range of queries of which the last stands before position `reach`."""
    seen = (reach - problem.compress_block) // problem.compress_stride + 1
    blocks = (reach - 1) // problem.select_block + 1
    return QueryRange(begin, end, max(1, min(num_keys, seen)), max(1, min(num_blocks, blocks)))


def choose(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    starts: jax.Array | None,
    offset: jax.Array,
    problem: Problem,
    ranges: list[QueryRange],
    tile: Tile,
) -> jax.Array:
    """Runs both kernels over every range: int32 [B, K, Tq, n]."""
    (B, Tq, _, _), K = q.shape, k.shape[2]
    chosen = [_choose_in_range(q, k, lse, starts, offset, problem, queries, tile) for queries in ranges]
    return jnp.concatenate(chosen, axis=1).reshape(B, K, Tq, problem.num_selected)


def _choose_in_range(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    starts: jax.Array | None,
    offset: jax.Array,
    problem: Problem,
    queries: QueryRange,
    tile: Tile,
) -> jax.Array:
    """Indices int32 [B K, end - begin, n], chunk by chunk so that the scores of one chunk fit in the scratch."""
    (B, _, H, _), K = q.shape, k.shape[2]
    n = problem.num_selected
    padded_group = next_power_of_two(H // K)
    tile = dataclasses.replace(tile, rows=max(tile.rows, padded_group))
    tile_queries = tile.rows // padded_group
    pool = _pooled_keys(problem, tile.keys)
    planes = _num_planes(problem, pool)
    pooled = pl.cdiv(queries.num_keys, tile.keys) * tile.keys // pool
    most_tiles = max(1, _SCRATCH_BYTES // (4 * B * K * planes * pooled * tile_queries))
    range_tiles = pl.cdiv(queries.end - queries.begin, tile_queries)
    num_chunks = pl.cdiv(range_tiles, most_tiles)
    num_tiles = pl.cdiv(range_tiles, num_chunks)
    chunk = num_tiles * tile_queries
    per_program = min(tile_queries, max(1, _TOP_N_ELEMENTS // next_power_of_two(queries.num_blocks)), 32)
    options: dict[str, Any] = dict(problem=problem, queries=queries, pool=pool)

    score = launch(
        functools.partial(_score_kernel, tile=tile, padded_group=padded_group, **options),
        name="block_selection_score",
        grid=(num_tiles, B * K),
        out_shape=jax.ShapeDtypeStruct((B * K, num_tiles, planes * pooled, tile_queries), jnp.float32),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=problem.interpret,
    )
    top_n = launch(
        functools.partial(_top_n_kernel, per_program=per_program, num_kv_heads=K, **options),
        name="block_selection_top_n",
        grid=(num_tiles * (tile_queries // per_program), B * K),
        out_shape=jax.ShapeDtypeStruct((B * K, chunk, n), jnp.int32),
        num_warps=_TOP_N_WARPS,
        num_stages=1,
        interpret=problem.interpret,
    )

    def one_chunk(index: jax.Array) -> jax.Array:
        first = jnp.reshape(queries.begin + index * chunk, (1,))
        return top_n(first, offset, starts, score(first, offset, starts, q, k, lse))

    if num_chunks == 1:
        chosen = one_chunk(jnp.int32(0))
    else:
        chosen = lax.map(one_chunk, jnp.arange(num_chunks, dtype=jnp.int32))
        chosen = chosen.transpose(1, 0, 2, 3).reshape(B * K, num_chunks * chunk, n)
    return chosen[:, : queries.end - queries.begin]


def _pooled_keys(problem: Problem, tile_keys: int) -> int:
    """Compressed tokens that the scoring kernel sums into one: those of a whole block if their number allows, or 1."""
    ratio = problem.select_block // problem.compress_stride
    return ratio if ratio == next_power_of_two(ratio) and ratio <= tile_keys else 1


def _num_planes(problem: Problem, pool: int) -> int:
    """Sums per block in the scratch: a second one where compressed tokens reach into the next block."""
    return 2 if pool > 1 and problem.compress_block > problem.compress_stride else 1


def _score_kernel(
    first_ref: Any,
    offset_ref: Any,
    starts_ref: Any,
    q_ref: Any,
    k_ref: Any,
    lse_ref: Any,
    score_ref: Any,
    *,
    problem: Problem,
    tile: Tile,
    padded_group: int,
    queries: QueryRange,
    pool: int,
) -> None:
    """Writes the sum of p over the group and over `pool` keys, [planes x Nc / pool, queries of the tile].

    Plane 0 weighs a key by the strides it shares with its own block, plane 1 by those it shares with the next block.
    Tiles of keys that no query of the tile sees are not written.
    """
    (_, _, H, Dk), K = q_ref.shape, k_ref.shape[2]
    num_keys = queries.num_keys
    pieces = head_pieces(Dk, tile.widest)
    tile_queries = tile.rows // padded_group
    overlap = problem.compress_block // problem.compress_stride
    pair = program_pair(K)
    tile_index = pl.program_id(0)
    first_query = first_ref[0] + tile_index * tile_queries
    rows = packed_rows(0, tile.rows, padded_group, pair, H, K)
    query = first_query + rows.query
    valid = rows.valid(query < queries.end)
    sight = Visibility(problem, num_keys, pair.batch, offset_ref[0], starts_ref)
    q = load_rows(q_ref, (pair.batch, query, rows.head), pieces, valid)
    lse_log2 = load_lse_log2(lse_ref, (pair.batch, rows.head, query), valid)
    pooled = pl.cdiv(num_keys, tile.keys) * tile.keys // pool
    column = lax.broadcasted_iota(jnp.int32, (tile.keys // pool, tile_queries), 1)

    def step(i: Any, carry: Any, edge: bool) -> Any:
        key = i * tile.keys + iota(tile.keys)
        k = load_rows(k_ref, (pair.batch, key, pair.kv_head), pieces, key < num_keys if edge else None)
        p = exp2(dot_pieces(k, q) * problem.scale_log2 - lse_log2[None, :], problem.interpret)
        if edge:
            p = jnp.where(sight.mask(key, query, 1), p, 0.0)
        total = jnp.sum(p.reshape(tile.keys, tile_queries, padded_group), axis=2)
        if pool == 1:
            planes = [total]
        else:
            total = total.reshape(tile.keys // pool, pool, tile_queries)
            left = pool - lax.broadcasted_iota(jnp.int32, total.shape, 1)
            own = jnp.minimum(left, overlap).astype(jnp.float32)
            planes = [jnp.sum(total * weight, axis=1) for weight in (own, overlap - own)]
        for plane in range(_num_planes(problem, pool)):
            entry = plane * pooled + i * (tile.keys // pool) + iota(tile.keys // pool)
            at = score_ref.at[pair.index, tile_index, jnp.broadcast_to(entry[:, None], column.shape), column]
            plgpu.store(at, planes[plane])
        return carry

    @pl.when(first_query < queries.end)
    def _score() -> None:
        last_query = jnp.minimum(first_query + tile_queries, queries.end) - 1
        walk(sight.key_ranges((first_query, last_query), tile.keys), step, jnp.int32(0))


def _top_n_kernel(
    first_ref: Any,
    offset_ref: Any,
    starts_ref: Any,
    score_ref: Any,
    chosen_ref: Any,
    *,
    problem: Problem,
    queries: QueryRange,
    pool: int,
    per_program: int,
    num_kv_heads: int,
) -> None:
    """Takes the n blocks of highest importance of each of `per_program` neighbouring queries."""
    tile_queries = score_ref.shape[3]
    n = problem.num_selected
    stride, overlap = (size // problem.compress_stride for size in (problem.select_block, problem.compress_block))
    shape = (next_power_of_two(queries.num_blocks), per_program)
    pair = program_pair(num_kv_heads)
    first_row = pl.program_id(0) * per_program
    row = first_row + iota(per_program)
    query = first_ref[0] + row
    position = offset_ref[0] + query
    start = jnp.zeros((per_program,), jnp.int32)
    if starts_ref is not None:
        start = load_starts(starts_ref, pair.batch, query, query < starts_ref.shape[1])
    block = lax.broadcasted_iota(jnp.int32, shape, 0)
    tile = div(pl.program_id(0), tile_queries // per_program)
    column = rem(first_row, tile_queries) + lax.broadcasted_iota(jnp.int32, shape, 1)

    # Every block adds the same terms in the same order, so that equal scores make equal importance, bit for bit.
    # A term is read only where the query sees one of its keys: elsewhere it may never have been written.
    planes = _num_planes(problem, pool)
    if pool > 1:
        terms = [(-plane, plane, 1.0) for plane in range(planes)]
    else:
        shifts = range(1 - overlap, stride)
        terms = [(shift, 0, float(min(shift + overlap, stride) - max(shift, 0))) for shift in shifts]
    key_begin = first_visible(start, problem)[None, :]
    key_end = visible_end(position, problem, queries.num_keys)[None, :]
    importance = jnp.zeros(shape, jnp.float32)
    for shift, plane, weight in terms:
        entry = block * (stride // pool) + shift
        seen = (entry * pool + pool > key_begin) & (entry * pool < key_end)
        source = plane * (score_ref.shape[2] // planes) + entry
        importance += weight * plgpu.load(score_ref.at[pair.index, tile, source, column], mask=seen, other=0.0)

    first = div(start, problem.select_block)
    ascending = best_blocks(importance, first, position, queries.num_blocks, problem)
    slot = lax.broadcasted_iota(jnp.int32, ascending.shape, 0)
    where = lax.broadcast_in_dim(row, ascending.shape, (1,))
    plgpu.store(chosen_ref.at[pair.index, where, slot], ascending, mask=slot < n)
