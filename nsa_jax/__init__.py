"""Native Sparse Attention (arXiv 2502.11089) for JAX."""

from nsa_jax.attention import (
    AttentionInputs,
    BranchKV,
    compressed_attention,
    decode_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa_jax.cache import DenseCache, NSACache, cache_bytes, init_dense_cache, init_nsa_cache, next_positions, rollback
from nsa_jax.compression import compress
from nsa_jax.config import NSAConfig, num_blocks, num_compressed
from nsa_jax.core import Branches
from nsa_jax.linen import FullAttention, NSACore, NSAttention, NSAttentionFn
from nsa_jax.remat import save_attention
from nsa_jax.rope import RopeScaling

__version__ = "0.1.0"

__all__ = [
    "AttentionInputs",
    "BranchKV",
    "Branches",
    "DenseCache",
    "FullAttention",
    "NSACache",
    "NSAConfig",
    "NSACore",
    "NSAttention",
    "NSAttentionFn",
    "RopeScaling",
    "cache_bytes",
    "compress",
    "compressed_attention",
    "decode_attention",
    "init_dense_cache",
    "init_nsa_cache",
    "next_positions",
    "nsa_attention",
    "num_blocks",
    "num_compressed",
    "rollback",
    "save_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
]
