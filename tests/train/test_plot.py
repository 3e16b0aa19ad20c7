"""Pictures of runs."""

import pytest
from helpers.saved_run import write_run

from train.config import TrainConfig, to_json
from train.plot import draw_curves, plot_curves


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
