"""What the benchmarks share: what they compare, and the file of figures that they write."""

import dataclasses
import json
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pallas_kernels.benchmarks.provenance import provenance
from train.config import Attention, ModelConfig, TrainConfig
from train.data.tokenizer import load_tokenizer
from train.model.transformer import Transformer, decoding_parameters
from train.run_folder import write

ATTENTIONS: tuple[Attention, ...] = ("nsa", "full")  # that are compared


def vocab_size(config: TrainConfig) -> int:
    """Tokens of a preset's or a run's tokenizer."""
    return load_tokenizer(config.data.tokenizer).vocab_size


def random_parameters(config: ModelConfig, vocabulary: int) -> Any:
    """Random parameters of a model, as `extend` reads them."""

    @jax.jit
    def make(key: jax.Array) -> Any:
        tokens = jnp.zeros((1, config.nsa.select_block), jnp.int32)
        params = Transformer(config, vocabulary).init(key, tokens)["params"]
        return decoding_parameters(nn.meta.unbox(params), config)

    return make(jax.random.key(0))


def write_figures(arguments: Any, rows: list[dict[str, Any]]) -> None:
    """Writes what was measured so far to `arguments.out`, with its provenance and the arguments themselves."""
    origin = {"provenance": provenance(["python", "-m", "train", *sys.argv[1:]])}
    result = origin | dataclasses.asdict(arguments) | {"rows": rows}
    write(arguments.out, json.dumps(result, indent=1, default=str))
