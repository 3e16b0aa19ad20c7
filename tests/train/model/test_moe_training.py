"""Models with experts: a step, a run and its resumption, decoding, and the sizes of the paper's model."""

import dataclasses
import io
import shutil
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console as RichConsole

from nsa_jax import NSAConfig
from nsa_jax.testing import assert_trees_close
from train.commands.generate import Arguments, generate
from train.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)
from train.console import Console
from train.generation.sampling import Sampling
from train.loop import _introduce, run
from train.metrics import read_metrics
from train.model.flops import active_parameters, total_parameters, train_flops_per_token
from train.model.loss import cross_entropy
from train.model.moe import auxiliary_loss
from train.model.transformer import Transformer, decoding_parameters, extend, init_caches, output_kernel
from train.optimizer import decays, make_optimizer
from train.parallel.sharding import make_mesh, on_mesh, put_batch, tree_shardings
from train.prepare import prepare
from train.presets import paper_27b
from train.step import make_init, make_train_step

B, T, VOCABULARY = 8, 16, 50
MOE = MoEConfig(num_routed=4, num_shared=1, top_k=2, expert_dim=8, first_dense=1, aux_loss=0.1, bias_speed=2**-7)
MODEL = ModelConfig(
    num_layers=3,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    moe=MOE,
    attention="full",
    nsa=NSAConfig(
        compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_init=1, num_local=1, window=6
    ),
)


def batch():
    draw = np.random.default_rng(0)
    weights = (draw.random((B, T)) < 0.7).astype(np.float32)
    weights[::2] = 0  # microbatches of very unequal weight
    weights[0, 0] = 1
    return {
        "tokens": draw.integers(0, VOCABULARY, (B, T), dtype=np.int32),
        "targets": draw.integers(0, VOCABULARY, (B, T), dtype=np.int32),
        "weights": weights,
        "target_bytes": np.ones((B, T), np.int32),
    }


EVERYWHERE = dataclasses.replace(MODEL, num_layers=2, moe=dataclasses.replace(MOE, first_dense=0))


def one_step(accumulate, mesh=None, **changes):
    """State and metrics after a step, and the parameters before it."""
    model = Transformer(dataclasses.replace(EVERYWHERE, **changes), VOCABULARY)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0, clip_norm=1e9), 10)
    init, key = make_init(model, optimizer), jax.random.key(0)
    step = make_train_step(model, optimizer, accumulate=accumulate, z_loss=0.0)
    if mesh is None:
        state = jax.jit(lambda key: nn.meta.unbox(init(key)))(key)
        return *jax.jit(step)(state, jax.tree.map(jnp.asarray, batch())), state.params
    shardings = tree_shardings(jax.eval_shape(init, key), mesh)
    state = jax.jit(lambda key: nn.meta.unbox(init(key)), out_shardings=shardings)(key)
    step = on_mesh(jax.jit(step, out_shardings=(shardings, None)), mesh)
    return *step(state, put_batch(batch(), mesh, 2)), state.params


def bias(state):
    return np.asarray(state.params["layers"]["mlp"]["balance_bias"])


@pytest.fixture(scope="module")
def in_halves():
    return one_step(accumulate=2)


def test_a_step_follows_loss_and_auxiliary_loss_and_moves_the_bias_once_by_the_loads_of_the_tokens_that_count(
    in_halves,
):
    (state, metrics, initial), inputs = in_halves, batch()
    model = Transformer(EVERYWHERE, VOCABULARY)

    @jax.jit
    def by_hand(params):
        counted = inputs["weights"] > 0

        def loss(params):
            nll, auxiliary, loads = 0.0, 0.0, 0.0
            for half in (slice(0, None, 2), slice(1, None, 2)):
                hidden, left = model.apply(
                    {"params": params}, inputs["tokens"][half], counted=counted[half], mutable=["routing"]
                )
                rest = (inputs[key][half] for key in ("targets", "weights", "target_bytes"))
                nll += cross_entropy(hidden, output_kernel(params, EVERYWHERE), *rest).nll
                routing = left["routing"]["layers"]["mlp"]["sums"]
                auxiliary += auxiliary_loss(routing, MOE).sum() * counted[half].sum()
                loads += routing.assignments
            return nll / inputs["weights"].sum() + 0.1 * auxiliary / counted.sum(), loads

        return jax.grad(loss, has_aux=True)(params)

    gradient, loads = by_hand(initial)
    # The first moment is the gradient, which was not clipped, up to a factor.
    assert_trees_close(jax.tree.map(lambda x: 10 * x, state.opt_state[1][0].mu), gradient, 1e-5)
    loads = np.asarray(loads)
    assert loads.sum() == 2 * 2 * inputs["weights"].sum()
    assert np.array_equal(bias(state), np.sign(loads.mean(axis=1, keepdims=True) - loads) * 2**-7)
    uneven = loads.max(axis=1) / loads.mean(axis=1)
    assert float(metrics.router.router_load_max) == pytest.approx(uneven.max())
    assert float(metrics.router.router_load_mean) == pytest.approx(uneven.mean())


@pytest.mark.exhaustive
def test_a_step_in_microbatches_on_a_mesh_equals_the_step_on_one_device(in_halves):
    state, metrics, _ = one_step(2, make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2)), remat="full")
    expected, expected_metrics, _ = in_halves
    assert_trees_close(state.opt_state[1][0].mu, expected.opt_state[1][0].mu, 1e-5)
    assert_trees_close(metrics, expected_metrics, 1e-5)
    assert np.array_equal(bias(state), bias(expected))
    kernel = state.params["layers"]["mlp"]["gate_kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 4 // 2, 16 // 2, 8 // 2)


def test_the_bias_does_not_decay_and_router_and_bias_keep_float32(in_halves):
    initial = in_halves[2]
    paths = {path[-1].key: path for path, _ in jax.tree_util.tree_leaves_with_path(initial["layers"]["mlp"])}
    assert not decays(paths["balance_bias"])
    assert decays(paths["router_kernel"])
    config = dataclasses.replace(EVERYWHERE, dtype="bfloat16")
    kept = jax.eval_shape(lambda params: decoding_parameters(params, config), initial)["layers"][0]["mlp"]
    assert {name for name, x in kept.items() if x.dtype == jnp.float32} == {"router_kernel", "balance_bias"}


def test_decoding_through_caches_equals_the_whole_forward_pass():
    config = dataclasses.replace(MODEL, num_layers=2)
    model = Transformer(config, VOCABULARY)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 4), jnp.int32)))["params"]
    params["layers"]["mlp"]["balance_bias"] = jnp.linspace(-0.3, 0.3, 4)[None]
    tokens = jax.random.randint(jax.random.key(2), (2, T), 0, VOCABULARY)
    whole = jax.jit(lambda tokens: model.apply({"params": params}, tokens))(tokens)
    prepared = decoding_parameters(params, config)
    extend_by = jax.jit(lambda tokens, caches: extend(prepared, config, tokens, caches))
    caches, parts = init_caches(config, batch_size=2, max_length=T), []
    for begin, end in ((0, 6), (6, 12), (12, 13), (13, 14)):
        hidden, caches = extend_by(tokens[:, begin:end], caches)
        parts.append(hidden)
    assert_trees_close(jnp.concatenate(parts, axis=1), whole[:, :14], 1e-5)


@pytest.mark.exhaustive
def test_a_run_trains_logs_its_routers_resumes_bit_for_bit_and_generates(tmp_path, capsys):
    draw = np.random.default_rng(0)
    (tmp_path / "corpus").mkdir()
    for i in range(20):
        text = draw.integers(97, 123, draw.integers(20, 80)).astype(np.uint8).tobytes()
        (tmp_path / "corpus" / f"{i}.txt").write_bytes(text)
    config = TrainConfig(
        model=dataclasses.replace(EVERYWHERE, num_layers=1, attention="full"),
        data=DataConfig(path=str(tmp_path / "corpus"), sequence_length=32, batch_size=8),
        optimizer=OptimizerConfig(warmup_steps=2),
        checkpoint=CheckpointConfig(every=3),
        mesh=MeshConfig(data=2, fsdp=2, expert=2),
        run_dir=tmp_path / "run",
        steps=6,
        eval_every=6,
        eval_batches=1,
        sample_tokens=2,
    )
    result = run(prepare(config), plain=True)
    total = total_parameters(result.state.params)
    active = active_parameters(total, config.model)
    assert total - active == (4 - 2) * 3 * 16 * 8
    output = capsys.readouterr().out
    assert f"{total / 1e6:.2f}M parameters, {active / 1e6:.2f}M of them active per token" in output
    entries = read_metrics(config.run_dir / "metrics.jsonl")
    names = ("router_load_max", "router_load_mean", "router_aux_loss", "router_entropy")
    assert all(entry[name] > 0 for entry in entries for name in names)
    assert entries[-1]["loss"] < entries[0]["loss"]
    assert set(np.unique(np.abs(bias(result.state) * 2**7))) <= set(range(7))
    assert np.any(bias(result.state))

    resumed = dataclasses.replace(config, run_dir=tmp_path / "resumed", sample_tokens=0)
    shutil.copytree(config.run_dir, resumed.run_dir)
    shutil.rmtree(resumed.run_dir / "checkpoints" / "6")
    again = run(prepare(resumed), plain=True)
    assert "resuming after step 3" in capsys.readouterr().out
    for x, y in zip(jax.tree.leaves(again.state), jax.tree.leaves(result.state), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

    generate(Arguments(config.run_dir, ("ab",), sampling=Sampling(max_tokens=4)))
    assert capsys.readouterr().out.startswith("ab")


def test_parameters_and_flops_of_the_papers_model_equal_the_hand_count():
    """Written out from the shapes, for a vocabulary of 102,400 (DeepSeekMoE's) and sequences of 8,192."""
    attention = (
        2560 * 64 * 192  # queries
        + 64 * 128 * 2560  # output
        + 3 * 2560 * 4 * (192 + 128)  # keys and values of three branches
    )
    phi_kernels = (32 * 192 * 384 + 384 * 192) + (32 * 128 * 256 + 256 * 128)
    phi = phi_kernels + (32 * 192 + 384 + 192) + (32 * 128 + 256 + 128)  # position embeddings and biases
    gate_kernels = 2560 * 640 + 640 * 64 * 3
    gates = gate_kernels + 640 + 64 * 3
    norms = 2 * 2560
    dense = 3 * 2560 * 10944
    expert = 3 * 2560 * 1472
    router = 2560 * 72
    embeddings = 2 * 102_400 * 2560
    every_layer = attention + phi + gates + norms
    total = 30 * every_layer + dense + 29 * (router + 72 + (72 + 2) * expert) + 2560 + embeddings
    active = 30 * every_layer + dense + 29 * (router + 72 + (6 + 2) * expert) + 2560 + embeddings
    assert (total, active) == (26_900_692_008, 5_262_998_568)

    # Keys that the queries 0 .. 8191 read. Compressed: 16 queries each see 1 .. 510 of them, the last one 511.
    compressed = 16 * (510 * 511 // 2) + 511
    # Of the query's own block 1 .. 64 tokens, and up to 15 whole blocks before it.
    selected = 128 * (64 * 65 // 2) + 64 * 64 * (sum(range(15)) + 113 * 15)
    window = 512 * 513 // 2 + (8192 - 512) * 512
    scores_and_values = 64 * (192 + 128) * (compressed + selected + window) / 8192
    compression = 4 * 511 * phi_kernels / 8192  # phi, for 4 heads and 511 blocks
    layers = 30 * (attention + gate_kernels + scores_and_values + compression)
    mlps = dense + 29 * (router + (6 + 2) * expert)
    flops = 6 * (layers + mlps + 102_400 * 2560)

    config = paper_27b()
    model = Transformer(config.model, 102_400)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64), jnp.int32))["params"]
    assert total_parameters(shapes) == total
    assert active_parameters(total, config.model) == active
    assert train_flops_per_token(config.model, 8192, 102_400) == pytest.approx(flops, rel=1e-12)
    assert config.data.batch_size * config.data.sequence_length * config.steps == pytest.approx(270e9, rel=1e-4)

    corpus = types.SimpleNamespace(name="none", train=[], held_out=[], num_bytes=0, skipped=[])
    state = types.SimpleNamespace(params=shapes)
    mesh = types.SimpleNamespace(shape={})
    console = Console(1, plain=True)
    console._rich = RichConsole(file=io.StringIO(), highlight=False, soft_wrap=True)
    _introduce(
        types.SimpleNamespace(corpus=corpus, config=config, abstract_state=state, model=model, mesh=mesh), console
    )
    assert (
        f"{total / 1e6:.2f}M parameters, {active / 1e6:.2f}M of them active per token, {flops / 1e6:.2f} MFLOPs"
        in console._rich.file.getvalue()
    )
