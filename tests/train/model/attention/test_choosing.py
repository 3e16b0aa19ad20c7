"""The designs that the paper argues against: what they choose, that they are causal and that they learn."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import SMALL

from nsa_jax import NSAConfig
from nsa_jax.attention import AttentionInputs
from nsa_jax.testing import random_inputs
from nsa_jax.visibility import segment_starts
from train.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from train.loop import run
from train.metrics import read_metrics
from train.model.attention import attention_kind, scores
from train.model.attention.choosing import Choice, measured_selection, sampled_positions
from train.model.attention.clustering import ITERATIONS
from train.model.attention.kind import Split, make_attention
from train.model.auxiliary import LOSSES, total_loss
from train.model.flops import train_flops_per_token
from train.model.transformer import init_caches
from train.parallel.communication import collectives, received_bytes
from train.parallel.lowering import compile_here
from train.parallel.sharding import check_divisible, make_mesh, tree_shardings
from train.parallel.traffic import predicted_bytes
from train.prepare import prepare
from train.presets import tiny

DESIGNS = ("per-head", "per-token", "min-max", "clustering", "auxiliary-loss")
EVERY_DESIGN = pytest.mark.parametrize("name", DESIGNS)
SIZES = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=4, window=10)
MODEL = dataclasses.replace(SMALL, num_heads=4, num_kv_heads=2, nsa=SIZES)
B, T, H, K = 2, 45, 4, 2  # the last block is not full
SEGMENTS = np.array([[0] * T, [0] * 20 + [1] * (T - 20)], np.int32)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of queries, the last of them not full."""
    monkeypatch.setattr(scores, "CHUNK_ELEMENTS", 8 * B * H * T)


def layer_of(name):
    return make_attention(dataclasses.replace(MODEL, attention=name))


def config_of(name):
    return layer_of(name).config


def random_choice(name):
    """A `Choice` of random arrays, among them an indexer's."""
    q, kv, *_ = random_inputs(jax.random.key(0), SIZES, B=B, T=T, num_heads=H, num_kv_heads=K, head_dim=8)
    index_q, index_k = (
        jax.random.normal(jax.random.key(seed), (B, count, K, 8)) for seed, count in ((1, T), (2, -(-T // 4)))
    )
    segments = jnp.asarray(SEGMENTS)
    own = {"q": index_q, "k": index_k} if name == "auxiliary-loss" else {}
    lse = jnp.asarray(numpy_compressed(np.asarray(q), np.asarray(kv.cmp_k))[1])
    return Choice(q, kv, lse, segment_starts(segments), segments, own)


def probabilities(q, k, seen):
    """Softmax [H, T, N] of queries [T, H, D] over keys [N, K, D] where seen [T, N], and its lse; NumPy."""
    logits = np.einsum("thd,nhd->htn", q, np.repeat(k, H // K, axis=1)) / np.sqrt(q.shape[-1])
    weights = np.where(seen, np.exp(logits), 0)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return weights / np.where(total > 0, total, 1), np.log(total[..., 0])


def numpy_compressed(q, k):
    """Probabilities [B, H, T, Nc] of compressed tokens, and lse [B, H, T]."""
    found = []
    for row in range(B):
        start, first = np.asarray(segment_starts(jnp.asarray(SEGMENTS)))[row], 2 * np.arange(k.shape[1])
        seen = (first >= start[:, None]) & (first + 3 <= np.arange(T)[:, None])
        found.append(probabilities(q[row], k[row], seen))
    return tuple(np.stack(part).astype(np.float32) for part in zip(*found, strict=True))


def forced_and_own(t, start):
    """NSA's forced blocks for a query, and its own block."""
    own, first = t // 4, start // 4
    return {j for j in range(first, own + 1) if j < first + SIZES.num_init or j > own - SIZES.num_local}, own


def best_blocks(score, t, start, *, whole):
    """The tokens of n blocks: the forced ones and the highest of the others, of those seen whole if `whole`."""
    forced, own = forced_and_own(t, start)
    others = [j for j in range(start // 4, own + 1) if j not in forced and (not whole or 4 * j + 3 <= t)]
    chosen = forced | set(sorted(others, key=lambda j: (-score[j], j))[: SIZES.num_selected - len(forced)])
    return {token for j in chosen for token in range(4 * j, 4 * j + 4) if start <= token <= t}


def best_tokens(score, t, start):
    """The n s tokens of highest score, of which those of the forced blocks take up places even after t."""
    forced, _ = forced_and_own(t, start)
    places = SIZES.num_selected * 4 - 4 * len(forced)
    kept = {token for j in forced for token in range(4 * j, 4 * j + 4) if token <= t}
    others = [token for token in range(start, t + 1) if token // 4 not in forced]
    return kept | set(sorted(others, key=lambda token: (-score[token], token))[:places])


def oracle(name, choice, row, head, t):
    """The tokens that a query reads, by head for `per-head` and by group for the others."""
    q, start = np.asarray(choice.q)[row], int(choice.starts[row, t])
    keys, group = np.asarray(choice.kv.slc_k)[row], head // (H // K)
    heads = [2 * group, 2 * group + 1]
    if name == "per-head":
        p = numpy_compressed(np.asarray(choice.q), np.asarray(choice.kv.cmp_k))[0][row, head, t]
        strides = [sum(p[i] for i in (c - 1, c) if 0 <= i < len(p)) for c in range(2 * -(-T // 4))]
        return best_blocks(np.add.reduceat(strides, range(0, len(strides), 2)), t, start, whole=False)
    if name == "per-token":
        seen = (np.arange(T) <= np.arange(T)[:, None]) & (np.arange(T) >= start)
        return best_tokens(probabilities(q, keys, seen)[0][heads, t].sum(0), t, start)
    if name == "auxiliary-loss":
        return best_blocks(
            np.asarray(choice.own["k"])[row, :, group] @ choice.own["q"][row, t, group], t, start, whole=True
        )
    if name == "min-max":
        blocks = [keys[j : j + 4, group] for j in range(0, T, 4)]
        bounds = [
            sum(np.maximum(q[t, h] * block.min(0), q[t, h] * block.max(0)).sum() for h in heads) for block in blocks
        ]
        return best_blocks(bounds, t, start, whole=True)
    end = t // 8 * 8  # clustered every two blocks, because the window of 10 holds no third
    score = np.full(T, -np.inf)
    for begin in {0, start} if row else {0}:
        for members, centroid in numpy_clusters(keys[:, group], begin, min(end, start if begin < start else end)):
            score[members] = sum(q[t, h] @ centroid for h in heads)
    return best_tokens(score, t, start)


def numpy_clusters(keys, begin, end):
    """Members and centroid of every cluster of the keys begin .. end - 1, by k-means from blocks on."""
    if end <= begin:
        return []
    tokens, directions = np.arange(begin, end), keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    centroids = np.stack([keys[j : j + 4].mean(0) for j in range(begin, end, 4)])
    for _ in range(ITERATIONS):
        cosine = directions[begin:end] @ (centroids / np.linalg.norm(centroids, axis=-1, keepdims=True)).T
        members = [tokens[cosine.argmax(1) == j] for j in range(len(centroids))]
        centroids = np.stack([keys[m].mean(0) if len(m) else c for m, c in zip(members, centroids, strict=True)])
    return list(zip(members, centroids, strict=True))


@EVERY_DESIGN
def test_a_query_reads_what_a_few_lines_of_numpy_choose(name):
    choice, kind = random_choice(name), attention_kind(name)
    read = np.asarray(jax.jit(lambda c: kind.tokens_read(c, jnp.arange(T), config_of(name)))(choice))
    heads = H if name == "per-head" else K
    assert read.shape == (B, heads, T, T)
    for row, head, t in np.ndindex(B, heads, T):
        expected = oracle(name, choice, row, head * (H // heads), t)
        assert set(np.flatnonzero(read[row, head, t])) == expected, (row, head, t)


@EVERY_DESIGN
def test_attention_is_the_softmax_over_what_is_read(name):
    choice, kind = random_choice(name), attention_kind(name)
    o, read = jax.jit(lambda c: (kind.attend(c, config_of(name)), kind.tokens_read(c, jnp.arange(T), config_of(name))))(
        choice
    )
    read = np.repeat(np.asarray(read), H // read.shape[1], axis=1)
    for row in range(B):
        weights, _ = probabilities(np.asarray(choice.q)[row], np.asarray(choice.kv.slc_k)[row], read[row])
        values = np.repeat(np.asarray(choice.kv.slc_v)[row], H // K, axis=1)
        np.testing.assert_allclose(o[row], np.einsum("hts,shd->thd", weights, values), atol=2e-5)


@EVERY_DESIGN
def test_as_many_tokens_are_read_as_with_nsa(name):
    choice, kind = random_choice(name), attention_kind(name)
    read = np.asarray(jax.jit(lambda c: kind.tokens_read(c, jnp.arange(T), config_of(name)))(choice)).sum(-1)[0]
    s, n, t = SIZES.select_block, SIZES.num_selected, np.arange(T)
    np.testing.assert_array_equal(read, np.broadcast_to(t % s + 1 + s * np.minimum(t // s, n - 1), read.shape))
    assert kind.keys_read(MODEL, T).tolist() == attention_kind("nsa").keys_read(MODEL, T).tolist()


@EVERY_DESIGN
def test_later_tokens_and_other_documents_change_neither_choice_nor_output(name):
    layer = layer_of(name)
    x = jax.random.normal(jax.random.key(0), (B, T, MODEL.embed_dim))
    variables = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(1), x))["params"]
    output = jax.jit(lambda x: layer.apply({"params": variables}, x, segment_ids=jnp.asarray(SEGMENTS)))
    before = np.asarray(output(x))
    for t in (1, 15, 16, 31, 42):
        after = np.asarray(output(x.at[:, t:].set(100 * x[:, t:][:, ::-1])))
        np.testing.assert_allclose(after[:, :t], before[:, :t], rtol=1e-5, atol=1e-6)
        assert not np.allclose(after[:, t:], before[:, t:])
    after = np.asarray(output(x.at[1, :20].set(-5 * x[1, :20])))
    np.testing.assert_allclose(after[1, 20:], before[1, 20:], rtol=1e-5, atol=1e-6)


@EVERY_DESIGN
def test_gradients_are_finite_and_reach_every_parameter(name):
    layer = layer_of(name)
    x = jax.random.normal(jax.random.key(0), (B, T, MODEL.embed_dim))
    params = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(1), x))["params"]

    def objective(params, x):
        y, left = layer.apply({"params": params}, x, segment_ids=jnp.asarray(SEGMENTS), mutable=[LOSSES])
        return jnp.sum(jnp.sin(y)) + total_loss(left)

    grads, of_input = jax.jit(jax.grad(objective, argnums=(0, 1)))(params, x)
    assert set(grads) >= {"q_kernel", "k_kernel", "gate_in_kernel"}
    for leaf in jax.tree.leaves((grads, of_input)):
        assert np.isfinite(leaf).all()
        assert np.any(leaf != 0)


@pytest.mark.parametrize(
    ("name", "explicit"),
    [
        ("auxiliary-loss", True),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in itertools.product(DESIGNS, (False, True))
            if case != ("auxiliary-loss", True)
        ),
    ],
)
def test_a_mesh_computes_what_one_device_does(name, explicit):
    layer = layer_of(name)
    x = jax.random.normal(jax.random.key(0), (4, T, MODEL.embed_dim))
    boxed = jax.jit(layer.init)(jax.random.key(1), x)
    params = nn.meta.unbox(boxed)["params"]

    def objective(params, x):
        y, left = layer.apply({"params": params}, x, mutable=[LOSSES])
        return jnp.sum(jnp.sin(y)) + total_loss(left)

    expected = jax.jit(jax.value_and_grad(objective))(params, x)
    mesh = make_mesh(MeshConfig(data=4, tensor=2, explicit=explicit))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(boxed["params"], mesh))
        found = jax.jit(jax.value_and_grad(objective))(placed, x)
    for here, there in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-4)


@pytest.mark.exhaustive
@EVERY_DESIGN
def test_a_choice_sends_nothing(name):
    config = TrainConfig(
        model=dataclasses.replace(MODEL, embed_dim=32, head_dim=32, implementation="xla"),
        data=DataConfig(batch_size=8, sequence_length=64, isolate_documents=False),
        optimizer=OptimizerConfig(warmup_steps=0),
    )
    mesh, sent, predicted = make_mesh(MeshConfig(data=4, tensor=2)), [], []
    for kind in ("nsa", name):
        run_config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=kind))
        sent.append(sum(received_bytes(collectives(compile_here(run_config, 50, mesh).as_text())).values()))
        predicted.append(sum(predicted_bytes(run_config, 50, mesh.shape).values()))
    # The gradients of an indexer are summed over the devices, as those of all parameters are.
    assert sent[1] - sent[0] == pytest.approx(predicted[1] - predicted[0], abs=200)


# The measures of every design are counted in another test. A run adds a loss of its own.
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.exhaustive] * (name != "auxiliary-loss")) for name in DESIGNS],
)
def test_a_run_trains_measures_its_selection_and_makes_no_sample(name, tmp_path):
    model = dataclasses.replace(MODEL, attention=name, num_layers=2)
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} " * 200)
    config = TrainConfig(
        model=model,
        data=DataConfig(path=str(tmp_path / "text"), sequence_length=64, batch_size=8, held_out_fraction=0.3),
        optimizer=OptimizerConfig(warmup_steps=1),
        run_dir=tmp_path / "run",
        steps=2,
        eval_batches=1,
        position_buckets=0,
    )
    result = run(prepare(config), plain=True)
    assert result.sample == ""
    assert "sample" not in result.files
    first, last = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert np.isfinite(first["loss"])
    assert np.isfinite(last["held_out_loss"])
    assert ("loss_of_layers" in first) == (name == "auxiliary-loss")
    least = attention_kind(name).decoded_bytes(model, 64)
    for layer, head in np.ndindex(2, 2):
        read, imbalance = (last[f"{what}/{layer}/{head}"] for what in ("decoded_bytes", "selection_imbalance"))
        assert read > least if name == "per-head" else read == pytest.approx(least)
        assert imbalance > 1 if name == "clustering" else imbalance == 1


@EVERY_DESIGN
def test_decoding_a_split_of_the_tokens_and_no_selected_branch_are_refused_by_name(name):
    model = dataclasses.replace(MODEL, attention=name)
    with pytest.raises(ValueError, match=rf"model.attention = {name}: expected a kind that decodes"):
        init_caches(model, batch_size=1, max_length=8)
    config = dataclasses.replace(tiny(), model=dataclasses.replace(model, mlp_dim=64), mesh=MeshConfig(context=2))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=8))
    with pytest.raises(ValueError, match=rf"mesh.context = 2: expected 1 with model.attention = {name}"):
        check_divisible(config, 64, 8)
    nothing = dataclasses.replace(model, mlp_dim=64, nsa=dataclasses.replace(SIZES, num_selected=0))
    with pytest.raises(ValueError, match=rf"num_selected = 0: expected at least 1 with model.attention = {name}"):
        check_divisible(dataclasses.replace(config, model=nothing, mesh=MeshConfig()), 64, 8)
    assert attention_kind(name).received_over_context(model, Split(64, 1, 1, 4)) == 0


@EVERY_DESIGN
def test_union_and_imbalance_are_counted(name):
    choice, kind = random_choice(name), attention_kind(name)
    inputs = AttentionInputs(choice.q, choice.kv, jnp.ones((B, T, H, 3)), choice.segment_ids)
    found = jax.jit(lambda c: measured_selection(kind, c, inputs, config_of(name)))(choice)
    sampled = np.asarray(sampled_positions(T))
    for group in range(K):
        together, alone = 0, 0
        for row, t in itertools.product(range(B), sampled.tolist()):
            read = [oracle(name, choice, row, head, t) for head in (2 * group, 2 * group + 1)]
            together, alone = together + len(read[0] | read[1]), alone + (len(read[0]) + len(read[1])) / 2
        assert found.union[group] == pytest.approx(together / alone)
        assert name != "per-head" or found.union[group] > 1.1
    expected = [1.0, 1.0]
    if name == "clustering":
        keys = np.asarray(choice.kv.slc_k)
        last = [[(0, 40)], [(0, 20), (20, 40)]]  # the documents of each row, up to where it is clustered the last time
        for group in range(K):
            rows = []
            for row, documents in enumerate(last):
                sizes = [len(m) for part in documents for m, _ in numpy_clusters(keys[row, :, group], *part)]
                rows.append(max(sizes) / (sum(sizes) / sum(size > 0 for size in sizes)))
            expected[group] = np.mean(rows)
    np.testing.assert_allclose(found.imbalance, expected, rtol=1e-6)


def test_the_auxiliary_loss_is_the_divergence_from_the_attention_to_blocks_that_are_free_to_choose():
    choice, kind = random_choice("auxiliary-loss"), attention_kind("auxiliary-loss")
    terms = []
    for row in range(B):
        q, keys = np.asarray(choice.q)[row], np.asarray(choice.kv.slc_k)[row]
        starts = np.asarray(choice.starts)[row]
        seen = (np.arange(T) <= np.arange(T)[:, None]) & (np.arange(T) >= starts[:, None])
        p = probabilities(q, keys, seen)[0].reshape(K, 2, T, T).sum(1)
        for group, t in np.ndindex(K, T):
            forced, own = forced_and_own(t, starts[t])
            free = [j for j in range(starts[t] // 4, own + 1) if j not in forced and 4 * j + 3 <= t]
            if not free:
                terms.append(0.0)
                continue
            target = np.array([p[group, t, 4 * j : 4 * j + 4].sum() for j in free])
            score = np.asarray(choice.own["k"])[row, free, group] @ choice.own["q"][row, t, group] / np.sqrt(8)
            target, predicted = target / target.sum(), np.exp(score) / np.exp(score).sum()
            terms.append((target * np.log(target / predicted)).sum())
    assert len(terms) == B * K * T
    found = jax.jit(lambda c: kind.loss(c, config_of("auxiliary-loss")))(choice)
    np.testing.assert_allclose(found, np.reshape(terms, (B, K, T)).mean(axis=-1), rtol=1e-4)


def test_the_auxiliary_loss_trains_the_indexer_and_nothing_else_does():
    layer = layer_of("auxiliary-loss")
    x = jax.random.normal(jax.random.key(0), (B, T, MODEL.embed_dim))
    params = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(1), x))["params"]

    @jax.jit
    def gradients(params, x):
        def parts(params, x):
            y, left = layer.apply({"params": params}, x, mutable=[LOSSES])
            return jnp.stack([jnp.sum(jnp.sin(y)), total_loss(left)])

        return jax.jacrev(parts, argnums=(0, 1))(params, x)

    of_params, of_input = gradients(params, x)
    for name, (of_output, of_loss) in of_params.items():
        assert np.any(of_loss != 0) == name.startswith("index_"), name
        assert np.any(of_output != 0) != name.startswith("index_"), name
    assert not np.any(of_input[1])


def test_work_to_choose_is_counted_by_hand():
    t, model = np.arange(T), dataclasses.replace(MODEL, v_head_dim=12)
    selected = t % 4 + 1 + 4 * np.minimum(t // 4, 3)
    clustered = t // 8 * 8  # keys in clusters of 4 on average, when the query at t comes
    kmeans = sum(2 * ITERATIONS * n * (n // 4) for n in range(0, T, 8))
    forward = {
        "nsa": 0,
        "per-head": 0,
        "min-max": K * 2 * 8 * ((t + 1) // 4).sum(),
        "per-token": H * 8 * (t + 1 - selected).sum(),
        "clustering": K * 8 * (kmeans + (clustered // 4).sum()),
        "auxiliary-loss": H * 8 * (t + 1).sum(),
    }
    nsa = attention_kind("nsa").multiply_adds(model, T)
    flops = train_flops_per_token(dataclasses.replace(model, attention="nsa"), T, 50)
    for name, expected in forward.items():
        kind = attention_kind(name)
        assert kind.multiply_adds_without_backward(model, T) == pytest.approx(expected / T)
        indexer = K * 8 * (2 * 16 * T + ((t + 1) // 4).sum()) / T if name == "auxiliary-loss" else 0
        assert kind.multiply_adds(model, T) == pytest.approx(nsa + indexer)
        found = train_flops_per_token(dataclasses.replace(model, attention=name), T, 50)
        assert found == pytest.approx(flops + 6 * indexer + 2 * expected / T)


def test_a_model_without_a_window_has_finite_gradients():
    layer = make_attention(dataclasses.replace(MODEL, attention="clustering", nsa=dataclasses.replace(SIZES, window=0)))
    x = jax.random.normal(jax.random.key(0), (B, T, MODEL.embed_dim))
    params = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(1), x))["params"]
    grads = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(layer.apply({"params": params}, x)))))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_bytes_of_a_decoded_token_are_counted_by_hand():
    model, length, itemsize = dataclasses.replace(MODEL, v_head_dim=12), 45, 4
    compressed, selected, window = (45 - 4) // 2 + 1, 13, 10  # three blocks and one token of the query's own
    nsa = (compressed + selected + window) * (8 + 12) * itemsize
    more = {
        "nsa": 0,
        "per-head": 0,
        "min-max": 2 * 12 * 8 * itemsize,  # 12 blocks
        "per-token": (45 - 13) * 8 * itemsize,
        "clustering": 10 * 8 * itemsize,  # of the 40 tokens before the last interval
        "auxiliary-loss": 12 * 8 * itemsize,
    }
    for name, choosing_bytes in more.items():
        kind = attention_kind(name)
        assert kind.decoded_bytes(model, length) == nsa + choosing_bytes
        twice = nsa + selected * (8 + 12) * itemsize + choosing_bytes
        assert kind.decoded_bytes(model, length, union=2.0) == twice
        in_8_bits = (compressed + selected) * (8 + 4 + 12 + 4) + window * (8 + 12) * itemsize + choosing_bytes
        assert kind.decoded_bytes(model, length, kv_dtype="int8") == in_8_bits
    assert attention_kind("full").decoded_bytes(model, length) == 45 * 20 * itemsize
    assert attention_kind("window").decoded_bytes(model, length) == 10 * 20 * itemsize
