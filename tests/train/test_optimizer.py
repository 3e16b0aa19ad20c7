import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nsa_jax import NSAConfig
from nsa_jax.testing import normwise_error
from train.config import ModelConfig, MoEConfig, OptimizerConfig
from train.model.transformer import Transformer
from train.optimizer import decays, learning_rate_schedule, make_optimizer, matrix_dimensions


def test_learning_rate_warms_up_peaks_and_ends_where_the_config_says():
    config = OptimizerConfig(learning_rate=2e-3, final_fraction=0.1, warmup_steps=10)
    rate = learning_rate_schedule(config, steps=110)
    at = {update: float(rate(update - 1)) for update in (1, 5, 10, 60, 110, 500)}  # updates count from 1
    expected = {1: 2e-4, 5: 1e-3, 10: 2e-3, 60: 2e-3 * (0.1 + 0.9 * 0.5), 110: 2e-4, 500: 2e-4}
    assert at == pytest.approx(expected, rel=1e-5)


def test_without_warm_up_the_first_update_has_nearly_the_whole_rate():
    rate = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=0), steps=1000)
    assert float(rate(0)) == pytest.approx(1.0, abs=1e-4)


def parameters_of(config):
    """The shapes of a model's parameters."""
    model, tokens = Transformer(config, 50), jnp.zeros((1, 64), jnp.int32)
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))["params"]


def test_decay_touches_kernels_and_embeddings_and_nothing_else():
    params = parameters_of(ModelConfig(num_layers=2, tie_embeddings=False, compression="mlp"))
    names = {path[-1].key: decays(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    decayed = {name for name, yes in names.items() if yes}
    assert {"embedding", "output_kernel", "q_kernel", "o_kernel", "down_kernel", "phi_k_in_kernel"} <= decayed
    assert set(names) - decayed == {
        "scale",
        "phi_k_position",
        "phi_v_position",
        "phi_k_in_bias",
        "phi_k_out_bias",
        "phi_v_in_bias",
        "phi_v_out_bias",
        "gate_in_bias",
        "gate_out_bias",
    }


def test_a_parameter_whose_name_says_nothing_is_refused():
    with pytest.raises(ValueError, match=r"parameter .*mystery.*does not say whether weight decay applies"):
        make_optimizer(OptimizerConfig(), 100).init({"mystery": jnp.ones(3)})


def test_wsd_stays_at_the_peak_and_decays_in_a_line_at_the_end():
    config = OptimizerConfig(
        learning_rate=2e-3, final_fraction=0.0, warmup_steps=10, schedule="wsd", decay_fraction=0.2
    )
    rate = learning_rate_schedule(config, steps=100)
    at = {update: float(rate(update - 1)) for update in (1, 5, 10, 50, 80, 90, 100)}
    assert at == pytest.approx({1: 2e-4, 5: 1e-3, 10: 2e-3, 50: 2e-3, 80: 2e-3, 90: 1e-3, 100: 0.0}, abs=1e-9)


CONFIGS = [
    OptimizerConfig(
        kind="adamw",
        learning_rate=0.03,
        final_fraction=0.4,
        warmup_steps=2,
        b1=0.8,
        b2=0.7,
        weight_decay=0.5,
        clip_norm=4.0,
    ),
    OptimizerConfig(
        kind="muon",
        learning_rate=0.03,
        schedule="wsd",
        decay_fraction=0.6,
        final_fraction=0.4,
        warmup_steps=2,
        muon_beta=0.8,
        muon_rms=0.5,
        b1=0.8,
        b2=0.7,
        weight_decay=0.5,
        clip_norm=4.0,
    ),
]


def test_the_configs_that_are_compared_with_numpy_leave_no_field_at_its_default():
    of_the_step = {"accumulate", "z_loss"}  # see test_step.py
    for field in dataclasses.fields(OptimizerConfig):
        changed = any(getattr(config, field.name) != field.default for config in CONFIGS)
        assert changed or field.name in of_the_step, field.name


def orthogonalised(matrix):
    """Five Newton-Schulz steps (Jordan et al., 2024)."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_three_updates_equal_those_written_out_in_numpy(config):
    """Decoupled decay of matrices, bias correction, Nesterov momentum in Muon; the gradient is clipped as a whole."""
    draw = np.random.default_rng(0)
    shapes = {"embedding": (5, 3), "layers": {"up_kernel": (2, 3, 4), "scale": (2, 3)}}
    params = jax.tree.map(draw.standard_normal, shapes, is_leaf=lambda x: isinstance(x, tuple))
    optimizer = make_optimizer(config, steps=5)
    actual = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state = optimizer.init(actual)
    leaves, tree = jax.tree.flatten(params)  # embedding, scale, up_kernel
    decayed = [True, False, True]
    first, second, momentum = ([np.zeros_like(x) for x in leaves] for _ in range(3))
    # 0.03 after two steps of warm-up; then a third of the way down to 0.4 of it, in a cosine or in a line
    rates = {"cosine": (0.015, 0.03, 0.012 + 0.018 * 0.75), "wsd": (0.015, 0.03, 0.012 + 0.018 * 2 / 3)}
    for t, (rate, size) in enumerate(zip(rates[config.schedule], (9.0, 1.0, 0.1), strict=True), 1):
        gradients = [size * draw.standard_normal(x.shape) for x in leaves]
        updates, state = optimizer.update(
            jax.tree.unflatten(tree, [jnp.asarray(x, jnp.float32) for x in gradients]), state, actual
        )
        actual = optax.apply_updates(actual, updates)
        norm = np.sqrt(sum(np.sum(g**2) for g in gradients))
        assert (norm > config.clip_norm) == (t < 3)
        for i, g in enumerate(gradients):
            g = g * min(1.0, config.clip_norm / norm)
            if leaves[i].ndim == 3 and config.kind == "muon":
                beta = config.muon_beta
                momentum[i] = beta * momentum[i] + (1 - beta) * g
                ahead = beta * momentum[i] / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
                step = config.muon_rms * np.sqrt(4) * np.stack([orthogonalised(x) for x in ahead])
            else:
                first[i] = config.b1 * first[i] + (1 - config.b1) * g
                second[i] = config.b2 * second[i] + (1 - config.b2) * g**2
                step = first[i] / (1 - config.b1**t) / (np.sqrt(second[i] / (1 - config.b2**t)) + 1e-8)
            leaves[i] = leaves[i] - rate * (step + config.weight_decay * leaves[i] * decayed[i])
        for x, y in zip(jax.tree.leaves(actual), leaves, strict=True):
            assert normwise_error(x, y) < 1e-5, t


def test_muon_takes_each_matrix_from_what_it_sums_over_to_what_it_makes():
    """All but the embedding, the output layer, norms, biases, positions and the router, which are AdamW's."""
    L, E, H, K, D, V, M, block = 3, 28, 6, 2, 10, 14, 44, 8
    config = ModelConfig(
        num_layers=L,
        embed_dim=E,
        num_heads=H,
        num_kv_heads=K,
        head_dim=D,
        v_head_dim=V,
        mlp_dim=M,
        qk_norm=True,
        tie_embeddings=False,
        compression="mlp",
        share_kv=False,
        nsa=NSAConfig(compress_block=block, compress_stride=4, select_block=8, num_selected=3, window=6),
    )
    expected = {"q_kernel": (E, H * D), "o_kernel": (H * V, E), "gate_in_kernel": (E, E // 4)}
    expected |= {"gate_out_kernel": (E // 4, 3 * H), "gate_kernel": (E, M), "up_kernel": (E, M), "down_kernel": (M, E)}
    mlp = {f"{branch}_k_kernel": (E, K * D) for branch in ("cmp", "slc", "win")}
    mlp |= {f"{branch}_v_kernel": (E, K * V) for branch in ("cmp", "slc", "win")}
    mlp |= {"phi_k_in_kernel": (block * D, 2 * D), "phi_v_in_kernel": (block * V, 2 * V)}
    mlp |= {"phi_k_out_kernel": (2 * D, D), "phi_v_out_kernel": (2 * V, V)}
    assert _matrices(config) == {name: (L, *sizes) for name, sizes in (expected | mlp).items()}

    X, N, Y = 26, 4, 2  # width, routed and shared experts
    config = dataclasses.replace(
        config, compression="linear", share_kv=True, moe=MoEConfig(num_routed=N, num_shared=Y, expert_dim=X)
    )
    expected = {name: (L, *sizes) for name, sizes in expected.items()}
    linear = {"k_kernel": (E, K * D), "v_kernel": (E, K * V)}
    linear |= {"phi_k_in_kernel": (block * D, D), "phi_v_in_kernel": (block * V, V)}
    shared = {"shared_gate_kernel": (E, Y * X), "shared_up_kernel": (E, Y * X), "shared_down_kernel": (Y * X, E)}
    experts = {"gate_kernel": (L * N, E, X), "up_kernel": (L * N, E, X), "down_kernel": (L * N, X, E)}
    assert _matrices(config) == expected | experts | {name: (L, *sizes) for name, sizes in (linear | shared).items()}


def _matrices(config):
    """Of each parameter of a model that Muon updates: the number of matrices, and what each takes and makes."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(parameters_of(config)):
        if (axes := matrix_dimensions(path)) is not None:
            taken, made = (
                math.prod(x.shape[axis] for axis in part) for part in (axes.reduction_axis, axes.output_axis)
            )
            found[path[-1].key] = (x.size // (taken * made), taken, made)
    return found
