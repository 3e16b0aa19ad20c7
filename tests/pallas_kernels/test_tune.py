"""Tile tables as data: how a row is found, and how measurements are written into them."""

import dataclasses
import importlib
from pathlib import Path

import jax
import pytest

from pallas_kernels import tiles
from pallas_kernels.benchmarks import decode, tune
from pallas_kernels.benchmarks.cases import Shape
from pallas_kernels.benchmarks.programs import Problem, Program, program
from pallas_kernels.devices import Device
from pallas_kernels.mosaic.tiles import IntervalTile, PartialTile, RingTile, ScoreTile, UnionTile
from pallas_kernels.tiles import Key, MatrixKey, Row, find_row, key_of
from pallas_kernels.triton.tiles import AppendTile, BlockTile, DecodeTile, ProductTile, QueryTile, Tile
from tests.pallas_kernels import cases

SMALL = Shape(
    T=64, H=16, K=1, Dk=32, Dv=32, compress_block=16, select_block=16, num_selected=4, window=20, dtype="bfloat16"
)
ROWS_OF_64 = dataclasses.replace(SMALL, Dk=64, Dv=64, select_block=64, num_selected=2, num_local=1)
TABLES = [(op, table) for op, tables in tune.TABLES.items() for table in tables]
# Of each table, a tile that is not the present one, which `tune` measures.
OTHERS = {
    ("compressed_attention", "FORWARD"): Tile(32, 128, 4, 2),
    ("compressed_attention", "QUERY_GRADIENT"): Tile(32, 64, 4, 2),
    ("compressed_attention", "KEY_GRADIENT"): Tile(64, 32, 4, 2),
    ("compressed_attention", "MOSAIC_FORWARD"): IntervalTile(2, 128, 2, 1),
    ("compressed_attention", "MOSAIC_QUERY_GRADIENT"): RingTile(1),
    ("compressed_attention", "MOSAIC_KEY_GRADIENT"): PartialTile(1, None),
    ("block_selection", "SCORE"): Tile(64, 32, 8, 3),
    ("block_selection", "MOSAIC_SELECTION"): ScoreTile(2),
    ("selected_attention", "FORWARD"): BlockTile(64, 512, 8, 2),
    ("selected_attention", "QUERY_GRADIENT"): QueryTile(32, 8, 3),
    ("selected_attention", "KEY_GRADIENT"): BlockTile(32, 512, 8, 1),
    ("selected_attention", "MOSAIC_FORWARD"): UnionTile(3, 1),
    ("selected_attention", "MOSAIC_QUERY_GRADIENT"): RingTile(2),
    ("selected_attention", "MOSAIC_KEY_GRADIENT"): PartialTile(3, 256),
    ("window_attention", "FORWARD"): Tile(32, 32, 8, 2),
    ("window_attention", "QUERY_GRADIENT"): Tile(32, 32, 8, 1),
    ("window_attention", "KEY_GRADIENT"): Tile(128, 32, 4, 1),
    ("window_attention", "MOSAIC_FORWARD"): IntervalTile(3, 64, 2, 1),
    ("window_attention", "MOSAIC_QUERY_GRADIENT"): RingTile(5),
    ("window_attention", "MOSAIC_KEY_GRADIENT"): PartialTile(2, None),
    ("decode_attention", "STEP"): DecodeTile(256, 2),
    ("append_tokens", "APPEND"): AppendTile(64, 8),
    ("one_row_product", "PRODUCT"): ProductTile(4, 2, 256),
}
MATRIX = (64, 96)


def problem_of(table, **changes):
    shape = SMALL if tune.backend_of(table) == "triton" else ROWS_OF_64
    return Problem(dataclasses.replace(shape, **changes), matrix=MATRIX)


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
    assert find_row(table, Key(2, 128, 4, 256)).capability == expected


def test_devices_with_too_little_shared_memory_take_the_least(monkeypatch):
    on(monkeypatch, (8, 9))
    table = tuple(Row(cap, 2, 256, 64, Tile(16, 16, 4, 1)) for cap in ((8, 0), (9, 0)))
    assert find_row(table, Key(2, 128, 4, 256)).capability == (8, 0)


def test_a_call_is_known_by_its_bytes_its_head_sizes_and_its_query_heads_a_group():
    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype)

    q, k, v = array(2, 9, 12, 32), array(2, 9, 3, 32), array(2, 9, 3, 48)
    assert key_of(q, k) == Key(2, 32, 4, 32)
    assert key_of(q, k, array(2, 9, 3, 16)) == Key(2, 32, 4, 48)
    assert key_of(q, k, v) == Key(2, 48, 4, 80)
    assert key_of(array(12, 32, dtype="float32"), array(12, 32, dtype="float32")) == Key(4, 32, 1, 32)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize(("op", "table"), TABLES)
def test_every_call_that_is_taken_has_a_tile(monkeypatch, op, table, capability):
    on(monkeypatch, capability)
    for itemsize in (2, 4):
        for head_dim in (16, 64, 65, 128, 129, 192, 193, 256):
            for group in (1, 3, 4, 16, 17, 64):
                if op == "one_row_product":
                    row = find_row(table_of(op, table), MatrixKey(itemsize, head_dim * group))
                    assert (row.longest or head_dim * group) >= head_dim * group
                    continue
                if itemsize == 4 and tune.backend_of(table) == "mosaic":
                    continue
                row = find_row(table_of(op, table), Key(itemsize, head_dim, group, 2 * head_dim))
                assert row.head_dim >= head_dim
                assert row.together >= 2 * head_dim
                assert row.group >= group


def test_hopper_and_ampere_have_tiles_of_their_own(monkeypatch):
    table, key = table_of("compressed_attention", "FORWARD"), Key(2, 256, 4, 512)
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


@pytest.mark.parametrize(("op", "table"), TABLES)
@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
def test_the_fastest_tile_is_written_for_the_device(monkeypatch, tmp_path, op, table, capability):
    on(monkeypatch, capability)
    monkeypatch.setattr(tune, "program", lambda *_: Program(lambda tile: None, (), 4))
    problem, fastest = problem_of(table), OTHERS[op, table]
    rows, key = table_of(op, table), tune.key_for(op, problem)
    before = find_row(rows, key)
    new, times = tune.tune(op, table, problem, lambda tile, *_: 1.0 if tile == fastest else 2.0)
    assert times[fastest] == 0.25
    assert set(times.values()) == {0.25, 0.5}
    found = find_row(new, key)
    shared = getattr(before.tile, "shared", None)
    expected = dataclasses.replace(fastest, shared=shared) if isinstance(fastest, QueryTile) else fastest
    assert (found.tile, found.capability) == (expected, capability)
    assert found.order == before.order
    assert "0.25 ms" in found.measured
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
        "selected_attention", "FORWARD", Problem(SMALL, "local"), lambda tile, *_: 1 + (tile != best), interpret=True
    )
    tile = find_row(new, Key(2, 32, 16, 64)).tile
    assert tile == dataclasses.replace(
        find_row(table_of("selected_attention", "FORWARD"), Key(2, 32, 16, 64)).tile, shared=best
    )


def test_what_is_hardly_faster_or_fails_changes_nothing(monkeypatch):
    on(monkeypatch, (9, 0))
    rows = table_of("window_attention", "FORWARD")
    present = find_row(rows, Key(2, 32, 16, 64)).tile

    def measure(tile, *_):
        if tile.rows == 32:
            raise ValueError("out of shared memory")
        return 1.0 if tile == present else 0.99

    new, times = tune.tune("window_attention", "FORWARD", Problem(SMALL), measure, interpret=True)
    assert new == rows
    assert not any(tile.rows == 32 for tile in times)

    def fail(*_):
        raise ValueError("out of shared memory")

    assert tune.tune("window_attention", "FORWARD", Problem(SMALL), fail, interpret=True) == (rows, {})


@pytest.mark.parametrize(("op", "table"), TABLES)
def test_what_is_timed_takes_the_tile(monkeypatch, op, table):
    backend = tune.backend_of(table)
    if backend == "mosaic":
        cases.skip_without_mosaic(interpreted=False)
    monkeypatch.setattr(decode, "STEPS", 1)
    monkeypatch.setattr(decode, "MOST_LAYERS", 1)
    problem = problem_of(table)

    def traced(tile):
        def call():
            timed = program(op, backend, tune.TABLES[op][table], problem)
            return timed.function(tile)(*timed.arrays)

        with cases.abstract("NVIDIA H100"):
            return str(jax.make_jaxpr(call)())

    present = find_row(table_of(op, table), tune.key_for(op, problem)).tile
    assert traced(present) != traced(OTHERS[op, table])


@pytest.mark.parametrize("op", ["append_tokens", "decode_attention", "one_row_product"])
def test_steps_of_decoding_lower_for_gpus_with_tiles_of_ones_own(monkeypatch, op):
    monkeypatch.setattr(decode, "STEPS", 1)
    monkeypatch.setattr(decode, "MOST_LAYERS", 1)
    [(table, argument)] = tune.TABLES[op].items()

    def call():
        timed = program(op, "triton", argument, problem_of(table))
        return timed.function(OTHERS[op, table])(*timed.arrays)

    assert op in cases.lower("NVIDIA H100", call)


def test_commands_are_refused_without_a_gpu_or_with_tables_that_are_not_there(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--op", "window_attention"])
    assert "no NVIDIA GPU" in capsys.readouterr().err
    for arguments, message in (
        (["window_attention", "--tables", "SCORE"], "--tables SCORE: expected some of FORWARD"),
        (["window_attention", "--tables", "MOSAIC_FORWARD"], "--tables MOSAIC_FORWARD: expected some of FORWARD"),
        (["window_attention", "--backend", "mosaic", "--tables", "SCORE"], "expected some of MOSAIC_FORWARD"),
        (["decode_attention", "--backend", "mosaic"], "--backend mosaic: has no kernel of decode_attention"),
    ):
        with pytest.raises(SystemExit):
            tune.main(["--op", *arguments])
        assert message in capsys.readouterr().err
    on(monkeypatch, (8, 0))
    with pytest.raises(SystemExit):
        tune.main(["--op", "window_attention", "--backend", "mosaic"])
    assert "expected compute capability 9.0" in capsys.readouterr().err
