"""Caches on a mesh of simulated devices: numbers of one device, and nothing of a cache is communicated."""

import dataclasses
import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nsa_jax
from nsa_jax import NSAConfig
from nsa_jax.testing import assert_trees_close

CONFIG = NSAConfig(compress_block=16, compress_stride=8, select_block=16, num_selected=3, num_local=1, window=16)
B, T, E, MAX_LENGTH = 4, 48, 16, 64
HEADS = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 16}
AXES = {"batch_axes": "data", "head_axes": "tensor"}
RULES = (("heads", "tensor"), ("kv_heads", "tensor"))
LAYERS = {
    "nsa": nsa_jax.NSAttention(**HEADS, config=CONFIG),
    "nsa, kernels": nsa_jax.NSAttention(**HEADS, config=CONFIG, implementation="triton"),
    "nsa, the paper's layout": nsa_jax.NSAttention(**HEADS, config=CONFIG, compression="mlp", share_kv=False),
    "nsa, no window": nsa_jax.NSAttention(**HEADS, config=dataclasses.replace(CONFIG, window=0)),
    "nsa, no selection": nsa_jax.NSAttention(**HEADS, config=dataclasses.replace(CONFIG, num_selected=0)),
    "full": nsa_jax.FullAttention(**HEADS),
    "window": nsa_jax.FullAttention(**HEADS, window=10),
}


def calls(layer):
    """A prefill, its next chunk and a step, each as a program."""

    def call(method, **options):
        return jax.jit(functools.partial(layer.apply, method=method, **options))

    return {"prefill": call("prefill"), "chunk": call("prefill", continuing=True), "step": call("decode_step")}


@functools.cache
def problem(name):
    """Parameters with their axes, embeddings, and lengths of the rows' prompts."""
    x = jax.random.normal(jax.random.key(0), (B, T, E))
    boxed = jax.jit(LAYERS[name].init)(jax.random.key(1), x)
    return boxed, np.asarray(x), np.array([20, 17, 20, 5], np.int32)


def pieces(x, counts):
    """What the calls are given: prompts of several lengths, a chunk, and a token."""
    chunk = jnp.stack([x[b, n : n + 9] for b, n in enumerate(counts)])
    token = jnp.stack([x[b, n + 9 : n + 10] for b, n in enumerate(counts)])
    return {"prefill": (x[:, :20], counts), "chunk": (chunk, None), "step": (token, None)}


def run(name, layer, variables, put=lambda x: x):
    """Outputs of the three calls where they count, the cache after them, and the compiled programs."""
    _, x, counts = problem(name)
    cache, outputs, programs = layer.init_cache(batch_size=B, max_length=MAX_LENGTH), {}, {}
    for what, call in calls(layer).items():
        tokens, num_tokens = pieces(x, counts)[what]
        options = {} if num_tokens is None else {"num_tokens": put(num_tokens)}
        program = call.lower(variables, put(tokens), cache, **options).compile()
        y, cache = program(variables, put(tokens), cache, **options)
        outputs[what], programs[what] = jax.device_get(y), program
    first = outputs.pop("prefill")
    outputs |= {f"prompt {b}": first[b, :n] for b, n in enumerate(counts)}
    return outputs, cache, programs


@functools.cache
def alone(name):
    boxed, _, _ = problem(name)
    outputs, cache, _ = run(name, LAYERS[name], nn.unbox(boxed))
    return outputs, jax.device_get(cache)


def on_mesh(name, kind, sizes, devices=None):
    """The same on a mesh, with the layer's axes."""
    boxed, _, _ = problem(name)
    mesh = jax.make_mesh(sizes, ("data", "tensor"), axis_types=(kind,) * 2, devices=devices)
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)

    def put(x):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))

    with jax.set_mesh(mesh):
        return run(name, LAYERS[name].clone(**AXES), jax.device_put(nn.unbox(boxed), shardings), put)


def communicated(program):
    """(operation, number of elements) of the collectives of a compiled program."""
    pattern = r"= (.*?) ((?:all|reduce-scatter|collective|ragged-all)(?:-[a-z]+)*)\("
    found = re.findall(pattern, program.as_text())
    shapes = [(name, re.findall(r"\w+\[([\d,]*)\]", text)) for text, name in found]
    return [(name, max(int(np.prod([int(n) for n in s.split(",") if n])) for s in each)) for name, each in shapes]


SHOWN = {
    ("nsa", (2, 2), AxisType.Explicit),
    ("full", (2, 2), AxisType.Auto),
}
KINDS = (AxisType.Auto, AxisType.Explicit)
SIZES = ((2, 2), (1, 4), (4, 1), (2, 4))


@pytest.mark.parametrize(
    ("name", "sizes", "kind"),
    [
        pytest.param(
            *case, marks=() if case in SHOWN else pytest.mark.exhaustive, id=f"{case[0]}-{case[1]}-{kind.name}"
        )
        for name, sizes, kind in itertools.product(LAYERS, SIZES, KINDS)
        for case in [(name, sizes, kind)]
    ],
)
def test_only_the_sum_over_heads_is_communicated_and_the_numbers_are_those_of_one_device(name, sizes, kind):
    outputs, cache, programs = on_mesh(name, kind, sizes)
    assert_trees_close((outputs, jax.device_get(cache)), alone(name), 1e-5)
    for what, x in cache._asdict().items():
        if x.ndim == 4 and x.size:
            assert x.addressable_shards[0].data.size == x.size // (sizes[0] * sizes[1]), what
    for what, tokens in (("prefill", 20), ("chunk", 9), ("step", 1)):
        found = communicated(programs[what])
        assert {operation for operation, _ in found} <= {"all-reduce"}, what
        assert max((count for _, count in found), default=0) <= B // sizes[0] * tokens * E, what


@pytest.mark.parametrize(("axes", "gathers"), [(AXES, False), ({}, True)])
def test_a_step_of_kernels_gathers_its_cache_unless_it_is_told_the_axes(axes, gathers):
    boxed, x, _ = problem("nsa")
    layer = LAYERS["nsa, kernels"].clone(**axes)
    mesh = jax.make_mesh((1, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    variables = jax.device_put(nn.unbox(boxed), nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES))
    with jax.set_mesh(mesh):
        cache = LAYERS["nsa"].clone(**AXES).init_cache(batch_size=B, max_length=MAX_LENGTH)
        program = calls(layer)["step"].lower(variables, jnp.asarray(x[:, :1]), cache).compile()
    assert ("all-gather" in {operation for operation, _ in communicated(program)}) == gathers


def test_a_row_whose_pages_another_device_holds_is_nan_and_others_are_unharmed():
    layer, (boxed, x, _) = LAYERS["nsa"].clone(**AXES), problem("nsa")
    mesh = jax.make_mesh((2, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        cache = layer.init_cache(batch_size=B, max_length=MAX_LENGTH)
        tables = np.arange(B * 4, dtype=np.int32).reshape(B, 4)
        tables[1, 1] = 15  # of the other part; the row holds 20 tokens, which are two pages
        tables[0, 3] = 14  # not read
        cache = cache._replace(block_tables=jnp.asarray(tables))
        y, after = calls(layer)["prefill"](nn.unbox(boxed), jnp.asarray(x[:, :20]), cache)
    assert np.isnan(y).any(axis=(1, 2)).tolist() == [False, True, False, False]
    assert np.array_equal(after.block_tables, tables)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["nsa, kernels", "nsa, the paper's layout", "full"])
@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (2, 2), (1, 4)])
def test_gpus_have_the_numbers_of_one(name, sizes, kind):
    count = sizes[0] * sizes[1]
    if count > jax.device_count():
        pytest.skip(f"needs {count} GPUs")
    with jax.default_matmul_precision("highest"):  # else float32 is multiplied in TF32
        outputs, cache, programs = on_mesh(name, kind, sizes, jax.devices()[:count])
        assert_trees_close((outputs, jax.device_get(cache)), alone(name), 1e-5)
    for program in programs.values():
        assert {operation.removesuffix("-start") for operation, _ in communicated(program)} <= {"all-reduce"}
