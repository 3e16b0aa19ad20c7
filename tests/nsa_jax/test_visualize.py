"""Figures show what the reference computes, nothing above the diagonal, and say what their axes are."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nsa_jax
import nsa_jax.nnx
from nsa_jax import NSAConfig, num_blocks, num_compressed
from nsa_jax.layer import nsa_layer_inputs
from nsa_jax.nnx import NSALayerConfig
from nsa_jax.testing import assert_trees_close, random_inputs, reference_selection
from nsa_jax.visualize import (
    attention_maps,
    plot_branches,
    plot_bytes_read,
    plot_gates,
    plot_importance,
    plot_recall,
    plot_selection,
    selection_share,
    trace_attention,
)

CONFIG = NSAConfig(4, 2, 8, 4, 1, 2, 10)
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
T = 45


@pytest.fixture(scope="module")
def inputs():
    return random_inputs(jax.random.key(0), CONFIG, T=T, B=2, v_head_dim=6, num_segments=2, **HEADS)


class Model(nn.Module):
    """Two layers, one after the other or under a scan."""

    scan: bool

    @nn.compact
    def __call__(self, x):
        if not self.scan:
            for name in ("first", "second"):
                x = nsa_jax.NSAttention(**HEADS, config=CONFIG, name=name)(x)
            return x
        body = nn.scan(
            lambda module, x, _: (module(x), None),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return body(nsa_jax.NSAttention(**HEADS, config=CONFIG, name="layers"), x, None)[0]


def panels(figure):
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def image_of(axes):
    """Values of a panel's image, 0 where it is blank."""
    return np.ma.filled(axes.images[0].get_array().astype(float), 0.0)


def test_importing_the_library_imports_no_matplotlib():
    code = "import sys, nsa_jax, nsa_jax.nnx, nsa_jax.testing; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_trace_finds_what_every_layer_gives_to_the_attention(scan):
    x = jax.random.normal(jax.random.key(1), (2, T, 16))
    model = Model(scan)
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(2), x))
    assert set(variables) == {"params"}
    layers = trace_attention(model, variables, x)
    assert list(layers) == (["layers/0", "layers/1"] if scan else ["first", "second"])
    first = {k: v[0] for k, v in variables["params"]["layers"].items()} if scan else variables["params"]["first"]
    expected = nsa_layer_inputs(first, x, config=NSALayerConfig(**HEADS, config=CONFIG))
    assert_trees_close(next(iter(layers.values()))[:3], expected[:3], 1e-6)
    twin = nsa_jax.nnx.NSAttention(16, rngs=nnx.Rngs(0), config=CONFIG, **HEADS)
    for name, value in first.items():
        getattr(twin, name)[...] = value
    assert_trees_close(trace_attention(twin, None, x)["attention"][:3], expected[:3], 1e-6)


def test_maps_are_the_weights_of_the_outputs(inputs):
    row, head = 1, 3
    maps = attention_maps(inputs, CONFIG, row=row, head=head)
    values = [v[row, :, head // 2] for v in (inputs.kv.cmp_v, inputs.kv.slc_v, inputs.kv.win_v)]
    o = sum(inputs.gates[row, :, head, i, None] * (maps[i] @ values[i]) for i in range(3))
    q, kv, gates, segment_ids, _ = inputs
    options = {"config": CONFIG, "segment_ids": segment_ids, "implementation": "reference"}
    whole = jax.jit(lambda *arrays: nsa_jax.nsa_attention(*arrays, **options))(q, kv, gates)
    assert_trees_close(o, whole[row, :, head])


def test_share_counts_the_queries_of_a_block_that_read_a_block(inputs):
    blocks = reference_selection(inputs, CONFIG)[1]
    share = selection_share(blocks, CONFIG)
    assert share.shape == (2, 2, num_blocks(T, CONFIG), num_blocks(T, CONFIG))
    queries = np.asarray(blocks)[1, 0, 16:24]
    assert share[1, 0, 2, 1] == np.mean([1 in chosen for chosen in queries])
    assert (share[:, :, -1].sum(-1) * 5 == (np.asarray(blocks)[:, :, 40:] >= 0).sum((-1, -2))).all()
    later = selection_share(blocks[:, :, 16:], CONFIG, query_offset=16)
    assert (later == share[:, :, 2:]).all()


def test_figures_show_what_the_reference_gives_and_nothing_above_the_diagonal(inputs):
    _, blocks, importance = reference_selection(inputs, CONFIG)
    share = selection_share(blocks, CONFIG)
    shown = panels(plot_selection({"a": inputs, "b": inputs}, CONFIG, row=1))
    assert len(shown) == 4
    for axes, group in zip(shown, (0, 1, 0, 1), strict=True):
        np.testing.assert_array_equal(image_of(axes), share[1, group])
        assert np.triu(image_of(axes), 1).sum() == 0

    first = panels(plot_selection(inputs, CONFIG))  # of the batch, if nothing else is asked for
    np.testing.assert_array_equal([image_of(axes) for axes in first], share[0])
    maps = attention_maps(inputs, CONFIG)
    assert_trees_close(maps, attention_maps(inputs, CONFIG, row=0, head=0), 0)
    for axes, weights in zip(panels(plot_branches(inputs, CONFIG)), maps, strict=True):
        np.testing.assert_array_equal(image_of(axes), weights)

    maps = attention_maps(inputs, CONFIG, head=1)
    for axes, weights in zip(panels(plot_branches(inputs, CONFIG, head=1)), maps, strict=True):
        np.testing.assert_array_equal(image_of(axes), weights)
    ends = np.arange(num_compressed(T, CONFIG)) * CONFIG.compress_stride + CONFIG.compress_block - 1
    assert maps.compressed[np.arange(T)[:, None] < ends[None, :]].sum() == 0
    assert np.triu(maps.selected, 1).sum() == np.triu(maps.window, 1).sum() == 0

    all_blocks = np.asarray(importance)[..., : num_blocks(T, CONFIG)]
    np.testing.assert_allclose(image_of(panels(plot_importance(inputs, CONFIG))[0]), all_blocks[0, 0], rtol=1e-6)
    before, after = panels(plot_importance(inputs, CONFIG, row=1, group=1))
    importance = all_blocks[1, 1]
    np.testing.assert_allclose(image_of(before), importance, rtol=1e-6)
    chosen = (np.asarray(blocks)[1, 1][:, :, None] == np.arange(importance.shape[1])).any(1)
    np.testing.assert_allclose(image_of(after), np.where(chosen, importance, 0), rtol=1e-6)
    assert (after.images[0].get_array().mask == ~chosen).all()
    future = np.arange(importance.shape[1])[None, :] > np.arange(T)[:, None] // CONFIG.select_block
    assert before.images[0].get_array().mask[future].all()


def test_a_sequence_without_compressed_tokens_can_be_drawn():
    short = random_inputs(jax.random.key(0), CONFIG, T=3, **HEADS)
    compressed, _, window = panels(plot_branches(short, CONFIG))
    assert image_of(compressed).sum() == 0
    assert image_of(window).sum() == pytest.approx(3)
    for figure in (plot_branches(short, CONFIG), plot_importance(short, CONFIG)):
        norms = [axes.images[0].norm for axes in panels(figure)]
        assert all(norm.vmin == 0 < norm.vmax <= 1 for norm in norms)


def test_gates_are_counted_and_averaged(inputs):
    histogram, course = panels(plot_gates(inputs))
    assert [line.get_label() for line in course.lines] == ["compressed", "selected", "window"]
    for i, line in enumerate(course.lines):
        np.testing.assert_allclose(line.get_ydata(), inputs.gates[..., i].mean(axis=(0, 2)), rtol=1e-6)
    assert len(histogram.patches) == 3


def test_bytes_are_those_of_the_compressed_tokens_blocks_and_window():
    lengths = (256, 4096, 65536)
    (axes,) = plot_bytes_read(NSAConfig(), num_kv_heads=2, head_dim=64, v_head_dim=32, lengths=lengths).axes
    per_key = 2 * (64 + 32) * 2 / 2**20
    sparse, dense = axes.lines
    np.testing.assert_allclose(dense.get_ydata(), [T * per_key for T in lengths])
    assert sparse.get_xdata().tolist() == dense.get_xdata().tolist() == list(lengths)
    expected = [(256 // 16 - 1 + 256 + 256), (4096 // 16 - 1 + 1024 + 512), (65536 // 16 - 1 + 1024 + 512)]
    np.testing.assert_allclose(sparse.get_ydata(), [keys * per_key for keys in expected])


def test_bytes_are_shown_from_one_token_on_and_by_default_for_contexts_of_512_to_131072():
    (axes,) = plot_bytes_read(NSAConfig(), num_kv_heads=1, head_dim=8).axes
    assert [line.get_xdata()[[0, -1]].tolist() for line in axes.lines] == [[512, 131072]] * 2
    (axes,) = plot_bytes_read(NSAConfig(), num_kv_heads=1, head_dim=8, lengths=(1,)).axes
    sparse, dense = (line.get_ydata()[0] for line in axes.lines)
    assert sparse == 2 * dense  # the token in its block and in the window


@pytest.mark.parametrize(
    "draw",
    [
        lambda layers: plot_selection(layers, CONFIG),
        plot_gates,
        lambda layers: plot_recall(layers, CONFIG, jnp.arange(20, T, 8)),
    ],
    ids=["selection", "gates", "recall"],
)
def test_every_layer_takes_the_same_height(draw, inputs):
    heights = [draw({str(i): inputs for i in range(count)}).get_figheight() for count in (1, 2, 4)]
    assert heights[2] - heights[1] == pytest.approx(2 * (heights[1] - heights[0]))
    assert heights[0] < heights[1]


def test_every_axis_is_labelled(inputs):
    figures = [
        plot_selection(inputs, CONFIG),
        plot_branches(inputs, CONFIG),
        plot_importance(inputs, CONFIG),
        plot_gates(inputs),
        plot_recall(inputs, CONFIG, jnp.arange(20, T, 4)),
        plot_bytes_read(CONFIG, num_kv_heads=1, head_dim=8),
    ]
    for figure in figures:
        assert all(axes.get_xlabel() for axes in panels(figure))
        assert panels(figure)[0].get_ylabel()
        assert all(axes.get_ylabel() for axes in figure.axes if axes.get_label() == "<colorbar>")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda i: plot_selection({}, CONFIG), r"layers = dict: expected AttentionInputs"),
        (lambda i: plot_gates([i]), r"layers = list: expected AttentionInputs"),
        (lambda i: plot_selection(i, CONFIG, row=2), r"row = 2: expected 0 to 1"),
        (lambda i: plot_branches(i, CONFIG, head=4), r"head = 4: expected 0 to 3"),
        (lambda i: plot_branches(i.q, CONFIG), r"inputs = .*Array.*: expected nsa_jax.AttentionInputs"),
        (lambda i: plot_importance(i, CONFIG, group=-1), r"group = -1: expected 0 to 1"),
        (
            lambda i: plot_bytes_read(CONFIG, num_kv_heads=1, head_dim=8, lengths=()),
            r"lengths = \(\): expected positive",
        ),
        (
            lambda i: plot_bytes_read(CONFIG, num_kv_heads=1, head_dim=8, lengths=(9, 0)),
            r"lengths = \(9, 0\): expected positive",
        ),
        (
            lambda i: trace_attention(nn.RMSNorm(use_scale=False), {}, i.q),
            r"RMSNorm: expected a module that",
        ),
        (lambda i: trace_attention("layer", None), r"module = str: expected a Linen module"),
    ],
)
def test_bad_input_is_named(inputs, draw, message):
    with pytest.raises(ValueError, match=message):
        draw(inputs)


def test_too_long_a_sequence_has_no_maps():
    long = jax.eval_shape(lambda: random_inputs(jax.random.key(0), CONFIG, T=4097, **HEADS))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), long)
    with pytest.raises(ValueError, match=r"inputs of 4097 tokens: expected at most 4096"):
        attention_maps(zeros, CONFIG)
