"""What a run would take, said without the machines for it."""

import re

import pytest

from train.__main__ import main
from train.commands import plan
from train.commands.exit_codes import WRONG_SETTING


def test_the_command_says_what_a_step_takes(capsys):
    flags = ["--devices", "8", "tiny", "--mesh.fsdp", "4", "--mesh.context", "2", "--data.batch-size", "8"]
    assert main(["plan", *flags, "--model.attention", "full"]) == 0
    out = capsys.readouterr().out
    assert "mesh {'data': 1, 'fsdp': 4, 'expert': 1, 'context': 2, 'tensor': 1}, 8 rows of 512 tokens a step" in out
    assert re.search(r"lowered for 8 x NVIDIA H100: [1-9]\d* calls of Triton kernels", out)
    *_, predicted, counted = (float(x) for x in re.findall(r"([\d.]+) in all", out))
    assert counted == pytest.approx(predicted, rel=0.05)


def test_a_mesh_that_does_not_fit_is_refused(capsys):
    assert main(["plan", "--devices", "8", "tiny", "--mesh.fsdp", "3"]) == WRONG_SETTING
    assert "fsdp 3" in capsys.readouterr().err


def test_full_attention_is_planned_where_there_is_no_cudnn(capsys, monkeypatch):
    def lower_for_gpus(*_, **__):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(plan, "lower_for_gpus", lower_for_gpus)
    assert main(["plan", "--devices", "2", "--no-compile", "tiny", "--model.attention", "full"]) == 0
    assert re.search(r"not lowered for NVIDIA H100: .* cuDNN's, .*\n824,256 parameters", capsys.readouterr().out)
