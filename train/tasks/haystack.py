"""Puzzles hidden in text, and how many of them a model solves."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from train.data.tokenizer import Tokenizer
from train.model.transformer import Transformer, logits
from train.tasks import Puzzle


class Problem(NamedTuple):
    """A puzzle as tokens."""

    tokens: Int32[np.ndarray, " T"]  # beginning of text, text, question, answer
    answer: int  # how many of them, at the end, are the answer


class Score(NamedTuple):
    """What became of a number of problems."""

    solved: int  # problems of which every token of the answer was the model's first choice
    problems: int
    nll: float  # mean negative log-likelihood of an answer, in nats

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the share of problems that are solved."""
        n, p, z = self.problems, self.solved / self.problems, 1.959964
        centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def hide(puzzle: Puzzle, text: Int32[np.ndarray, " N"], length: int, tokenizer: Tokenizer) -> Problem:
    """The puzzle in the beginning of `text`, as `length` tokens in all.

    Lines, question and answer are encoded each by itself, so that an answer's tokens do not depend on its place.

    Raises:
      ValueError: `length` is too short for the puzzle, or `text` for the length.
    """
    question, answer = tokenizer.encode("\n" + puzzle.question), tokenizer.encode(puzzle.answer)
    hidden = [(depth, tokenizer.encode("\n" + line)) for depth, line in sorted(puzzle.hidden, key=lambda item: item[0])]
    room = length - 1 - len(question) - len(answer) - sum(len(line) for _, line in hidden)
    if room < 0:
        raise ValueError(f"length = {length}: expected at least {length - room} tokens, which the puzzle takes")
    if len(text) < room:
        raise ValueError(f"text of {len(text)} tokens: expected at least {room}, to fill a length of {length}")
    parts, begin = [np.array([tokenizer.bos_id], np.int32)], 0
    for depth, line in hidden:
        end = round(depth * room)
        parts += [text[begin:end], line]
        begin = end
    return Problem(np.concatenate([*parts, text[begin:room], question, answer]), len(answer))


AnswerStep = Callable[[Any, Int[Array, "B T"], Int[Array, " B"]], tuple[Array, Array]]


def make_answer_step(model: Transformer, longest: int) -> AnswerStep:
    """From parameters, problems' tokens and the lengths of their answers (at most `longest`) to two arrays [B].

    The first says whether each token of the answer is the most likely one after those before it, that is whether greedy
    decoding would give the answer. The second is the negative log-likelihood of the answer in nats.
    """

    def step(params: Any, tokens: Int[Array, "B T"], answer: Int[Array, " B"]) -> tuple[Array, Array]:
        hidden: Any = model.apply({"params": params}, tokens[:, :-1])
        scores: Float[Array, "B A V"] = logits(params, hidden[:, -longest:], model.config)[..., : model.vocab_size]
        targets = tokens[:, -longest:]
        counts = jnp.arange(longest)[None, :] >= longest - answer[:, None]
        likelihood = jnp.take_along_axis(jax.nn.log_softmax(scores), targets[..., None], axis=-1)[..., 0]
        solved = jnp.all((jnp.argmax(scores, axis=-1) == targets) | ~counts, axis=1)
        return solved, -jnp.sum(jnp.where(counts, likelihood, 0), axis=1)

    return jax.jit(step)


def score(step: AnswerStep, params: Any, problems: Sequence[Problem], tokens_at_once: int) -> Score:
    """How many problems of one length are solved.

    Args:
      step: by `make_answer_step`.
      params: of its model.
      problems: of one length.
      tokens_at_once: in a batch, which holds at least one problem.
    """
    size = min(len(problems), max(1, tokens_at_once // len(problems[0].tokens)))
    solved, nll = 0, 0.0
    for begin in range(0, len(problems), size):
        batch = problems[begin : begin + size]
        filled = [*batch, *[batch[-1]] * (size - len(batch))]  # every batch of one size, for one compiled program
        tokens = np.stack([problem.tokens for problem in filled])
        answers = np.array([problem.answer for problem in filled], np.int32)
        right, lost = (np.asarray(x)[: len(batch)] for x in step(params, jnp.asarray(tokens), jnp.asarray(answers)))
        solved, nll = solved + int(right.sum()), nll + float(lost.sum())
    return Score(solved, len(problems), nll / len(problems))


def holds_scores(path: Path) -> bool:
    """Whether a JSON file is one that `python -m train evaluate --out` wrote."""
    try:
        return "cells" in json.loads(path.read_text())
    except (OSError, ValueError, TypeError):
        return False


def read_scores(path: Path) -> dict[tuple[int, float], Score]:
    """The scores in a file that `python -m train evaluate --out` wrote, by length and depth.

    Raises:
      ValueError: it is not such a file.
    """
    try:
        cells = json.loads(path.read_text())["cells"]
        return {(cell["length"], cell["depth"]): Score(cell["solved"], cell["problems"], cell["nll"]) for cell in cells}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a file that `python -m train evaluate --out` wrote") from error
