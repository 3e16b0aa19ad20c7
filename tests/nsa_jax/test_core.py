"""The core between somebody's own projections: the numbers of the layer, caches, positions, meshes, refusals."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nsa_jax
import nsa_jax.nnx
from nsa_jax import Branches, NSAConfig, NSACore, next_positions, nsa_attention
from nsa_jax.core import CoreConfig, core_attention_inputs, core_parameters, products
from nsa_jax.layer import NSALayerConfig, project_branches
from nsa_jax.rope import apply_rope
from nsa_jax.testing import assert_trees_close
from nsa_jax.tracing import trace_attention

CONFIG = NSAConfig(4, 2, 8, 3, 1, 1, 10)
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "v_head_dim": 6}
B, T, E, MAX_LENGTH = 2, 30, 16, 32
PAPER = {"compression": "mlp", "share_kv": False}


def turned(x, positions):
    """A rotary embedding that is not ours: of neighbouring pairs, and of half of the numbers only."""
    whole, rest = jnp.split(x, 2, axis=-1)
    angle = positions[:, :, None, None] * jnp.asarray([1.0, 0.1], x.dtype)[None, None, None, :]
    a, b = whole[..., ::2], whole[..., 1::2]
    pairs = jnp.stack([a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], axis=-1)
    return jnp.concatenate([pairs.reshape(whole.shape), rest], axis=-1).astype(x.dtype)


@functools.cache
def problem():
    """x, q, k and v."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (B, T, E), (B, T, 4, 8), (B, T, 2, 8), (B, T, 2, 6)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


@functools.cache
def case(**fields):
    """A core and its parameters, with biases that are not 0."""
    core = NSACore(**HEADS, config=CONFIG, **fields)
    variables = nn.unbox(jax.eval_shape(core.init, jax.random.key(1), *problem()))
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return core, jax.tree.unflatten(
        structure, [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def generated(core, variables, arrays, positions=None, tables=None, step_tokens=2):
    """A prefill of rows of 9 and 5 tokens, a chunk, and steps of two, in the order of the whole sequence."""
    sizes = {} if tables is None else {"block_tables": tables, "num_pages": 40}

    def at(tree, begin, count):
        """For each row, `count` entries from its own position on; beyond the end they are NaN."""

        def take(x):
            filled = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0
            padded = jnp.pad(x, ((0, 0), (0, 20), *((0, 0),) * (x.ndim - 2)), constant_values=filled)
            return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, count))(padded, begin)

        return jax.tree.map(take, tree)

    @jax.jit
    def run(variables, arrays, positions):
        cache = core.init_cache(batch_size=B, max_length=MAX_LENGTH, step_tokens=step_tokens, **sizes)
        y = jnp.full((B, T + 20, 4, 6), jnp.nan)

        def put(y, piece, begin, counts):
            valid = jnp.arange(piece.shape[1])[None, :, None, None] < counts[:, None, None, None]
            row = jax.vmap(lambda y, new, ok, i: jax.lax.dynamic_update_slice_in_dim(
                y, jnp.where(ok, new, jax.lax.dynamic_slice_in_dim(y, i, new.shape[0])), i, axis=0
            ))  # fmt: skip
            return row(y, piece, valid, begin)

        def advance(y, cache, count, counts, method, **options):
            begin = jnp.zeros(B, jnp.int32) if method == "first" else cache.lengths
            given, here = at((arrays, positions), begin, count)
            if positions is not None:
                options["positions"] = here
            name = "decode_step" if method == "decode_step" else "prefill"
            piece, cache = core.apply(variables, *given, cache, num_tokens=counts, method=name, **options)
            return put(y, piece, begin, counts), cache

        y, cache = advance(y, cache, 9, jnp.array([9, 5]), "first")
        y, cache = advance(y, cache, 7, jnp.array([7, 6]), "prefill", continuing=True)

        def step(carry, _):
            y, cache = carry
            return advance(y, cache, 2, jnp.minimum(2, T - cache.lengths), "decode_step"), None

        (y, cache), _ = jax.lax.scan(step, (y, cache), length=10)
        return y[:, :T], cache.lengths

    return run(variables, arrays, positions)


LAYERS = [
    {},
    PAPER,
    pytest.param({**PAPER, "tie_keys": True}, marks=pytest.mark.exhaustive),
    {"compression": "linear", "qk_norm": True},
]


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_a_core_between_the_projections_of_a_layer_is_the_layer(options):
    """Its parameters are those of the layer, under the same names. Linen and NNX have the same numbers."""
    x, *_ = problem()
    fields = {**HEADS, "config": CONFIG, **options}
    layer, config = nsa_jax.NSAttention(**fields), NSALayerConfig(**fields)
    variables = nn.unbox(jax.jit(layer.init)(jax.random.key(1), x))
    fields = {name: value for name, value in fields.items() if name in CoreConfig.__dataclass_fields__}
    fields["rotate"] = functools.partial(apply_rope, theta=10_000.0)
    core, declared = NSACore(**fields), core_parameters(CoreConfig(**fields), E)
    names = [name for name in variables["params"] if name.startswith(("phi_", "gate_"))]
    assert {name: p.shape for name, p in declared.items()} == {name: variables["params"][name].shape for name in names}
    twin = nsa_jax.nnx.NSACore(E, rngs=nnx.Rngs(0), **fields)
    for name in names:
        getattr(twin, name)[...] = variables["params"][name]

    @jax.jit
    def run(variables, x):
        q, k, v = project_branches(products(x, variables["params"], config), variables["params"], config)
        own = {"params": {name: variables["params"][name] for name in names}}
        inputs = core_attention_inputs(own["params"], x, q, k, v, config=CoreConfig(**fields))
        return layer.apply(variables, x), own, (q, k, v), inputs.kv

    y, own, (q, k, v), kv = run(variables, x)
    # Each in a program of its own that is given the parameters: the compiler may fuse two copies differently.
    graph, state = nnx.split(twin)
    o = jax.jit(core.apply)(own, x, q, k, v)
    o_of_twin = jax.jit(lambda state, *arrays: nnx.merge(graph, state)(*arrays))(state, x, q, k, v)
    assert_trees_close(jnp.einsum("bthd,hde->bte", o, variables["params"]["o_kernel"]), y, 1e-6)
    np.testing.assert_array_equal(o, o_of_twin)
    if not options:
        assert_trees_close(trace_attention(twin, None, x, q, k, v)["attention"].kv, kv, 1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"rotate": turned}, marks=pytest.mark.exhaustive),  # see the test of positions, and without them
        {"rotate": turned, "compression": "mlp"},
        {"scale": 0.2, "constant_gates": (0.2, 0.5, 0.3)},
    ],
    ids=["mean", "mlp", "no positions, own scale and gates"],
)
def test_prefill_chunks_and_steps_equal_the_whole_sequence(fields):
    core, variables = case(**fields)
    expected = jax.jit(core.apply)(variables, *problem())
    rng = np.random.default_rng(0)
    tables = jnp.asarray(rng.permutation(40)[: B * 4].reshape(B, 4), jnp.int32)
    y, lengths = generated(core, variables, problem(), tables=tables)
    assert lengths.tolist() == [T, T]
    assert_trees_close(y, expected, 1e-5)


@pytest.mark.parametrize("compression", ["mean", "mlp"])
def test_positions_of_ones_own_hold_in_every_call(compression):
    """Far ones for the second row. Those of a mean may even jump."""
    core, variables = case(rotate=turned, compression=compression)
    positions = jnp.stack([jnp.arange(T), 500 + jnp.arange(T)])
    if compression == "mean":
        positions = positions.at[0, 14:].add(7)
    run = jax.jit(core.apply)
    expected = run(variables, *problem(), positions=positions)
    assert_trees_close(generated(core, variables, problem(), positions)[0], expected, 1e-5)
    assert_trees_close(expected[1], run(variables, *problem())[1], 1e-4)  # all of them by 500 change nothing
    jumped = not np.allclose(expected[0], run(variables, *problem())[0], atol=1e-3)
    assert jumped == (compression == "mean")


def test_queries_and_keys_that_are_rotated_already_are_the_same_with_means_and_not_with_networks():
    x, q, k, v = problem()
    positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    rotated = x, turned(q, positions), turned(k, positions), v
    for compression in ("mean", "mlp"):
        core, variables = case(rotate=turned, compression=compression)
        expected = jax.jit(core.apply)(variables, x, q, k, v)
        actual = jax.jit(core.clone(rotate=None).apply)(variables, *rotated)
        assert np.allclose(actual, expected, atol=1e-5) == (compression == "mean")
    plain, variables = case()

    @jax.jit
    def generate(variables):
        cache = plain.init_cache(batch_size=B, max_length=MAX_LENGTH)
        _, cache = plain.apply(variables, *(a[:, :9] for a in rotated), cache, method="prefill")
        new = (turned(a[:, 9:10], next_positions(cache, 1)) for a in (q, k))
        o, _ = plain.apply(variables, x[:, 9:10], *new, v[:, 9:10], cache, method="decode_step")
        return o, plain.apply(variables, *rotated)[:, 9:10]

    assert_trees_close(*generate(variables), 1e-5)


def test_positions_count_from_the_start_of_each_segment_if_none_are_given():
    core, variables = case(rotate=turned)
    segment_ids = jnp.asarray(np.repeat([[0, 1]], [16, T - 16], axis=1).repeat(B, axis=0))
    y = jax.jit(core.apply)(variables, *problem(), segment_ids=segment_ids)
    alone = jax.jit(core.apply)(variables, *(a[:, 16:] for a in problem()))
    assert_trees_close(y[:, 16:], alone, 1e-5)


def test_constant_gates_have_no_parameters_and_are_those_of_the_op():
    _, q, k, v = problem()
    core = NSACore(**HEADS, config=CONFIG, constant_gates=(0.1, 0.7, 0.2))
    assert jax.tree.leaves(jax.eval_shape(core.init, jax.random.key(0), None, q, k, v)) == []

    @jax.jit
    def run(q, k, v):
        cmp_k, cmp_v = (nsa_jax.compress(a, config=CONFIG) for a in (k, v))
        gates = jnp.broadcast_to(jnp.array([0.1, 0.7, 0.2]), (B, T, 4, 3))
        expected = nsa_attention(q, nsa_jax.BranchKV(cmp_k, cmp_v, k, v, k, v), gates, config=CONFIG)
        return core.apply({}, None, q, k, v), expected

    assert_trees_close(*run(q, k, v), 1e-6)


def test_gradients_of_padded_prefills_do_not_depend_on_what_the_padding_holds():
    core, variables = case(rotate=turned, compression="mlp")
    counts = jnp.array([T, 11])
    cache = core.init_cache(batch_size=B, max_length=MAX_LENGTH)

    @jax.jit
    def gradients(arrays):
        def loss(variables, arrays):
            o, _ = core.apply(variables, *arrays, cache, num_tokens=counts, method="prefill")
            return jnp.where(jnp.arange(T)[None, :, None, None] < counts[:, None, None, None], jnp.sin(o), 0).sum()

        return jax.grad(loss, (0, 1))(variables, arrays)

    def padded(value):
        return tuple(
            jnp.where((jnp.arange(T)[None, :] >= counts[:, None]).reshape(B, T, *(1,) * (a.ndim - 2)), value, a)
            for a in problem()
        )

    assert_trees_close(gradients(padded(jnp.nan)), gradients(padded(0.0)), 1e-6)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(AxisType.Auto, marks=pytest.mark.exhaustive), AxisType.Explicit],
    ids=lambda kind: kind.name,
)
def test_a_core_on_a_mesh_has_the_numbers_of_one_device(kind):
    core, variables = case(rotate=turned, compression="mlp")
    cache = core.init_cache(batch_size=B, max_length=MAX_LENGTH)

    def run(core, variables, arrays, cache):
        whole, pull = jax.vjp(lambda *a: core.apply(*a), variables, *arrays)
        o, cache = core.apply(variables, *(a[:, : T - 1] for a in arrays), cache, method="prefill")
        last, cache = core.apply(variables, *(a[:, T - 1 :] for a in arrays), cache, method="decode_step")
        return whole, pull(jnp.ones_like(whole)), o, last, cache

    expected = jax.jit(functools.partial(run, core))(variables, problem(), cache)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(kind,) * 2)
    axes = {"batch_axes": "data", "head_axes": "tensor"} if kind == AxisType.Auto else {}
    with jax.set_mesh(mesh):
        heads = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
        x, *rest = (jax.device_put(np.asarray(a), heads) for a in problem()[1:])
        arrays = jax.device_put(np.asarray(problem()[0]), NamedSharding(mesh, PartitionSpec("data"))), x, *rest
        whole = NamedSharding(mesh, PartitionSpec())
        given = jax.device_put(jax.device_get((variables, cache)), whole)
        call = functools.partial(run, core.clone(**axes))
        assert "shard_map" in str(
            jax.make_jaxpr(core.clone(**axes).apply)(given[0], *arrays)
        )  # on Explicit axes by itself
        actual = jax.jit(call)(given[0], arrays, given[1])
        assert actual[0].sharding.spec[:3] == ("data", None, "tensor")
    assert_trees_close(jax.device_get(actual), jax.device_get(expected), 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.ones((B, T, 3, 8))}, r"q: float32 \(2, 30, 3, 8\): expected a float array .* \(any, any, 4, 8\)"),
        ({"k": jnp.ones((B, T, 2, 6))}, r"k: float32 \(2, 30, 2, 6\): expected .* \(2, 30, 2, 8\)"),
        ({"v": jnp.ones((B, T, 2, 6), jnp.int32)}, r"v: int32 .*: expected a float array"),
        ({"v": Branches(*[jnp.ones((B, T, 2, 6))] * 2, jnp.ones((B, 3, 2, 6)))}, r"v.win: float32 \(2, 3, 2, 6\)"),
        ({"x": jnp.ones((B, 3, E))}, r"x: float32 \(2, 3, 16\): expected batch and tokens \(2, 30\), as q"),
        ({"x": None}, r"x\b.*: expected"),
        ({"positions": jnp.ones((1, T), jnp.int32)}, r"positions: int32 \(1, 30\): expected integers"),
        ({"positions": jnp.ones((B, T))}, r"positions: float32 .*: expected integers"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    given = {**dict(zip("xqkv", problem(), strict=True)), **change}
    with pytest.raises(ValueError, match=message):
        NSACore(**HEADS, config=CONFIG).init(jax.random.key(0), **given)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rotate": 3}, "rotate = 3: expected a function"),
        ({"constant_gates": 0.5}, "constant_gates = 0.5: expected three numbers"),
        ({"constant_gates": (1, 2)}, r"constant_gates = \(1, 2\): expected three numbers"),
        ({"scale": "small"}, "scale = 'small': expected a finite number"),
        ({"precision": "some"}, "precision = 'some': expected a precision"),
        ({"rope_theta": 3.0}, "rope_theta"),
    ],
)
def test_impossible_fields_are_refused_by_name(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        NSACore(**HEADS, **fields).init_cache(batch_size=1, max_length=8)
    with pytest.raises((ValueError, TypeError), match=message):
        nsa_jax.nnx.NSACore(E, rngs=nnx.Rngs(0), **HEADS, **fields)
