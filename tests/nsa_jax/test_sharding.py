"""The ops on a mesh of simulated devices: nothing is communicated, and values and gradients are those of one device."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nsa_jax
import nsa_jax.sharding
from nsa_jax import NSAConfig
from nsa_jax.sharding import ARGUMENTS, free_split, sharded
from nsa_jax.testing import assert_trees_close, random_inputs, reference_selection

CONFIG = NSAConfig(
    compress_block=16, compress_stride=8, select_block=16, num_selected=3, num_init=1, num_local=1, window=16
)
SHAPE = {"B": 4, "T": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
BOTH = {"batch_axes": "data", "head_axes": "tensor"}
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)


def make_mesh(kind, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


@functools.cache
def problem(**changes):
    """q, kv and gates; segment ids; a cotangent. NumPy arrays, which belong to no mesh."""
    inputs = random_inputs(jax.random.key(0), CONFIG, **{**SHAPE, "num_segments": 2, **changes})
    cotangent = jax.random.normal(jax.random.key(1), inputs.q.shape)
    return jax.device_get((inputs[:3], inputs.segment_ids, cotangent))


def attend(attention, implementation="xla", **options):
    """Output and gradients from q, kv and gates, segment ids or None, and a cotangent."""

    def run(arrays, segment_ids, cotangent, **traced):
        def forward(*arrays):
            options_ = {"config": CONFIG, "implementation": implementation, **options, **traced}
            return attention(*arrays, segment_ids=segment_ids, **options_)

        o, vjp = jax.vjp(forward, *arrays)
        return o, vjp(cotangent)

    return run


@functools.cache
def expected(segments=True):
    """What the reference gives on one device."""
    arrays, segment_ids, cotangent = problem()
    run = jax.jit(attend(nsa_jax.nsa_attention, "reference"))
    return run(arrays, segment_ids if segments else None, cotangent)


def put(tree, mesh, batch, heads):
    """Arrays [B, T, heads, ..] and [B, T], split as told."""

    def place(x):
        return NamedSharding(mesh, PartitionSpec(*(batch, None, heads, None)[: x.ndim]))

    return jax.tree.map(lambda x: jax.device_put(x, place(x)), tree)


def communication(compiled):
    """The collective operations of a compiled program, each with its result's shape."""
    pattern = r"= (.*?) ((?:all|reduce-scatter|collective|ragged-all)(?:-[a-z]+)*)\("
    return [f"{name} {shape}" for shape, name in re.findall(pattern, compiled.as_text())]


@KINDS
@pytest.mark.parametrize("implementation", ["xla", pytest.param("triton", marks=pytest.mark.exhaustive)])
def test_nothing_is_communicated_forward_or_backward(implementation, kind):
    mesh = make_mesh(kind, data=2, tensor=2)
    attention = sharded(nsa_jax.nsa_attention, **BOTH)
    with jax.set_mesh(mesh):
        arrays, segment_ids, cotangent = put(problem(), mesh, "data", "tensor")
        forward = functools.partial(attention, config=CONFIG, implementation=implementation, segment_ids=segment_ids)
        assert communication(jax.jit(forward).lower(*arrays).compile()) == []
        both = jax.jit(attend(attention, implementation)).lower(arrays, segment_ids, cotangent).compile()
        assert communication(both) == []
        actual = both(arrays, segment_ids, cotangent)
    assert_trees_close(actual, expected(), 1e-5)
    for leaf in jax.tree.leaves(actual):
        assert leaf.addressable_shards[0].data.shape == (
            leaf.shape[0] // 2,
            leaf.shape[1],
            leaf.shape[2] // 2,
            *leaf.shape[3:],
        )


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_bare_ops_communicate_so_that_the_test_above_can_fail(implementation):
    mesh = make_mesh(AxisType.Auto, data=2, tensor=2)
    with jax.set_mesh(mesh):
        arrays, segment_ids, _ = put(problem(), mesh, "data", "tensor")
        forward = functools.partial(
            nsa_jax.nsa_attention, config=CONFIG, implementation=implementation, segment_ids=segment_ids
        )
        assert communication(jax.jit(forward).lower(*arrays).compile()) != []


@KINDS
@pytest.mark.parametrize(
    ("axes", "batch", "heads"),
    [
        pytest.param({"batch_axes": ("data", "fsdp")}, ("data", "fsdp"), None, marks=pytest.mark.exhaustive),
        pytest.param({"head_axes": "tensor"}, None, "tensor", marks=pytest.mark.exhaustive),
        ({"batch_axes": ("data", "fsdp", "elsewhere"), "head_axes": ("tensor",)}, ("data", "fsdp"), "tensor"),
    ],
)
@pytest.mark.parametrize("segments", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_every_choice_of_axes_gives_the_values_and_gradients_of_one_device(axes, batch, heads, segments, kind):
    mesh = make_mesh(kind, data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        arrays, segment_ids, cotangent = put(problem(), mesh, batch, heads)
        run = jax.jit(attend(sharded(nsa_jax.nsa_attention, **axes)))
        arguments = (arrays, segment_ids if segments else None, cotangent)
        compiled = run.lower(*arguments).compile()
        if kind == AxisType.Auto or len(axes) == 2:  # else gradients are averaged over the Explicit axes left out
            assert communication(compiled) == []
        actual = compiled(*arguments)
    assert_trees_close(actual, expected(segments), 1e-5)


@KINDS
def test_too_few_tokens_for_a_compressed_one_give_the_values_and_gradients_of_one_device(kind):
    arguments = problem(T=CONFIG.compress_block - 1)
    alone = jax.jit(attend(nsa_jax.nsa_attention, "reference"))(*arguments)
    mesh = make_mesh(kind, data=2, tensor=2)
    with jax.set_mesh(mesh):
        run = jax.jit(attend(sharded(nsa_jax.nsa_attention, **BOTH)))
        actual = run(*put(arguments, mesh, "data", "tensor"))
    assert_trees_close(actual, alone, 1e-5)


@KINDS
def test_a_traced_offset_in_a_rematerialised_scan(kind):
    """Later queries of two layers, which the backward pass recomputes."""
    arrays, segment_ids, cotangent = problem()
    mesh = make_mesh(kind, data=2, tensor=2)

    def layers(attention, arrays, segment_ids, cotangent, offset):
        def loss(arrays):
            q, kv, gates = arrays

            @jax.checkpoint
            def layer(q, _):
                return q + attention(
                    q, kv, gates, segment_ids=segment_ids, query_offset=offset, config=CONFIG, implementation="xla"
                ), None

            return (jax.lax.scan(layer, q, length=2)[0] * cotangent).sum()

        return jax.grad(loss)(arrays)

    def later(x):
        return x[:, 24:]

    arrays = (later(arrays[0]), arrays[1], later(arrays[2]))
    arguments = (arrays, segment_ids, later(cotangent))
    alone = jax.jit(functools.partial(layers, nsa_jax.nsa_attention))(*arguments, jnp.int32(24))
    with jax.set_mesh(mesh):
        split = jax.jit(functools.partial(layers, sharded(nsa_jax.nsa_attention, **BOTH)))
        placed = (*put(arguments, mesh, "data", "tensor"), jnp.int32(24))
        compiled = split.lower(*placed).compile()
        assert communication(compiled) == []
        actual = compiled(*placed)
    assert_trees_close(actual, alone, 1e-5)


def test_a_mesh_can_be_given_and_a_surrounding_shard_map_is_respected():
    arrays, segment_ids, cotangent = problem()
    mesh = make_mesh(AxisType.Auto, data=2, tensor=2)
    given = jax.jit(attend(sharded(nsa_jax.nsa_attention, mesh=mesh, **BOTH)))
    assert_trees_close(given(arrays, segment_ids, cotangent), expected(), 1e-5)
    rows = PartitionSpec("data")
    inside = jax.shard_map(
        attend(sharded(nsa_jax.nsa_attention, **BOTH)),
        in_specs=rows,
        out_specs=rows,
        axis_names={"data"},
        check_vma=False,
    )
    with jax.set_mesh(mesh):
        placed = put(problem(), mesh, "data", "tensor")
        compiled = jax.jit(inside).lower(*placed).compile()
        assert communication(compiled) == []
        actual = compiled(*placed)
    assert_trees_close(actual, expected(), 1e-5)


def single_op_cases():
    inputs = random_inputs(jax.random.key(0), CONFIG, **SHAPE)
    lse, blocks, _ = jax.device_get(reference_selection(inputs, CONFIG))
    q, kv, *_ = jax.device_get(inputs)
    return {
        nsa_jax.compressed_attention: {"q": q, "k": kv.cmp_k, "v": kv.cmp_v},
        nsa_jax.select_blocks: {"q": q, "k": kv.cmp_k, "lse": lse},
        nsa_jax.selected_attention: {"q": q, "k": kv.slc_k, "v": kv.slc_v, "block_indices": blocks},
        nsa_jax.window_attention: {"q": q, "k": kv.win_k, "v": kv.win_v},
    }


@KINDS
def test_single_ops_are_split_too(kind):
    mesh = make_mesh(kind, data=2, tensor=2)
    split = {"batch": "data", "heads": "tensor", None: None}
    for op, arguments in single_op_cases().items():
        alone = jax.jit(functools.partial(op, config=CONFIG, implementation="xla"))(**arguments)
        with jax.set_mesh(mesh):
            placed = {
                name: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*map(split.get, ARGUMENTS[name]))))
                for name, x in arguments.items()
            }
            run = jax.jit(functools.partial(sharded(op, **BOTH), config=CONFIG, implementation="xla"))
            compiled = run.lower(**placed).compile()
            assert communication(compiled) == []
            assert_trees_close(compiled(**placed), alone, 1e-5)


@pytest.mark.parametrize("mesh", [None, {"elsewhere": 2}, {"data": 1, "tensor": 1, "elsewhere": 2}])
def test_without_devices_to_split_over_it_is_the_op(mesh):
    (q, kv, gates), _, _ = problem()
    attention = functools.partial(sharded(nsa_jax.nsa_attention, **BOTH), config=CONFIG, implementation="xla")
    mesh = None if mesh is None else make_mesh(AxisType.Auto, **mesh)
    with jax.set_mesh(mesh) if mesh else jax.default_device(None):
        assert "shard_map" not in str(jax.make_jaxpr(attention)(q, kv, gates))
    with jax.set_mesh(make_mesh(AxisType.Auto, data=2)):
        assert "shard_map" in str(jax.make_jaxpr(attention)(q, kv, gates))


@KINDS
def test_a_split_keeps_the_axes_of_more_than_one_device_that_the_mesh_has(kind):
    mesh = make_mesh(kind, data=2, fsdp=2, tensor=1)
    split = PartitionSpec("data", None, ("fsdp", "tensor", "elsewhere"), "tensor", "elsewhere")
    free = free_split(split, mesh)
    assert [tuple(axes) if isinstance(axes, tuple) else axes for axes in free] == ["data", None, "fsdp", None, None]
    with jax.set_mesh(mesh):
        assert free_split(split) == free


def test_what_does_not_fit_is_refused_by_name():
    def run(attention=nsa_jax.nsa_attention, changes=None, options=None, **axes):
        (q, kv, gates), segment_ids, _ = problem(**(changes or {}))
        options = {"config": CONFIG, "segment_ids": segment_ids, "implementation": "xla", **(options or {})}
        with jax.set_mesh(make_mesh(AxisType.Auto, data=2, tensor=4)):
            return sharded(attention, **axes)(q, kv, gates, **options)

    with pytest.raises(
        ValueError, match=r"q: float32 \(3, 64, .*batch = 3 .* multiple of 2, .* batch_axes = \('data',\)"
    ):
        run(changes={"B": 3}, batch_axes="data")
    with pytest.raises(ValueError, match=r"kv.cmp_k: .*\(4, 7, 2, 32\).*heads = 2 .* 4, .* head_axes = \('tensor',\)"):
        run(head_axes="tensor")
    with pytest.raises(ValueError, match=r"segment_ids: int32 \(4, 64, 1\): expected 2 axes"):
        run(options={"segment_ids": jnp.zeros((4, 64, 1), jnp.int32)}, batch_axes="data")
    with pytest.raises(ValueError, match=r"query_offset = 1 with 64 queries"):
        run(options={"query_offset": jnp.int32(1)}, batch_axes="data")
    with pytest.raises(
        ValueError, match=r"batch_axes = 'data', head_axes = \('tensor', 'data'\), context_axes = \(\): expected every"
    ):
        run(batch_axes="data", head_axes=("tensor", "data"))
    with pytest.raises(ValueError, match=r"op = .*dot_product_attention.*: expected one of nsa_attention"):
        run(attention=jax.nn.dot_product_attention)


def test_explicit_axes_refuse_arrays_that_would_have_to_move():
    mesh = make_mesh(AxisType.Explicit, data=2, tensor=2)
    attention = functools.partial(sharded(nsa_jax.nsa_attention, **BOTH), config=CONFIG, implementation="xla")
    with jax.set_mesh(mesh):
        arrays, _, _ = put(problem(), mesh, "data", None)
        with pytest.raises(ValueError, match="does not match the specs of the input"):
            jax.jit(attention)(*arrays)


LAYER = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "config": CONFIG}


def test_layers_on_auto_axes_equal_those_of_one_device_with_all_gradients():
    """For Explicit axes, see test_explicit.py."""
    x = jax.random.normal(jax.random.key(2), (4, 64, 24))
    segment_ids = problem()[1]
    cotangent = jax.random.normal(jax.random.key(3), x.shape)
    module = nsa_jax.NSAttention(**LAYER)
    boxed = jax.jit(module.init)(jax.random.key(4), x)
    params = nn.unbox(boxed)["params"]

    def run(apply):
        def loss(params, x, segment_ids, cotangent):
            return (apply(params, x, segment_ids=segment_ids) * cotangent).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    def linen(**axes):
        return lambda params, x, **options: nsa_jax.NSAttention(**LAYER, **axes).apply({"params": params}, x, **options)

    alone = run(linen())(params, x, segment_ids, cotangent)
    mesh = make_mesh(AxisType.Auto, data=2, tensor=2)
    shardings = nn.logical_to_mesh_sharding(
        nn.get_partition_spec(boxed)["params"], mesh, (("heads", "tensor"), ("kv_heads", "tensor"))
    )
    with jax.set_mesh(mesh):
        placed = (jax.device_put(params, shardings), *put((x, segment_ids, cotangent), mesh, "data", None))
        actual = run(linen(**BOTH))(*placed)
    assert_trees_close(actual, alone, 1e-5)
