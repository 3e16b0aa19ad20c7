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
# # Train and look inside
#
# This notebook trains two byte-level transformers on Python source code. They differ in one flag: `attention = "nsa"`
# and `"full"`. Then it shows their loss curves, what the sparse one selects, whether each finds a needle in a
# haystack, and text from both.
#
# The models are tiny and train for minutes, so that a CPU can do it. Results are shown as they came out, from one seed.
# They show how things work, not which attention is better. For larger runs, see `docs/results.md`.
#
# This notebook needs the trainer, which is in no wheel: it runs from a clone of the repository. On Colab, give the URL
# of the repository as `INSTALL_FROM` in the first cell, which clones it.
#
# The notebook runs unchanged on a GPU, a TPU or a CPU. The stored outputs come from two CPU cores.

# %%
# Installs the package where it is missing, as on Colab, and prints where this runs.
INSTALL_FROM = ".."  # a folder with a clone, or a git URL such as "git+https://HOST/OWNER/nsa-jax"

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


# The trainer is in no wheel, so that nobody gets a package named `train`: it runs from a clone, which a git URL gives.
if INSTALL_FROM.startswith("git+"):
    if not Path("nsa-jax").is_dir():
        subprocess.run(["git", "clone", "--quiet", INSTALL_FROM.removeprefix("git+"), "nsa-jax"], check=True)
    INSTALL_FROM = "nsa-jax"
if importlib.util.find_spec("train") is None and not (Path(INSTALL_FROM) / "train").is_dir():
    raise FileNotFoundError(
        f"INSTALL_FROM = {INSTALL_FROM!r}: expected a clone of nsa-jax or a git URL; the trainer is in no wheel. On "
        "Colab there is no clone: at the top of this cell, set it to a git URL, which is then cloned."
    )
if importlib.util.find_spec("nsa_jax") is None:
    install("train")
if importlib.util.find_spec("train") is None:
    sys.path.append(str(Path(INSTALL_FROM).resolve()))

import jax

FAST = os.environ.get("NSA_JAX_NOTEBOOK_FAST") == "1"  # less of everything, for the tests
began = time.perf_counter()
print(f"JAX {jax.__version__} on {jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})")
if jax.default_backend() == "gpu" and float(jax.devices()[0].compute_capability) < 8:
    print("This GPU is older than those our kernels are for (an A100 or newer): all runs on XLA, correct but slower.")
print("All of it takes about 7 minutes on two busy CPU cores, 3.5 minutes on an H100 (most of it compiling).")
# %matplotlib inline

# %% [markdown]
# ## The data
#
# The text is source code of the running interpreter's standard library: lines of its top-level files in their order,
# without lines that contain digits or `#`. Into each document we put lines like `#7`, with the same digit throughout
# the document. So after a `#` there is something to recall: the digit after the earlier ones. This is made up for the
# needle test below. The rest is real code.

# %%
import json
import random
import sysconfig

import matplotlib

matplotlib.rcParams["figure.dpi"] = 80  # small pictures make a small notebook
T = 64 if FAST else 128  # tokens (bytes) of a row
DIGITS = "0123456789"
files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
lines = [line.strip() for file in files for line in file.read_text(errors="ignore").splitlines()]
lines = [x for x in lines if 4 <= len(x) <= 40 and x.isascii() and "#" not in x and not any(c in x for c in DIGITS)]


def document(draw):
    """Consecutive lines of code, with the same short comment between them several times."""
    limit = draw.choice([T // 2, T])
    count, mark = limit // 12, f"#{draw.choice(DIGITS)}"
    chosen, size, at = [], 0, draw.randrange(len(lines) - 60)
    while size + len(lines[at]) + 1 < limit - 3 * count:
        chosen.append(lines[at])
        size, at = size + len(lines[at]) + 1, at + 1
    for place in sorted((draw.randrange(len(chosen) + 1) for _ in range(count - 1)), reverse=True):
        chosen.insert(place, mark)
    return "\n".join([*chosen, mark])


folder = Path(tempfile.mkdtemp())
draw = random.Random(0)
documents = [document(draw) for _ in range(200 if FAST else 4000)]
(folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
print(f"{len(documents)} documents from {len(files)} files, {sum(map(len, documents)) / 1e6:.2f} MB. One of them:\n")
print(documents[2])

# %% [markdown]
# ## Training
#
# `python -m train` runs `train.loop`. One frozen config describes a run. Our two runs differ in one field. Held-out
# documents are chosen by their content.

# %%
import dataclasses

from IPython.utils.capture import capture_output

from nsa_jax import NSAConfig
from train.config import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from train.loop import run
from train.prepare import prepare

STEPS = 4 if FAST else 300
model = ModelConfig(
    num_layers=2,
    embed_dim=32 if FAST else 128,
    num_heads=4,
    num_kv_heads=1,
    head_dim=8 if FAST else 32,
    mlp_dim=64 if FAST else 256,
    nsa=NSAConfig(compress_block=8, compress_stride=4, select_block=8, num_selected=6, window=16),
)
base = TrainConfig(
    model=model,
    data=DataConfig(path=str(folder / "documents.jsonl"), sequence_length=T, batch_size=16),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=min(30, STEPS // 2)),
    checkpoint=CheckpointConfig(every=STEPS),
    steps=STEPS,
    eval_every=max(1, STEPS // 6),
    eval_batches=8,
    sample_tokens=0,
)
trained = {}
for name, attention in (("NSA", "nsa"), ("full", "full")):
    config = dataclasses.replace(
        base, model=dataclasses.replace(model, attention=attention), run_dir=folder / attention
    )
    prepared = prepare(config)
    start = time.perf_counter()
    with capture_output():  # the progress lines of a few hundred steps
        result = run(prepared, plain=True)
    trained[name] = (prepared, result)
    size = sum(x.size for x in jax.tree.leaves(result.state.params))
    bits = result.held_out["held_out_bits_per_byte"]
    print(f"{name:>4}: {size:7} parameters, {bits:.3f} held-out bits per byte, {time.perf_counter() - start:.0f} s")

# %% [markdown]
# NSA has a few more parameters: its gates. The times are
# mostly compilation, at a length where sparsity saves nothing. They say nothing about speed.

# %%
from train.plot import draw_curves

draw_curves({name: result.files["metrics"].parent for name, (_, result) in trained.items()})

# %% [markdown]
# ## What the heads select
#
# `trace_attention` runs the model on a batch and returns what each layer gives to the attention. This is one held-out
# row:

# %%
from nsa_jax.visualize import plot_branches, plot_gates, plot_selection, trace_attention

prepared, result = trained["NSA"]
batch = prepared.held_out[0]
layers = trace_attention(
    prepared.model, {"params": result.state.params}, batch["tokens"][:1], segment_ids=batch["segment_ids"][:1]
)
names = dict(zip(layers, ("layer 0", "layer 1"), strict=True))
layers = {names[key]: inputs for key, inputs in layers.items()}
plot_selection(layers, model.nsa)

# %% [markdown]
# Rows are blocks of queries and columns are blocks of keys. Documents that share a row do not see each other. The
# diagonal, the block beside it and the first block of each document are always read. The scores of the compressed
# branch chose the rest.
#
# Next come the maps of one head, and the gates. In layer 0 the gate of the compressed branch is nearly shut at most
# positions and open at a few:

# %%
plot_branches(layers["layer 1"], model.nsa, head=0)

# %%
plot_gates(layers)

# %% [markdown]
# ## A needle in a haystack
#
# A haystack is code without any digit, of a given length, from files that training also saw. One line such as `#7` is
# hidden in it at a given depth. The last byte is `#`, and the model must continue with the digit. Chance is 10%. The
# window holds only the last 16 bytes. Anything farther away must come through the compressed tokens or the selected
# blocks.

# %%
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from train.model.transformer import logits

LENGTHS = (T // 2, T) if FAST else (32, 64, 96, 128)
DEPTHS = (0.0, 1.0) if FAST else (0.0, 0.25, 0.5, 0.75, 1.0)
TRIALS = 4 if FAST else 100


def haystack(draw, length, depth):
    """Text of `length` - 1 bytes that ends in `#`, and the digit hidden in it at `depth` (0: at the beginning)."""
    digit, text, at = draw.choice(DIGITS), "", draw.randrange(len(lines) - 60)
    size = length - 1 - len("#7\n") - len("#")
    while len(text) < size:
        text, at = text + lines[at] + "\n", at + 1
    text = text[: size - 1] + "\n"
    cut = size if depth == 1 else text.rfind("\n", 0, int(depth * size) + 1) + 1
    return f"{text[:cut]}#{digit}\n{text[cut:]}#", digit


def accuracy(prepared, params):
    """The share of right digits by depth and length."""

    @jax.jit
    def predict(params, tokens):
        hidden = prepared.model.apply({"params": params}, tokens)
        return jnp.argmax(logits(params, hidden[:, -1], prepared.config.model), axis=-1)

    grid = np.zeros((len(DEPTHS), len(LENGTHS)))
    draw = random.Random(1)
    for column, length in enumerate(LENGTHS):
        for line, depth in enumerate(DEPTHS):
            texts, digits = zip(*(haystack(draw, length, depth) for _ in range(TRIALS)), strict=True)
            tokenizer = prepared.tokenizer
            rows = np.stack([np.concatenate([[tokenizer.bos_id], tokenizer.encode(text)]) for text in texts])
            said = np.asarray(predict(params, jnp.asarray(rows, jnp.int32)))
            grid[line, column] = np.mean(
                [tokenizer.decode([token]) == d for token, d in zip(said, digits, strict=True)]
            )
    return grid


figure = Figure(figsize=(8.6, 3.4), layout="constrained")
panels = figure.subplots(1, 2, sharey=True)
for axes, (name, (prepared, result)) in zip(panels, trained.items(), strict=True):
    grid = accuracy(prepared, result.state.params)
    image = axes.imshow(100 * grid, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for (line, column), share in np.ndenumerate(grid):
        color = "black" if share > 0.5 else "white"
        axes.text(column, line, f"{100 * share:.0f}", ha="center", va="center", color=color)
    axes.set(title=name, xlabel="length of the haystack (bytes)")
    axes.set_xticks(range(len(LENGTHS)), LENGTHS)
    axes.set_yticks(range(len(DEPTHS)), [f"{100 * depth:.0f}" for depth in DEPTHS])
    print(f"{name:>4}: {100 * grid.mean():.0f}% right over the whole grid (chance: 10%)")
panels[0].set_ylabel("depth of the needle (%)")
figure.colorbar(image, ax=panels.tolist(), label="right digits (%)")
figure

# %% [markdown]
# In the stored run, NSA finds at least 90% of the needles in every cell, those included that only the compressed tokens
# and the selection can find. Full attention misses up to half of them early in the longer haystacks. Another seed gives
# other numbers.
#
# ## Text
#
# With about a third of a million parameters and minutes of training, expect text that looks like Python and makes no
# sense.

# %%
from train.generation.generator import generate
from train.generation.sampling import Sampling

for name, (prepared, result) in trained.items():
    settings = Sampling(max_tokens=20 if FAST else 100, temperature=0.7, seed=0)
    print(f"--- {name}")
    print(generate(result.state.params, prepared.model, prepared.tokenizer, "def ", settings))
print(f"\nThis notebook took {time.perf_counter() - began:.0f} s.")
