"""The attention layers as plain functions of their parameters. The Linen and the NNX modules both wrap these.

A frozen config describes a layer. `*_parameters(config, embed_dim)` lists its parameters by name, each with its shape,
initialiser and logical axes. `*_layer(parameters, x, ...)` computes it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax.linen import initializers
from jax.export import is_symbolic_dim
from jax.sharding import PartitionSpec
from jaxtyping import Array, DTypeLike, Float, Int

from nsa_jax import arguments
from nsa_jax.arguments import describe
from nsa_jax.attention import AttentionInputs, BranchKV, Implementation, checked_segment_ids, nsa_attention
from nsa_jax.compression import COMPRESSIONS, Compression, add_bias, compress, phi_shapes
from nsa_jax.config import NSAConfig, check_config
from nsa_jax.dense import causal_attention
from nsa_jax.explicit import on_auto_axes, split_like, split_of
from nsa_jax.precision import wide_dtype
from nsa_jax.rope import RopeScaling, apply_rope
from nsa_jax.sharding import MeshAxes, check_mesh_axes, devices_along, free_axes, place, sharded, token_positions

BRANCHES = ("cmp", "slc", "win")
NORM_EPSILON = 1e-6  # added to the mean square in the norm of queries and keys


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter: its shape, initialiser and logical axis names."""

    shape: tuple[int, ...]
    init: Callable
    axes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Heads of an attention layer, their positions and how they are split over a mesh.

    Raises:
      ValueError: the head counts or sizes do not fit together.
    """

    num_heads: int  # H, query heads
    num_kv_heads: int  # K, key/value heads; divides H
    head_dim: int  # Dk
    v_head_dim: int | None = None  # Dv; None: Dk
    rope_theta: float | None = 10_000.0  # base of the rotary embedding; None: no positions
    rope_scaling: RopeScaling = RopeScaling()  # for contexts longer than those trained on
    qk_norm: bool = False  # RMSNorm of every query and key head before the rotary embedding (arXiv 2302.05442)
    qkv_bias: bool = False  # biases of the query, key and value projections
    output_init_scale: float = 1.0  # factor on the initial output projection
    dtype: DTypeLike | None = None  # of the computation; None: the input's dtype
    batch_axes: MeshAxes = ()  # mesh axes that split B; see `nsa_jax.sharding.sharded`
    head_axes: MeshAxes = ()  # mesh axes that split the K/V heads
    context_axes: MeshAxes = ()  # mesh axes that split T, which is then in the order of `nsa_jax.context.zigzag_order`

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            self._set(name, arguments.size(name, getattr(self, name)))
        self._set("v_head_dim", arguments.optional_size("v_head_dim", self.v_head_dim))
        self._set("output_init_scale", arguments.real("output_init_scale", self.output_init_scale))
        if self.rope_theta is not None:
            self._set("rope_theta", arguments.real("rope_theta", self.rope_theta))
        if self.dtype is not None:
            self._set("dtype", arguments.float_dtype("dtype", self.dtype))
        if not isinstance(self.rope_scaling, RopeScaling):
            raise ValueError(f"rope_scaling = {self.rope_scaling!r}: expected an nsa_jax.RopeScaling")
        for name, axes in self.mesh_axes.items():
            check_mesh_axes(name, axes)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads = {self.num_kv_heads}: expected a divisor of num_heads = {self.num_heads}")
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}: rotary position embedding needs an even head size")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def mesh_axes(self) -> dict[str, Any]:
        """How the layer's ops are split, as keyword arguments of `nsa_jax.sharding.sharded`."""
        return {"batch_axes": self.batch_axes, "head_axes": self.head_axes, "context_axes": self.context_axes}

    @property
    def value_dim(self) -> int:
        """Dv."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim


@dataclasses.dataclass(frozen=True)
class NSALayerConfig(HeadConfig):
    """A Native Sparse Attention layer."""

    config: NSAConfig = NSAConfig()  # sizes of the branches
    compression: Compression = "mean"  # phi; the paper's is "mlp"
    compression_hidden_dim: int | None = None  # F, the hidden width of an mlp phi; None: twice the head size
    gate_hidden_dim: int | None = None  # hidden width of the gate MLP; None: a quarter of the embedding
    share_kv: bool = True  # one key/value projection for all three branches; in the paper each has its own
    tie_keys: bool = False  # compressed keys are means of the selected branch's keys; phi is for values alone
    implementation: Implementation | None = None  # of the attention

    def __post_init__(self) -> None:
        super().__post_init__()
        check_config(self.config)
        for name in ("compression_hidden_dim", "gate_hidden_dim"):
            self._set(name, arguments.optional_size(name, getattr(self, name)))
        if self.compression not in COMPRESSIONS:
            raise ValueError(f"compression = {self.compression!r}: expected one of {', '.join(COMPRESSIONS)}")


def projection_parameters(config: HeadConfig, embed_dim: int, branches: tuple[str, ...]) -> dict[str, Parameter]:
    """The query and output projections, and a key and a value projection for each branch."""
    H, K, Dk, Dv = config.num_heads, config.num_kv_heads, config.head_dim, config.value_dim
    project = initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
    # The distribution of lecun_normal, whose standard deviation `output_init_scale` multiplies.
    join = initializers.variance_scaling(
        config.output_init_scale**2, "fan_in", "truncated_normal", in_axis=(0, 1), out_axis=2
    )
    norm = Parameter((Dk,), initializers.ones_init(), ("head_dim",))
    parameters = {
        "q_kernel": Parameter((embed_dim, H, Dk), project, ("embed", "heads", "head_dim")),
        "o_kernel": Parameter((H, Dv, embed_dim), join, ("heads", "head_dim", "embed")),
    }
    zeros = initializers.zeros_init()
    if config.qkv_bias:
        parameters["q_bias"] = Parameter((H, Dk), zeros, ("heads", "head_dim"))
    if config.qk_norm:
        parameters["q_norm_scale"] = norm
    for branch in branches:
        prefix = f"{branch}_" if branch else ""
        axes = ("embed", "kv_heads", "head_dim")
        parameters[f"{prefix}k_kernel"] = Parameter((embed_dim, K, Dk), project, axes)
        parameters[f"{prefix}v_kernel"] = Parameter((embed_dim, K, Dv), project, axes)
        if config.qkv_bias:
            parameters[f"{prefix}k_bias"] = Parameter((K, Dk), zeros, axes[1:])
            parameters[f"{prefix}v_bias"] = Parameter((K, Dv), zeros, axes[1:])
        if config.qk_norm:
            parameters[f"{prefix}k_norm_scale"] = norm
    return parameters


def nsa_parameters(config: NSALayerConfig, embed_dim: int) -> dict[str, Parameter]:
    """Every parameter of a Native Sparse Attention layer, by name."""
    parameters = projection_parameters(config, embed_dim, ("",) if config.share_kv else BRANCHES)
    if config.tie_keys:
        for name in ("cmp_k_kernel", "cmp_k_bias", "cmp_k_norm_scale"):
            parameters.pop(name, None)
    for name, size in (("phi_k", config.head_dim), ("phi_v", config.value_dim)):
        parameters |= _phi_parameters(name, size, config)
    hidden = config.gate_hidden_dim or max(1, embed_dim // 4)
    zeros = initializers.zeros_init()
    parameters["gate_in_kernel"] = Parameter((embed_dim, hidden), initializers.lecun_normal(), ("embed", "gate_hidden"))
    parameters["gate_in_bias"] = Parameter((hidden,), zeros, ("gate_hidden",))
    parameters["gate_out_kernel"] = Parameter(
        (hidden, config.num_heads, 3),
        initializers.lecun_normal(in_axis=0, out_axis=(1, 2)),
        ("gate_hidden", "heads", "branch"),
    )
    parameters["gate_out_bias"] = Parameter((config.num_heads, 3), zeros, ("heads", "branch"))
    return parameters


def _phi_parameters(name: str, size: int, config: NSALayerConfig) -> dict[str, Parameter]:
    """The parameters of phi for keys or for values, with heads of `size`."""
    method, zeros = compression_of(config, name), initializers.zeros_init()
    width = "phi_hidden" if method == "mlp" else "phi_out"
    described: dict[str, tuple[Callable, tuple[str, ...]]] = {
        "position": (initializers.normal(0.02), ("compress_block", "head_dim")),
        "in_kernel": (
            initializers.lecun_normal(in_axis=(0, 1), out_axis=2),
            ("compress_block", "head_dim", width),
        ),
        "in_bias": (zeros, ("phi_hidden",)),
        "out_kernel": (initializers.lecun_normal(), ("phi_hidden", "head_dim")),
        "out_bias": (zeros, ("head_dim",)),
    }
    shapes = phi_shapes(method, size, config.compression_hidden_dim or 2 * size, config.config)
    return {f"{name}_{key}": Parameter(shape, *described[key]) for key, shape in shapes.items()}


def layer_parameters(config: HeadConfig, embed_dim: int) -> dict[str, Parameter]:
    """Every parameter of a layer of either kind, by name."""
    if isinstance(config, NSALayerConfig):
        return nsa_parameters(config, embed_dim)
    return projection_parameters(config, embed_dim, ("",))


Function = TypeVar("Function", bound=Callable[..., Any])


def layer_on_mesh(results: Callable[[Mapping[str, Any]], Any]) -> Callable[[Function], Function]:
    """A decorator for a layer f(parameters, x, ..., config=...) that makes it run on meshes with Explicit axes.

    If the config names no mesh axes there, they are read from the types of the arrays: those that split the rows of x
    are `batch_axes`, and those that split the heads of the key projections are `head_axes`. For `results`, see
    `on_auto_axes`.
    """

    def decorate(layer: Function) -> Function:
        on_mesh = on_auto_axes(results)(layer)

        @functools.wraps(layer)
        def call(parameters: Mapping[str, Array], x: Array, *rest: Any, config: HeadConfig, **options: Any) -> Any:
            if not any(config.mesh_axes.values()):
                (batch,) = split_of(x, 0)
                heads = {split_of(value, 1)[0] for name, value in parameters.items() if name.endswith("k_kernel")}
                (head,) = heads if len(heads) == 1 else (None,)
                config = dataclasses.replace(config, batch_axes=batch or (), head_axes=head or ())
            return on_mesh(parameters, x, *rest, config=config, **options)

        return cast(Function, call)

    return decorate


@layer_on_mesh(lambda arguments: split_like(arguments["x"]))
def nsa_layer(
    parameters: Mapping[str, Array],
    x: Float[Array, "B T E"],
    *,
    config: NSALayerConfig,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T E"]:
    """Projections, phi, rotary embedding, gates, attention and output projection (paper, section 3).

    Positions count from the start of each segment. For compressed keys, see `compressed_tokens`.
    """
    x, weights = layer_inputs(x, parameters, config)
    q, kv, g, segment_ids, _ = nsa_layer_inputs(weights, x, config=config, segment_ids=segment_ids)
    attention = sharded(nsa_attention, **config.mesh_axes)
    o = attention(q, kv, g, config=config.config, segment_ids=segment_ids, implementation=config.implementation)
    return join_heads(o, weights["o_kernel"])


def nsa_layer_inputs(
    parameters: Mapping[str, Array],
    x: Float[Array, "B T E"],
    *,
    config: NSALayerConfig,
    segment_ids: Int[Array, "B T"] | None = None,
) -> AttentionInputs:
    """The arguments that a layer gives to `nsa_attention`. For its own arguments, see `nsa_layer`."""
    q, kv, g = _attention_arrays(parameters, x, config=config, segment_ids=segment_ids)
    ids = None if segment_ids is None else checked_segment_ids(segment_ids, *q.shape[:2])
    return AttentionInputs(q, kv, g, ids)


def _rows_and_heads(arguments: Mapping[str, Any]) -> PartitionSpec:
    """How `_attention_arrays` splits its results: rows as those of x, heads as `head_axes` say."""
    return PartitionSpec(*split_of(arguments["x"], 0), None, free_axes(arguments["config"].head_axes) or None)


@layer_on_mesh(_rows_and_heads)
def _attention_arrays(
    parameters: Mapping[str, Array], x: Float[Array, "B T E"], *, config: NSALayerConfig, segment_ids: Array | None
) -> tuple[Float[Array, "B T H Dk"], BranchKV, Float[Array, "B T H 3"]]:
    """Queries, keys and values, and gates."""
    x, weights = layer_inputs(x, parameters, config)
    _, positions = _segments_and_positions(x, segment_ids, config)
    q, raw = project_branches(weights, x, positions, config)
    cmp_k, cmp_v = compressed_tokens(weights, raw.cmp_k, raw.cmp_v, positions, config)
    return q, raw._replace(cmp_k=cmp_k, cmp_v=cmp_v), gates(x, weights)


def project_branches(
    weights: Mapping[str, Array], x: Float[Array, "B T E"], positions: Int[Array, "B T"], config: NSALayerConfig
) -> tuple[Float[Array, "B T H Dk"], BranchKV]:
    """Queries, keys and values of the three branches, rotated. `cmp_*` are one per token still, and not rotated."""
    q = rotate(_project_normed(x, weights, "q", config), positions, config)
    if config.share_kv:  # projected once, so that gradients are added up before they go through the projection
        k, v = _project_normed(x, weights, "k", config), _project(x, weights, "v")
        rotated = rotate(k, positions, config)
        return q, BranchKV(k, v, rotated, v, rotated, v)
    slc_k = _project_normed(x, weights, "slc_k", config)
    cmp_k = slc_k if config.tie_keys else _project_normed(x, weights, "cmp_k", config)
    win_k = _project_normed(x, weights, "win_k", config)
    cmp_v, slc_v, win_v = (_project(x, weights, f"{branch}_v") for branch in BRANCHES)
    slc_k, win_k = (rotate(k, positions, config) for k in (slc_k, win_k))
    return q, BranchKV(cmp_k, cmp_v, slc_k, slc_v, win_k, win_v)


def compressed_tokens(
    weights: Mapping[str, Array],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    positions: Int[Array, "B T"],
    config: NSALayerConfig,
) -> tuple[Float[Array, "B Nc K Dk"], Float[Array, "B Nc K Dv"]]:
    """Compressed keys, rotated, and compressed values, from keys that are not rotated and the positions of all.

    Means are of rotated keys: a query's score for a block is then the mean of its scores for the block's keys. A phi
    with weights sees keys that are not rotated, so that it does not depend on where a block lies, and its result is
    rotated at the position of the block's first token.
    """
    # Only a split over tokens is done by hand. XLA's partitioner splits phi over rows and heads by itself.
    phi_of = sharded(compress, **config.mesh_axes) if devices_along(config.context_axes) > 1 else compress

    def phi(name: str, array: Array) -> Array:
        method = compression_of(config, name)
        parameters = {key: weights[f"{name}_{key}"] for key in phi_shapes(method, 1, 1, config.config)}
        return phi_of(array, parameters, config=config.config, method=method)

    if compression_of(config, "phi_k") == "mean":
        return phi("phi_k", rotate(k, positions, config)), phi("phi_v", v)
    (B, T), d = positions.shape, config.config.compress_stride
    # Cut into strides instead of slicing with a step, so that a sequence split over devices stays where it is.
    first = positions[:, : T // d * d].reshape(B, T // d, d)[:, :, 0]
    cmp_k = phi("phi_k", k)
    return rotate(cmp_k, first[:, : cmp_k.shape[1]], config), phi("phi_v", v)


@layer_on_mesh(lambda arguments: split_like(arguments["x"]))
def full_layer(
    parameters: Mapping[str, Array],
    x: Float[Array, "B T E"],
    *,
    config: HeadConfig,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T E"]:
    """The dense baseline: causal grouped-query attention (`nsa_jax.dense.causal_attention`) between projections.

    With `window`, a query sees the last `window` positions, its own included.
    """
    x, weights = layer_inputs(x, parameters, config)
    segment_ids, positions = _segments_and_positions(x, segment_ids, config)
    q, k, v = project_dense(weights, x, positions, config)
    o = sharded(causal_attention, **config.mesh_axes)(q, k, v, window=window, segment_ids=segment_ids)
    return join_heads(o, weights["o_kernel"])


def project_dense(
    weights: Mapping[str, Array], x: Float[Array, "B T E"], positions: Int[Array, "B T"], config: HeadConfig
) -> tuple[Float[Array, "B T H Dk"], Float[Array, "B T K Dk"], Float[Array, "B T K Dv"]]:
    """Rotated queries and keys, and values."""
    q, k = (rotate(_project_normed(x, weights, name, config), positions, config) for name in ("q", "k"))
    return q, k, _project(x, weights, "v")


def compression_of(config: NSALayerConfig, name: str) -> Compression:
    """The method of "phi_k" or "phi_v": tied keys are means, whatever makes the values."""
    return "mean" if config.tie_keys and name == "phi_k" else config.compression


def rotate(array: Float[Array, "B T H D"], positions: Int[Array, "B T"], config: HeadConfig) -> Array:
    """Rotary embedding, if the layer has one."""
    return array if config.rope_theta is None else apply_rope(array, positions, config.rope_theta, config.rope_scaling)


def checked_input(x: Any) -> Float[Array, "B T E"]:
    """The input of a layer as a JAX array; ValueError for what is none."""
    x = arguments.array("x", x)
    if x.ndim != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: {describe(x)}: expected a float array [batch, tokens, embedding]")
    if any(map(is_symbolic_dim, x.shape[1:])):
        raise ValueError(f"x: {describe(x)}: expected tokens and an embedding that are known; only B may be symbolic")
    if x.shape[1] < 1 or x.shape[2] < 1:
        raise ValueError(f"x: {describe(x)}: expected at least one token and an embedding")
    return x


def layer_inputs(
    x: Float[Array, "B T E"], parameters: Mapping[str, Array], config: HeadConfig
) -> tuple[Array, dict[str, Array]]:
    """Input and declared parameters in the dtype of the computation, after checking both.

    On a mesh whose axes the layer knows, parameters stay split only along the heads that `head_axes` split. Along other
    axes, such as the embedding in fully sharded data parallelism, they are gathered.
    """
    x = checked_input(x)
    dtype = x.dtype if config.dtype is None else config.dtype
    declared = layer_parameters(config, x.shape[2])
    for name, expected in declared.items():
        if name not in parameters:
            raise ValueError(f"parameters: {name} is missing: expected {', '.join(declared)}")
        if parameters[name].shape != expected.shape:
            shape = parameters[name].shape
            raise ValueError(f"{name}: shape {shape}: expected {expected.shape} for x: {describe(x)} and {config}")
    # Others may be there, too: of low-rank adapters, for example.
    weights = {name: parameters[name].astype(dtype) for name in declared}
    if any(config.mesh_axes.values()):
        split = {"heads": config.head_axes or None, "kv_heads": config.head_axes or None}
        weights = {
            name: place(value, PartitionSpec(*(split.get(axis) for axis in declared[name].axes)))
            for name, value in weights.items()
        }
    return x.astype(dtype), weights


def _segments_and_positions(
    x: Array, segment_ids: Array | None, config: HeadConfig
) -> tuple[Int[Array, "B T"] | None, Int[Array, "B T"]]:
    """The segment ids, checked, and the position of each token in its segment."""
    B, T, _ = x.shape
    segment_ids = None if segment_ids is None else checked_segment_ids(segment_ids, B, T)
    axes = {"batch_axes": config.batch_axes, "context_axes": config.context_axes}
    return segment_ids, token_positions((B, T), segment_ids, **axes)


def _project_normed(
    x: Float[Array, "B T E"], weights: Mapping[str, Array], name: str, config: HeadConfig
) -> Float[Array, "B T H Dk"]:
    """Queries or keys, and with `qk_norm` their RMSNorm over the head's dimensions, with the statistics in float32."""
    heads = _project(x, weights, name)
    if not config.qk_norm:
        return heads
    wide = heads.astype(wide_dtype(heads.dtype))
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    scale = weights[f"{name}_norm_scale"].astype(wide.dtype)[None, None, None, :]
    return (wide * jax.lax.rsqrt(mean_square + NORM_EPSILON) * scale).astype(heads.dtype)


def _project(x: Float[Array, "B T E"], weights: Mapping[str, Array], name: str) -> Float[Array, "B T H D"]:
    heads = jnp.einsum("bte,ehd->bthd", x, weights[f"{name}_kernel"])
    return add_bias(heads, weights[f"{name}_bias"]) if f"{name}_bias" in weights else heads


def join_heads(o: Float[Array, "B T H D"], kernel: Float[Array, "H D E"]) -> Float[Array, "B T E"]:
    """The output projection of a layer."""
    return jnp.einsum("bthd,hde->bte", o, kernel)


def gates(x: Float[Array, "B T E"], weights: Mapping[str, Array]) -> Float[Array, "B T H 3"]:
    """g = sigmoid(MLP(x)) in the order (compressed, selected, window), in float32 at least."""
    hidden = add_bias(jnp.einsum("bte,ef->btf", x, weights["gate_in_kernel"]), weights["gate_in_bias"])
    hidden = jax.nn.silu(hidden)
    logits = add_bias(jnp.einsum("btf,fhc->bthc", hidden, weights["gate_out_kernel"]), weights["gate_out_bias"])
    return jax.nn.sigmoid(logits.astype(wide_dtype(x.dtype)))
