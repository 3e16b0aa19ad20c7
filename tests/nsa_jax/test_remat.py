"""`save_attention` keeps what attention computed and changes no gradient."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from nsa_jax import FullAttention, NSAConfig, nsa_attention, save_attention, window_attention
from nsa_jax.sharding import sharded
from nsa_jax.testing import assert_trees_close, random_inputs
from tests.pallas_kernels.cases import skip_without_mosaic

CONFIG = NSAConfig(
    compress_block=16, compress_stride=8, select_block=16, num_selected=3, num_init=1, num_local=1, window=24
)
# What each backend takes: sizes, query heads, head size, dtype.
SIZES = {
    "triton": (CONFIG, 4, 32, jnp.float32),
    "mosaic": (dataclasses.replace(CONFIG, select_block=64), 16, 64, jnp.bfloat16),
}
# Kernels of a forward pass: compressed, selection (Triton's in two), block union, selected, window.
FORWARDS = {("triton", "nsa"): 6, ("triton", "window"): 1, ("mosaic", "nsa"): 5, ("mosaic", "window"): 1}
CALLED = {"triton": "__gpu$xla.gpu.triton", "mosaic": "mosaic_gpu_v2"}


def problem(backend, T=64):
    config, heads, head_dim, dtype = SIZES[backend]
    inputs = random_inputs(
        jax.random.key(0), config, B=1, T=T, num_heads=heads, num_kv_heads=2, head_dim=head_dim, dtype=dtype
    )
    kernels = jax.random.normal(jax.random.key(1), (2, head_dim, head_dim), dtype) / head_dim**0.5
    return (inputs.q, inputs.kv, inputs.gates), kernels


def loss(backend, op, policy, options):
    """Of two layers that share keys, under a scan as in a model."""
    arguments = {"config": SIZES[backend][0], "implementation": backend}

    def attend(q, kernel, kv, gates):
        q = jnp.tanh(q @ kernel)
        if op == "window":
            return sharded(window_attention, **options)(q, kv.win_k, kv.win_v, **arguments)
        return sharded(nsa_attention, **options)(q, kv, gates, **arguments)

    def run(arrays, kernels):
        q, kv, gates = arrays
        layer = attend if policy is None else jax.checkpoint(attend, policy=policy, prevent_cse=False)
        q, _ = jax.lax.scan(lambda q, kernel: (layer(q, kernel, kv, gates), None), q, kernels)
        return jnp.sum(jnp.sin(q.astype(jnp.float32)))

    return jax.value_and_grad(run, argnums=(0, 1))


POLICIES = {
    "none": None,
    "attention": save_attention,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "all": jax.checkpoint_policies.nothing_saveable,
}


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "none"])
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("triton", marks=pytest.mark.exhaustive),
        pytest.param("mosaic", marks=pytest.mark.gpu),  # `jax.checkpoint` does not take its interpreter
    ],
)
def test_a_policy_changes_no_gradient(backend, policy):
    if backend == "mosaic":
        skip_without_mosaic(interpreted=False)
    chosen = (POLICIES["none"], POLICIES[policy])
    kept, made_again = (jax.jit(loss(backend, "nsa", each, {}))(*problem(backend)) for each in chosen)
    assert_trees_close(made_again, kept, 1e-6)


def kernels_run(text, called):
    """How often a lowered program comes to a kernel, where functions that it calls twice count twice."""
    bodies = dict(re.findall(r"^  func\.func \w+ @(\S+?)\((.*?)^  }$", text, re.DOTALL | re.MULTILINE))

    @functools.cache
    def count(name):
        calls = re.findall(r"\bcall @(\S+?)\(", bodies[name])
        return bodies[name].count(called) + sum(map(count, calls))

    return count("main")


@pytest.mark.parametrize(
    ("backend", "op", "devices"),
    [
        pytest.param(*one, devices, marks=[pytest.mark.exhaustive] * (devices == 2 or one == ("mosaic", "nsa")))
        for one in FORWARDS
        for devices in (1, 2)
    ],
)
def test_the_backward_pass_runs_no_forward_kernel_again(backend, op, devices):
    if backend == "mosaic":
        skip_without_mosaic(interpreted=False)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((devices,), ("context",), axis_types=auto, abstract_device=device)
    (q, kv, gates), kernels = problem(backend, 128)
    if devices > 1:  # a compressed token for every stride
        cmp = jnp.ones((1, 16, *kv.slc_k.shape[2:]), q.dtype)
        kv = kv._replace(cmp_k=cmp, cmp_v=cmp)
    kernels_called = {}
    with jax.sharding.use_abstract_mesh(mesh):
        for name, policy in POLICIES.items():
            step = jax.jit(loss(backend, op, policy, {"context_axes": "context"}))
            text = step.trace((q, kv, gates), kernels).lower(lowering_platforms=("cuda",)).as_text()
            kernels_called[name] = kernels_run(text, CALLED[backend])
    chunks = 2 if devices > 1 else 1
    again = chunks * FORWARDS[backend, op]
    assert kernels_called["none"] > again
    assert kernels_called["attention"] == kernels_called["none"]
    assert kernels_called["products"] == kernels_called["all"] == kernels_called["none"] + again


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
