"""The attention layers as plain functions of their parameters. The Linen and the NNX modules both wrap these.

A layer is projections around an attention: `nsa_jax.core` of Native Sparse Attention, or a dense one. A frozen config
describes it. `layer_parameters(config, embed_dim)` lists its parameters by name, each with its shape, initialiser and
logical axes. `*_layer(parameters, x, ...)` computes it.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
from flax.linen import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from nsa_jax import arguments
from nsa_jax.attention import AttentionInputs, BranchKV, checked_segment_ids
from nsa_jax.compression import add_bias
from nsa_jax.core import (
    BRANCHES,
    Axes,
    Branches,
    CoreConfig,
    Function,
    HeadConfig,
    Parameter,
    Products,
    check_parameters,
    checked_input,
    computed_with,
    core_attention,
    core_attention_inputs,
    core_parameters,
    multiply,
    on_mesh,
    products,
    segments_and_positions,
)
from nsa_jax.dense import causal_attention
from nsa_jax.explicit import split_like, split_of
from nsa_jax.foreign import rope_scaling_here
from nsa_jax.one_row import multiply_rows, rms_norm
from nsa_jax.precision import wide_dtype
from nsa_jax.rope import RopeScaling, apply_rope, rotation_of
from nsa_jax.sharding import free_axes, sharded
from pallas_kernels.append_tokens.contract import Heads
from pallas_kernels.one_row_product.contract import Norm

NORM_EPSILON = 1e-6  # added to the mean square in the norm of queries and keys
# Of `join_projections`: the parameter that stands for all that take x, and the output projection.
JOINED, OUTPUT = "joined_weight", "o_weight"


@dataclasses.dataclass(frozen=True)
class LayerConfig(HeadConfig):
    """Projections, their norms and the rotary embedding: all that a full-attention layer has.

    Raises:
      ValueError: the head counts or sizes do not fit together, or a field has another type.
    """

    rope_theta: float | None = 10_000.0  # base of the rotary embedding; None: no positions. Unused with `rotate`
    rope_scaling: RopeScaling = RopeScaling()  # for contexts longer than those trained on
    qk_norm: bool = False  # RMSNorm of every query and key head before the rotary embedding (arXiv 2302.05442)
    use_bias: bool = False  # in all projections
    qkv_bias: bool = False  # in those of queries, keys and values, as Qwen 2 has them
    kernel_init: Callable | None = None  # of projections, as [inputs, outputs]; None: lecun_normal
    output_init_scale: float = 1.0  # factor on the initial output projection

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("output_init_scale", arguments.real("output_init_scale", self.output_init_scale))
        if self.rope_theta is not None:
            self._set("rope_theta", arguments.real("rope_theta", self.rope_theta))
        if not isinstance(self.rope_scaling, RopeScaling):
            if isinstance(self.rope_scaling, Mapping):
                fields = dict(self.rope_scaling)  # Flax has made another kind of mapping of it
                raise ValueError(f"rope_scaling = {fields}: expected {rope_scaling_here(fields)}")
            raise ValueError(f"rope_scaling = {self.rope_scaling!r}: expected an nsa_jax.RopeScaling")
        if self.kernel_init is not None and not callable(self.kernel_init):
            raise ValueError(f"kernel_init = {self.kernel_init!r}: expected an initialiser, as of flax.linen")
        if self.rotate is None and self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}: rotary position embedding needs an even head size")

    @property
    def rotates_itself(self) -> bool:
        """Whether queries and keys are rotated by the layer's own embedding, and not by `rotate` or not at all."""
        return self.rotate is None and self.rope_theta is not None

    def rotated(self, x: Float[Array, "B T H D"], positions: Int[Array, "B T"]) -> Float[Array, "B T H D"]:
        """Queries or keys, rotated at their positions by `rotate`, or by the layer's own embedding, if it has one."""
        if self.rotate is not None or self.rope_theta is None:
            return super().rotated(x, positions)
        return apply_rope(x, positions, self.rope_theta, self.rope_scaling)

    def rotation(
        self, positions: Int[Array, "B T"], dtype: DTypeLike
    ) -> tuple[Float[Array, "B T Dk/2"], Float[Array, "B T Dk/2"]]:
        """cos and sin by which a layer that `rotates_itself` rotates heads of a dtype."""
        assert self.rope_theta is not None
        return rotation_of(positions, self.head_dim, self.rope_theta, self.rope_scaling, wide_dtype(dtype))


@dataclasses.dataclass(frozen=True)
class NSALayerConfig(LayerConfig, CoreConfig):
    """A Native Sparse Attention layer."""

    share_kv: bool = True  # one key/value projection for all three branches; in the paper each has its own


def projection_parameters(config: LayerConfig, embed_dim: int, branches: tuple[str, ...]) -> dict[str, Parameter]:
    """The query and output projections, and a key and a value projection for each branch."""
    H, K, Dk, Dv = config.num_heads, config.num_kv_heads, config.head_dim, config.value_dim
    norm = Parameter((Dk,), initializers.ones_init(), ("head_dim",))

    def projection(name: str, heads: int, size: int, axis: str) -> dict[str, Parameter]:
        init, zeros = _flat_init(config, num_inputs=1), initializers.zeros_init()
        declared = {f"{name}_kernel": Parameter((embed_dim, heads, size), init, ("embed", axis, "head_dim"))}
        if config.use_bias or config.qkv_bias:
            declared[f"{name}_bias"] = Parameter((heads, size), zeros, (axis, "head_dim"))
        return declared

    parameters = projection("q", H, Dk, "heads")
    join = _flat_init(config, num_inputs=2, factor=config.output_init_scale)
    parameters["o_kernel"] = Parameter((H, Dv, embed_dim), join, ("heads", "head_dim", "embed"))
    if config.use_bias:
        parameters["o_bias"] = Parameter((embed_dim,), initializers.zeros_init(), ("embed",))
    if config.qk_norm:
        parameters["q_norm_scale"] = norm
    for branch in branches:
        prefix = f"{branch}_" if branch else ""
        parameters |= projection(f"{prefix}k", K, Dk, "kv_heads") | projection(f"{prefix}v", K, Dv, "kv_heads")
        if config.qk_norm:
            parameters[f"{prefix}k_norm_scale"] = norm
    return parameters


def _flat_init(config: LayerConfig, *, num_inputs: int, factor: float = 1.0) -> Callable:
    """An initialiser of a kernel whose first dimensions are inputs, which `kernel_init` sees as a matrix."""
    init = config.kernel_init or initializers.lecun_normal()

    def call(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        matrix = math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:])
        return init(key, matrix, dtype).reshape(shape) * jnp.asarray(factor, dtype)

    return call


def nsa_parameters(config: NSALayerConfig, embed_dim: int) -> dict[str, Parameter]:
    """Every parameter of a Native Sparse Attention layer, by name."""
    parameters = projection_parameters(config, embed_dim, ("",) if config.share_kv else BRANCHES)
    if config.tie_keys:
        for name in ("cmp_k_kernel", "cmp_k_bias", "cmp_k_norm_scale"):
            parameters.pop(name, None)
    return parameters | core_parameters(config, embed_dim)


def layer_parameters(config: LayerConfig, embed_dim: int) -> dict[str, Parameter]:
    """Every parameter of a layer of either kind, by name."""
    if isinstance(config, NSALayerConfig):
        return nsa_parameters(config, embed_dim)
    return projection_parameters(config, embed_dim, ("",))


def declared_in(parameters: Collection[str], config: LayerConfig, embed_dim: int) -> dict[str, Parameter]:
    """Every parameter of a layer, by name: joined as `join_projections` does, if `parameters` have them so."""
    declared = layer_parameters(config, embed_dim)
    if JOINED not in parameters:
        return declared
    parts, output = _taking_x(declared), declared["o_kernel"]
    width = sum(math.prod(part.shape[1:]) for part in parts.values())
    init = initializers.zeros_init()  # nobody begins with joined parameters
    joined = {
        JOINED: Parameter((width, embed_dim), init, ("joined", "embed")),
        OUTPUT: Parameter((embed_dim, *output.shape[:2]), init, ("embed", *output.axes[:2])),
    }
    return joined | {name: declared[name] for name in declared if name not in parts and name != "o_kernel"}


def _taking_x(declared: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The parameters that are multiplied with x."""
    return {name: each for name, each in declared.items() if each.axes[0] == "embed" and len(each.shape) > 1}


def join_projections(parameters: Mapping[str, Array], config: LayerConfig) -> dict[str, Array]:
    """Parameters with which a layer multiplies its input once, for decoding.

    A decoding step multiplies a few rows of x with every parameter, and is bound by reading these. One product reads
    them faster than one product each for queries, keys, values and gates. Both arrays are transposed: what makes one
    number of a result lies together.

    Example:
      >>> config = LayerConfig(num_heads=8, num_kv_heads=2, head_dim=16)
      >>> shapes = {name: p.shape for name, p in layer_parameters(config, 64).items()}
      >>> joined = join_projections({name: jnp.zeros(shape) for name, shape in shapes.items()}, config)
      >>> {name: x.shape for name, x in joined.items()}
      {'joined_weight': (192, 64), 'o_weight': (64, 8, 16)}

    Args:
      parameters: of a layer, by name, of one dtype.
      config: of the layer.

    Returns:
      The same parameters, with "joined_weight" [F, E] in place of those that take x, and "o_weight" [E, H, Dv] in place
      of "o_kernel". Prefill and decoding steps of the layer, and of its Linen module, take these as well, with the same
      results up to rounding. On a mesh, every device has all heads of "joined_weight".

    Raises:
      ValueError: a parameter is missing or has another shape.
    """
    embed_dim = jnp.shape(parameters["o_kernel"])[-1] if "o_kernel" in parameters else 1  # its absence is said below
    declared = layer_parameters(config, embed_dim)
    check_parameters(parameters, declared, f"{config}")
    parts = {name: parameters[name].reshape(embed_dim, -1).T for name in _taking_x(declared)}
    return {JOINED: jnp.concatenate(list(parts.values())), OUTPUT: jnp.moveaxis(parameters["o_kernel"], -1, 0)} | {
        name: parameters[name] for name in declared if name not in parts and name != "o_kernel"
    }


@dataclasses.dataclass(frozen=True)
class JoinedProducts:
    """The products of x with the parameters that take it, from one product."""

    array: Float[Array, "B T F"]
    columns: Mapping[str, int]  # where each begins
    shapes: Mapping[str, tuple[int, ...]]

    def __call__(self, name: str) -> Array:
        """The product with one parameter."""
        begin, shape = self.columns[name], self.shapes[name]
        part = self.array[:, :, begin : begin + math.prod(shape)]
        return part.reshape(*part.shape[:2], *shape)

    def heads(self, name: str) -> Heads:
        """The same where it is, for kernels that read it there."""
        return Heads(self.array, self.columns[name])


def layer_products(
    x: Float[Array, "B T E"],
    weights: Mapping[str, Array],
    config: LayerConfig,
    *,
    norm: Norm | None = None,
    counted: Bool[Array, "B T"] | None = None,
) -> Products | JoinedProducts:
    """The products of x with the parameters that take it: one of all, if the parameters are joined.

    With a norm, it is normalised before them. Tokens that are not `counted` are taken for zeros, whatever they hold.
    """
    if JOINED not in weights:
        x = x if norm is None else rms_norm(x, norm)
        return products(x if counted is None else jnp.where(counted[:, :, None], x, 0), weights, config)
    shapes = {name: each.shape[1:] for name, each in _taking_x(layer_parameters(config, x.shape[2])).items()}
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes.values()))
    columns = dict(zip(shapes, [0, *ends[:-1]], strict=True))
    product = multiply_rows(x, weights[JOINED], norm=norm, counted=counted, precision=config.precision)
    return JoinedProducts(product, columns, shapes)


def _axes_of_projections(given: Mapping[str, Any]) -> Axes:
    """The mesh axes that split the rows of x, and those that split the heads of the key projections."""
    kernels = (value for name, value in given["parameters"].items() if name.endswith("k_kernel"))
    heads = {split_of(kernel, 1)[0] for kernel in kernels}
    return split_of(given["x"], 0)[0], heads.pop() if len(heads) == 1 else None


def layer_on_mesh(results: Callable[[Mapping[str, Any]], Any]) -> Callable[[Function], Function]:
    """`nsa_jax.core.on_mesh` for a layer f(parameters, x, ..., config=...)."""
    return on_mesh(results, _axes_of_projections)


@layer_on_mesh(lambda given: split_like(given["x"]))
def nsa_layer(
    parameters: Mapping[str, Array],
    x: Float[Array, "B T E"],
    *,
    config: NSALayerConfig,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T E"]:
    """Projections, `nsa_jax.core.core_attention` and the output projection (paper, section 3)."""
    x, weights = layer_inputs(x, parameters, config)
    q, k, v = project_branches(layer_products(x, weights, config), weights, config)
    o = core_attention(weights, x, q, k, v, config=config, positions=positions, segment_ids=segment_ids)
    return join_heads(o, weights, config)


def nsa_layer_inputs(
    parameters: Mapping[str, Array],
    x: Float[Array, "B T E"],
    *,
    config: NSALayerConfig,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> AttentionInputs:
    """The arguments that a layer gives to `nsa_attention`. For its own arguments, see `nsa_layer`."""
    arrays = _attention_arrays(parameters, x, config=config, positions=positions, segment_ids=segment_ids)
    ids = None if segment_ids is None else checked_segment_ids(segment_ids, *arrays[0].shape[:2])
    return AttentionInputs(*arrays, ids)


def _rows_and_heads(given: Mapping[str, Any]) -> PartitionSpec:
    """Rows as those of x, heads as `head_axes` say."""
    return PartitionSpec(*split_of(given["x"], 0), None, free_axes(given["config"].head_axes) or None)


@layer_on_mesh(_rows_and_heads)
def _attention_arrays(
    parameters: Mapping[str, Array],
    x: Array,
    *,
    config: NSALayerConfig,
    positions: Array | None,
    segment_ids: Array | None,
) -> tuple[Float[Array, "B T H Dk"], BranchKV, Float[Array, "B T H 3"]]:
    """Queries, keys and values, and gates."""
    x, weights = layer_inputs(x, parameters, config)
    q, k, v = project_branches(layer_products(x, weights, config), weights, config)
    options: dict[str, Any] = {"positions": positions, "segment_ids": segment_ids}
    inputs = core_attention_inputs(weights, x, q, k, v, config=config, **options)
    return inputs.q, inputs.kv, inputs.gates


def project_branches(
    product: Products, weights: Mapping[str, Array], config: NSALayerConfig
) -> tuple[Float[Array, "B T H Dk"], Array | Branches, Array | Branches]:
    """Queries, keys and values, normed and not rotated, as `nsa_jax.core.core_attention` takes them."""
    project = functools.partial(_project, product, weights, config=config)
    q = project("q")
    if config.share_kv:  # projected once, so that gradients are added up before they go through the projection
        return q, project("k"), project("v")
    slc_k, win_k = project("slc_k"), project("win_k")
    cmp_k = slc_k if config.tie_keys else project("cmp_k")
    return q, Branches(cmp_k, slc_k, win_k), Branches(*(project(f"{branch}_v") for branch in BRANCHES))


@layer_on_mesh(lambda given: split_like(given["x"]))
def full_layer(
    parameters: Mapping[str, Array],
    x: Float[Array, "B T E"],
    *,
    config: LayerConfig,
    window: int | None = None,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T E"]:
    """The dense baseline: causal grouped-query attention (`nsa_jax.dense.causal_attention`) between projections.

    With `window`, a query sees the last `window` positions, its own included.
    """
    x, weights = layer_inputs(x, parameters, config)
    segment_ids, positions = segments_and_positions(x, segment_ids, positions, config)
    q, k, v = project_dense(layer_products(x, weights, config), weights, positions, config)
    attention = sharded(causal_attention, **config.mesh_axes)
    o = attention(q, k, v, window=window, segment_ids=segment_ids, scale=config.scale)
    return join_heads(o, weights, config)


def project_dense(
    product: Products, weights: Mapping[str, Array], positions: Int[Array, "B T"], config: LayerConfig
) -> tuple[Float[Array, "B T H Dk"], Float[Array, "B T K Dk"], Float[Array, "B T K Dv"]]:
    """Rotated queries and keys, and values."""
    q, k, v = (_project(product, weights, name, config=config) for name in ("q", "k", "v"))
    return config.rotated(q, positions), config.rotated(k, positions), v


def layer_inputs(
    x: Float[Array, "B T E"], parameters: Mapping[str, Array], config: LayerConfig
) -> tuple[Array, dict[str, Array]]:
    """Input and declared parameters in the dtype of the computation, after checking both; see `computed_with`."""
    x = checked_input(x)
    dtype = x.dtype if config.dtype is None else config.dtype
    declared = declared_in(parameters, config, x.shape[2])
    return x.astype(dtype), computed_with(parameters, declared, dtype, config, x)


def _project(
    product: Products, weights: Mapping[str, Array], name: str, *, config: LayerConfig
) -> Float[Array, "B T H D"]:
    """Queries, keys or values. With `qk_norm`, queries and keys get their RMSNorm, with the statistics in float32."""
    heads = product(f"{name}_kernel")
    if config.use_bias or config.qkv_bias:
        heads = add_bias(heads, weights[f"{name}_bias"])
    if not config.qk_norm or name.endswith("v"):
        return heads
    return rms_norm(heads, Norm(weights[f"{name}_norm_scale"], NORM_EPSILON))


def join_heads(
    o: Float[Array, "B T H D"],
    weights: Mapping[str, Array],
    config: LayerConfig,
    residual: Float[Array, "B T E"] | None = None,
) -> Float[Array, "B T E"]:
    """The output projection of a layer, added to a residual stream if there is one."""
    if OUTPUT in weights and not config.use_bias:
        return multiply_rows(o, weights[OUTPUT], residual=residual, precision=config.precision)
    kernel = jnp.moveaxis(weights[OUTPUT], 0, -1) if OUTPUT in weights else weights["o_kernel"]
    y = multiply(o, kernel, config, over=2)
    y = add_bias(y, weights["o_bias"]) if config.use_bias else y
    return y if residual is None else residual + y
