"""What the layers of a model give to the attention: for `nsa_jax.selection` to measure, `nsa_jax.visualize` to draw."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from nsa_jax.attention import AttentionInputs
from nsa_jax.nnx import NSACore, NSAttention


def trace_attention(module: Any, variables: Any, *arguments: Any, **options: Any) -> dict[str, AttentionInputs]:
    """The arguments that each Native Sparse Attention layer of a model gives to the attention, in the model's order.

    Args:
      module: a Linen module that contains `nsa_jax.NSAttention` or `nsa_jax.NSACore` anywhere (under `nn.scan` only if
        "intermediates" is among its variable axes), or one `nsa_jax.nnx.NSAttention` or `nsa_jax.nnx.NSACore`.
      variables: of a Linen module; None for NNX.
      arguments, options: the arguments of a call of the module: a batch, `segment_ids` and so on.

    Returns:
      For each layer, a name such as "layers/attention/1" and its inputs, for the whole batch of the call.

    Raises:
      ValueError: the module has no such layer.
    """
    if isinstance(module, NSAttention | NSACore):
        return {"attention": module.attention_inputs(*arguments, **options)}
    if not isinstance(module, nn.Module):
        raise ValueError(f"module = {type(module).__name__}: expected a Linen module or an nsa_jax.nnx.NSAttention")

    def intermediates(variables: Any) -> Any:
        return module.apply(variables, *arguments, mutable=["intermediates"], **options)[1]

    layers = dict(_find_inputs(jax.jit(intermediates)(variables).get("intermediates", {}), ()))
    if not layers:
        raise ValueError(f"module = {type(module).__name__}: expected a module that holds nsa_jax.NSAttention")
    return layers


def _find_inputs(tree: Any, path: tuple[str, ...]) -> Any:
    """Pairs of a name and the inputs that a layer sowed: one pair for each layer of a scan and for each call."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _find_inputs(value, (*path, name))
            continue
        calls = [call for call in value if isinstance(call, AttentionInputs)] if isinstance(value, tuple) else []
        for number, inputs in enumerate(calls):
            own = (*path, str(number)) if len(calls) > 1 else path
            if inputs.q.ndim == 4:
                yield "/".join(own) or "attention", inputs
                continue
            for layer in range(inputs.q.shape[0]):
                yield "/".join((*own, str(layer))), jax.tree.map(lambda x, layer=layer: x[layer], inputs)
