"""Held-out loss and bits per byte."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from train.model.loss import LossSums, bits_per_byte
from train.parallel.sharding import put_batch


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
      stride: as of `put_batch`.

    Returns:
      "held_out_loss" in nats per token and "held_out_bits_per_byte".
    """
    sums = [eval_step(params, put_batch(batch, mesh, stride)) for batch in batches]
    # Added in float64: a float32 total would lose the last digits of a long evaluation.
    nll, _, weight, num_bytes = np.sum([np.asarray(batch, np.float64) for batch in jax.device_get(sums)], axis=0)
    loss = float(nll / weight) if weight else math.nan  # conversations can have long parts that do not count
    return {"held_out_loss": loss, "held_out_bits_per_byte": bits_per_byte(float(nll), float(num_bytes))}
