"""The command that draws runs."""

import pytest
from helpers.saved_run import write_run

from train.__main__ import main
from train.commands.report import Arguments, report
from train.plot import plot_curves


def test_several_runs_are_drawn_into_one_png(tmp_path):
    runs = {name: write_run(tmp_path / name, offset) for offset, name in enumerate(("nsa", "full"))}
    assert main(["report", str(tmp_path / "both.png"), *(f"{name}={folder}" for name, folder in runs.items())]) == 0
    plot_curves({"nsa": runs["nsa"]}, tmp_path / "one.png")
    both, one = (tmp_path / "both.png").read_bytes(), (tmp_path / "one.png").read_bytes()
    assert both[:8] == one[:8] == b"\x89PNG\r\n\x1a\n"
    assert both != one


def test_loads_of_experts_are_drawn_and_missed_by_name(tmp_path):
    run = write_run(tmp_path / "run", 0)
    with pytest.raises(ValueError, match=r"run: no loads of experts"):
        report(Arguments(tmp_path / "loads.png", (f"run={run}",), loads=True))
    (run / "metrics.jsonl").write_text('{"step": 1, "router_load_mean": 2.0}\n{"step": 2, "router_load_mean": 1.5}\n')
    assert main(["report", "--loads", str(tmp_path / "loads.png"), f"run={run}"]) == 0
    assert (tmp_path / "loads.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("runs", [["nsa"], []])
def test_runs_without_a_name_and_no_runs_are_refused(capsys, runs):
    assert main(["report", "picture.png", *runs]) == 2
    assert "every run is given as name=run" in capsys.readouterr().err


def test_runs_and_pictures_that_cannot_be_are_refused_by_name(tmp_path, capsys):
    run = write_run(tmp_path / "run", 0)
    (tmp_path / "file").write_text("")
    for picture, path, message in (
        ("a.png", "nowhere", f"runs = nsa={tmp_path / 'nowhere'}: expected the folder or the file of a run"),
        ("run", "run", f"picture = {run}: expected a file, and this is a folder"),
        ("file/a.png", "run", f"picture = {tmp_path / 'file' / 'a.png'}: cannot be written: File exists"),
    ):
        assert main(["report", str(tmp_path / picture), f"nsa={tmp_path / path}"]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
