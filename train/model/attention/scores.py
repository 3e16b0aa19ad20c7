"""Scores of blocks and tokens, the best of them, and attention to single tokens: what the designs choose with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nsa_jax.config import NSAConfig, num_blocks
from nsa_jax.selection import probabilities
from nsa_jax.visibility import candidate_blocks, choose_blocks
from nsa_jax.xla import map_query_chunks, masked_attention

# The most scores of one chunk of queries. It is larger than in `nsa_jax.xla`: a query here may score all tokens.
CHUNK_ELEMENTS = 1 << 26


def repeated(x: Float[Array, "B T K D"], heads: int) -> Float[Array, "B T N D"]:
    """Keys or values with each head as often in turn as makes `heads` of them."""
    return jnp.repeat(x, heads // x.shape[2], axis=2)


def seen_whole(
    positions: Int[Array, " C"], starts: Int[Array, "B C"], blocks: int, config: NSAConfig
) -> Bool[Array, "B C Nb"]:
    """The blocks of which a query sees every token. What is made of a whole block may score no other."""
    first = config.select_block * jnp.arange(blocks, dtype=jnp.int32)[None, None, :]
    last = first + config.select_block - 1
    return (first >= starts[:, :, None]) & (last <= positions[None, :, None])


def group_sum(q: Float[Array, "B T H D"], groups: int) -> Float[Array, "B T K D"]:
    """The sum of the queries of a group, in float32. Its product with a key is the sum of theirs."""
    B, T, H, D = q.shape
    return q.astype(jnp.float32).reshape(B, T, groups, H // groups, D).sum(axis=3)


def in_whole_blocks(x: Float[Array, "B T K D"], config: NSAConfig) -> Float[Array, "B Nb s K D"]:
    """Cut into blocks, the last one filled up with zeros."""
    B, T, K, D = x.shape
    blocks, s = num_blocks(T, config), config.select_block
    return jnp.pad(x, ((0, 0), (0, blocks * s - T), (0, 0), (0, 0))).reshape(B, blocks, s, K, D)


def accumulable(x: Float[Array, "B T K D"], config: NSAConfig) -> Float[Array, "B S K D"]:
    """Up to whole blocks, and in float32, so that the gradients of chunks are added up in it."""
    return in_whole_blocks(x.astype(jnp.float32), config).reshape(x.shape[0], -1, *x.shape[2:])


def product(equation: str, a: Array, b: Array) -> Float[Array, "..."]:
    """An einsum in float32, which is not rounded to TF32."""
    return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def blocks_of_highest_product(
    q: Float[Array, "B T K D"], k: Float[Array, "B Nb K D"], starts: Int[Array, "B T"], config: NSAConfig
) -> Int[Array, "B K T n"]:
    """The n blocks whose one key has the highest products with a group's one query, forced blocks included.

    A block is a candidate beyond the forced ones only if the query sees it whole.
    """

    def choose(positions: Array, q: Array, starts: Array) -> Array:
        score = product("bckd,bnkd->bkcn", q, k)
        whole = seen_whole(positions, starts, k.shape[1], config)[:, None]
        return jnp.moveaxis(choose_blocks(jnp.where(whole, score, -jnp.inf), positions, starts, config), 2, 1)

    elements = q.shape[0] * k.shape[1] * k.shape[2]
    return jnp.moveaxis(in_chunks(choose, elements, q, starts), 1, 2)


def attention_mass(
    positions: Int[Array, " C"],
    q: Float[Array, "B C H Dk"],
    starts: Int[Array, "B C"],
    k: Float[Array, "B S K Dk"],
) -> Float[Array, "B K C S"]:
    """The probability of every token up to a query's own in the softmax over all of them, summed over the group."""
    seen = seen_tokens(positions, starts, jnp.arange(k.shape[1], dtype=jnp.int32))
    return probabilities(q, k, seen[:, None], q.shape[-1] ** -0.5).sum(axis=2)


def best_tokens(
    importance: Float[Array, "B K C S"], positions: Int[Array, " C"], starts: Int[Array, "B C"], config: NSAConfig
) -> Bool[Array, "B K C S"]:
    """The n s tokens of highest importance that a query reads, those of the forced blocks included.

    As in NSA, the tokens of the query's own block that come after it take up places and are not read. Ties go to the
    lower position. S is a multiple of s.
    """
    s, S = config.select_block, importance.shape[3]
    key = jnp.arange(S, dtype=jnp.int32)
    seen = seen_tokens(positions, starts, key)
    _, forced = candidate_blocks(positions, starts, S // s, config)
    forced = jnp.repeat(forced, s, axis=2)[:, None]
    score = jnp.where(forced, jnp.inf, jnp.where(seen, importance, -jnp.inf))
    count = min(config.num_selected * s, S)
    threshold = jnp.sort(score, axis=-1)[..., S - count, None]
    above, equal = score > threshold, score == threshold
    places = count - above.sum(axis=-1, keepdims=True, dtype=jnp.int32)
    return (above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= places))) & seen


def seen_tokens(
    positions: Int[Array, " C"], starts: Int[Array, "B C"], key: Int[Array, " S"]
) -> Bool[Array, "B 1 C S"]:
    """The tokens of a query's segment up to its own."""
    return ((key[None, None, :] <= positions[None, :, None]) & (key[None, None, :] >= starts[:, :, None]))[:, None]


def attend_to_tokens(
    mask: Callable[[Array, Array, Array], Bool[Array, "B K C S"]],
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B S K Dk"],
    v: Float[Array, "B S K Dv"],
    starts: Int[Array, "B Tq"],
    query_offset: int | Int[Array, ""] = 0,
) -> Float[Array, "B Tq H Dv"]:
    """Attention under mask(positions [C], queries [B, C, H, Dk], starts [B, C]), a chunk of queries at a time.

    This scores every key: for training it costs no more than dense attention, and gathers nothing.
    """

    def attend(positions: Array, q: Array, starts: Array) -> Array:
        chosen = mask(positions, jax.lax.stop_gradient(q), starts)
        return masked_attention(q, k, v, chosen, q.shape[-1] ** -0.5)[0]

    return in_chunks(attend, q.shape[0] * q.shape[2] * k.shape[1], q, starts, query_offset=query_offset)


def in_chunks(
    f: Callable[..., Any], elements_per_query: int, *arrays: Array, query_offset: int | Int[Array, ""] = 0
) -> Any:
    """`nsa_jax.xla.map_query_chunks` in chunks of `CHUNK_ELEMENTS`."""
    chunk = max(1, min(arrays[0].shape[1], CHUNK_ELEMENTS // elements_per_query))
    return map_query_chunks(f, query_offset, elements_per_query, *arrays, chunk=chunk)
