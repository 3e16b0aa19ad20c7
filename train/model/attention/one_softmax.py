"""Native Sparse Attention whose three branches share one softmax.

NSA adds the branches' outputs, each times its gate. What a gate cannot know is how much attention its branch stands
for: in full attention a token that scores high takes weight from all others, wherever they are. Here a branch weighs
as much as its scores say. With lse_c the logarithm of the sum of branch c's softmax, and d the stride of compressed
tokens,

    o = sum_c w_c o_c, where w = softmax over the branches of (log g_c + lse_c), and log d more for the compressed one,

because a compressed token stands for d tokens. A gate is how much a token counts in its branch. Tokens that lie in
several branches count several times; with `nsa.no-select-in-window` and `nsa.num-local 0` the selected blocks leave the
window to its own branch.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nsa_jax import NSAttention, compressed_attention, select_blocks, selected_attention, window_attention
from nsa_jax.explicit import split_like
from nsa_jax.layer import NSALayerConfig, join_heads, layer_inputs, layer_on_mesh, nsa_layer_inputs
from nsa_jax.precision import wide_dtype
from nsa_jax.sharding import sharded
from train.config import ModelConfig, TrainConfig
from train.model.attention.nsa import ForTraining


@layer_on_mesh(lambda given: split_like(given["x"]))
def _layer(
    parameters: Mapping[str, Array],
    x: Float[Array, "B T E"],
    *,
    config: NSALayerConfig,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T E"]:
    """`nsa_jax.layer.nsa_layer` with one softmax."""
    x, weights = layer_inputs(x, parameters, config)
    q, kv, gates, ids, _ = nsa_layer_inputs(weights, x, config=config, positions=positions, segment_ids=segment_ids)
    options: dict[str, Any] = {
        "config": config.config,
        "scale": config.scale,
        "segment_ids": ids,
        "implementation": config.implementation,
    }
    split: Callable[[Any], Any] = functools.partial(sharded, **config.mesh_axes)
    o_cmp, lse_cmp = split(compressed_attention)(q, kv.cmp_k, kv.cmp_v, **options)
    blocks = split(select_blocks)(q, kv.cmp_k, lse_cmp, **options)
    options["return_lse"] = True
    o_slc, lse_slc = split(selected_attention)(q, kv.slc_k, kv.slc_v, blocks, **options)
    o_win, lse_win = split(window_attention)(q, kv.win_k, kv.win_v, **options)
    lse_cmp += jnp.log(jnp.asarray(config.config.compress_stride, lse_cmp.dtype))
    o = one_softmax(gates, (o_cmp, o_slc, o_win), (lse_cmp, lse_slc, lse_win))
    return join_heads(o, weights, config)


def one_softmax(
    gates: Float[Array, "B T H 3"],
    outputs: tuple[Float[Array, "B T H Dv"], ...],
    sums: tuple[Float[Array, "B H T"], ...],
) -> Float[Array, "B T H Dv"]:
    """The output of one softmax over all keys of the branches, each of which counts as often as its gate says.

    A branch without visible keys has the lse -inf, and no weight. The window has at least one.
    """
    lse = jnp.stack([jnp.swapaxes(each, 1, 2) for each in sums], axis=-1)
    weights = jax.nn.softmax(lse + jnp.log(gates.astype(lse.dtype)), axis=-1)
    parts = (weights[..., i : i + 1] * o.astype(wide_dtype(o.dtype)) for i, o in enumerate(outputs))
    return sum(parts).astype(outputs[0].dtype)  # type: ignore[union-attr]


class OneSoftmaxAttention(NSAttention):
    """`nsa_jax.NSAttention` with one softmax over its branches; for training, without a cache."""

    layer_function: ClassVar = staticmethod(_layer)


class OneSoftmax(ForTraining):
    """NSA with one softmax over its branches."""

    def layer(self, config: ModelConfig, **common: Any) -> Any:
        """The layer with its three branches."""
        return OneSoftmaxAttention(
            **common,
            config=config.nsa,
            compression=config.compression,
            share_kv=config.share_kv,
            tie_keys=config.tie_keys,
            implementation=config.implementation,
        )

    def check(self, config: TrainConfig, mesh: Mapping[str, int]) -> None:
        """There must be all branches, and no loss that teaches the selection."""
        super().check(config, mesh)
        model, name = config.model, config.model.attention_name
        if not model.nsa.window:
            raise ValueError(f"model.nsa.window = 0: expected at least 1 with model.attention = {name}")
        if model.selection_loss:
            raise ValueError(f"model.selection_loss = {model.selection_loss}: expected 0 with model.attention = {name}")


KIND = OneSoftmax()
