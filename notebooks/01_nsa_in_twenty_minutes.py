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
# # Native Sparse Attention in twenty minutes
#
# The cost of attention grows with the square of the length, because every query reads every key before it. With
# [Native Sparse Attention](https://arxiv.org/abs/2502.11089) (NSA), a query reads only
#
# 1. a coarse summary of everything before it (the *compressed* branch),
# 2. the few blocks that this summary shows to matter, in full (the *selected* branch), and
# 3. its neighbourhood (the *window* branch).
#
# Gates, which are learned with everything else, weigh and add the three. We begin with dense attention and get there
# in six steps. Each step has its equation, a picture, and the function of `nsa_jax` that computes it.
#
# The notebook runs unchanged on a GPU, a TPU or a CPU. The stored outputs come from one H100.

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

import jax

FAST = os.environ.get("NSA_JAX_NOTEBOOK_FAST") == "1"  # less of everything, for the tests
began = time.perf_counter()
print(f"JAX {jax.__version__} on {jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})")
if jax.default_backend() == "gpu" and float(jax.devices()[0].compute_capability) < 8:
    print("This GPU is older than those our kernels are for (an A100 or newer): all runs on XLA, correct but slower.")
print("All of it takes about 2 minutes on two busy CPU cores, 2 minutes on an H100 (most of it compiling).")
# %matplotlib inline

# %% [markdown]
# ## The data: a sequence with a repeated phrase
#
# Queries and keys usually come from a trained model. To see something without training one, we make them by hand.
# Every stretch of 16 tokens has a topic: a random direction that its keys share. Every token also has a direction of
# its own. Queries look for their own token. The same phrase of 16 tokens stands near the beginning and again near the
# end. Attention should find the first phrase from the second, far away.
#
# Shapes are those of the whole library: `[batch, tokens, heads, head size]`. Two query heads share one key/value
# head. They form a *group*. Groups make NSA fast, as we shall see.

# %%
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from nsa_jax import NSAConfig, num_blocks, num_compressed

matplotlib.rcParams["figure.dpi"] = 80  # small pictures make a small notebook
T, H, K, D = 256, 2, 1, 64
PHRASE = slice(36, 52)  # where the phrase stands first
AGAIN = slice(212, 228)  # and again

topics = jnp.repeat(jax.random.normal(jax.random.key(0), (T // 16, D)), 16, axis=0)
topics = topics.at[PHRASE].set(jax.random.normal(jax.random.key(1), (1, D)))
tokens = topics + jax.random.normal(jax.random.key(2), (T, D))
tokens = tokens.at[AGAIN].set(tokens[PHRASE])
tokens = tokens / jnp.linalg.norm(tokens, axis=-1, keepdims=True)
k = tokens[None, :, None, :]
q = 80 * (k + 0.05 * jax.random.normal(jax.random.key(3), (1, T, H, D)))
v = jax.random.normal(jax.random.key(4), (1, T, K, D))
print("q", q.shape, " k", k.shape, " v", v.shape)


# %%
def show(values, title, xlabel):
    """One picture of attention weights. Zero is white."""
    figure = Figure(figsize=(4.6, 3.7), layout="constrained")
    axes = figure.subplots()
    norm = PowerNorm(0.4, vmin=0, vmax=1)  # so that small weights can be seen too
    image = axes.imshow(np.where(np.asarray(values) > 0, values, np.nan), cmap="cividis", aspect="auto", norm=norm)
    axes.set(title=title, xlabel=xlabel, ylabel="query position (token)")
    figure.colorbar(image, ax=axes, label="attention weight")
    return figure


# %% [markdown]
# ## Step 0: dense attention
#
# $$o_t = \sum_{i \le t} p_{t,i} v_i, \qquad p_{t,\cdot} = \mathrm{softmax}_{i \le t}(q_t \cdot k_i / \sqrt{D_k})$$
#
# Most of the triangle is nearly empty. Only the diagonal (a token finds itself) and one short streak (the second
# phrase finds the first) carry weight. Dense attention computes the whole triangle.

# %%
scores = jnp.einsum("bthd,bsd->bhts", q, k[:, :, 0]) * D**-0.5
causal = jnp.tril(jnp.ones((T, T), bool))
dense = jax.nn.softmax(jnp.where(causal[None, None], scores, -jnp.inf), axis=-1)
print(f"{T * (T + 1) // 2} weights, of which {float((dense[0, 0] > 0.01).sum()):.0f} are above 1%")
show(dense[0, 0], "dense attention, head 0", "key position (token)")

# %% [markdown]
# ## Step 1: compression
#
# Every `compress_stride` tokens, a block of `compress_block` tokens becomes one compressed key and one compressed
# value:
#
# $$\tilde K_i = \varphi(k_{id}, \dots, k_{id+l-1}), \qquad i = 0, 1, \dots, N_c - 1,
#   \qquad N_c = \lfloor (T - l)/d \rfloor + 1$$
#
# with $l$ = `compress_block` and $d$ = `compress_stride`. The paper's are 32 and 16. Ours are smaller, so that 256
# tokens have something to show. In the paper's models $\varphi$ is a small network with learned positions inside the
# block. Here it is the mean, as by default in this library.

# %%
from nsa_jax import compress

config = NSAConfig(
    compress_block=8, compress_stride=4, select_block=16, num_selected=4, num_init=1, num_local=2, window=24
)
cmp_k = compress(k, config=config)
cmp_v = compress(v, config=config)
print(f"{T} tokens make {num_compressed(T, config)} compressed tokens: {cmp_k.shape}")

# %% [markdown]
# A query sees the compressed tokens that end at or before it: token $i$ is visible at $t$ if $id + l - 1 \le t$. The
# compressed branch therefore costs a $d$-th of dense attention. The first $l - 1$ queries see no compressed token, and
# their output is 0.

# %%
from nsa_jax import AttentionInputs, BranchKV, compressed_attention
from nsa_jax.visualize import attention_maps, plot_branches, plot_importance, plot_selection

o_cmp, lse = compressed_attention(q, cmp_k, cmp_v, config=config)
print("output", o_cmp.shape, " log of the softmax's sum", lse.shape)
assert (o_cmp[:, : config.compress_block - 1] == 0).all()

inputs = AttentionInputs(q, BranchKV(cmp_k, cmp_v, k, v, k, v), jnp.full((1, T, H, 3), 1 / 3))
maps = attention_maps(inputs, config)
show(maps.compressed, "compressed branch, head 0", "compressed token (one every 4 tokens)")

# %% [markdown]
# The streak is still there, but blurred. The summary says *where* to look, not what is there.
#
# ## Step 2: importance of blocks
#
# Selection works on larger blocks of `select_block` tokens (64 in the paper), because a GPU reads contiguous memory
# well and scattered memory badly. The importance of a block needs no new scores. It is the sum of the compressed
# branch's own probabilities, over the compressed tokens that overlap the block and over the heads of the group. The
# heads of a group must agree on the blocks, because they share the keys:
#
# $$\mathrm{imp}_{t,j} = \sum_{h \in \text{group}} \sum_i c(i, j)\, p^{h}_{t,i}, \qquad
#   c(i, j) = \text{strides that compressed token } i \text{ and block } j \text{ share}$$
#
# For the paper's sizes these weights are 1, 2, 2, 2, 1 for the compressed tokens $4j-1, \dots, 4j+3$. (The paper's
# equation 9 counts from 1. If it is read as counting from 0, it scores one block too early.)

# %%
from nsa_jax.visibility import overlap_weights

first, weights = overlap_weights(NSAConfig())
print(f"the paper's sizes: compressed tokens 4j{first:+d} .. 4j{first + len(weights) - 1:+d}, weights {weights}")

# %% [markdown]
# ## Step 3: the top n
#
# Each query reads `num_selected` blocks (16 in the paper). It always reads the first block, its own block and the one
# before that. The rest are the blocks of the highest importance. No gradient goes through the choice. The compressed
# branch is trained by its own output, and selection follows it.

# %%
from nsa_jax import select_blocks

block_indices = select_blocks(q, cmp_k, lse, config=config)
print(f"{num_blocks(T, config)} blocks; the query at {AGAIN.start + 8} reads {block_indices[0, 0, AGAIN.start + 8]}")
print(f"the phrase stood in blocks {PHRASE.start // 16} and {(PHRASE.stop - 1) // 16}")
assert (PHRASE.start + 8) // 16 in block_indices[0, 0, AGAIN.start + 8]
plot_importance(inputs, config)

# %% [markdown]
# Left: the importance of every block to every query. Right: only the 4 blocks that each query reads. The same by blocks
# of queries:

# %%
plot_selection(inputs, config)

# %% [markdown]
# ## Step 4: selected attention
#
# This is plain attention to the tokens of the chosen blocks, up to the query's own position. It reads
# `num_selected * select_block` tokens (1024 in the paper), whatever the length.

# %%
from nsa_jax import selected_attention

o_slc = selected_attention(q, k, v, block_indices, config=config)
found = maps.selected[AGAIN.start + 8, PHRASE.start + 8]
print(f"weight of the first phrase's token for the second's: {found:.2f} (dense: {dense[0, 0, 220, 44]:.2f})")

# %% [markdown]
# ## Step 5: the sliding window
#
# The window branch reads the last `window` tokens (512 in the paper), the query's own included. In the paper it has
# keys and values of its own, as the other branches do. Local patterns are easy to learn, and with keys and values of
# their own they do not crowd out what the other two branches should learn.

# %%
from nsa_jax import window_attention

o_win = window_attention(q, k, v, config=config)
plot_branches(inputs, config)

# %% [markdown]
# ## Step 6: gates
#
# $$o_t = g^\mathrm{cmp}_t o^\mathrm{cmp}_t + g^\mathrm{slc}_t o^\mathrm{slc}_t + g^\mathrm{win}_t o^\mathrm{win}_t,
#   \qquad g_t = \sigma(\mathrm{MLP}(x_t)) \in (0, 1)^3 \text{ for each head}$$
#
# `nsa_attention` is all six steps in one call. It gives the same as the parts:

# %%
from nsa_jax import nsa_attention
from nsa_jax.testing import normwise_error

o = nsa_attention(q, inputs.kv, inputs.gates, config=config)
pieces = (o_cmp + o_slc + o_win) / 3
print(f"output {o.shape}; error against the pieces {normwise_error(o, pieces):.1e}")
assert normwise_error(o, pieces) < 1e-5

# %% [markdown]
# ## What it saves
#
# To decode one token, dense attention reads every key and value before it. NSA reads the compressed tokens, the
# selected blocks and the window. The picture is for the paper's sizes and 4 key/value heads of size 128 in bfloat16:

# %%
from nsa_jax.visualize import plot_bytes_read

plot_bytes_read(NSAConfig(), num_kv_heads=4, head_dim=128)

# %% [markdown]
# Below about 1.7k tokens NSA reads more than dense attention. At 64k it reads less than a tenth. These are bytes, not
# times. `02_pallas_against_the_reference` shows how much of this the kernels turn into speed.
#
# ## As a layer
#
# `NSAttention` is a layer of Flax Linen; `nsa_jax.nnx.NSAttention` is the same layer for NNX. It contains the
# projections, $\varphi$, the gates and the rotary embedding. These are its gates before any training:

# %%
from nsa_jax import NSAttention
from nsa_jax.visualize import plot_gates, trace_attention

layer = NSAttention(num_heads=4, num_kv_heads=1, head_dim=32, config=config)
x = jax.random.normal(jax.random.key(3), (1, T, 128))
variables = jax.jit(layer.init)(jax.random.key(4), x)
y = jax.jit(layer.apply)(variables, x)
print("layer:", x.shape, "->", y.shape)
plot_gates(trace_attention(layer, variables, x))

# %% [markdown]
# A causal layer must not see the future. So the gradient of an early output with respect to later inputs must be
# exactly zero:

# %%
middle = T // 2
gradient = jax.jit(jax.grad(lambda x: layer.apply(variables, x)[0, middle].sum()))(x)
print(f"largest gradient after position {middle}: {float(jnp.abs(gradient[0, middle + 1 :]).max())}")
assert (gradient[0, middle + 1 :] == 0).all()
assert (gradient[0, middle] != 0).any()
print(f"This notebook took {time.perf_counter() - began:.0f} s.")

# %% [markdown]
# Next: `02_pallas_against_the_reference` (whether it is right, and how fast it is),
# `03_into_your_own_training_code`, and `04_train_and_look_inside`.
