"""Branches that are off: as if their gates were zero, and nothing of them is computed or kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from nsa_jax import (
    NSAConfig,
    NSAttention,
    init_nsa_cache,
    nsa_attention,
    select_blocks,
    window_attention,
)
from nsa_jax.backends import explain
from nsa_jax.context import from_zigzag, received_bytes, to_zigzag
from nsa_jax.sharding import sharded
from nsa_jax.testing import assert_matches_reference, assert_trees_close, random_inputs

ALL = NSAConfig(16, 8, 16, 4, 1, 2, 20)
WITHOUT = {
    "selection": dataclasses.replace(ALL, num_selected=0),
    "window": dataclasses.replace(ALL, window=0),
    "both": dataclasses.replace(ALL, num_selected=0, window=0),
}
OFF = pytest.mark.parametrize("off", WITHOUT)


def random_problem(num_segments=0, T=77):
    return random_inputs(
        jax.random.key(0), ALL, B=2, T=T, num_heads=4, num_kv_heads=2, head_dim=16, num_segments=num_segments
    )


@OFF
@pytest.mark.parametrize("implementation", ["reference", "xla", "triton"])
def test_a_branch_that_is_off_is_one_whose_gate_is_zero(off, implementation):
    """Also if its gate, keys and values hold anything at all."""
    inputs, config = random_problem(num_segments=2), WITHOUT[off]
    on = jnp.array([True, config.num_selected > 0, config.window > 0])
    poisoned = inputs.gates.at[..., ~on].set(jnp.nan)
    kv = {n: x if on[["cmp", "slc", "win"].index(n[:3])] else x + jnp.inf for n, x in inputs.kv._asdict().items()}

    def gradients(config, implementation, q, kv, gates):
        def loss(q, kv, gates):
            attend = functools.partial(nsa_attention, segment_ids=inputs.segment_ids, implementation=implementation)
            return jnp.sin(attend(q, kv, gates, config=config)).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, kv, gates)

    expected = gradients(ALL, "reference", inputs.q, inputs.kv, jnp.where(on, inputs.gates, 0))
    # The gate of zero has a gradient all the same; what is not read has none.
    expected = (expected[0], (*expected[1][:2], jnp.where(on, expected[1][2], 0)))
    actual = gradients(config, implementation, inputs.q, type(inputs.kv)(**kv), poisoned)
    assert_trees_close(actual, expected, 1e-5)


@OFF
def test_nothing_of_a_branch_that_is_off_is_computed(off):
    inputs, config = random_problem(), WITHOUT[off]
    for implementation in ("xla", "triton"):
        chosen = explain(
            nsa_attention, inputs.q, inputs.kv, inputs.gates, config=config, implementation=implementation
        ).choices
        ops = {choice.op for choice in chosen}
        assert ("select_blocks" in ops) == ("selected_attention" in ops) == (config.num_selected > 0)
        assert ("window_attention" in ops) == (config.window > 0)
        assert "compressed_attention" in ops


def test_ops_of_a_branch_that_is_off_are_refused():
    inputs = random_problem()
    q, kv, config = inputs.q, inputs.kv, WITHOUT["both"]
    with pytest.raises(ValueError, match=r"config.num_selected = 0: expected at least 1"):
        select_blocks(q, kv.cmp_k, jnp.zeros((2, 4, 77)), config=config)
    with pytest.raises(ValueError, match=r"config.window = 0: expected at least 1"):
        window_attention(q, kv.win_k, kv.win_v, config=config)


@OFF
def test_an_implementation_can_be_compared_without_a_branch(off):
    assert_matches_reference(random_problem(), WITHOUT[off], implementation="xla")


@OFF
def test_a_cache_holds_nothing_of_a_branch_that_is_off(off):
    config = WITHOUT[off]
    sizes = {"batch_size": 2, "max_length": 64, "num_kv_heads": 2, "head_dim": 8, "step_tokens": 3}
    cache = init_nsa_cache(config, **sizes)
    assert (cache.slc_k.size == cache.slc_v.size == 0) == (config.num_selected == 0)
    assert (cache.win_k.size == cache.win_v.size == 0) == (config.window == 0)
    layer = NSAttention(num_heads=4, num_kv_heads=2, head_dim=8, config=config)
    x = jnp.ones((2, 4, 16))
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    step = functools.partial(layer.apply, method="decode_step")
    assert jax.eval_shape(step, variables, x[:, :3], cache)[0].shape == (2, 3, 16)
    with pytest.raises(ValueError, match=r"expected at most 3 tokens a row"):
        step(variables, x, cache)


@OFF
def test_devices_that_split_the_tokens_fetch_nothing_of_a_branch_that_is_off(off):
    T, C, config = 128, 4, WITHOUT[off]
    inputs = random_problem(T=T)
    attend = functools.partial(nsa_attention, config=config, implementation="xla")
    expected = jax.jit(attend)(inputs.q, inputs.kv, inputs.gates)
    # A compressed token for every stride; those beyond the last are never seen.
    more = ((0, 0), (0, 1), (0, 0), (0, 0))
    kv = inputs.kv._replace(cmp_k=jnp.pad(inputs.kv.cmp_k, more), cmp_v=jnp.pad(inputs.kv.cmp_v, more))
    with jax.set_mesh(jax.make_mesh((C,), ("context",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:C])):
        arrays = jax.tree.map(
            lambda x: jax.device_put(to_zigzag(x, C), PartitionSpec(None, "context")), (inputs.q, kv, inputs.gates)
        )
        compiled = jax.jit(sharded(attend.func, context_axes="context"), static_argnames=("config", "implementation"))
        actual = compiled(*arrays, config=config, implementation="xla")
    assert_trees_close(from_zigzag(jax.device_get(actual), C), expected, 1e-5)
    sizes = {"T": T, "devices": C, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "v_head_dim": 16, "itemsize": 4}
    whole, less = (received_bytes("nsa", x, **sizes) for x in (ALL, config))
    token = 2 * 2 * 16 * 4
    selected = (C - 1) * (T // C) * token if config.num_selected == 0 else 0
    near = 2 * ALL.window * token if config.window == 0 else 0
    assert whole - less == selected + near
