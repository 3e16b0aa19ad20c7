import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.config import ModelConfig, OptimizerConfig
from train.model.transformer import Transformer
from train.optimizer import decays, learning_rate_schedule, make_optimizer


def test_learning_rate_warms_up_peaks_and_ends_where_the_config_says():
    config = OptimizerConfig(learning_rate=2e-3, final_fraction=0.1, warmup_steps=10)
    rate = learning_rate_schedule(config, steps=110)
    at = {update: float(rate(update - 1)) for update in (1, 5, 10, 60, 110, 500)}  # updates count from 1
    expected = {1: 2e-4, 5: 1e-3, 10: 2e-3, 60: 2e-3 * (0.1 + 0.9 * 0.5), 110: 2e-4, 500: 2e-4}
    assert at == pytest.approx(expected, rel=1e-5)


def test_without_warm_up_the_first_update_has_nearly_the_whole_rate():
    rate = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=0), steps=1000)
    assert float(rate(0)) == pytest.approx(1.0, abs=1e-4)


def test_decay_touches_kernels_and_embeddings_and_nothing_else():
    model = Transformer(ModelConfig(num_layers=2, tie_embeddings=False), 50)
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64), jnp.int32)))["params"]
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


def test_zero_gradient_shrinks_matrices_only_and_by_rate_times_decay():
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=0, final_fraction=1.0, weight_decay=0.1)
    optimizer = make_optimizer(config, 10)
    params = {"a_kernel": jnp.ones((2, 3)), "layers": {"scale": jnp.ones((2, 3))}}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["a_kernel"], -0.05, rtol=1e-6)
    assert np.all(updates["layers"]["scale"] == 0)


def test_a_gradient_above_the_norm_is_scaled_down_to_it():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, clip_norm=1e-6, weight_decay=0.0)
    optimizer = make_optimizer(config, 10)
    params = {"a_kernel": jnp.ones(2)}
    small, _ = optimizer.update({"a_kernel": jnp.array([3e-7, 4e-7])}, optimizer.init(params), params)
    large, _ = optimizer.update({"a_kernel": jnp.array([3e3, 4e3])}, optimizer.init(params), params)
    clipped, _ = optimizer.update({"a_kernel": jnp.array([6e-7, 8e-7])}, optimizer.init(params), params)
    # Adam divides the scale out, up to its epsilon of 1e-8, which these sizes make visible.
    np.testing.assert_allclose(large["a_kernel"], clipped["a_kernel"], rtol=1e-5)
    assert np.all(np.abs(small["a_kernel"]) < np.abs(large["a_kernel"]))


def test_wsd_stays_at_the_peak_and_decays_in_a_line_at_the_end():
    config = OptimizerConfig(
        learning_rate=2e-3, final_fraction=0.0, warmup_steps=10, schedule="wsd", decay_fraction=0.2
    )
    rate = learning_rate_schedule(config, steps=100)
    at = {update: float(rate(update - 1)) for update in (1, 5, 10, 50, 80, 90, 100)}
    assert at == pytest.approx({1: 2e-4, 5: 1e-3, 10: 2e-3, 50: 2e-3, 80: 2e-3, 90: 1e-3, 100: 0.0}, abs=1e-9)


def gradients_like(params):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    return jax.tree.unflatten(tree, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@functools.cache
def first_update(kind):
    model = Transformer(ModelConfig(num_layers=2, qk_norm=True, tie_embeddings=False), 50)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64), jnp.int32)))["params"]
    config = OptimizerConfig(kind=kind, learning_rate=1.0, warmup_steps=0, weight_decay=0.0)
    optimizer = make_optimizer(config, 10_000)
    updates, _ = jax.jit(optimizer.update)(gradients_like(params), optimizer.init(params), params)
    return updates


def test_muon_orthogonalises_the_matrix_of_every_layer_by_itself():
    updates = first_update("muon")
    for name, kernel in updates["layers"]["mlp"].items():
        for layer in kernel:
            values = np.linalg.svd(layer, compute_uv=False) / (0.2 * np.sqrt(max(layer.shape)))
            # Newton-Schulz with these coefficients takes singular values near 1, not to it.
            assert values.min() > 0.4, name
            assert values.max() < 1.4, name
    o = updates["layers"]["attention"]["o_kernel"][0]
    values = np.linalg.svd(o.reshape(-1, o.shape[-1]), compute_uv=False) / (0.2 * np.sqrt(256))
    # A square matrix has singular values near 0, which five iterations do not bring to 1.
    assert 0.6 < np.median(values) < 1.2
    assert values.max() < 1.4


def test_muon_leaves_embeddings_norms_and_the_output_layer_to_adamw():
    muon, adamw = first_update("muon"), first_update("adamw")
    same = {
        path[-1].key: bool((a == b).all())
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(muon), jax.tree.leaves(adamw), strict=True)
    }
    with_adamw = {name for name, equal in same.items() if equal}
    assert {"embedding", "output_kernel", "scale", "q_norm_scale", "slc_k_norm_scale"} <= with_adamw
    assert not any(name.endswith("_kernel") for name in with_adamw - {"output_kernel"})
    # The root mean square of an update is that of AdamW's, give or take a factor that does not depend on its shape.
    for name, update in muon["layers"]["attention"].items():
        if name.endswith("_kernel"):
            assert 0.1 < float(jnp.sqrt(jnp.mean(update**2))) < 0.4, name


def test_weight_decay_of_muon_shrinks_matrices_and_the_embedding_alike():
    config = OptimizerConfig(kind="muon", learning_rate=0.5, warmup_steps=0, final_fraction=1.0, weight_decay=0.1)
    optimizer = make_optimizer(config, 10)
    params = {"layers": {"up_kernel": jnp.ones((2, 3, 4)), "scale": jnp.ones((2, 3))}, "embedding": jnp.ones((5, 3))}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["layers"]["up_kernel"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["embedding"], -0.05, rtol=1e-6)
    assert np.all(updates["layers"]["scale"] == 0)
