"""The command that continues a prompt."""

import dataclasses

from helpers import train_runs
from helpers.models import SMALL
from helpers.saved_run import save_untrained

from nsa_jax import NSAConfig
from train.__main__ import main
from train.checkpoints.saved import SavedModel
from train.commands import generate as command
from train.config import DataConfig, OptimizerConfig, TrainConfig
from train.data.tokenizer import ByteTokenizer
from train.generation.generator import Piece

MODEL = dataclasses.replace(
    SMALL, num_kv_heads=2, nsa=NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=4, window=10)
)


def test_generate_continues_a_prompt_with_the_model_of_a_run(tmp_path, capsys):
    train_runs.write_corpus(tmp_path / "corpus")
    data = DataConfig(path=str(tmp_path / "corpus"), sequence_length=64, batch_size=8)
    save_untrained(TrainConfig(MODEL, data, OptimizerConfig(warmup_steps=0), run_dir=tmp_path / "run"))
    capsys.readouterr()
    arguments = ["generate", "--run", str(tmp_path / "run"), "--prompt", "def ", "--max-tokens", "4", "--num-samples=2"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out
    assert lines.count("def ") >= 2
    assert main([*arguments, "--drafts", "2"]) == 0
    assert capsys.readouterr().out == lines
    assert main([*arguments, "--tensor", "2"]) == 0
    assert capsys.readouterr().out == lines
    assert main([*arguments, "--kv-dtype", "int8"]) == 0
    assert capsys.readouterr().out.count("def ") >= 2
    assert main(["generate", "--run", str(tmp_path / "none")]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err
    for wrong, message in (
        (["--top-p", "3"], "top_p = 3.0: expected above 0 and at most 1"),
        (["--max-tokens", "-3"], "max_tokens = -3: expected at least 0"),
        (["--drafts", "-1"], "drafts = -1: expected at least 0"),
        (["--tensor", "9"], "tensor = 9: expected 1 to 8, the number of devices"),
        (["--num-samples", "0"], "num_samples = 0: expected at least 1"),
        (["--system", "be brief"], "system = 'be brief': expected --chat, whose first turn this is"),
        (["--prompt", "a", "b"], "prompt has 2 texts: expected one, or --chat, where each is a turn"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"


class Answers:
    """A generator that gives the answers of a list, and keeps what it was asked."""

    def __init__(self, answers):
        self.answers, self.asked, self.sizes, self.busy = iter(answers), [], [], False

    def __call__(self, params, model, tokenizer, *, slots, max_length, drafts, kv_dtype, mesh):
        self.tokenizer = tokenizer
        self.sizes.append(max_length)
        return self

    def submit(self, prompt, sampling):
        assert len(prompt) + sampling.max_tokens <= self.sizes[-1]
        self.asked.append((self.tokenizer.decode(prompt), sampling.seed))
        self.busy = True

    def step(self):
        self.busy = False
        return [Piece(0, next(self.answers), "stop")]


def test_a_conversation_has_a_system_prompt_and_every_turn_before(tmp_path, capsys, monkeypatch):
    saved = SavedModel(TrainConfig(), ByteTokenizer(), None, None)
    monkeypatch.setattr(command, "load_model", lambda run, **_: saved)
    answers = Answers(["one", "two", "x" * 200, "four"])
    monkeypatch.setattr(command, "Generator", answers)
    options = ["--system", "be brief", "--prompt", "first?", "second?", "--num-samples", "2", "--max-tokens", "9"]
    assert main(["generate", "--run", str(tmp_path), "--chat", *options]) == 0
    assert capsys.readouterr().out == f"> first?\none\n> second?\ntwo\n> first?\n{'x' * 200}\n> second?\nfour\n"
    begin = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nfirst?<|im_end|>\n<|im_start|>assistant\n"
    goes_on = "<|im_end|>\n<|im_start|>user\nsecond?<|im_end|>\n<|im_start|>assistant\n"
    assert [prompt for prompt, _ in answers.asked] == [
        begin,
        f"{begin}one{goes_on}",
        begin,
        f"{begin}{'x' * 200}{goes_on}",
    ]
    assert len({seed for _, seed in answers.asked}) == 4
    assert len(answers.sizes) == 2  # one cache for all turns, unless an answer is longer than its tokens
    answers.answers, answers.asked = iter(["five"]), []
    assert main(["generate", "--run", str(tmp_path), "--chat", "--prompt", "first?"]) == 0
    assert capsys.readouterr().out == "five\n"
    assert answers.asked[0][0] == begin.split("\n", 2)[2]
