"""`save_attention` keeps what attention computed and changes no gradient."""

import jax
import jax.numpy as jnp
import pytest

from nsa_jax import FullAttention, NSAConfig, nsa_attention, save_attention, window_attention
from nsa_jax.sharding import sharded
from nsa_jax.testing import assert_trees_close, random_inputs

CONFIG = NSAConfig(
    compress_block=16, compress_stride=8, select_block=16, num_selected=3, num_init=1, num_local=1, window=24
)
FORWARDS = {"nsa": 6, "window": 1}  # kernels: compressed, two of the selection, block union, selected, window


def problem(T=64):
    inputs = random_inputs(jax.random.key(0), CONFIG, B=1, T=T, num_heads=4, num_kv_heads=2, head_dim=32)
    return (inputs.q, inputs.kv, inputs.gates), jax.random.normal(jax.random.key(1), (2, 32, 32)) / 6


def loss(op, policy, options):
    """Of two layers that share keys, under a scan as in a model."""

    def attend(q, kernel, kv, gates):
        q = jnp.tanh(q @ kernel)
        if op == "window":
            return sharded(window_attention, **options)(q, kv.win_k, kv.win_v, config=CONFIG, implementation="triton")
        return sharded(nsa_attention, **options)(q, kv, gates, config=CONFIG, implementation="triton")

    def run(arrays, kernels):
        q, kv, gates = arrays
        layer = attend if policy is None else jax.checkpoint(attend, policy=policy, prevent_cse=False)
        q, _ = jax.lax.scan(lambda q, kernel: (layer(q, kernel, kv, gates), None), q, kernels)
        return jnp.sum(jnp.sin(q))

    return jax.value_and_grad(run, argnums=(0, 1))


POLICIES = {"none": None, "attention": save_attention, "all": jax.checkpoint_policies.nothing_saveable}


@pytest.mark.exhaustive
def test_policies_change_no_gradient():
    results = [jax.jit(loss("nsa", policy, {}))(*problem()) for policy in POLICIES.values()]
    for other in results[1:]:
        assert_trees_close(other, results[0], 1e-6)


@pytest.mark.parametrize("op", FORWARDS)
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_the_backward_pass_runs_no_forward_kernel_again(op, devices):
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((devices,), ("context",), axis_types=auto, abstract_device=device)
    (q, kv, gates), kernels = problem(128)
    if devices > 1:  # a compressed token for every stride
        kv = kv._replace(cmp_k=jnp.ones((1, 16, 2, 32)), cmp_v=jnp.ones((1, 16, 2, 32)))
    kernels_called = {}
    with jax.sharding.use_abstract_mesh(mesh):
        for name, policy in POLICIES.items():
            step = jax.jit(loss(op, policy, {"context_axes": "context"}))
            text = step.trace((q, kv, gates), kernels).lower(lowering_platforms=("cuda",)).as_text()
            kernels_called[name] = text.count("__gpu$xla.gpu.triton")
    chunks = 2 if devices > 1 else 1
    assert kernels_called["attention"] == kernels_called["none"]
    assert kernels_called["all"] == kernels_called["none"] + chunks * FORWARDS[op]


@pytest.mark.gpu
def test_what_cudnn_computed_is_kept():
    layer = FullAttention(num_heads=4, num_kv_heads=2, head_dim=32, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1, 64, 48), jnp.bfloat16)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    calls = {}
    for name in ("attention", "all"):
        apply = jax.checkpoint(layer.apply, policy=POLICIES[name])
        step = jax.value_and_grad(lambda v, x, apply=apply: jnp.sum(apply(v, x).astype(jnp.float32)))
        calls[name] = str(jax.make_jaxpr(step)(variables, x)).count("= dot_product_attention_fwd_wrapper[")
    assert calls == {"attention": 1, "all": 2}
