"""Tasks over long contexts: `python -m train evaluate --run FOLDER --task needle --lengths 2048 8192`.

`python -m train report needle.png NSA=nsa.json full=full.json` draws what --out wrote.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Int32

from pallas_kernels.benchmarks.provenance import provenance
from train.checkpoints.checkpointer import Checkpointer
from train.checkpoints.saved import load_model
from train.commands.output import check_output
from train.data.corpus import Corpus, load_corpus
from train.data.tokenizer import Tokenizer
from train.run_folder import read_config, write
from train.tasks import TASKS
from train.tasks.haystack import Problem, Score, hide, make_answer_step, score

if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[tuple(TASKS)]

HAYSTACK = 4  # times the longest length: held-out tokens from which the texts are cut


@dataclasses.dataclass(frozen=True)
class Arguments:
    """How many problems of a task a run's model solves, by the length of the context and the depth of what it needs.

    Problems are hidden in the run's held-out documents. One is solved where every token of its answer is the model's
    first choice.
    """

    run: Path  # the run's folder
    task: TaskName = "needle"  # needle: one line; needles: one of several; variables: a chain; most-common: a count
    step: int | None = None  # of the checkpoint; None: the newest
    lengths: tuple[int, ...] = ()  # tokens of a problem; none: the run's sequence length
    depths: int = 5  # places of the line that the answer needs, evenly from the start of the text to its end
    problems: int = 8  # for each length and depth
    count: int = 4  # lines of needles, hops of variables, words of most-common
    seed: int = 0  # of the problems
    tokens_at_once: int = 65_536  # in a batch, which holds at least one problem
    out: Path | None = None  # JSON file to write


def evaluate(arguments: Arguments) -> None:
    """Prints the share of solved problems as a table, and writes it as JSON where asked.

    Raises:
      ValueError: there is no such run, a setting is impossible, or the held-out documents are too short.
      CheckpointError: the run has no such checkpoint, or it cannot be read.
    """
    for name in ("depths", "problems", "count", "tokens_at_once"):
        if (value := getattr(arguments, name)) < 1:
            raise ValueError(f"{name} = {value}: expected at least 1")
    if arguments.out is not None:
        check_output("out", arguments.out)
    config = read_config(arguments.run)
    lengths = arguments.lengths or (config.data.sequence_length,)
    step = arguments.step
    if step is None:
        step = Checkpointer(arguments.run / "checkpoints", config.checkpoint).latest_step
    saved = load_model(arguments.run, step=step)
    text = held_out_tokens(load_corpus(config.data), saved.tokenizer, HAYSTACK * max(lengths))
    depths = np.linspace(0, 1, arguments.depths).tolist() if arguments.depths > 1 else [0.5]
    problems = {
        length: [_problems(arguments, saved.tokenizer, text, length, depth) for depth in depths] for length in lengths
    }
    longest = max(problem.answer for rows in problems.values() for row in rows for problem in row)
    answer_step = make_answer_step(saved.model, longest)
    print(f"{'length':>8}" + "".join(f"{f'depth {depth:.2f}':>12}" for depth in depths) + f"{'all (95%)':>23}")
    cells = []
    for length, rows in problems.items():
        found = [score(answer_step, saved.params, row, arguments.tokens_at_once) for row in rows]
        cells += [
            {"length": length, "depth": depth, **cell._asdict()} for depth, cell in zip(depths, found, strict=True)
        ]
        total = Score(sum(cell.solved for cell in found), sum(cell.problems for cell in found), 0.0)
        low, high = total.interval
        shares = "".join(f"{cell.solved / cell.problems:12.2f}" for cell in found)
        print(f"{length:8}{shares}{total.solved / total.problems:10.2f} ({low:.2f}-{high:.2f})", flush=True)
    if arguments.out is not None:
        content = {
            "provenance": provenance(["python", "-m", "train", *sys.argv[1:]]),
            "step": step,
            "task": arguments.task,
            "count": arguments.count,
            "seed": arguments.seed,
            "cells": cells,
        }
        write(arguments.out, json.dumps(content, indent=1) + "\n")


def held_out_tokens(corpus: Corpus, tokenizer: Tokenizer, most: int) -> Int32[np.ndarray, " N"]:
    """Tokens of the held-out documents, one after the other, `most` of them or as many as there are."""
    parts: list[np.ndarray] = []
    total = 0
    for index in range(len(corpus.held_out)):
        if total >= most:
            break
        parts.append(tokenizer.encode(corpus.held_out[index]))
        total += len(parts[-1])
    return np.concatenate(parts)[:most]


def _problems(
    arguments: Arguments, tokenizer: Tokenizer, text: Int32[np.ndarray, " N"], length: int, depth: float
) -> list[Problem]:
    """The problems of one length and depth; each begins somewhere else in the text."""
    found = []
    for number in range(arguments.problems):
        draw = np.random.default_rng([arguments.seed, length, round(1000 * depth), number])
        puzzle = TASKS[arguments.task](draw, depth, arguments.count)
        begin = int(draw.integers(0, max(0, len(text) - length) + 1))
        found.append(hide(puzzle, text[begin:], length, tokenizer))
    return found
