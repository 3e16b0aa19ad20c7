"""The model that tests take where any will do."""

from nsa_jax import NSAConfig
from train.config import ModelConfig

SMALL = ModelConfig(
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    nsa=NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, window=6),
)
