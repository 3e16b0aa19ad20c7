"""FLOPs counted by hand, and the peaks of devices."""

import dataclasses
import math
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from nsa_jax import NSAConfig
from train.config import ModelConfig
from train.model import flops
from train.model.flops import peak_flops, train_flops_per_token
from train.model.transformer import Transformer, padded_vocabulary

NSA = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=2, num_init=1, num_local=1, window=3)


MODEL = ModelConfig(
    num_layers=3, embed_dim=8, num_heads=4, num_kv_heads=2, head_dim=6, v_head_dim=10, mlp_dim=20, nsa=NSA
)


T, VOCABULARY = 10, 100


def layer_parameters(model: ModelConfig, *, applied_per_token: bool) -> int:
    """Entries of one layer's matrices: those that multiply every token, or those of phi."""
    boxed = jax.eval_shape(Transformer(model, VOCABULARY).init, jax.random.key(0), jnp.zeros((1, 16), jnp.int32))
    return sum(
        math.prod(x.shape[1:])
        for path, x in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(boxed)["params"]["layers"])
        if path[-1].key.endswith("_kernel") and path[-1].key.startswith("phi_") != applied_per_token
    )


def by_hand(model: ModelConfig, keys: list[int], num_compressed: int) -> float:
    """Multiply-adds of matrices, phi on each compressed token and K/V head, scores and values, times 6 / T."""
    phi = layer_parameters(model, applied_per_token=False) * model.num_kv_heads * num_compressed
    attention = sum(keys) * model.num_heads * (6 + 10)
    layer = T * layer_parameters(model, applied_per_token=True) + phi + attention
    return 6 * (model.num_layers * layer + T * model.embed_dim * padded_vocabulary(VOCABULARY)) / T


def test_flops_of_full_and_window_attention_equal_the_hand_count():
    for attention, keys in (("full", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), ("window", [1, 2, 3, 3, 3, 3, 3, 3, 3, 3])):
        model = dataclasses.replace(MODEL, attention=attention)
        assert train_flops_per_token(model, T, VOCABULARY) == pytest.approx(by_hand(model, keys, 0))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share_kv": False},
        {"compression": "linear"},
        {"compression": "mlp", "share_kv": False},
        {"compression": "mlp", "share_kv": False, "tie_keys": True},
        {"compression": "mlp", "tie_keys": True},
    ],
)
def test_flops_of_nsa_equal_the_hand_count_of_its_branches(changes):
    model = dataclasses.replace(MODEL, **changes)
    compressed = [0, 0, 0, 1, 1, 2, 2, 3, 3, 4]  # blocks of 4 every 2 that end at or before the query
    selected = [1, 2, 3, 4, 5, 6, 7, 8, 5, 6]  # at most two blocks of 4, the second one the query's own
    window = [1, 2, 3, 3, 3, 3, 3, 3, 3, 3]
    keys = [sum(parts) for parts in zip(compressed, selected, window, strict=True)]
    assert train_flops_per_token(model, T, VOCABULARY) == pytest.approx(by_hand(model, keys, 4))


def test_a_branch_that_is_off_costs_nothing():
    compressed = [0, 0, 0, 1, 1, 2, 2, 3, 3, 4]
    for off, keys in (
        ({"num_selected": 0, "window": 0}, compressed),
        ({"num_selected": 0}, [x + y for x, y in zip(compressed, [1, 2, *[3] * 8], strict=True)]),
    ):
        model = dataclasses.replace(MODEL, nsa=dataclasses.replace(NSA, **off))
        assert train_flops_per_token(model, T, VOCABULARY) == pytest.approx(by_hand(model, keys, 4))


def test_peaks_are_known_by_device_kind():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("cpu") is None


def test_the_peak_is_that_of_all_devices_of_the_run_together(monkeypatch):
    monkeypatch.setattr(flops.jax, "devices", lambda: [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")] * 16)
    monkeypatch.setattr(flops.jax, "device_count", lambda: 16)
    assert flops.device_peak_flops() == 16 * 989e12
    monkeypatch.setattr(flops.jax, "devices", lambda: [SimpleNamespace(device_kind="a device of tomorrow")])
    assert flops.device_peak_flops() is None
