"""Caches, prefill and decode steps against the forward pass of the whole sequence."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import equations

import nsa_jax
import nsa_jax.nnx
from nsa_jax import NSACache, NSAConfig, cache_bytes, decode_attention, init_nsa_cache, num_blocks, rollback
from nsa_jax.cache import POOLS, _write_ring, put_row, take_row, write_nsa_tokens
from nsa_jax.one_row import Norm, rms_norm
from nsa_jax.quantization import dequantize
from nsa_jax.testing import assert_trees_close, normwise_error, random_inputs, tolerance_of

CONFIG = NSAConfig(
    compress_block=4, compress_stride=2, select_block=8, num_selected=4, num_init=1, num_local=2, window=10
)
T, E = 70, 16
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
LAYERS = {
    "nsa": nsa_jax.NSAttention(**HEADS, config=CONFIG),
    "nsa, the paper's layout": nsa_jax.NSAttention(**HEADS, config=CONFIG, compression="mlp", share_kv=False),
    "nsa, reference, linear phi, Dv 5": nsa_jax.NSAttention(
        **HEADS, v_head_dim=5, config=CONFIG, compression="linear", implementation="reference"
    ),
    "nsa, no positions": nsa_jax.NSAttention(**HEADS, config=CONFIG, rope_theta=None),
    "nsa, tied keys, normalised": nsa_jax.NSAttention(
        **HEADS, config=CONFIG, compression="mlp", share_kv=False, tie_keys=True, qk_norm=True
    ),
    "nsa, blocks that do not overlap": nsa_jax.NSAttention(**HEADS, config=NSAConfig(4, 4, 4, 3, 1, 1, 7)),
    "nsa, no window": nsa_jax.NSAttention(**HEADS, config=dataclasses.replace(CONFIG, window=0)),
    "nsa, no selection": nsa_jax.NSAttention(**HEADS, config=dataclasses.replace(CONFIG, num_selected=0)),
    "full": nsa_jax.FullAttention(**HEADS),
    "full, normalised": nsa_jax.FullAttention(**HEADS, qk_norm=True),
    "window": nsa_jax.FullAttention(**HEADS, window=10),
}
PROMPTS = np.array([1, 3, 4, 7, 8, 9, 10, 33], np.int32)  # one row each: around l, s and w


@functools.cache
def case(name, dtype=jnp.float32):
    """A layer, its parameters, the same sequence for every row, and the layer's output for it."""
    layer = LAYERS[name].clone(dtype=dtype)
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, T, E), dtype), (len(PROMPTS), T, E))
    variables = jax.jit(layer.init)(jax.random.key(1), x)
    return layer, variables, x, jax.jit(layer.apply)(variables, x)


def next_tokens(x, lengths, count):
    """Tokens lengths .. lengths + count - 1 of each row, and how many of them there are."""
    at = lengths[:, None] + jnp.arange(count)[None, :]
    return jnp.take_along_axis(x, jnp.minimum(at, T - 1)[..., None], axis=1), jnp.clip(T - lengths, 0, count)


def beside_nan(tokens, counts):
    """The first tokens of each row, as many as count, and NaN in place of the others."""
    return jnp.where((jnp.arange(tokens.shape[1])[None, :] < counts[:, None])[..., None], tokens, jnp.nan)


def poisoned(cache):
    """The cache with NaN in all of its places, as after a request that went wrong."""
    return jax.tree.map(lambda a: jnp.full_like(a, jnp.nan) if jnp.issubdtype(a.dtype, jnp.floating) else a, cache)


def written(y, pieces, starts, counts):
    """Lays pieces [steps, B, m, E] out at the positions where they start; fails where one position has none."""
    out = np.full(y.shape, np.nan, np.float32)
    for piece, start, count in zip(*map(np.asarray, (pieces.astype(jnp.float32), starts, counts)), strict=True):
        for b in range(out.shape[0]):
            out[b, start[b] : start[b] + count[b]] = piece[b, : count[b]]
    return out


# By others of these layers, by chunked prefills, and by test_core.py.
SHOWN_BY_OTHERS = ("nsa, no positions", "nsa, blocks that do not overlap", "full, normalised")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(
            pytest.param(name, jnp.float32, marks=[pytest.mark.exhaustive] * (name in SHOWN_BY_OTHERS))
            for name in LAYERS
        ),
        ("nsa", jnp.bfloat16),
    ],
)
def test_ragged_prefill_and_decoding_equal_the_whole_forward_pass_at_every_position(name, dtype):
    layer, variables, x, y = case(name, dtype)
    cache = poisoned(layer.init_cache(batch_size=len(PROMPTS), max_length=T, dtype=dtype))

    @jax.jit
    def generate(variables, x, cache):
        prompts = beside_nan(x[:, :40], jnp.asarray(PROMPTS))
        first, cache = layer.apply(variables, prompts, cache, num_tokens=jnp.asarray(PROMPTS), method="prefill")

        def step(cache, _):
            tokens, count = next_tokens(x, cache.lengths, 1)
            tokens = beside_nan(tokens, count)
            piece, new = layer.apply(variables, tokens, cache, num_tokens=count, method="decode_step")
            return new, (piece, cache.lengths, count)

        cache, steps = jax.lax.scan(step, cache, length=T - 1)
        return first, steps, cache

    first, (pieces, starts, counts), cache = generate(variables, x, cache)
    assert jnp.isfinite(first).all()
    assert jnp.isfinite(pieces).all()
    actual = written(y, pieces, starts, counts)
    for b, prompt in enumerate(PROMPTS):
        actual[b, :prompt] = np.asarray(first[b, :prompt].astype(jnp.float32))
    assert (cache.lengths == T).all()
    assert_trees_close(jnp.asarray(actual), y.astype(jnp.float32), 1e-5 if dtype == jnp.float32 else 1e-2)


JOINED = LAYERS | {
    "nsa, biases, Dv 5": nsa_jax.NSAttention(**HEADS, v_head_dim=5, config=CONFIG, use_bias=True),
    "nsa, constant gates": nsa_jax.NSAttention(**HEADS, config=CONFIG, constant_gates=(0.2, 0.5, 0.3)),
    "full, biases": nsa_jax.FullAttention(**HEADS, qkv_bias=True),
}
# Between them every projection there is, with each number of parts, and every option that a projection has.
EVERY_PROJECTION = (
    "nsa, the paper's layout",
    "nsa, tied keys, normalised",
    "nsa, biases, Dv 5",
    "nsa, constant gates",
    "full, biases",
    "window",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name not in EVERY_PROJECTION)) for name in JOINED]
)
def test_joined_projections_are_one_product_and_change_nothing(name):
    layer, x = JOINED[name], jax.random.normal(jax.random.key(0), (3, 24, E))
    params = jax.jit(layer.init)(jax.random.key(1), x)["params"]
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), params)

    def run(params):
        cache = layer.init_cache(batch_size=3, max_length=32)
        counts = jnp.array([9, 3, 7])
        first, cache = layer.apply({"params": params}, x[:, :9], cache, num_tokens=counts, method="prefill")
        options = {"continuing": True, "method": "prefill"}
        second, cache = layer.apply({"params": params}, x[:, 9:14], cache, **options)
        third, cache = layer.apply({"params": params}, x[:, 14:15], cache, method="decode_step")
        return (first[1:2, :3], second, third), cache

    joined = layer.join_projections(params)
    assert_trees_close(jax.jit(run)(joined), jax.jit(run)(params), 1e-5)

    def products_of_a_step(params):
        step = functools.partial(layer.apply, method="decode_step")
        cache = layer.init_cache(batch_size=3, max_length=32)
        found = equations(jax.make_jaxpr(step)({"params": params}, x[:, :1], cache))
        return sum(each.primitive.name == "dot_general" and each.invars[0].aval.shape == (3, 1, E) for each in found)

    assert products_of_a_step(joined) == 1
    assert products_of_a_step(params) >= 3
    with pytest.raises(ValueError, match="q_kernel is missing"):
        layer.join_projections(joined)


@pytest.mark.parametrize(
    ("kind", "joins", "use_bias"),
    [
        (nsa_jax.NSAttention, True, False),
        (nsa_jax.NSAttention, False, True),
        (nsa_jax.FullAttention, True, True),
        (nsa_jax.FullAttention, False, False),
    ],
)
def test_a_step_with_a_norm_is_a_residual_block(kind, joins, use_bias):
    layer, x = kind(**HEADS, use_bias=use_bias), jax.random.normal(jax.random.key(0), (2, 3, E))
    params = jax.jit(layer.init)(jax.random.key(1), x)["params"]
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), params)
    params = layer.join_projections(params) if joins else params
    norm = Norm(jax.random.normal(jax.random.key(3), (E,)), 1e-2)

    @jax.jit
    def steps(params, x, cache, counts):
        step = functools.partial(layer.apply, {"params": params}, cache=cache, num_tokens=counts, method="decode_step")
        return step(x, norm=norm), step(rms_norm(x, norm))

    cache, counts = layer.init_cache(batch_size=2, max_length=16), jnp.array([1, 0])
    (y, after), (expected, plain) = steps(params, x[:, :1], cache, counts)
    assert_trees_close((y[:1], after), ((x[:, :1] + expected)[:1], plain), 1e-6)


@pytest.mark.parametrize("share_kv", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_a_step_of_kernels_takes_joined_projections_as_they_are(share_kv):
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "v_head_dim": 16}
    layer = nsa_jax.NSAttention(**heads, config=CONFIG, share_kv=share_kv)
    x = jax.random.normal(jax.random.key(0), (2, 14, E))
    params = jax.jit(layer.init)(jax.random.key(1), x)["params"]

    def run(params, implementation):
        step = functools.partial(layer.clone(implementation=implementation).apply, method="decode_step")
        cache = layer.init_cache(batch_size=2, max_length=16, step_tokens=3)
        outputs = []
        for begin, end, counts in ((0, 3, [3, 1]), (3, 4, [1, 0]), (4, 7, [2, 3])):
            options = {"num_tokens": jnp.array(counts)}
            y, cache = jax.jit(step)({"params": params}, x[:, begin:end], cache, **options)
            outputs += [y[b, :count] for b, count in enumerate(counts)]
        return outputs, cache

    joined = layer.join_projections(params)
    (outputs, cache), (expected, plain) = run(joined, "triton"), run(params, "xla")
    assert_trees_close(outputs, expected, 1e-5)
    assert_trees_close(cache, plain, 1e-5)


def steps_in_a_loop(implementation, dtype, *, joins, T, steps, max_length, kv_dtype=None):
    """Outputs of steps after a prompt of T tokens, one step after the other in one program, and the cache."""
    heads = {"num_heads": 16, "num_kv_heads": 2, "head_dim": 64}
    layer = nsa_jax.NSAttention(**heads, dtype=dtype, implementation=implementation)
    x = jax.random.normal(jax.random.key(0), (2, T + steps, 128), dtype)
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(1), x[:, :1])["params"])
    variables = {"params": layer.join_projections(params) if joins else params}

    @functools.partial(jax.jit, donate_argnums=1)
    def run(variables, cache):
        def step(cache, token):
            y, cache = layer.apply(variables, token[:, None], cache, method="decode_step")
            return cache, y

        return jax.lax.scan(step, cache, jnp.moveaxis(x[:, T:], 1, 0))

    prefill = functools.partial(layer.clone(implementation="xla").apply, method="prefill")
    counts = jnp.array([T, T - 5])
    cache = layer.init_cache(batch_size=2, max_length=max_length, kv_dtype=kv_dtype)
    _, cache = jax.jit(prefill)({"params": params}, x[:, :T], cache, num_tokens=counts)
    cache, outputs = run(variables, cache)
    return outputs, cache


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_steps_of_kernels_in_a_loop_on_a_gpu_are_those_of_xla(dtype):
    sizes = {"T": 900, "steps": 70, "max_length": 1024}  # so that all blocks are selected, whatever is rounded
    with jax.default_matmul_precision("highest"):  # else float32 is multiplied in TF32
        actual = steps_in_a_loop("triton", dtype, joins=True, **sizes)
        expected = steps_in_a_loop("xla", dtype, joins=False, **sizes)
    assert_trees_close(actual[0], expected[0], tolerance_of(dtype))
    assert_trees_close(actual[1], expected[1], tolerance_of(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_steps_over_a_cache_in_8_bits_in_a_loop_on_a_gpu_are_those_of_xla(dtype):
    """Up to numbers between two of 8 bits, which may go to either."""
    sizes = {"T": 900, "steps": 70, "max_length": 1024, "kv_dtype": "int8"}
    with jax.default_matmul_precision("highest"):
        actual, cache = steps_in_a_loop("triton", dtype, joins=True, **sizes)
        expected, plain = steps_in_a_loop("xla", dtype, joins=False, **sizes)
    assert_trees_close(actual, expected, 1e-2)
    for name in POOLS:
        read, wanted = (dequantize(getattr(each, name)) for each in (cache, plain))
        assert normwise_error(read, wanted) < 1e-2, name


@pytest.mark.parametrize("chunk", [3, 8, 17])
@pytest.mark.parametrize("name", ["nsa", "nsa, blocks that do not overlap", "full", "window"])
def test_chunked_prefill_of_ragged_chunks_equals_the_whole_forward_pass(name, chunk):
    layer, variables, x, y = case(name)
    x, y = x[:3], y[:3]
    cache = poisoned(layer.init_cache(batch_size=3, max_length=T))

    @jax.jit
    def run(variables, x, cache):
        def step(cache, _):
            tokens, count = next_tokens(x, cache.lengths, chunk)
            count = jnp.minimum(count, chunk - jnp.arange(3))  # none at all for some rows of the smallest
            count = jnp.maximum(count, jnp.minimum(1, T - cache.lengths))
            options = {"num_tokens": count, "continuing": True, "method": "prefill"}
            piece, new = layer.apply(variables, beside_nan(tokens, count), cache, **options)
            return new, (piece, cache.lengths, count)

        return jax.lax.scan(step, cache, length=-(-T // max(1, chunk - 2)))

    cache, steps = run(variables, x, cache)
    assert jnp.isfinite(steps[0]).all()
    assert (cache.lengths == T).all()
    assert_trees_close(jnp.asarray(written(y, *steps)), y, 1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "nsa, the paper's layout",
        "window",
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("nsa, no window", "nsa, no selection", "full")),
    ],
)
def test_chunks_of_equal_rows_equal_the_whole_forward_pass(name):
    layer, variables, x, y = case(name)
    chunks = jnp.moveaxis(x[:2].reshape(2, 5, 14, E), 1, 0)
    cache = poisoned(layer.init_cache(batch_size=2, max_length=T))

    @jax.jit
    def run(variables, chunks, cache):
        def step(cache, chunk):
            piece, cache = layer.apply(variables, chunk, cache, continuing=True, method="prefill")
            return cache, piece

        return jax.lax.scan(step, cache, chunks)[1]

    assert_trees_close(jnp.moveaxis(run(variables, chunks, cache), 0, 1).reshape(2, T, E), y[:2], 1e-5)


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        pytest.param("triton", jnp.float32, marks=pytest.mark.exhaustive),
        pytest.param("triton", jnp.bfloat16, marks=pytest.mark.gpu),
        pytest.param("mosaic", jnp.bfloat16, marks=pytest.mark.gpu),
        pytest.param(None, jnp.bfloat16, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("lengths", [(70, 70), (70, 79)])
def test_a_chunk_of_kernels_equals_the_whole_forward_pass(implementation, dtype, lengths):
    config = NSAConfig(num_selected=4, window=48)
    sizes = {"num_heads": 8, "num_kv_heads": 1, "head_dim": 16 if dtype == jnp.float32 else 128, "dtype": dtype}
    whole, layer = (nsa_jax.NSAttention(**sizes, config=config, implementation=x) for x in ("xla", implementation))
    x = jax.random.normal(jax.random.key(0), (2, 140, 32), dtype)
    variables = jax.jit(whole.init)(jax.random.key(1), x)
    y = jax.jit(whole.apply)(variables, x)
    cache = poisoned(layer.init_cache(batch_size=2, max_length=140))

    @jax.jit
    def chunk(variables, x, cache):
        _, cache = whole.apply(variables, x[:, :80], cache, num_tokens=jnp.asarray(lengths), method="prefill")
        given = jnp.stack([x[b, begin : begin + 50] for b, begin in enumerate(lengths)])
        return layer.apply(variables, given, cache, continuing=True, method="prefill")[0]

    expected = jnp.stack([y[b, begin : begin + 50] for b, begin in enumerate(lengths)])
    assert normwise_error(chunk(variables, x, cache), expected) < tolerance_of(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("lengths", [(300, 300), (300, 250)])
def test_a_chunk_of_dense_attention_on_a_gpu_equals_the_whole_forward_pass(window, lengths):
    layer = nsa_jax.FullAttention(num_heads=8, num_kv_heads=2, head_dim=64, window=window, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (2, 600, 32), jnp.bfloat16)
    variables = jax.jit(layer.init)(jax.random.key(1), x)
    y = jax.jit(layer.apply)(variables, x)
    cache = poisoned(layer.init_cache(batch_size=2, max_length=600))

    @jax.jit
    def chunk(variables, x, cache):
        _, cache = layer.apply(variables, x[:, :300], cache, num_tokens=jnp.asarray(lengths), method="prefill")
        given = jnp.stack([x[b, begin : begin + 200] for b, begin in enumerate(lengths)])
        return layer.apply(variables, given, cache, continuing=True, method="prefill")[0]

    expected = jnp.stack([y[b, begin : begin + 200] for b, begin in enumerate(lengths)])
    assert normwise_error(chunk(variables, x, cache), expected) < tolerance_of(jnp.bfloat16)


def filled(kv, raw, lengths, *, step_tokens=1, num_pages=None, tables=None):
    """A cache of which row b holds the first lengths[b] tokens of the one sequence in kv, and otherwise NaN."""
    B = len(lengths)
    cache = poisoned(
        init_nsa_cache(
            CONFIG, batch_size=B, max_length=T, num_kv_heads=2, head_dim=8, step_tokens=step_tokens,
            num_pages=num_pages, block_tables=tables,
        )
    )  # fmt: skip
    rows = jax.tree.map(lambda a: jnp.broadcast_to(a, (B, *a.shape[1:])), (raw, kv[:2], kv[2:4], kv[4:]))
    return jax.jit(functools.partial(write_nsa_tokens, config=CONFIG))(cache, *rows, jnp.asarray(lengths, jnp.int32))


@jax.jit
def _whole(q, kv, gates):
    """The reference's output and blocks of a whole sequence."""
    options = {"config": CONFIG, "implementation": "reference"}
    _, lse = nsa_jax.compressed_attention(q, *kv[:2], **options)
    return nsa_jax.nsa_attention(q, kv, gates, **options), nsa_jax.select_blocks(q, kv.cmp_k, lse, **options)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("m", [1, 3])
def test_decode_attention_at_every_position_has_the_outputs_and_exactly_the_blocks_of_the_whole(implementation, m):
    inputs = random_inputs(jax.random.key(2), CONFIG, T=T, num_heads=4, num_kv_heads=2, head_dim=8)
    o, blocks = _whole(inputs.q, inputs.kv, inputs.gates)
    offsets = jnp.arange(T - m + 1, dtype=jnp.int32)
    at = offsets[:, None] + jnp.arange(m)[None, :]
    cache = filled(inputs.kv, inputs.kv[2:4], offsets + m, step_tokens=m)
    run = jax.jit(functools.partial(decode_attention, config=CONFIG, implementation=implementation))
    actual, indices = run(inputs.q[0, at], cache, inputs.gates[0, at], offsets)
    assert_trees_close(actual, o[0, at], 1e-5)
    np.testing.assert_array_equal(indices, jnp.moveaxis(blocks[0][:, at], 0, 1))


@pytest.mark.exhaustive
def test_triton_decodes_as_the_reference():
    config = NSAConfig(8, 4, 16, 3, 1, 1, 20)
    layer = nsa_jax.NSAttention(4, 2, 32, config=config, implementation="reference")
    x = jax.random.normal(jax.random.key(0), (2, 60, E))
    variables = jax.jit(layer.init)(jax.random.key(1), x)
    prefill = jax.jit(functools.partial(layer.apply, method="prefill"))
    _, cache = prefill(
        variables, x[:, :58], layer.init_cache(batch_size=2, max_length=64), num_tokens=jnp.array([58, 31])
    )
    results = [
        jax.jit(functools.partial(layer.clone(implementation=name).apply, method="decode_step"))(
            variables, x[:, 58:59], cache
        )
        for name in ("triton", "reference")
    ]
    assert_trees_close(results[0], results[1], 1e-5)


@settings(max_examples=8)
@given(st.lists(st.integers(0, 3), min_size=20, max_size=20), st.integers(0, 99))
def test_drafts_that_are_taken_back_leave_no_trace(accepted, seed):
    layer, variables, x, y = case("nsa")
    x, y = x[:1], y[:1]
    step = _jitted("nsa", "decode_step")
    _, cache = _jitted("nsa", "prefill")(
        variables, x[:, :5], poisoned(layer.init_cache(batch_size=1, max_length=T, step_tokens=3))
    )
    rng = np.random.default_rng(seed)
    for right in accepted:
        begin = int(cache.lengths[0])
        if begin + 3 > T:
            break
        drafts = np.array(rng.standard_normal((1, 3, E)), np.float32)
        if seed % 2:
            drafts[:] = np.nan
        drafts[:, :right] = x[:, begin : begin + right]
        out, cache = step(variables, jnp.asarray(drafts), cache)
        if right:
            assert_trees_close(out[:, :right], y[:, begin : begin + right], 2e-5)
        cache = rollback(cache, 3 - right, config=CONFIG)
    begin = int(cache.lengths[0])
    if begin < T:
        out, _ = step(variables, x[:, begin : begin + 1], cache)
        assert_trees_close(out, y[:, begin : begin + 1], 2e-5)


@functools.cache
def _jitted(name, method):
    return jax.jit(functools.partial(LAYERS[name].clone(dtype=jnp.float32).apply, method=method))


@settings(max_examples=8)
@given(st.integers(0, 999), st.lists(st.integers(1, T), min_size=3, max_size=3))
def test_pages_anywhere_equal_contiguous_ones_and_leave_other_pages_alone(seed, lengths):
    inputs = random_inputs(jax.random.key(seed), CONFIG, T=T, num_heads=4, num_kv_heads=2, head_dim=8)
    N, P = num_blocks(T, CONFIG), 40
    rng = np.random.default_rng(seed)
    tables, order = np.full((3, N), -1, np.int32), rng.permutation(P)
    for b, length in enumerate(lengths):
        used = -(-length // CONFIG.select_block)
        tables[b, :used], order = order[:used], order[used:]
    paged = filled(inputs.kv, inputs.kv[2:4], lengths, num_pages=P, tables=jnp.asarray(tables))
    plain = filled(inputs.kv, inputs.kv[2:4], lengths)
    for name in POOLS:
        assert np.isnan(np.asarray(getattr(paged, name))[order]).all(), name
    offsets = jnp.asarray(lengths, jnp.int32) - 1
    q, gates = inputs.q[0, offsets][:, None], inputs.gates[0, offsets][:, None]
    run = jax.jit(functools.partial(decode_attention, config=CONFIG, implementation="xla"))
    for a, b in zip(run(q, paged, gates, offsets), run(q, plain, gates, offsets), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_row_without_a_page_leaves_the_pages_of_other_rows_alone():
    """-1 would be the last page, counted from the end."""
    inputs = random_inputs(jax.random.key(4), CONFIG, T=T, num_heads=4, num_kv_heads=2, head_dim=8)
    N = num_blocks(T, CONFIG)
    tables = np.full((2, N), -1, np.int32)
    tables[0] = np.arange(N)[::-1]  # row 0 has all pages; row 1, which is written after it, has none
    both = filled(inputs.kv, inputs.kv[2:4], [T, T], num_pages=N, tables=jnp.asarray(tables))
    one = filled(inputs.kv, inputs.kv[2:4], [T, 0], num_pages=N, tables=jnp.asarray(tables))
    for name in POOLS:
        np.testing.assert_array_equal(getattr(both, name), getattr(one, name), name)


@pytest.mark.parametrize("count", [1, 9, 10, 11, 25])
def test_no_slot_of_a_ring_is_written_twice(count):
    """Which of two writes a scatter keeps is not said, so tokens in reverse order must leave the same ring."""
    ring, lengths = jnp.zeros((2, 10, 1, 1)), jnp.array([3, 17], jnp.int32)
    positions = lengths[:, None] + jnp.arange(25, dtype=jnp.int32)[None, :]
    new = jnp.broadcast_to(jnp.arange(25)[None, :] < count, (2, 25))
    wanted = np.zeros((2, 10))
    for row, length in zip(wanted, np.asarray(lengths), strict=True):
        for position in range(length, length + count):
            row[position % 10] = position
    for order in (slice(None), slice(None, None, -1)):
        at = positions[:, order]
        written = _write_ring(ring, at[:, :, None, None].astype(jnp.float32), at, new[:, order], lengths + count)
        np.testing.assert_array_equal(written[:, :, 0, 0], wanted)


def test_a_prefill_clears_the_rows_of_a_dense_cache():
    """CuDNN may read past a row's length."""
    layer, variables, x, _ = case("full")
    cache = poisoned(layer.init_cache(batch_size=2, max_length=T))
    _, cache = _jitted("full", "prefill")(variables, x[:2, :5], cache)
    assert all(jnp.isfinite(a).all() for a in cache)


def test_a_row_without_tokens_stays_as_it_is_and_a_freed_row_takes_a_new_prompt():
    layer, variables, x, y = case("nsa")
    cache = layer.init_cache(batch_size=3, max_length=T)
    prefill, step = _jitted("nsa", "prefill"), _jitted("nsa", "decode_step")
    _, cache = prefill(variables, x[:3, :20], cache, num_tokens=jnp.array([20, 12, 7]))
    before = take_row(cache, 1)
    _, cache = step(variables, x[:3, 20:21], cache, num_tokens=jnp.array([1, 0, 0]))
    after = take_row(cache, 1)
    np.testing.assert_array_equal(cache.lengths, [21, 12, 7])
    for name in ("tail_k", "tail_v", "win_k", "win_v", "lengths", "block_tables"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    # Row 2 ends; another sequence begins in its place while row 0 goes on.
    _, one = prefill(variables, x[:1, :33], take_row(cache, 2))
    cache = put_row(cache, 2, one)
    tokens = jnp.stack([x[0, 21:22], x[0, 12:13], x[0, 33:34]])
    out, cache = step(variables, tokens, cache)
    assert_trees_close(out[:, 0], y[0, jnp.array([21, 12, 33])], 1e-5)


@pytest.mark.exhaustive
def test_linen_and_nnx_decode_alike():
    layer, variables, x, _ = case("nsa")
    twin = nsa_jax.nnx.NSAttention(E, **HEADS, config=CONFIG, rngs=nnx.Rngs(0))
    graph, state = nnx.split(twin)
    values = nnx.to_pure_dict(state)
    params = jax.tree.map(lambda p: p, nsa_jax.linen.nn.meta.unbox(variables["params"]))
    nnx.replace_by_pure_dict(state, {name: params[name] for name in values})
    twin = nnx.merge(graph, state)
    caches = [module.init_cache(batch_size=2, max_length=T) for module in (layer, twin)]
    a, caches[0] = layer.apply(variables, x[:2, :9], caches[0], method="prefill")
    b, caches[1] = twin.prefill(x[:2, :9], caches[1])
    assert_trees_close(a, b, 1e-6)
    a, caches[0] = layer.apply(variables, x[:2, 9:10], caches[0], method="decode_step")
    b, caches[1] = twin.decode_step(x[:2, 9:10], caches[1])
    assert_trees_close((a, caches[0]), (b, caches[1]), 1e-6)


def test_cache_bytes_are_those_of_the_docstring():
    config, K, Dk, Dv, B, m = NSAConfig(), 4, 128, 96, 3, 2
    make = functools.partial(
        init_nsa_cache, config, batch_size=B, max_length=4096, num_kv_heads=K, head_dim=Dk, v_head_dim=Dv,
        dtype=jnp.bfloat16, step_tokens=m,
    )  # fmt: skip
    per_token = 2 * K * (Dk + Dv) * (1 + 1 / config.compress_stride)
    per_row = 2 * K * (Dk + Dv) * (config.window + config.compress_block + 2 * m - 2)
    integers = 4 * B * (1 + 4096 // config.select_block)
    assert cache_bytes(jax.eval_shape(make)) == B * (4096 * per_token + per_row) + integers


def test_inside_jit_what_outgrows_a_cache_is_dropped_and_other_rows_are_unharmed():
    layer, variables, x, y = case("nsa")
    cache = layer.init_cache(batch_size=2, max_length=16)
    _, cache = _jitted("nsa", "prefill")(variables, x[:2, :16], cache, num_tokens=jnp.array([16, 9]))
    tokens = jnp.stack([x[0, 16:17], x[0, 9:10]])
    out, cache = _jitted("nsa", "decode_step")(variables, tokens, cache)
    assert_trees_close(out[1, 0], y[0, 9], 1e-5)
    assert jnp.isfinite(out).all()


def bad_table(value):
    return jnp.full((2, num_blocks(T, CONFIG)), value, jnp.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0: expected an integer of at least 1"),
        ({"step_tokens": -1}, "step_tokens = -1"),
        ({"num_pages": 5}, "num_pages = 5: expected at least batch_size"),
        ({"block_tables": jnp.zeros((2, 3), jnp.int32)}, r"block_tables: int32 \(2, 3\)"),
        ({"block_tables": bad_table(18)}, "block_tables holds 18 to 18: expected -1"),
    ],
)
def test_impossible_caches_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        LAYERS["nsa"].init_cache(**{"batch_size": 2, "max_length": T, **change})


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (5, {}, "step_tokens; prefill takes more"),
        (1, {"num_tokens": jnp.array([1, 2])}, r"num_tokens = \[1, 2\]: expected 0 to 1"),
        (1, {"num_tokens": jnp.array([1, 1, 1])}, r"num_tokens: int32 \(3,\): expected integers of shape \(2,\)"),
        (1, {"rows": 3}, "cache has 2 rows: expected 3, the batch of x"),
        (1, {"dtype": jnp.bfloat16}, "cache holds float32 keys"),
        (1, {"layer": "full"}, "cache = NSACache: expected an nsa_jax.DenseCache"),
        (1, {"lengths": 72}, "72"),
    ],
)
def test_steps_that_do_not_fit_are_refused_by_name(tokens, options, message):
    options = dict(options)
    layer, variables, x, _ = case(options.pop("layer", "nsa"))
    cache: NSACache = LAYERS["nsa"].init_cache(batch_size=2, max_length=T)
    cache = cache._replace(lengths=jnp.full((2,), options.pop("lengths", 0), jnp.int32))
    rows, dtype = options.pop("rows", 2), options.pop("dtype", jnp.float32)
    with pytest.raises(ValueError, match=message):
        layer.clone(dtype=dtype).apply(variables, x[:rows, :tokens], cache, method="decode_step", **options)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float16])
@pytest.mark.parametrize("window", [None, 5])
def test_full_attention_decodes_in_every_dtype_with_the_numbers_of_the_whole_forward_pass(window, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        layer = nsa_jax.FullAttention(num_heads=4, num_kv_heads=2, head_dim=8, window=window, param_dtype=dtype)

        @jax.jit
        def last(key):
            x = jax.random.normal(key, (2, 9, 16), dtype)
            variables = layer.init(key, x)
            cache = layer.init_cache(batch_size=2, max_length=12, dtype=dtype)
            _, cache = layer.apply(variables, x[:, :8], cache, method="prefill")
            y, _ = layer.apply(variables, x[:, 8:], cache, method="decode_step")
            return y, layer.apply(variables, x)[:, 8:]

        assert normwise_error(*last(jax.random.key(0))) < tolerance_of(dtype)
