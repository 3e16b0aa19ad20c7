"""Native Sparse Attention that chooses blocks by a bound from the minimum and maximum of their keys, as in Quest."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from nsa_jax.config import num_blocks
from nsa_jax.layer import NSALayerConfig
from train.config import ModelConfig
from train.model.attention.choosing import Choice, ChoosingBlocks
from train.model.attention.scores import blocks_of_highest_product, group_sum, in_whole_blocks


class MinMax(ChoosingBlocks):
    """Quest's score (arXiv 2406.10774), which has no parameters and is not trained.

    With the minimum m and maximum M of a block's keys in every channel, no key of the block has a higher product with
    the query than sum_c max(q_c m_c, q_c M_c). The score of a block for a group is the sum of this bound over the
    group's heads. The keys are those of the selected branch, after the rotary embedding. Blocks that the query does not
    see whole have no score and are read only if they are forced.
    """

    def blocks(self, choice: Choice, config: NSALayerConfig) -> Int[Array, "B K T n"]:
        """The blocks of the highest bounds: q_c goes to M_c where it is positive, and to m_c where it is negative."""
        keys = in_whole_blocks(choice.kv.slc_k, config.config)
        bounds = jnp.concatenate([keys.max(axis=2), keys.min(axis=2)], axis=-1)
        groups = keys.shape[3]
        parts = [group_sum(part, groups) for part in (jnp.maximum(choice.q, 0), jnp.minimum(choice.q, 0))]
        return blocks_of_highest_product(jnp.concatenate(parts, axis=-1), bounds, choice.starts, config.config)

    def multiply_adds_without_backward(self, config: ModelConfig, length: int) -> float:
        """A product of a group's queries with two keys for each block that they see whole."""
        blocks = float(((np.arange(length) + 1) // config.nsa.select_block).mean())
        return config.num_kv_heads * 2 * config.head_dim * blocks

    def numbers_read_to_choose(self, config: ModelConfig, length: int) -> int:
        """The minimum and the maximum of every block."""
        return 2 * config.head_dim * num_blocks(length, config.nsa)


KIND = MinMax()
