"""The benchmark of prefill on a model small enough for a CPU."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.__main__ import main
from train.commands.benchmark import prefill
from train.commands.benchmark.figures import random_parameters
from train.config import ModelConfig
from train.model.transformer import init_caches
from train.presets import PRESETS

CONFIG = ModelConfig(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16)


def test_prefill_writes_a_row_for_each_attention_batch_and_chunk(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "small", lambda: dataclasses.replace(PRESETS["tiny"](), model=CONFIG))
    out = tmp_path / "speed.json"
    sizes = ["--context", "96", "--chunks", "0", "64", "--batches", "2", "--repeats", "3", "--out", str(out)]
    assert main(["benchmark", "prefill", "--preset", "small", *sizes]) == 0
    figures = json.loads(out.read_text())
    assert figures["provenance"]["command"].startswith("python -m train")
    rows = figures["rows"]
    assert [(r["attention"], r["batch"], r["chunk"]) for r in rows] == [
        ("nsa", 2, 96), ("nsa", 2, 64), ("full", 2, 96), ("full", 2, 64)
    ]  # fmt: skip
    printed = capsys.readouterr().out
    for row in rows:
        assert 0 < row["lowest"] <= row["seconds"] <= row["highest"]
        assert row["tokens_per_second"] == pytest.approx(2 * 96 / row["seconds"])
        assert row["attention"] in printed
    # A row of full attention holds keys and values of 96 tokens, and the lengths.
    assert rows[2]["cache_gib"] == (2 * 96 * 2 * 8 * 4 + 8) / 2**30
    assert main(["benchmark", "prefill", "--preset", "small", "--chunks", "-1"]) == 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_chunks_of_any_length_find_the_token_that_the_whole_prompt_finds(attention):
    config, vocabulary = dataclasses.replace(CONFIG, attention=attention), 50
    params = random_parameters(config, vocabulary)
    tokens = jax.random.randint(jax.random.key(0), (3, 80), 0, vocabulary)

    def first(chunk):
        caches = init_caches(config, batch_size=3, max_length=80)
        for begin in range(0, 80, chunk):
            part = tokens[:, begin : begin + chunk]
            found, caches = prefill.read(params, caches, part, config=config, vocabulary=vocabulary, begins=begin == 0)
        return np.asarray(found), np.asarray(caches[0].lengths)

    (whole, lengths), (parts, lengths_of_parts) = first(80), first(32)
    assert jnp.array_equal(whole, parts)
    assert len(set(whole.tolist())) > 1
    assert lengths.tolist() == lengths_of_parts.tolist() == [80] * 3
