"""The command that continues a prompt."""

from helpers import train_runs

from train.__main__ import main


def test_generate_continues_a_prompt_with_the_model_of_a_run(tmp_path, capsys):
    run = ["tiny", "--run-dir", str(tmp_path / "run"), "--steps", "1", "--eval-batches", "1", "--sample-tokens", "0"]
    train_runs.write_corpus(tmp_path / "corpus")
    small = ["--data.path", str(tmp_path / "corpus"), "--data.sequence-length", "64", "--data.batch-size", "8"]
    assert main([*run, *small, "--optimizer.warmup-steps", "0", "--model.num-layers", "1"]) == 0
    capsys.readouterr()
    command = ["generate", "--run", str(tmp_path / "run"), "--prompt", "def ", "--max-tokens", "4", "--num-samples=2"]
    assert main(command) == 0
    lines = capsys.readouterr().out
    assert lines.count("def ") >= 2
    assert main(["generate", "--run", str(tmp_path / "none")]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err
    assert main([*command, "--top-p", "3"]) == 2
    assert "top_p = 3.0" in capsys.readouterr().err
