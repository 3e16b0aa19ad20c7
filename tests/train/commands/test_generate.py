"""The command that continues a prompt."""

from helpers import train_runs
from helpers.saved_run import save_untrained

from nsa_jax import NSAConfig
from train.__main__ import main
from train.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig

MODEL = ModelConfig(
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    nsa=NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=4, window=10),
)


def test_generate_continues_a_prompt_with_the_model_of_a_run(tmp_path, capsys):
    train_runs.write_corpus(tmp_path / "corpus")
    data = DataConfig(path=str(tmp_path / "corpus"), sequence_length=64, batch_size=8)
    save_untrained(TrainConfig(MODEL, data, OptimizerConfig(warmup_steps=0), run_dir=tmp_path / "run"))
    capsys.readouterr()
    command = ["generate", "--run", str(tmp_path / "run"), "--prompt", "def ", "--max-tokens", "4", "--num-samples=2"]
    assert main(command) == 0
    lines = capsys.readouterr().out
    assert lines.count("def ") >= 2
    assert main(["generate", "--run", str(tmp_path / "none")]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err
    assert main([*command, "--top-p", "3"]) == 2
    assert "top_p = 3.0" in capsys.readouterr().err
