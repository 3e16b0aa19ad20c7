"""Caches in 8 bits: what is read of them, and attention and generation over them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nsa_jax
import nsa_jax.nnx
from nsa_jax import NSAConfig, cache_bytes, decode_attention, init_nsa_cache, next_positions, rollback
from nsa_jax.cache import POOLS, put_row, take_row, write_nsa_tokens
from nsa_jax.quantization import dequantize, quantize
from nsa_jax.testing import assert_trees_close, normwise_error, random_inputs, tolerance_of
from pallas_kernels.quantized import MOST, Quantized

CONFIG = NSAConfig(8, 4, 16, 4, 1, 2, 20)
T, E = 90, 32
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "v_head_dim": 16}
SIZES = {"batch_size": 3, "max_length": 96, "kv_dtype": "int8"}
# The output of a layer over a cache in 8 bits, against the layer without a cache: 1.3e-3 to 6.7e-3 were measured.
NEAR = 1e-2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_what_is_read_is_within_half_a_factor_of_what_was_written(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        x = jax.random.normal(jax.random.key(0), (50, 3, 40), dtype)
        x = x.at[:, 0, :2].multiply(30).at[:, 1].multiply(1e-6)
        held = jax.jit(quantize)(x)
        assert (held.values.dtype, held.scale.dtype) == (jnp.int8, jnp.promote_types(dtype, jnp.float32))
        assert held.shape == x.shape == (*held.scale.shape[:-1], 40)
        np.testing.assert_array_equal(np.abs(np.int32(held.values)).max(axis=-1), MOST)
        error, scale = np.abs(np.float64(dequantize(held)) - np.float64(x)), np.float64(held.scale)
        assert (error <= scale * 0.50001).all()
        assert error.max() > scale.min() * 0.4
        np.testing.assert_allclose(dequantize(quantize(dequantize(held))), dequantize(held), rtol=1e-6)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_head_that_is_not_finite_is_read_as_such_and_zeros_as_zeros(value):
    x = jax.random.normal(jax.random.key(0), (4, 2, 16)).at[1, 0, 3].set(value).at[2].set(0)
    read = np.asarray(dequantize(jax.jit(quantize)(x)))
    assert not np.isfinite(read[1, 0]).any()
    np.testing.assert_array_equal(read[2], 0)
    assert np.isfinite(np.delete(read.reshape(8, 16), 2, axis=0)).all()


def poisoned(cache):
    """The cache with NaN in all of its places, by the factors of what is held in 8 bits."""
    return jax.tree.map(lambda a: jnp.full_like(a, jnp.nan) if jnp.issubdtype(a.dtype, jnp.floating) else a, cache)


def as_read(cache):
    """A cache that holds in full what is read of one in 8 bits."""
    dtype = cache.win_k.dtype
    return cache._replace(**{name: dequantize(getattr(cache, name)).astype(dtype) for name in POOLS})


def exhaustive(*values):
    return pytest.param(*values, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("implementation", "m"),
    [("xla", 3), ("triton", 3), *map(exhaustive, ("reference", "reference", "xla", "triton"), (1, 3, 1, 1))],
)
def test_decode_attention_is_that_over_what_is_read_and_near_that_over_an_exact_cache(implementation, m):
    sizes = {"num_kv_heads": 2, "head_dim": 32, "v_head_dim": 16}
    inputs = random_inputs(jax.random.key(1), CONFIG, T=T, num_heads=4, **sizes)
    lengths = jnp.array([m, 8, 33, T], jnp.int32)
    tables = jax.random.permutation(jax.random.key(2), 30)[:24].reshape(4, 6).astype(jnp.int32)
    rows = jax.tree.map(lambda a: jnp.broadcast_to(a, (4, *a.shape[1:])), inputs.kv)

    def filled(kv_dtype):
        cache = init_nsa_cache(
            CONFIG, batch_size=4, max_length=T, num_pages=30, block_tables=tables, step_tokens=m, kv_dtype=kv_dtype,
            **sizes,
        )  # fmt: skip
        return write_nsa_tokens(poisoned(cache), rows[2:4], rows[:2], rows[2:4], rows[4:], lengths, config=CONFIG)

    at = (lengths - m)[:, None] + jnp.arange(m)[None, :]
    held, exact = jax.jit(functools.partial(filled, "int8"))(), jax.jit(functools.partial(filled, None))()

    def attend(cache, implementation):
        run = functools.partial(decode_attention, config=CONFIG, implementation=implementation)
        return jax.jit(run)(inputs.q[0, at], cache, inputs.gates[0, at], lengths - m)

    (o, blocks), (read, same_blocks) = attend(held, implementation), attend(as_read(held), "reference")
    assert_trees_close(o, read, 1e-5)
    np.testing.assert_array_equal(blocks, same_blocks)
    whole, exact_blocks = attend(exact, "reference")
    same = np.all(np.asarray(blocks) == exact_blocks, axis=(1, 3))  # [B, m]
    assert same.sum() >= 3 * m
    assert 1e-4 < normwise_error(o[same], whole[same]) < NEAR


@pytest.mark.exhaustive
def test_decode_attention_in_16_bits_is_that_over_what_is_read():
    sizes = {"num_kv_heads": 2, "head_dim": 32}
    inputs = random_inputs(jax.random.key(1), CONFIG, T=64, num_heads=4, **sizes, dtype=jnp.bfloat16)
    cache = init_nsa_cache(CONFIG, batch_size=1, max_length=64, kv_dtype=jnp.int8, dtype=jnp.bfloat16, **sizes)
    kv, length = inputs.kv, jnp.array([64])  # all blocks are selected, whatever is rounded
    cache = write_nsa_tokens(cache, kv[2:4], kv[:2], kv[2:4], kv[4:], length, config=CONFIG)
    q, wide = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, (inputs.q, cache))

    def attend(q, cache, implementation):
        run = functools.partial(decode_attention, config=CONFIG, implementation=implementation)
        return jax.jit(run)(q[:, -1:], cache, inputs.gates[:, -1:], length - 1)[0]

    expected = attend(q, as_read(wide), "reference")
    for implementation in ("reference", "xla", "triton"):
        o = attend(inputs.q, cache, implementation)
        assert o.dtype == jnp.bfloat16
        assert normwise_error(o.astype(jnp.float32), expected) < tolerance_of(jnp.bfloat16), implementation


@functools.cache
def case(**fields):
    """A layer, its parameters, three rows of input, and the layer's output."""
    layer = nsa_jax.NSAttention(**HEADS, config=CONFIG, **fields)
    x = jax.random.normal(jax.random.key(0), (3, T, E))
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(1), x))
    return layer, params, x, jax.jit(layer.apply)(params, x)


def calls(layer, params):
    """The layer's prefill, its next chunk and its step, compiled."""
    options = ({"method": "prefill"}, {"method": "prefill", "continuing": True}, {"method": "decode_step"})
    return [jax.jit(functools.partial(layer.apply, params, **each)) for each in options]


@pytest.mark.parametrize("fields", [{}, exhaustive({"compression": "mlp", "share_kv": False})])
def test_ragged_prefill_chunks_and_steps_are_near_the_whole_forward_pass(fields):
    layer, params, x, y = case(**fields)
    prefill, chunk, step = calls(layer, params)
    cache = poisoned(layer.init_cache(**SIZES))
    lengths = [0, 0, 0]
    for run, most, counts in (
        (prefill, 40, [40, 17, 3]),
        (chunk, 20, [20, 1, 20]),
        *((step, 1, [1, 1, int(i % 2)]) for i in range(8)),
    ):
        tokens = jnp.stack(
            [jnp.zeros((most, E)).at[:n].set(row[i : i + n]) for i, n, row in zip(lengths, counts, x, strict=True)]
        )
        out, cache = run(tokens, cache, num_tokens=jnp.array(counts))
        for b, count in enumerate(counts):
            if count:
                wanted = y[b, lengths[b] : lengths[b] + count]
                # A prefill attends to keys and values as they are.
                assert normwise_error(out[b, :count], wanted) < (1e-5 if run is prefill else NEAR), (lengths, b)
            lengths[b] += count
    assert isinstance(cache.slc_k, Quantized)
    assert cache.lengths.tolist() == lengths


def test_drafts_that_are_taken_back_and_other_rows_leave_no_trace():
    layer, params, x, _ = case()
    prefill, _, step = calls(layer, params)
    cache = layer.init_cache(**SIZES, step_tokens=3)
    _, cache = prefill(x[:, :40], poisoned(cache), num_tokens=jnp.array([40, 31, 9]))
    drafts = jnp.full((3, 3, E), jnp.nan).at[0].set(x[0, 40:43])
    _, tried = step(drafts, cache)
    tried = rollback(tried, jnp.array([2, 3, 3]), config=CONFIG)
    _, plain = step(x[:, 40:43], cache, num_tokens=jnp.array([1, 0, 0]))
    assert tried.lengths.tolist() == [41, 31, 9]
    tokens = jnp.stack([x[0, 41:42], x[1, 31:32], x[2, 9:10]])
    after = [step(tokens, each)[0] for each in (tried, plain)]
    np.testing.assert_array_equal(*after)
    # A row by itself is what it is among others.
    _, one = step(tokens[1:2], take_row(plain, 1))
    together = put_row(plain, 1, one)
    assert_trees_close(step(tokens, together)[0][0], after[1][0], 1e-6)


@pytest.mark.parametrize("implementation", ["triton", exhaustive("reference")])
def test_steps_of_every_implementation_write_and_read_alike(implementation):
    layer, params, x, _ = case()
    prefill, _, _ = calls(layer, params)
    _, cache = prefill(x[:, :40], layer.init_cache(**SIZES, step_tokens=2), num_tokens=jnp.array([40, 31, 7]))

    def steps(implementation):
        now, outputs = cache, []
        joined = {"params": layer.join_projections(params["params"])}
        _, _, step = calls(layer.clone(implementation=implementation), joined)
        for begin in (40, 42):
            out, now = step(x[:, begin : begin + 2], now)
            outputs.append(out)
        return outputs, now

    (outputs, actual), (wanted, expected) = steps(implementation), steps("xla")
    assert_trees_close(outputs, wanted, 1e-5)
    # What is rounded to 8 bits may go to the other neighbour where it lies between two.
    assert all(np.abs(np.int32(actual[i].values) - np.int32(expected[i].values)).max() <= 1 for i in range(4))
    assert_trees_close(as_read(actual), as_read(expected), 1e-3)
    assert_trees_close(actual[4:], expected[4:], 1e-5)


def test_a_core_and_nnx_take_caches_in_8_bits():
    core = nsa_jax.NSACore(**HEADS, config=CONFIG, constant_gates=(0.3, 0.3, 0.4))
    sizes = (4, 32), (2, 32), (2, 16)
    q, k, v = (jax.random.normal(jax.random.key(i), (3, 50, *size)) for i, size in enumerate(sizes))

    @jax.jit
    def run(q, k, v):
        cache = core.init_cache(**SIZES)
        _, cache = core.apply({}, None, q[:, :49], k[:, :49], v[:, :49], cache, method="prefill")
        return *core.apply({}, None, q[:, 49:], k[:, 49:], v[:, 49:], cache, method="decode_step"), core.apply(
            {}, None, q, k, v
        )

    o, cache, whole = run(q, k, v)
    assert next_positions(cache, 1).tolist() == [[50]] * 3
    assert 1e-5 < normwise_error(o, whole[:, 49:]) < NEAR
    twin = nsa_jax.nnx.NSAttention(E, **HEADS, config=CONFIG, rngs=nnx.Rngs(0))
    shapes = jax.eval_shape(functools.partial(twin.init_cache, **SIZES))
    step = jax.eval_shape(twin.decode_step, jax.ShapeDtypeStruct((3, 1, E), jnp.float32), shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), step[1]) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)


def test_pages_take_a_little_more_than_half_the_bytes_of_16_bits():
    K, D = 4, 128
    sizes = {"batch_size": 2, "max_length": 4096, "num_kv_heads": K, "head_dim": D, "dtype": jnp.bfloat16}

    def total(kv_dtype):
        make = functools.partial(init_nsa_cache, NSAConfig(), **sizes, kv_dtype=kv_dtype)
        return cache_bytes(jax.eval_shape(make))

    of_pages = 2 * 4096 * 17 // 16  # tokens, and compressed ones
    assert total(None) - total("int8") == of_pages * K * 2 * (2 * D - (D + 4))
    assert K * 2 * (D + 4) * 17 / 16 == 1122  # bytes per token, as the docstring says


@pytest.mark.parametrize("value", ["int4", "fp8", jnp.float16, "int16", 8, "nonsense", "uint8"])
def test_other_dtypes_are_refused_by_name(value):
    layer, *_ = case()
    with pytest.raises(ValueError, match=r"kv_dtype = .*: expected int8, or None"):
        layer.init_cache(batch_size=1, max_length=8, kv_dtype=value)


def test_full_attention_and_caches_that_do_not_fit_are_refused_by_name():
    full = nsa_jax.FullAttention(num_heads=4, num_kv_heads=2, head_dim=8)
    assert full.init_cache(batch_size=1, max_length=8, kv_dtype=None).k.dtype == jnp.float32
    with pytest.raises(ValueError, match="kv_dtype = 'int8': expected None, as full attention"):
        full.init_cache(batch_size=1, max_length=8, kv_dtype="int8")
    layer, *_ = case()
    cache = layer.init_cache(**SIZES)
    cache = cache._replace(slc_v=cache.slc_v._replace(scale=cache.slc_v.scale[..., 0]))
    with pytest.raises(ValueError, match=r"cache.slc_v: int8 \(18, 2, 16, 16\): expected"):
        decode_attention(jnp.ones((3, 1, 4, 32)), cache, jnp.ones((3, 1, 4, 3)), cache.lengths, config=CONFIG)


@pytest.mark.parametrize("axes", [exhaustive({}), {"batch_axes": ("data",), "head_axes": ("heads",)}])
def test_caches_in_8_bits_are_split_over_devices(axes):
    layer, params, x, _ = case()
    x = jnp.concatenate([x, x[:1]])
    sizes = {**SIZES, "batch_size": 4}

    @jax.jit
    def run(params, x, cache):
        split = layer.clone(**axes)
        _, cache = split.apply(params, x[:, :40], cache, method="prefill")
        y, cache = split.apply(params, x[:, 40:41], cache, method="decode_step")
        return y, cache

    expected = run(params, x, layer.init_cache(**sizes))
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        cache = layer.clone(**axes).init_cache(**sizes)
        placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
        y, cache = run(params, placed, cache)
    for array in cache.slc_k if axes else ():
        assert array.sharding.spec[1] in ("heads", ("heads",))
    assert_trees_close(jax.device_get(y), jax.device_get(expected[0]), 1e-5)
    assert_trees_close(jax.device_get(as_read(cache)), jax.device_get(as_read(expected[1])), 1e-3)
