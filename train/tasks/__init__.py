"""Tasks that ask whether a model finds and uses what lies far back in its context, in one table.

A new task is a function here and a line in `TASKS`. They are after needle in a haystack and RULER (arXiv 2404.06654),
written as lines of Python, so that a model of source code understands them without instructions.
"""

import string
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

LETTERS = np.array(list(string.ascii_lowercase))


class Puzzle(NamedTuple):
    """Lines to hide in a text, and a question about them to put at its end."""

    hidden: list[tuple[float, str]]  # how deep each line lies, from 0 (the start) to 1 (just before the question)
    question: str
    answer: str  # how the text goes on, with the space before it


Task = Callable[[np.random.Generator, float, int], Puzzle]  # from a source of chance, a depth and a count


def needle(draw: np.random.Generator, depth: float, count: int) -> Puzzle:
    """One name and its value, at `depth`; `count` is not used."""
    return needles(draw, depth, 1)


def needles(draw: np.random.Generator, depth: float, count: int) -> Puzzle:
    """`count` names and their values; the one asked for is at `depth`, the others anywhere."""
    names, values = _names(draw, count), _values(draw, count)
    depths = [depth, *draw.random(count - 1).tolist()]
    lines = [(at, f"{name} = {value}\n") for at, name, value in zip(depths, names, values, strict=True)]
    return Puzzle(lines, f"assert {names[0]} ==", f" {values[0]}\n")


def variables(draw: np.random.Generator, depth: float, count: int) -> Puzzle:
    """A value at `depth`, handed on `count` times from name to name in places after it; the last name is asked for."""
    names, value = _names(draw, count + 1), _values(draw, 1)[0]
    places = sorted(depth + (1 - depth) * draw.random(count))
    lines = [(at, f"{new} = {old}\n") for at, old, new in zip(places, names, names[1:], strict=False)]
    return Puzzle([(depth, f"{names[0]} = {value}\n"), *lines], f"assert {names[-1]} ==", f" {value}\n")


def most_common(draw: np.random.Generator, depth: float, count: int) -> Puzzle:
    """`count` words, one of them named four times and the others once, all after `depth`; that one is asked for."""
    words = _names(draw, count)
    lines = [f'words.append("{word}")\n' for word in (*words, *words[:1] * 3)]
    places = depth + (1 - depth) * draw.random(len(lines))
    return Puzzle(list(zip(places.tolist(), lines, strict=True)), 'assert most_common(words) == "', f'{words[0]}"\n')


TASKS: dict[str, Task] = {
    "needle": needle,
    "needles": needles,
    "variables": variables,
    "most-common": most_common,
}


def _names(draw: np.random.Generator, count: int) -> list[str]:
    """Different names of eight letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(draw.choice(LETTERS, 8))] = None
    return list(names)


def _values(draw: np.random.Generator, count: int) -> list[int]:
    """Different numbers of five digits."""
    return (10_000 + draw.choice(90_000, count, replace=False)).tolist()
