"""Block selection on the Pallas Triton backend: a scoring kernel and a top-n kernel, over slabs of queries.

The scores of one slab, summed over the group and pooled, are all that reaches memory: a float32 scratch of bounded
size. A compressed token shares chunks with its own block and, overlapping, with the next one, so the scoring kernel
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

from pallas_kernels.compressed_attention import tiling
from pallas_kernels.compressed_attention.tiling import Tile
from pallas_kernels.contract import Sizes
from pallas_kernels.tiles import exp2
from pallas_kernels.triton.problem import Problem, check_supported, offset_array, problem_of
from pallas_kernels.triton_call import triton_call

_SCRATCH_BYTES = 128 * 2**20  # of float32 scores; half of it costs 5% more at T 65536
_MOST_BLOCKS = 32768
_TOP_N_ELEMENTS = 8192
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
    if num_blocks > _MOST_BLOCKS:
        raise NotImplementedError(f"blocks of {Nc} compressed tokens = {num_blocks}: expected at most {_MOST_BLOCKS}")
    if 0 in (B, Tq, Nc):
        first = jnp.zeros((B, K, Tq, 1), jnp.int32)
        return jnp.pad(first, ((0, 0), (0, 0), (0, 0), (0, config.num_selected - 1)), constant_values=-1)
    problem, starts, offset = problem_of(config, scale, interpret), segment_starts, offset_array(query_offset)
    q, k, lse = lax.stop_gradient((q, k, lse))
    if isinstance(query_offset, int):
        by_reach = {Tq + query_offset: query_spans(Tq, Nc, num_blocks, query_offset, problem)}
    else:
        by_reach = spans_by_reach(Tq, Nc, num_blocks, problem)

    def run(q: jax.Array, k: jax.Array, lse: jax.Array, starts: jax.Array | None, offset: jax.Array) -> jax.Array:
        sized = [functools.partial(choose, problem=problem, spans=x, tile=tile) for x in by_reach.values()]
        beyond = [(offset[0] + Tq > reach).astype(jnp.int32) for reach in list(by_reach)[:-1]]
        chosen = functools.partial(lax.switch, sum(beyond), sized) if beyond else sized[0]
        return chosen(q, k, lse, starts, offset)

    # JAX 0.11 keeps a bare `pallas_call` whose result nothing uses, which flax's scan over layers takes for an error.
    return jax.jit(run)(q, k, lse, starts, offset)


def scoring_tile(head_size: int, dtype: Any) -> Tile:
    """Tile of the scoring kernel: packed query rows by compressed keys.

    Milliseconds of the whole selection on one H100, H 64, K 4, bfloat16: T 65536 for head size 128, 32768 for others.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return Tile(rows=32, keys=32, num_warps=4, num_stages=1)
    if head_size <= 128:
        return Tile(rows=128, keys=64, num_warps=4, num_stages=3)  # 8.2; 128 x 128, 8 warps, 2 stages 4% more
    if head_size <= 192:
        return Tile(rows=128, keys=64, num_warps=4, num_stages=2)  # 3.05 at 192; 8 warps 5.70
    return Tile(rows=128, keys=64, num_warps=8, num_stages=2)  # 4.43 at 256; 4 warps 4.53


@dataclasses.dataclass(frozen=True)
class Span:
    """Queries [begin, end) that share kernels sized for `num_keys` compressed tokens and `num_blocks` blocks."""

    begin: int
    end: int
    num_keys: int
    num_blocks: int


def query_spans(num_queries: int, num_keys: int, num_blocks: int, query_offset: int, problem: Problem) -> list[Span]:
    """Cuts a long sequence at a half and a quarter, because early queries have few blocks to choose from."""
    cuts = [reach - query_offset for reach in _shorter_reaches(num_blocks, problem)]
    bounds = [0, *(cut for cut in cuts if 0 < cut < num_queries), num_queries]
    return [
        _span(begin, end, query_offset + end, num_keys, num_blocks, problem)
        for begin, end in itertools.pairwise(bounds)
    ]


def spans_by_reach(num_queries: int, num_keys: int, num_blocks: int, problem: Problem) -> dict[int, list[Span]]:
    """Of queries whose offset is found when running: spans for a quarter, a half and all of the blocks.

    By the position, ascending, that the last query must stand before.
    """
    shorter = [reach for reach in _shorter_reaches(num_blocks, problem) if num_queries <= reach]
    return {
        reach: [_span(0, num_queries, reach, num_keys, num_blocks, problem)]
        for reach in (*shorter, num_blocks * problem.select_block)
    }


def _shorter_reaches(num_blocks: int, problem: Problem) -> list[int]:
    """Lengths of sequences, ascending, that are worth kernels of their own beside those for all blocks."""
    whole = num_blocks * problem.select_block
    return [whole // 4, whole // 2] if num_blocks >= _LEAST_BLOCKS_TO_CUT else []


def _span(begin: int, end: int, reach: int, num_keys: int, num_blocks: int, problem: Problem) -> Span:
    """The span of queries of which the last stands before position `reach`."""
    seen = (reach - 1 - problem.compress_block) // problem.compress_stride + 1
    blocks = (reach - 1) // problem.select_block + 1
    return Span(begin, end, max(1, min(num_keys, seen)), max(1, min(num_blocks, blocks)))


def choose(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    starts: jax.Array | None,
    offset: jax.Array,
    problem: Problem,
    spans: list[Span],
    tile: Tile | None = None,
    scratch_bytes: int = _SCRATCH_BYTES,
    top_n_elements: int = _TOP_N_ELEMENTS,
    top_n_warps: int = 4,
) -> jax.Array:
    """Runs both kernels over every span; the last four arguments override the choices, for measurements."""
    B, Tq, H, Dk = q.shape
    K = k.shape[2]
    q = q.reshape(B, Tq, K, H // K, Dk)
    lse = lse.reshape(B, K, H // K, Tq)
    tile = tile or scoring_tile(Dk, q.dtype)
    chosen = [
        _choose_in_span(q, k, lse, starts, offset, problem, span, tile, scratch_bytes, top_n_elements, top_n_warps)
        for span in spans
    ]
    return jnp.concatenate(chosen, axis=1).reshape(B, K, Tq, problem.num_selected)


def _choose_in_span(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    starts: jax.Array | None,
    offset: jax.Array,
    problem: Problem,
    span: Span,
    tile: Tile,
    scratch_bytes: int,
    top_n_elements: int,
    top_n_warps: int,
) -> jax.Array:
    """Indices int32 [B K, end - begin, n], slab by slab so that the scores of one slab fit in the scratch."""
    B, Tq, K, G, Dk = q.shape
    n = problem.num_selected
    padded_group = pl.next_power_of_2(G)
    tile = dataclasses.replace(tile, rows=max(tile.rows, padded_group))
    tile_queries = tile.rows // padded_group
    pool = _pooled_keys(problem, tile.keys)
    planes = _num_planes(problem, pool)
    pooled = pl.cdiv(span.num_keys, tile.keys) * tile.keys // pool
    most_tiles = max(1, scratch_bytes // (4 * B * K * planes * pooled * tile_queries))
    span_tiles = pl.cdiv(span.end - span.begin, tile_queries)
    num_slabs = pl.cdiv(span_tiles, most_tiles)
    tiles = pl.cdiv(span_tiles, num_slabs)
    slab = tiles * tile_queries
    queries = min(tile_queries, max(1, top_n_elements // pl.next_power_of_2(span.num_blocks)), 32)
    per_tile = tile_queries // queries

    scalar = pl.BlockSpec((1,), lambda i, y: (0,))
    starts_spec = None if starts is None else pl.BlockSpec((None, Tq), lambda i, y: (lax.div(y, K), 0))
    score_block = (None, None, planes * pooled, tile_queries)
    score = triton_call(
        functools.partial(_score_kernel, problem=problem, tile=tile, padded_group=padded_group, span=span, pool=pool),
        name="block_selection_score",
        grid=(tiles, B * K),
        in_specs=[
            scalar,
            scalar,
            starts_spec,
            tiling.query_spec(Tq, K, G, Dk),
            tiling.key_spec(k.shape[1], K, Dk),
            pl.BlockSpec((None, None, G, Tq), lambda i, y: (lax.div(y, K), lax.rem(y, K), 0, 0)),
        ],
        out_specs=pl.BlockSpec(score_block, lambda i, y: (y, i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((B * K, tiles, planes * pooled, tile_queries), jnp.float32),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=problem.interpret,
    )
    top_n = triton_call(
        functools.partial(_top_n_kernel, problem=problem, span=span, queries=queries, pool=pool),
        name="block_selection_top_n",
        grid=(tiles * per_tile, B * K),
        in_specs=[
            scalar,
            scalar,
            starts_spec,
            pl.BlockSpec(score_block, lambda i, y: (y, lax.div(i, jnp.int32(per_tile)), 0, 0)),
        ],
        out_specs=pl.BlockSpec((None, slab, n), lambda i, y: (y, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((B * K, slab, n), jnp.int32),
        num_warps=top_n_warps,
        num_stages=1,
        interpret=problem.interpret,
    )

    def one_slab(index: jax.Array) -> jax.Array:
        first = jnp.reshape(span.begin + index * slab, (1,))
        return top_n(first, offset, starts, score(first, offset, starts, q, k, lse))

    if num_slabs == 1:
        chosen = one_slab(jnp.int32(0))
    else:
        chosen = lax.map(one_slab, jnp.arange(num_slabs, dtype=jnp.int32))
        chosen = chosen.transpose(1, 0, 2, 3).reshape(B * K, num_slabs * slab, n)
    return chosen[:, : span.end - span.begin]


def _pooled_keys(problem: Problem, tile_keys: int) -> int:
    """Compressed tokens that the scoring kernel sums into one: a whole block's where their number allows, else 1."""
    ratio = problem.select_block // problem.compress_stride
    return ratio if ratio == pl.next_power_of_2(ratio) and ratio <= tile_keys else 1


def _num_planes(problem: Problem, pool: int) -> int:
    """Sums per block in the scratch: a second one where compressed tokens reach into the next block."""
    return 2 if pool > 1 and problem.compress_block > problem.compress_stride else 1


def _score_kernel(
    slab_ref: Any,
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
    span: Span,
    pool: int,
) -> None:
    """Writes the sum of p over the group and over `pool` keys, [planes, Nc / pool, queries of the tile].

    Plane 0 weighs a key by the chunks it shares with its own block, plane 1 by those it shares with the next block.
    Key tiles that no query of the tile sees are not written.
    """
    _, group, key_size = q_ref.shape
    num_keys = span.num_keys
    pieces = tiling.head_pieces(key_size, q_ref.dtype)
    scale = problem.scale * tiling.LOG2E
    tile_queries = tile.rows // padded_group
    overlap = problem.compress_block // problem.compress_stride

    first_query = slab_ref[0] + pl.program_id(0) * tile_queries
    row, head = tiling.packed_rows(0, tile.rows, padded_group)
    query = first_query + row
    valid = (query < span.end) & (head < group)
    offset = offset_ref[0]
    q = tiling.load_rows(q_ref, query, head, valid, pieces)
    # Rows that pad the group or the sequence have lse = inf, hence p = 0.
    lse2 = plgpu.load(lse_ref.at[head, query], mask=valid, other=jnp.inf) * tiling.LOG2E

    def body(masked: bool) -> Any:
        def step(j: Any, carry: Any) -> Any:
            first_key = j * tile.keys
            k = tiling.load_keys(k_ref, first_key, tile.keys, num_keys if masked else None, pieces)
            p = exp2(tiling.dot_pieces(k, q) * scale - lse2[None, :], problem.interpret)
            if masked:
                key = first_key + lax.broadcasted_iota(jnp.int32, (tile.keys,), 0)
                p = jnp.where(tiling.visible(key, query, offset, starts_ref, problem, num_keys, 1), p, 0.0)
            total = jnp.sum(p.reshape(tile.keys, tile_queries, padded_group), axis=2)
            if pool == 1:
                planes = [total]
            else:
                total = total.reshape(tile.keys // pool, pool, tile_queries)
                left = pool - lax.broadcasted_iota(jnp.int32, total.shape, 1)
                own = jnp.minimum(left, overlap).astype(jnp.float32)
                planes = [jnp.sum(total * weight, axis=1) for weight in (own, overlap - own)]
            pooled = pl.cdiv(num_keys, tile.keys) * tile.keys // pool
            for plane in range(_num_planes(problem, pool)):
                entries = pl.ds(plane * pooled + j * (tile.keys // pool), tile.keys // pool)
                plgpu.store(score_ref.at[entries, pl.ds(0, tile_queries)], planes[plane])
            return carry

        return step

    @pl.when(first_query < span.end)
    def _score() -> None:
        last_query = jnp.minimum(first_query + tile_queries, span.end) - 1
        ranges = tiling.key_ranges(first_query, last_query, offset, starts_ref, problem, num_keys, tile.keys)
        tiling.walk(ranges, body, jnp.int32(0))


def _top_n_kernel(
    slab_ref: Any,
    offset_ref: Any,
    starts_ref: Any,
    score_ref: Any,
    chosen_ref: Any,
    *,
    problem: Problem,
    span: Span,
    queries: int,
    pool: int,
) -> None:
    """Takes the n blocks of highest importance of each of `queries` neighbouring queries."""
    tile_queries = score_ref.shape[1]
    n = problem.num_selected
    stride, overlap = (
        problem.select_block // problem.compress_stride,
        problem.compress_block // problem.compress_stride,
    )
    shape = (pl.next_power_of_2(span.num_blocks), queries)

    first_row = pl.program_id(0) * queries
    row = first_row + lax.broadcasted_iota(jnp.int32, (queries,), 0)
    query = slab_ref[0] + row
    position = offset_ref[0] + query
    start = jnp.zeros((queries,), jnp.int32)
    if starts_ref is not None:
        start = plgpu.load(starts_ref.at[query], mask=query < starts_ref.shape[0], other=0)
    block = lax.broadcasted_iota(jnp.int32, shape, 0)
    column = lax.rem(first_row, jnp.int32(tile_queries)) + lax.broadcasted_iota(jnp.int32, shape, 1)

    # Every block adds the same terms in the same order, so that equal scores make equal importance, bit for bit.
    # A term is read only where the query sees one of its keys: elsewhere it may never have been written.
    planes = _num_planes(problem, pool)
    if pool > 1:
        terms = [(-plane, plane, 1.0) for plane in range(planes)]
    else:
        shifts = range(1 - overlap, stride)
        terms = [(shift, 0, float(min(shift + overlap, stride) - max(shift, 0))) for shift in shifts]
    key_begin = tiling.first_visible(start, problem)[None, :]
    key_end = tiling.visible_end(position, problem, span.num_keys)[None, :]
    importance = jnp.zeros(shape, jnp.float32)
    for shift, plane, weight in terms:
        entry = block * (stride // pool) + shift
        seen = (entry * pool + pool > key_begin) & (entry * pool < key_end)
        source = plane * (score_ref.shape[0] // planes) + entry
        importance += weight * plgpu.load(score_ref.at[source, column], mask=seen, other=0.0)

    first = tiling.positive_div(start, problem.select_block)
    last = jnp.minimum(tiling.positive_div(position, problem.select_block), span.num_blocks - 1)
    forced = (block < first[None, :] + problem.num_init) | (block > last[None, :] - problem.num_local)
    candidate = (block >= first[None, :]) & (block <= last[None, :])
    importance = jnp.where(candidate, jnp.where(forced, jnp.inf, importance), -jnp.inf)

    ascending = best_blocks(importance, last - first + 1, n)
    place = lax.broadcasted_iota(jnp.int32, ascending.shape, 0)
    where = lax.broadcast_in_dim(row, ascending.shape, (1,))
    plgpu.store(chosen_ref.at[where, place], ascending, mask=place < n)


def best_blocks(importance: jax.Array, candidates: jax.Array, n: int) -> jax.Array:
    """Blocks of highest `importance` [blocks, queries], ties to the lower: ascending, then -1, in a power of two rows.

    `candidates` [queries] says of how many blocks the importance is above -inf. The sides are powers of two.
    """
    queries = importance.shape[1]
    block = lax.broadcasted_iota(jnp.int32, importance.shape, 0)
    # A place past the last candidate holds a number beyond every block, to be sorted to the end.
    places = (pl.next_power_of_2(n), queries)
    place = lax.broadcasted_iota(jnp.int32, places, 0)
    beyond = jnp.int32(1 << 30)

    def take(i: Any, carry: Any) -> Any:
        importance, chosen = carry
        best = jnp.argmax(importance, axis=0).astype(jnp.int32)
        available = i < candidates
        chosen = jnp.where((place == i) & available[None, :], best[None, :], chosen)
        return jnp.where(block == best[None, :], -jnp.inf, importance), chosen

    _, chosen = lax.fori_loop(0, n, take, (importance, beyond + place))
    rank = jnp.sum((chosen[:, None, :] < chosen[None, :, :]).astype(jnp.int32), axis=0)
    placed = rank[:, None, :] == lax.broadcasted_iota(jnp.int32, (places[0], places[0], queries), 1)
    ascending = jnp.sum(jnp.where(placed, chosen[:, None, :], 0), axis=0)
    return jnp.where(ascending >= beyond, -1, ascending)
