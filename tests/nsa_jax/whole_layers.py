"""All that a layer does, as one function, for every kind and flavour: its gradients, caches, chunks and steps."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import nsa_jax
import nsa_jax.nnx
from nsa_jax import NSAConfig

CONFIG = NSAConfig(4, 2, 8, 3, 1, 1, 10)
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
T, E = 32, 8
MAX_LENGTH = 40
FIELDS = {
    "nsa": ("NSAttention", {"config": CONFIG, "compression": "mean"}),
    "nsa, mlp": ("NSAttention", {"config": CONFIG, "qk_norm": True}),
    "full": ("FullAttention", {}),
    "window": ("FullAttention", {"window": 9}),
}


def embeddings(seed=0, B=4):
    return jax.random.normal(jax.random.key(seed), (B, T, E))


def segments(B=4):
    return jnp.asarray(np.repeat([[7, 2]], T // 2, axis=1).repeat(B, axis=0), jnp.int32)


def linen(name, **fields):
    kind, own = FIELDS[name]
    return getattr(nsa_jax, kind)(**HEADS, **own, **fields)


@functools.cache
def initial(name):
    """The boxed parameters of a Linen layer."""
    return jax.jit(linen(name).init)(jax.random.key(1), embeddings())["params"]


def layer(name, flavour="linen", **fields):
    """call(parameters, method, *arguments) of a Linen or an NNX layer."""

    def call_linen(params, method, *args, **options):
        module = linen(name, **fields)
        if method == "init_cache":
            return module.init_cache(*args, **options)
        return module.apply({"params": params}, *args, method=method, **options)

    def call_nnx(params, method, *args, **options):
        kind, own = FIELDS[name]
        module = getattr(nsa_jax.nnx, kind)(E, rngs=nnx.Rngs(0), **HEADS, **own, **fields)
        for key, value in params.items():
            setattr(module, key, nnx.Param(value, eager_sharding=False))
        return getattr(module, method)(*args, **options)

    return {"linen": call_linen, "nnx": call_nnx}[flavour]


def everything(call, *, continuing=True, **cache_sizes):
    """The output with segments and all gradients, and a prefill, its next chunk and steps in a loop over a cache.

    Without `continuing`, the prefill is not in chunks.
    """

    def run(params, x, segment_ids, cotangent):
        y, vjp = jax.vjp(lambda *a: call(a[0], "__call__", a[1], segment_ids=segment_ids), params, x)
        cache = call(params, "init_cache", batch_size=x.shape[0], max_length=MAX_LENGTH, dtype=y.dtype, **cache_sizes)
        first, cache = call(params, "prefill", x[:, : 13 if continuing else 26], cache)
        second = None
        if continuing:
            second, cache = call(params, "prefill", x[:, 13:26], cache, continuing=True)

        def step(cache, token):
            y, cache = call(params, "decode_step", token[:, None], cache)
            return cache, y

        cache, steps = jax.lax.scan(step, cache, jnp.moveaxis(x[:, 26:], 1, 0))
        return y, vjp(cotangent), (first, second, steps), cache

    return run


def run_alone(name, B=4, **options):
    """What `everything` returns on one device, from NumPy arrays to NumPy arrays."""
    run = jax.jit(everything(layer(name), **options))
    return jax.device_get(run(nn.unbox(initial(name)), embeddings(B=B), segments(B), embeddings(2, B)))
