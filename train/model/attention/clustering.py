"""Native Sparse Attention whose selected branch reads clusters of similar keys instead of blocks, as in ClusterKV."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nsa_jax.config import NSAConfig, num_blocks
from nsa_jax.layer import NSALayerConfig
from train.config import ModelConfig
from train.model.attention.choosing import Choice, Choosing
from train.model.attention.scores import accumulable, attend_to_tokens, best_tokens, group_sum, product

ITERATIONS = 8  # of k-means


class Clusters(NamedTuple):
    """Clusters of the keys before a position. There are as many as blocks, of which some may be empty."""

    centroids: Float[Array, "B K Nb Dk"]  # means of their keys
    cluster_of: Int[Array, "B K S"]  # of each token; -1 for one that is in none
    sizes: Int[Array, "B K Nb"]  # tokens


class Clustering(Choosing):
    """ClusterKV's choice (arXiv 2412.03213), which is causal and trains because a row is clustered again and again.

    Before every `interval` tokens, k-means clusters all keys before them: those of the selected branch, after the
    rotary embedding, of each K/V head for itself. There is a cluster for every s keys. It begins as one block, so that
    k-means only moves keys between blocks. A key goes to the centroid of highest cosine, which is the mean of its keys
    then; this is done `ITERATIONS` times. A cluster holds keys of one document, which begins on a block.

    A query takes the clusters of the highest product of its group's summed queries with the centroid, one after the
    other and the last of them in part, until it reads n s tokens, those of NSA's forced blocks among them. Tokens that
    are not in a cluster yet have the last places. The window sees them: `interval` is no longer than that, unless the
    window is shorter than a block.
    """

    def attend(self, choice: Choice, config: NSALayerConfig) -> Float[Array, "B T H Dv"]:
        """Softmax over the tokens of the chosen clusters, one interval of queries after the other."""
        sizes = config.config
        k, v = (accumulable(x, sizes) for x in (choice.kv.slc_k, choice.kv.slc_v))
        still, starts = jax.lax.stop_gradient(k), _starts_of_blocks(choice, k.shape[1])
        (B, T), length = choice.starts.shape, interval(sizes)
        steps = -(-T // length)

        def cut(x: Array) -> Array:
            x = jnp.pad(x, ((0, 0), (0, steps * length - T), *((0, 0),) * (x.ndim - 2)))
            return jnp.moveaxis(x.reshape(B, steps, length, *x.shape[2:]), 1, 0)

        @jax.checkpoint
        def one_interval(begin: Array, q: Array, own_starts: Array) -> Array:
            clusters = cluster(still, begin, starts, sizes)

            def mask(positions: Array, q: Array, own_starts: Array) -> Array:
                return _chosen(positions, q, own_starts, clusters, sizes)

            return attend_to_tokens(mask, q, k, v, own_starts, begin)

        begins = length * jnp.arange(steps, dtype=jnp.int32)
        o = jax.lax.map(lambda part: one_interval(*part), (begins, cut(choice.q), cut(choice.starts)))
        return jnp.moveaxis(o, 0, 1).reshape(B, steps * length, *o.shape[3:])[:, :T]

    def tokens_read(
        self, choice: Choice, positions: Int[Array, " S"], config: NSALayerConfig
    ) -> Bool[Array, "B K S T"]:
        """The chosen tokens, for one position after the other."""
        k = accumulable(choice.kv.slc_k, config.config)
        starts, length = _starts_of_blocks(choice, k.shape[1]), interval(config.config)

        def one(position: Array) -> Array:
            clusters = cluster(k, position // length * length, starts, config.config)
            q, own_starts = choice.q[:, position][:, None], choice.starts[:, position][:, None]
            chosen = _chosen(position[None], q, own_starts, clusters, config.config)
            return chosen[:, :, 0, : choice.q.shape[1]]

        return jnp.moveaxis(jax.lax.map(one, positions), 0, 2)

    def imbalance(self, choice: Choice, config: NSALayerConfig) -> Float[Array, "B K"]:
        """The fullest cluster over the mean of those that hold a key, the last time that a row is clustered."""
        k, length = accumulable(choice.kv.slc_k, config.config), interval(config.config)
        end = jnp.asarray((choice.q.shape[1] - 1) // length * length, jnp.int32)
        sizes = cluster(k, end, _starts_of_blocks(choice, k.shape[1]), config.config).sizes.astype(jnp.float32)
        mean = sizes.sum(axis=-1) / jnp.maximum((sizes > 0).sum(axis=-1), 1)
        return sizes.max(axis=-1) / jnp.maximum(mean, 1)

    def multiply_adds_without_backward(self, config: ModelConfig, length: int) -> float:
        """K-means, in which every key before an interval meets every centroid twice, and the scores of centroids."""
        step, s = interval(config.nsa), config.nsa.select_block
        ends = np.arange(0, length, step)
        kmeans = 2 * ITERATIONS * float((ends * (ends // s)).sum()) / length
        scores = float((np.arange(length) // step * step // s).mean())
        return config.num_kv_heads * config.head_dim * (kmeans + scores)

    def numbers_read_to_choose(self, config: ModelConfig, length: int) -> int:
        """The centroids. The table of which token is in which cluster is left out."""
        clustered = (length - 1) // interval(config.nsa) * interval(config.nsa)
        return config.head_dim * num_blocks(clustered, config.nsa)


def interval(config: NSAConfig) -> int:
    """Tokens after which a row is clustered again: as many blocks as fit into the window, at least one."""
    return max(1, config.window // config.select_block) * config.select_block


def cluster(k: Float[Array, "B S K Dk"], end: Int[Array, ""], starts: Int[Array, "B S"], config: NSAConfig) -> Clusters:
    """Clusters of the keys before `end`.

    Args:
      k: keys, of whole blocks.
      end: a multiple of a block.
      starts: position of the first token of each token's document, which begins on a block.
      config: gives the size of a block.
    """
    B, S, K, D = k.shape
    s, blocks = config.select_block, S // config.select_block
    keys = jnp.moveaxis(k, 2, 1).astype(jnp.float32)
    directions = _normalised(keys)
    token, first = jnp.arange(S, dtype=jnp.int32), s * jnp.arange(blocks, dtype=jnp.int32)
    same_document = starts[:, :, None] == starts[:, None, ::s]
    before = (token < end)[:, None] & (first < end)[None, :]
    allowed = (same_document & before[None])[:, None]  # [B, 1, S, Nb]

    def nearest(centroids: Array) -> Array:
        cosine = product("bksd,bknd->bksn", directions, _normalised(centroids))
        best = jnp.argmax(jnp.where(allowed, cosine, -jnp.inf), axis=-1)
        return (best[..., None] == jnp.arange(blocks)[None, None, None, :]) & allowed

    def iterate(_: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        centroids = state[0]
        members = nearest(centroids)
        sizes = members.sum(axis=2)[..., None]
        sums = product("bksn,bksd->bknd", members, keys)
        return jnp.where(sizes > 0, sums / jnp.maximum(sizes, 1), centroids), members

    blocked = keys.reshape(B, K, blocks, s, D).mean(axis=3)
    none = jnp.zeros((B, K, S, blocks), bool)
    centroids, members = jax.lax.fori_loop(0, ITERATIONS, iterate, (blocked, none))
    cluster_of = jnp.where(members.any(axis=-1), jnp.argmax(members, axis=-1), -1).astype(jnp.int32)
    return Clusters(centroids, cluster_of, members.sum(axis=2, dtype=jnp.int32))


def _chosen(
    positions: Int[Array, " C"],
    q: Float[Array, "B C H Dk"],
    starts: Int[Array, "B C"],
    clusters: Clusters,
    config: NSAConfig,
) -> Bool[Array, "B K C S"]:
    """The tokens that queries read: the score of a token is that of its cluster."""
    groups = clusters.centroids.shape[1]
    scores = product("bckd,bknd->bkcn", group_sum(q, groups), clusters.centroids)
    of_tokens = jax.vmap(jax.vmap(lambda score, cluster_of: score[:, cluster_of]))(
        scores, jnp.maximum(clusters.cluster_of, 0)
    )
    importance = jnp.where((clusters.cluster_of >= 0)[:, :, None], of_tokens, -jnp.inf)
    return best_tokens(importance, positions, starts, config)


def _starts_of_blocks(choice: Choice, tokens: int) -> Int[Array, "B S"]:
    """The starts of all tokens, up to whole blocks."""
    return jnp.pad(choice.starts, ((0, 0), (0, tokens - choice.starts.shape[1])), mode="edge")


def _normalised(x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


KIND = Clustering()
