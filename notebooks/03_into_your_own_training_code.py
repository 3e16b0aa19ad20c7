# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Into your own training code
#
# This notebook puts Native Sparse Attention into a model that you already train: in Flax Linen, in Flax NNX, on a mesh
# of devices, with packed documents, and for generating. The models are small enough for a CPU. Nothing else about them
# is special.
#
# The notebook runs unchanged on a GPU, a TPU or a CPU. The stored outputs come from two CPU cores.

# %%
# Installs the package where it is missing, as on Colab, and prints where this runs.
INSTALL_FROM = ".."  # a folder with a clone, a wheel, or a git URL such as "git+https://HOST/OWNER/nsa-jax"

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def install(extra):
    """Installs with an extra. JAX stays as it is where there is one: its GPU plugin fits no other version."""
    source, found = INSTALL_FROM, importlib.metadata.distributions()
    jax_here = [f"{d.name}=={d.version}" for d in found if d.name in ("jax", "jaxlib") or d.name.startswith("jax-cuda")]
    if not jax_here and Path("/dev/nvidia0").exists():
        extra += ",cuda12"
    if "://" in source:
        package = [f"nsa-jax[{extra}] @ {source}"]
    elif source.endswith(".whl"):
        package = [f"nsa-jax[{extra}] @ {Path(source).resolve().as_uri()}"]
    elif (Path(source) / "nsa_jax").is_dir():
        package = ["--editable", f"{Path(source).resolve()}[{extra}]"]
        sys.path.append(str(Path(source).resolve()))  # only later processes find an editable package by themselves
    else:
        raise FileNotFoundError(
            f"INSTALL_FROM = {source!r}: expected a clone of nsa-jax, a wheel or a git URL. On Colab there is no "
            "clone: at the top of this cell, set it to a git URL, or to the path of a wheel that you uploaded."
        )
    constraints = Path(tempfile.mkdtemp()) / "constraints.txt"
    constraints.write_text("\n".join(jax_here))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    if subprocess.run([*pip, *package]).returncode:
        raise RuntimeError(
            f"pip could not install nsa-jax beside {', '.join(jax_here) or 'no JAX'}; it says why above. If this JAX "
            "is too old, install a newer one with its plugin (pip install --upgrade 'jax[cuda12]') and restart."
        )
    importlib.invalidate_caches()
    for name in ("jax", "numpy"):
        loaded = getattr(sys.modules.get(name), "__version__", None)
        if loaded not in (None, importlib.metadata.version(name)):
            raise RuntimeError(f"{name} {loaded} was loaded before another was installed: restart and run again.")


if importlib.util.find_spec("nsa_jax") is None:
    install("plot")

# Without an accelerator, this simulates eight devices on the CPU, so that the part on meshes has something to show. It
# must happen before JAX is imported.
if not any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0")):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax

FAST = os.environ.get("NSA_JAX_NOTEBOOK_FAST") == "1"  # less of everything, for the tests
began = time.perf_counter()
print(f"JAX {jax.__version__} on {jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})")
if jax.default_backend() == "gpu" and float(jax.devices()[0].compute_capability) < 8:
    print("This GPU is older than those our kernels are for (an A100 or newer): all runs on XLA, correct but slower.")
print("All of it takes about 4 minutes on two busy CPU cores, 2.5 minutes on an H100 (most of it compiling).")
# %matplotlib inline

# %% [markdown]
# ## A model that you might have
#
# The model is a byte-level decoder that gets a function which makes its attention layers. The data are rows of bytes
# from the source of `nsa_jax` itself.

# %%
import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

import nsa_jax
from nsa_jax import FullAttention, NSAConfig, NSAttention

EMBED, LAYERS, T, BATCH, STEPS = 64, 1 if FAST else 2, 128, 8, 3 if FAST else 40
source = b"\n".join(path.read_bytes() for path in sorted(Path(nsa_jax.__file__).parent.glob("*.py")))
text = np.frombuffer(source, np.uint8).astype(np.int32)


def batch(step):
    """Rows of T + 1 bytes, the same for the same step."""
    begins = np.random.default_rng(step).integers(0, len(text) - T - 1, BATCH)
    return jnp.asarray(np.stack([text[begin : begin + T + 1] for begin in begins]))


class Decoder(nn.Module):
    attention: functools.partial  # makes a block's attention layer

    @nn.compact
    def __call__(self, tokens, segment_ids=None):
        embedding = nn.Embed(256, EMBED)
        x = embedding(tokens)
        for _ in range(LAYERS):
            x = x + self.attention()(nn.RMSNorm()(x), segment_ids=segment_ids)
            x = x + nn.Dense(EMBED)(nn.silu(nn.Dense(4 * EMBED)(nn.RMSNorm()(x))))
        return embedding.attend(nn.RMSNorm()(x))


# %% [markdown]
# ## The swap, in Linen
#
# `FullAttention` and `NSAttention` have the same interface: `[batch, tokens, embedding]` in and out, with positions and
# causality inside. The swap is one line. (If you come from `nn.MultiHeadDotProductAttention`, drop the mask. Drop your
# position embeddings too, or keep them and pass `rope_theta=None`.)

# %%
HEADS = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 16}
# The defaults are the paper's sizes. These are smaller, because 128 tokens are only two of the paper's blocks.
SPARSE = NSAConfig(compress_block=8, compress_stride=4, select_block=8, num_selected=6, window=32)

before = Decoder(functools.partial(FullAttention, **HEADS))
after = Decoder(functools.partial(NSAttention, **HEADS, config=SPARSE))  # the swap

optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))


def loss(model, params, rows):
    logits = model.apply({"params": params}, rows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


@functools.partial(jax.jit, static_argnums=0)
def train_step(model, params, state, rows):
    value, gradients = jax.value_and_grad(loss, argnums=1)(model, params, rows)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


trained = {}
for name, model in (("full", before), ("NSA", after)):
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), batch(0)[:, :-1]))["params"]
    state, losses = optimizer.init(params), []
    for step in range(STEPS):
        params, state, value = train_step(model, params, state, batch(step))
        losses.append(float(value))
    trained[name] = params
    size = sum(x.size for x in jax.tree.leaves(params))
    print(f"{name:>5}: {size:7} parameters, loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per byte in {STEPS} steps")

# %% [markdown]
# NSA has a few more parameters here: its gates. In the paper's layout (`compression="mlp", share_kv=False`) it also has
# a key and a value projection for each of three branches, and a network for $\varphi$.
# These losses after a few steps on a few rows show that gradients flow. They say nothing about which attention is
# better.
#
# ## The swap, in NNX
#
# `nsa_jax.nnx.NSAttention` has the same parameters under the same names and gives the same numbers.

# %%
from flax import nnx

import nsa_jax.nnx


class Block(nnx.Module):
    def __init__(self, attention, rngs):
        self.attention = attention(EMBED, rngs=rngs)
        self.attention_norm, self.mlp_norm = (nnx.RMSNorm(EMBED, rngs=rngs) for _ in range(2))
        self.up, self.down = nnx.Linear(EMBED, 4 * EMBED, rngs=rngs), nnx.Linear(4 * EMBED, EMBED, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(nnx.silu(self.up(self.mlp_norm(x))))


class NNXDecoder(nnx.Module):
    def __init__(self, attention, rngs):
        self.embedding = nnx.Embed(256, EMBED, rngs=rngs)
        self.blocks = nnx.List([Block(attention, rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(EMBED, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embedding.attend(self.norm(x))


@nnx.jit
def nnx_train_step(model, optimizer, rows):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(rows[:, :-1]), rows[:, 1:]).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


model = NNXDecoder(functools.partial(nsa_jax.nnx.NSAttention, **HEADS, config=SPARSE), nnx.Rngs(0))  # the swap
nnx_optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
losses = [float(nnx_train_step(model, nnx_optimizer, batch(step))) for step in range(STEPS)]
print(f"NNX: loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per byte in {STEPS} steps")

# %% [markdown]
# ## On a mesh
#
# Two things are needed. First, your own rules must place the *parameters*. Every parameter names its axes ("embed",
# "heads", "kv_heads", ...), as is usual in Linen. Second, the *attention* must know which mesh axes split the batch
# and the key/value heads. Without that, automatic sharding gathers the inputs of a GPU kernel on every device, and
# does not say so. With it, every device attends to its own rows and heads and sends nothing. The query heads of a
# group stay with their key/value head.

# %%
from jax.sharding import NamedSharding, PartitionSpec

devices = jax.device_count()
tensor = 2 if devices % 2 == 0 else 1
mesh = jax.make_mesh((devices // tensor, tensor), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
RULES = (("heads", "tensor"), ("kv_heads", "tensor"))  # every other logical axis is whole on each device

on_mesh = Decoder(functools.partial(NSAttention, **HEADS, config=SPARSE, batch_axes="data", head_axes="tensor"))
boxed = jax.eval_shape(on_mesh.init, jax.random.key(0), batch(0)[:, :-1])
shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)["params"]
params = jax.device_put(trained["NSA"], shardings)
rows = jax.device_put(batch(0), NamedSharding(mesh, PartitionSpec("data")))
with jax.set_mesh(mesh):
    params, state, value = train_step(on_mesh, params, jax.jit(optimizer.init)(params), rows)

_, _, alone = train_step(after, trained["NSA"], optimizer.init(trained["NSA"]), batch(0))
kernel = params["NSAttention_0"]["q_kernel"]
print(f"mesh {dict(mesh.shape)}; loss {float(value):.6f}, on one device {float(alone):.6f}")
print(f"q_kernel {kernel.shape}, on each device {kernel.sharding.shard_shape(kernel.shape)}")
assert abs(float(value) - float(alone)) < 1e-4

# %% [markdown]
# For an op alone, `nsa_jax.sharding.sharded(nsa_attention, batch_axes="data", head_axes="tensor")` does the same.
#
# ## Packed documents
#
# `segment_ids` separate several documents in one row, so that they do not see each other. If every document starts on a
# multiple of `select_block`, its output equals that of the document alone. Here we change the first document, and the
# second stays as it was:

# %%
segment_ids = jnp.repeat(jnp.array([[0, 1]], jnp.int32), T // 2, axis=1)
run = jax.jit(lambda tokens: after.apply({"params": trained["NSA"]}, tokens, segment_ids))
row = batch(1)[:1, :-1]
changed = row.at[:, : T // 2].set(32)
difference = float(jnp.abs(run(row) - run(changed))[:, T // 2 :].max())
print(f"largest change of the second document's logits: {difference}")
assert difference == 0

# %% [markdown]
# ## Only the attention
#
# If your model has its own projections, call `nsa_attention` with queries, the keys and values of each branch, and
# gates. The layout is that of `jax.nn.dot_product_attention`. `compress` makes compressed keys and values: by default
# means, of keys that are rotated already.

# %%
from nsa_jax import BranchKV, compress, nsa_attention

keys = jax.random.split(jax.random.key(5), 4)
q = jax.random.normal(keys[0], (1, T, 8, 16))
k, v = (jax.random.normal(key, (1, T, 2, 16)) for key in keys[1:3])
cmp_k, cmp_v = (compress(x, config=SPARSE) for x in (k, v))
gates = jax.nn.sigmoid(jax.random.normal(keys[3], (1, T, 8, 3)))
attend = jax.jit(functools.partial(nsa_attention, config=SPARSE))
print(attend(q, BranchKV(cmp_k, cmp_v, k, v, k, v), gates).shape)

# %% [markdown]
# ## Generating
#
# Layers have `init_cache`, `prefill` and `decode_step`. The cache is an explicit pytree. A step reads the compressed
# tokens, the selected blocks and the window, and nothing else:

# %%
layer = NSAttention(**HEADS, config=SPARSE)
variables = {"params": trained["NSA"]["NSAttention_0"]}
x = jax.random.normal(jax.random.key(6), (1, T, EMBED))
whole = jax.jit(layer.apply)(variables, x)
cache = layer.init_cache(batch_size=1, max_length=T)
y, cache = jax.jit(functools.partial(layer.apply, method="prefill"))(variables, x[:, : T - 2], cache)
decode = jax.jit(functools.partial(layer.apply, method="decode_step"))
for t in (T - 2, T - 1):
    y, cache = decode(variables, x[:, t : t + 1], cache)
    difference = float(jnp.abs(y[:, 0] - whole[:, t]).max())
    print(f"position {t}: largest difference to the whole sequence at once {difference:.1e}")
    assert difference < 1e-3

# %% [markdown]
# ## What to tune
#
# | setting | what it does | where to begin |
# |---|---|---|
# | `num_heads / num_kv_heads` | heads of a group share keys, values and blocks, and fill a kernel's tile | 16 |
# | `window` | exact local context | the paper's 512; a smaller one for short sequences |
# | `num_selected * select_block` | tokens read in full, wherever they are | the paper's 16 × 64 = 1024 |
# | `compress_stride` | how coarse the summary is: T / stride keys per query | the paper's 16 |
# | `compression`, `share_kv` | how compressed tokens are made; shared keys and values | see below |
# | sequence length | dense attention is faster for short sequences | 16k and more on an H100, 64 heads of 128 |
# | `implementation` | which backend computes the attention | `None`: the fastest for the device |
#
# The paper's layout is `compression="mlp"` and `share_kv=False`. In our small experiments, selection did not learn to
# select with it. It did with the defaults, `compression="mean"` and `share_kv=True`; see `docs/results.md`.
#
# Sequences of any length are accepted. Block sizes and strides must divide each other as `NSAConfig` says. If they do
# not, its error names the field.

# %%
print(f"This notebook took {time.perf_counter() - began:.0f} s.")
