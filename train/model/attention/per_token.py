"""Native Sparse Attention whose selected branch reads single tokens instead of blocks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nsa_jax.layer import NSALayerConfig
from train.config import ModelConfig
from train.model.attention.choosing import Choice, Choosing
from train.model.attention.nsa import selected_tokens
from train.model.attention.scores import accumulable, attend_to_tokens, attention_mass, best_tokens


class PerToken(Choosing):
    """The n s tokens that a query attends to most, those of NSA's forced blocks among them.

    The importance of a token is its probability in the softmax of the selected branch's queries and keys over the whole
    past, summed over the heads of a group. This is the best that scores of tokens can be: they are not estimated. It
    reads every key to choose, so that nothing is saved; designs of this kind in the literature estimate the scores. The
    tokens do not lie together in memory, so kernels cannot load them as blocks (paper, section 2.2).
    """

    def attend(self, choice: Choice, config: NSALayerConfig) -> Float[Array, "B T H Dv"]:
        """Softmax over the chosen tokens."""
        k, v = (accumulable(x, config.config) for x in (choice.kv.slc_k, choice.kv.slc_v))

        def mask(positions: Array, q: Array, starts: Array) -> Array:
            return _chosen(positions, q, starts, jax.lax.stop_gradient(k), config)

        return attend_to_tokens(mask, choice.q, k, v, choice.starts)

    def tokens_read(
        self, choice: Choice, positions: Int[Array, " S"], config: NSALayerConfig
    ) -> Bool[Array, "B K S T"]:
        """The chosen tokens, for one position after the other."""
        k = accumulable(choice.kv.slc_k, config.config)

        def one(position: Array) -> Array:
            q, starts = choice.q[:, position][:, None], choice.starts[:, position][:, None]
            return _chosen(position[None], q, starts, k, config)[:, :, 0, : choice.q.shape[1]]

        return jnp.moveaxis(jax.lax.map(one, positions), 0, 2)

    def multiply_adds_without_backward(self, config: ModelConfig, length: int) -> float:
        """The scores of all tokens but those that are read, whose scores the attention needs anyway."""
        seen = (length + 1) / 2
        return config.num_heads * config.head_dim * (seen - float(selected_tokens(config, length).mean()))

    def numbers_read_to_choose(self, config: ModelConfig, length: int) -> int:
        """The keys that are not read anyway."""
        return config.head_dim * (length - int(selected_tokens(config, length)[-1]))


def _chosen(
    positions: Int[Array, " C"],
    q: Float[Array, "B C H Dk"],
    starts: Int[Array, "B C"],
    k: Float[Array, "B S K Dk"],
    config: NSALayerConfig,
) -> Bool[Array, "B K C S"]:
    return best_tokens(attention_mass(positions, q, starts, k), positions, starts, config.config)


KIND = PerToken()
