"""Multi-query associative recall (MQAR, arXiv 2312.04927): pairs of a key and a value, and later the keys alone.

A model is trained on the task itself, from random parameters. What it reaches says whether its attention can look up.
"""

import numpy as np

Rows = dict[str, np.ndarray]  # as the trainer's batches


def vocabulary(pairs: int) -> int:
    """Tokens of the task: twice as many keys and twice as many values as there are pairs, and one that fills."""
    return 4 * pairs + 1


def make_rows(draw: np.random.Generator, *, rows: int, length: int, pairs: int) -> Rows:
    """Rows of a batch: key and value `pairs` times, then every key once more, in places drawn from all that follow.

    Keys are different in a row, values may repeat. Elsewhere stands the filling token 0. At each key's second place the
    target is its value; no other place counts.

    Args:
      draw: source of chance.
      rows: B.
      length: T, at least three times `pairs`.
      pairs: of a row.

    Returns:
      Arrays [B, T]: "tokens", "targets", "target_bytes" int32 and "weights" float32.

    Raises:
      ValueError: `length` is too short.
    """
    if length < 3 * pairs:
        raise ValueError(f"length = {length}: expected at least {3 * pairs}, three times the pairs = {pairs}")
    tokens = np.zeros((rows, length), np.int32)
    targets, weights = np.zeros_like(tokens), np.zeros((rows, length), np.float32)
    for row in range(rows):
        keys = 1 + draw.choice(2 * pairs, pairs, replace=False)
        values = 1 + 2 * pairs + draw.integers(0, 2 * pairs, pairs)
        tokens[row, 0 : 2 * pairs : 2], tokens[row, 1 : 2 * pairs : 2] = keys, values
        places = 2 * pairs + draw.choice(length - 2 * pairs, pairs, replace=False)
        tokens[row, places], targets[row, places], weights[row, places] = keys, values, 1
    return {"tokens": tokens, "targets": targets, "weights": weights, "target_bytes": (weights > 0).astype(np.int32)}
