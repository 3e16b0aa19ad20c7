"""What a decoding step and a prefill are made of on a GPU that need not be there."""

import collections
import functools
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from nsa_jax import BranchKV, NSAConfig, nsa_attention, num_compressed, one_row
from nsa_jax.testing import normwise_error
from pallas_kernels.one_row_product.triton import one_row_product
from tests.pallas_kernels import cases
from train.config import ModelConfig
from train.model.transformer import Transformer, decoding_parameters, extend, init_caches
from train.parallel.sharding import MESH_AXES

NSA = NSAConfig()
ATTENTION = ("first", "importance", "selected", "join")


HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}


def operations(
    layers: int, rows: int, tokens: int = 1, *, begins: bool = False, tensor: int = 1, kv_dtype=None, **fields
) -> collections.Counter:
    """Operations of a step or of a prefill, calls counted as often as they are made, and kernels by their names.

    With `tensor`, of what each of so many devices does, which split the heads.
    """
    config = ModelConfig(num_layers=layers, dtype="bfloat16", **HEADS | fields)

    def initial(key):
        tokens = jnp.zeros((1, 64), jnp.int32)
        return decoding_parameters(nn.meta.unbox(Transformer(config, 258).init(key, tokens)["params"]), config)

    def mesh(device=None):
        sizes, kinds = (1, 1, 1, 1, tensor), (AxisType.Auto,) * 5
        shape = jax.sharding.AbstractMesh(sizes, MESH_AXES, axis_types=kinds, abstract_device=device)
        return jax.sharding.use_abstract_mesh(shape)

    with mesh():
        params = jax.eval_shape(initial, jax.random.key(0))
        caches = jax.eval_shape(lambda: init_caches(config, batch_size=rows, max_length=4096, kv_dtype=kv_dtype))
    given, counts = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, tokens), (rows,)))

    def step(params, given, caches, counts):
        return extend(params, config, given, caches, num_tokens=counts, begins=begins)

    with mesh(jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")):
        lowered = jax.jit(step).trace(params, given, caches, counts).lower(lowering_platforms=("cuda",))
    return operations_of(lowered.as_text())


def operations_of(text: str) -> collections.Counter:
    functions = dict(re.findall(r"func\.func \w+ @(\w+)(.*?)\n  }", text, re.DOTALL))

    @functools.cache
    def of(name: str) -> collections.Counter:
        body = functions[name]
        found = collections.Counter(re.findall(r"= \"?stablehlo\.(\w+)", body))
        found.update(re.findall(r'custom_call.*?\bname = "(\w+)"', body))
        for callee in re.findall(r"call @(\w+)\(", body):
            found.update(of(callee))
        return found

    return of("main")


# Of queries, keys, values and gates; the output; SwiGLU's two; with weights in phi, its own and the gates' second.
@pytest.mark.parametrize(
    ("rows", "compression", "share_kv", "products", "kv_dtype"),
    [
        (1, "mean", True, 4, None),
        (2, "mean", True, 4, None),
        (2, "mean", True, 4, "int8"),
        (2, "mlp", False, 11, None),
    ],
)
def test_a_layer_of_a_step_is_few_products_and_kernels_and_scatters_nothing(
    rows, compression, share_kv, products, kv_dtype
):
    fields = {"compression": compression, "share_kv": share_kv, "kv_dtype": kv_dtype}
    layer = operations(2, rows, **fields) - operations(1, rows, **fields)
    in_kernels = 4 if rows == 1 else 0  # products with parameters, of one row
    kernels = {"append_tokens": 1, **{f"decode_attention_{name}": 1 for name in ATTENTION}}
    assert {name: count for name, count in layer.items() if name in kernels} == kernels
    assert layer["one_row_product"] == in_kernels
    assert layer["custom_call"] == len(kernels) + in_kernels
    assert layer["scatter"] == layer["dynamic_update_slice"] == 0
    assert layer["dot_general"] == products - in_kernels
    if compression == "mean":
        assert layer["gather"] == 0
        assert layer["concatenate"] == 0
        assert layer["reduce"] == (0 if in_kernels else 2)  # the two norms


def kernels_of(found: collections.Counter, *more: str) -> collections.Counter:
    begins = ("compressed_attention", "block_", "selected_attention", "window_attention", *more)
    return collections.Counter({name: count for name, count in found.items() if name.startswith(begins)})


LONG = {"num_heads": 16, "num_kv_heads": 1, "head_dim": 128}


def of_training(rows: int, queries: int, keys: int) -> collections.Counter:
    """Kernels of the ops for whole sequences, whose queries begin at a position that is found when running."""

    def attend(q, k, v, offset):
        kv = BranchKV(k[:, : num_compressed(keys, NSA)], v[:, : num_compressed(keys, NSA)], k, v, k, v)
        gates = jnp.ones((*q.shape[:3], 3))
        return nsa_attention(q, kv, gates, config=NSA, query_offset=offset if queries < keys else 0)

    shapes = ((rows, queries, 16, 128), *[(rows, keys, 1, 128)] * 2)
    arrays = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    text = cases.lower("NVIDIA H100", attend, *arrays, jax.ShapeDtypeStruct((), jnp.int32))
    return kernels_of(operations_of(text))


def test_rows_at_one_position_are_prefilled_in_one_call_of_the_ops_for_whole_sequences():
    alone, two = (operations(1, rows, 2048, **LONG) for rows in (1, 2))
    assert kernels_of(alone) == of_training(1, 2048, 4096 + 2048)
    assert alone["while"] == 0
    # Of two rows a program has both ways, and takes one of them when it runs.
    assert kernels_of(two) == kernels_of(alone) + of_training(2, 2048, 4096 + 2048)
    assert two["while"] == 1  # over rows that stand at different positions


def test_a_prompt_from_its_beginning_is_attended_to_as_in_training():
    found = operations(1, 2, 2048, begins=True, **LONG)
    assert kernels_of(found) == of_training(2, 2048, 2048)
    assert found["while"] == 0


@pytest.mark.parametrize("attention", ["full", "window"])
def test_a_chunk_of_dense_attention_is_a_kernel_too(attention):
    alone, two = (operations(1, rows, 2048, attention=attention, **LONG) for rows in (1, 2))
    assert kernels_of(alone) == {"window_attention_forward": 1}
    assert kernels_of(two) == {"window_attention_forward": 2}  # both ways
    assert alone["while"] == alone["case"] == 0
    assert two["while"] == two["case"] == 1


def test_full_attention_takes_a_prompt_from_its_beginning_to_cudnn(monkeypatch):
    taken = []

    def recorded(q, k, v, **options):
        taken.append((options["implementation"], options["is_causal"], options["mask"], q.shape[1], k.shape[1]))
        return jnp.zeros_like(q)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    operations(1, 2, 2048, begins=True, attention="full", **LONG)
    assert set(taken) == {("cudnn", True, None, 2048, 2048)}


@pytest.mark.parametrize(
    ("tokens", "begins"), [(1, False), (512, False), pytest.param(512, True, marks=pytest.mark.exhaustive)]
)
def test_devices_that_split_heads_run_the_kernels_of_one(tokens, begins):
    """XLA does not know how to split a kernel: what it splits lies within a manual computation, of a device's heads."""
    one, two = (operations(1, 1, tokens, begins=begins, tensor=tensor, share_kv=False) for tensor in (1, 2))
    kernels = kernels_of(one, "append_tokens", "decode_attention")
    assert kernels
    assert kernels_of(two, "append_tokens", "decode_attention") == kernels
    assert two["while"] == one["while"] == 0


@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_a_model_steps_with_kernels_of_one_row_as_without(monkeypatch, attention):
    sizes = {"num_layers": 1, "embed_dim": 64, "mlp_dim": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    config = ModelConfig(**sizes, attention=attention, dtype="bfloat16")
    tokens = jax.random.randint(jax.random.key(1), (1, 40), 0, 256)
    params = nn.meta.unbox(jax.jit(Transformer(config, 258).init)(jax.random.key(0), tokens)["params"])
    params = decoding_parameters(params, config)

    def hidden():
        @jax.jit
        def step(caches, tokens, counts):
            return extend(params, config, tokens, caches, num_tokens=counts)

        _, caches = step(init_caches(config, batch_size=1, max_length=64), tokens, jnp.array([40]))
        outputs = []
        for i, count in enumerate((1, 0, 1)):
            x, caches = step(caches, tokens[:, i : i + 1], jnp.array([count]))
            outputs += [x] * count
        return jnp.concatenate(outputs)

    expected = hidden()
    made = []

    def interpreted(*args, **options):
        made.append(one_row_product(*args, **options, interpret=True))
        return made[-1]

    kernels = types.SimpleNamespace(supports=lambda op, device: True, function=lambda op: interpreted)
    monkeypatch.setattr(one_row, "TRITON", kernels)
    assert normwise_error(hidden(), expected) < 2e-2
    assert len(made) in (4, 8)  # a step is traced once, or twice with JAX 0.12
