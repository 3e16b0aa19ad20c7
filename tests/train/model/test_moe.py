"""The layer of experts: against a loop over experts, on meshes, and its balance."""

import collections
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nsa_jax.testing import assert_trees_close
from train.config import ModelConfig, MoEConfig
from train.model.moe import (
    Routing,
    _routed_experts,
    auxiliary_loss,
    moe_layer,
    moe_parameters,
    rebalanced,
    route,
    router_metrics,
)
from train.parallel.sharding import RULES, SHARE_AXES

B, T, E, M, N, K = 8, 6, 16, 12, 4, 2
CONFIG = ModelConfig(embed_dim=E, moe=MoEConfig(num_routed=N, num_shared=2, top_k=K, expert_dim=M))
SIGMOID = {"score": "sigmoid", "normalise": True, "routed_scaling": 2.5}


def changed(**changes):
    return dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, **changes))


def problem(config=CONFIG, bias=None):
    """Parameters, x, which tokens count, and cotangents of output and statistics. NumPy: they belong to no mesh."""
    named = moe_parameters(config)
    keys = jax.random.split(jax.random.key(0), len(named))
    parameters = {name: p.init(key, p.shape) for key, (name, p) in zip(keys, named.items(), strict=True)}
    parameters["balance_bias"] = jnp.linspace(-0.1, 0.1, N) if bias is None else jnp.asarray(bias, jnp.float32)
    keys = jax.random.split(jax.random.key(1), 4)
    x = jax.random.normal(keys[0], (B, T, E))
    counted = jax.random.uniform(keys[1], (B, T)) < 0.8
    cotangents = jax.random.normal(keys[2], x.shape), Routing(*jax.random.normal(keys[3], (2, N)), jnp.zeros(()), 0.0)
    return jax.device_get((parameters, x, counted, cotangents))


def layer(config):
    """Output, statistics and gradients from what `problem` gives."""

    def run(parameters, x, counted, cotangents):
        def forward(parameters, x):
            return moe_layer(parameters, x, counted, config=config)

        out, vjp = jax.vjp(forward, parameters, x)
        return out, vjp(jax.tree.map(jnp.asarray, cotangents))

    return run


def swiglu(x, gate, up, down):
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def loop(config, choice):
    """The same by a loop over experts that computes all of them on every token; `choice` is known."""
    moe = config.moe
    chosen = np.eye(N, dtype=np.float32)[choice].sum(axis=-2)  # [B, T, N]

    def run(parameters, x, counted, cotangents):
        def forward(parameters, x):
            logits = x @ parameters["router_kernel"]
            scores = jax.nn.softmax(logits) if moe.score == "softmax" else 1 / (1 + jnp.exp(-logits))
            weights = scores * chosen
            if moe.normalise:
                weights /= weights.sum(axis=-1, keepdims=True)
            y = jnp.zeros_like(x)
            for i in range(N):
                expert = (parameters[f"{name}_kernel"][i] for name in ("gate", "up", "down"))
                y += moe.routed_scaling * weights[..., i, None] * swiglu(x, *expert)
            for i in range(moe.num_shared):
                part = slice(i * M, (i + 1) * M)
                gate, up = (parameters[f"shared_{name}_kernel"][:, part] for name in ("gate", "up"))
                y += swiglu(x, gate, up, parameters["shared_down_kernel"][part])
            shares = scores / scores.sum(axis=-1, keepdims=True)
            count = counted[..., None].astype(np.float32)
            entropy = jax.lax.stop_gradient(-(count * shares * jnp.log(shares)).sum())
            return y, Routing(
                (count * chosen).sum(axis=(0, 1)), (count * shares).sum(axis=(0, 1)), entropy, count.sum()
            )

        out, vjp = jax.vjp(forward, parameters, x)
        return out, vjp(jax.tree.map(jnp.asarray, cotangents))

    return run


def best(config, parameters, x):
    """The choice of every token, in NumPy and float64."""
    logits = x.astype(np.float64) @ parameters["router_kernel"]
    scores = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    if config.moe.score == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    return np.argsort(-(scores + parameters["balance_bias"]), axis=-1, kind="stable")[..., : config.moe.top_k]


SAME = [9.0, 0.0, 9.0, 0.0]  # every token chooses experts 0 and 2


@pytest.mark.parametrize(
    ("changes", "bias"),
    [({}, None), (SIGMOID, None), ({"num_shared": 0, "top_k": 1}, None), (SIGMOID, SAME)],
    ids=["softmax", "sigmoid", "one choice, none shared", "all choose the same"],
)
def test_outputs_and_gradients_equal_a_loop_over_experts_and_no_token_is_dropped(changes, bias):
    config = changed(**changes)
    arguments = problem(config, bias)
    choice = best(config, *arguments[:2])
    actual = jax.jit(layer(config))(*arguments)
    assert_trees_close(actual, jax.jit(loop(config, choice))(*arguments), 1e-5)
    assignments = np.asarray(actual[0][1].assignments)
    assert assignments.sum() == arguments[2].sum() * config.moe.top_k
    if bias is not None:
        assert np.all(assignments[[0, 2]] == arguments[2].sum())
    assert np.any(actual[1][0]["router_kernel"] != 0)
    assert np.all(actual[1][0]["balance_bias"] == 0)


def test_what_ragged_dot_leaves_undefined_reaches_neither_values_nor_gradients(monkeypatch):
    parameters, x, *_ = problem()
    kernels = [parameters[f"{name}_kernel"][:2] for name in ("gate", "up", "down")]  # the other experts are elsewhere
    tokens = x.reshape(-1, E)
    choice = np.random.default_rng(0).integers(-1, N, (len(tokens), K)).astype(np.int32)
    choice = np.where(choice == choice[:, ::-1], -1, choice)
    mix = np.random.default_rng(1).random(choice.shape).astype(np.float32)

    def run():
        def total(tokens, mix, *kernels):
            return jnp.sum(jnp.sin(_routed_experts(tokens, choice, mix, *kernels)))

        return jax.jit(jax.value_and_grad(total, range(5)))(tokens, mix, *kernels)

    expected = run()
    ragged_dot = jax.lax.ragged_dot

    def undefined(x, kernels, group_sizes):
        defined = jnp.arange(len(x), dtype=jnp.int32)[:, None] < jnp.sum(group_sizes)
        return jnp.where(defined, ragged_dot(x, kernels, group_sizes), jnp.nan)

    monkeypatch.setattr(jax.lax, "ragged_dot", undefined)
    assert_trees_close(run(), expected, 1e-6)


def test_experts_that_nobody_chose_get_no_gradient():
    gradients = jax.jit(layer(CONFIG))(*problem(bias=SAME))[1][0]
    used = [bool(np.any(gradients["down_kernel"][i] != 0)) for i in range(N)]
    assert used == [b > 0 for b in SAME]


def test_the_choice_follows_score_plus_bias_and_the_weights_the_score_alone():
    scores = jnp.array([[0.4, 0.3, 0.2, 0.1]])
    config = MoEConfig(num_routed=4, top_k=2, routed_scaling=3.0)
    choice, weights, shares = route(jnp.log(scores), jnp.array([0.0, 0.0, 0.25, 0.0]), config)
    assert choice.tolist() == [[2, 0]]  # 0.45, 0.4; by the scores alone it would be 0 and 1
    np.testing.assert_allclose(weights, [[0.6, 1.2]], rtol=1e-6)
    np.testing.assert_allclose(shares, scores, rtol=1e-6)
    choice, weights, _ = route(jnp.log(scores), jnp.zeros(4), dataclasses.replace(config, normalise=True))
    assert choice.tolist() == [[0, 1]]
    np.testing.assert_allclose(weights, [[3 * 4 / 7, 3 * 3 / 7]], rtol=1e-6)


def test_the_auxiliary_loss_is_one_where_the_load_is_even_and_grows_with_its_correlation_to_the_scores():
    config = MoEConfig(num_routed=4, top_k=2)
    even = Routing(jnp.full(4, 5.0), jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.zeros(()), jnp.float32(10))
    assert float(auxiliary_loss(even, config)) == pytest.approx(1)
    uneven = even._replace(assignments=jnp.array([10.0, 10.0, 0.0, 0.0]))
    assert float(auxiliary_loss(uneven, config)) == pytest.approx(2 * 0.4 + 2 * 0.3)
    gradient = jax.grad(lambda routing: auxiliary_loss(routing, config))(uneven)
    np.testing.assert_allclose(gradient.shares, [0.2, 0.2, 0, 0], rtol=1e-6)
    assert not np.any(gradient.assignments)
    two_layers = jax.tree.map(lambda *x: jnp.stack(x), even, uneven)
    metrics = router_metrics(two_layers, config)
    assert [float(x) for x in metrics] == pytest.approx([2, 1.5, 1.2, 0])


def test_the_bias_moves_up_where_the_load_is_low_and_down_where_it_is_high():
    bias = jnp.array([[0.5, 0.0, -0.5, 0.25], [0.0, 0.0, 0.0, 0.0]])
    assignments = jnp.array([[7.0, 1.0, 4.0, 4.0], [0.0, 0.0, 0.0, 16.0]])
    moved = rebalanced(bias, assignments, 0.125)
    assert moved.tolist() == [[0.375, 0.125, -0.5, 0.25], [0.125, 0.125, 0.125, -0.125]]
    assert np.array_equal(rebalanced(bias, assignments, 0.0), bias)
    # Each layer by itself, alone or in a stack of any shape.
    assert np.array_equal(rebalanced(bias[0], assignments[0], 0.125), moved[0])
    assert np.array_equal(rebalanced(bias[:, None], assignments[:, None], 0.125), moved[:, None])


def spec(sizes, *names):
    """Where the mesh axes of `sizes` split logical axes."""
    rules = dict(RULES)
    axes = [rules[name] if name else () for name in names]
    return PartitionSpec(
        *(tuple(a for a in ((x,) if isinstance(x, str) else x or ()) if a in sizes) or None for x in axes)
    )


def communication(compiled):
    """How often a compiled program moves arrays of each shape by which collective operation."""
    pattern = r"= (.*?) ((?:all|reduce-scatter|collective|ragged-all)(?:-[a-z]+)*)\("
    moves = re.findall(pattern, compiled.as_text())
    return collections.Counter(
        f"{name} {array}" for shape, name in moves for array in re.findall(r"\w+\[[\d,]*\]", shape)
    )


def predicted(config, sizes):
    """What forward and backward must move."""
    size = collections.defaultdict(lambda: 1, sizes)
    rows = B * T // math.prod(sizes.values()) * size["tensor"]  # tokens of a device
    moves = [] if len(sizes) == 1 and "tensor" in sizes else [f"all-reduce f32[{N}]"] * 2 + ["all-reduce f32[]"] * 2
    if (n := size["expert"]) > 1:
        k = config.moe.top_k
        moves += [f"all-gather f32[{n * rows},{E}]"] * 2  # x, and the output's cotangent
        moves += [f"reduce-scatter f32[{rows},{E}]"] * 2  # the output, and the cotangent of x
        moves += [f"all-gather s32[{n * rows},{k}]", f"all-gather f32[{n * rows},{k}]"]  # choice and weights
        moves += [f"reduce-scatter f32[{rows},{k}]"]
    if size["tensor"] > 1:
        shard = B // (size["data"] * size["fsdp"] * size["expert"]), T // size["context"]
        moves += [f"all-reduce f32[{rows},{E}]", f"all-reduce f32[{shard[0]},{shard[1]},{E}]"]  # the output; x
    rules = {"embed": SHARE_AXES, "expert": ("expert",), "mlp": ("tensor",), "router": ()}
    for name, parameter in moe_parameters(config).items():
        if name == "balance_bias":
            continue
        axes = [rules[axis] for axis in parameter.axes]

        def shape(*whole, parameter=parameter, axes=axes):
            splits = [math.prod(size[axis] for axis in some if axis not in whole) for some in axes]
            return f"f32[{','.join(str(n // split) for n, split in zip(parameter.shape, splits, strict=True))}]"

        if any(size[axis] > 1 for axis in SHARE_AXES):
            moves += [f"all-gather {shape(*SHARE_AXES)}", f"reduce-scatter {shape()}"]
        if any(n > 1 and axis not in sum(axes, ()) for axis, n in sizes.items()):
            moves += [f"all-reduce {shape()}"]
    return collections.Counter(moves)


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (AUTO, {"expert": 2}),
        (AUTO, {"expert": 4}),
        (AUTO, {"expert": 2, "tensor": 2}),
        (AUTO, {"fsdp": 2, "expert": 2}),
        (AUTO, {"expert": 2, "context": 2}),
        (AUTO, {"data": 2, "tensor": 2}),
        (EXPLICIT, {"fsdp": 2, "expert": 2, "tensor": 2}),
    ],
    ids=lambda value: value.name if isinstance(value, AxisType) else " x ".join(f"{k} {n}" for k, n in value.items()),
)
def test_on_a_mesh_values_and_gradients_are_those_of_one_device_and_only_the_predicted_is_sent(alone, kind, sizes):
    config, arguments, expected = alone
    devices = jax.devices()[: math.prod(sizes.values())]
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes), devices=devices)

    def put(x, *names):
        return jax.device_put(x, NamedSharding(mesh, spec(sizes, *names)))

    parameters, x, counted, (dy, d_routing) = arguments
    tokens = ("batch", "sequence", None)
    with jax.set_mesh(mesh):
        named = moe_parameters(config)
        placed = (
            {name: put(value, *named[name].axes) for name, value in parameters.items()},
            put(x, *tokens),
            put(counted, *tokens[:2]),
            (put(dy, *tokens), d_routing),
        )
        compiled = jax.jit(layer(config)).lower(*placed).compile()
        actual = compiled(*placed)
    assert_trees_close(actual, expected, 1e-5)
    assert communication(compiled) == predicted(config, sizes)


@pytest.fixture(scope="module")
def alone():
    """Config, arguments, and what one device makes of them."""
    config = changed(**SIGMOID)
    arguments = problem(config)
    return config, arguments, jax.device_get(jax.jit(layer(config))(*arguments))


def test_without_axes_to_split_over_it_is_plain_local_code(alone):
    config, arguments, _ = alone
    for sizes in ({"elsewhere": 2}, {"expert": 1, "tensor": 1}):
        mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AUTO,) * len(sizes))
        with jax.set_mesh(mesh):
            assert "shard_map" not in str(jax.make_jaxpr(layer(config))(*arguments))
    with jax.set_mesh(jax.make_mesh((2,), ("expert",), axis_types=(AUTO,))):
        assert "shard_map" in str(jax.make_jaxpr(layer(config))(*arguments))


def test_the_gradient_of_tokens_and_experts_scatters_nothing(alone):
    config, arguments, _ = alone
    program = jax.jit(layer(config)).lower(*arguments).as_text()
    assert "stablehlo.scatter" not in program


def test_bfloat16_routes_in_float32_and_gives_bfloat16():
    parameters, x, counted, _ = problem()
    y, routing = jax.eval_shape(
        lambda x: moe_layer(parameters, x, counted, config=CONFIG), jnp.asarray(x, jnp.bfloat16)
    )
    assert y.dtype == jnp.bfloat16
    assert {x.dtype for x in routing} == {jnp.dtype("float32")}
    low = jax.jit(lambda x: moe_layer(parameters, x, counted, config=CONFIG))(jnp.asarray(x, jnp.bfloat16))
    high = jax.jit(lambda x: moe_layer(parameters, x, counted, config=CONFIG))(
        np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    )
    assert np.array_equal(low[1].assignments, high[1].assignments)
    assert_trees_close(low[0].astype(jnp.float32), high[0], 0.02)
