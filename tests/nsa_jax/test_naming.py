"""Names of parameters' axes: those of other codebases' rules place every parameter, and mesh axes do so directly."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import nsa_jax
import nsa_jax.nnx
from nsa_jax import NSAConfig
from nsa_jax.layer import NSALayerConfig, nsa_parameters
from nsa_jax.naming import FLAX_AXES, LOGICAL_AXES, MAXTEXT_AXES, UNNAMED_AXES
from nsa_jax.testing import assert_trees_close

CONFIG = NSAConfig(4, 2, 8, 3, 1, 1, 10)
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
E, T = 16, 21
# As these codebases write them, for a mesh of two axes.
MAXTEXT_RULES = (
    *(("mlp", ["tensor"]), ("heads", ["tensor"]), ("q_heads", ["tensor"]), ("kv_heads", ["tensor"])),
    *(("embed", ["fsdp"]), ("norm", ["tensor"]), ("kv", []), ("kv_head_dim", [])),
)
FLAX_RULES = (("batch", "fsdp"), ("mlp", "tensor"), ("heads", "tensor"), ("embed", "fsdp"), ("kv", None))
BY_MESH_AXES = {**UNNAMED_AXES, "embed": "fsdp", "heads": "tensor", "kv_heads": "tensor"}
# Where every parameter lies by any of these.
PLACES = {
    "q_kernel": ("fsdp", "tensor"),
    "k_kernel": ("fsdp", "tensor"),
    "v_kernel": ("fsdp", "tensor"),
    "o_kernel": ("tensor", None, "fsdp"),
    "q_bias": ("tensor",),
    "k_bias": ("tensor",),
    "v_bias": ("tensor",),
    "o_bias": ("fsdp",),
    "q_norm_scale": (),
    "k_norm_scale": (),
    "gate_in_kernel": ("fsdp",),
    "gate_in_bias": (),
    "gate_out_kernel": (None, "tensor"),
    "gate_out_bias": ("tensor",),
    **{f"phi_{x}_{name}": () for x in "kv" for name in ("position", "in_kernel", "in_bias", "out_kernel", "out_bias")},
}
FIELDS = {**HEADS, "config": CONFIG, "compression": "mlp", "qk_norm": True, "use_bias": True}


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(kind,) * 2)


def trimmed(spec):
    """A spec without what is whole at its end, and with names instead of tuples of one."""
    names = [axes[0] if isinstance(axes, tuple | list) and len(axes) == 1 else axes or None for axes in spec]
    while names and names[-1] is None:
        names.pop()
    return tuple(names)


@functools.cache
def alone():
    """x, the parameters, and the output on one device."""
    layer, x = nsa_jax.NSAttention(**FIELDS), jax.random.normal(jax.random.key(0), (2, T, E))
    variables = nn.unbox(jax.jit(layer.init)(jax.random.key(1), x))
    return jax.device_get((x, variables, jax.jit(layer.apply)(variables, x)))


@pytest.mark.parametrize(
    ("names", "rules"),
    [(MAXTEXT_AXES, MAXTEXT_RULES), (FLAX_AXES, FLAX_RULES), (BY_MESH_AXES, ())],
    ids=["MaxText", "Flax", "mesh axes"],
)
def test_rules_of_other_codebases_place_every_parameter_of_both_flavours(names, rules):
    mesh, (x, variables, expected) = mesh_of(), alone()
    layer = nsa_jax.NSAttention(**FIELDS, logical_axes=names, head_axes="tensor")
    boxed = jax.eval_shape(layer.init, jax.random.key(1), x)
    if rules:
        shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)
    else:
        shardings = nn.get_sharding(boxed, mesh)
    assert {name: trimmed(s.spec) for name, s in shardings["params"].items()} == PLACES
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        actual = jax.jit(layer.apply)(jax.device_put(variables, shardings), x)
        twin = nnx.eval_shape(lambda: nsa_jax.nnx.NSAttention(E, rngs=nnx.Rngs(0), **FIELDS, logical_axes=names))
        specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(twin)))
    assert {name: trimmed(spec) for name, spec in specs.items()} == PLACES
    assert_trees_close(jax.device_get(actual), expected, 1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_a_layer_in_a_model_that_annotates_with_mesh_axes_is_split_when_it_is_made(kind):
    """Beside Flax's own layers, which are, too."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            split = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tensor"))
            self.up = nnx.Linear(E, E, kernel_init=split, use_bias=False, rngs=rngs)
            self.attention = nsa_jax.nnx.NSAttention(E, rngs=rngs, **FIELDS, logical_axes=BY_MESH_AXES)

    with jax.set_mesh(mesh_of(kind)):
        model = Model(nnx.Rngs(0))
        assert trimmed(model.up.kernel[...].sharding.spec) == ("fsdp", "tensor")
        for name, place in PLACES.items():
            assert trimmed(getattr(model.attention, name)[...].sharding.spec) == place, name


@pytest.mark.parametrize("name", [None, "layers"])
def test_a_scan_over_layers_need_not_name_their_axis(name):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nsa_jax.NSAttention(**FIELDS, name="attention")(x), None

    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
    scanned = nn.scan(Layer, **axes, metadata_params={} if name is None else {nn.PARTITION_NAME: name})()
    x, variables, _ = alone()
    boxed = jax.eval_shape(scanned.init, jax.random.key(1), x, None)
    specs = nn.get_partition_spec(boxed)["params"]["attention"]
    assert specs["q_kernel"] == jax.P(name, "embed", "heads", "head_dim")
    stacked = jax.tree.map(lambda p: np.stack([p] * 3), variables["params"])
    actual, _ = jax.jit(scanned.apply)({"params": {"attention": stacked}}, x, None)
    layer = nsa_jax.NSAttention(**FIELDS)
    for _ in range(3):
        x = x + jax.jit(layer.apply)(variables, x)
    assert_trees_close(actual, x, 1e-5)


def test_without_a_mesh_a_layer_is_made_whole():
    layer = nsa_jax.nnx.FullAttention(E, rngs=nnx.Rngs(0), **HEADS, logical_axes=BY_MESH_AXES)
    assert layer.q_kernel.get_metadata("out_sharding") == ("fsdp", "tensor", None)
    with jax.set_mesh(mesh_of()):  # our own names are no axes of it
        assert nsa_jax.nnx.FullAttention(E, rngs=nnx.Rngs(0), **HEADS).q_kernel.shape == (E, 4, 8)


def test_the_list_of_names_is_that_of_all_parameters():
    """Every mapping has all of them, and names that it does not have stay."""
    names = set()
    for compression in ("mlp", "linear"):
        config = NSALayerConfig(**{**FIELDS, "compression": compression})
        names |= {axis for p in nsa_parameters(config, E).values() for axis in p.axes}
    assert names == set(LOGICAL_AXES) == set(MAXTEXT_AXES) == set(FLAX_AXES) == set(UNNAMED_AXES)
    layer = nsa_jax.FullAttention(**HEADS, logical_axes={"heads": "q"})
    boxed = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 2, E)))["params"]
    assert boxed["q_kernel"].names == ("embed", "q", "head_dim")
    assert boxed["k_kernel"].names == ("embed", "kv_heads", "head_dim")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"head": "q"}, r"logical_axes\['head'\]: expected one of embed, heads"),
        ({"heads": 3}, r"logical_axes\['heads'\] = 3: expected the name of a mesh axis"),
        ("heads", r"logical_axes = 'heads': expected names by those of embed, heads"),
    ],
)
def test_other_names_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        nsa_jax.nnx.FullAttention(E, rngs=nnx.Rngs(0), **HEADS, logical_axes=names)
    layer = nsa_jax.FullAttention(**HEADS, logical_axes=names)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 2, E)))
