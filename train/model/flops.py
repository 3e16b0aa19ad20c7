"""Parameters and FLOPs of a model, and the peak of the devices that run it."""

import math
from typing import Any

import jax

from train.config import ModelConfig
from train.model.attention import attention_kind
from train.model.transformer import padded_vocabulary

# Dense bf16 peak in FLOP/s, by a part of the device kind. The first that matches counts: narrower names come first.
PEAK_FLOPS = (
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s; None where it is not known."""
    return next((flops for name, flops in PEAK_FLOPS if name in device_kind), None)


def device_peak_flops() -> float | None:
    """Peak of all devices of the run together; None where it is not known."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return None if peak is None else peak * jax.device_count()


def total_parameters(params: Any) -> int:
    """Entries of a tree of arrays or of their shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def active_parameters(total: int, config: ModelConfig) -> int:
    """Of `total` parameters, those that one token uses: all except the routed experts that it does not choose."""
    moe = config.moe
    if not moe.num_routed:
        return total
    idle = moe.num_routed - moe.top_k
    return total - (config.num_layers - moe.first_dense) * idle * 3 * config.embed_dim * moe.expert_dim


def train_flops_per_token(config: ModelConfig, sequence_length: int, vocab_size: int) -> float:
    """Model FLOPs of training on one token of one full sequence, averaged over the T positions.

    These are the multiplications and additions of matrix products, 2 per multiply-add, times 3 for forward and
    backward, where there is a backward pass. Attention counts the keys that a query really reads
    (`AttentionKind.keys_read`). Of the routed experts, those that a token chooses count. Not counted are operations
    without a matrix product, work that is done twice (rematerialisation, and scoring blocks with the compressed
    branch's own logits), and document boundaries.
    """
    E, moe = config.embed_dim, config.moe
    num_dense = moe.first_dense if moe.num_routed else config.num_layers
    experts = E * moe.num_routed + 3 * E * moe.expert_dim * (moe.top_k + moe.num_shared)
    mlps = num_dense * 3 * E * config.mlp_dim + (config.num_layers - num_dense) * experts
    kinds = [attention_kind(name) for name in config.attention_of_layers]
    attentions = sum(kind.multiply_adds(config, sequence_length) for kind in kinds)
    forward_only = sum(kind.multiply_adds_without_backward(config, sequence_length) for kind in kinds)
    return 2 * (3 * (attentions + mlps + E * padded_vocabulary(vocab_size)) + forward_only)
