"""What a device receives in one step, by formula."""

import dataclasses
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from train.config import ModelConfig, TrainConfig
from train.model.attention import attention_kind
from train.model.attention.kind import AttentionKind, Split
from train.model.transformer import Transformer
from train.parallel.sharding import BATCH_AXES, RULES, SHARE_AXES, padded_length

PURPOSES = ("parameters", "gradients", "tensor", "experts", "context")


@dataclasses.dataclass(frozen=True)
class _Step:
    """Sizes that the formulas share, of one microbatch on one device."""

    model: ModelConfig
    mesh: Mapping[str, int]  # devices along each mesh axis
    rows: int
    length: int  # tokens of a row on all devices together
    itemsize: int  # z: bytes of a number of the compute dtype
    passes: int  # forward passes, the rematerialised one included

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * (self.length // self.mesh["context"])

    @property
    def residual(self) -> int:
        """Bytes of the residual stream."""
        return self.tokens * self.model.embed_dim * self.itemsize

    @property
    def attentions(self) -> list[AttentionKind]:
        """The kind of attention of each layer."""
        return [attention_kind(name) for name in self.model.attention_of_layers]

    @property
    def expert_layers(self) -> int:
        """Layers with experts."""
        moe = self.model.moe
        return self.model.num_layers - moe.first_dense if moe.num_routed else 0


def predicted_bytes(config: TrainConfig, vocab_size: int, sizes: Mapping[str, int]) -> dict[str, float]:
    """Bytes that a device receives in one step, with all its microbatches, by purpose.

    z is the size of a number of the compute dtype. `passes` is 1 for the forward pass and, under remat, 1 more.

    * "parameters": what the F devices along "fsdp" and "context" share is gathered for use, (F - 1) / F of it, in every
      pass of the layers. The backward pass uses what the last of them gathered. Norms are sent in float32, the rest is
      rounded before.
    * "gradients": those of every parameter are all-reduced over the devices that hold other tokens ("data", "fsdp",
      "expert" and "context"; routed experts: not over "expert"). That of the tokens' embeddings is sent in float32. On
      GPUs and TPUs the compiler turns the all-reduce, and the slice of it that each of the F devices takes, into a
      reduce-scatter, which is half of it.
    * "tensor": all-reduces of [rows, tokens, embed_dim]. In every forward pass there is one after attention and
      (except in the last of two passes) one after the MLP. In the backward pass there is one for each projection that
      reads the residual stream. There is one for the embeddings and one for the loss's gradient. The gradients of what
      the heads share, such as phi and the gates of NSA, are summed too.
    * "experts": see `train.model.moe`. Parameters are gathered, and their gradients reduce-scattered and then summed
      over the other devices that have the same expert. In every pass tokens and their routing go to the devices along
      "expert", and in the first pass results come back. The backward pass sends the same the other way. Results and the
      residual stream's gradient are summed over "tensor".
    * "context": see `AttentionKind.received_over_context`. It is received in every pass, and gradients go the same way
      back. What the backward pass fetches once more is added (`AttentionKind.received_again_over_context`). This holds
      for attention on kernels: other implementations recompute attention whatever remat says.

    Scalars and single numbers per token are left out.

    Args:
      config: of the run.
      vocab_size: of the tokenizer.
      sizes: devices along `train.parallel.sharding.MESH_AXES`.
    """
    model = config.model
    step = _Step(
        model=model,
        mesh=sizes,
        rows=config.data.batch_size // config.optimizer.accumulate // math.prod(sizes[name] for name in BATCH_AXES),
        length=padded_length(config.data.sequence_length, sizes["context"], model.nsa.compress_stride),
        itemsize=jnp.dtype(model.dtype).itemsize,
        passes=1 if model.remat == "none" else 2,
    )
    total = _of_parameters(step, vocab_size)
    total["tensor"] += _over_tensor(step)
    total["experts"] += _to_experts(step)
    total["context"] += _over_context(step)
    return {purpose: config.optimizer.accumulate * size for purpose, size in total.items()}


def _of_parameters(step: _Step, vocab_size: int) -> dict[str, float]:
    """Gathers of parameters, and sums of their gradients."""
    total = dict.fromkeys(PURPOSES, 0.0)
    model, mesh, rules = step.model, step.mesh, dict(RULES)
    F = math.prod(mesh[name] for name in SHARE_AXES)
    boxed = jax.eval_shape(Transformer(model, vocab_size).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    for path, box in jax.tree_util.tree_leaves_with_path(
        boxed["params"], is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    ):
        name = path[-1].key
        axes = [axis for axis in box.names if axis != "embed"]
        split = math.prod([mesh[rules[axis]] for axis in axes if rules[axis] is not None])
        itemsize = 4 if name in ("scale", "router_kernel") else step.itemsize
        size = math.prod(box.value.shape) / split * itemsize
        if "expert" in axes or name.startswith(("shared_", "router_")):
            alike = mesh["data"] * (1 if "expert" in axes else mesh["expert"])
            total["experts"] += (_others(F) * (step.passes + 1) + 2 * _others(alike) / F) * size
            continue
        if "embed" in box.names:
            total["parameters"] += _others(F) * size * (step.passes if "layers" in axes else 1)
        total["gradients"] += _of_gradient(step, name, size)
    return total


def _of_gradient(step: _Step, name: str, size: float) -> float:
    """The sum of the gradient of a parameter that is `size` bytes on a device and belongs to no expert."""
    mesh = step.mesh
    rows, context, tensor = math.prod(mesh[axis] for axis in BATCH_AXES), mesh["context"], mesh["tensor"]
    if not any(kind.is_replicated_over_tensor(name) for kind in step.attentions):
        if name == "embedding":  # each use's gradient is summed by itself, that of the tokens' rows in float32
            size = size / step.itemsize * 4 + (size if step.model.tie_embeddings else 0)
        return 2 * (_others(rows) + _others(context)) * size
    if context > 1:  # summed by hand, over everything at once
        return 2 * _others(rows * context * tensor) * size
    return 2 * (_others(rows) + _others(tensor)) * size


def _over_tensor(step: _Step) -> float:
    """Sums of activations and of their gradients over the devices that split the heads and the MLPs."""
    model = step.model
    attention = sum(step.passes + 1 + sum(kind.kv_projections(model)) for kind in step.attentions)
    times = attention + (model.num_layers - step.expert_layers) * (1 + 2) + 2
    other = step.tokens * sum(kind.other_hidden_size(model) for kind in step.attentions) * step.itemsize
    return 2 * _others(step.mesh["tensor"]) * (times * step.residual + other)


def _to_experts(step: _Step) -> float:
    """Tokens to the devices that hold their experts and back, and sums of what parts of an expert give."""
    # The weights of a token's experts, and as many bytes of indices. A second pass needs no results.
    routing = step.tokens * step.model.moe.top_k * 4
    along_expert = (step.passes + 1) * (step.residual + routing) + step.passes * routing + 2 * step.residual
    over_tensor = 2 * 2 * _others(step.mesh["tensor"]) * step.residual
    return step.expert_layers * ((step.mesh["expert"] - 1) * along_expert + over_tensor)


def _over_context(step: _Step) -> float:
    """Keys and values of tokens on other devices."""
    mesh, model = step.mesh, step.model
    split = Split(step.length, mesh["context"], mesh["tensor"], step.itemsize)
    once = sum(kind.received_over_context(model, split) for kind in step.attentions)
    again = sum(kind.received_again_over_context(model, split) for kind in step.attentions)
    return step.rows * ((step.passes + 1) * once + again)


def _others(devices: int) -> float:
    return (devices - 1) / devices
