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
# # Pallas against the reference
#
# The library has several implementations of the same ops. `reference` uses plain masks, and all others are compared
# with it. `xla` is pure JAX with linear memory and runs anywhere. `triton` runs Pallas GPU kernels. Without a GPU the
# same code runs interpreted, which is slow. This notebook compares them on *your* shapes, forward and gradients, and
# then measures how fast they are.
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
GPU = jax.default_backend() == "gpu"
began = time.perf_counter()
print(f"JAX {jax.__version__} on {jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})")
if jax.default_backend() == "gpu" and float(jax.devices()[0].compute_capability) < 8:
    print("This GPU is older than those our kernels are for (an A100 or newer): all runs on XLA, correct but slower.")
print("All of it takes about 7 minutes on two busy CPU cores, 2 minutes on an H100 (most of it compiling).")
# %matplotlib inline

# %% [markdown]
# ## Your shapes
#
# Change these to the sizes of your model. `random_inputs` draws queries, keys and values of all three branches, and
# gates.

# %%
import functools

import chex
import jax.numpy as jnp
from matplotlib.figure import Figure

from nsa_jax import NSAConfig, nsa_attention
from nsa_jax.testing import assert_matches_reference, normwise_error, random_inputs, tolerance_of

config = NSAConfig(compress_block=16, compress_stride=8, select_block=16, num_selected=4, window=32)
shape = {"T": 100, "num_heads": 8, "num_kv_heads": 2, "head_dim": 32}
inputs = random_inputs(jax.random.key(0), config, **shape)
chex.assert_shape(inputs.q, (1, 100, 8, 32))
chex.assert_equal_shape([inputs.kv.slc_k, inputs.kv.win_k])

# %% [markdown]
# ## One call
#
# `assert_matches_reference` runs every op in an implementation and in the reference: the three branches with the
# log-sum-exp, the block indices, the gated sum. It compares the results, and the gradients with respect to every input.
# Our own tests call it too.

# %%
assert_matches_reference(inputs, config, implementation="xla")
print("xla: every op and every gradient agrees with the reference")

# %%
where = "compiled for this GPU" if GPU else "interpreted, since there is no GPU here"
some = inputs if not FAST else random_inputs(jax.random.key(0), config, **{**shape, "T": 40, "num_heads": 2})
assert_matches_reference(some, config, implementation="triton", gradients=not FAST)
print(f"triton ({where}): {'every op' if FAST else 'every op and every gradient'} agrees with the reference")

# %% [markdown]
# Packed documents (`segment_ids`) and a slice of the queries (`query_offset`, used by chunked prefill and context
# parallelism) are arguments like any other:

# %%


@functools.partial(jax.jit, static_argnums=0)
def attend(implementation, inputs):
    q, kv, gates, segment_ids, query_offset = inputs
    return nsa_attention(
        q, kv, gates, config=config, segment_ids=segment_ids, query_offset=query_offset, implementation=implementation
    )


packed = random_inputs(jax.random.key(1), config, num_segments=3, query_offset=37, **shape)
error = normwise_error(attend("xla", packed), attend("reference", packed))
print(f"xla, 3 documents in a row, queries from position 37 on: normwise error {error:.1e}")
assert error < tolerance_of(jnp.float32)

# %% [markdown]
# ## What the tolerance means
#
# The error is *normwise*: $\lVert a - b \rVert / \lVert b \rVert$ over the whole array. A comparison entry by entry
# would demand relative accuracy of entries whose true value happens to be near 0, which no floating-point sum can give.
# The tolerance follows from the dtype alone. It is never raised to make something pass:

# %%
rows = []
for dtype in (jnp.float32, jnp.bfloat16):
    given = random_inputs(jax.random.key(2), config, dtype=dtype, **shape)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), given[:3])
    error = normwise_error(attend("xla", given), attend("reference", (*wide, None, 0)))
    rows.append((jnp.dtype(dtype).name, float(jnp.finfo(dtype).eps), tolerance_of(dtype), error))
print(f"{'dtype':>9} {'epsilon':>9} {'tolerance':>10} {'error of xla':>13}")
for name, epsilon, tolerance, error in rows:
    print(f"{name:>9} {epsilon:9.1e} {tolerance:10.0e} {error:13.1e}")
    assert error < tolerance

# %% [markdown]
# Block indices are integers and have no tolerance. Two selections may differ only in blocks that have the same
# importance up to rounding.
#
# ## Does the comparison notice anything?
#
# A test that cannot fail proves nothing. So we make the scores 0.1% too large, as a wrong scale would:

# %%
q, kv, gates, *_ = inputs
right = attend("reference", inputs)
wrong = attend("reference", inputs._replace(q=1.001 * q))
print(f"normwise error where the scores are 0.1% off: {normwise_error(wrong, right):.1e}")
assert normwise_error(wrong, right) > 10 * tolerance_of(jnp.float32)

# %% [markdown]
# `chex` has assertions for the rest. Gradients are finite everywhere, even for the first queries, which see no
# compressed token:


# %%
def loss(q, kv, gates):
    return attend(None, (q, kv, gates, None, 0)).sum()


gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, kv, gates)
chex.assert_tree_all_finite(gradients)
chex.assert_trees_all_equal_shapes(gradients, (q, kv, gates))
print("all gradients are finite and shaped like their inputs")

# %% [markdown]
# ## Time and memory against length, on this machine
#
# On a GPU this measures the fastest implementation with the paper's sizes in bfloat16, against cuDNN. On a CPU it
# measures the `xla` implementation at small sizes and lengths, against XLA's dense attention. **CPU times say nothing
# about GPU times**; they only show the shape of the curves. The work and memory of dense attention grow with the square
# of the length, those of NSA nearly in proportion to it.

# %%
if GPU:
    sizes, heads, dtype = NSAConfig(), {"num_heads": 16, "num_kv_heads": 1, "head_dim": 128}, jnp.bfloat16
    lengths = (2048, 4096, 8192, 16384, 32768)
else:
    sizes, heads, dtype = config, {"num_heads": 4, "num_kv_heads": 1, "head_dim": 32}, jnp.float32
    lengths = (128,) if FAST else (256, 512, 1024, 2048, 4096)


def measure(f, arguments):
    """Milliseconds of a call (the best of a few), and MiB of temporary memory by the compiler's count."""
    compiled = jax.jit(f).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(1 if FAST else 5):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(1e3 * (time.perf_counter() - start))
    return min(times), compiled.memory_analysis().temp_size_in_bytes / 2**20


def sparse(q, kv, gates):
    return nsa_attention(q, kv, gates, config=sizes).astype(jnp.float32).sum()


def dense(q, kv, gates):
    implementation = "cudnn" if GPU else "xla"
    o = jax.nn.dot_product_attention(q, kv.slc_k, kv.slc_v, is_causal=True, implementation=implementation)
    return o.astype(jnp.float32).sum()


measured = {"NSA": [], "dense": []}
print(f"{'tokens':>7}  NSA ms  dense ms  NSA MiB  dense MiB   (forward and backward)")
for T in lengths:
    arguments = random_inputs(jax.random.key(3), sizes, T=T, dtype=dtype, **heads)[:3]
    for name, f in (("NSA", sparse), ("dense", dense)):
        measured[name].append(measure(jax.grad(f, argnums=(0, 1, 2)), arguments))
    (a, b), (c, d) = measured["NSA"][-1], measured["dense"][-1]
    print(f"{T:7}  {a:6.1f}  {c:8.1f}  {b:7.1f}  {d:9.1f}")

# %%
figure = Figure(figsize=(8.4, 3.4), layout="constrained")
panels = figure.subplots(1, 2)
for axes, column, label in ((panels[0], 0, "time (ms)"), (panels[1], 1, "temporary memory (MiB)")):
    for name, style, color in (("NSA", "o-", "#0072B2"), ("dense", "s--", "#D55E00")):
        axes.plot(lengths, [row[column] for row in measured[name]], style, color=color, label=name)
    axes.set(yscale="log", xlabel="sequence length (tokens)", ylabel=label)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
panels[0].legend(frameon=False)
figure.suptitle(f"measured here: {jax.devices()[0].device_kind}, forward and backward", fontsize="medium")
figure

# %% [markdown]
# ## Recorded: one H100
#
# These figures were **not** measured here. They are the recorded results of `python -m pallas_kernels.benchmarks` on
# one H100 80GB, which come with the package: 64 query heads, 4 key/value heads of size 128, the paper's sizes,
# bfloat16, batch 1. They time the kernels that the library chooses by itself, with all branches, scoring, selection and
# gates, against cuDNN's dense attention in the same run.

# %%
import json

import pallas_kernels.benchmarks
from pallas_kernels.benchmarks.plot import describe, draw

results = Path(pallas_kernels.benchmarks.__file__).parent / "results"
record = json.loads((results / "nsa_h100.json").read_text())
draw(record["rows"], "recorded: " + describe(record))

# %%
by_length = {(row["T"], row["op"], row["selection"]): row for row in record["rows"]}
print("recorded on an H100: dense / NSA (random selection), how many times as fast; GiB forward and backward")
for T in sorted({row["T"] for row in record["rows"] if row["op"] == "dense"}):
    full, ours = by_length[T, "dense", None], by_length[T, "nsa", "random"]
    forward = full["forward_ms"]["median"] / ours["forward_ms"]["median"]
    backward = full["backward_ms"] / ours["backward_ms"]
    memory = [row["forward_backward_memory_gib"] for row in (ours, full)]
    print(
        f"{T // 1024:4}k  {forward:5.2f} forward  {backward:5.2f} backward   {memory[0]:6.2f} (dense {memory[1]:6.2f})"
    )

# %% [markdown]
# On that card, with a random selection, the forward curves cross between 8k and 16k tokens, and the backward curves
# between 4k and 8k. Below that, dense attention is faster. To measure your own GPU:
#
#     python -m pallas_kernels.benchmarks --lengths 8192 16384 32768 65536 --ops nsa dense --out results

# %%
print(f"This notebook took {time.perf_counter() - began:.0f} s.")
