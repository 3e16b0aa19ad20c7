"""Explicit mesh axes, which `jax.make_mesh` gives: every layer, cache and op has the numbers of one device."""

import contextlib
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from whole_layers import (
    CONFIG,
    FIELDS,
    HEADS,
    MAX_LENGTH,
    E,
    T,
    embeddings,
    everything,
    initial,
    layer,
    linen,
    run_alone,
    segments,
)

import nsa_jax
import nsa_jax.nnx
from nsa_jax import BranchKV, num_blocks
from nsa_jax.cache import POOLS, put_row, take_row
from nsa_jax.dense import causal_attention
from nsa_jax.rope import apply_rope
from nsa_jax.testing import assert_trees_close, random_inputs
from nsa_jax.tracing import trace_attention

B = 4
AXES = {"batch_axes": "data", "head_axes": "tensor"}
RULES = (("heads", "tensor"), ("kv_heads", "tensor"))


def make_mesh(*sizes):
    names = ("data", "tensor")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Explicit,) * len(sizes))


def split(tree, mesh, *axes):
    """A tree on a mesh, with its leading dimensions split over the axes."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes[: x.ndim]))), tree)


N = num_blocks(MAX_LENGTH, CONFIG)
TABLES = np.random.default_rng(0).permutation(B * N + 3)[: B * N].reshape(B, N)
PAGES = {"num_pages": B * N + 3, "block_tables": TABLES}
CACHES = {"contiguous": {}, "paged": PAGES, "paged, one prefill": {**PAGES, "continuing": False}}


@functools.cache
def expected(name, cache):
    return run_alone(name, **CACHES[cache])


@pytest.mark.parametrize(
    ("name", "flavour", "sizes", "axes", "cache", "context"),
    [
        ("nsa", "nnx", (2, 2), AXES, "paged, one prefill", True),
        *(
            pytest.param(name, flavour, sizes, axes, cache, context, marks=pytest.mark.exhaustive)
            for name in FIELDS
            for flavour, sizes, axes, cache, context in (
                ("linen", (1,), {}, "contiguous", True),
                ("linen", (2,), {}, "contiguous", False),
                ("nnx", (2, 2), AXES, "paged" if name.startswith("nsa") else "contiguous", True),
                ("linen", (2, 2), {}, "paged" if name.startswith("nsa") else "contiguous", True),
                ("linen", (4, 1), {"batch_axes": "data"}, "contiguous", True),
                ("nnx", (1, 2), {}, "contiguous", False),
            )
        ),
    ],
)
def test_layers_and_their_caches_have_the_numbers_of_one_device(name, flavour, sizes, axes, cache, context):
    mesh, boxed = make_mesh(*sizes), initial(name)
    rules = RULES[: 2 * (len(sizes) - 1)]
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)
    placed = (
        jax.device_put(nn.unbox(boxed), shardings),
        *split((embeddings(), segments(), embeddings(2)), mesh, "data"),
    )
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        actual = jax.jit(everything(layer(name, flavour, **axes), **CACHES[cache]))(*placed)
    y, (gradients, _), _, filled = actual
    assert y.sharding.spec[0] == "data"
    if axes and sizes == (2, 2):
        assert all(x.sharding.spec[0] == "data" for n, x in filled._asdict().items() if n not in POOLS)
        assert all(x.sharding.spec[1] == "tensor" for n, x in filled._asdict().items() if n in POOLS)
    for key, gradient in gradients.items():
        assert jax.typeof(gradient).sharding.spec == jax.typeof(placed[0][key]).sharding.spec, key
    assert_trees_close(jax.device_get(actual), expected(name, cache), 1e-5)


def test_without_axes_a_layer_finds_them_and_communicates_nothing_but_the_sum_over_heads():
    mesh, boxed = make_mesh(2, 2), initial("nsa")
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
    placed = (jax.device_put(nn.unbox(boxed), shardings), split(embeddings(), mesh, "data"))
    with jax.set_mesh(mesh):
        run = jax.jit(lambda params, x: layer("nsa", "linen")(params, "__call__", x))
        text = run.lower(*placed).compile().as_text()
    moved = re.findall(r" ((?:all|reduce-scatter|collective)(?:-[a-z]+)*)\(", text)
    assert set(moved) == {"all-reduce"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("name", FIELDS)
def test_layers_run_outside_jit(name, context):
    mesh, params = make_mesh(2), nn.unbox(initial(name))
    x = split(embeddings(), mesh, "data")
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        call, params = layer(name, "linen"), split(params, mesh)
        y = call(params, "__call__", x)
        cache = call(params, "init_cache", batch_size=B, max_length=T)
        cache = split(cache, mesh, *[None] * 4)
        first, cache = call(params, "prefill", x[:, :13], cache)
        step, _ = call(params, "decode_step", x[:, 13:14], cache)
    alone = layer(name, "linen")(nn.unbox(initial(name)), "__call__", embeddings())
    assert_trees_close(jax.device_get(y), jax.device_get(alone), 1e-5)
    together = np.concatenate(jax.device_get((first, step)), axis=1)
    assert_trees_close(together, jax.device_get(alone)[:, :14], 1e-5)


@pytest.mark.parametrize(("sizes", "axes"), [((2, 2), {}), ((2,), AXES)])
def test_what_a_layer_gives_to_the_attention_can_be_traced(sizes, axes):
    mesh, params = make_mesh(*sizes), nn.unbox(initial("nsa"))
    expected = jax.device_get(trace_attention(linen("nsa"), {"params": params}, embeddings()))
    with jax.set_mesh(mesh):
        placed = {"params": split(params, mesh)}
        actual = trace_attention(linen("nsa", **axes), placed, split(embeddings(), mesh, "data"))
    assert actual["attention"].q.sharding.spec[0] == "data"
    assert_trees_close(jax.device_get(actual["attention"][:3]), expected["attention"][:3], 1e-5)


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_layers_are_made_on_a_mesh(flavour):
    mesh = make_mesh(2)
    with jax.set_mesh(mesh):
        x = split(embeddings(), mesh, "data")
        if flavour == "linen":
            params = nn.unbox(jax.jit(linen("full").init)(jax.random.key(1), x))["params"]
            assert_trees_close(jax.device_get(params), jax.device_get(nn.unbox(initial("full"))), 1e-6)
        else:
            assert nsa_jax.nnx.FullAttention(E, rngs=nnx.Rngs(0), **HEADS).q_kernel.shape == (E, 4, 4)


def ops(q, kv, gates, cache, implementation="xla", gradients=True):
    """Results of all public ops, and gradients of those that have some."""
    options = {"config": CONFIG, "implementation": implementation}

    def differentiable(q, kv, gates):
        o_cmp, lse = nsa_jax.compressed_attention(q, kv.cmp_k, kv.cmp_v, **options)
        blocks = nsa_jax.select_blocks(q, kv.cmp_k, lse, **options)
        return (
            (o_cmp, lse),
            nsa_jax.selected_attention(q, kv.slc_k, kv.slc_v, blocks, return_lse=True, **options),
            nsa_jax.window_attention(q, kv.win_k, kv.win_v, **options),
            nsa_jax.nsa_attention(q, kv, gates, **options),
            causal_attention(q, kv.slc_k, kv.slc_v),
            nsa_jax.compress(kv.slc_k, {"position": jnp.zeros((4, q.shape[3]))}, config=CONFIG, method="mean"),
        )

    o, vjp = jax.vjp(differentiable, q, kv, gates) if gradients else (differentiable(q, kv, gates), lambda _: None)
    finite = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), o)
    offsets = jnp.full((q.shape[0],), T - 1, jnp.int32)
    decoded = nsa_jax.decode_attention(q[:, -1:], cache, gates[:, -1:], offsets, **options)
    rotated = apply_rope(q, jnp.arange(T, dtype=jnp.int32)[None], 100.0)
    shorter = nsa_jax.rollback(cache, jnp.arange(B, dtype=jnp.int32) % 2, config=CONFIG)
    moved = put_row(cache, 2, take_row(cache, 1))
    return (finite, rotated), (shorter, moved), vjp(jax.tree.map(jnp.cos, finite)), decoded


def problem(head_dim=4):
    inputs = random_inputs(jax.random.key(3), CONFIG, B=B, T=T, num_heads=4, num_kv_heads=2, head_dim=head_dim)
    cache = nsa_jax.init_nsa_cache(CONFIG, batch_size=B, max_length=T, num_kv_heads=2, head_dim=head_dim)
    keys = iter(jax.random.split(jax.random.key(4), 8))
    filled = {
        name: jax.random.normal(next(keys), x.shape)
        for name, x in cache._asdict().items()
        if name not in ("lengths", "block_tables")
    }
    return (*inputs[:3], cache._replace(**filled))


@pytest.mark.parametrize(
    ("sizes", "gradients"),
    [((2, 2), False), *(pytest.param(sizes, True, marks=pytest.mark.exhaustive) for sizes in ((1,), (2,), (2, 2)))],
)
def test_ops_have_the_numbers_of_one_device(sizes, gradients):
    mesh, (q, kv, gates, cache) = make_mesh(*sizes), problem()
    run = jax.jit(functools.partial(ops, gradients=gradients))
    alone = jax.device_get(run(q, kv, gates, cache))
    axes = ("data", None, *mesh.axis_names[1:])
    with jax.set_mesh(mesh):
        placed = split((q, BranchKV(*kv), gates), mesh, *axes)
        rows = split(cache, mesh, "data")
        actual = run(*placed, rows._replace(**{name: split(getattr(cache, name), mesh) for name in POOLS}))
    assert actual[0][0][3].sharding.spec[0] == "data"
    assert actual[1][1].win_k.sharding.spec[0] == "data"
    assert_trees_close(jax.device_get(actual), alone, 1e-5)
