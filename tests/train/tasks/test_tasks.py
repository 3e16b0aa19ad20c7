"""Tasks over long contexts: what is asked can be answered from the text, and a model that knows the answer scores."""

import json

import numpy as np
import pytest
from helpers.models import SMALL
from helpers.saved_run import save_untrained
from hypothesis import given
from hypothesis import strategies as st

from train.__main__ import main
from train.config import DataConfig, OptimizerConfig, TrainConfig
from train.data.tokenizer import ByteTokenizer
from train.tasks import TASKS, mqar
from train.tasks.haystack import Problem, Score, hide, score

BYTE = ByteTokenizer()


def solve(text):
    """The answer, by running the lines before the question and looking the question up."""
    lines = text.split("\n")
    known, words = {}, []
    for line in lines[:-1]:
        if " = " in line:
            name, value = line.split(" = ")
            known[name] = known.get(value, value)
        elif line.startswith("words.append("):
            words.append(line.split('"')[1])
    question = lines[-1]
    if question.startswith("assert most_common"):
        return max(words, key=words.count) + '"\n'
    return f" {known[question.split()[1]]}\n"


@given(
    task=st.sampled_from(list(TASKS)),
    seed=st.integers(0, 2**32 - 1),
    depth=st.floats(0, 1),
    count=st.integers(1, 6),
    length=st.integers(500, 900),
)
def test_the_answer_follows_from_the_text_and_from_nothing_else(task, seed, depth, count, length):
    puzzle = TASKS[task](np.random.default_rng(seed), depth, count)
    problem = hide(puzzle, np.full(1000, ord("#"), np.int32), length, BYTE)
    assert len(problem.tokens) == length
    assert problem.tokens[0] == BYTE.bos_id
    text, answer = BYTE.decode(problem.tokens[: -problem.answer]), BYTE.decode(problem.tokens[-problem.answer :])
    stripped = text.replace("#", "")
    assert solve(stripped) == answer == puzzle.answer
    # Nothing that the answer needs stands before its depth.
    needed = puzzle.answer.strip().strip('"')
    room = text.count("#")
    assert text[: text.index(needed)].count("#") >= round(depth * room)


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_a_needle_lies_at_its_depth(depth):
    puzzle = TASKS["needle"](np.random.default_rng(0), depth, 1)
    text = np.full(1000, ord("#"), np.int32)
    problem = hide(puzzle, text, 500, BYTE)
    decoded = BYTE.decode(problem.tokens)
    before, _, after = decoded.partition(puzzle.hidden[0][1])
    room = before.count("#") + after.count("#")
    assert before.count("#") == round(depth * room)
    with pytest.raises(ValueError, match=r"length = 20: expected at least \d+ tokens, which the puzzle takes"):
        hide(puzzle, text, 20, BYTE)
    with pytest.raises(ValueError, match=r"text of 1000 tokens: expected at least \d+, to fill a length of 2000"):
        hide(puzzle, text, 2000, BYTE)


def test_scores_count_every_problem_once_and_their_interval_is_wilsons():
    problems = [Problem(np.full(10, i, np.int32), 2) for i in range(5)]

    def step(params, tokens, answers):
        assert tokens.shape == (2, 10)
        return tokens[:, 0] % 2 == 0, tokens[:, 0].astype(np.float32)

    assert score(step, None, problems, 25) == Score(3, 5, 2.0)
    assert score(lambda *a: (np.ones(1, bool), np.zeros(1)), None, problems, 1).solved == 5
    np.testing.assert_allclose(Score(3, 5, 0.0).interval, (0.2307, 0.8824), atol=1e-4)  # of a published table
    np.testing.assert_allclose(Score(0, 10, 0.0).interval, (0.0, 0.2775), atol=1e-4)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The folder of a run with an untrained model, and held-out documents of random letters."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = np.random.default_rng(0)
    (folder / "corpus").mkdir()
    for i in range(12):
        (folder / "corpus" / f"{i}.txt").write_bytes(draw.integers(97, 123, 400).astype(np.uint8).tobytes())
    data = DataConfig(str(folder / "corpus"), sequence_length=128, batch_size=8, held_out_fraction=0.5)
    save_untrained(TrainConfig(SMALL, data, OptimizerConfig(warmup_steps=0), run_dir=folder / "run", eval_batches=1))
    return folder / "run"


def test_the_command_scores_a_run_and_its_file_is_drawn(untrained, tmp_path, capsys):
    out = tmp_path / "needle.json"
    command = ["evaluate", "--run", str(untrained), "--lengths", "100", "128", "--depths", "3", "--problems", "2"]
    assert main([*command, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "depth 0.50" in shown
    found = json.loads(out.read_text())
    assert [(cell["length"], cell["depth"]) for cell in found["cells"]] == [
        (length, depth) for length in (100, 128) for depth in (0.0, 0.5, 1.0)
    ]
    # Nobody guesses five digits; an untrained model finds every byte about as likely.
    assert all(cell["solved"] == 0 and cell["problems"] == 2 for cell in found["cells"])
    np.testing.assert_allclose([cell["nll"] for cell in found["cells"]], 7 * np.log(258), rtol=0.1)
    assert main(["report", str(tmp_path / "needle.png"), f"untrained={out}"]) == 0
    assert (tmp_path / "needle.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--depths", "0"], "depths = 0: expected at least 1"),
        (["--lengths", "30"], "length = 30: expected at least"),
        (["--task", "needles", "--count", "0"], "count = 0: expected at least 1"),
    ],
)
def test_settings_that_are_impossible_are_named(untrained, wrong, message, capsys):
    assert main(["evaluate", "--run", str(untrained), *wrong]) == 2
    assert message in capsys.readouterr().err


@given(seed=st.integers(0, 2**32 - 1), pairs=st.integers(1, 9), more=st.integers(0, 30))
def test_every_key_comes_again_once_and_asks_for_its_value(seed, pairs, more):
    batch = mqar.make_rows(np.random.default_rng(seed), rows=3, length=3 * pairs + more, pairs=pairs)
    assert batch["tokens"].max() < mqar.vocabulary(pairs)
    assert batch["targets"].max() < mqar.vocabulary(pairs)
    for tokens, targets, weights in zip(batch["tokens"], batch["targets"], batch["weights"], strict=True):
        known = dict(zip(tokens[0 : 2 * pairs : 2].tolist(), tokens[1 : 2 * pairs : 2].tolist(), strict=True))
        asked = np.flatnonzero(weights)
        assert sorted(tokens[asked].tolist()) == sorted(known)
        assert len(known) == pairs
        assert asked.min() >= 2 * pairs
        assert [known[key] for key in tokens[asked].tolist()] == targets[asked].tolist()
        assert not tokens[2 * pairs :][weights[2 * pairs :] == 0].any()


def test_a_model_learns_to_recall_the_value_of_the_only_key(tmp_path, capsys):
    out = tmp_path / "mqar.json"
    model = "--model.num-layers 1 --model.embed-dim 16 --model.num-heads 2 --model.num-kv-heads 2 --model.head-dim 8"
    rest = "--data.sequence-length 16 --data.batch-size 32 --steps 60 --eval-every 30 --optimizer.learning-rate 3e-2"
    command = f"mqar --pairs 1 --out {out} tiny --attention full --model.mlp-dim 16 {model} {rest}"
    assert main(command.split()) == 0
    curve = json.loads(out.read_text())["curve"]
    assert [point["step"] for point in curve] == [30, 60]
    assert curve[-1]["accuracy"] > 0.9  # guessing one of two values gives a half
    assert main(["mqar", "--pairs", "100", "tiny", "--data.sequence-length", "256"]) == 2
    assert "length = 256: expected at least 300, three times the pairs = 100" in capsys.readouterr().err
