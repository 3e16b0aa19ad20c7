"""The public ops: arguments are checked here, once, and handed to the implementation asked for.

Shapes: B batch, T tokens, Tq queries, H query heads, K key/value heads, Nc compressed tokens, n selected blocks.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from nsa_jax import arguments
from nsa_jax.arguments import describe
from nsa_jax.backends import choice, whole
from nsa_jax.cache import NSACache, step_tokens, with_int32
from nsa_jax.config import NSAConfig, check_config, num_compressed
from nsa_jax.explicit import on_auto_axes, split_of
from nsa_jax.precision import wide_dtype
from nsa_jax.visibility import QueryOffset, segment_starts
from pallas_kernels.differentiable import Positions
from pallas_kernels.quantized import Quantized


# How ops split their results over Explicit mesh axes: as queries are, and selected blocks as keys.
def _o_split(arguments: Mapping[str, Any]) -> PartitionSpec:
    return split_of(arguments["q"], 0, 1, 2)


def _lse_split(arguments: Mapping[str, Any]) -> PartitionSpec:
    return split_of(arguments["q"], 0, 2, 1)


def _with_lse_split(arguments: Mapping[str, Any]) -> Any:
    o = _o_split(arguments)
    return (o, _lse_split(arguments)) if arguments.get("return_lse") else o


def _blocks_split(arguments: Mapping[str, Any]) -> PartitionSpec:
    q, k = arguments["q"], arguments["cache"].win_k if "cache" in arguments else arguments["k"]
    return PartitionSpec(*split_of(q, 0), *split_of(k, 2), *split_of(q, 1))


Implementation = str  # the name of a backend, see `nsa_jax.backends`


class BranchKV(NamedTuple):
    """Independent keys and values of the three branches (paper, section 3.3.3)."""

    cmp_k: Float[Array, "B Nc K Dk"]
    cmp_v: Float[Array, "B Nc K Dv"]
    slc_k: Float[Array, "B T K Dk"]
    slc_v: Float[Array, "B T K Dv"]
    win_k: Float[Array, "B T K Dk"]
    win_v: Float[Array, "B T K Dv"]


class AttentionInputs(NamedTuple):
    """Arguments of `nsa_attention`: what `nsa_jax.testing` draws at random, and a layer makes of its input."""

    q: Float[Array, "B Tq H Dk"]
    kv: BranchKV
    gates: Float[Array, "B Tq H 3"]
    segment_ids: Int[Array, "B T"] | None = None
    query_offset: QueryOffset = 0


@on_auto_axes(_o_split)
def nsa_attention(
    q: Float[Array, "B Tq H Dk"],
    kv: BranchKV,
    gates: Float[Array, "B Tq H 3"],
    *,
    config: NSAConfig,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    query_offset: QueryOffset = 0,
    implementation: Implementation | None = None,
) -> Float[Array, "B Tq H Dv"]:
    """Native Sparse Attention: o_t = sum over branches c of g_t^c Attn(q_t, K~_t^c, V~_t^c) (equation 5).

    Example:
      >>> import jax
      >>> from nsa_jax.testing import random_inputs
      >>> config = NSAConfig()
      >>> q, kv, gates, *_ = random_inputs(jax.random.key(0), config, T=100, num_heads=4, num_kv_heads=2, head_dim=16)
      >>> jax.jit(nsa_attention, static_argnames="config")(q, kv, gates, config=config).shape
      (1, 100, 4, 16)

    Args:
      q: queries [B, Tq, H, Dk], float16, bfloat16, float32 or (under x64) float64. H is a multiple of K, and the
        H / K heads of a group share keys, values and selected blocks.
      kv: keys and values of each branch, in the dtype of `q`. `cmp_*` [B, Nc, K, Dk|Dv] with
        Nc = `num_compressed(T, config)`, the others [B, T, K, Dk|Dv].
      gates: [B, Tq, H, 3] in the order compressed, selected, window; any float dtype.
      config: the sizes of the branches. Of a branch that is off (size 0), keys, values and gates are not read: pass
        any that fit, such as those of another branch.
      scale: factor of the scores; Dk ** -0.5 if None.
      segment_ids: integers [B, T]; a run of equal ids is a segment. A query sees its own segment only.
      query_offset: position of the first query (int, or integer scalar, traced or not). `q` then holds positions
        query_offset .. query_offset + Tq - 1 of the sequence that the keys cover from 0 to T - 1.
      implementation: "reference", "xla", "triton", "mosaic", or None for the fastest that supports the device and
        the arguments.

    Returns:
      [B, Tq, H, Dv] in the dtype of `q`.

    Raises:
      ValueError: an argument's shape, dtype or value does not fit, named with what was expected.
      NotImplementedError: the named implementation does not support the arguments.
    """
    q, kv, gates = checked_branches(q, kv, gates, config)
    positions = checked_positions(q, kv.slc_k.shape[1], "k", segment_ids, query_offset)
    return whole.nsa_attention(
        q, kv, gates, positions, positions, implementation, config=config, scale=score_scale(q, scale)
    )


def checked_branches(
    q: Float[Array, "B Tq H Dk"], kv: BranchKV, gates: Float[Array, "B Tq H 3"], config: NSAConfig, *, parts: int = 1
) -> tuple[Array, BranchKV, Array]:
    """(q, kv, gates) as JAX arrays; ValueError for arrays that do not fit together.

    All arrays except `kv.cmp_*` may hold one of `parts` equal parts of the tokens.
    """
    if not isinstance(kv, BranchKV):
        raise ValueError(f"kv = {type(kv).__name__}: expected an nsa_jax.BranchKV")
    pairs = {}
    for name in ("cmp", "slc", "win"):
        k, v = getattr(kv, f"{name}_k"), getattr(kv, f"{name}_v")
        q, pairs[f"{name}_k"], pairs[f"{name}_v"] = checked_attention(q, k, v, config, f"kv.{name}_")
    kv, gates = BranchKV(**pairs), arguments.array("gates", gates)
    if gates.shape != (*q.shape[:3], 3) or not jnp.issubdtype(gates.dtype, jnp.floating):
        raise ValueError(f"gates: {describe(gates)}: expected a float array of shape {(*q.shape[:3], 3)}")
    S = kv.slc_k.shape[1]
    if kv.win_k.shape[1] != S:
        raise ValueError(f"kv.win_k has {kv.win_k.shape[1]} tokens and kv.slc_k {S}: expected the same number")
    T = S * parts
    if kv.cmp_k.shape[1] != num_compressed(T, config):
        raise ValueError(
            f"kv.cmp_k has {kv.cmp_k.shape[1]} compressed tokens: expected num_compressed({T}, config) = "
            f"{num_compressed(T, config)}"
        )
    for name in ("cmp", "slc", "win"):
        k, v = getattr(kv, f"{name}_k"), getattr(kv, f"{name}_v")
        if (k.shape[2], v.shape[3]) != (kv.cmp_k.shape[2], kv.cmp_v.shape[3]):
            raise ValueError(
                f"kv.{name}_v: {describe(v)}: expected the number and size of heads of kv.cmp_v: {describe(kv.cmp_v)}"
            )
    return q, kv, gates


@on_auto_axes(lambda a: (_o_split(a), _lse_split(a)))
def compressed_attention(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B Nc K Dk"],
    v: Float[Array, "B Nc K Dv"],
    *,
    config: NSAConfig,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    query_offset: QueryOffset = 0,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B Tq H Dv"], Float[Array, "B H Tq"]]:
    """Attention to the compressed tokens that end at or before each query (section 3.3.1).

    Token i stands for tokens [i d, i d + l) and is visible to the query at t iff i d + l - 1 <= t and all of its
    tokens lie in the query's segment. A query that sees none gets output 0 and lse = -inf, with zero gradients.

    Example:
      >>> import jax
      >>> from nsa_jax.testing import random_inputs
      >>> config = NSAConfig()
      >>> q, kv, *_ = random_inputs(jax.random.key(0), config, T=100, num_heads=4, num_kv_heads=2, head_dim=16)
      >>> o, lse = compressed_attention(q, kv.cmp_k, kv.cmp_v, config=config)
      >>> o.shape, lse.shape
      ((1, 100, 4, 16), (1, 4, 100))

    Arguments and errors: see `nsa_attention`. `k` and `v` are compressed keys and values.

    Returns:
      o [B, Tq, H, Dv] in the dtype of `q`, and the natural logarithm of the softmax's sum, lse [B, H, Tq] in float32
      (float64 for float64 inputs). Both are differentiable.
    """
    q, k, v = checked_attention(q, k, v, config)
    positions = _positions_among_compressed(q, k, segment_ids, query_offset, config)
    return choice.run(
        "compressed_attention",
        implementation,
        (q, k, v, *positions),
        config=config,
        scale=score_scale(q, scale),
        return_lse=True,
    )


@on_auto_axes(_blocks_split)
def select_blocks(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B Nc K Dk"],
    lse: Float[Array, "B H Tq"],
    *,
    config: NSAConfig,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    query_offset: QueryOffset = 0,
    implementation: Implementation | None = None,
) -> Int[Array, "B K Tq n"]:
    """The blocks each query reads, shared by the heads of a group (section 3.3.2, equations 8 to 12).

    A block's importance is the sum, over the group's heads and the compressed tokens i, of c(i, j) p_i, where c(i, j)
    is the number of stride-chunks that token i and block j share. The first `num_init` blocks of the query's segment
    and the last `num_local` up to its own are always read. Ties go to the lower index. Without
    `config.select_in_window`, the others begin before the window of the query at t: j s <= t - w.

    Example:
      >>> import jax
      >>> from nsa_jax.testing import random_inputs
      >>> config = NSAConfig(select_block=32, num_selected=3)
      >>> q, kv, *_ = random_inputs(jax.random.key(0), config, T=100, num_heads=4, num_kv_heads=2, head_dim=16)
      >>> _, lse = compressed_attention(q, kv.cmp_k, kv.cmp_v, config=config)
      >>> select_blocks(q, kv.cmp_k, lse, config=config)[0, 0, 40]
      Array([ 0,  1, -1], dtype=int32)

    Arguments and errors: see `nsa_attention`. `k` holds the compressed keys, and `lse` [B, H, Tq] is what
      `compressed_attention` returned for them.

    Returns:
      int32 [B, K, Tq, n], ascending, padded at the end with -1 where fewer than n blocks exist. Carries no gradient.
    """
    check_config(config, "num_selected")
    q, k, _ = checked_attention(q, k, None, config, values=False)
    lse = arguments.array("lse", lse)
    expected, dtype = (q.shape[0], q.shape[2], q.shape[1]), wide_dtype(q.dtype)
    if lse.shape != expected or lse.dtype != dtype:
        raise ValueError(f"lse: {describe(lse)}: expected {dtype} of shape (B, H, Tq) = {expected}")
    positions = _positions_among_compressed(q, k, segment_ids, query_offset, config)
    q, k, lse = jax.lax.stop_gradient((q, k, lse))
    scale = score_scale(q, scale)
    return choice.run("select_blocks", implementation, (q, k, lse, *positions), config=config, scale=scale)


@overload
def selected_attention(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    block_indices: Int[Array, "B K Tq n"],
    *,
    config: NSAConfig,
    scale: float | None = ...,
    segment_ids: Int[Array, "B T"] | None = ...,
    query_offset: QueryOffset = ...,
    return_lse: Literal[False] = ...,
    implementation: Implementation | None = ...,
) -> Float[Array, "B Tq H Dv"]: ...


@overload
def selected_attention(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    block_indices: Int[Array, "B K Tq n"],
    *,
    config: NSAConfig,
    scale: float | None = ...,
    segment_ids: Int[Array, "B T"] | None = ...,
    query_offset: QueryOffset = ...,
    return_lse: Literal[True],
    implementation: Implementation | None = ...,
) -> tuple[Float[Array, "B Tq H Dv"], Float[Array, "B H Tq"]]: ...


@on_auto_axes(_with_lse_split)
def selected_attention(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    block_indices: Int[Array, "B K Tq n"],
    *,
    config: NSAConfig,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    query_offset: QueryOffset = 0,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Any:
    """Attention to the tokens of the selected blocks with position <= t, in the query's segment (section 3.3.2).

    The blocks may come from `select_blocks` or from a choice of your own, which need not be as many as
    `config.num_selected`.

    Example:
      >>> import jax
      >>> from nsa_jax.testing import random_inputs
      >>> config = NSAConfig()
      >>> q, kv, *_ = random_inputs(jax.random.key(0), config, T=100, num_heads=4, num_kv_heads=2, head_dim=16)
      >>> block_indices = jax.numpy.full((1, 2, 100, 16), -1).at[..., 0].set(0)  # the first block and no other
      >>> selected_attention(q, kv.slc_k, kv.slc_v, block_indices, config=config).shape
      (1, 100, 4, 16)

    Arguments and errors: see `nsa_attention`. Of `config`, only `select_block` is read.
      `block_indices`: integers [B, K, Tq, n] with any n of at least 1; for each query, distinct blocks in ascending
        order, then -1. A block after the query's own counts as -1. The indices carry no gradient.
      `return_lse`: whether lse is returned too.

    Returns:
      o [B, Tq, H, Dv] in the dtype of `q`; 0 for a query that no selected token is visible to. With `return_lse`
      (o, lse), as `compressed_attention` returns them; lse is -inf for such a query.
    """
    q, k, v = checked_attention(q, k, v, config)
    block_indices = arguments.array("block_indices", block_indices)
    expected = (q.shape[0], k.shape[2], q.shape[1], max((1, *block_indices.shape[3:4])))
    block_indices = arguments.integers("block_indices", block_indices, expected, "(B, K, Tq, n)")
    positions = checked_positions(q, k.shape[1], "k", segment_ids, query_offset)
    own = (positions.query_offset + jnp.arange(q.shape[1], dtype=jnp.int32)) // config.select_block
    block_indices = jnp.where(block_indices > own[None, None, :, None], -1, block_indices)
    return choice.run(
        "selected_attention",
        implementation,
        (q, k, v, block_indices, *positions),
        config=config,
        scale=score_scale(q, scale),
        return_lse=return_lse,
    )


@overload
def window_attention(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    *,
    config: NSAConfig,
    scale: float | None = ...,
    segment_ids: Int[Array, "B T"] | None = ...,
    query_offset: QueryOffset = ...,
    return_lse: Literal[False] = ...,
    implementation: Implementation | None = ...,
) -> Float[Array, "B Tq H Dv"]: ...


@overload
def window_attention(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    *,
    config: NSAConfig,
    scale: float | None = ...,
    segment_ids: Int[Array, "B T"] | None = ...,
    query_offset: QueryOffset = ...,
    return_lse: Literal[True],
    implementation: Implementation | None = ...,
) -> tuple[Float[Array, "B Tq H Dv"], Float[Array, "B H Tq"]]: ...


@on_auto_axes(_with_lse_split)
def window_attention(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    *,
    config: NSAConfig,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    query_offset: QueryOffset = 0,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Any:
    """Attention to the last w positions, t - w + 1 .. t, of the query's segment (section 3.3.3).

    Example:
      >>> import jax
      >>> from nsa_jax.testing import random_inputs
      >>> config = NSAConfig()
      >>> q, kv, *_ = random_inputs(jax.random.key(0), config, T=100, num_heads=4, num_kv_heads=2, head_dim=16)
      >>> window_attention(q, kv.win_k, kv.win_v, config=config).shape
      (1, 100, 4, 16)

    Arguments and errors: see `nsa_attention`. Of `config`, only `window` is read.
      `return_lse`: whether lse is returned too.

    Returns:
      o [B, Tq, H, Dv] in the dtype of `q`; with `return_lse` (o, lse), as `compressed_attention` returns them.
    """
    check_config(config, "window")
    q, k, v = checked_attention(q, k, v, config)
    positions = checked_positions(q, k.shape[1], "k", segment_ids, query_offset)
    return choice.run(
        "window_attention",
        implementation,
        (q, k, v, *positions),
        config=config,
        scale=score_scale(q, scale),
        return_lse=return_lse,
    )


@on_auto_axes(lambda a: (_o_split(a), _blocks_split(a)))
def decode_attention(
    q: Float[Array, "B m H Dk"],
    cache: NSACache,
    gates: Float[Array, "B m H 3"],
    query_offsets: Int[Array, " B"],
    *,
    config: NSAConfig,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B m H Dv"], Int[Array, "B K m n"]]:
    """`nsa_attention` of the newest few tokens of each row, over a cache that holds them already (equation 5).

    Reads the compressed tokens, the pages of the selected blocks and the window's ring, and nothing else.

    Example:
      >>> import jax.numpy as jnp
      >>> from nsa_jax import init_nsa_cache
      >>> config = NSAConfig()
      >>> cache = init_nsa_cache(config, batch_size=2, max_length=128, num_kv_heads=1, head_dim=16)
      >>> q, gates = jnp.ones((2, 1, 4, 16)), jnp.ones((2, 1, 4, 3))
      >>> o, block_indices = decode_attention(q, cache, gates, cache.lengths, config=config)
      >>> o.shape, block_indices.shape
      ((2, 1, 4, 16), (2, 1, 1, 16))

    Args:
      q: queries [B, m, H, Dk] in the dtype of the cache, m at most the cache's `step_tokens`. Those of row b stand at
        positions query_offsets[b] .. query_offsets[b] + m - 1.
      cache: with the keys and values at these positions written, and with the lengths after that. What its places
        from these lengths on hold does not matter. Where a row got fewer than m tokens, the results of its other
        queries are finite and mean nothing.
      gates: [B, m, H, 3] in the order compressed, selected, window; any float dtype.
      query_offsets: int32 [B].
      config, scale, implementation: see `nsa_attention`.

    Returns:
      o [B, m, H, Dv] in the dtype of `q`, and the selected blocks, int32 [B, K, m, n] as from `select_blocks`.

    Raises:
      ValueError: an argument's shape, dtype or value does not fit, named with what was expected.
      NotImplementedError: the named implementation does not support the arguments.
    """
    if not isinstance(cache, NSACache):
        raise ValueError(f"cache = {type(cache).__name__}: expected an nsa_jax.NSACache")
    q, *_ = checked_attention(q, cache.win_k, cache.win_v, config)
    gates = arguments.array("gates", gates)
    B, m, H, _ = q.shape
    if cache.lengths.shape != (B,) or cache.slc_k.shape[2] != config.select_block:
        raise ValueError(
            f"cache has {cache.lengths.shape[0]} rows and pages of {cache.slc_k.shape[2]} tokens: expected {B}, the "
            f"batch of q, and config.select_block = {config.select_block}"
        )
    for branch, pages, tokens in (
        ("cmp", cache.cmp_k.shape[0], config.select_block // config.compress_stride),
        ("slc", cache.cmp_k.shape[0] if config.num_selected else 0, config.select_block),
    ):
        for name, ring in ((f"{branch}_k", cache.win_k), (f"{branch}_v", cache.win_v)):
            pool, shape = getattr(cache, name), (pages, ring.shape[2], tokens, ring.shape[3])
            if pool.shape != shape or (isinstance(pool, Quantized) and pool.scale.shape != (*shape[:3], 1)):
                raise ValueError(
                    f"cache.{name}: {describe(pool)}: expected shape {shape}, of pages, heads, tokens and head size, "
                    "as in cache.cmp_k and the window's ring"
                )
    if m > step_tokens(cache, config):
        raise ValueError(
            f"q: {describe(q)}: expected at most {step_tokens(cache, config)} queries a row, the cache's step_tokens"
        )
    if gates.shape != (B, m, H, 3) or not jnp.issubdtype(gates.dtype, jnp.floating):
        raise ValueError(f"gates: {describe(gates)}: expected a float array of shape {(B, m, H, 3)}")
    query_offsets = arguments.integers("query_offsets", query_offsets, (B,), "(B,)")
    arrays = (cache.cmp_k, cache.cmp_v, cache.slc_k, cache.slc_v, cache.win_k, cache.win_v)
    cache = with_int32(cache)
    inputs = (q, *arrays, gates, query_offsets, cache.lengths, cache.block_tables)
    return choice.run("decode_attention", implementation, inputs, config=config, scale=score_scale(q, scale))


def score_scale(q: Array, scale: float | None) -> float:
    """The factor of the scores; Dk ** -0.5 if None is given."""
    return q.shape[-1] ** -0.5 if scale is None else arguments.real("scale", scale)


def checked_positions(
    q: Array, T: int, what: str, segment_ids: Array | None, query_offset: QueryOffset, *, at_most: bool = False
) -> Positions:
    """Where the queries stand among T tokens, which `what` covers (`at_most`: T or fewer).

    Without segments there are no `segment_starts`, which kernels need not read then.
    """
    B, Tq = q.shape[:2]
    query_offset = arguments.offset("query_offset", query_offset)
    starts = None
    if segment_ids is not None:
        segment_ids = checked_segment_ids(segment_ids, B)
        if not at_most and segment_ids.shape[1] != T:
            raise ValueError(f"segment_ids: {describe(segment_ids)}: expected one id for each of the T = {T} keys")
        if at_most:
            _check_queries_fit(Tq, query_offset, segment_ids.shape[1], "segment_ids")
    _check_queries_fit(Tq, query_offset, T, what)
    if segment_ids is not None:
        starts = jax.lax.dynamic_slice_in_dim(segment_starts(segment_ids), query_offset, Tq, axis=1)
    return Positions(starts, query_offset)


def checked_segment_ids(segment_ids: Any, B: int, T: int | None = None) -> Int[Array, "B T"]:
    """Segment ids as a JAX array of any integer dtype; ValueError for what is not [B, T], with any T if it is None."""
    segment_ids = arguments.array("segment_ids", segment_ids)
    expected = (B, *segment_ids.shape[1:2]) if T is None else (B, T)
    if segment_ids.ndim != 2 or segment_ids.shape != expected or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        shape = f"(B, T) with B = {B}" if T is None else str(expected)
        raise ValueError(f"segment_ids: {describe(segment_ids)}: expected integers of shape {shape}")
    return segment_ids


def checked_attention(
    q: Any, k: Any, v: Any, config: NSAConfig, prefix: str = "", *, values: bool = True
) -> tuple[Float[Array, "B Tq H Dk"], Float[Array, "B T K Dk"], Any]:
    """(q, k, v) as JAX arrays; ValueError if they do not fit together.

    `prefix` begins the names of the keys and values. Without `values` there is no v.
    """
    check_config(config)
    q, k = arguments.array("q", q), arguments.array(f"{prefix}k", k)
    v = arguments.array(f"{prefix}v", v) if values else None
    for name, array in (("q", q), (f"{prefix}k", k), (f"{prefix}v", v)):
        if array is None:
            continue
        if array.ndim != 4:
            raise ValueError(f"{name}: {describe(array)}: expected 4 axes (batch, tokens, heads, head size)")
        if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype != q.dtype:
            raise ValueError(f"{name}: {describe(array)}: expected a float dtype, the same as q's {q.dtype}")
        if array.shape[2] < 1 or (array.shape[3] < 1 and array is not v):
            raise ValueError(f"{name}: {describe(array)}: expected at least one head, of size at least 1")
    B, Tq, H, Dk = q.shape
    if Tq < 1:
        raise ValueError(f"q: {describe(q)}: expected at least one query")
    if k.shape[0] != B or k.shape[3] != Dk:
        raise ValueError(f"{prefix}k: {describe(k)}: expected batch {B} and head size {Dk}, as q: {describe(q)}")
    if H % k.shape[2]:
        raise ValueError(f"{prefix}k: {describe(k)}: expected a number of heads that divides q's {H}")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"{prefix}v: {describe(v)}: expected batch, tokens and heads {k.shape[:3]}, as {prefix}k: {describe(k)}"
        )
    return q, k, v


def _positions_among_compressed(
    q: Array, k: Array, segment_ids: Array | None, query_offset: QueryOffset, config: NSAConfig
) -> Positions:
    longest = k.shape[1] * config.compress_stride + config.compress_block - 1
    what = f"k with {k.shape[1]} compressed tokens"
    if segment_ids is not None:
        segment_ids = checked_segment_ids(segment_ids, q.shape[0])
        if num_compressed(segment_ids.shape[1], config) != k.shape[1]:
            raise ValueError(f"segment_ids: {describe(segment_ids)}: expected one id for each of the tokens of {what}")
    return checked_positions(q, longest, what, segment_ids, query_offset, at_most=True)


def _check_queries_fit(Tq: int, query_offset: QueryOffset, T: int, what: str) -> None:
    offset = 0 if isinstance(query_offset, jax.core.Tracer) else int(query_offset)
    if offset < 0 or offset + Tq > T:
        raise ValueError(
            f"query_offset = {offset} with {Tq} queries: expected positions within the sequence of at most {T} tokens "
            f"that {what} covers"
        )
