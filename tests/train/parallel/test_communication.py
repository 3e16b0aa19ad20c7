"""What devices send is counted in compiled programs, and is what the design predicts."""

import dataclasses
from types import SimpleNamespace

import pytest

from nsa_jax import NSAConfig
from train.config import DataConfig, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from train.parallel.communication import Collective, collectives, overlap, received_bytes
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


PROGRAM = """HloModule jit_f

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%inner (p: f32[4]) -> f32[4] {
  %g = bf16[8,4]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], metadata={op_name="jit(f)/inner/gather"}
  ROOT %r = f32[4] copy(%p)
}

%outer (p: f32[4]) -> f32[4] {
  ROOT %w = f32[4] while(%p), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = f32[4] while(%p), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %s = (f32[6], s32[]) all-reduce(%a, %b), replica_groups={{0,1},{2,3}}, to_apply=%add, metadata={op_name="jit(f)/sum"}
  %n = (f32[10], f32[10], u32[], u32[]) collective-permute-start(%s), source_target_pairs={{0,1}}
  ROOT %m = f32[10] collective-permute-done(%n)
}
"""


def test_collectives_are_counted_as_often_as_the_loops_around_them_run():
    assert sorted(collectives(PROGRAM)) == [
        Collective("all-gather", 4, 64, 15, "jit(f)/inner/gather"),
        Collective("all-reduce", 2, 28, 1, "jit(f)/sum"),
        Collective("collective-permute", 2, 40, 1, ""),
    ]
    assert received_bytes(collectives(PROGRAM)) == {
        "all-gather": 15 * 64 * 3 / 4,
        "all-reduce": 2 * 28 / 2,
        "collective-permute": 40,
    }


def test_a_loop_of_unknown_length_that_communicates_is_refused():
    with pytest.raises(ValueError, match="a loop of unknown length communicates: %g = bf16"):
        collectives(PROGRAM.replace('"known_trip_count":{"n":"3"}', ""))


def test_communication_is_hidden_where_other_kernels_run():
    def event(name, begin, end):
        return SimpleNamespace(name=name, start_ns=begin, duration_ns=end - begin)

    def gpu(*streams):
        lines = [SimpleNamespace(name=f"Stream #{i}", events=events) for i, events in enumerate(streams)]
        return SimpleNamespace(name="/device:GPU:0", lines=[*lines, SimpleNamespace(name="XLA Ops", events=streams[0])])

    host = SimpleNamespace(name="/host:CPU", lines=[SimpleNamespace(name="Stream", events=[event("nccl", 0, 99)])])
    first = gpu([event("gemm", 0, 4e9), event("add", 3e9, 5e9)], [event("ncclDevKernel_AllGather", 4e9, 8e9)])
    second = gpu([event("gemm", 0, 2e9)], [event("ncclDevKernel_AllGather", 4e9, 6e9)])
    found = overlap(SimpleNamespace(planes=[host, first, second]))
    assert found == {"communication_s": 3, "hidden_s": 0.5, "computation_s": 3.5}
    with pytest.raises(ValueError, match="no kernel of a GPU"):
        overlap(SimpleNamespace(planes=[host]))
