"""Native Sparse Attention (arXiv 2502.11089) for JAX."""

from nsa_jax.attention import (
    BranchKV,
    compressed_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa_jax.compression import compress
from nsa_jax.config import NSAConfig, num_blocks, num_compressed
from nsa_jax.linen import FullAttention, NSAttention

__all__ = [
    "BranchKV",
    "FullAttention",
    "NSAConfig",
    "NSAttention",
    "compress",
    "compressed_attention",
    "nsa_attention",
    "num_blocks",
    "num_compressed",
    "select_blocks",
    "selected_attention",
    "window_attention",
]
