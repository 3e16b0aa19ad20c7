"""What a backend is."""

from typing import Protocol, runtime_checkable

from pallas_kernels.append_tokens.contract import Append
from pallas_kernels.block_selection.contract import Select
from pallas_kernels.compressed_attention import contract as compressed
from pallas_kernels.contract import Sizes
from pallas_kernels.decode_attention.contract import Decode
from pallas_kernels.selected_attention import contract as selected
from pallas_kernels.window_attention import contract as window

# The attention ops of one branch. They have a backward pass, which is registered and chosen by itself.
BRANCHES = ("compressed_attention", "selected_attention", "window_attention")


def branches_of(config: Sizes) -> tuple[str, ...]:
    """Those of `BRANCHES` that are not off."""
    off = {"selected_attention": config.num_selected == 0, "window_attention": config.window == 0}
    return tuple(op for op in BRANCHES if not off.get(op, False))


# Every function that a backend may have, and the contract that says how it is called. `nsa_attention` is called as
# nsa_attention(q, kv, gates, segment_starts, query_offset, *, config, scale) with kv: nsa_jax.BranchKV, and returns o.
OPS: dict[str, type | None] = {
    "compressed_attention": compressed.Forward,
    "compressed_attention_backward": compressed.Backward,
    "select_blocks": Select,
    "selected_attention": selected.Forward,
    "selected_attention_backward": selected.Backward,
    "window_attention": window.Forward,
    "window_attention_backward": window.Backward,
    "nsa_attention": None,
    "decode_attention": Decode,
    "append_tokens": Append,
}


@runtime_checkable
class Backend(Protocol):
    """Any object with a `name` and any subset of the functions in `OPS`, called as the built-in ones are.

    `compressed_attention`, `selected_attention` and `window_attention` are forward passes and return (o, lse), where
    lse [B, H, Tq] is the natural logarithm of the softmax's sum in float32. Those of selected and window attention may
    return o alone: lse is then computed again in the backward pass, and calls with `return_lse` pass the backend over.
    A backend that has no `<op>_backward` gets its gradients from the next one that has.

    A function raises NotImplementedError for arguments that it does not support, and `implementation=None` then asks
    the next backend.

    Optional attributes:
      supports: supports(op, device) -> bool says whether `implementation=None` may choose the backend for an op (a name
        in `OPS`, without "_backward") on a `pallas_kernels.devices.Device`. Without it, the backend is taken on every
        device. A reason can be given by raising NotImplementedError.
      by_default: by_default(name, q, k, v) -> bool says whether `implementation=None` may choose a function (a name in
        `OPS`) for these arrays; without it, it may for all. Calls for which a backend further back is faster can so be
        left to it, and be had by name. A reason can be given by raising NotImplementedError. q, k and v are the first
        arguments of the function (v is None for `select_blocks`); of `nsa_attention`, those of the selected branch;
        of `append_tokens`, the keys (twice) and the values of the cache's tail; of `decode_attention`, the queries and
        the pools of compressed keys and values, which may be `Quantized`.
      differentiable: True where JAX differentiates through the backend's functions, so that no backward pass is needed.
    """

    @property
    def name(self) -> str:
        """What `implementation` calls it."""
