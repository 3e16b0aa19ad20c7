"""`jax.export` with a symbolic batch: what is exported once runs at every batch."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import export
from whole_layers import CONFIG, FIELDS, E, T, embeddings, everything, initial, layer, run_alone, segments

import nsa_jax
from nsa_jax.dense import causal_attention
from nsa_jax.testing import assert_trees_close, random_inputs


def exported(function, *arguments):
    """The function, exported for arguments whose dimension of size 3 is any batch."""
    (b,) = export.symbolic_shape("b")

    def any_batch(x):
        return jax.ShapeDtypeStruct((b, *x.shape[1:]) if x.shape[:1] == (3,) else x.shape, x.dtype)

    return export.export(jax.jit(function))(*jax.tree.map(any_batch, arguments)).call


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive if name != "nsa" else ()) for name in FIELDS]
)
def test_layers_run_at_any_batch(name):
    def forward(params, x):
        return layer(name)(params, "__call__", x)

    params = nn.unbox(initial(name))
    call = exported(forward, params, embeddings(B=3))
    for B in (1, 2):
        assert_trees_close(call(params, embeddings(B=B)), jax.jit(forward)(params, embeddings(B=B)), 1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("flavour", ["linen", "nnx"])
@pytest.mark.parametrize("name", FIELDS)
def test_layers_and_their_caches_run_at_any_batch(name, flavour):
    params = nn.unbox(initial(name))
    call = exported(everything(layer(name, flavour)), params, embeddings(B=3), segments(3), embeddings(2, 3))
    for B in (1, 5):
        actual = call(params, embeddings(B=B), segments(B), embeddings(2, B))
        assert_trees_close(jax.device_get(actual), run_alone(name, B), 1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_ops_run_at_any_batch_in_chunks(implementation, monkeypatch):
    monkeypatch.setattr("nsa_jax.xla.CHUNK_ELEMENTS", 1)  # several chunks of queries
    options = {"config": CONFIG, "implementation": implementation}

    def ops(q, kv, gates, cache):
        o_cmp, lse = nsa_jax.compressed_attention(q, kv.cmp_k, kv.cmp_v, **options)
        blocks = nsa_jax.select_blocks(q, kv.cmp_k, lse, **options)
        o_slc = nsa_jax.selected_attention(q, kv.slc_k, kv.slc_v, blocks, **options)
        o_win = nsa_jax.window_attention(q, kv.win_k, kv.win_v, **options)
        o = nsa_jax.nsa_attention(q, kv, gates, **options)
        decoded = nsa_jax.decode_attention(q[:, :1], cache, gates[:, :1], cache.lengths, **options)
        return o_cmp, lse, blocks, o_slc, o_win, o, causal_attention(q, kv.slc_k, kv.slc_v), decoded

    def problem(B):
        sizes = {"num_kv_heads": 2, "head_dim": 4}
        inputs = random_inputs(jax.random.key(0), CONFIG, B=B, T=T, num_heads=4, **sizes)
        tables = jnp.zeros((B, T // 8), jnp.int32)
        cache = nsa_jax.init_nsa_cache(CONFIG, batch_size=B, max_length=T, num_pages=7, block_tables=tables, **sizes)
        return (*inputs[:3], jax.tree.map(lambda x: x.at[:].set(1), cache))

    call = exported(ops, *problem(3))
    assert_trees_close(call(*problem(2)), jax.jit(ops)(*problem(2)), 1e-5)


def test_kernels_refuse_a_batch_that_is_not_known():
    (b,) = export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, 32, 2, 16), jnp.float32)
    window = functools.partial(nsa_jax.window_attention, config=CONFIG, implementation="triton")
    with pytest.raises(NotImplementedError, match=r"q.shape = \(b, 32, 2, 16\): expected a batch that is known"):
        export.export(jax.jit(window))(x, x, x)


def test_tokens_must_be_known():
    x = jax.ShapeDtypeStruct(export.symbolic_shape(f"2, t, {E}"), jnp.float32)
    call = layer("full")
    with pytest.raises(ValueError, match=r"x: float32 \(2, t, 8\): expected tokens and an embedding that are known"):
        export.export(jax.jit(lambda params, x: call(params, "__call__", x)))(nn.unbox(initial("full")), x)
