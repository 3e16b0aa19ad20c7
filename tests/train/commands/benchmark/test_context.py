"""The benchmark of attention over context, small enough for simulated devices."""

import json

import pytest

from train.commands.benchmark import context


@pytest.mark.exhaustive
def test_writes_a_row_for_each_length_and_number_of_devices(tmp_path):
    out = tmp_path / "speed.json"
    context.benchmark(
        context.Arguments(lengths=(256,), devices=(1, 2, 64), num_heads=2, num_kv_heads=1, head_dim=16, out=out)
    )
    rows = json.loads(out.read_text())["rows"]
    assert [(row["T"], row["devices"]) for row in rows] == [(256, 1), (256, 2)]  # there are no 64
    for row in rows:
        assert row["forward_ms"]["lowest"] > 0
        assert row["both_ms"]["median"] > row["forward_ms"]["lowest"]
    assert rows[0]["received_forward_bytes"] == 0 < rows[1]["received_forward_bytes"]
