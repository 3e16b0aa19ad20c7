"""Pictures of what an attention layer does: selected blocks, maps of the branches, gates, bytes read.

Every function takes `AttentionInputs`, from plain arrays or from a model by `trace_attention`, and returns a
`matplotlib.figure.Figure`. What is drawn is computed by the reference, in float32 at least. `import nsa_jax` does not
import this module, nor matplotlib, which is in the extra `plot`.

Example:
  >>> import jax
  >>> from nsa_jax import NSAConfig, NSAttention
  >>> from nsa_jax.visualize import plot_selection, trace_attention
  >>> config = NSAConfig(compress_block=8, compress_stride=4, select_block=8, num_selected=4, window=16)
  >>> layer = NSAttention(num_heads=4, num_kv_heads=2, head_dim=8, config=config)
  >>> x = jax.random.normal(jax.random.key(0), (1, 64, 32))
  >>> layers = trace_attention(layer, jax.jit(layer.init)(jax.random.key(1), x), x)
  >>> plot_selection(layers, config).savefig("/dev/null", format="png")
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("nsa_jax.visualize needs matplotlib: pip install 'nsa-jax[plot]'") from error

from nsa_jax.attention import (
    AttentionInputs,
    compressed_attention,
    selected_attention,
    window_attention,
)
from nsa_jax.config import NSAConfig, num_blocks
from nsa_jax.precision import widened
from nsa_jax.selection import selection_recall
from nsa_jax.testing import reference_selection
from nsa_jax.tracing import trace_attention as trace_attention
from pallas_kernels.decode_attention.contract import bytes_read
from pallas_kernels.palette import COLORS

BRANCHES = ("compressed", "selected", "window")
COLORMAP = matplotlib.colormaps["cividis"].with_extremes(bad="white")
LONGEST = 4096  # the most tokens of a map, which is quadratic in them
LENGTHS = tuple(2**i for i in range(9, 18))  # tokens in a cache, as plotted by default

Layers = AttentionInputs | Mapping[str, AttentionInputs]


class AttentionMaps(NamedTuple):
    """Attention weights of one head's queries in each branch. A row sums to 1, or to 0 if its query sees nothing."""

    compressed: Float[np.ndarray, "Tq Nc"]
    selected: Float[np.ndarray, "Tq T"]
    window: Float[np.ndarray, "Tq T"]


def attention_maps(
    inputs: AttentionInputs, config: NSAConfig, *, row: int = 0, head: int = 0, scale: float | None = None
) -> AttentionMaps:
    """The attention weights of one query head in one row of the batch, in all three branches.

    Args:
      inputs: of at most 4096 tokens, because the maps are quadratic in them.
      config: sizes of the branches.
      row, head: which row of the batch and which query head.
      scale: see `nsa_attention`.

    Raises:
      ValueError: `row` or `head` does not exist, or the sequence is too long.
    """
    _check_inputs(inputs)
    _check_index("head", head, inputs.q.shape[2])
    inputs = _one_row(inputs, row)
    T, groups = inputs.kv.slc_k.shape[1], inputs.kv.slc_k.shape[2]
    if T > LONGEST:
        raise ValueError(f"inputs of {T} tokens: expected at most {LONGEST}, because maps are quadratic in them")
    group = head // (inputs.q.shape[2] // groups)
    blocks = reference_selection(inputs, config, scale=scale)[1][:, group : group + 1]
    q = inputs.q[:, :, head : head + 1]
    options: dict[str, Any] = {
        "config": config,
        "scale": scale,
        "segment_ids": inputs.segment_ids,
        "query_offset": inputs.query_offset,
        "implementation": "reference",
    }

    def weights(op: Any, keys: Array, *rest: Array) -> np.ndarray:
        """The weights of an op: its outputs if value i is the i-th unit vector."""
        k = keys[:, :, group : group + 1]
        count = k.shape[1]  # of compressed tokens there may be none, but values have a size
        values = jnp.eye(count, max(count, 1), dtype=q.dtype)[None, :, None, :]
        result = jax.jit(lambda *arrays: op(*arrays, **options))(q, k, values, *rest)
        o = result[0] if op is compressed_attention else result
        return np.asarray(o[0, :, 0, :count], np.float32)

    return AttentionMaps(
        weights(compressed_attention, inputs.kv.cmp_k),
        weights(selected_attention, inputs.kv.slc_k, blocks),
        weights(window_attention, inputs.kv.win_k),
    )


def selection_share(
    block_indices: Int[Array, "B K Tq n"], config: NSAConfig, *, query_offset: int = 0
) -> Float[np.ndarray, "B K Nq Nb"]:
    """For each query block and key block, the share of the queries that read the key block.

    Query blocks count from the one that contains `query_offset`. Key blocks count from 0 to the last query's own.
    """
    indices = np.asarray(block_indices)
    query_blocks = (int(query_offset) + np.arange(indices.shape[2])) // config.select_block
    rows = query_blocks - query_blocks[0]
    read = (indices[..., None] == np.arange(query_blocks[-1] + 1)).any(axis=3)
    begins = np.searchsorted(rows, np.arange(rows[-1] + 1))
    return np.add.reduceat(read.astype(np.float64), begins, axis=2) / np.bincount(rows)[:, None]


def plot_selection(layers: Layers, config: NSAConfig, *, row: int = 0) -> Figure:
    """Which blocks are read: query block by key block, one panel for each layer and group of heads.

    Args:
      layers: one layer's inputs, or several by name.
      config: sizes of the branches.
      row: of the batch.

    Raises:
      ValueError: `layers` has another type or is empty, or `row` does not exist.
    """
    named = _named(layers)
    groups = max(inputs.kv.cmp_k.shape[2] for inputs in named.values())
    figure = Figure(figsize=(1.2 + 2.9 * groups, 0.6 + 2.7 * len(named)), layout="constrained")
    panels = figure.subplots(len(named), groups, squeeze=False)
    for line, (name, inputs) in zip(panels, named.items(), strict=True):
        one = _one_row(inputs, row)
        share = selection_share(reference_selection(one, config)[1], config, query_offset=int(one.query_offset))[0]
        first = int(one.query_offset) // config.select_block
        for group, axes in enumerate(line):
            image = _image(axes, np.where(share[group] > 0, share[group], np.nan), first=first, vmin=0, vmax=1)
            axes.set(title=f"{name}, group {group}", xlabel=f"key block ({config.select_block} tokens)")
        line[0].set_ylabel(f"query block ({config.select_block} tokens)")
        figure.colorbar(image, ax=line.tolist(), label="share of queries that read it")
    return figure


def plot_branches(
    inputs: AttentionInputs, config: NSAConfig, *, row: int = 0, head: int = 0, scale: float | None = None
) -> Figure:
    """The attention maps of the three branches for one query head. For arguments and errors, see `attention_maps`."""
    maps = attention_maps(inputs, config, row=row, head=head, scale=scale)
    figure = Figure(figsize=(11, 3.7), layout="constrained")
    panels = figure.subplots(1, 3)
    keys = (f"compressed token (one every {config.compress_stride} tokens)", "key position (token)")
    for axes, name, weights in zip(panels, BRANCHES, maps, strict=True):
        image = _image(
            axes,
            np.where(weights > 0, weights, np.nan),
            first=int(inputs.query_offset),
            norm=PowerNorm(0.4, vmin=0, vmax=max(weights.max(initial=0), 1e-6)),
        )
        axes.set(title=f"{name}, head {head}", xlabel=keys[name != "compressed"])
        figure.colorbar(image, ax=axes, label="attention weight")
    panels[0].set_ylabel("query position (token)")
    return figure


def plot_importance(
    inputs: AttentionInputs, config: NSAConfig, *, row: int = 0, group: int = 0, scale: float | None = None
) -> Figure:
    """The importance of every block to every query of a group of heads, before and after the best n are chosen.

    Args:
      inputs: of one layer.
      config: sizes of the branches.
      row, group: which row of the batch and which key/value head.
      scale: see `nsa_attention`.

    Raises:
      ValueError: `row` or `group` does not exist.
    """
    _check_inputs(inputs)
    _check_index("group", group, inputs.kv.cmp_k.shape[2])
    inputs = _one_row(inputs, row)
    _, blocks, importance = (np.asarray(x[0, group]) for x in reference_selection(inputs, config, scale=scale))
    importance = importance[:, : num_blocks(inputs.kv.slc_k.shape[1], config)]
    chosen = (blocks[:, :, None] == np.arange(importance.shape[1])).any(axis=1)
    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    norm = PowerNorm(0.4, vmin=0, vmax=max(importance.max(initial=0), 1e-6))
    for axes, title, shown in (
        (panels[0], "all blocks", chosen | (importance > 0)),
        (panels[1], f"the {config.num_selected} that are read", chosen),
    ):
        first = int(inputs.query_offset)
        image = _image(axes, np.where(shown, importance, np.nan), first=first, norm=norm)
        axes.set(title=title, xlabel=f"key block ({config.select_block} tokens)")
    panels[0].set_ylabel("query position (token)")
    figure.colorbar(image, ax=panels.tolist(), label="importance (weighted sum of probabilities)")
    return figure


def plot_gates(layers: Layers) -> Figure:
    """How open the gates are: their distribution, and by position their mean and the middle 80% of rows and heads.

    Args:
      layers: one layer's inputs, or several by name. All rows and heads of each layer are counted.

    Raises:
      ValueError: `layers` has another type or is empty.
    """
    named = _named(layers)
    figure = Figure(figsize=(9, 0.4 + 2.6 * len(named)), layout="constrained")
    panels = figure.subplots(len(named), 2, squeeze=False)
    bins = np.linspace(0, 1, 41)
    for (histogram, course), (name, inputs) in zip(panels, named.items(), strict=True):
        gates = np.asarray(inputs.gates, np.float32)
        positions = int(inputs.query_offset) + np.arange(gates.shape[1])
        for branch, color, values in zip(BRANCHES, COLORS, np.moveaxis(gates, -1, 0), strict=False):
            share = np.full(values.size, 100 / values.size)
            histogram.hist(values.ravel(), bins, weights=share, histtype="step", color=color, label=branch)
            at_position = np.moveaxis(values, 1, 0).reshape(len(positions), -1)
            low, high = np.percentile(at_position, [10, 90], axis=1)
            course.plot(positions, at_position.mean(axis=1), color=color, label=branch, linewidth=1)
            course.fill_between(positions, low, high, color=color, alpha=0.2, linewidth=0)
        histogram.set(xlabel="gate", ylabel="tokens and heads (%)", title=name)
        course.set(xlabel="position (token)", ylabel="gate", ylim=(0, 1), title=name)
    panels[0, 0].legend(frameon=False)
    return figure


def plot_recall(
    layers: Layers, config: NSAConfig, positions: Int[Array, " S"], *, scale: float | None = None
) -> Figure:
    """What the selected blocks hold of each layer's attention, beside random and the best possible blocks.

    One bar for each K/V head, from `nsa_jax.selection.selection_recall`.

    Args:
      layers: inputs of one layer, or of several by name, for whole sequences.
      config: sizes of the branches.
      positions: int32 [S], the queries to look at, of every row.
      scale: see `nsa_attention`.
    """
    named = _named(layers)
    figure = Figure(figsize=(6.4, 1 + 1.8 * len(named)), layout="constrained")
    measure = jax.jit(lambda inputs: selection_recall(inputs, config, positions, scale=scale))
    for axes, (name, inputs) in zip(figure.subplots(len(named), 1, squeeze=False)[:, 0], named.items(), strict=True):
        recall = measure(inputs)
        heads = np.arange(len(recall.chosen))
        for offset, kind, color in zip((-0.27, 0, 0.27), ("random", "chosen", "best"), COLORS, strict=False):
            axes.bar(heads + offset, np.asarray(getattr(recall, kind)), 0.25, color=color, label=kind)
        axes.set(title=name, xlabel="key/value head", ylabel="share of the attention", ylim=(0, 1), xticks=heads)
    figure.axes[0].legend(frameon=False)
    return figure


def plot_bytes_read(
    config: NSAConfig,
    *,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    lengths: Sequence[int] = LENGTHS,
) -> Figure:
    """Bytes of keys and values that a layer reads to decode one token, by length, beside those of dense attention.

    Args:
      config: sizes of the branches.
      num_kv_heads, head_dim, v_head_dim, dtype: of the layer. If `v_head_dim` is None, it is `head_dim`.
      lengths: tokens in the cache. By default, powers of two from 512 to 131072.

    Raises:
      ValueError: there are no lengths, or one is not positive.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths = {lengths!r}: expected positive numbers of tokens")
    sizes: dict[str, Any] = {
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "v_head_dim": head_dim if v_head_dim is None else v_head_dim,
        "itemsize": jnp.dtype(dtype).itemsize,
    }
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    for label, color, style, dense in (("NSA", COLORS[0], "o-", False), ("dense", COLORS[2], "s--", True)):
        mebibytes = [bytes_read(T, config, dense=dense, **sizes) / 2**20 for T in lengths]
        axes.plot(lengths, mebibytes, style, color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="context (tokens)", ylabel="read per token and layer (MiB)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _named(layers: Layers) -> Mapping[str, AttentionInputs]:
    named = {"attention": layers} if isinstance(layers, AttentionInputs) else layers
    if not isinstance(named, Mapping) or not named or not all(isinstance(x, AttentionInputs) for x in named.values()):
        raise ValueError(f"layers = {type(layers).__name__}: expected AttentionInputs, or at least one by name")
    return named


def _check_inputs(inputs: Any) -> None:
    if not isinstance(inputs, AttentionInputs):
        raise ValueError(f"inputs = {type(inputs).__name__}: expected nsa_jax.AttentionInputs")


def _one_row(inputs: AttentionInputs, row: int) -> AttentionInputs:
    """One row of the batch, in float32 at least."""
    _check_index("row", row, inputs.q.shape[0])
    q, kv, gates = widened(jax.tree.map(lambda x: x[row : row + 1], (inputs.q, inputs.kv, inputs.gates)))
    segment_ids = None if inputs.segment_ids is None else inputs.segment_ids[row : row + 1]
    return AttentionInputs(q, kv, gates, segment_ids, inputs.query_offset)


def _check_index(name: str, value: int, size: int) -> None:
    if not isinstance(value, int | np.integer) or not 0 <= value < size:
        raise ValueError(f"{name} = {value!r}: expected 0 to {size - 1}")


def _image(axes: Axes, values: np.ndarray, *, first: int, **options: Any) -> Any:
    """An image whose rows are queries, from `first` on downwards. NaN is white, and so is an image without columns."""
    if not values.shape[1]:
        values = np.full((len(values), 1), np.nan)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    extent = (-0.5, values.shape[1] - 0.5, first + values.shape[0] - 0.5, first - 0.5)
    return axes.imshow(values, cmap=COLORMAP, aspect="auto", interpolation="nearest", extent=extent, **options)
