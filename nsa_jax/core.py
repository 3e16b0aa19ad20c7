"""The part of a Native Sparse Attention layer below its projections, as plain functions of its parameters.

A caller projects queries, keys and values. The core owns phi and the gates, rotates if it is told how, and attends.
`NSACore` of Linen and of NNX wrap these functions, and the layers of `nsa_jax.layer` are projections around them.
`nsa_jax.decoding` has the same over a cache.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from flax.linen import initializers
from flax.typing import PrecisionLike
from jax.export import is_symbolic_dim
from jax.sharding import PartitionSpec
from jaxtyping import Array, DTypeLike, Float, Int

from nsa_jax import arguments
from nsa_jax.arguments import describe
from nsa_jax.attention import AttentionInputs, BranchKV, Implementation, checked_segment_ids, nsa_attention
from nsa_jax.compression import COMPRESSIONS, Compression, compress, phi_shapes
from nsa_jax.config import NSAConfig, check_config
from nsa_jax.explicit import on_auto_axes, split_of
from nsa_jax.gating import open_gates
from nsa_jax.precision import wide_dtype
from nsa_jax.sharding import MeshAxes, check_mesh_axes, devices_along, free_axes, place, sharded, token_positions

BRANCHES = ("cmp", "slc", "win")

# rotate(queries or keys [B, T, heads, Dk], positions [B, T]) is the same, rotated
Rotate = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter: its shape, initialiser and logical axis names."""

    shape: tuple[int, ...]
    init: Callable
    axes: tuple[str, ...]


class Branches(NamedTuple):
    """Keys or values of the tokens, for each branch its own (paper, section 3.3.3)."""

    cmp: Float[Array, "B T K D"]  # what phi compresses
    slc: Float[Array, "B T K D"]
    win: Float[Array, "B T K D"]


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Heads of an attention layer, how they are rotated and scored, and how they are split over a mesh.

    Raises:
      ValueError: the head counts or sizes do not fit together, or a field has another type.
    """

    num_heads: int  # H, query heads
    num_kv_heads: int  # K, key/value heads; divides H
    head_dim: int  # Dk
    v_head_dim: int | None = None  # Dv; None: Dk
    rotate: Rotate | None = None  # rotate(x [B, T, heads, Dk], positions [B, T]), one's own rotary embedding
    scale: float | None = None  # factor of the scores; None: Dk ** -0.5
    precision: PrecisionLike = None  # of matrix products with parameters; the attention has that of its implementation
    dtype: DTypeLike | None = None  # of the computation; None: the input's dtype
    batch_axes: MeshAxes = ()  # mesh axes that split B; see `nsa_jax.sharding.sharded`
    head_axes: MeshAxes = ()  # mesh axes that split the K/V heads
    context_axes: MeshAxes = ()  # mesh axes that split T, which is then in the order of `nsa_jax.context.zigzag_order`

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            self._set(name, arguments.size(name, getattr(self, name)))
        self._set("v_head_dim", arguments.optional_size("v_head_dim", self.v_head_dim))
        if self.rotate is not None and not callable(self.rotate):
            raise ValueError(f"rotate = {self.rotate!r}: expected a function of an array and its positions")
        if self.scale is not None:
            self._set("scale", arguments.real("scale", self.scale))
        arguments.check_precision("precision", self.precision)
        if self.dtype is not None:
            self._set("dtype", arguments.float_dtype("dtype", self.dtype))
        for name, axes in self.mesh_axes.items():
            check_mesh_axes(name, axes)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads = {self.num_kv_heads}: expected a divisor of num_heads = {self.num_heads}")

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

    def rotated(self, x: Float[Array, "B T H D"], positions: Int[Array, "B T"]) -> Float[Array, "B T H D"]:
        """Queries or keys, rotated at their positions, in the dtype that they have.

        Raises:
          ValueError: `rotate` returns another shape.
        """
        if self.rotate is None:
            return x
        rotated = self.rotate(x, positions)
        if jnp.shape(rotated) != x.shape:
            raise ValueError(f"rotate: {describe(x)} becomes {describe(rotated)}: expected the same shape")
        return rotated.astype(x.dtype)  # tables of sines are often float32


@dataclasses.dataclass(frozen=True)
class CoreConfig(HeadConfig):
    """Native Sparse Attention below the projections: the fields of `nsa_jax.NSACore`."""

    config: NSAConfig = NSAConfig()  # sizes of the branches
    compression: Compression = "mean"  # phi; the paper's is "mlp"
    compression_hidden_dim: int | None = None  # F, the hidden width of an mlp phi; None: twice the head size
    gate_hidden_dim: int | None = None  # hidden width of the gate MLP; None: a quarter of the embedding
    constant_gates: tuple[float, float, float] | None = None  # of the three branches; None: an MLP of x
    tie_keys: bool = False  # compressed keys are means of the selected branch's keys; phi is for values alone
    implementation: Implementation | None = None  # of the attention

    def __post_init__(self) -> None:
        super().__post_init__()
        check_config(self.config)
        for name in ("compression_hidden_dim", "gate_hidden_dim"):
            self._set(name, arguments.optional_size(name, getattr(self, name)))
        if self.compression not in COMPRESSIONS:
            raise ValueError(f"compression = {self.compression!r}: expected one of {', '.join(COMPRESSIONS)}")
        if self.constant_gates is not None:
            given = self.constant_gates
            if not isinstance(given, tuple | list) or len(given) != 3:
                raise ValueError(
                    f"constant_gates = {given!r}: expected three numbers, or None for gates that are learnt"
                )
            self._set("constant_gates", tuple(arguments.real("constant_gates", gate) for gate in given))

    @property
    def pools_rotated_keys(self) -> bool:
        """Whether phi compresses keys that are rotated already.

        Means are of rotated keys: a query's score for a block is then the mean of its scores for the block's keys. A
        phi with weights sees keys that are not rotated, so that it does not depend on where a block lies, and its
        result is rotated at the position of the block's first token.
        """
        return compression_of(self, "phi_k") == "mean"


def core_parameters(config: CoreConfig, embed_dim: int) -> dict[str, Parameter]:
    """The parameters of phi and of the gates, by name."""
    parameters: dict[str, Parameter] = {}
    for name, size in (("phi_k", config.head_dim), ("phi_v", config.value_dim)):
        parameters |= _phi_parameters(name, size, config)
    if config.constant_gates is not None:
        return parameters
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


def _phi_parameters(name: str, size: int, config: CoreConfig) -> dict[str, Parameter]:
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


def compression_of(config: CoreConfig, name: str) -> Compression:
    """The method of "phi_k" or "phi_v": tied keys are means, whatever makes the values."""
    return "mean" if config.tie_keys and name == "phi_k" else config.compression


Function = TypeVar("Function", bound=Callable[..., Any])
Axes = tuple[Any, Any]  # the mesh axes that split rows, and those that split K/V heads


def on_mesh(
    results: Callable[[Mapping[str, Any]], Any], axes_of: Callable[[Mapping[str, Any]], Axes]
) -> Callable[[Function], Function]:
    """A decorator for a function f(..., config=...) that makes it run on meshes with Explicit axes.

    If the config names no mesh axes there, `axes_of(arguments by name)` reads them from the types of the arrays:
    `batch_axes` and `head_axes`. For `results`, see `on_auto_axes`.
    """

    def decorate(function: Function) -> Function:
        run, signature = on_auto_axes(results)(function), inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, config: HeadConfig, **options: Any) -> Any:
            if not any(config.mesh_axes.values()):
                batch, heads = axes_of(signature.bind(*args, config=config, **options).arguments)
                config = dataclasses.replace(config, batch_axes=batch or (), head_axes=heads or ())
            return run(*args, config=config, **options)

        return cast(Function, call)

    return decorate


def _axes_of_heads(given: Mapping[str, Any]) -> Axes:
    """The mesh axes that split the rows of q and the heads of k, by their types."""
    k = given["k"].slc if isinstance(given["k"], Branches) else given["k"]
    return split_of(given["q"], 0)[0], split_of(k, 2)[0]


def core_on_mesh(results: Callable[[Mapping[str, Any]], Any]) -> Callable[[Function], Function]:
    """`on_mesh` for a function of x, q, k and v."""
    return on_mesh(results, _axes_of_heads)


@core_on_mesh(lambda given: split_of(given["q"], 0, 1, 2))
def core_attention(
    parameters: Mapping[str, Array],
    x: Float[Array, "B T E"] | None,
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T K Dk"] | Branches,
    v: Float[Array, "B T K Dv"] | Branches,
    *,
    config: CoreConfig,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H Dv"]:
    """phi, rotary embedding, gates and attention (paper, section 3), between somebody's own projections.

    Args:
      parameters: those of `core_parameters`, by name; others are left alone.
      x: [B, T, E], of which the gates are made; None with `constant_gates`.
      q, k, v: queries, keys and values, projected and normed, but not rotated, if the config has `rotate`. Without it,
        they are taken as they are. `k` and `v` serve all branches, or each its own as `Branches`.
      config: of the core.
      positions: integers [B, T] at which queries and keys are rotated. None: they count from the start of each segment.
      segment_ids: integers [B, T]; a run of equal ids is a segment.

    Returns:
      [B, T, H, Dv] in the dtype of the computation: the config's, or that of q.

    Raises:
      ValueError: an argument does not fit, named with what was expected.
    """
    inputs = core_attention_inputs(parameters, x, q, k, v, config=config, positions=positions, segment_ids=segment_ids)
    return attend(inputs, config)


def attend(inputs: AttentionInputs, config: CoreConfig) -> Float[Array, "B T H Dv"]:
    """`nsa_attention` of what the core gives to it, with the core's scale, implementation and mesh axes."""
    attention = sharded(nsa_attention, **config.mesh_axes)
    options: dict[str, Any] = {"scale": config.scale, "implementation": config.implementation}
    return attention(*inputs[:3], config=config.config, segment_ids=inputs.segment_ids, **options)


def core_attention_inputs(
    parameters: Mapping[str, Array],
    x: Float[Array, "B T E"] | None,
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T K Dk"] | Branches,
    v: Float[Array, "B T K Dv"] | Branches,
    *,
    config: CoreConfig,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> AttentionInputs:
    """The arguments that the core gives to `nsa_attention`. For its own arguments, see `core_attention`."""
    arrays = _attention_arrays(parameters, x, q, k, v, config=config, positions=positions, segment_ids=segment_ids)
    ids = None if segment_ids is None else checked_segment_ids(segment_ids, *arrays[0].shape[:2])
    return AttentionInputs(*arrays, ids)


@core_on_mesh(lambda given: PartitionSpec(*split_of(given["q"], 0), None, free_axes(given["config"].head_axes) or None))
def _attention_arrays(
    parameters: Mapping[str, Array],
    x: Array | None,
    q: Array,
    k: Array | Branches,
    v: Array | Branches,
    *,
    config: CoreConfig,
    positions: Array | None,
    segment_ids: Array | None,
) -> tuple[Float[Array, "B T H Dk"], BranchKV, Float[Array, "B T H 3"]]:
    """Queries, keys and values, and gates: rows split as those of q, heads as `head_axes` say."""
    x, q, k, v, weights = core_inputs(x, q, k, v, parameters, config)
    _, positions = segments_and_positions(q, segment_ids, positions, config)
    q, kv = rotated_branches(q, k, v, positions, config)
    cmp_k, cmp_v = compressed_tokens(weights, kv.cmp_k, kv.cmp_v, positions, config)
    return q, kv._replace(cmp_k=cmp_k, cmp_v=cmp_v), gates(products(x, weights, config), weights, q, config)


def rotated_branches(
    q: Float[Array, "B T H Dk"], k: Branches, v: Branches, positions: Int[Array, "B T"], config: CoreConfig
) -> tuple[Float[Array, "B T H Dk"], BranchKV]:
    """Rotated queries, and keys and values of the branches. `cmp_*` are one per token still: what phi compresses."""
    rotated = {id(array): config.rotated(array, positions) for array in k}  # once for an array that branches share
    cmp_k = rotated[id(k.cmp)] if config.pools_rotated_keys else k.cmp
    q = config.rotated(q, positions)
    return q, BranchKV(cmp_k, v.cmp, rotated[id(k.slc)], v.slc, rotated[id(k.win)], v.win)


def compressed_tokens(
    weights: Mapping[str, Array],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    positions: Int[Array, "B T"],
    config: CoreConfig,
) -> tuple[Float[Array, "B Nc K Dk"], Float[Array, "B Nc K Dv"]]:
    """Compressed keys, rotated, and compressed values. Keys are rotated if `pools_rotated_keys`; all have positions."""
    # Only a split over tokens is done by hand. XLA's partitioner splits phi over rows and heads by itself.
    phi_of = sharded(compress, **config.mesh_axes) if devices_along(config.context_axes) > 1 else compress

    def phi(name: str, array: Array) -> Array:
        method = compression_of(config, name)
        parameters = {key: weights[f"{name}_{key}"] for key in phi_shapes(method, 1, 1, config.config)}
        return phi_of(array, parameters, config=config.config, method=method, precision=config.precision)

    cmp_k, cmp_v = phi("phi_k", k), phi("phi_v", v)
    if config.pools_rotated_keys:
        return cmp_k, cmp_v
    (B, T), d = positions.shape, config.config.compress_stride
    # Cut into strides instead of slicing with a step, so that a sequence split over devices stays where it is.
    first = positions[:, : T // d * d].reshape(B, T // d, d)[:, :, 0]
    return config.rotated(cmp_k, first[:, : cmp_k.shape[1]]), cmp_v


Products = Callable[[str], Array]  # the products of x with the parameters that take it, by the names of these


def products(x: Float[Array, "B T E"] | None, weights: Mapping[str, Array], config: HeadConfig) -> Products:
    """The product of x with a parameter, made when it is asked for."""
    return lambda name: multiply(cast(Array, x), weights[name], config)


def gates(
    product: Products, weights: Mapping[str, Array], q: Array | jax.ShapeDtypeStruct, config: CoreConfig
) -> Float[Array, "B T H 3"]:
    """g = sigmoid(MLP(x)) in the order (compressed, selected, window), in float32 at least, or the constant gates.

    Of the queries, which are [B, T, H, Dk], this needs shape and dtype.
    """
    if config.constant_gates is not None:
        constant = jnp.asarray(config.constant_gates, wide_dtype(q.dtype))
        return jnp.broadcast_to(constant[None, None, None, :], (*q.shape[:3], 3))
    in_bias, out_kernel, out_bias = (weights[f"gate_{name}"] for name in ("in_bias", "out_kernel", "out_bias"))
    return open_gates(product("gate_in_kernel"), in_bias, out_kernel, out_bias, precision=config.precision)


def multiply(x: Array, kernel: Array, config: HeadConfig, *, over: int = 1) -> Array:
    """The last `over` dimensions of x times the first of a parameter, in one operation with the parameter as it is.

    Libraries that adapt or quantise parameters, such as qwix, know a parameter by this operation. They take every
    `jnp.einsum` for one of a model's own, so products of the attention are einsums, and those of parameters are not.
    """
    dimensions = (tuple(range(x.ndim - over, x.ndim)), tuple(range(over)))
    return jax.lax.dot_general(x, kernel, (dimensions, ((), ())), precision=config.precision).astype(x.dtype)


def core_inputs(
    x: Any, q: Any, k: Any, v: Any, parameters: Mapping[str, Array], config: CoreConfig
) -> tuple[Array | None, Array, Branches, Branches, dict[str, Array]]:
    """x, queries, keys and values of the branches, and parameters in the dtype of the computation, all checked."""
    q = _heads_array("q", q, (None, None, config.num_heads, config.head_dim))
    dtype = q.dtype if config.dtype is None else config.dtype
    shape = (*q.shape[:2], config.num_kv_heads)
    k = _branches("k", k, (*shape, config.head_dim), dtype)
    v = _branches("v", v, (*shape, config.value_dim), dtype)
    if config.constant_gates is None:
        x = checked_input(x)
        if x.shape[:2] != q.shape[:2]:
            raise ValueError(f"x: {describe(x)}: expected batch and tokens {q.shape[:2]}, as q: {describe(q)}")
        x = x.astype(dtype)
    else:
        x = None
    declared = core_parameters(config, 0 if x is None else x.shape[2])
    return x, q.astype(dtype), k, v, computed_with(parameters, declared, dtype, config, x)


def _branches(name: str, given: Any, shape: tuple[int, ...], dtype: DTypeLike) -> Branches:
    """Keys or values of each branch in a dtype; an array that all of them share stays one array."""
    if not isinstance(given, Branches):
        return Branches(*[_heads_array(name, given, shape).astype(dtype)] * 3)
    named = zip(given._fields, given, strict=True)
    return Branches(*(_heads_array(f"{name}.{field}", array, shape).astype(dtype) for field, array in named))


def _heads_array(name: str, value: Any, shape: tuple[int | None, ...]) -> Array:
    """An array [batch, tokens, heads, head size]; None in `shape` stands for any size of at least 1."""
    x = arguments.array(name, value)
    fits = x.ndim == 4 and all(size is None or size == given for size, given in zip(shape, x.shape, strict=True))
    if not fits or not jnp.issubdtype(x.dtype, jnp.floating):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name}: {describe(x)}: expected a float array [batch, tokens, heads, head size] of shape ({wanted})"
        )
    if not is_symbolic_dim(x.shape[1]) and x.shape[1] < 1:
        raise ValueError(f"{name}: {describe(x)}: expected at least one token")
    return x


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


def computed_with(
    parameters: Mapping[str, Array],
    declared: Mapping[str, Parameter],
    dtype: DTypeLike,
    config: HeadConfig,
    x: Array | None,
) -> dict[str, Array]:
    """The declared parameters, in the dtype of the computation, after checking their shapes.

    On a mesh whose axes the layer knows, parameters stay split only along the heads that `head_axes` split. Along other
    axes, such as the embedding in fully sharded data parallelism, they are gathered.
    """
    check_parameters(parameters, declared, f"{config}" if x is None else f"x: {describe(x)} and {config}")
    # Others may be there, too: of low-rank adapters, for example.
    weights = {name: _in_dtype(parameters[name], dtype) for name in declared}
    if any(config.mesh_axes.values()):
        split = {"heads": config.head_axes or None, "kv_heads": config.head_axes or None}
        weights = {
            name: place(value, PartitionSpec(*(split.get(axis) for axis in declared[name].axes)))
            for name, value in weights.items()
        }
    return weights


def check_parameters(parameters: Mapping[str, Array], declared: Mapping[str, Parameter], of: str) -> None:
    """Raises ValueError where a parameter is missing or has another shape; `of` says what they are declared for."""
    for name, expected in declared.items():
        if name not in parameters:
            raise ValueError(f"parameters: {name} is missing: expected {', '.join(declared)}")
        if parameters[name].shape != expected.shape:
            raise ValueError(f"{name}: shape {parameters[name].shape}: expected {expected.shape} for {of}")


def _in_dtype(x: Array, dtype: DTypeLike) -> Array:
    """An array in a dtype: the very same object if it is so already, by which others may know it."""
    return x if x.dtype == dtype else x.astype(dtype)


def segments_and_positions(
    x: Array, segment_ids: Array | None, positions: Array | None, config: HeadConfig
) -> tuple[Int[Array, "B T"] | None, Int[Array, "B T"]]:
    """The segment ids, checked, and the position of each token: those given, or in its segment."""
    B, T = x.shape[:2]
    segment_ids = None if segment_ids is None else checked_segment_ids(segment_ids, B, T)
    if positions is not None:
        return segment_ids, checked_positions(positions, B, T)
    axes = {"batch_axes": config.batch_axes, "context_axes": config.context_axes}
    return segment_ids, token_positions((B, T), segment_ids, **axes)


def checked_positions(positions: Any, B: int, T: int) -> Int[Array, "B T"]:
    """The positions that a caller gives, int32."""
    return arguments.integers("positions", positions, (B, T), "(B, T)")
