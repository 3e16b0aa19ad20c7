"""What devices send in a step is what the formulas say."""

import dataclasses

import pytest

from nsa_jax import NSAConfig
from train.config import DataConfig, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from train.parallel.communication import collectives, received_bytes
from train.parallel.lowering import compile_here
from train.parallel.sharding import make_mesh
from train.parallel.traffic import predicted_bytes

VOCABULARY = 50


CONFIG = TrainConfig(
    model=ModelConfig(
        num_layers=3,
        embed_dim=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        mlp_dim=48,
        nsa=NSAConfig(
            compress_block=16, compress_stride=8, select_block=16, num_selected=3, num_init=1, num_local=1, window=16
        ),
        implementation="xla",
        remat="full",
    ),
    data=DataConfig(batch_size=8, sequence_length=128, isolate_documents=False),
    optimizer=OptimizerConfig(warmup_steps=0),
)


EXPERTS = MoEConfig(num_routed=4, num_shared=1, top_k=2, expert_dim=16, first_dense=1, aux_loss=0.01)


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        pytest.param(MeshConfig(data=2, fsdp=4), {}, marks=pytest.mark.exhaustive),
        (MeshConfig(data=1, fsdp=2, context=2, tensor=2), {}),
        (MeshConfig(data=1, fsdp=2, context=4, explicit=True), {"attention": "full"}),
        (MeshConfig(data=1, context=8), {"attention": "window"}),
        pytest.param(
            MeshConfig(data=4, context=2),
            {"remat": "attention", "implementation": "triton"},
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            MeshConfig(data=1, tensor=2, expert=4), {"attention": "full", "moe": EXPERTS}, marks=pytest.mark.exhaustive
        ),
        (MeshConfig(data=1, fsdp=2, expert=2, context=2), {"attention": "full", "moe": EXPERTS}),
    ],
    ids=str,
)
def test_a_step_sends_what_is_predicted_and_nothing_else(mesh, changes):
    config = dataclasses.replace(CONFIG, mesh=mesh, model=dataclasses.replace(CONFIG.model, **changes))
    devices = make_mesh(mesh)
    found = received_bytes(collectives(compile_here(config, VOCABULARY, devices).as_text()))
    expected = predicted_bytes(config, VOCABULARY, devices.shape)
    assert set(found) <= {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
    exchanged = expected["context"] if config.model.attention == "full" else 0
    assert found.get("all-to-all", 0) == pytest.approx(exchanged, rel=1e-3)
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=0.05)
    if mesh.expert == 1:  # else gathers and sums are both the experts'
        assert found["all-reduce"] == pytest.approx(expected["gradients"] + expected["tensor"], rel=0.05)
