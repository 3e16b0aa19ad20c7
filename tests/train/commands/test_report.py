import json

import pytest

from train.config import TrainConfig, to_json
from train.plot import draw_curves, main, plot_curves


def write_run(folder, offset):
    folder.mkdir()
    entries = [{"step": step, "bits_per_byte": 8 / step + offset} for step in range(1, 11)]
    entries[-1]["held_out_bits_per_byte"] = 1.0 + offset
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def test_several_runs_are_drawn_into_one_png(tmp_path):
    runs = {name: write_run(tmp_path / name, offset) for offset, name in enumerate(("nsa", "full"))}
    main([str(tmp_path / "both.png"), *(f"{name}={folder}" for name, folder in runs.items())])
    plot_curves({"nsa": runs["nsa"]}, tmp_path / "one.png")
    both, one = (tmp_path / "both.png").read_bytes(), (tmp_path / "one.png").read_bytes()
    assert both[:8] == one[:8] == b"\x89PNG\r\n\x1a\n"
    assert both != one


def test_loads_of_experts_are_drawn_and_missed_by_name(tmp_path):
    run = write_run(tmp_path / "run", 0)
    with pytest.raises(ValueError, match=r"run: no loads of experts"):
        main(["--loads", str(tmp_path / "loads.png"), f"run={run}"])
    (run / "metrics.jsonl").write_text('{"step": 1, "router_load_mean": 2.0}\n{"step": 2, "router_load_mean": 1.5}\n')
    main(["--loads", str(tmp_path / "loads.png"), f"run={run}"])
    assert (tmp_path / "loads.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_run_without_metrics_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent: no metrics"):
        plot_curves({"absent": tmp_path / "absent"}, tmp_path / "curve.png")


def test_curves_run_over_tokens_where_the_size_of_a_step_is_known(tmp_path):
    nsa, full = (write_run(tmp_path / name, offset) for offset, name in enumerate(("nsa", "full")))
    metrics = nsa / "metrics.jsonl"
    for runs, size, label, last in (
        ({"nsa": nsa, "full": full}, None, "step", 10),
        ({"nsa": metrics}, 2_000_000, "training tokens (millions)", 20),
    ):
        (axes,) = draw_curves(runs, size).axes
        assert axes.get_xlabel() == label
        assert axes.lines[0].get_xdata()[-1] == axes.lines[1].get_xdata()[-1] == last
    for run in (nsa, full):
        (run / "config.json").write_text(to_json(TrainConfig()))
    (axes,) = draw_curves({"nsa": nsa, "full": full}).axes
    data = TrainConfig().data
    assert axes.lines[2].get_xdata()[-1] == pytest.approx(10 * data.batch_size * data.sequence_length / 1e6)


def test_usage_is_said_where_arguments_are_wrong(capsys):
    with pytest.raises(SystemExit):
        main(["picture.png", "nsa"])
    assert "every run is given as name=run" in capsys.readouterr().err
