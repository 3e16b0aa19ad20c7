"""The public ops refuse what does not fit, by name, and choose implementations as they say."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

import nsa_jax
from nsa_jax import BranchKV, NSAConfig, num_blocks, num_compressed
from nsa_jax.dense import causal_attention
from nsa_jax.testing import random_inputs

CONFIG = NSAConfig(4, 2, 8, 4, 1, 2, 10)
T = 20


@pytest.fixture
def inputs():
    return random_inputs(jax.random.key(0), CONFIG, T=T, num_heads=4, num_kv_heads=2, head_dim=8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": -1}, "NSAConfig.window = -1: expected an integer of at least 0"),
        ({"num_init": -1}, "NSAConfig.num_init = -1"),
        ({"select_block": 64.0}, "NSAConfig.select_block = 64.0"),
        ({"compress_block": 24}, "NSAConfig.compress_block = 24: expected a multiple of compress_stride = 16"),
        ({"select_block": 40}, "NSAConfig.select_block = 40: expected a multiple of compress_stride = 16"),
        ({"compress_block": 128}, "NSAConfig.compress_block = 128: expected at most select_block = 64"),
        ({"select_in_window": 1}, "NSAConfig.select_in_window = 1: expected True or False"),
        (
            {"num_selected": 2},
            "NSAConfig.num_selected = 2: expected 0, for no such branch, or at least num_init + num_local = 3",
        ),
    ],
)
def test_impossible_configs_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        NSAConfig(**fields)


def test_config_is_frozen_and_hashable():
    assert hash(NSAConfig()) == hash(NSAConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        NSAConfig().window = 3


def test_counts_of_compressed_tokens_and_blocks():
    config = NSAConfig()
    assert [num_compressed(n, config) for n in (1, 31, 32, 47, 48, 8192)] == [0, 0, 1, 1, 2, 511]
    assert [num_blocks(n, config) for n in (1, 64, 65, 8192)] == [1, 1, 2, 128]


def refused(inputs, message, **changes):
    arguments = {"segment_ids": None, "query_offset": 0, **inputs._asdict(), **changes}
    q, kv, gates = (arguments.pop(name) for name in ("q", "kv", "gates"))
    with pytest.raises(ValueError, match=re.escape(message)):
        nsa_jax.nsa_attention(q, kv, gates, config=CONFIG, **arguments)


def test_mismatched_arguments_are_refused_by_name(inputs):
    kv, q = inputs.kv, inputs.q
    refused(inputs, "kv = tuple: expected an nsa_jax.BranchKV", kv=tuple(kv))
    refused(inputs, "gates: float32 (1, 20, 4, 2): expected a float array of shape (1, 20, 4, 3)",
            gates=inputs.gates[..., :2])  # fmt: skip
    refused(inputs, "kv.cmp_k has 8 compressed tokens: expected num_compressed(20, config) = 9",
            kv=kv._replace(cmp_k=kv.cmp_k[:, 1:], cmp_v=kv.cmp_v[:, 1:]))  # fmt: skip
    refused(inputs, "kv.win_k has 19 tokens and kv.slc_k 20",
            kv=kv._replace(win_k=kv.win_k[:, 1:], win_v=kv.win_v[:, 1:]))  # fmt: skip
    refused(inputs, "k: bfloat16 (1, 9, 2, 8): expected a float dtype, the same as q's float32",
            kv=kv._replace(cmp_k=kv.cmp_k.astype(jnp.bfloat16)))  # fmt: skip
    refused(inputs, "k: float32 (1, 9, 2, 8): expected batch 1 and head size 6", q=q[..., :6])
    refused(inputs, "k: float32 (1, 9, 2, 8): expected a number of heads that divides q's 3",
            q=q[:, :, :3], gates=inputs.gates[:, :, :3])  # fmt: skip
    refused(inputs, "v: float32 (1, 19, 2, 8): expected batch, tokens and heads (1, 20, 2)",
            kv=kv._replace(slc_v=kv.slc_v[:, 1:]))  # fmt: skip
    refused(inputs, "segment_ids: float32 (1, 20): expected integers", segment_ids=jnp.ones((1, T)))
    refused(inputs, "segment_ids: int32 (1, 19): expected one id for each of the T = 20 keys",
            segment_ids=jnp.ones((1, T - 1), jnp.int32), q=q[:, 2:], gates=inputs.gates[:, 2:])  # fmt: skip
    refused(inputs, "query_offset = 2 with 20 queries", query_offset=2)
    refused(inputs, "query_offset = 2 with 20 queries", query_offset=jnp.int32(2))
    refused(inputs, "query_offset = -1 with 20 queries", query_offset=-1)
    refused(inputs, "query_offset = 1.0: expected an int or an integer scalar", query_offset=1.0)
    refused(
        inputs,
        "implementation = 'cuda': expected one of mosaic, triton, xla, reference, or None",
        implementation="cuda",
    )


def test_values_with_other_heads_than_their_keys_are_refused_by_every_op(inputs):
    q, kv, gates = inputs[:3]
    blocks = jnp.zeros((1, 2, T, CONFIG.num_selected), jnp.int32)
    options = {"config": CONFIG}
    calls = {
        "v": [
            lambda v: nsa_jax.compressed_attention(q, kv.cmp_k, v(kv.cmp_v), **options),
            lambda v: nsa_jax.selected_attention(q, kv.slc_k, v(kv.slc_v), blocks, **options),
            lambda v: nsa_jax.window_attention(q, kv.win_k, v(kv.win_v), **options),
            lambda v: causal_attention(q, kv.win_k, v(kv.win_v)),
            lambda v: causal_attention(q, kv.win_k, v(kv.win_v), window=3),
        ]
    }
    for name in ("cmp_v", "slc_v", "win_v"):
        changed = functools.partial(lambda v, name: kv._replace(**{name: v(getattr(kv, name))}), name=name)
        whole = lambda v, changed=changed: nsa_jax.nsa_attention(q, changed(v), gates, **options)  # noqa: E731
        calls[f"kv.{name}"] = [whole]
    for name, refusing in calls.items():
        for call in refusing:
            for v in (lambda v: v[:, :, :1], lambda v: jnp.concatenate([v, v], axis=2)):
                with pytest.raises(ValueError, match=re.escape(f"{name}: float32 ")):
                    call(v)


@pytest.mark.parametrize("name", ["cmp_v", "slc_v", "win_v"])
def test_a_cache_of_values_with_other_heads_than_its_keys_is_refused(name):
    cache = nsa_jax.init_nsa_cache(CONFIG, batch_size=1, max_length=T, num_kv_heads=2, head_dim=8)
    heads = {"win_v": 2}.get(name, 1)
    cache = cache._replace(**{name: jnp.take(getattr(cache, name), jnp.array([0]), axis=heads)})
    arguments = (jnp.ones((1, 1, 4, 8)), cache, jnp.ones((1, 1, 4, 3)), cache.lengths)
    with pytest.raises(ValueError, match="v: float32"):
        nsa_jax.decode_attention(*arguments, config=CONFIG)


def test_block_indices_and_lse_of_the_wrong_kind_are_refused(inputs):
    with pytest.raises(ValueError, match=re.escape("block_indices: int32 (1, 2, 19, 3): expected integers of shape")):
        nsa_jax.selected_attention(
            inputs.q, inputs.kv.slc_k, inputs.kv.slc_v, jnp.zeros((1, 2, T - 1, 3), jnp.int32), config=CONFIG
        )
    with pytest.raises(ValueError, match=re.escape("lse: float32 (1, 20, 4): expected float32 of shape (B, H, Tq)")):
        nsa_jax.select_blocks(inputs.q, inputs.kv.cmp_k, jnp.zeros((1, T, 4)), config=CONFIG)
    for dtype in (jnp.bfloat16, jnp.int32):
        with pytest.raises(ValueError, match=rf"lse: {dtype.__name__} .*: expected float32 of shape \(B, H, Tq\)"):
            nsa_jax.select_blocks(inputs.q, inputs.kv.cmp_k, jnp.zeros((1, 4, T), dtype), config=CONFIG)
    with pytest.raises(ValueError, match=re.escape("q: float32 (1, 20, 4): expected 4 axes")):
        nsa_jax.window_attention(inputs.q[..., 0], inputs.kv.win_k, inputs.kv.win_v, config=CONFIG)
    with pytest.raises(ValueError, match=r"config = None: expected an nsa_jax\.NSAConfig"):
        nsa_jax.window_attention(inputs.q, inputs.kv.win_k, inputs.kv.win_v, config=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": None}, "cache = NoneType: expected an nsa_jax.NSACache"),
        (
            {"config": dataclasses.replace(CONFIG, select_block=16)},
            "pages of 8 tokens: expected 2, the batch of q, and",
        ),
        ({"q": jnp.ones((1, 2, 4, 8))}, "k: float32 (2, "),
        ({"q": jnp.ones((2, 3, 4, 8))}, "q: float32 (2, 3, 4, 8): expected at most 2 queries a row, the cache's"),
        (
            {"gates": jnp.ones((2, 2, 4, 2))},
            "gates: float32 (2, 2, 4, 2): expected a float array of shape (2, 2, 4, 3)",
        ),
        ({"gates": jnp.ones((2, 2, 4, 3), jnp.int32)}, "gates: int32 (2, 2, 4, 3): expected a float array"),
        ({"query_offsets": jnp.zeros(2)}, "query_offsets: float32 (2,): expected integers of shape (B,) = (2,)"),
        (
            {"query_offsets": jnp.zeros(1, jnp.int32)},
            "query_offsets: int32 (1,): expected integers of shape (B,) = (2,)",
        ),
    ],
)
def test_decoding_refuses_what_does_not_fit_by_name(changes, message):
    sizes = {"batch_size": 2, "max_length": T, "num_kv_heads": 2, "head_dim": 8, "step_tokens": 2}
    arguments = {
        "q": jnp.ones((2, 2, 4, 8)),
        "cache": nsa_jax.init_nsa_cache(CONFIG, **sizes),
        "gates": jnp.ones((2, 2, 4, 3)),
        "query_offsets": jnp.zeros(2, jnp.int32),
        "config": CONFIG,
    } | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        nsa_jax.decode_attention(**arguments)


def test_a_named_implementation_never_falls_back(inputs):
    with pytest.raises(NotImplementedError, match=r"implementation = 'mosaic': "):
        nsa_jax.nsa_attention(inputs.q, inputs.kv, inputs.gates, config=CONFIG, implementation="mosaic")


@pytest.mark.parametrize("implementation", [pytest.param("reference", marks=pytest.mark.exhaustive), "xla"])
def test_ops_work_under_jit_vmap_remat_and_scan(inputs, implementation):
    def attend(q, kv, gates):
        return nsa_jax.nsa_attention(q, kv, gates, config=CONFIG, implementation=implementation)

    arguments = (inputs.q, inputs.kv, inputs.gates)
    expected = attend(*arguments)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), arguments)
    assert jnp.allclose(jax.jit(attend)(*arguments), expected, atol=1e-6)
    assert jnp.allclose(jax.jit(jax.vmap(attend))(*stacked)[1], expected, atol=1e-6)
    _, scanned = jax.lax.scan(lambda c, a: (c, jax.checkpoint(attend)(*a)), None, stacked)
    assert jnp.allclose(scanned[1], expected, atol=1e-6)


def test_branch_kv_names_its_fields_in_order():
    assert BranchKV._fields == ("cmp_k", "cmp_v", "slc_k", "slc_v", "win_k", "win_v")
