"""What devices send is counted in compiled programs."""

from types import SimpleNamespace

import pytest

from train.parallel.communication import Collective, collectives, overlap, received_bytes

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
