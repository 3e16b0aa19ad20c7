"""Mixture of experts as in DeepSeekMoE (arXiv 2401.06066): shared SwiGLUs, and routed ones of which a token uses a few.

No token is ever dropped: assignments are sorted by expert and `jax.lax.ragged_dot` multiplies each group by its expert.
Two ways keep the load even: the auxiliary loss (arXiv 2401.06066, equation 12), and a bias on the choice that no
gradient trains, moved after each step (arXiv 2408.15664).

Each device routes its own tokens. Then the devices along `expert` gather each other's tokens and their routing, compute
the outputs of their own experts, and sum them while scattering them back. With n devices along `expert`, a device sends
for each layer and each of its tokens n - 1 times E entries of x and k pairs of weight and index, and then n - 1 times E
entries of output; in the backward pass the same. An all-to-all of copies for the k choices sends about 2 k (n - 1) / n
times E instead, which is less where n > k and more where n < k. But its buffers either overflow, so that tokens are
dropped, or are as large as what is gathered here.

Work per device does not grow with n. The sorted rows would grow to n k times a device's tokens, because all tokens may
choose its experts. They are therefore made and used in n parts.

Along `tensor`, partial sums of the scattered output are summed, those of the shared experts among them. Together with
the scatter this sends as many bytes as one collective over both axes. Where XLA has no grouped matrix product for
`ragged_dot`, as on a CPU, it multiplies every row by every expert of the device and masks. Statistics are sums over all
tokens of the mesh.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from nsa_jax.core import Parameter
from nsa_jax.sharding import free_axes, free_split, manual_axes
from train.config import ModelConfig, MoEConfig
from train.model.auxiliary import leave_loss
from train.model.rounding import widened, with_gradient_to
from train.parallel.sharding import RULES, logical

COLLECTION = "routing"  # where a layer leaves its `Routing`, if the caller says that this collection may change


class Routing(NamedTuple):
    """How tokens went to the routed experts of each layer: float32 sums over tokens, so that microbatches add up."""

    assignments: Float[Array, "*L N"]  # tokens that chose the expert
    shares: Float[Array, "*L N"]  # of its score in the sum of a token's scores
    entropy: Float[Array, "*L"]  # of those shares, in nats
    tokens: Float[Array, "*L"]


class RouterMetrics(NamedTuple):
    """Of a step's whole batch; float32 scalars."""

    router_load_max: Float[Array, ""]  # largest load of an expert over the mean load, in the layer where it is largest
    router_load_mean: Float[Array, ""]  # the same, averaged over layers
    router_aux_loss: Float[Array, ""]  # `auxiliary_loss`, averaged over layers
    router_entropy: Float[Array, ""]  # of a token's score shares in nats, averaged over tokens and layers


class _MeshAxes(NamedTuple):
    """Mesh axes that split what a layer works on; () where none does."""

    tokens: tuple[str, ...] = ()
    expert: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()


def moe_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Every parameter of a layer of experts, by name. The shared experts are one SwiGLU of their widths together."""
    E, N, M = config.embed_dim, config.moe.num_routed, config.moe.expert_dim
    one, many = initializers.lecun_normal(), initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
    parameters = {
        "router_kernel": Parameter((E, N), one, ("embed", "router")),
        "balance_bias": Parameter((N,), initializers.zeros_init(), ("router",)),
        "gate_kernel": Parameter((N, E, M), many, ("expert", "embed", "mlp")),
        "up_kernel": Parameter((N, E, M), many, ("expert", "embed", "mlp")),
        "down_kernel": Parameter((N, M, E), many, ("expert", "mlp", "embed")),
    }
    if config.moe.num_shared:
        S = config.moe.num_shared * M
        parameters["shared_gate_kernel"] = Parameter((E, S), one, ("embed", "mlp"))
        parameters["shared_up_kernel"] = Parameter((E, S), one, ("embed", "mlp"))
        parameters["shared_down_kernel"] = Parameter((S, E), one, ("mlp", "embed"))
    return parameters


class MoE(nn.Module):
    """The feed-forward part of a block: the sum of the outputs of all shared and of the chosen routed experts."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"], counted: Bool[Array, "B T"] | None = None) -> Float[Array, "B T E"]:
        """Output in the dtype of x. Tokens outside `counted` are left out of the statistics; None: all count."""
        parameters: dict[str, Any] = {
            name: self.param(name, nn.with_logical_partitioning(p.init, p.axes), p.shape, jnp.float32)
            for name, p in moe_parameters(self.config).items()
        }
        y, routing = moe_layer(parameters, x, counted, config=self.config)
        if self.config.moe.aux_loss:
            leave_loss(self, self.config.moe.aux_loss * auxiliary_loss(routing, self.config.moe))
        self.sow(COLLECTION, "sums", routing, init_fn=lambda: None, reduce_fn=lambda _, new: new)
        return y


def moe_layer(
    parameters: Mapping[str, Array],
    x: Float[Array, "B T E"],
    counted: Bool[Array, "B T"] | None = None,
    *,
    config: ModelConfig,
) -> tuple[Float[Array, "B T E"], Routing]:
    """The experts on the mesh in context, split as `RULES` say; plain local code where nothing is split.

    B is split over data, fsdp and expert, and T over context. Each device holds N / expert of the routed experts, and
    of every expert embed_dim / fsdp (gathered for use, after rounding to the dtype of x) and expert_dim / tensor.
    The module says what is sent.

    Args:
      parameters: as `moe_parameters` names them, float32.
      x: [B, T, E].
      counted: the tokens that count in the statistics; None: all.
      config: of the model.

    Returns:
      Output [B, T, E] in the dtype of x, and the statistics.

    Raises:
      ValueError: by `jax.shard_map`, where an axis of the mesh does not divide what is split along it.
    """
    # Outside of the function that is transposed below, so that not even zeros are summed for it.
    parameters = {**parameters, "balance_bias": jax.lax.stop_gradient(parameters["balance_bias"])}
    rules = dict(RULES)
    over = {name: free_axes(rules[name]) for name in ("batch", "sequence", "expert", "embed", "mlp")}
    axes = _MeshAxes(over["batch"] + over["sequence"], over["expert"], over["embed"], over["mlp"])
    if not any(axes):
        return _local_layer(parameters, x, counted, config=config, axes=axes)

    def split(*names: str | None) -> PartitionSpec:
        return free_split(logical(*names))

    tokens = split("batch", "sequence", None)
    layer = jax.shard_map(
        functools.partial(_local_layer, config=config, axes=axes),
        in_specs=(
            {name: split(*parameter.axes) for name, parameter in moe_parameters(config).items()},
            tokens,
            split("batch", "sequence"),
        ),
        out_specs=(tokens, PartitionSpec()),
        axis_names=manual_axes(sum(axes, ()), jax.sharding.get_abstract_mesh()),
        # So that gradients of parameters are added up at this boundary, as parts along fsdp, and nowhere before.
        check_vma=False,
    )
    return jax.jit(layer)(parameters, x, counted)  # outside of jit, `shard_map` knows no Auto axes


def route(
    logits: Float[Array, "*T N"], bias: Float[Array, " N"], config: MoEConfig
) -> tuple[Int[Array, "*T k"], Float[Array, "*T k"], Float[Array, "*T N"]]:
    """The k experts of each token, their weights, and every expert's share in the sum of the token's scores.

    The choice is by score + bias. Weights and shares come from the scores alone. Ties go to the lower index.
    """
    scores = jax.nn.softmax(logits, axis=-1) if config.score == "softmax" else jax.nn.sigmoid(logits)
    biased = scores + bias.reshape(*(1,) * (logits.ndim - 1), -1)
    _, choice = jax.lax.top_k(jax.lax.stop_gradient(biased), config.top_k)
    # A sum instead of a gather, whose gradient would be a scatter: on a GPU, numbers added up in any order, or a sort.
    chosen = jax.nn.one_hot(choice, config.num_routed, dtype=bool)
    weights = jnp.sum(jnp.where(chosen, scores[..., None, :], 0), axis=-1)
    if config.normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return choice, config.routed_scaling * weights, scores / jnp.sum(scores, axis=-1, keepdims=True)


def auxiliary_loss(routing: Routing, config: MoEConfig) -> Float[Array, "*L"]:
    """Sum over experts of f_i P_i for each layer (arXiv 2401.06066, equations 12 to 14); 1 where the load is even.

    f_i is the expert's load over the mean load, without gradient, and P_i its mean share of the scores.
    """
    tokens = jnp.maximum(routing.tokens, 1.0)[..., None]
    load = jax.lax.stop_gradient(routing.assignments) * (config.num_routed / config.top_k) / tokens
    return jnp.sum(load * (routing.shares / tokens), axis=-1)


def rebalanced(bias: Float[Array, "*L N"], assignments: Float[Array, "*L N"], speed: float) -> Float[Array, "*L N"]:
    """The bias after a step: up by `speed` for an expert below the mean load, down above (arXiv 2408.15664)."""
    return bias + speed * jnp.sign(jnp.mean(assignments, axis=-1, keepdims=True) - assignments)


def router_metrics(routing: Routing, config: MoEConfig) -> RouterMetrics:
    """What is logged of a step."""
    mean = jnp.maximum(routing.tokens, 1.0) * config.top_k / config.num_routed
    load = jnp.max(routing.assignments, axis=-1) / mean
    entropy = routing.entropy / jnp.maximum(routing.tokens, 1.0)
    return RouterMetrics(jnp.max(load), jnp.mean(load), jnp.mean(auxiliary_loss(routing, config)), jnp.mean(entropy))


def _local_layer(
    parameters: Mapping[str, Array],
    x: Float[Array, "B T E"],
    counted: Bool[Array, "B T"] | None,
    *,
    config: ModelConfig,
    axes: _MeshAxes,
) -> tuple[Float[Array, "B T E"], Routing]:
    """One device's part, with the collectives that join the parts."""
    weights = {}
    for name, parameter in moe_parameters(config).items():
        weight = parameters[name] if "router" in parameter.axes else parameters[name].astype(x.dtype)
        if axes.embed and "embed" in parameter.axes:
            weight = jax.lax.all_gather(weight, axes.embed, axis=parameter.axes.index("embed"), tiled=True)
        weights[name] = weight
    tokens = x.reshape(-1, x.shape[-1])
    logits = jnp.dot(tokens.astype(jnp.float32), weights["router_kernel"], precision=jax.lax.Precision.HIGHEST)
    choice, mix, shares = route(logits, weights["balance_bias"], config.moe)
    routing = _sums(choice, shares, None if counted is None else counted.reshape(-1))
    if axes.tokens:
        routing = _sum_over(routing, axes.tokens)

    routed = (tokens, choice, mix)
    if axes.expert:
        routed = jax.tree.map(lambda array: jax.lax.all_gather(array, axes.expert, tiled=True), routed)
    first = jax.lax.axis_index(axes.expert) * weights["gate_kernel"].shape[0] if axes.expert else 0
    own = [weights[f"{name}_kernel"] for name in ("gate", "up", "down")]
    y = _in_parts((routed[0], routed[1] - first, routed[2]), own, jax.lax.axis_size(axes.expert) if axes.expert else 1)
    if axes.expert:
        y = jax.lax.psum_scatter(y, axes.expert, tiled=True)
    if config.moe.num_shared:
        y += _swiglu(jnp.dot, tokens, *(weights[f"shared_{name}_kernel"] for name in ("gate", "up", "down")))
    if axes.mlp:
        y = _sum_over(y, axes.mlp)
    return y.reshape(x.shape), routing


def _sums(choice: Int[Array, "T k"], shares: Float[Array, "T N"], counted: Bool[Array, " T"] | None) -> Routing:
    weight = jnp.ones(len(shares)) if counted is None else counted.astype(jnp.float32)
    chosen = choice[:, :, None] == jnp.arange(shares.shape[1], dtype=choice.dtype)[None, None, :]
    fixed = jax.lax.stop_gradient(shares)
    entropy = -jnp.sum(jax.scipy.special.xlogy(fixed, fixed), axis=-1)
    return Routing(
        assignments=jnp.sum(jnp.where(chosen, weight[:, None, None], 0.0), axis=(0, 1)),
        shares=jnp.sum(shares * weight[:, None], axis=0),
        entropy=jnp.sum(entropy * weight),
        tokens=jnp.sum(weight),
    )


def _in_parts(routed: tuple[Array, Array, Array], own: list[Array], parts: int) -> Float[Array, "T E"]:
    """`_routed_experts` for one part of the tokens after the other, rematerialised in the backward pass.

    With as many parts as there are devices along `expert`, no more assignments exist at a time than those of a device's
    own tokens. There are fewer parts where the number of tokens does not allow so many.
    """
    tokens = routed[0]
    parts = math.gcd(len(tokens), parts)
    if parts == 1:
        return _routed_experts(*routed, *own)
    split = jax.tree.map(lambda array: array.reshape(parts, -1, array.shape[1]), routed)
    wide = [widened(weight) for weight in own]
    y = jax.lax.map(jax.checkpoint(lambda part: _routed_experts(*part, *map(with_gradient_to, wide, own))), split)
    return y.reshape(tokens.shape)


def _routed_experts(
    x: Float[Array, "T E"],
    choice: Int[Array, "T k"],
    mix: Float[Array, "T k"],
    gate: Float[Array, "N E M"],
    up: Float[Array, "N E M"],
    down: Float[Array, "N M E"],
) -> Float[Array, "T E"]:
    """The weighted sum of what the experts 0 .. N - 1 give to the tokens that chose them; other choices give 0."""
    num_tokens, k = choice.shape
    num_experts = gate.shape[0]
    own = (choice >= 0) & (choice < num_experts)
    expert = jnp.where(own, choice, num_experts).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    inverse = jnp.argsort(order)
    sizes = jnp.sum(expert[:, None] == jnp.arange(num_experts, dtype=expert.dtype)[None, :], axis=0, dtype=jnp.int32)
    # `ragged_dot` promises nothing for rows behind the last group: they are masked on the way in, for the gradient of
    # x, and on the way out.
    in_group = jnp.arange(num_tokens * k, dtype=jnp.int32)[:, None] < jnp.sum(sizes)
    rows = jnp.where(in_group, _to_rows(x, order, inverse, k), 0)
    rows = _swiglu(functools.partial(jax.lax.ragged_dot, group_sizes=sizes), rows, gate, up, down)
    parts = _from_rows(jnp.where(in_group, rows, 0), order, inverse).reshape(num_tokens, k, -1)
    return jnp.sum(parts.astype(mix.dtype) * mix[:, :, None], axis=1).astype(x.dtype)


def _swiglu(dot: Callable[[Array, Array], Array], x: Array, gate: Array, up: Array, down: Array) -> Array:
    return dot(jax.nn.silu(dot(x, gate)) * dot(x, up), down)


# The two functions below are each other's transposes. Without them, the gradient of `x[order // k]` would be a scatter
# with floating-point atomics, whose sums differ from run to run.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _to_rows(x: Float[Array, "T E"], order: Int[Array, " R"], inverse: Int[Array, " R"], k: int) -> Float[Array, "R E"]:
    """Row r is the token of assignment order[r]; assignment a is of token a // k."""
    return x[order // k]


@jax.custom_vjp
def _from_rows(rows: Float[Array, "R E"], order: Int[Array, " R"], inverse: Int[Array, " R"]) -> Float[Array, "R E"]:
    """Rows in the order of the assignments."""
    return rows[inverse]


_to_rows.defvjp(
    lambda x, order, inverse, k: (_to_rows(x, order, inverse, k), inverse),
    lambda k, inverse, dy: (jnp.sum(dy[inverse].reshape(-1, k, dy.shape[1]), axis=1), None, None),
)
_from_rows.defvjp(
    lambda rows, order, inverse: (_from_rows(rows, order, inverse), order),
    lambda order, dy: (dy[order], None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum_over(tree: Any, axes: tuple[str, ...]) -> Any:
    """`psum` of what leaves the `shard_map` without being split over `axes`.

    The cotangent of such a result comes in equal parts, one for each device. Their sum is a multiplication, so that the
    backward pass sends nothing.
    """
    return jax.lax.psum(tree, axes)


_sum_over.defvjp(
    lambda tree, axes: (_sum_over(tree, axes), None),
    lambda axes, _, cotangent: (jax.tree.map(lambda x: x * jax.lax.axis_size(axes), cotangent),),
)
