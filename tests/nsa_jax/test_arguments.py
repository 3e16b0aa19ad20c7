"""What people pass: array-likes and scalars of any library work, everything wrong is refused by its name."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from whole_layers import segments

import nsa_jax
import nsa_jax.nnx
from nsa_jax import BranchKV, NSAConfig, RopeScaling, num_compressed
from nsa_jax.cache import put_row, take_row
from nsa_jax.compression import phi_shapes
from nsa_jax.context import from_zigzag, received_bytes, to_zigzag, zigzag_order
from nsa_jax.dense import causal_attention
from nsa_jax.layer import LayerConfig, NSALayerConfig
from nsa_jax.rope import apply_rope, rope_frequencies
from nsa_jax.selection import selection_recall
from nsa_jax.sharding import sharded
from nsa_jax.testing import random_inputs

CONFIG = NSAConfig(4, 2, 8, 3, 1, 1, 10)
B, T, H, K, D = 1, 12, 2, 1, 4
SIZES = {"num_kv_heads": K, "head_dim": D}
INPUTS = random_inputs(jax.random.key(0), CONFIG, B=B, T=T, num_heads=H, **SIZES)
PHI = {"position": np.zeros((4, D), np.float32), "in_kernel": np.zeros((4, D, D), np.float32)}
TEXT = "text"


@functools.cache
def calls():
    """Every public function of arrays, with arguments that fit."""
    q, kv, gates, *_ = INPUTS
    options = {"config": CONFIG, "segment_ids": segments(1)[:, :T], "query_offset": 0, "scale": 0.5}
    lse = jax.random.normal(jax.random.key(1), (B, H, T))
    blocks = jnp.zeros((B, K, T, 3), jnp.int32).at[..., 1:].set(-1)
    cache = nsa_jax.init_nsa_cache(CONFIG, batch_size=B, max_length=T, **SIZES)
    decode = {"q": q[:, :1], "cache": cache, "gates": gates[:, :1], "query_offsets": jnp.zeros((B,), jnp.int32)}
    return {
        nsa_jax.nsa_attention: {"q": q, "kv": kv, "gates": gates, **options},
        nsa_jax.compressed_attention: {"q": q, "k": kv.cmp_k, "v": kv.cmp_v, **options},
        nsa_jax.select_blocks: {"q": q, "k": kv.cmp_k, "lse": lse, **options},
        nsa_jax.selected_attention: {"q": q, "k": kv.slc_k, "v": kv.slc_v, "block_indices": blocks, **options},
        nsa_jax.window_attention: {"q": q, "k": kv.win_k, "v": kv.win_v, **options},
        nsa_jax.decode_attention: {**decode, "config": CONFIG, "scale": 0.5},
        causal_attention: {"q": q, "k": kv.slc_k, "v": kv.slc_v, "window": 3, "segment_ids": options["segment_ids"]},
        nsa_jax.compress: {"x": kv.slc_k, "parameters": PHI, "config": CONFIG, "method": "linear"},
        apply_rope: {"x": kv.slc_k, "positions": jnp.arange(T, dtype=jnp.int32)[None], "theta": 100.0},
    }


def as_lists(x):
    return np.asarray(x).tolist()


def as_other_integers(x):
    """A NumPy array, of another integer dtype if it has one."""
    x = np.asarray(x)
    return x.astype(np.int16) if x.dtype == np.int32 else x


def converted(arguments, convert):
    """The arguments, with arrays converted and numbers as NumPy scalars."""

    def change(x):
        if isinstance(x, NSAConfig | str | nsa_jax.NSACache):
            return x
        if isinstance(x, dict):
            return {name: convert(value) for name, value in x.items()}
        if isinstance(x, tuple):
            return type(x)(*map(convert, x))
        if isinstance(x, int | float):
            return np.float32(x) if isinstance(x, float) else np.int64(x)
        return convert(x)

    return {name: change(x) for name, x in arguments.items()}


@pytest.mark.parametrize("convert", [as_lists, as_other_integers])
@pytest.mark.parametrize("op", calls(), ids=lambda op: op.__name__)
def test_array_likes_and_numpy_scalars_are_taken(op, convert):
    arguments = calls()[op]
    run = jax.jit(lambda: (op(**arguments), op(**converted(arguments, convert))))
    for expected, actual in zip(*map(jax.tree.leaves, run()), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    "offset", [3, np.int64(3), np.array(3, np.uint8), jnp.uint8(3), jnp.int32(3)], ids=lambda x: str(type(x))
)
def test_offsets_of_every_integer_type_are_positions(offset):
    arguments = {**calls()[nsa_jax.window_attention], "q": INPUTS.q[:, 3:]}
    whole = jax.jit(lambda: nsa_jax.window_attention(**calls()[nsa_jax.window_attention]))()
    traced = jax.jit(lambda offset: nsa_jax.window_attention(**{**arguments, "query_offset": offset}))
    np.testing.assert_allclose(traced(offset), whole[:, 3:], atol=1e-6)
    known = jax.jit(lambda: nsa_jax.window_attention(**{**arguments, "query_offset": offset}))
    np.testing.assert_allclose(known(), whole[:, 3:], atol=1e-6)


@pytest.mark.parametrize("op", [nsa_jax.nsa_attention, causal_attention])
@pytest.mark.parametrize("dtype", ["int8", "uint32", pytest.param("int16", marks=pytest.mark.exhaustive)])
def test_segments_are_runs_of_any_integer_dtype(op, dtype):
    """Ids need not ascend, and one may come back, as padding with id 0 does."""
    arguments = {**calls()[op], "window": None} if op is causal_attention else calls()[op]
    runs = {ids: np.repeat(ids, T // 3)[None].astype(dtype) for ids in ((0, 1, 2), (5, 1, 5), (1, 2, 0))}
    run = jax.jit(lambda ids: op(**{**arguments, "segment_ids": ids}))
    expected, *others = [run(ids) for ids in runs.values()]
    for other in others:
        np.testing.assert_array_equal(other, expected)


WRONG_ARRAYS = [TEXT, None, object(), np.zeros(2, np.float32), np.zeros((B, T, H, D), np.int32), [[1.0], [1.0, 2.0]]]
WRONG = {
    **dict.fromkeys(("q", "k", "v", "gates", "x"), WRONG_ARRAYS),
    "lse": [*WRONG_ARRAYS, np.zeros((B, H, T), np.float16)],
    "block_indices": [*WRONG_ARRAYS, np.zeros((B, K, T, 3), np.float32), np.zeros((B, K, T, 0), np.int32)],
    "query_offsets": [TEXT, None, 1.5, np.zeros((B, 1), np.int32), np.zeros(B, np.float32)],
    "positions": [TEXT, None, np.zeros((B, T), np.float32), np.zeros((B, T + 1), np.int32)],
    "kv": [TEXT, None, (1, 2, 3, 4, 5, 6), BranchKV(*[TEXT] * 6), BranchKV(*[np.zeros(2, np.float32)] * 6)],
    "cache": [TEXT, None, (1, 2), nsa_jax.init_dense_cache(batch_size=B, max_length=T, **SIZES)],
    "parameters": [TEXT, None, {}, {"position": TEXT}, {"position": np.zeros((4, D + 1))}],
    "segment_ids": [TEXT, 1, np.zeros((B, T), np.float32), np.zeros((B, T), bool), np.zeros((B, T + 9), np.int32)],
    "query_offset": [
        TEXT,
        None,
        1.5,
        True,
        [0, 1],
        np.float32(0),
        np.zeros(1, np.int32),
        jnp.zeros(1, np.int32),
        -1,
        T,
    ],
    "scale": [TEXT, float("nan"), float("inf"), [1.0, 2.0], True, np.zeros(2)],
    "theta": [TEXT, None, 0.0, -1.0, float("inf")],
    "config": [TEXT, None, (4, 2), {"window": 3}],
    "window": [TEXT, 0, -1, 1.5, True, [1, 2]],
    "method": [TEXT, None, 3],
    "implementation": [TEXT, 3, ("xla",)],
}


@pytest.mark.parametrize("op", calls(), ids=lambda op: op.__name__)
def test_every_wrong_argument_of_an_op_is_refused_by_name(op):
    arguments = calls()[op]
    for name in (*arguments, *(["implementation"] if "scale" in arguments else [])):
        for value in WRONG[name]:
            with pytest.raises(ValueError, match=rf"^{name}\b.*: expected ") as caught:
                op(**{**arguments, name: value})
            assert len(str(caught.value)) < 400


# Axes whose size an op takes from this array alone, or within bounds: fewer queries, more tokens than are compressed.
FREE = {
    nsa_jax.compressed_attention: {("q", 1), ("q", 2), ("v", 3), ("segment_ids", 1)},
    nsa_jax.select_blocks: {("k", 2), ("segment_ids", 1)},
    nsa_jax.selected_attention: {("q", 2), ("v", 3), ("block_indices", 3)},
    nsa_jax.window_attention: {("q", 1), ("q", 2), ("v", 3)},
    nsa_jax.decode_attention: {("cache.block_tables", 1), *((f"cache.tail_{x}", i) for x in "kv" for i in range(4))},
    causal_attention: {("q", 2), ("v", 3)},
    nsa_jax.compress: {("x", 0), ("x", 1), ("x", 2)},
    apply_rope: {("x", 0), ("x", 2)},
}


def resized(arguments, free):
    """The arguments, with one array after the other one entry shorter or longer along each axis."""
    for name, argument in arguments.items():
        parts = argument._asdict() if hasattr(argument, "_asdict") else argument
        for part, x in parts.items() if isinstance(parts, dict) else [("", argument)]:
            whole = f"{name}.{part}" if part else name
            for axis in range(np.ndim(x)):
                for size in (np.shape(x)[axis] - 1, np.shape(x)[axis] + 1) if (whole, axis) not in free else ():
                    changed = jnp.take(jnp.asarray(x), jnp.arange(size) % np.shape(x)[axis], axis)
                    if part:
                        replaced = {**parts, part: changed}
                        changed = type(argument)(**replaced) if hasattr(argument, "_asdict") else replaced
                    yield whole, {**arguments, name: changed}


@pytest.mark.parametrize("op", calls(), ids=lambda op: op.__name__)
def test_arrays_of_sizes_that_do_not_fit_together_are_refused_by_name(op):
    def answer(arguments):
        try:
            return str(jax.eval_shape(functools.partial(op, **arguments)))
        except ValueError as error:
            return str(error)

    answers = [(name, answer(arguments)) for name, arguments in resized(calls()[op], FREE.get(op, ()))]
    named = re.compile(r"[\w.\[\]']+( =|:| has) .*(: expected | needs )")
    assert answers
    assert [pair for pair in answers if not named.match(pair[1])] == []


@pytest.mark.parametrize("method", ["linear", "mlp"])
def test_parameters_of_phi_of_another_shape_are_refused_by_name(method):
    shapes = phi_shapes(method, D, 3, CONFIG)
    arguments = {"x": INPUTS.kv.slc_k, "parameters": {name: jnp.zeros(shape) for name, shape in shapes.items()}}
    compress = functools.partial(nsa_jax.compress, config=CONFIG, method=method)
    assert jax.eval_shape(functools.partial(compress, **arguments)).shape == (B, num_compressed(T, CONFIG), K, D)
    for name, changed in resized(arguments, FREE[nsa_jax.compress] | {("x", 3)}):
        with pytest.raises(ValueError, match=r"^parameters\['\w+'\]: float32 .*: expected shape") as error:
            compress(**changed)
        # The width of an mlp is that of its bias, so that the others do not fit one that is wrong.
        assert name.removeprefix("parameters.") in str(error.value) or name == "parameters.in_bias"


SIZE = [0, -1, 1.5, "8", True, np.float32(3), np.array([1, 2]), np.bool_(True)]
FIELDS = {
    **{name: [*SIZE, None] for name in ("num_heads", "num_kv_heads", "head_dim")},
    **{name: SIZE for name in ("v_head_dim", "compression_hidden_dim", "gate_hidden_dim")},
    **{name: [TEXT, float("nan"), [1, 2]] for name in ("rope_theta", "output_init_scale")},
    "rope_scaling": [TEXT, None, 2.0],
    "config": [TEXT, None],
    "compression": [TEXT, None],
    "dtype": [TEXT, "int32", object()],
    **{name: [3, None, (1, 2)] for name in ("batch_axes", "head_axes", "context_axes")},
}
HEADS = {"num_heads": H, **SIZES}


def test_every_wrong_field_of_a_layer_is_refused_by_name():
    x = jnp.zeros((B, T, 8))
    for name, values in FIELDS.items():
        for value in values:
            fields = {**HEADS, name: value}
            message = rf"^{name} = .*: expected "
            with pytest.raises(ValueError, match=message):
                NSALayerConfig(**fields)
            with pytest.raises(ValueError, match=message):
                nsa_jax.NSAttention(**fields).init(jax.random.key(0), x)
            with pytest.raises(ValueError, match=message):
                nsa_jax.nnx.NSAttention(8, rngs=nnx.Rngs(0), **fields)
            if name in LayerConfig.__dataclass_fields__:
                with pytest.raises(ValueError, match=message):
                    nsa_jax.FullAttention(**fields).init_cache(batch_size=1, max_length=2)
    for value in SIZE:
        with pytest.raises(ValueError, match=r"^window = .*: expected an integer of at least 1"):
            nsa_jax.nnx.FullAttention(8, rngs=nnx.Rngs(0), **HEADS, window=value)
        with pytest.raises(ValueError, match=r"^window = .*: expected an integer of at least 1"):
            nsa_jax.FullAttention(**HEADS, window=value).init(jax.random.key(0), x)
        with pytest.raises(ValueError, match=r"^embed_dim = .*: expected an integer of at least 1"):
            nsa_jax.nnx.NSAttention(value, rngs=nnx.Rngs(0), **HEADS)


INTEGERS = [np.int64, np.uint8, jnp.int32, np.array]


@pytest.mark.parametrize("integer", INTEGERS)
def test_sizes_of_every_integer_type_are_python_ints(integer):
    assert NSAConfig(window=integer(7)) == NSAConfig(window=7)
    assert hash(NSAConfig(window=integer(7))) == hash(NSAConfig(window=7))
    assert type(NSAConfig(window=integer(7)).window) is int
    assert RopeScaling("yarn", integer(4), integer(32)) == RopeScaling("yarn", 4.0, 32)
    fields = {"num_heads": integer(4), "num_kv_heads": integer(2), "head_dim": integer(8), "v_head_dim": integer(6)}
    plain = {name: int(value) for name, value in fields.items()}
    assert NSALayerConfig(**fields, gate_hidden_dim=integer(3)) == NSALayerConfig(**plain, gate_hidden_dim=3)
    x = jnp.zeros((1, 3, 8))
    for kind in (nsa_jax.NSAttention, functools.partial(nsa_jax.FullAttention, window=integer(3))):
        got, wanted = (jax.eval_shape(kind(**f).init, jax.random.key(0), x) for f in (fields, plain))
        assert jax.tree.leaves(got) == jax.tree.leaves(wanted)
    sizes = {"batch_size": integer(2), "max_length": integer(20)}
    for kind, more in ((nsa_jax.NSAttention, {"step_tokens": integer(2)}), (nsa_jax.FullAttention, {})):
        cache = kind(**fields).init_cache(**sizes, **more)
        assert nsa_jax.cache_bytes(cache) == nsa_jax.cache_bytes(
            kind(**plain).init_cache(batch_size=2, max_length=20, **{n: int(v) for n, v in more.items()})
        )
    assert nsa_jax.num_compressed(integer(100), NSAConfig()) == 5
    assert nsa_jax.num_blocks(integer(100), NSAConfig()) == 2
    assert zigzag_order(integer(8), integer(2)).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert to_zigzag([[0, 1, 2, 3]], integer(1)).tolist() == from_zigzag([[0, 1, 2, 3]], integer(1)).tolist()


def test_wrong_sizes_and_counts_are_refused_by_name():
    caches = {
        nsa_jax.init_nsa_cache: {"config": CONFIG, "batch_size": 2, "max_length": 16, "step_tokens": 1, **SIZES},
        nsa_jax.init_dense_cache: {"batch_size": 2, "max_length": 16, **SIZES},
    }
    for make, sizes in caches.items():
        for name in sizes:
            for value in [TEXT] if name == "config" else SIZE:
                with pytest.raises(ValueError, match=rf"^{name} = .*: expected "):
                    make(**{**sizes, name: value})
        with pytest.raises(ValueError, match=r"^dtype = 'int8': expected a floating dtype"):
            make(**sizes, dtype="int8")
    sizes = caches[nsa_jax.init_nsa_cache]
    for value in (TEXT, [[0, 1]], np.zeros((2, 2), np.float32), [[0, 1], [2, 9]]):
        with pytest.raises(ValueError, match=r"^block_tables\b.*: expected "):
            nsa_jax.init_nsa_cache(**sizes, block_tables=value)
    cache = nsa_jax.init_nsa_cache(**sizes)
    for value in (TEXT, 1.5, [1, 2, 3], [-1, 0], None):
        with pytest.raises(ValueError, match=r"^num_rejected\b.*: expected "):
            nsa_jax.rollback(cache, value, config=CONFIG)
    for row in (TEXT, -1, 2, 1.5, np.int64(2)):
        for call in (functools.partial(take_row, cache), lambda row: put_row(cache, row, take_row(cache, 0))):
            with pytest.raises(ValueError, match=r"^row\b.*: expected "):
                call(row)
    for name, value in (("factor", TEXT), ("factor", 0), ("beta_slow", None), ("original_length", 0), ("kind", 3)):
        with pytest.raises(ValueError, match=rf"^RopeScaling\.{name} = .*: expected "):
            RopeScaling(**{"kind": "linear", "factor": 2, name: value})
    for value in (-1, 1, 1.5, TEXT, None):
        with pytest.raises(ValueError, match=r"^NSAConfig\.select_in_window = .*: expected True or False"):
            NSAConfig(select_in_window=value)
    for field in NSAConfig.__dataclass_fields__.keys() - {"select_in_window"}:
        for value in (-1, 1.5, TEXT, True, None):
            with pytest.raises(ValueError, match=rf"^NSAConfig\.{field} = .*: expected an integer"):
                NSAConfig(**{field: value})
    for arguments in ((1.5, CONFIG), (-1, CONFIG), (TEXT, CONFIG), (3, TEXT)):
        for function in (nsa_jax.num_compressed, nsa_jax.num_blocks):
            with pytest.raises(ValueError, match=r"^(T|config) = .*: expected "):
                function(*arguments)
    for T_, devices in ((7, 1), (8, 0), (8, TEXT), (TEXT, 2)):
        with pytest.raises(ValueError, match=r"^(T|devices) = .*: expected "):
            zigzag_order(T_, devices)
    for arguments in ((0, 1e4), (3, 1e4), (4, TEXT), (4, 0), (4, 1e4, None)):
        with pytest.raises(ValueError, match=r"^(head_dim|theta|scaling) = "):
            rope_frequencies(*arguments, *([RopeScaling()] if len(arguments) == 2 else []))
    for axes in (3, None, (1,)):
        with pytest.raises(ValueError, match=r"^head_axes = .*: expected the name of a mesh axis"):
            sharded(nsa_jax.nsa_attention, head_axes=axes)
    with pytest.raises(ValueError, match=r"^inputs = str: expected"):
        selection_recall(TEXT, CONFIG, [1])
    with pytest.raises(ValueError, match=r"^positions\b.*: expected"):
        selection_recall(INPUTS, CONFIG, [1.5])
    sizes = {"num_heads": H, "num_kv_heads": K, "head_dim": D, "v_head_dim": D, "itemsize": 2}
    assert received_bytes("nsa", CONFIG, T=np.int64(32), devices=np.int64(2), **sizes) > 0
    with pytest.raises(ValueError, match=r"^kind = 'text': expected one of nsa, full, window"):
        received_bytes(TEXT, CONFIG, T=32, devices=2, **sizes)


@pytest.mark.parametrize("kind", [nsa_jax.NSAttention, nsa_jax.FullAttention])
def test_wrong_inputs_of_a_layer_are_refused_by_name(kind):
    module = kind(**HEADS, **({"config": CONFIG} if kind is nsa_jax.NSAttention else {}))
    x = np.zeros((B, T, 8), np.float32)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    cache = module.init_cache(batch_size=B, max_length=T)
    for value in (TEXT, 1, np.zeros((2, 8)), x.astype(np.int32), x[:, :0]):
        for method, more in (("__call__", ()), ("prefill", (cache,)), ("decode_step", (cache,))):
            with pytest.raises(ValueError, match=r"^x\b.*: expected "):
                module.apply(variables, value, *more, method=method)
    for value in WRONG["segment_ids"]:
        with pytest.raises(ValueError, match=r"^segment_ids\b.*: expected "):
            module.apply(variables, x, segment_ids=value)
    for method in ("prefill", "decode_step"):
        for value in (TEXT, 1.5, [1, 2], -1, [2 * T], np.zeros(B, bool)):
            with pytest.raises(ValueError, match=r"^num_tokens\b.*: expected "):
                module.apply(variables, x[:, :1], cache, num_tokens=value, method=method)
        for value in (TEXT, None, (1, 2), cache._replace(lengths=TEXT), cache._replace(lengths=[1.5])):
            with pytest.raises(ValueError, match=r"^cache\b.*: expected "):
                module.apply(variables, x[:, :1], value, method=method)
    step = functools.partial(module.apply, method="decode_step")
    expected = jax.jit(step)(variables, x[:, :1], cache)
    tables = {"block_tables": as_lists(cache.block_tables)} if kind is nsa_jax.NSAttention else {}
    lists = cache._replace(lengths=[0], **tables)
    actual = jax.jit(lambda: step(variables, as_lists(x[:, :1]), lists, num_tokens=[1]))()
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
        assert a.dtype == b.dtype


def test_a_batch_of_zero_gives_zero_rows_and_no_tokens_or_heads_are_refused():
    for implementation in ("reference", "xla"):
        options = {"config": CONFIG, "implementation": implementation}
        none = jax.tree.map(lambda x: x[:0], INPUTS[:3])
        run = jax.jit(jax.value_and_grad(lambda a, options=options: nsa_jax.nsa_attention(*a, **options).sum()))
        value, gradients = run(none)
        assert value == 0
        assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, none)
    layer = nsa_jax.NSAttention(**HEADS, config=CONFIG)
    assert jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.zeros((0, T, 8)))[0].shape == (0, T, 8)
    q, kv, _, *_ = INPUTS
    for name, changes in (
        ("q", {"q": q[:, :0]}),
        ("q", {"q": q[:, :, :0]}),
        ("k", {"q": q[..., :0], "k": kv.win_k[..., :0]}),
        ("k", {"k": kv.win_k[:, :, :0], "v": kv.win_v[:, :, :0]}),
    ):
        with pytest.raises(ValueError, match=r"^(q|k|v): .*: expected at least one") as caught:
            nsa_jax.window_attention(**{"q": q, "k": kv.win_k, "v": kv.win_v, "config": CONFIG, **changes})
        assert str(caught.value)[0] in (name, "q")
    no_values = functools.partial(nsa_jax.window_attention, q, kv.win_k, kv.win_v[..., :0], config=CONFIG)
    assert jax.eval_shape(no_values).shape == (B, T, H, 0)
    with pytest.raises(NotImplementedError, match=r"triton.*q.shape = \(0, 12, 2, 4\): expected a batch"):
        nsa_jax.window_attention(q[:0], kv.win_k[:0], kv.win_v[:0], config=CONFIG, implementation="triton")
    assert nsa_jax.compress(kv.slc_k[:, :0], config=CONFIG).shape == (B, 0, K, D)


@pytest.mark.parametrize("kind", [nsa_jax.nnx.NSAttention, nsa_jax.nnx.FullAttention])
def test_parameters_that_others_add_to_a_module_are_left_alone(kind):
    x = jax.random.normal(jax.random.key(0), (B, T, 8))
    module = kind(8, rngs=nnx.Rngs(0), **HEADS)
    expected = nnx.jit(lambda m: m(x))(module)
    module.q_kernel_lora_a = nnx.LoRAParam(jnp.ones((8, 2)))
    module.adapter = nnx.Param(jnp.ones(3))
    np.testing.assert_array_equal(nnx.jit(lambda m: m(x))(module), expected)
    cache = module.init_cache(batch_size=B, max_length=T)
    assert jax.eval_shape(module.prefill, x, cache)[0].shape == x.shape


def test_missing_parameters_and_those_of_another_width_are_refused_by_name():
    from nsa_jax.layer import full_layer

    config, x = LayerConfig(**HEADS), jnp.zeros((B, T, 8))
    module = nsa_jax.FullAttention(**HEADS)
    shapes = nsa_jax.linen.nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x))["params"]
    parameters = jax.tree.map(lambda p: jnp.zeros(p.shape), shapes)
    with pytest.raises(ValueError, match=r"^parameters: v_kernel is missing: expected q_kernel, o_kernel, "):
        full_layer({n: p for n, p in parameters.items() if n != "v_kernel"}, x, config=config)
    with pytest.raises(ValueError, match=re.escape("q_kernel: shape (8, 2, 4): expected (6, 2, 4) for x: float32")):
        full_layer(parameters, x[..., :6], config=config)


@pytest.mark.parametrize("method", ["prefill", "decode_step"])
@pytest.mark.parametrize("kind", [nsa_jax.NSAttention, nsa_jax.FullAttention])
def test_whichever_method_is_called_first_declares_the_same_parameters(kind, method):
    module, x = kind(**HEADS), jnp.ones((B, 1, 8))
    cache = module.init_cache(batch_size=B, max_length=T)
    expected = jax.eval_shape(module.init, jax.random.key(0), x)
    actual = jax.eval_shape(functools.partial(module.init, method=method), jax.random.key(0), x, cache)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert jax.tree.leaves(actual) == jax.tree.leaves(expected)
    with pytest.raises(Exception, match="q_kernel"):  # Flax names the parameter and the collection
        module.apply({}, x, cache, method=method)


@pytest.mark.parametrize("name", [pytest.param("NSAttention", marks=pytest.mark.exhaustive), "FullAttention"])
def test_flax_bridges_take_the_layers_of_the_other_kind(name):
    x = jnp.ones((B, 3, 8))
    linen = getattr(nsa_jax, name)(**HEADS)
    as_nnx = nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(x)
    parameters = {key: value for key, value in vars(as_nnx).items() if isinstance(value, nnx.Param)}
    boxed = jax.eval_shape(linen.init, jax.random.key(0), x)["params"]
    assert {key: p.get_metadata("out_sharding") for key, p in parameters.items()} == {
        key: box.names for key, box in boxed.items()
    }
    values = {"params": {key: value[...] for key, value in parameters.items()}}
    np.testing.assert_allclose(as_nnx(x), linen.apply(values, x), atol=1e-6)
    as_linen = nnx.bridge.ToLinen(getattr(nsa_jax.nnx, name), args=(8,), kwargs=HEADS)
    assert as_linen.init_with_output(jax.random.key(0), x)[0].shape == x.shape
