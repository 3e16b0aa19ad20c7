"""From a family's tensors to the model's parameters and back.

Names and shapes are those of transformers. A matrix there is [outputs, inputs], here [inputs, outputs], and heads are
an axis of their own here.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from train.checkpoints.storage import flatten
from train.config import ModelConfig
from train.model.transformer import Transformer, layer_stacks


class Tensor(NamedTuple):
    """One tensor of a file, which is read when it is needed."""

    file: Path  # for messages
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Place(NamedTuple):
    """Where a tensor's numbers are in the model."""

    path: tuple[str, ...]
    inputs: int  # axes here, from the left, that make the inputs of a matrix; 0: it is no matrix


EMBEDDING, OUTPUT, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LAYER = "model.layers.{}."
IN_LAYER = {
    "input_layernorm.weight": Place(("attention_norm", "scale"), 0),
    "self_attn.q_proj.weight": Place(("attention", "q_kernel"), 1),
    "self_attn.q_proj.bias": Place(("attention", "q_bias"), 0),
    "self_attn.q_norm.weight": Place(("attention", "q_norm_scale"), 0),
    "self_attn.k_proj.weight": Place(("attention", "k_kernel"), 1),
    "self_attn.k_proj.bias": Place(("attention", "k_bias"), 0),
    "self_attn.k_norm.weight": Place(("attention", "k_norm_scale"), 0),
    "self_attn.v_proj.weight": Place(("attention", "v_kernel"), 1),
    "self_attn.v_proj.bias": Place(("attention", "v_bias"), 0),
    "self_attn.o_proj.weight": Place(("attention", "o_kernel"), 2),
    "post_attention_layernorm.weight": Place(("mlp_norm", "scale"), 0),
    "mlp.gate_proj.weight": Place(("mlp", "gate_kernel"), 1),
    "mlp.up_proj.weight": Place(("mlp", "up_kernel"), 1),
    "mlp.down_proj.weight": Place(("mlp", "down_kernel"), 1),
}


def parameter_shapes(config: ModelConfig, vocab_size: int) -> Any:
    """Shapes and dtypes of the model's parameters, as a tree."""
    model = Transformer(config, vocab_size)
    tokens = jnp.zeros((1, config.nsa.select_block), jnp.int32)
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])


def to_parameters(tensors: Mapping[str, Tensor], config: ModelConfig, vocab_size: int, source: Path) -> Any:
    """The model's parameters, as a tree of float32 NumPy arrays.

    Rows of the embedding for which the tokenizer has no token are cut off beyond the model's padded vocabulary, and are
    zeros where there are fewer. `source` is the file or folder for messages.

    Raises:
      ValueError: naming file and tensor, where one is missing, unknown, of another shape, or not finite.
    """
    shapes = parameter_shapes(config, vocab_size)
    rest = _Rest(source, dict(tensors))
    layers: dict[str, Any] = {}
    for name, place in IN_LAYER.items():
        shape = _at(shapes["layers"], place.path)
        if shape is None:
            continue
        names = [LAYER.format(layer) + name for layer in range(config.num_layers)]
        stacked = None
        for layer, array in enumerate(rest.take_all(names, _there(shape.shape[1:], place))):
            stacked = np.empty(shape.shape, np.float32) if stacked is None else stacked
            stacked[layer] = array.T.reshape(shape.shape[1:])
        layers.setdefault(place.path[0], {})[place.path[1]] = stacked
    rows, width = shapes["embedding"].shape
    params: dict[str, Any] = {
        "embedding": _padded(rest.take(EMBEDDING, (None, width), least_rows=vocab_size), rows),
        "layers": layers,
        "final_norm": {"scale": rest.take(FINAL_NORM, (width,))},
    }
    if not config.tie_embeddings:
        output = rest.take(OUTPUT, (None, width), least_rows=vocab_size)
        params["output_kernel"] = np.ascontiguousarray(_padded(output, rows).T)
    elif OUTPUT in tensors:  # some files have the embedding twice
        output = _padded(rest.take(OUTPUT, (None, width), least_rows=vocab_size), rows)
        if not np.array_equal(output, params["embedding"]):
            raise ValueError(
                f"{tensors[OUTPUT].file}: tensor {OUTPUT}: expected {EMBEDDING} again, or none, because they are tied"
            )
    rest.check_empty()
    return params


def to_tensors(params: Any, config: ModelConfig) -> Iterator[tuple[str, Float32[np.ndarray, "..."]]]:
    """The tensors of a dense model, one after the other; `to_parameters` reads them back."""
    (stack,) = layer_stacks(config).values()
    yield EMBEDDING, np.asarray(params["embedding"])
    shapes = stack.of_layer(params["layers"], 0, 0)
    for name, place in IN_LAYER.items():
        if _at(shapes, place.path) is None:
            continue
        stacked = np.asarray(stack.collect(params["layers"], *place.path))
        for layer, array in enumerate(stacked):
            there = array.reshape(*reversed(_there(array.shape, place))).T
            yield LAYER.format(layer) + name, np.ascontiguousarray(there)
    yield FINAL_NORM, np.asarray(params["final_norm"]["scale"])
    if not config.tie_embeddings:
        yield OUTPUT, np.ascontiguousarray(np.asarray(params["output_kernel"]).T)


def own_parameters(tensors: Mapping[str, Tensor], config: ModelConfig, vocab_size: int, source: Path) -> Any:
    """The parameters of any model of this trainer, from tensors that have the names of `own_tensors`.

    Raises:
      ValueError: as `to_parameters`.
    """
    shapes = parameter_shapes(config, vocab_size)
    rest = _Rest(source, dict(tensors))
    taken = [rest.take(name, shape.shape) for name, shape in flatten(shapes).items()]
    rest.check_empty()
    return jax.tree.unflatten(jax.tree.structure(shapes), taken)


def own_tensors(params: Any) -> Iterator[tuple[str, Float32[np.ndarray, "..."]]]:
    """The parameters of any model by the names that they have in checkpoints."""
    for name, array in flatten(params).items():
        yield name, np.asarray(array)


def _there(shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
    """The shape in the file of a tensor that has some shape here."""
    if not place.inputs:
        return (math.prod(shape),)
    return math.prod(shape[place.inputs :]), math.prod(shape[: place.inputs])


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    """What lies at a path; None where there is nothing."""
    for name in path:
        tree = tree.get(name) if tree is not None else None
    return tree


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    array = array[:rows]
    return np.concatenate([array, np.zeros((rows - len(array), array.shape[1]), array.dtype)])


class _Rest:
    """Tensors that are not taken yet."""

    def __init__(self, source: Path, tensors: dict[str, Tensor]):
        self._source, self._tensors = source, tensors

    def take(self, name: str, expected: tuple[int | None, ...], *, least_rows: int = 0) -> Float32[np.ndarray, "..."]:
        """Removes a tensor and returns it in float32; a size of None fits whatever is there."""
        self._check_there(name, expected)
        tensor = self._tensors.pop(name)
        fits = len(tensor.shape) == len(expected) and all(
            size in (None, found) for size, found in zip(expected, tensor.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"{tensor.file}: tensor {name} has shape {tensor.shape}: expected {_shown(expected)}")
        if tensor.shape[0] < least_rows:
            raise ValueError(
                f"{tensor.file}: tensor {name} has {tensor.shape[0]} rows: expected at least {least_rows}, one for "
                "each token of the tokenizer"
            )
        array = np.asarray(tensor.read(), np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"{tensor.file}: tensor {name} has NaN or infinite numbers: expected finite ones")
        return array

    def take_all(self, names: Sequence[str], expected: tuple[int | None, ...]) -> Iterator[Float32[np.ndarray, "..."]]:
        """Takes several of one shape, one after the other, if all are there."""
        for name in names:
            self._check_there(name, expected)
        for name in names:
            yield self.take(name, expected)

    def check_empty(self) -> None:
        """Raises ValueError where a tensor is left."""
        for name, tensor in self._tensors.items():
            raise ValueError(
                f"{tensor.file}: tensor {name} of shape {tensor.shape}: expected no such tensor in this kind of model"
            )

    def _check_there(self, name: str, expected: tuple[int | None, ...]) -> None:
        if name not in self._tensors:
            raise ValueError(f"{self._source}: tensor {name} is missing: expected one of shape {_shown(expected)}")


def _shown(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"
