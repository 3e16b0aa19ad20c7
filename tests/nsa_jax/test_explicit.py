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

import nsa_jax
import nsa_jax.nnx
from nsa_jax import BranchKV, NSAConfig, num_blocks
from nsa_jax.dense import causal_attention
from nsa_jax.testing import assert_trees_close, random_inputs

CONFIG = NSAConfig(4, 2, 8, 3, 1, 1, 10)
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
B, T, E = 4, 32, 8
FIELDS = {
    "nsa": ("NSAttention", {"config": CONFIG, "compression": "mean"}),
    "nsa, mlp": ("NSAttention", {"config": CONFIG, "qk_norm": True}),
    "full": ("FullAttention", {}),
    "window": ("FullAttention", {"window": 9}),
}
AXES = {"batch_axes": "data", "head_axes": "tensor"}
RULES = (("heads", "tensor"), ("kv_heads", "tensor"))


def make_mesh(*sizes):
    names = ("data", "tensor")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Explicit,) * len(sizes))


def split(tree, mesh, *axes):
    """A tree on a mesh, with its leading dimensions split over the axes."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes[: x.ndim]))), tree)


def embeddings(seed=0):
    return jax.random.normal(jax.random.key(seed), (B, T, E))


def segments():
    return jnp.asarray(np.repeat([[7, 2]], T // 2, axis=1).repeat(B, axis=0), jnp.int32)


@functools.cache
def initial(name):
    kind, fields = FIELDS[name]
    return jax.jit(getattr(nsa_jax, kind)(**HEADS, **fields).init)(jax.random.key(1), embeddings())


def layer(name, flavour, **axes):
    """call(parameters, method, *arguments) of a Linen or an NNX layer."""
    kind, fields = FIELDS[name]
    if flavour == "linen":
        module = getattr(nsa_jax, kind)(**HEADS, **fields, **axes)
        return lambda params, method, *args, **options: (
            module.init_cache(*args, **options)
            if method == "init_cache"
            else module.apply({"params": params}, *args, method=method, **options)
        )

    def call(params, method, *args, **options):
        module = getattr(nsa_jax.nnx, kind)(E, rngs=nnx.Rngs(0), **HEADS, **fields, **axes)
        for key, value in params.items():
            setattr(module, key, nnx.Param(value, eager_sharding=False))
        return getattr(module, method)(*args, **options)

    return call


def everything(call, pages=None):
    """The output with segments and all gradients, and a prefill, its next chunk and steps in a loop over a cache."""

    def run(params, x, segment_ids, cotangent):
        y, vjp = jax.vjp(lambda *a: call(a[0], "__call__", a[1], segment_ids=segment_ids), params, x)
        cache = call(params, "init_cache", batch_size=B, max_length=40, **(pages or {}))
        first, cache = call(params, "prefill", x[:, :13], cache)
        second, cache = call(params, "prefill", x[:, 13:26], cache, continuing=True)

        def step(cache, token):
            y, cache = call(params, "decode_step", token[:, None], cache)
            return cache, y

        cache, steps = jax.lax.scan(step, cache, jnp.moveaxis(x[:, 26:], 1, 0))
        return y, vjp(cotangent), (first, second, steps), cache

    return run


@functools.cache
def expected(name, paged=False):
    params = nn.unbox(initial(name))["params"]
    run = jax.jit(everything(layer(name, "linen"), page_tables() if paged else None))
    return jax.device_get(run(params, embeddings(), segments(), embeddings(2)))


def page_tables():
    N = num_blocks(40, CONFIG)
    tables = np.random.default_rng(0).permutation(B * N + 3)[: B * N].reshape(B, N)
    return {"num_pages": B * N + 3, "block_tables": tables}


@pytest.mark.parametrize(
    ("name", "flavour", "sizes", "axes", "paged", "context"),
    [
        ("nsa", "linen", (2, 2), {}, True, True),
        ("full", "nnx", (2,), {}, False, True),
        *(
            pytest.param(name, flavour, sizes, axes, paged, context, marks=pytest.mark.exhaustive)
            for name in FIELDS
            for flavour, sizes, axes, paged, context in (
                ("linen", (1,), {}, False, True),
                ("linen", (2,), {}, False, False),
                ("nnx", (2, 2), AXES, name.startswith("nsa"), True),
                ("linen", (4, 1), {"batch_axes": "data"}, False, True),
                ("nnx", (1, 2), {}, False, False),
            )
        ),
    ],
)
def test_layers_and_their_caches_have_the_numbers_of_one_device(name, flavour, sizes, axes, paged, context):
    mesh, boxed = make_mesh(*sizes), initial(name)
    rules = RULES[: 2 * (len(sizes) - 1)]
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed)["params"], mesh, rules)
    placed = (
        jax.device_put(nn.unbox(boxed)["params"], shardings),
        *split((embeddings(), segments(), embeddings(2)), mesh, "data"),
    )
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        actual = jax.jit(everything(layer(name, flavour, **axes), page_tables() if paged else None))(*placed)
    y, (gradients, _), *_ = actual
    assert y.sharding.spec[0] == "data"
    for key, gradient in gradients.items():
        assert jax.typeof(gradient).sharding.spec == jax.typeof(placed[0][key]).sharding.spec, key
    assert_trees_close(jax.device_get(actual), expected(name, paged), 1e-5)


def test_without_axes_a_layer_finds_them_and_communicates_nothing_but_the_sum_over_heads():
    mesh, boxed = make_mesh(2, 2), initial("nsa")
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed)["params"], mesh, RULES)
    placed = (jax.device_put(nn.unbox(boxed)["params"], shardings), split(embeddings(), mesh, "data"))
    with jax.set_mesh(mesh):
        run = jax.jit(lambda params, x: layer("nsa", "linen")(params, "__call__", x))
        text = run.lower(*placed).compile().as_text()
    moved = re.findall(r" ((?:all|reduce-scatter|collective)(?:-[a-z]+)*)\(", text)
    assert set(moved) == {"all-reduce"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("name", FIELDS)
def test_layers_run_outside_jit(name, context):
    mesh, params = make_mesh(2), nn.unbox(initial(name))["params"]
    x = split(embeddings(), mesh, "data")
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        call, params = layer(name, "linen"), split(params, mesh)
        y = call(params, "__call__", x)
        cache = call(params, "init_cache", batch_size=B, max_length=T)
        cache = split(cache, mesh, *[None] * 4)
        first, cache = call(params, "prefill", x[:, :13], cache)
        step, _ = call(params, "decode_step", x[:, 13:14], cache)
    alone = layer(name, "linen")(nn.unbox(initial(name))["params"], "__call__", embeddings())
    assert_trees_close(jax.device_get(y), jax.device_get(alone), 1e-5)
    together = np.concatenate(jax.device_get((first, step)), axis=1)
    assert_trees_close(together, jax.device_get(alone)[:, :14], 1e-5)


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_layers_are_made_on_a_mesh(flavour):
    mesh = make_mesh(2)
    with jax.set_mesh(mesh):
        x = split(embeddings(), mesh, "data")
        if flavour == "linen":
            kind, fields = FIELDS["full"]
            params = nn.unbox(jax.jit(getattr(nsa_jax, kind)(**HEADS, **fields).init)(jax.random.key(1), x))["params"]
            assert_trees_close(jax.device_get(params), jax.device_get(nn.unbox(initial("full"))["params"]), 1e-6)
        else:
            assert nsa_jax.nnx.FullAttention(E, rngs=nnx.Rngs(0), **HEADS).q_kernel.shape == (E, 4, 4)


def ops(q, kv, gates, cache, implementation="xla"):
    """Results of all public ops, and gradients of those that have some."""
    options = {"config": CONFIG, "implementation": implementation}

    def differentiable(q, kv, gates):
        o_cmp, lse = nsa_jax.compressed_attention(q, kv.cmp_k, kv.cmp_v, **options)
        blocks = nsa_jax.select_blocks(q, kv.cmp_k, lse, **options)
        return (
            (o_cmp, lse),
            nsa_jax.selected_attention(q, kv.slc_k, kv.slc_v, blocks, **options),
            nsa_jax.window_attention(q, kv.win_k, kv.win_v, **options),
            nsa_jax.nsa_attention(q, kv, gates, **options),
            causal_attention(q, kv.slc_k, kv.slc_v),
            nsa_jax.compress(kv.slc_k, {"position": jnp.zeros((4, q.shape[3]))}, config=CONFIG, method="mean"),
        )

    o, vjp = jax.vjp(differentiable, q, kv, gates)
    finite = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), o)
    offsets = jnp.full((q.shape[0],), T - 1, jnp.int32)
    decoded = nsa_jax.decode_attention(q[:, -1:], cache, gates[:, -1:], offsets, **options)
    return finite, vjp(jax.tree.map(jnp.cos, finite)), decoded


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
    "sizes", [(2, 2), *(pytest.param(sizes, marks=pytest.mark.exhaustive) for sizes in ((1,), (2,)))]
)
def test_ops_have_the_numbers_of_one_device(sizes):
    mesh, (q, kv, gates, cache) = make_mesh(*sizes), problem()
    alone = jax.device_get(jax.jit(ops)(q, kv, gates, cache))
    axes = ("data", None, *mesh.axis_names[1:])
    with jax.set_mesh(mesh):
        placed = split((q, BranchKV(*kv), gates), mesh, *axes)
        actual = jax.jit(ops)(*placed, split(cache, mesh, None))
    assert actual[0][3].sharding.spec[0] == "data"
    assert_trees_close(jax.device_get(actual), alone, 1e-5)
