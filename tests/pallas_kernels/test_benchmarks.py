"""The command that times the kernels: what it prints and writes."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from docs import tables
from pallas_kernels.benchmarks import __main__ as command
from pallas_kernels.benchmarks import timing
from pallas_kernels.benchmarks.cases import Case
from pallas_kernels.benchmarks.ops import BACKENDS


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A machine with a GPU, on which attention is a sine and Mosaic takes no whole attention."""

    def refused(x):
        raise NotImplementedError("heads of 7")

    def cases(shape, backend, arrays, selections, lse):
        each = {pattern: (jnp.ones(3),) for pattern in selections}
        return [
            Case("window_attention", backend, jnp.sin, {None: (jnp.ones(3),)}, 1, flops=1.0),
            Case("nsa", backend, refused if backend == "mosaic" else jnp.sin, each, 1, flops=1.0),
        ]

    def dense_cases(shape, arrays):
        return [
            Case(name, "cudnn", jnp.sin, {None: (jnp.ones(3),)}, 1, flops=1.0) for name in ("dense", "dense_window")
        ]

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(command, "cases", cases)
    monkeypatch.setattr(command, "dense_cases", dense_cases)
    monkeypatch.setattr(command, "lse_of", lambda shape, arrays: None)
    monkeypatch.setattr(timing, "time_call", functools.partial(timing.time_call, batches=2, batch_ms=1.0))


SMALL = ["--lengths", "64", "--heads", "2", "--kv-heads", "1", "--head-dim", "16"]


def test_every_row_says_which_backend_it_is_of(on_a_gpu, tmp_path, capsys):
    options = ["--backends", "default", "triton", "mosaic", "--ops", "nsa", "dense", "--out", str(tmp_path / "results")]
    assert command.main([*SMALL, *options]) == 0
    record = json.loads((tmp_path / "results.json").read_text())
    selections = ("random", "local")
    expected = [
        ("dense", "cudnn", None),
        *(("nsa", backend, selection) for backend in ("default", "triton", "mosaic") for selection in selections),
    ]
    assert [(row["op"], row["backend"], row["selection"]) for row in record["rows"]] == expected
    assert [row["backend"] for row in record["rows"] if "error" in row] == ["mosaic", "mosaic"]
    assert record["provenance"]["command"].endswith("--out " + str(tmp_path / "results"))
    assert (tmp_path / "results.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    heading, *lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [(line[2], line[3], line[1] or None) for line in lines] == expected
    assert heading[:4] == ["T", "selection", "op", "backend"]
    assert [len(line) == len(heading) for line in lines] == [False, True, True, True, True, False, False]


@pytest.mark.parametrize("first", BACKENDS)
def test_tables_are_of_the_backend_that_was_named_first(first, on_a_gpu, tmp_path):
    others = [backend for backend in BACKENDS if backend != first]
    command.main([*SMALL, "--backends", first, *others, "--out", str(tmp_path / "results")])
    record = json.loads((tmp_path / "results.json").read_text())
    _, (_, dense, *shown) = tables.speed(record)
    found = {(row["op"], row["backend"], row["selection"]): row for row in record["rows"] if "error" not in row}
    nsa = [found.get(("nsa", first, selection)) for selection in ("random", "local")]
    full = found["dense", "cudnn", None]
    assert dense == tables._both(full)
    assert shown == [*map(tables._both, nsa), *(tables._times_as_fast(full, row) for row in nsa)]
    assert (shown == [""] * 4) == (first == "mosaic")  # which refused


def test_without_backends_it_times_the_one_by_default(on_a_gpu, capsys):
    command.main([*SMALL, "--selection", "local", "--ops", "window_attention"])
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.split(" | ")[:4] == ["64", "", "window_attention", command.DEFAULT]
