"""The benchmark of decoding on a model small enough for a CPU."""

import dataclasses
import json

import jax
import pytest

from train.__main__ import main
from train.commands.benchmark import decoding
from train.presets import PRESETS
from train.trace import Kernel, kernels, record


@pytest.fixture
def small(monkeypatch):
    """A preset of one layer."""
    tiny = PRESETS["tiny"]()
    one_layer = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, num_layers=1))
    monkeypatch.setitem(PRESETS, "small", lambda: one_layer)
    return "small"


@pytest.mark.exhaustive
def test_decoding_writes_a_row_for_each_attention_and_batch(tmp_path, small):
    out = tmp_path / "speed.json"
    decoding.benchmark(decoding.Arguments(preset=small, context=128, batches=(1, 2), steps=2, out=out))
    rows = json.loads(out.read_text())["rows"]
    assert [(r["attention"], r["batch"]) for r in rows] == [("nsa", 1), ("nsa", 2), ("full", 1), ("full", 2)]
    for row in rows:
        assert 0 < row["lowest"] <= row["tokens_per_second"] <= row["highest"]
        of_a_step = row["tokens_per_second"] / row["batch"] * row["read_gb"]
        assert row["bandwidth_share"] == pytest.approx(of_a_step / 3350, rel=1e-6)
    assert rows[1]["cache_gib"] == pytest.approx(2 * rows[0]["cache_gib"], rel=0.01)
    # A row of full attention more is keys and values of 127 tokens more.
    tiny = PRESETS[small]().model
    row_bytes = 127 * tiny.num_kv_heads * 2 * tiny.head_dim * 4
    assert rows[3]["read_gb"] - rows[2]["read_gb"] == pytest.approx(row_bytes / 1e9, rel=1e-6)
    assert main(["benchmark", "decoding", "--preset", small, "--profile"]) == 2


@pytest.mark.exhaustive
def test_caches_in_8_bits_are_smaller_and_read_for_less_and_only_nsa_has_them(tmp_path, small):
    options = {"preset": small, "context": 128, "batches": (1,), "steps": 2, "attentions": ("nsa",)}
    rows = []
    for kv_dtype in (None, "int8"):
        out = tmp_path / f"{kv_dtype}.json"
        decoding.benchmark(decoding.Arguments(**options, kv_dtype=kv_dtype, out=out))
        rows += json.loads(out.read_text())["rows"]
    assert [row["kv_dtype"] for row in rows] == ["float32", "int8"]
    model = PRESETS[small]().model
    less = 2 * model.num_kv_heads * (4 * model.head_dim - (model.head_dim + 4))  # bytes of a token of a page
    tokens = 128 + 128 // model.nsa.compress_stride
    assert (rows[0]["cache_gib"] - rows[1]["cache_gib"]) * 2**30 == pytest.approx(tokens * less)
    l, d = model.nsa.compress_block, model.nsa.compress_stride  # noqa: E741
    read = (127 - l) // d + 1 + 127  # all blocks are selected
    assert (rows[0]["read_gb"] - rows[1]["read_gb"]) * 1e9 == pytest.approx(read * less)
    with pytest.raises(ValueError, match="kv_dtype = 'int8': expected None, as full attention has no such cache"):
        decoding.benchmark(decoding.Arguments(**{**options, "attentions": ("nsa", "full")}, kv_dtype="int8"))


def test_a_profile_counts_the_kernels_of_a_step_and_the_time_between_them():
    traced = [
        Kernel("fusion_1", 0, 1000),
        Kernel("gemm", 1500, 3500),
        Kernel("copy.2", 3000, 4000),  # on another stream
        Kernel("fusion_12", 4500, 6500),
    ]
    profile = decoding.step_profile(traced, steps=2)
    assert profile == {
        "launches": 2,
        "busy_us": (1 + 2.5 + 2) / 2,
        "idle_us": (0.5 + 0.5) / 2,
        "kernels": [
            {"name": "fusion", "launches": 1, "us": 1.5},
            {"name": "gemm", "launches": 0.5, "us": 1},
            {"name": "copy", "launches": 0.5, "us": 0.5},
        ],
    }


def test_a_call_is_traced():
    result, profile = record(lambda: jax.jit(lambda x: x + 1)(1))
    assert result == 2
    assert [plane.name for plane in profile.planes]
    with pytest.raises(ValueError, match="no kernel of a GPU"):
        kernels(profile)
