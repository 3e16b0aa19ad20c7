"""NaN, infinity and huge numbers reach only the queries that see them, in outputs and in gradients.

A query that sees a number that is not finite gives NaN and sends no gradient, so that the gradients are those of the
problem without poison, for cotangents that are zero at such queries.
"""

import dataclasses
import functools

import brute_force
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Case, cases, random_arrays, random_segment_ids

import nsa_jax
import nsa_jax.compression
from nsa_jax import NSAConfig
from nsa_jax.testing import normwise_error

LARGEST = float(np.finfo(np.float32).max)
POISONS = (np.nan, np.inf, -np.inf, 1e30, LARGEST)
IMPLEMENTATIONS = ("reference", "xla")
FIXED = Case(
    batch=2, tokens=45, kv_heads=2, group=2, key_size=5, value_size=3, config=NSAConfig(4, 2, 8, 4, 1, 1, 10),
    scale=None, segments=True, offset=9, queries=30, traced_offset=True, seed=0,
)  # fmt: skip
BRANCHES = ("compressed", "selected", "window")
MLP = {"in_kernel": (4, 3, 5), "in_bias": (5,), "out_kernel": (5, 3), "out_bias": (3,)}


def visible(case: Case, segment_ids, block_indices):
    """Which keys each query sees: by branch, bool [B, Tq, S, K]."""
    config, K = case.config, case.kv_heads
    Nc = nsa_jax.num_compressed(case.tokens, config)
    times = range(case.offset, case.offset + case.queries)
    shown = {"compressed": np.zeros((case.batch, case.queries, Nc, K), bool)}
    shown |= {name: np.zeros((case.batch, case.queries, case.tokens, K), bool) for name in BRANCHES[1:]}
    for b in range(case.batch):
        for row, t in enumerate(times):
            seen = brute_force._visible_compressed(b, t, Nc, config, segment_ids)
            shown["compressed"][b, row, seen] = True
            past = [u for u in range(t + 1) if brute_force._same_segment(segment_ids, b, u, t)]
            shown["window"][b, row, [u for u in past if u > t - config.window]] = True
            for k in range(K):
                chosen = set(block_indices[b, k, row].tolist())
                shown["selected"][b, row, [u for u in past if u // config.select_block in chosen], k] = True
    return shown


@functools.cache
def program(case: Case, implementation: str):
    """Outputs and gradients of the three branches apart, and of all together, as one compiled function."""

    def run(arrays, block_indices, offset, cotangents):
        options = dict(config=case.config, scale=case.scale, query_offset=offset, implementation=implementation)
        options["segment_ids"] = arrays.segment_ids

        def compressed(q, k, v):
            o, lse = nsa_jax.compressed_attention(q, k, v, **options)
            return o, jnp.where(lse == -jnp.inf, 0, lse)

        def selected(q, k, v):
            return nsa_jax.selected_attention(q, k, v, block_indices, **options)

        def window(q, k, v):
            return nsa_jax.window_attention(q, k, v, **options)

        def whole(q, kv, gates):
            return nsa_jax.nsa_attention(q, kv, gates, **options)

        results = {}
        kv = arrays.kv
        for i, (name, op) in enumerate(zip(BRANCHES, (compressed, selected, window), strict=True)):
            out, pull = jax.vjp(op, arrays.q, *kv[2 * i : 2 * i + 2])
            results[name] = out, pull(cotangents[name])
        out, pull = jax.vjp(whole, arrays.q, kv, arrays.gates)
        results["nsa"] = out, pull(cotangents["nsa"])
        return results

    flags = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    if case.traced_offset:
        return jax.jit(run, compiler_options=flags)
    fixed = jax.jit(lambda *arguments: run(*arguments[:2], case.offset, arguments[2]), compiler_options=flags)
    return lambda arrays, blocks, _, cotangents: fixed(arrays, blocks, cotangents)


def same(what, actual, expected, where=None):
    a, b = np.asarray(actual), np.asarray(expected)
    a, b = (a, b) if where is None else (a[where], b[where])
    assert normwise_error(a, b) <= 1e-6, what


def check(case: Case, implementation, data):
    """Poisons some queries, keys and values of each branch; see the module."""
    rng = np.random.default_rng(case.seed)
    arrays = random_arrays(dataclasses.replace(case, segments=False), "float32")
    ids = random_segment_ids(rng, case.batch, case.tokens)
    if not case.segments:
        ids[:] = 0
    arrays = arrays._replace(segment_ids=ids)
    options = dict(config=case.config, scale=case.scale, segment_ids=ids, query_offset=case.offset)
    _, lse = brute_force.compressed_attention(arrays.q, *arrays.kv[:2], **options)
    blocks = brute_force.select_blocks(arrays.q, arrays.kv.cmp_k, lse, **options)
    shown = visible(case, ids, blocks)

    share = data.draw(st.sampled_from([0.03, 0.1, 0.5]))
    bad_queries = rng.random(arrays.q.shape[:3]) < share * data.draw(st.booleans())
    lost, bad_keys = {}, {}
    for name, short in zip(BRANCHES, ("cmp", "slc", "win"), strict=True):
        sees = shown[name]  # [B, Tq, S, K]
        bad = rng.random((case.batch, *sees.shape[2:])) < share
        tail = data.draw(st.integers(0, sees.shape[2]))
        bad[:, sees.shape[2] - tail :] = True  # as padding and places that hold nothing yet are
        lost[name] = np.repeat((sees & bad[:, None]).any(axis=2), case.group, axis=2)
        lost[name] |= bad_queries & np.repeat(sees.any(axis=2), case.group, axis=2)
        for part in data.draw(st.sampled_from(["k", "v", "kv"])):
            bad_keys[f"{short}_{part}"] = bad
    lost["nsa"] = lost["compressed"] | lost["selected"] | lost["window"] | bad_queries

    shape = (*arrays.q.shape[:3], case.value_size)
    normal = {name: rng.normal(size=shape).astype(np.float32) for name in (*BRANCHES, "nsa")}

    def cotangents(sent):
        """Cotangents that are zero at the lost queries of the branches for which `sent` says so."""
        kept = {name: np.where(lost[name][..., None] & sent(name), 0, normal[name]) for name in normal}
        return kept | {"compressed": (kept["compressed"], kept["compressed"].sum(-1).swapaxes(1, 2))}

    run = functools.partial(program(dataclasses.replace(case, seed=0, segments=True), implementation))
    offset = np.int32(case.offset)
    wanted = run(arrays, blocks, offset, cotangents(lambda name: True))
    for value in POISONS:
        number, finite = np.float32(value), np.isfinite(value)
        kv = {
            name: np.where(bad_keys[name][..., None], number, x) if name in bad_keys else x
            for name, x in arrays.kv._asdict().items()
        }
        poisoned = arrays._replace(
            q=np.where(bad_queries[..., None], number, arrays.q),
            gates=np.where(bad_queries[..., None], number, arrays.gates),
            kv=type(arrays.kv)(**kv),
        )
        # What a huge number does to those who see it is not asked, so they get no cotangent then.
        sent = cotangents(lambda name, finite=finite: finite or name == "nsa")
        compare(run(poisoned, blocks, offset, sent), wanted, lost, finite)


def compare(actual, wanted, lost, finite):
    """Queries that are not lost have their outputs; all gradients are as wanted."""
    for name in BRANCHES:
        seen_o, wanted_o = actual[name][0], wanted[name][0]
        if name == "compressed":
            (seen_o, lse), (wanted_o, wanted_lse) = seen_o, wanted_o
            same("lse", lse.swapaxes(1, 2), wanted_lse.swapaxes(1, 2), ~lost[name])
        same(name, seen_o, wanted_o, ~lost[name])
        if not finite:
            assert np.isnan(np.asarray(seen_o)[lost[name]]).all(), name
        for part, a, b in zip(("dq", "dk", "dv"), actual[name][1], wanted[name][1], strict=True):
            same(f"{name} {part}", a, b)
    same("nsa", actual["nsa"][0], wanted["nsa"][0], ~lost["nsa"])
    (dq, dkv, dgates), (wanted_dq, wanted_dkv, wanted_dgates) = actual["nsa"][1], wanted["nsa"][1]
    same("dgates", dgates, wanted_dgates)
    for part, a, b in zip(("dq", *dkv._fields), (dq, *dkv), (wanted_dq, *wanted_dkv), strict=True):
        same(f"nsa {part}", a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**20), segments=st.booleans(), data=st.data())
def test_what_a_query_does_not_see_reaches_neither_its_output_nor_a_gradient(implementation, seed, segments, data):
    check(dataclasses.replace(FIXED, seed=seed, segments=segments), implementation, data)


@pytest.mark.exhaustive
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(case=cases(), data=st.data())
def test_what_a_query_does_not_see_reaches_nothing_in_random_problems(implementation, case, data):
    check(case, implementation, data)


@pytest.mark.parametrize("method", ["mlp", "linear", "mean"])
def test_a_compressed_token_of_what_is_not_finite_is_nan_and_sends_no_gradient(method):
    """Neither to the poison nor to its neighbours in the block."""
    config = NSAConfig(4, 4, 4, 3, window=8)
    rng = np.random.default_rng(0)
    shapes = {"position": (4, 3)} | {"mlp": MLP, "linear": {"in_kernel": (4, 3, 3)}, "mean": {}}[method]
    parameters = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(1, 12, 2, 3)), jnp.float32)
    poisoned = x.at[0, 5, 0].set(jnp.nan)
    lost = np.zeros((1, 3, 2, 1), bool)
    lost[0, 1, 0] = True  # tokens 4 to 7 of the first head
    compress = jax.jit(lambda x: nsa_jax.compression.compress(x, parameters, config=config, method=method))
    assert np.array_equal(np.isnan(compress(poisoned)), np.broadcast_to(lost, (1, 3, 2, 3)))
    cotangent = np.where(lost, 0, rng.normal(size=(1, 3, 2, 3))).astype(np.float32)
    gradient, expected = (jax.vjp(compress, each)[1](cotangent)[0] for each in (poisoned, x))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7)
    assert not gradient[0, 4:8, 0].any()
