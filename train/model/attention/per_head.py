"""Native Sparse Attention whose query heads each choose their own blocks."""

from jaxtyping import Array, Int

from nsa_jax import select_blocks
from nsa_jax.layer import NSALayerConfig
from nsa_jax.sharding import sharded
from train.model.attention.choosing import Choice, ChoosingBlocks
from train.model.attention.scores import repeated


class PerHead(ChoosingBlocks):
    """Equation 9 without equation 10: the importance of a block is not summed over the heads of a group.

    The heads of a group share a cache. To decode, a group reads the union of its heads' blocks, which is up to G times
    as much as with NSA (paper, section 2.1). In training every head reads as many blocks as with NSA.
    """

    def blocks(self, choice: Choice, config: NSALayerConfig) -> Int[Array, "B H T n"]:
        """NSA's choice, as if every query head were a group of its own."""
        return sharded(select_blocks, **config.mesh_axes)(
            choice.q,
            repeated(choice.kv.cmp_k, choice.q.shape[2]),
            choice.lse,
            config=config.config,
            segment_ids=choice.segment_ids,
            implementation=config.implementation,
        )


KIND = PerHead()
