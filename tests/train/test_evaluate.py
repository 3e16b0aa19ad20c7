import math

import jax.numpy as jnp
import numpy as np
import pytest

from train.config import MeshConfig
from train.evaluate import evaluate
from train.model.loss import LossSums
from train.parallel.sharding import make_mesh


def test_tokens_and_bytes_count_once_however_they_lie_in_batches():
    def eval_step(params, batch):
        weight = batch["weights"]
        return LossSums(
            nll=jnp.sum(weight * batch["nll"]) * params,
            z=jnp.zeros(()),
            weight=jnp.sum(weight),
            bytes=jnp.sum(weight * batch["bytes"]),
        )

    draw = np.random.default_rng(0)
    whole = {name: draw.random((24, 4)).astype(np.float32) for name in ("nll", "bytes", "weights")}
    batches = [{name: value[begin : begin + 8] for name, value in whole.items()} for begin in (0, 8, 16)]
    values = evaluate(eval_step, jnp.float32(2.0), batches, make_mesh(MeshConfig()), 1)
    nll = 2 * (whole["weights"] * whole["nll"]).sum()
    assert values["held_out_loss"] == pytest.approx(nll / whole["weights"].sum(), rel=1e-6)
    num_bytes = (whole["weights"] * whole["bytes"]).sum()
    assert values["held_out_bits_per_byte"] == pytest.approx(nll / num_bytes / math.log(2), rel=1e-6)
