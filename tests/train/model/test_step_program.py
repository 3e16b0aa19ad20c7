"""What a decoding step is made of on a GPU that need not be there: few operations that XLA cannot fuse."""

import collections
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tests.pallas_kernels import cases
from train.config import ModelConfig
from train.model.transformer import Transformer, decoding_parameters, extend, init_caches

ATTENTION = ("first", "importance", "choose", "selected", "join")


def operations(layers: int, **fields) -> collections.Counter:
    """Operations of a step of two rows, calls counted as often as they are made, and kernels by their names."""
    config = ModelConfig(num_layers=layers, num_heads=4, num_kv_heads=2, head_dim=64, dtype="bfloat16", **fields)

    def initial(key):
        tokens = jnp.zeros((1, 64), jnp.int32)
        return decoding_parameters(nn.meta.unbox(Transformer(config, 258).init(key, tokens)["params"]), config)

    params = jax.eval_shape(initial, jax.random.key(0))
    caches = jax.eval_shape(lambda: init_caches(config, batch_size=2, max_length=4096))
    tokens, counts = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 1), (2,)))

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


@pytest.mark.parametrize(("compression", "share_kv", "products"), [("mean", True, 4), ("mlp", False, 11)])
def test_a_layer_of_a_step_is_few_products_and_kernels_and_scatters_nothing(compression, share_kv, products):
    fields = {"compression": compression, "share_kv": share_kv}
    layer = operations(2, **fields) - operations(1, **fields)
    kernels = {"append_tokens": 1, **{f"decode_attention_{name}": 1 for name in ATTENTION}}
    assert {name: count for name, count in layer.items() if name in kernels} == kernels
    assert layer["custom_call"] == len(kernels)
    assert layer["scatter"] == layer["dynamic_update_slice"] == 0
    # Queries, keys, values and gates; the output; SwiGLU's two; with weights in phi, its own and the gates' second.
    assert layer["dot_general"] == products
    if compression == "mean":
        assert layer["gather"] == 0
        assert layer["concatenate"] == 0
        assert layer["reduce"] == 2  # the two norms
