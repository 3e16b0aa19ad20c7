"""The ops that are timed: the Triton kernels, differentiable where the op is."""

from pallas_kernels.block_selection.triton import select_blocks
from pallas_kernels.compressed_attention import triton as compressed
from pallas_kernels.compressed_attention import triton_backward as compressed_backward
from pallas_kernels.decode_attention.triton import decode_attention
from pallas_kernels.differentiable import Op
from pallas_kernels.nsa_attention.contract import Parts
from pallas_kernels.selected_attention import triton as selected
from pallas_kernels.selected_attention import triton_backward as selected_backward
from pallas_kernels.window_attention import triton as window
from pallas_kernels.window_attention import triton_backward as window_backward

__all__ = [
    "PARTS",
    "compressed_attention",
    "decode_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
]

compressed_attention = Op(compressed.forward, compressed_backward.backward, returns_lse=True)
selected_attention = Op(selected.forward, selected_backward.backward)
window_attention = Op(window.forward, window_backward.backward)
PARTS = Parts(
    compressed_attention=compressed.forward,
    select_blocks=select_blocks,
    selected_attention=selected.forward,
    window_attention=window.forward,
    compressed_attention_backward=compressed_backward.backward,
    selected_attention_backward=selected_backward.backward,
    window_attention_backward=window_backward.backward,
)
