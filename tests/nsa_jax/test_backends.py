"""The registry of backends, and which of them computes what."""

import dataclasses
import functools
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
from nsa_jax import NSAConfig, backends, nsa_attention
from nsa_jax.backends import choice, registry
from nsa_jax.testing import assert_trees_close, random_inputs
from pallas_kernels.devices import current_device
from pallas_kernels.mosaic.faster import Row
from tests.pallas_kernels.cases import skip_without_mosaic

CONFIG = NSAConfig(
    compress_block=4, compress_stride=2, select_block=8, num_selected=4, num_init=1, num_local=2, window=10
)
BUILT_IN = ("mosaic", "triton", "xla", "reference")
BRANCHES = ("compressed_attention", "selected_attention", "window_attention")
OPS = (*BRANCHES, "select_blocks")


@pytest.fixture
def inputs():
    return random_inputs(jax.random.key(0), CONFIG, T=37, num_heads=4, num_kv_heads=2, head_dim=8, num_segments=2)


@pytest.fixture
def register():
    """`backends.register`, undone after the test."""
    before = backends.names()
    yield backends.register
    for name in backends.names():
        if name not in before:
            backends.unregister(name)


@pytest.fixture
def mosaic_faster(monkeypatch):
    """Says which calls Mosaic is faster for, instead of the tables."""

    def replace(faster):
        order = [dataclasses.replace(one, faster=faster) if one.name == "mosaic" else one for one in registry._order]
        monkeypatch.setattr(registry, "_order", order)

    skip_without_mosaic(interpreted=False)
    return replace


def backend(name="mine", **functions):
    """An object with a name and some functions, as anyone might write one."""
    return SimpleNamespace(name=name, **functions)


def of(other, op):
    """A function that calls another backend's and counts how often it was called."""

    def call(*args, **kwargs):
        call.count += 1
        return getattr(backends.get(other), op)(*args, **kwargs)

    call.count = 0
    return call


def refusing(error):
    def call(*args, **kwargs):
        raise error

    return call


def explained(inputs, **options):
    return backends.explain(nsa_attention, *inputs[:3], config=CONFIG, segment_ids=inputs.segment_ids, **options)


def attend(inputs, implementation=None, **options):
    run = functools.partial(nsa_attention, config=CONFIG, implementation=implementation, **options)
    return jax.jit(run)(*inputs[:3], segment_ids=inputs.segment_ids)


def gradients(inputs, implementation=None):
    def loss(q, kv, gates):
        o = nsa_attention(q, kv, gates, config=CONFIG, segment_ids=inputs.segment_ids, implementation=implementation)
        return jnp.sum(jnp.sin(o))

    return jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs[:3])


def abstract(kind):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=auto, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def gpu_shapes(config=None, head_dim=128):
    """Arguments as large as users have, without their values."""
    return jax.eval_shape(
        lambda: random_inputs(
            jax.random.key(0), config or NSAConfig(), T=2048, num_heads=64, num_kv_heads=4, head_dim=head_dim,
            dtype=jnp.bfloat16,
        )[:3]
    )  # fmt: skip


# The registry


def test_built_in_backends_stand_in_order():
    assert backends.names() == BUILT_IN
    assert [backends.get(name).name for name in BUILT_IN] == list(BUILT_IN)


def test_a_backend_goes_in_front_of_all_or_of_the_one_that_is_named(register):
    register(backend("first", window_attention=len))
    register(backend("second", window_attention=len), before="triton")
    register(backend("third", window_attention=len), before="second")
    assert backends.names() == ("first", "mosaic", "third", "second", *BUILT_IN[1:])
    backends.unregister("third")
    assert backends.names() == ("first", "mosaic", "second", *BUILT_IN[1:])


@pytest.mark.parametrize(
    ("new", "before", "message"),
    [
        (SimpleNamespace(window_attention=len), None, "expected an object with a name"),
        (SimpleNamespace(name="", window_attention=len), None, "expected an object with a name"),
        (SimpleNamespace(name=3, window_attention=len), None, "expected an object with a name"),
        (backend("triton", window_attention=len), None, "'triton': expected a name other than mosaic, triton"),
        (backend("fused", window_attention=len), None, "'fused': expected another name"),
        (backend(), None, "expected at least one of the functions compressed_attention"),
        (backend(window_attention="no function"), None, "expected at least one of the functions"),
        (backend(window_attention=len), "cuda", "before = 'cuda': expected one of mosaic, triton, xla, reference"),
    ],
)
def test_what_is_no_backend_is_refused_by_name(new, before, message):
    with pytest.raises(ValueError, match=message):
        backends.register(new, before=before)
    assert backends.names() == BUILT_IN


def test_unknown_and_built_in_backends_are_not_taken_out():
    for name in ("cuda", "mine"):
        with pytest.raises(ValueError, match=f"name = '{name}': expected one of mosaic"):
            backends.unregister(name)
        with pytest.raises(ValueError, match=f"name = '{name}': expected one of mosaic"):
            backends.get(name)
    for name in BUILT_IN:
        with pytest.raises(ValueError, match="expected a backend that was added"):
            backends.unregister(name)


def test_an_implementation_that_nobody_registered_is_refused_by_name(inputs, register):
    register(backend(window_attention=of("xla", "window_attention")))
    with pytest.raises(ValueError, match="implementation = 'cuda': expected one of mine, mosaic, triton, xla"):
        attend(inputs, "cuda")


# A backend of one op


class OneOp:
    """Ten lines outside the package: the window by somebody's own function, through which JAX differentiates."""

    name = "one_op"
    differentiable = True

    def window_attention(self, q, k, v, segment_starts, query_offset, *, config, scale):
        o, lse = backends.get("xla").window_attention(q, k, v, segment_starts, query_offset, config=config, scale=scale)
        return o, lse


class OneKernel:
    """The same without gradients of its own."""

    name = "one_kernel"

    def window_attention(self, *args, **kwargs):
        return backends.get("xla").window_attention(*args, **kwargs)


@pytest.mark.parametrize("mine", [OneOp(), OneKernel()])
def test_a_backend_of_one_op_computes_that_op_and_the_rest_is_unchanged(inputs, register, mine):
    before, expected, expected_gradients = explained(inputs), attend(inputs), gradients(inputs)
    register(mine, before="triton")
    after = explained(inputs)
    assert after["window_attention"].backend == mine.name
    assert "mosaic" in dict(after["window_attention"].refusals)
    for op in ("compressed_attention", "select_blocks", "selected_attention"):
        assert after[op].backend == before[op].backend == "xla"
    assert mine.name in str(after)
    assert_trees_close(attend(inputs), expected, 1e-6)
    assert_trees_close(gradients(inputs), expected_gradients, 1e-6)


def test_a_kernel_of_ones_own_is_part_of_the_fused_op_on_an_h100(register):
    arguments = gpu_shapes()
    with abstract("NVIDIA H100"):
        before = backends.explain(nsa_attention, *arguments, config=NSAConfig())
    register(OneKernel(), before="triton")
    with abstract("NVIDIA H100"):
        after = backends.explain(nsa_attention, *arguments, config=NSAConfig())
        run = jax.jit(functools.partial(nsa_attention, config=NSAConfig()))
        program = run.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert before["nsa_attention"].backend == after["nsa_attention"].backend == "fused"
    assert after["window_attention"].backend == "one_kernel"
    assert after["window_attention_backward"].backend == before["window_attention_backward"].backend == "triton"
    assert dict(after["window_attention_backward"].refusals)["one_kernel"] == "there is no window_attention_backward"
    for op in ("compressed_attention", "select_blocks", "selected_attention"):
        assert after[op] != after["window_attention"]
        assert after[op].backend == before[op].backend == "triton"
        assert dict(after[op].refusals)["one_kernel"] == f"there is no {op}"
    assert "compressed_attention_forward" in program
    assert "window_attention_forward" not in program  # Triton's


def test_pure_jax_of_ones_own_takes_its_op_from_the_fused_one_on_an_h100(register):
    register(OneOp(), before="triton")
    with abstract("NVIDIA H100"):
        made = backends.explain(nsa_attention, *gpu_shapes(), config=NSAConfig())
    assert made["window_attention"].backend == "one_op"
    assert dict(made["nsa_attention"].refusals)["fused"] == "no kernel for window_attention before one_op"
    for op in ("compressed_attention", "select_blocks", "selected_attention"):
        assert made[op].backend == "triton"


def test_pure_jax_of_ones_own_behind_a_kernel_that_refuses_is_not_passed_over_for_the_fused_op(register):
    register(OneOp(), before="triton")
    register(backend("picky", window_attention=refusing(NotImplementedError("too long"))))
    with abstract("NVIDIA H100"):
        made = backends.explain(nsa_attention, *gpu_shapes(), config=NSAConfig())
    assert made["window_attention"].backend == "one_op"
    assert made["nsa_attention"].backend == "parts"


@pytest.mark.parametrize("kind", [choice.Forward, choice.FirstForward, choice.Backward])
def test_passes_that_are_equal_are_one_static_argument(kind):
    """JAX finds what it has traced by such arguments, so that they are compared, hashed and never changed."""
    a, b, other = (kind("window_attention", name) for name in ("xla", "xla", "triton"))
    assert {a, b, other} == {a, other}
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.op = "selected_attention"


def test_outputs_without_lse_have_the_right_gradients(inputs, register):
    expected, expected_gradients = attend(inputs, "reference"), gradients(inputs, "reference")

    def output_alone(op):
        return lambda *args, **kwargs: getattr(backends.get("xla"), op)(*args, **kwargs)[0]

    register(backend(**{op: output_alone(op) for op in ("selected_attention", "window_attention")}))
    made = explained(inputs)
    assert made["selected_attention"].backend == made["window_attention"].backend == "mine"
    assert made["selected_attention_backward"].backend == "xla"
    assert_trees_close(attend(inputs), expected, 1e-5)
    assert_trees_close(gradients(inputs), expected_gradients, 1e-5)


@pytest.mark.parametrize("op", ["selected_attention", "window_attention"])
def test_a_backward_pass_that_needs_lse_gets_it_where_the_forward_pass_gave_none(register, op):
    """Triton's backward pass reads lse, and computes it by Triton's forward pass."""
    config = NSAConfig(16, 8, 16, 3, 1, 1, 20)
    inputs = random_inputs(jax.random.key(1), config, T=40, num_heads=2, num_kv_heads=1, head_dim=16)

    def output_alone(*args, **kwargs):
        return getattr(backends.get("xla"), op)(*args, **kwargs)[0]

    def backward(*args, **kwargs):
        assert args[-4].shape == (1, 2, 40)
        return getattr(backends.get("triton"), op + "_backward")(*args, **kwargs)

    register(backend("passes", **{op: getattr(backends.get("triton"), op), op + "_backward": backward}))
    register(backend("forward_only", **{op: output_alone}))
    assert backends.names()[0] == "forward_only"

    def gradient(implementation):
        def loss(q, kv, gates):
            return jnp.sum(jnp.sin(nsa_attention(q, kv, gates, config=config, implementation=implementation)))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs[:3])

    assert_trees_close(gradient(None), gradient("reference"), 1e-5)


def test_compressed_attention_without_lse_is_an_error_and_no_reason_to_ask_another(inputs, register):
    register(backend(compressed_attention=lambda *a, **k: backends.get("xla").compressed_attention(*a, **k)[0]))
    with pytest.raises(ValueError, match="backend 'mine': compressed_attention returned no lse"):
        attend(inputs)


@pytest.mark.parametrize("kind", ["own backward pass", "backward pass in front", "differentiable"])
def test_lse_that_a_backward_pass_needs_comes_from_whoever_returns_it(register, kind):
    config = NSAConfig(16, 8, 16, 3, 1, 1, 20)
    inputs = random_inputs(jax.random.key(1), config, B=2, T=40, num_heads=2, num_kv_heads=1, head_dim=16)

    def output_alone(*args, **kwargs):
        return backends.get("xla").window_attention(*args, **kwargs)[0]

    def backward(*args, **kwargs):  # a plain tuple will do
        return tuple(backends.get("triton").window_attention_backward(*args, **kwargs))

    if kind == "own backward pass":
        register(backend(window_attention=output_alone, window_attention_backward=backward))
    else:
        register(backend(window_attention=output_alone))
        if kind == "differentiable":
            register(backend("other", window_attention=output_alone, differentiable=True), before="xla")
        else:
            register(backend("other", window_attention_backward=backward))

    def gradient(implementation):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(nsa_jax.window_attention(q, k, v, config=config, implementation=implementation)))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(inputs.q, inputs.kv.win_k, inputs.kv.win_v)

    assert_trees_close(gradient(None), gradient("reference"), 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o, lse: (o[:, :5], lse), r"window_attention returned o of dtype float32 and shape \(1, 5, 4, 8\)"),
        (lambda o, lse: (o.astype(jnp.bfloat16), lse), "returned o of dtype bfloat16"),
        (lambda o, lse: [o, lse.T], r"returned lse of dtype float32 and shape \(37, 4, 1\): expected float32 of shape"),
    ],
)
def test_what_a_backend_returns_is_checked(inputs, register, change, message):
    register(backend(window_attention=lambda *a, **k: change(*backends.get("xla").window_attention(*a, **k))))
    with pytest.raises(ValueError, match=f"backend 'mine': .*{message}"):
        attend(inputs)


def test_the_reason_of_a_named_whole_attention_is_not_lost(inputs, register):
    register(backend(nsa_attention=refusing(NotImplementedError("heads of 8"))))
    with pytest.raises(NotImplementedError, match="implementation = 'mine': nsa_attention: heads of 8"):
        attend(inputs, "mine")


def test_why_a_whole_attention_was_passed_over_is_explained(inputs, register):
    def supports(op, device):
        raise NotImplementedError("needs a chip of ours")

    register(backend("late", nsa_attention=of("xla", "nsa_attention")), before="reference")
    register(backend("picky", nsa_attention=of("xla", "nsa_attention"), supports=supports))
    refusals = dict(explained(inputs)["nsa_attention"].refusals)
    assert refusals["picky"] == "needs a chip of ours"
    assert refusals["late"] == "stands behind xla, which takes one of the parts"


def test_gradients_and_loops_are_explained_too(register):
    q, kv, _ = gpu_shapes()

    def loss(q):
        return nsa_jax.window_attention(q, kv_win[0], kv_win[1], config=NSAConfig()).astype(jnp.float32).sum()

    kv_win = [jnp.zeros(x.shape, x.dtype) for x in (kv.win_k, kv.win_v)]
    with abstract("NVIDIA H100"):
        made = backends.explain(jax.grad(loss), q)
        assert made["window_attention_backward"].backend == "triton"

    def loop(q):
        def body(x):
            return x + nsa_jax.window_attention(x, *kv_win, config=NSAConfig())

        return jax.lax.while_loop(lambda x: x.sum() < 0, body, q)

    assert backends.explain(loop, q)["window_attention"].backend == "xla"
    assert "no op was traced" in str(backends.explain(jnp.sin, q))


# A backend of all ops


@pytest.mark.parametrize("implementation", [None, "forward"])
def test_a_backend_without_backward_passes_goes_with_anothers(inputs, register, implementation):
    expected, expected_gradients = attend(inputs, "reference"), gradients(inputs, "reference")
    mine = backend("forward", **{op: of("xla", op) for op in OPS})
    register(mine)
    made = explained(inputs, implementation=implementation)
    assert made["nsa_attention"].backend == "fused"
    assert all(made[op].backend == "forward" for op in OPS)
    for op in BRANCHES:
        assert made[op + "_backward"].backend == "xla"
        if implementation is None:
            assert dict(made[op + "_backward"].refusals)["forward"] == f"there is no {op}_backward"
    for op in OPS:
        getattr(mine, op).count = 0
    assert_trees_close(attend(inputs, implementation), expected, 1e-5)
    assert all(getattr(mine, op).count for op in OPS)
    assert_trees_close(gradients(inputs, implementation), expected_gradients, 1e-5)


def test_a_backward_pass_alone_goes_with_anothers_forward_pass_that_is_a_kernel(inputs, register):
    expected = gradients(inputs, "reference")
    backward = choice.Backward("window_attention", "xla")
    calls = []

    def window_attention_backward(*args, **kwargs):
        calls.append(kwargs)
        return backward(*args, **kwargs)

    register(backend("forward", **{op: of("xla", op) for op in OPS}))
    register(backend("backward", window_attention_backward=window_attention_backward))
    made = explained(inputs)
    assert made["window_attention"].backend == "forward"
    assert made["window_attention_backward"].backend == "backward"
    calls.clear()
    assert_trees_close(gradients(inputs), expected, 1e-5)
    assert len(calls) == 1


# nsa_attention and decode_attention of one's own


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_whole_attention_of_ones_own_has_the_gradients_of_the_reference(inputs, register, differentiable):
    expected, expected_gradients = attend(inputs, "reference"), gradients(inputs, "reference")
    mine = backend(nsa_attention=of("xla", "nsa_attention"), differentiable=differentiable)
    register(mine)
    made = explained(inputs)
    assert made["nsa_attention"].backend == "mine"
    if not differentiable:
        assert made["nsa_attention_backward"].backend == "parts"
        assert dict(made["nsa_attention_backward"].refusals) == {"mine": "there is no backward pass"}
    for implementation in (None, "mine"):
        mine.nsa_attention.count = 0
        assert_trees_close(attend(inputs, implementation), expected, 1e-5)
        assert mine.nsa_attention.count == 1
        assert_trees_close(gradients(inputs, implementation), expected_gradients, 1e-5)


def test_a_whole_attention_of_ones_own_behind_a_kernel_is_not_taken(inputs, register):
    register(backend("whole", nsa_attention=refusing(RuntimeError("taken"))), before="xla")
    register(OneKernel(), before="whole")
    assert explained(inputs)["window_attention"].backend == "one_kernel"
    assert_trees_close(attend(inputs), attend(inputs, "reference"), 1e-5)


def test_what_a_backend_asks_of_the_public_ops_is_not_its_own_choice(inputs, register):
    def window_attention(q, k, v, segment_starts, query_offset, *, config, scale):
        return nsa_jax.window_attention(q, k, v, config=config, scale=scale, implementation="xla")

    register(backend(window_attention=window_attention, differentiable=True))
    made = backends.explain(nsa_jax.window_attention, inputs.q, *inputs.kv[4:], config=CONFIG)
    assert [one.backend for one in made] == ["mine", "mine"]


def test_a_whole_attention_of_ones_own_that_refuses_leaves_it_to_the_parts(inputs, register):
    register(backend(nsa_attention=refusing(NotImplementedError("too long"))))
    made = explained(inputs)
    assert made["nsa_attention"].backend == "parts"
    assert dict(made["nsa_attention"].refusals)["mine"] == "too long"
    with pytest.raises(NotImplementedError, match="mine"):
        attend(inputs, "mine")


def test_decoding_of_ones_own(register):
    cache = nsa_jax.init_nsa_cache(CONFIG, batch_size=2, max_length=32, num_kv_heads=1, head_dim=8)
    q, gates = jnp.ones((2, 1, 4, 8)), jnp.ones((2, 1, 4, 3))

    def decode(implementation=None):
        run = functools.partial(nsa_jax.decode_attention, config=CONFIG, implementation=implementation)
        return jax.jit(run)(q, cache, gates, cache.lengths)

    expected = decode("reference")
    mine = backend(decode_attention=of("xla", "decode_attention"))
    register(mine, before="triton")
    for implementation in (None, "mine"):
        mine.decode_attention.count = 0
        assert_trees_close(decode(implementation), expected, 1e-5)
        assert mine.decode_attention.count == 1
    made = backends.explain(nsa_jax.decode_attention, q, cache, gates, cache.lengths, config=CONFIG)
    assert made["decode_attention"].backend == "mine"


@pytest.mark.exhaustive
def test_a_step_of_a_layer_appends_tokens_by_the_named_backend_or_by_the_others(register):
    layer = nsa_jax.NSAttention(num_heads=4, num_kv_heads=1, head_dim=8, config=CONFIG)
    x = jax.random.normal(jax.random.key(0), (2, 1, 16))
    variables = jax.jit(layer.init)(jax.random.key(1), x)

    def step(implementation):
        named = layer.clone(implementation=implementation)
        return named.apply(variables, x, layer.init_cache(batch_size=2, max_length=32), method="decode_step")

    expected = step("reference")
    whole = backend("whole", **{op: of("xla", op) for op in ("decode_attention", "append_tokens")})
    part = backend("part", decode_attention=of("xla", "decode_attention"))
    for mine in (whole, part):
        register(mine, before="triton")
        assert_trees_close(step(mine.name), expected, 1e-5)
        assert mine.decode_attention.count == 1
    assert whole.append_tokens.count == 2  # its own, and that of the other, which comes after it


# Mosaic by default

LONG = (Row((128, 128), (16, 16), 2048, ""),)
BLOCKS = (Row((128,), (1, 16), 1, ""),)


def test_mosaic_is_taken_by_name_where_no_row_is_for_the_call(mosaic_faster):
    mosaic_faster({})
    with abstract("NVIDIA H100"):
        made = backends.explain(nsa_attention, *gpu_shapes(), config=NSAConfig())
        named = backends.explain(nsa_attention, *gpu_shapes(), config=NSAConfig(), implementation="mosaic")
    for op in (*OPS, *(op + "_backward" for op in BRANCHES)):
        assert made[op].backend == "triton"
        assert dict(made[op].refusals)["mosaic"].startswith("not measured to be faster than triton")
        assert (named[op].backend, named[op].refusals) == ("mosaic", ())


def test_each_pass_goes_to_mosaic_where_its_table_says_that_it_is_faster(mosaic_faster):
    """Forward of Mosaic with backward of Triton, and the reverse, in one fused op."""
    faster = {
        "window_attention": LONG,
        "compressed_attention_backward": LONG,
        "select_blocks": (Row((128,), (1, 16), 1, ""),),
    }
    mosaic_faster(faster)
    config, arguments = NSAConfig(), gpu_shapes()

    def loss(*arguments):
        return nsa_attention(*arguments, config=config).astype(jnp.float32).sum()

    with abstract("NVIDIA H100"):
        made = backends.explain(nsa_attention, *arguments, config=config)
        program = jax.jit(jax.grad(loss)).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        named = {
            name: backends.explain(nsa_attention, *arguments, config=config, implementation=name)
            for name in ("mosaic", "triton")
        }
    assert made["nsa_attention"].backend == "fused"
    reason = "not measured to be faster than triton: 2048 queries of 16 bits, head_dim 128/128, 16 heads a group"
    for op in (*OPS, *(op + "_backward" for op in BRANCHES)):
        assert made[op].backend == ("mosaic" if op in faster else "triton")
        assert dict(made[op].refusals).get("mosaic") == (None if op in faster else reason)
        assert all(named[name][op].backend == name for name in named)
    assert program.count("mosaic_gpu") >= 4  # window, blocks, two gradients of compressed attention
    assert program.count("__gpu$xla.gpu.triton") >= 6


def test_calls_that_no_row_is_for_stay_with_triton(mosaic_faster):
    mosaic_faster({op: LONG for op in BRANCHES})
    chosen = {}
    for kind, head_dim in (("NVIDIA H100", 128), ("NVIDIA H100", 64), ("NVIDIA A100", 128)):
        with abstract(kind):
            made = backends.explain(nsa_attention, *gpu_shapes(head_dim=head_dim), config=NSAConfig())
        chosen[kind, head_dim] = {made[op].backend for op in BRANCHES}
        if kind == "NVIDIA A100":
            assert "expected compute capability 9.0" in dict(made["window_attention"].refusals)["mosaic"]
    assert list(chosen.values()) == [{"mosaic"}, {"triton"}, {"triton"}]


def test_a_whole_attention_of_ones_own_stands_behind_mosaic_where_it_takes_a_part(mosaic_faster, register):
    mosaic_faster({"window_attention": LONG})
    register(backend("whole", nsa_attention=of("xla", "nsa_attention")), before="triton")
    for head_dim, expected in ((128, "fused"), (64, "whole")):
        with abstract("NVIDIA H100"):
            made = backends.explain(nsa_attention, *gpu_shapes(head_dim=head_dim), config=NSAConfig())
        assert made["nsa_attention"].backend == expected


# Who is asked, and what counts as a refusal


def test_a_backend_says_for_which_arrays_it_is_taken_by_default(inputs, register):
    asked = []

    def by_default(name, q, k, v):
        asked.append((name, q.shape, k.shape, None if v is None else v.shape))
        if name == "window_attention":
            raise NotImplementedError("slower on Mondays")
        return name == "compressed_attention"

    mine = backend(
        by_default=by_default, **{op: of("xla", op) for op in OPS}, window_attention_backward=refusing(KeyError)
    )
    register(mine)
    refusals = {op: dict(explained(inputs)[op].refusals).get("mine") for op in OPS}
    assert refusals == {
        "compressed_attention": None,
        "select_blocks": "not by default",
        "selected_attention": "not by default",
        "window_attention": "slower on Mondays",
    }
    shapes = [x.shape for x in (inputs.q, *inputs.kv)]
    assert ("select_blocks", *shapes[:2], None) in asked
    assert ("selected_attention", shapes[0], *shapes[3:5]) in asked
    mine.window_attention.count = 0
    window = functools.partial(nsa_jax.window_attention, inputs.q, *inputs.kv[4:], config=CONFIG)
    window(implementation="mine")
    assert mine.window_attention.count == 1


@pytest.mark.parametrize("backward", ["window_attention_backward", "compressed_attention_backward"])
def test_a_backward_pass_is_left_to_another_by_default(inputs, register, backward):
    expected = gradients(inputs, "reference")
    mine = backend(
        by_default=lambda name, q, k, v: name != backward,
        **{op: of("xla", op) for op in OPS},
        **{op + "_backward": choice.Backward(op, "xla") for op in BRANCHES},
    )
    register(mine)
    made = explained(inputs)
    assert made["nsa_attention"].backend == "fused"
    assert {op: made[op + "_backward"].backend for op in BRANCHES} == {
        op: "xla" if op + "_backward" == backward else "mine" for op in BRANCHES
    }
    assert_trees_close(gradients(inputs), expected, 1e-5)


def test_supports_is_asked_with_the_op_and_the_device(inputs, register):
    asked = []

    def supports(op, device):
        asked.append((op, device))
        return op == "window_attention"

    register(backend(supports=supports, **{op: of("xla", op) for op in OPS}))
    made = explained(inputs)
    assert made["window_attention"].backend == "mine"
    assert made["compressed_attention"].backend == made["selected_attention"].backend == "xla"
    assert dict(made["selected_attention"].refusals)["mine"] == f"does not support {current_device()}"
    assert {device for _, device in asked} == {current_device()}
    assert {op for op, _ in asked} <= set(backends.OPS)
    assert not any(op.endswith("_backward") for op, _ in asked)


def test_supports_may_give_its_reason_and_a_named_backend_is_not_asked(inputs, register):
    register(
        backend(supports=refusing(NotImplementedError("needs a Z1")), window_attention=of("xla", "window_attention"))
    )
    arguments = (inputs.q, *inputs.kv[4:])
    made = backends.explain(nsa_jax.window_attention, *arguments, config=CONFIG)
    assert made["window_attention"].backend == "xla"
    assert dict(made["window_attention"].refusals)["mine"] == "needs a Z1"
    ours, expected = (
        jax.jit(functools.partial(nsa_jax.window_attention, config=CONFIG, implementation=name))(*arguments)
        for name in ("mine", "reference")
    )
    assert_trees_close(ours, expected, 1e-5)


def test_a_backend_may_be_for_some_gpus_only(register):
    def supports(op, device):
        return device.compute_capability == (9, 0)

    register(backend(supports=supports, window_attention=of("xla", "window_attention")))
    chosen = {}
    for kind in ("NVIDIA H100", "NVIDIA A100"):
        with abstract(kind):
            made = backends.explain(nsa_attention, *gpu_shapes(), config=NSAConfig())
        chosen[kind] = made["window_attention"].backend
    assert chosen == {"NVIDIA H100": "mine", "NVIDIA A100": "triton"}


def test_the_automatic_choice_passes_over_what_is_not_implemented(inputs, register):
    tried = []

    def unsupported(name):
        def op(*args, **kwargs):
            tried.append(name)
            raise NotImplementedError(f"{name} does not like it")

        return op

    register(backend("second", window_attention=unsupported("second")))
    register(backend("first", window_attention=unsupported("first")))
    arguments = (inputs.q, *inputs.kv[4:])
    automatic = nsa_jax.window_attention(*arguments, config=CONFIG)
    assert tried == ["first", "second"]
    assert (automatic == nsa_jax.window_attention(*arguments, config=CONFIG, implementation="xla")).all()
    refusals = dict(backends.explain(nsa_jax.window_attention, *arguments, config=CONFIG)["window_attention"].refusals)
    assert (refusals["first"], refusals["second"]) == ("first does not like it", "second does not like it")


@pytest.mark.parametrize("error", [ValueError("cannot be"), TypeError("of no kind"), RuntimeError("a bug")])
@pytest.mark.parametrize("op", OPS)
def test_errors_other_than_not_implemented_are_not_swallowed(inputs, register, op, error):
    register(backend(**{op: refusing(error)}))
    for call in (attend, explained):
        with pytest.raises(type(error), match=str(error)):
            call(inputs)


def test_errors_of_a_backward_pass_are_not_swallowed(inputs, register):
    register(backend(**{op: of("xla", op) for op in OPS}, window_attention_backward=refusing(ValueError("cannot be"))))
    attend(inputs)
    with pytest.raises(ValueError, match="cannot be"):
        gradients(inputs)


def test_more_programs_than_cuda_has_are_an_error_and_no_reason_to_ask_another(register):
    """vmap moves the grid's first axis to one that CUDA holds to 65,535 programs."""
    config = NSAConfig(16, 8, 16, 3, 1, 1, 16)
    q = jax.ShapeDtypeStruct((2, 1, 1, 2**23, 16), jnp.bfloat16)

    def attend(q):
        return jax.vmap(lambda q: nsa_jax.window_attention(q, q, q, config=config))(jnp.swapaxes(q, 2, 3))

    with abstract("NVIDIA H100"), pytest.raises(ValueError, match="vmap of window_attention_forward"):
        jax.eval_shape(attend, q)


def test_a_named_backend_never_falls_back_and_says_why(inputs, register):
    register(backend(window_attention=refusing(NotImplementedError("needs a Z1"))))
    window = functools.partial(nsa_jax.window_attention, inputs.q, *inputs.kv[4:], config=CONFIG)
    with pytest.raises(NotImplementedError, match="implementation = 'mine': window_attention: needs a Z1"):
        window(implementation="mine")
    with pytest.raises(NotImplementedError, match=r"implementation = 'mine': .*there is no compressed_attention"):
        attend(inputs, "mine")
    with pytest.raises(NotImplementedError, match="implementation = 'triton': window_attention: head_dim of q = 8"):
        window(implementation="triton")
    with (
        abstract("Tesla T4"),
        pytest.raises(NotImplementedError, match=r"'triton': .*expected compute capability 8\.0 or later"),
    ):
        jax.eval_shape(lambda: window(implementation="triton"))


def test_where_nobody_takes_an_op_the_error_gives_every_reason(inputs, register, monkeypatch):
    from nsa_jax import xla

    register(backend(window_attention=refusing(NotImplementedError("needs a Z1"))))
    monkeypatch.setattr(xla, "window_attention", refusing(NotImplementedError("no memory")))
    with pytest.raises(
        NotImplementedError, match=r"no backend takes window_attention: mine: needs a Z1; .*xla: no mem"
    ):
        nsa_jax.window_attention(inputs.q, *inputs.kv[4:], config=CONFIG)


def test_the_reference_is_only_taken_by_name(inputs, monkeypatch):
    from nsa_jax import xla

    monkeypatch.setattr(xla, "window_attention", refusing(NotImplementedError("no memory")))
    with pytest.raises(NotImplementedError, match="reference: only by name"):
        nsa_jax.window_attention(inputs.q, *inputs.kv[4:], config=CONFIG)


def test_the_fall_to_xla_on_a_gpu_is_logged_once_with_the_reasons(caplog):
    config = NSAConfig(window=77)
    arguments = gpu_shapes(config, head_dim=512)
    choice._log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "nsa_jax"), abstract("NVIDIA H100"):
        for _ in range(2):
            jax.eval_shape(lambda *a: nsa_attention(*a, config=config), *arguments)
    messages = [record.getMessage() for record in caplog.records]
    assert sorted(message.split(" runs on XLA")[0] for message in messages) == sorted(OPS)
    assert all("triton: head_dim of q = 512: expected 16 to 256" in message for message in messages)


def test_nothing_is_logged_where_there_is_no_gpu_or_xla_was_asked_for(inputs, caplog):
    choice._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "nsa_jax"):
        attend(inputs)
        with abstract("NVIDIA H100"):
            jax.eval_shape(lambda *a: nsa_attention(*a, config=NSAConfig(), implementation="xla"), *gpu_shapes())
    assert caplog.records == []


# explain


def test_an_explanation_names_every_op_forward_and_backward_and_can_be_printed(inputs):
    made = explained(inputs)
    names = {"nsa_attention", *OPS, *(op + "_backward" for op in BRANCHES)}
    assert {one.op for one in made} == names
    text = str(made)
    assert str(current_device()) in text.splitlines()[0]
    for name in names:
        (line,) = [line for line in text.splitlines() if line.split()[0] == name]
        assert made[name].backend in line
    with pytest.raises(KeyError, match="expected one of"):
        made["attention"]


def test_an_explanation_gives_the_reason_of_every_backend_that_was_asked_before():
    with abstract("Tesla T4"):
        made = backends.explain(nsa_attention, *gpu_shapes(), config=NSAConfig())
    for op in OPS:
        assert made[op].backend == "xla"
        reasons = dict(made[op].refusals)
        assert list(reasons) == ["mosaic", "triton"]
        assert "expected compute capability 8.0 or later" in reasons["triton"]
        assert reasons["triton"] in str(made)


def test_a_compiled_function_is_explained_as_often_as_one_likes(inputs):
    run = jax.jit(functools.partial(nsa_attention, config=CONFIG))
    for _ in range(2):
        assert backends.explain(run, *inputs[:3])["window_attention"].backend == "xla"


def test_a_layer_can_be_explained():
    layer = nsa_jax.NSAttention(4, 2, 8, config=CONFIG)
    x = jnp.ones((1, 20, 16))
    made = backends.explain(layer.apply, jax.eval_shape(layer.init, jax.random.key(0), x), x)
    assert made["compressed_attention"].backend == "xla"


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_without_compressed_tokens_the_ops_go_one_by_one(register, implementation):
    inputs = random_inputs(jax.random.key(0), CONFIG, T=3, num_heads=2, num_kv_heads=1, head_dim=8)
    expected = attend(inputs, "reference"), gradients(inputs, "reference")
    register(backend("forward", **{op: of("xla", op) for op in OPS}))
    made = explained(inputs, implementation=implementation)
    assert made["nsa_attention"].backend == "parts"
    assert dict(made["nsa_attention"].refusals)["fused"] == "no compressed token"
    assert_trees_close(attend(inputs, implementation), expected[0], 1e-5)
    for a, b in zip(jax.tree.leaves(gradients(inputs, implementation)), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
