"""Held-out loss and bits per byte, over all tokens and by position in the sequence."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from nsa_jax.sharding import token_positions
from train.model.loss import LossSums, bits_per_byte
from train.parallel.sharding import RULES, put_batch

Loss = Callable[[Any, dict[str, Array]], LossSums]  # from parameters and a batch


def evaluate(
    eval_step: Callable[[Any, dict[str, jax.Array]], LossSums],
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    stride: int,
) -> dict[str, float]:
    """Held-out figures over all batches, each token counted once.

    Args:
      eval_step: from parameters and a batch to the batch's `LossSums`.
      params: of the model.
      batches: this host's rows of each batch.
      mesh: of the run.
      stride: see `put_batch`.

    Returns:
      "held_out_loss" in nats per token and "held_out_bits_per_byte".
    """
    sums = [eval_step(params, put_batch(batch, mesh, stride)) for batch in batches]
    # Added in float64: a float32 total would lose the last digits of a long evaluation.
    nll, _, weight, num_bytes = np.sum([np.asarray(batch, np.float64) for batch in jax.device_get(sums)], axis=0)
    loss = float(nll / weight) if weight else math.nan  # conversations can have long parts that do not count
    return {"held_out_loss": loss, "held_out_bits_per_byte": bits_per_byte(float(nll), float(num_bytes))}


class PositionSums(NamedTuple):
    """Sums over the tokens of each bucket of positions."""

    nll: Float[Array, " buckets"]  # weighted, in nats
    weight: Float[Array, " buckets"]
    bytes: Float[Array, " buckets"]  # of UTF-8


class Bucket(NamedTuple):
    """Held-out figures of positions begin .. end - 1."""

    begin: int
    end: int
    bits_per_byte: float
    nats_per_token: float
    tokens: float  # the sum of their weights


def bucket_width(sequence_length: int, buckets: int) -> int:
    """Positions in a bucket; the last of the buckets may have fewer."""
    return -(-sequence_length // buckets)


def position_sums(loss: Loss, params: Any, batch: dict[str, Array], buckets: int, length: int) -> PositionSums:
    """The loss of a batch by position: the number of tokens before it in its row, or in its segment if there are any.

    `length` positions are cut into buckets. Where a mesh needs padding, it comes after them and has no weight.
    """
    # The loss is linear in the weights, so that its gradient with respect to them is each token's own loss, however the
    # sum is computed and sharded.
    nll = jax.grad(lambda weights: loss(params, batch | {"weights": weights}).nll)(batch["weights"])
    B, T = nll.shape
    rules = dict(RULES)
    axes = {"batch_axes": rules["batch"], "context_axes": rules["sequence"]}
    positions = token_positions((B, T), batch.get("segment_ids"), **axes)
    weights = batch["weights"][..., None] * jax.nn.one_hot(positions // bucket_width(length, buckets), buckets)
    return PositionSums(
        nll=jnp.einsum("bt,btn->n", nll, weights),
        weight=jnp.einsum("btn->n", weights),
        bytes=jnp.einsum("bt,btn->n", batch["target_bytes"].astype(jnp.float32), weights),
    )


def evaluate_positions(
    step: Callable[[Any, dict[str, Any]], PositionSums], params: Any, batches: Iterable[dict[str, Any]], length: int
) -> list[Bucket]:
    """Held-out figures by position over all batches; buckets without text are left out.

    Args:
      step: `position_sums` of a loss and a number of buckets, from parameters and a batch.
      params: of the model.
      batches: as `step` takes them.
      length: tokens of a row, as given to `position_sums`.
    """
    totals: np.ndarray = np.zeros(())
    for batch in batches:
        totals = totals + np.asarray(jax.device_get(step(params, batch)), np.float64)
    width = bucket_width(length, totals.shape[1])
    found = []
    for i, (nll, weight, num_bytes) in enumerate(totals.T.tolist()):
        if num_bytes:
            end = min((i + 1) * width, length)
            found.append(Bucket(i * width, end, bits_per_byte(nll, num_bytes), nll / weight, weight))
    return found


def read_positions(path: Path) -> list[Bucket]:
    """The buckets of a file that `python -m train positions --out` wrote.

    Raises:
      ValueError: it is not such a file.
    """
    try:
        return [Bucket(**bucket) for bucket in json.loads(path.read_text())["buckets"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a file that `python -m train positions --out` wrote") from error
