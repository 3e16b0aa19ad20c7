"""Ops put together in other ways: any selection, lse of every branch, and the designs of docs/composing.md."""

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nsa_jax
from nsa_jax import NSAConfig, backends, num_blocks, selected_attention, window_attention
from nsa_jax.sharding import sharded
from nsa_jax.testing import assert_trees_close, normwise_error, random_inputs

PAGE = Path(__file__).parents[2] / "docs" / "composing.md"
CONFIG = NSAConfig(16, 8, 16, num_selected=3, num_init=1, num_local=1, window=24)
SEED = jax.random.key(0)


def problem(T=150, H=4, K=2, D=16, **options):
    """q, k, v and segment ids."""
    inputs = random_inputs(SEED, CONFIG, T=T, num_heads=H, num_kv_heads=K, head_dim=D, **options)
    return inputs.q, inputs.kv.slc_k, inputs.kv.slc_v, inputs.segment_ids


def random_blocks(n, q, k, query_offset=0):
    """For each query up to n of the blocks before its own, whatever their segment, and its own in two rows of three."""
    B, Tq, (K, T) = q.shape[0], q.shape[1], (k.shape[2], k.shape[1])
    rng, blocks = np.random.default_rng(n), np.full((B, K, Tq, n), -1, np.int32)
    for b, head, row in np.ndindex(B, K, Tq):
        own = (query_offset + row) // CONFIG.select_block
        chosen = rng.permutation(own)[: n - 1 if row % 3 else n]
        chosen = np.sort(np.append(chosen, own) if row % 3 else chosen)
        blocks[b, head, row, : len(chosen)] = chosen
    assert blocks.max() < num_blocks(T, CONFIG)
    return blocks


def weighted(op, **options):
    """A loss in which o and lse of every query that sees something have weights of their own."""

    def loss(q, k, v, *blocks, **traced):
        o, lse = op(q, k, v, *blocks, config=CONFIG, return_lse=True, **options, **traced)
        seen = lse > -jnp.inf
        cotangents = (jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate((o, lse), 7))
        do, dlse = cotangents
        return (o * do).sum() + jnp.where(seen, jnp.where(seen, lse, 0) * dlse, 0).sum(), (o, lse)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def results(op, *arguments, **options):
    """o, lse and the gradients of q, k and v."""
    (_, (o, lse)), gradients = weighted(op, **options)(*arguments)
    return o, lse, gradients


SELECTIONS = {
    "1 block": (1, {"T": 61}),
    "5 blocks, one head a group, segments": (5, {"T": 101, "H": 2, "num_segments": 3, "B": 2}),
    "5 blocks, group of 16": (5, {"T": 97, "H": 16, "K": 1}),
    "40 blocks, the last queries": (40, {"T": 650, "H": 2, "K": 1, "query_offset": 601}),
}


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        *(("xla", name) for name in SELECTIONS),
        ("triton", "40 blocks, the last queries"),
        *(pytest.param("triton", name, marks=pytest.mark.exhaustive) for name in list(SELECTIONS)[:3]),
    ],
)
def test_any_number_of_blocks_has_the_values_and_gradients_of_the_reference(implementation, name):
    n, sizes = SELECTIONS[name]
    q, k, v, segment_ids = problem(**sizes)
    offset = sizes.get("query_offset", 0)
    options = {"segment_ids": segment_ids, "query_offset": offset}
    blocks = random_blocks(n, q, k, offset)
    expected = results(selected_attention, q, k, v, blocks, implementation="reference", **options)
    assert expected[1].dtype == jnp.float32
    assert_trees_close(
        results(selected_attention, q, k, v, blocks, implementation=implementation, **options), expected, 1e-5
    )


def test_all_blocks_are_dense_attention_with_its_lse():
    q, k, v, _ = problem()
    T, n = q.shape[1], num_blocks(q.shape[1], CONFIG)
    blocks = jnp.broadcast_to(jnp.arange(n), (1, 2, T, n))
    actual = selected_attention(q, k, v, blocks, config=CONFIG, return_lse=True)
    o, lse = jax.nn.dot_product_attention(q, k, v, is_causal=True, return_residual=True)
    assert_trees_close(actual, (o, jnp.swapaxes(lse, 1, 2)), 1e-5)


@pytest.mark.parametrize("implementation", [pytest.param("xla", marks=pytest.mark.exhaustive), "triton"])
def test_blocks_after_the_querys_own_count_as_none(implementation):
    q, k, v, _ = problem(T=70, query_offset=21)
    n = num_blocks(70, CONFIG)
    every = jnp.broadcast_to(jnp.arange(n + 3), (1, 2, 49, n + 3))
    own = (21 + jnp.arange(49)) // CONFIG.select_block
    past = jnp.where(every <= own[None, None, :, None], every, -1)
    run = functools.partial(results, selected_attention, q, k, v, implementation=implementation, query_offset=21)
    for a, b in zip(jax.tree.leaves(run(every)), jax.tree.leaves(run(past)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", ["reference", "xla", "triton"])
def test_a_query_without_blocks_gives_zero_and_takes_no_cotangent_of_its_lse(implementation):
    q, k, v, _ = problem(T=40)
    blocks = jnp.zeros((1, 2, 40, 1), jnp.int32).at[:, :, :10].set(-1)

    @jax.jit
    def run(q, k, v):
        op = functools.partial(selected_attention, config=CONFIG, return_lse=True, implementation=implementation)
        (o, lse), pullback = jax.vjp(lambda q, k, v: op(q, k, v, blocks), q, k, v)
        return o, lse, pullback((jnp.ones_like(o), jnp.where(lse == -jnp.inf, 1e30, 0.0)))

    o, lse, gradients = run(q, k, v)
    assert np.isneginf(lse[:, :, :10]).all()
    assert np.isfinite(lse[:, :, 10:]).all()
    assert not np.any(o[:, :10])
    assert not np.any(gradients[0][:, :10])
    assert max(np.abs(x).max() for x in gradients) < 1e3


def test_lse_of_the_window_is_that_of_dense_attention_under_its_mask():
    q, k, v, _ = problem(T=61)
    t = np.arange(61)
    mask = (t[None] <= t[:, None]) & (t[None] > t[:, None] - CONFIG.window)
    actual = results(window_attention, q, k, v)
    expected = results(lambda q, k, v, **_: masked(q, k, v, mask[None, None]), q, k, v)
    assert_trees_close(actual, expected, 1e-5)


def masked(q, k, v, mask):
    """(o, lse) of softmax attention under a mask [B, K, T, T], all scores at once."""
    B, T, H, D = q.shape
    scores = jnp.einsum("btkgd,bskd->bkgts", q.reshape(B, T, k.shape[2], -1, D), k) * D**-0.5
    scores = jnp.where(mask[:, :, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    o = jnp.einsum("bkgts,bskd->btkgd", jnp.exp(scores - lse[..., None]), v)
    return o.reshape(B, T, H, -1), lse.reshape(B, H, T)


# docs/composing.md


@functools.cache
def page():
    """What the examples of the page define, and the arrays that they make."""
    found = {"__name__": "composing"}
    for example in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(compile(example, PAGE.name, "exec"), found)
    return SimpleNamespace(**found)


def tokens_of_best_blocks(q, k, candidates, forced):
    """[1, K, T, T]: the tokens of the best of each query's candidate blocks, found one query at a time."""
    (_, T, H, _), K, s = q.shape, k.shape[2], page().BLOCK
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    chosen = np.zeros((1, K, T, T), bool)
    for head, t in np.ndindex(K, T):
        group = q[0, t, head * (H // K) : (head + 1) * (H // K)]
        scores = {
            j: np.inf if j in forced(t) else sum(h @ k[0, j * s : (j + 1) * s, head].mean(axis=0) for h in group)
            for j in candidates(t)
        }
        for j in sorted(scores, key=scores.get)[-page().NUM_BLOCKS :]:
            chosen[0, head, t, j * s : (j + 1) * s] = True
    return chosen


@pytest.mark.parametrize("implementation", [None, pytest.param("triton", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("design", ["moba", "window_and_blocks"])
def test_designs_of_the_page_are_dense_attention_under_their_masks(design, implementation):
    q, k, v, s, w = page().q, page().k, page().v, page().BLOCK, page().config.window
    t = np.arange(q.shape[1])
    causal = t[None] <= t[:, None]
    if design == "moba":
        mask = tokens_of_best_blocks(q, k, lambda t: range(t // s + 1), lambda t: [t // s]) & causal
    else:
        near = causal & (t[None] > t[:, None] - w)
        blocks = tokens_of_best_blocks(q, k, lambda t: range(max(t - w + 1, 0) // s), lambda t: [])
        assert not np.any(blocks & near)
        assert blocks[:, :, -1].sum() == 2 * page().NUM_BLOCKS * s
        mask = blocks | near

    def run(attend):
        o, pullback = jax.vjp(attend, q, k, v)
        return o, pullback(jax.random.normal(SEED, o.shape))

    actual = jax.jit(lambda: run(functools.partial(getattr(page(), design), implementation=implementation)))()
    expected = jax.jit(lambda: run(lambda q, k, v: masked(q, k, v, jnp.asarray(mask))[0]))()
    assert_trees_close(actual, expected, 1e-5)


def test_a_softmax_over_merged_parts_has_the_parts_weights_whatever_their_sizes():
    """One part sees nothing; the lse of the others lie far apart."""
    o = jax.random.normal(SEED, (3, 1, 2, 4, 8))
    lse = jnp.array([-jnp.inf, 300.0, 301.0])[:, None, None, None] + jnp.zeros((3, 1, 4, 2))
    actual = page().merged(*zip(o, lse, strict=True))
    assert normwise_error(actual, (o[1] + np.e * o[2]) / (1 + np.e)) < 1e-6


# Transformations, meshes and backends


def test_lse_is_there_under_vmap_and_remat():
    q, k, v, _ = problem(T=40, B=2)
    blocks = random_blocks(2, q, k)

    def both(q, k, v, blocks):
        options = {"config": CONFIG, "return_lse": True, "implementation": "xla"}
        return selected_attention(q, k, v, blocks, **options), window_attention(q, k, v, **options)

    rows = jax.vmap(lambda *row: both(*(x[None] for x in row)))
    mapped = jax.tree.map(lambda x: x[:, 0], jax.jit(jax.checkpoint(rows))(q, k, v, blocks))
    assert_trees_close(mapped, jax.jit(both)(q, k, v, blocks), 1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("bare", [False, True])
def test_lse_is_split_over_rows_and_heads_as_o_is(kind, bare):
    q, k, v, _ = problem(T=40, B=2)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(kind,) * 2)
    for op, blocks in ((selected_attention, [random_blocks(2, q, k)]), (window_attention, [])):
        expected = results(op, q, k, v, *blocks, implementation="xla")
        splits = [("data", None, "tensor", None)] * 3 + [("data", "tensor", None, None)]
        with jax.set_mesh(mesh):
            placed = [
                jax.device_put(x, NamedSharding(mesh, PartitionSpec(*split)))
                for x, split in zip((q, k, v, *blocks), splits, strict=False)
            ]
            split_op = op if bare else sharded(op, batch_axes="data", head_axes="tensor")
            run = jax.jit(functools.partial(split_op, config=CONFIG, return_lse=True, implementation="xla"))
            _, lse = run(*placed)
            assert kind == AxisType.Auto or lse.sharding.spec[:2] == ("data", "tensor")
            assert bare or lse.sharding.shard_shape(lse.shape) == (1, 2, 40)
            actual = jax.device_get(run(*placed))
        assert_trees_close(actual, jax.device_get(expected[:2]), 1e-5)


def without_lse(op):
    return lambda *args, **kwargs: getattr(backends.get("xla"), op)(*args, **kwargs)[0]


@pytest.mark.parametrize("differentiable", [True, False])
def test_a_backend_that_returns_o_alone_is_passed_over_where_lse_is_asked_for(differentiable):
    q, k, v, _ = problem(T=20)
    mine = SimpleNamespace(name="mine", differentiable=differentiable, window_attention=without_lse("window_attention"))
    backends.register(mine)
    try:
        ask = functools.partial(backends.explain, window_attention, q, k, v, config=CONFIG)
        assert ask()["window_attention"].backend == "mine"
        chosen = ask(return_lse=True)["window_attention"]
        assert chosen.backend == "xla"
        assert dict(chosen.refusals)["mine"] == "returns no lse"
        with pytest.raises(NotImplementedError, match="implementation = 'mine': window_attention: returns no lse"):
            window_attention(q, k, v, config=CONFIG, return_lse=True, implementation="mine")
    finally:
        backends.unregister("mine")


def test_gradients_of_lse_go_to_the_first_backend_that_can_give_them():
    """The forward pass is a kernel that leaves lse; behind it stands pure JAX that gives none, and then XLA."""
    q, k, v, _ = problem(T=40)
    expected = results(window_attention, q, k, v, implementation="reference")
    kernel = SimpleNamespace(name="kernel", window_attention=backends.get("xla").window_attention)
    mine = SimpleNamespace(name="mine", differentiable=True, window_attention=without_lse("window_attention"))
    backends.register(mine)
    backends.register(kernel)
    try:
        chosen = backends.explain(
            jax.grad(lambda q: window_attention(q, k, v, config=CONFIG, return_lse=True)[1].sum()), q
        )
        assert chosen["window_attention"].backend == "kernel"
        assert chosen["window_attention_backward"].backend == "xla"
        assert_trees_close(results(window_attention, q, k, v), expected, 1e-5)
    finally:
        backends.unregister("kernel")
        backends.unregister("mine")


def test_too_many_blocks_are_refused_by_name():
    q, k, v = (jax.ShapeDtypeStruct((1, 64, heads, 64), jnp.float32) for heads in (4, 4, 4))
    blocks = jax.ShapeDtypeStruct((1, 4, 64, 70000), jnp.int32)
    attend = functools.partial(nsa_jax.selected_attention, config=CONFIG, implementation="triton")
    with pytest.raises(NotImplementedError, match=r"block_indices.shape\[3\] = 70000: expected at most 65536"):
        jax.eval_shape(attend, q, k, v, blocks)
