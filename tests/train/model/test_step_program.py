"""What a decoding step is made of on a GPU that need not be there: few operations that XLA cannot fuse."""

import collections
import functools
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from nsa_jax import one_row
from nsa_jax.testing import normwise_error
from pallas_kernels.one_row_product.triton import one_row_product
from tests.pallas_kernels import cases
from train.config import ModelConfig
from train.model.transformer import Transformer, decoding_parameters, extend, init_caches

ATTENTION = ("first", "importance", "selected", "join")


def operations(layers: int, rows: int, kv_dtype=None, **fields) -> collections.Counter:
    """Operations of a step, calls counted as often as they are made, and kernels by their names."""
    config = ModelConfig(num_layers=layers, num_heads=4, num_kv_heads=2, head_dim=64, dtype="bfloat16", **fields)

    def initial(key):
        tokens = jnp.zeros((1, 64), jnp.int32)
        return decoding_parameters(nn.meta.unbox(Transformer(config, 258).init(key, tokens)["params"]), config)

    params = jax.eval_shape(initial, jax.random.key(0))
    caches = jax.eval_shape(lambda: init_caches(config, batch_size=rows, max_length=4096, kv_dtype=kv_dtype))
    tokens, counts = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, 1), (rows,)))

    def step(params, tokens, caches, counts):
        return extend(params, config, tokens, caches, num_tokens=counts)

    return operations_of(cases.lower("NVIDIA H100", step, params, tokens, caches, counts))


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
