"""Gradients in bfloat16: no long sum is rounded on its way, and they are not much further from float32's than rounding
the parameters once takes them."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.extend.core
import numpy as np
import pytest

from nsa_jax.testing import normwise_error
from tests.train.test_meshes import LARGER, MODELS, OPTIMIZER, VOCABULARY, batch, initial, models, one_step
from train.config import MeshConfig
from train.model.transformer import Transformer
from train.parallel.sharding import make_mesh, on_mesh, put_batch
from train.step import make_train_step

SUMS = ("reduce_sum", "cumsum", "scatter-add", "reduce_window_sum")


def equations(jaxpr) -> Iterator:
    """Those of a jaxpr and of all jaxprs inside of it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, context=2)], ids=["alone", "mesh"])
@pytest.mark.parametrize("name", ["full", "nsa", pytest.param("experts", marks=pytest.mark.exhaustive)])
def test_no_sum_of_more_than_two_numbers_is_in_bfloat16(name, mesh):
    config = dataclasses.replace(MODELS[name], dtype="bfloat16")
    trace = jax.make_jaxpr(make_train_step(Transformer(config, VOCABULARY), OPTIMIZER, accumulate=1, z_loss=1e-3))
    rows = batch(61)
    if mesh is not None:
        devices = make_mesh(mesh, jax.devices()[:4])
        trace, rows = on_mesh(trace, devices), put_batch(rows, devices, config.nsa.compress_stride)
    rounded = [
        str(equation)
        for equation in equations(trace(initial(config)[0], rows).jaxpr)
        if equation.primitive.name in SUMS and equation.invars[0].aval.dtype == "bfloat16"
    ]
    assert not rounded


def apart(a, b) -> float:
    """Normwise error of all gradients together."""
    return normwise_error(*(np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b)))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_at_most_twice_as_far_from_float32_as_rounded_parameters_are(name, monkeypatch):
    """What no arithmetic could undo: with parameters rounded once, float32's own gradients are as far away as this.

    With NSA and experts the distance is larger, because rounded scores choose other blocks and other experts.
    """
    config = models(LARGER)[name]
    exact, _ = one_step(config, 301)
    rounded, _ = one_step(dataclasses.replace(config, dtype="bfloat16"), 301)
    state, axes = initial(config)
    once = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16).astype(np.float32), state.params)
    monkeypatch.setattr("tests.train.test_meshes.initial", lambda config: (state._replace(params=once), axes))
    floor, _ = one_step(config, 301)
    assert 0 < apart(rounded, exact) < 2 * apart(floor, exact)
