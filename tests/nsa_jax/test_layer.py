"""The Flax modules: Linen and NNX agree, every parameter is named, reached and trained, packing changes nothing."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from programs import sums

import nsa_jax
import nsa_jax.nnx
from nsa_jax import NSAConfig, compress, num_compressed
from nsa_jax.compression import COMPRESSIONS, add_bias, phi_shapes
from nsa_jax.rope import RopeScaling, apply_rope
from nsa_jax.testing import assert_trees_close

CONFIG = NSAConfig(4, 2, 8, 4, 1, 2, 10)
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "v_head_dim": 6}
E = 32
T = 45


def layer(**fields):
    return nsa_jax.NSAttention(**{**HEADS, "config": CONFIG, **fields})


def embeddings(seed=0, B=2):
    return jax.random.normal(jax.random.key(seed), (B, T, E))


PAPER = {"compression": "mlp", "share_kv": False}  # the paper's layout
EVERY_PHI = [{"compression": phi, "share_kv": share} for phi in ("mlp", "linear", "mean") for share in (False, True)]
OPTIONS = pytest.mark.parametrize(
    "options",
    [
        # By default every phi once, with the keys and values of branches in turn independent and shared.
        *(pytest.param(x, marks=pytest.mark.exhaustive if i in (1, 2, 5) else ()) for i, x in enumerate(EVERY_PHI)),
        {"share_kv": True, "qk_norm": True},
        {**PAPER, "tie_keys": True, "qk_norm": True, "output_init_scale": 0.5},
        {"compression": "mlp", "tie_keys": True},
    ],
    ids=lambda options: ", ".join(f"{name}={value}" for name, value in options.items()),
)


def test_parameters_have_the_shapes_of_the_equations():
    """phi has twice as many hidden units as the head is wide, the gates a quarter of the width, unless told."""
    l, K, Dk, Dv = CONFIG.compress_block, 2, 8, 6  # noqa: E741
    expected = {"q_kernel": (E, 4, Dk), "o_kernel": (4, Dv, E)}
    gates = {"gate_in_kernel": (E, E // 4), "gate_in_bias": (E // 4,)}
    gates |= {"gate_out_kernel": (E // 4, 4, 3), "gate_out_bias": (4, 3)}
    by_default = expected | gates | {"k_kernel": (E, K, Dk), "v_kernel": (E, K, Dv)}
    for branch in ("cmp", "slc", "win"):
        expected |= {f"{branch}_k_kernel": (E, K, Dk), f"{branch}_v_kernel": (E, K, Dv)}
    for name, D in (("k", Dk), ("v", Dv)):
        expected |= {f"phi_{name}_position": (l, D), f"phi_{name}_in_kernel": (l, D, 2 * D)}
        expected |= {
            f"phi_{name}_in_bias": (2 * D,),
            f"phi_{name}_out_kernel": (2 * D, D),
            f"phi_{name}_out_bias": (D,),
        }
    expected |= gates

    def shapes(**fields):
        parameters = nn.unbox(jax.eval_shape(layer(**fields).init, jax.random.key(0), embeddings()))["params"]
        return {name: x.shape for name, x in parameters.items()}

    assert shapes() == by_default
    assert shapes(**PAPER) == expected
    assert shapes(**PAPER, compression_hidden_dim=3)["phi_v_out_kernel"] == (3, Dv)
    assert shapes(**PAPER, gate_hidden_dim=5) == expected | {
        "gate_in_kernel": (E, 5),
        "gate_in_bias": (5,),
        "gate_out_kernel": (5, 4, 3),
    }


@OPTIONS
def test_linen_and_nnx_have_the_same_parameters_and_numbers(options):
    x = embeddings()
    segment_ids = jnp.sort(jax.random.randint(jax.random.key(1), (2, T), 0, 3, jnp.int32), axis=1)
    linen = layer(**options)
    boxed = jax.jit(linen.init)(jax.random.key(2), x)
    variables = nn.unbox(boxed)
    twin = nsa_jax.nnx.NSAttention(E, rngs=nnx.Rngs(0), config=CONFIG, **options, **HEADS)
    theirs = {name: value for name, value in vars(twin).items() if isinstance(value, nnx.Param)}
    assert {n: p.shape for n, p in variables["params"].items()} == {n: p[...].shape for n, p in theirs.items()}
    for name, value in variables["params"].items():
        assert theirs[name].get_metadata("out_sharding") == boxed["params"][name].names
        theirs[name][...] = value
    expected = jax.jit(lambda v: linen.apply(v, x, segment_ids=segment_ids))(variables)
    assert (nnx.jit(lambda m: m(x, segment_ids=segment_ids))(twin) == expected).all()


def test_full_attention_twins_agree_and_a_window_of_T_is_no_window():
    x = embeddings()
    linen = nsa_jax.FullAttention(**HEADS)
    variables = nn.unbox(jax.jit(linen.init)(jax.random.key(2), x))
    twin = nsa_jax.nnx.FullAttention(E, rngs=nnx.Rngs(0), **HEADS)
    for name, value in variables["params"].items():
        getattr(twin, name)[...] = value
    expected, whole, narrow = (jax.jit(linen.clone(window=w).apply)(variables, x) for w in (None, T, 3))
    assert_trees_close(nnx.jit(lambda m: m(x))(twin), expected, 1e-6)
    assert_trees_close(whole, expected, 1e-6)
    assert not jnp.allclose(narrow, expected)


@OPTIONS
def test_gradients_reach_every_parameter(options):
    x = embeddings()
    module = layer(**options)
    parameters = nn.unbox(jax.jit(module.init)(jax.random.key(3), x))["params"]
    cotangent = jax.random.normal(jax.random.key(4), x.shape)
    gradient = jax.jit(jax.grad(lambda p: (module.apply({"params": p}, x) * cotangent).sum()))(parameters)
    for name, value in gradient.items():
        assert jnp.isfinite(value).all(), name
        per_entry = np.asarray(jnp.abs(value).reshape(-1))
        # A bias of compressed keys is rotated differently at each block, so it too moves the scores.
        assert (per_entry > 0).mean() > 0.99, name


@pytest.mark.parametrize("attention", ["nsa", "full", "window"])
def test_packed_documents_equal_the_documents_alone(attention):
    module = {
        "nsa": layer(),
        "full": nsa_jax.FullAttention(**HEADS),
        "window": nsa_jax.FullAttention(**HEADS, window=10),
    }[attention]
    lengths = (16, 24, 5)  # starts on multiples of the selection block
    x = embeddings(B=1)
    segment_ids = jnp.asarray(np.repeat(np.arange(3), lengths)[None], jnp.int32)
    variables = jax.jit(module.init)(jax.random.key(5), x)
    packed = jax.jit(lambda v, x: module.apply(v, x, segment_ids=segment_ids))
    apply = jax.jit(module.apply)
    begin = 0
    for length in lengths:
        here = slice(begin, begin + length)
        alone = apply(variables, x[:, here])
        for others in (x, jnp.full_like(x, jnp.nan)):
            assert_trees_close(packed(variables, others.at[:, here].set(x[:, here]))[:, here], alone, 1e-5)
        begin += length


@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_padding_of_a_prefill_reaches_no_gradient_whatever_it_holds(attention):
    module = {"nsa": layer(), "full": nsa_jax.FullAttention(**HEADS)}[attention]
    x, counts = embeddings()[:, :20], jnp.array([20, 13])
    variables = nn.unbox(jax.jit(module.init)(jax.random.key(5), x))
    cache = module.init_cache(batch_size=2, max_length=20)
    padding = (jnp.arange(20)[None, :] >= counts[:, None])[..., None]

    @jax.jit
    def gradients(variables, x):
        def loss(variables, x):
            y, _ = module.apply(variables, x, cache, num_tokens=counts, method="prefill")
            return jnp.where(padding, 0, jnp.sin(y)).sum()

        return jax.grad(loss, (0, 1))(variables, x)

    expected = gradients(variables, jnp.where(padding, 0, x))
    for value in (jnp.nan, jnp.inf, 3e38):
        actual = gradients(variables, jnp.where(padding, value, x))
        np.testing.assert_array_equal(jnp.where(padding, actual[1], 0), 0)
        assert_trees_close(actual, expected, 1e-6)


def test_bfloat16_computation_is_close_to_float32():
    x = embeddings()
    # Blocks whose importance is nearly equal may be chosen otherwise in bfloat16, so here every block is chosen.
    every = NSAConfig(4, 2, 8, 8, 1, 2, 10)
    variables = jax.jit(layer(config=every).init)(jax.random.key(6), x)
    expected = jax.jit(layer(config=every).apply)(variables, x)
    actual = jax.jit(layer(config=every, dtype=jnp.bfloat16).apply)(variables, x)
    assert actual.dtype == jnp.bfloat16
    assert_trees_close(actual, expected.astype(jnp.bfloat16), 3e-2)


def test_gradients_of_biases_are_summed_in_float32():
    keys = jax.random.split(jax.random.key(7))
    x, cotangent = (jax.random.normal(key, (4096, 24), jnp.bfloat16) for key in keys)
    for bias in (jnp.ones(24), jnp.ones((4, 6))):
        shape = (-1, *bias.shape)
        _, pull = jax.vjp(lambda bias, shape=shape: add_bias(x.reshape(shape), bias), bias.astype(jnp.bfloat16))
        (gradient,) = jax.jit(pull)(cotangent.reshape(shape))
        assert_trees_close(
            gradient, cotangent.reshape(shape).astype(jnp.float32).sum(axis=0).astype(jnp.bfloat16), 1e-6
        )


@pytest.mark.parametrize("compression", ["mlp", "linear", "mean"])
def test_no_gradient_is_summed_in_bfloat16(compression):
    x = jax.ShapeDtypeStruct((2, T, E), jnp.bfloat16)
    module = layer(compression=compression, dtype=jnp.bfloat16)
    variables = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x))
    program = jax.make_jaxpr(jax.grad(lambda v, x: module.apply(v, x).astype(jnp.float32).sum()))(variables, x)
    assert sums(program)
    assert jnp.bfloat16 not in sums(program)


@pytest.mark.parametrize("method", ["mlp", "linear", "mean"])
def test_compression_equals_phi_of_each_window(method):
    l, d, D, F = 6, 2, 5, 7  # noqa: E741
    config = NSAConfig(compress_block=l, compress_stride=d, select_block=8)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 23, 3, D))
    shapes = {
        "position": (l, D),
        "in_kernel": (l, D, F if method == "mlp" else D),
        "in_bias": (F,),
        "out_kernel": (F, D),
        "out_bias": (D,),
    }
    parameters = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    expected = np.zeros((2, num_compressed(23, config), 3, D))
    for b, i, h in np.ndindex(expected.shape[:3]):
        block = x[b, i * d : i * d + l, h]
        if method == "mean":
            expected[b, i, h] = block.mean(axis=0)
            continue
        hidden = (block + parameters["position"]).reshape(-1) @ parameters["in_kernel"].reshape(l * D, -1)
        if method == "mlp":
            hidden = hidden + parameters["in_bias"]
            hidden = hidden / (1 + np.exp(-hidden)) @ parameters["out_kernel"] + parameters["out_bias"]
        expected[b, i, h] = hidden
    with jax.enable_x64(True):
        actual = compress(jnp.asarray(x), jax.tree.map(jnp.asarray, parameters), config=config, method=method)
        assert_trees_close(actual, jnp.asarray(expected), 1e-12)


def test_overlapping_windows_are_never_materialised():
    """No array of the traced program holds every window of every head."""
    config = NSAConfig()
    k = jax.ShapeDtypeStruct((1, 4096, 2, 16), jnp.float32)
    for method in COMPRESSIONS:
        shapes = phi_shapes(method, 16, 32, config)
        phi = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        jaxpr = jax.make_jaxpr(lambda k, p, method=method: compress(k, p, config=config, method=method))(k, phi)
        largest = max(v.aval.size for e in jaxpr.jaxpr.eqns for v in e.outvars)
        assert largest < num_compressed(4096, config) * config.compress_block * 2 * 16


def test_bad_fields_are_refused_by_name():
    x = embeddings()
    for fields, message in (
        ({"num_kv_heads": 3}, "num_kv_heads = 3: expected a divisor of num_heads = 4"),
        ({"head_dim": 7}, "head_dim = 7: rotary position embedding needs an even head size"),
        ({"compression": "max"}, "compression = 'max': expected one of mean, linear, mlp"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(**fields).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"x: int32 \(2, 3\): expected a float array"):
        layer().init(jax.random.key(0), jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"segment_ids: int32 \(2, 4\): expected integers of shape \(2, 45\)"):
        layer().init(jax.random.key(0), x, segment_ids=jnp.zeros((2, 4), jnp.int32))


def initial(module):
    x = embeddings()
    return nn.unbox(jax.jit(module.init)(jax.random.key(3), x)), x


def traced(module, variables, x):
    apply = jax.jit(functools.partial(module.apply, mutable=["intermediates"]))
    return apply(variables, x)[1]["intermediates"]["attention_inputs"][0]


def test_normalised_queries_and_keys_have_a_root_mean_square_of_their_scale_whatever_the_kernel():
    module = layer(**PAPER, qk_norm=True)
    variables, x = initial(module)
    loud = jax.tree.map(lambda p: p, variables)
    loud["params"]["q_kernel"] *= 100
    loud["params"]["slc_k_kernel"] *= 100
    loud["params"]["win_k_norm_scale"] *= 3
    before, after = (traced(module, v, x) for v in (variables, loud))
    for size, array in ((1, after.q), (1, after.kv.slc_k), (3, after.kv.win_k)):
        assert_trees_close(jnp.sqrt(jnp.mean(array**2, axis=-1)), jnp.full(array.shape[:-1], float(size)), 1e-4)
    assert_trees_close(after.q, before.q, 1e-5)
    assert not jnp.allclose(before.kv.cmp_v, 0)


@pytest.mark.parametrize("options", [{}, {**PAPER, "tie_keys": True}])
def test_biases_are_added_to_queries_keys_and_values_before_norm_and_rotation(options):
    module = layer(**options, qkv_bias=True, rope_theta=None)
    variables, x = initial(module)
    biases = {name: p for name, p in variables["params"].items() if name.endswith(("q_bias", "k_bias", "v_bias"))}
    assert all((bias == 0).all() for bias in biases.values())
    without = jax.tree.map(lambda p: p, variables)
    for number, name in enumerate(biases):
        variables["params"][name] += jax.random.normal(jax.random.key(number), biases[name].shape)
    before, after = (traced(module, v, x) for v in (without, variables))
    added = {"q": after.q - before.q} | {
        name: value - getattr(before.kv, name) for name, value in after.kv._asdict().items()
    }
    for name, difference in added.items():
        short = name.removeprefix("cmp_").removeprefix("slc_").removeprefix("win_")
        source = "slc_k" if name == "cmp_k" and "tie_keys" in options else name
        bias = variables["params"][f"{source if options and short != 'q' else short}_bias"]
        if name != "cmp_v" or not options:  # an MLP phi makes something else of it
            assert_trees_close(difference, jnp.broadcast_to(bias, difference.shape), 1e-5)


def test_full_attention_normalises_queries_and_keys_and_not_values():
    x = embeddings()
    module = nsa_jax.FullAttention(**HEADS, qk_norm=True)
    variables = nn.unbox(module.init(jax.random.key(2), x))
    y = module.apply(variables, x)
    for name, same in (("q_kernel", True), ("k_kernel", True), ("v_kernel", False)):
        changed = {"params": {**variables["params"], name: variables["params"][name] * 7}}
        assert jnp.allclose(module.apply(changed, x), y, atol=1e-4) == same, name


@pytest.mark.parametrize("options", [{}, {**PAPER, "tie_keys": True}, {"compression": "mlp", "tie_keys": True}])
def test_a_querys_score_for_a_block_is_the_mean_of_its_scores_for_the_keys_there(options):
    """So it is with shared and with tied keys, whatever their positions and norms."""
    module = layer(**options, qk_norm=True)
    variables, x = initial(module)
    inputs = traced(module, variables, x)
    q, kv = inputs.q.reshape(2, T, 2, 2, 8), inputs.kv
    scores = jnp.einsum("btkgd,bskd->btkgs", q, kv.slc_k)
    l, d = CONFIG.compress_block, CONFIG.compress_stride  # noqa: E741
    means = [scores[..., i : i + l].mean(axis=-1) for i in range(0, T - l + 1, d)]
    actual = jnp.einsum("btkgd,bnkd->btkgn", q, kv.cmp_k)
    assert_trees_close(actual, jnp.stack(means, axis=-1), 1e-5)


def test_tied_keys_have_no_parameters_of_their_own():
    parameters = initial(layer(**PAPER, tie_keys=True, qk_norm=True))[0]["params"]
    assert not {name for name in parameters if name.startswith(("cmp_k", "phi_k"))}
    assert {"cmp_v_kernel", "phi_v_in_kernel", "slc_k_norm_scale"} <= set(parameters)


@pytest.mark.parametrize("compression", ["mlp", "linear"])
def test_what_a_network_makes_of_keys_is_rotated_at_the_first_token(compression):
    module = layer(compression=compression)
    variables, x = initial(module)
    plain = traced(layer(compression=compression, rope_theta=None), variables, x).kv
    rotated = traced(module, variables, x).kv
    first = jnp.arange(plain.cmp_k.shape[1], dtype=jnp.int32)[None] * CONFIG.compress_stride
    assert_trees_close(rotated.cmp_k, apply_rope(plain.cmp_k, first, 10_000.0, RopeScaling()), 1e-5)


def test_the_initial_output_projection_is_scaled_and_nothing_else():
    plain, _x = initial(layer())
    scaled, _ = initial(layer(output_init_scale=0.25))
    for name, value in plain["params"].items():
        factor = 0.25 if name == "o_kernel" else 1.0
        assert_trees_close(scaled["params"][name], factor * value, 1e-6)
