"""A run measures its selection: the same on a mesh as on one device, per layer and head, logged and drawn."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import SMALL

from nsa_jax import NSAConfig
from nsa_jax.selection import SelectionRecall, selection_recall
from nsa_jax.tracing import trace_attention
from train.__main__ import main
from train.config import MeshConfig, TrainConfig
from train.metrics import MetricsLog
from train.model.attention import attention_kind
from train.model.attention.choosing import Selection, sampled_positions
from train.model.transformer import Transformer
from train.parallel.sharding import make_mesh, on_mesh, put_batch
from train.presets import tiny
from train.selection import is_measured, logged, make_selection_step, skills

MODEL = dataclasses.replace(
    SMALL,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    nsa=NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=4, window=6),
)


def test_a_mesh_measures_what_one_device_does_in_every_layer_and_head():
    model = Transformer(MODEL, 50)
    draw = np.random.default_rng(0)
    batch = {
        "tokens": draw.integers(0, 50, (8, 64), dtype=np.int32),
        "segment_ids": np.repeat([[0] * 20 + [1] * 44], 8, axis=0).astype(np.int32),
    }
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), jnp.asarray(batch["tokens"])))["params"]
    step = make_selection_step(model)
    alone = jax.jit(step)(params, batch)
    assert [layer.recall.chosen.shape for layer in alone] == [(2,), (2,)]
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, explicit=True))
    split = on_mesh(jax.jit(step), mesh)(params, put_batch(batch, mesh, 2))
    for here, there in zip(jax.tree.leaves(alone), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-5)
    config = TrainConfig(model=MODEL)
    values = logged(alone, config)
    read = attention_kind("nsa").decoded_bytes(MODEL, config.data.sequence_length)
    assert all(values[f"decoded_bytes/{layer}/{head}"] == read for layer in range(2) for head in range(2))
    assert set(skills(values)) == {(layer, head) for layer in range(2) for head in range(2)}


@pytest.mark.exhaustive
def test_layers_of_several_kinds_are_measured_in_their_order():
    model = dataclasses.replace(MODEL, num_layers=6, pattern=("full", "nsa", "per-head"))
    config = TrainConfig(model=model)
    tokens = jax.random.randint(jax.random.key(0), (2, 64), 0, 50)
    transformer = Transformer(model, 50)
    params = nn.meta.unbox(jax.jit(transformer.init)(jax.random.key(1), tokens))["params"]
    layers = jax.jit(make_selection_step(transformer))(params, {"tokens": tokens})
    unions = [np.asarray(layer.union) for layer in layers]
    assert [bool((union > 1).all()) for union in unions] == [False, True, False, True]
    inputs = trace_attention(transformer, {"params": params}, tokens)
    for layer, traced in zip(layers[::2], inputs.values(), strict=True):
        expected = selection_recall(traced, MODEL.nsa, sampled_positions(64))
        np.testing.assert_allclose(layer.recall.chosen, expected.chosen, rtol=1e-5)
    assert sorted(name for name in logged(layers, config) if name.startswith("decoded_bytes")) == [
        f"decoded_bytes/{layer}/{head}" for layer in range(4) for head in range(2)
    ]


def test_skill_is_0_for_random_blocks_and_1_for_the_best():
    chosen, random, best = (np.array([*shares, np.nan]) for shares in ((0.2, 0.8), (0.2, 0.2), (0.8, 0.8)))
    selection = Selection(SelectionRecall(chosen, random, best, np.zeros(3)), union=np.ones(3), imbalance=np.ones(3))
    found = skills(logged([selection], TrainConfig(model=dataclasses.replace(MODEL, num_layers=1))))
    assert found == {(0, 0): pytest.approx(0.0), (0, 1): pytest.approx(1.0)}


def test_only_a_run_that_selects_and_holds_whole_rows_is_measured():
    config = tiny()
    assert is_measured(config)
    assert is_measured(
        dataclasses.replace(config, model=dataclasses.replace(config.model, pattern=("full", "min-max")))
    )
    assert not is_measured(dataclasses.replace(config, eval_selection=False))
    assert not is_measured(dataclasses.replace(config, mesh=MeshConfig(context=2)))
    assert not is_measured(dataclasses.replace(config, model=dataclasses.replace(config.model, attention="full")))


def test_the_report_draws_it_and_names_a_run_without_it(tmp_path, capsys):
    values = {f"selection_{kind}/0/0": share for kind, share in (("chosen", 0.5), ("random", 0.2), ("best", 0.8))}
    for name in ("nsa", "full"):
        (tmp_path / name).mkdir()
        log = MetricsLog(TrainConfig(run_dir=tmp_path / name), first_step=1)
        log.write(1, {"loss": 1.0} | (values if name == "nsa" else {}))
        log.close()
    command = ["report", "--selection", str(tmp_path / "selection.png")]
    assert main([*command, f"NSA={tmp_path / 'nsa'}"]) == 0
    assert (tmp_path / "selection.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert main([*command, f"full={tmp_path / 'full'}"]) == 2
    assert "no measurement of the selection to draw" in capsys.readouterr().err
