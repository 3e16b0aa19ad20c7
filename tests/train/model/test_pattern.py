"""Layers whose kinds of attention take turns."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.models import SMALL

from nsa_jax.testing import assert_trees_close
from train.config import MoEConfig, TrainConfig, check, from_json, to_json
from train.model.flops import train_flops_per_token
from train.model.transformer import Transformer, decoding_parameters, extend, init_caches, layer_stacks
from train.presets import parse
from train.step import TrainState, make_train_step

T, VOCABULARY = 24, 50
LAYERS = dataclasses.replace(SMALL, num_layers=4)


def tokens(rows):
    return jax.random.randint(jax.random.key(1), (rows, T), 0, VOCABULARY)


def parameters(config):
    model = Transformer(config, VOCABULARY)
    return nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), tokens(1)))["params"]


def grouped(params, period):
    """Parameters of equal layers, as those of a pattern: layer i of group g was layer g * period + i."""

    def split(stacked):
        return {str(i): jax.tree.map(lambda x, i=i: x[i::period], stacked) for i in range(period)}

    return {name: split(x) if name.endswith("layers") else x for name, x in params.items()}


@pytest.mark.exhaustive
def test_a_pattern_of_one_kind_is_that_kind_experts_and_their_balance_included():
    """One update moves every parameter, the balancing bias too, as it does without a pattern."""
    moe = MoEConfig(num_routed=4, top_k=2, expert_dim=8, first_dense=2, aux_loss=0.1, bias_speed=0.1)
    plain = dataclasses.replace(LAYERS, attention="window", moe=moe, remat="attention")
    pattern = dataclasses.replace(plain, attention="full", pattern=("window", "window"))
    params = parameters(plain)
    rows = tokens(2)
    batch = {"tokens": rows, "targets": rows[::-1], "weights": jnp.ones((2, T)), "target_bytes": jnp.ones_like(rows)}
    optimizer = optax.sgd(0.1)

    def updated(config, params):
        rng = jax.random.key_data(jax.random.key(0))
        state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), rng)
        step = make_train_step(Transformer(config, VOCABULARY), optimizer, accumulate=1, z_loss=0.0)
        return jax.jit(step)(state, batch)

    expected, of_plain = updated(plain, params)
    actual, of_pattern = updated(pattern, grouped(params, 2))
    assert_trees_close(actual.params, grouped(expected.params, 2), 1e-5)
    assert_trees_close(of_pattern, of_plain, 1e-5)
    moved = actual.params["layers"]["1"]["mlp"]["balance_bias"]
    assert moved.shape == (1, 4)
    assert np.any(moved != 0)


def test_kinds_take_turns_and_decoding_gives_the_forward_pass():
    config = dataclasses.replace(LAYERS, pattern=("nsa", "window"))
    assert config.attention_of_layers == ("nsa", "window") * 2
    params = parameters(config)
    assert [sum(name.startswith("gate_in_kernel") for name in params["layers"][i]["attention"]) > 0 for i in "01"] == [
        True,
        False,
    ]
    rows = tokens(2)
    whole = jax.jit(lambda params: Transformer(config, VOCABULARY).apply({"params": params}, rows))(params)
    caches = init_caches(config, batch_size=2, max_length=T)
    assert [type(cache) for cache in caches[:2]] == [type(cache) for cache in caches[2:]]
    prepared = decoding_parameters(params, config)
    prefilled, _ = jax.jit(lambda rows, caches: extend(prepared, config, rows, caches))(rows, caches)
    assert_trees_close(prefilled, whole, 1e-5)


def test_what_is_collected_from_a_stack_and_put_back_is_where_it_was():
    stack = layer_stacks(dataclasses.replace(LAYERS, pattern=("nsa", "window")))["layers"]
    tree = {str(i): {"mlp": {"bias": 10 * jnp.arange(2)[:, None] + i + jnp.zeros((2, 4))}} for i in range(2)}
    collected = stack.collect(tree, "mlp", "bias")
    assert collected[:, 0].tolist() == [0, 1, 10, 11]
    put = stack.replace(tree, collected, "mlp", "bias")
    jax.tree.map(np.testing.assert_array_equal, put, tree)


def test_flops_are_those_of_the_kinds():
    full, window = (dataclasses.replace(LAYERS, attention=kind) for kind in ("full", "window"))
    mixed = dataclasses.replace(LAYERS, pattern=("full", "window"))
    parts = [train_flops_per_token(config, T, VOCABULARY) for config in (full, window)]
    assert train_flops_per_token(mixed, T, VOCABULARY) == pytest.approx(sum(parts) / 2)


def test_the_setting_is_parsed_saved_and_refused_where_it_does_not_fit():
    config = parse(["tiny", "--pattern", "nsa", "window", "--steps", "50"])
    assert config.model.pattern == ("nsa", "window")
    assert config.model.attention_name == "nsa+window"
    saved = from_json(to_json(config))
    assert saved == config
    assert hash(saved.model) == hash(config.model)
    with pytest.raises(
        ValueError, match=r"model.num_layers = 4: expected a multiple of 3, the layers of model.pattern"
    ):
        check(TrainConfig(model=dataclasses.replace(LAYERS, pattern=("nsa", "window", "window"))))
