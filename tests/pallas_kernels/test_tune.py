"""Tile tables as data: how a row is found, and how measurements are written into them."""

import dataclasses
import importlib
from pathlib import Path

import jax
import pytest

from pallas_kernels import tiles
from pallas_kernels.benchmarks import tune
from pallas_kernels.benchmarks.cases import Shape
from pallas_kernels.devices import Device
from pallas_kernels.tiles import Key, Row, find_row, key_of
from pallas_kernels.triton.tiles import BlockTile, DecodeTile, QueryTile, Tile

SMALL = Shape(
    T=64, H=16, K=1, Dk=32, Dv=32, compress_block=16, select_block=16, num_selected=4, window=20, dtype="bfloat16"
)
TABLES = [(op, table) for op, tables in tune.TABLES.items() for table in tables]


def table_of(op, table):
    return getattr(importlib.import_module(f"pallas_kernels.{op}.tiles"), table)


def on(monkeypatch, capability, platform="gpu"):
    for module in (tiles, tune):
        monkeypatch.setattr(module, "current_device", lambda: Device(platform, "NVIDIA X", capability))


@pytest.mark.parametrize(
    ("capability", "platform", "expected"),
    [
        ((8, 0), "gpu", (8, 0)),
        ((8, 9), "gpu", (8, 6)),  # no more shared memory than an L40S has, and the highest such
        ((8, 7), "gpu", (8, 6)),
        ((9, 0), "gpu", (9, 0)),
        ((10, 0), "gpu", (9, 0)),
        ((12, 0), "gpu", (8, 6)),  # newer than an H100, with less shared memory
        (None, "gpu", (8, 6)),  # of a name that is not known: the least shared memory
        (None, "cpu", (9, 0)),  # interpreted
    ],
)
def test_row_is_of_the_highest_capability_whose_shared_memory_the_device_has(
    monkeypatch, capability, platform, expected
):
    on(monkeypatch, capability, platform)
    table = tuple(Row(cap, 2, 256, 64, Tile(16, 16, 4, 1)) for cap in ((8, 0), (8, 6), (9, 0)))
    assert find_row(table, Key(2, 128, 4)).capability == expected


def test_devices_with_too_little_shared_memory_take_the_least(monkeypatch):
    on(monkeypatch, (8, 9))
    table = tuple(Row(cap, 2, 256, 64, Tile(16, 16, 4, 1)) for cap in ((8, 0), (9, 0)))
    assert find_row(table, Key(2, 128, 4)).capability == (8, 0)


def test_a_call_is_known_by_its_bytes_its_larger_head_and_its_query_heads_a_group():
    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype)

    q, k, v = array(2, 9, 12, 32), array(2, 9, 3, 32), array(2, 9, 3, 48)
    assert key_of(q, k) == key_of(q, k, array(2, 9, 3, 16)) == Key(2, 32, 4)
    assert key_of(q, k, v) == Key(2, 48, 4)
    assert key_of(array(12, 32, dtype="float32"), array(12, 32, dtype="float32")) == Key(4, 32, 1)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize(("op", "table"), TABLES)
def test_every_call_that_is_taken_has_a_tile(monkeypatch, op, table, capability):
    on(monkeypatch, capability)
    for itemsize in (2, 4):
        for head_dim in (16, 64, 65, 128, 129, 192, 193, 256):
            for group in (1, 3, 4, 16, 17, 64):
                row = find_row(table_of(op, table), Key(itemsize, head_dim, group))
                assert row.head_dim >= head_dim
                assert row.group >= group


def test_hopper_and_ampere_have_tiles_of_their_own(monkeypatch):
    table, key = table_of("compressed_attention", "FORWARD"), Key(2, 256, 4)
    found = {}
    for capability in ((8, 0), (9, 0)):
        on(monkeypatch, capability)
        found[capability] = find_row(table, key).tile
    assert found == {(8, 0): Tile(128, 32, 8, 2), (9, 0): Tile(128, 64, 8, 2)}


@pytest.mark.parametrize(("op", "table"), TABLES)
def test_tables_are_written_as_tuning_writes_them(tmp_path, op, table):
    source = Path(importlib.import_module(f"pallas_kernels.{op}.tiles").__file__)
    copy = tmp_path / "tiles.py"
    copy.write_text(source.read_text())
    tune.write(copy, table, table_of(op, table))
    assert copy.read_text() == source.read_text()


@pytest.mark.parametrize(
    ("op", "table", "fastest"),
    [
        ("compressed_attention", "FORWARD", Tile(32, 128, 4, 2)),
        ("compressed_attention", "KEY_GRADIENT", Tile(64, 32, 4, 2)),
        ("block_selection", "SCORE", Tile(64, 32, 8, 3)),
        ("selected_attention", "FORWARD", BlockTile(64, 512, 8, 2)),
        ("selected_attention", "QUERY_GRADIENT", QueryTile(32, 8, 3)),
        ("window_attention", "QUERY_GRADIENT", Tile(32, 32, 8, 1)),
        ("decode_attention", "STEP", DecodeTile(256, 2)),
    ],
)
@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
def test_the_fastest_tile_is_written_for_the_device(monkeypatch, tmp_path, op, table, fastest, capability):
    on(monkeypatch, capability)
    rows, key = table_of(op, table), Key(2, 32, 16)
    before = find_row(rows, key)
    new, times = tune.tune(
        op, table, SMALL, "random", measure=lambda tile, *_: 1.0 if tile == fastest else 2.0, interpret=True
    )
    assert times[fastest] == 1.0
    found = find_row(new, key)
    shared = getattr(before.tile, "shared", None)
    expected = dataclasses.replace(fastest, shared=shared) if isinstance(fastest, QueryTile) else fastest
    assert (found.tile, found.capability) == (expected, capability)
    assert (found.head_dim, found.group) == (before.head_dim, before.group)
    assert "1 ms" in found.measured
    assert len(new) == len(rows) + (before.capability != capability)
    copy = tmp_path / "tiles.py"
    copy.write_text(Path(importlib.import_module(f"pallas_kernels.{op}.tiles").__file__).read_text())
    tune.write(copy, table, new)
    namespace: dict = {}
    exec(copy.read_text(), namespace)
    assert namespace[table] == new


def test_the_tile_of_shared_selections_is_tuned_on_local_ones(monkeypatch):
    on(monkeypatch, (9, 0))
    best = QueryTile(64, 8, 2)
    new, _ = tune.tune(
        "selected_attention", "FORWARD", SMALL, "local", measure=lambda tile, *_: 1 + (tile != best), interpret=True
    )
    tile = find_row(new, Key(2, 32, 16)).tile
    assert tile == dataclasses.replace(
        find_row(table_of("selected_attention", "FORWARD"), Key(2, 32, 16)).tile, shared=best
    )


def test_what_is_hardly_faster_or_fails_changes_nothing(monkeypatch):
    on(monkeypatch, (9, 0))
    rows = table_of("window_attention", "FORWARD")
    present = find_row(rows, Key(2, 32, 16)).tile

    def measure(tile, *_):
        if tile.rows == 32:
            raise ValueError("out of shared memory")
        return 1.0 if tile == present else 0.99

    new, times = tune.tune("window_attention", "FORWARD", SMALL, "random", measure=measure, interpret=True)
    assert new == rows
    assert not any(tile.rows == 32 for tile in times)


@pytest.mark.parametrize(("op", "table"), TABLES)
def test_what_is_timed_takes_the_tile(op, table):
    shape = dataclasses.replace(SMALL, dtype="float32")
    present = find_row(table_of(op, table), Key(4, 32, 16)).tile

    def run(tile):
        def call():
            make, arrays = tune.program(op, table, shape, "random", 2, interpret=True)
            return make(tile)(*arrays)

        return str(jax.make_jaxpr(call)())

    with_more = dataclasses.replace(present, **{"keys" if hasattr(present, "keys") else "rows": 64})
    assert run(present) != run(with_more)


def test_commands_are_refused_without_a_gpu_or_with_tables_that_are_not_there(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--op", "window_attention"])
    assert "no NVIDIA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["--op", "window_attention", "--tables", "SCORE"])
    assert "SCORE" in capsys.readouterr().err
