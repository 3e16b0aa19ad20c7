"""Native Sparse Attention whose blocks are chosen by scores that a loss of their own trains."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import initializers
from jaxtyping import Array, Float, Int

from nsa_jax.config import num_blocks
from nsa_jax.core import Parameter
from nsa_jax.layer import NSALayerConfig
from nsa_jax.selection import divergence
from nsa_jax.sharding import token_positions
from nsa_jax.visibility import candidate_blocks
from train.config import ModelConfig
from train.model.attention.choosing import Choice, ChoosingBlocks
from train.model.attention.scores import (
    accumulable,
    attention_mass,
    blocks_of_highest_product,
    in_chunks,
    in_whole_blocks,
    product,
    seen_whole,
)
from train.parallel.sharding import weight


class AuxiliaryLoss(ChoosingBlocks):
    """The paper's own baseline: additional queries, and a representative key for each block (section 6.1, figure 7).

    An indexer projects the layer's input to one more query and one more key for each K/V head, rotates both, and takes
    the mean of a block's keys as its representative. The score of a block is the product of the two. What the paper
    leaves open is chosen so:

    * The loss is the Kullback-Leibler divergence of the scores' softmax from the attention that the selected branch's
      queries give to the keys of each block, summed over the heads of a group. Both are over the blocks that the query
      sees whole and is free to choose. It is averaged over queries and K/V heads, and summed over layers with weight 1.
    * It trains the indexer alone: its gradient goes neither to the attention nor to the layer's input.
    """

    has_loss = True

    def parameters(self, config: NSALayerConfig, embed_dim: int) -> dict[str, Parameter]:
        """The indexer's two projections."""
        project = initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        shape, axes = (embed_dim, config.num_kv_heads, config.head_dim), ("embed", "kv_heads", "head_dim")
        return {name: Parameter(shape, project, axes) for name in ("index_q_kernel", "index_k_kernel")}

    def own(
        self,
        parameters: Mapping[str, Array],
        x: Float[Array, "B T E"],
        segment_ids: Int[Array, "B T"] | None,
        config: NSALayerConfig,
    ) -> dict[str, Array]:
        """The indexer's queries [B, T, K, Dk] and the blocks' representative keys [B, Nb, K, Dk], in float32."""
        x = jax.lax.stop_gradient(x)
        positions = token_positions((x.shape[0], x.shape[1]), segment_ids, batch_axes=config.batch_axes)
        axes = ("embed", "kv_heads", "head_dim")
        q, k = (
            config.rotated(jnp.einsum("bte,ehd->bthd", x, weight(parameters[name], axes, x.dtype)), positions)
            for name in ("index_q_kernel", "index_k_kernel")
        )
        return {"q": q.astype(jnp.float32), "k": in_whole_blocks(k.astype(jnp.float32), config.config).mean(axis=2)}

    def blocks(self, choice: Choice, config: NSALayerConfig) -> Int[Array, "B K T n"]:
        """The blocks of the indexer's highest scores."""
        return blocks_of_highest_product(choice.own["q"], choice.own["k"], choice.starts, config.config)

    def loss(self, choice: Choice, config: NSALayerConfig) -> Float[Array, "B K"]:
        """The divergence, computed for a chunk of queries at a time: no array of T x T is kept."""
        sizes, keys = config.config, accumulable(jax.lax.stop_gradient(choice.kv.slc_k), config.config)
        B, S, _, D = keys.shape
        blocks, representatives = S // sizes.select_block, choice.own["k"]

        def of_queries(positions: Array, q: Array, index_q: Array, starts: Array) -> Array:
            mass = attention_mass(positions, q, starts, keys)
            mass = mass.reshape(*mass.shape[:3], blocks, sizes.select_block).sum(axis=-1)
            _, forced = candidate_blocks(positions, starts, blocks, sizes)
            free = (seen_whole(positions, starts, blocks, sizes) & ~forced)[:, None]
            scores = D**-0.5 * product("bckd,bnkd->bkcn", index_q, representatives)
            return jnp.moveaxis(divergence(jnp.where(free, mass, 0), scores, free), 2, 1)

        arrays = jax.lax.stop_gradient(choice.q), choice.own["q"], choice.starts
        return in_chunks(of_queries, B * choice.q.shape[2] * S, *arrays).mean(axis=1)

    def multiply_adds(self, config: ModelConfig, length: int) -> float:
        """NSA's, the indexer's projections and its scores of the blocks that a query sees whole."""
        indexer = 2 * config.embed_dim + float(((np.arange(length) + 1) // config.nsa.select_block).mean())
        return super().multiply_adds(config, length) + config.num_kv_heads * config.head_dim * indexer

    def multiply_adds_without_backward(self, config: ModelConfig, length: int) -> float:
        """The scores of all keys, which the loss compares with."""
        return config.num_heads * config.head_dim * (length + 1) / 2

    def numbers_read_to_choose(self, config: ModelConfig, length: int) -> int:
        """The representative key of every block."""
        return config.head_dim * num_blocks(length, config.nsa)


KIND = AuxiliaryLoss()
