"""The problems on which kernels of every backend are tested, and what the reference says of them.

A new backend joins with its name in `BACKENDS`.
"""

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import BranchKV, NSAConfig, backends, num_compressed, reference
from nsa_jax.testing import tolerance_of
from pallas_kernels.contract import Gradients
from pallas_kernels.devices import current_device
from pallas_kernels.mosaic.launch import check_version
from pallas_kernels.mosaic.tiles import IntervalTile, PartialTile, RingTile, ScoreTile, UnionTile
from pallas_kernels.triton.launch import poisoned_outputs
from pallas_kernels.triton.tiles import BlockTile, QueryTile, Tile

BACKENDS = ("triton", "mosaic")
BRANCHES = ("compressed_attention", "selected_attention", "window_attention")
# Contexts in which the outputs of a backend's compiled kernels hold NaN until they are written; interpreted ones do.
POISON = {"triton": poisoned_outputs}
# The dtypes of a backend, and the one in which its interpreted kernels are tested.
DTYPES = {"triton": (jnp.bfloat16, jnp.float16, jnp.float32), "mosaic": (jnp.bfloat16, jnp.float16)}
# The head sizes of keys and values together that a backward pass takes, where it does not take all of the forward's.
LARGEST_BACKWARD = {("mosaic", "compressed_attention"): 256, ("mosaic", "window_attention"): 256}
INTERPRETED_DTYPE = {"triton": jnp.float32, "mosaic": jnp.bfloat16}
INTERPRETED_TOLERANCE = {"triton": 2e-6, "mosaic": tolerance_of(jnp.bfloat16)}

# For each op, tiles that are in no table.
TILES: dict[str, dict[str, dict[str, Any]]] = {
    "triton": {
        "compressed_attention": {
            "tile": Tile(64, 32, 4, 2),
            "query_tile": Tile(32, 64, 4, 2),
            "key_tile": Tile(64, 32, 4, 2),
        },
        "select_blocks": {"tile": Tile(64, 32, 8, 2)},
        "selected_attention": {
            "tile": QueryTile(16, 8, 2),
            "query_tile": QueryTile(32, 8, 2),
            "key_tile": BlockTile(32, 512, 8, 2),
        },
        "window_attention": {
            "tile": Tile(64, 32, 4, 2),
            "query_tile": Tile(32, 64, 4, 2),
            "key_tile": Tile(64, 32, 4, 2),
        },
    },
    "mosaic": {
        "compressed_attention": {
            "tile": IntervalTile(2, 128, 2, 1),
            "query_tile": RingTile(1),
            "key_tile": PartialTile(1, None),
        },
        "select_blocks": {"tile": ScoreTile(2)},
        "selected_attention": {
            "tile": UnionTile(1, 1),
            "query_tile": RingTile(1),
            "key_tile": PartialTile(1, None),
        },
        "window_attention": {
            "tile": IntervalTile(3, 64, 1, 1),
            "query_tile": RingTile(2),
            "key_tile": PartialTile(1, 256),
        },
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem, up to the dtype and the values of its arrays."""

    T: int  # tokens that the keys cover
    H: int  # query heads
    K: int  # key/value heads
    Dk: int
    Dv: int
    config: NSAConfig
    B: int = 1
    query_offset: int = 0  # position of the first query
    Tq: int | None = None  # queries; None: all that follow the offset
    traced: bool = True  # whether the offset is known only when running
    segments: tuple[int, ...] = ()  # where segments begin, after the first
    given: bool = False  # whether the backward pass is given a gate and a dq to add to; otherwise dlse
    ops: tuple[str, ...] = (*BRANCHES, "select_blocks")  # what it is for
    backends: tuple[str, ...] = ("triton",)  # who takes it

    @property
    def num_queries(self) -> int:
        return self.T - self.query_offset if self.Tq is None else self.Tq

    @property
    def num_compressed(self) -> int:
        return num_compressed(self.T, self.config)

    @property
    def scale(self) -> float:
        return self.Dk**-0.5

    @property
    def options(self) -> dict[str, Any]:
        return {"config": self.config, "scale": self.scale}

    @property
    def offset(self) -> Any:
        return jnp.int32(self.query_offset) if self.traced else self.query_offset


# Small, for interpreted kernels: together they have groups of 1, 3, 4 and 16 heads, head sizes 16, 64, 80, 128 and
# 192/128, odd lengths, blocks of no power of two, and sequences that are shorter than a compressed token.
CASES = {
    "group of 4, odd length": Case(
        149, 8, 2, 64, 64, NSAConfig(32, 16, 64, 3, 1, 1, 50), traced=False
    ),
    "segments, group of 3, s = 24": Case(
        131, 6, 2, 80, 40, NSAConfig(16, 8, 24, 4, 1, 2, 100), B=2, segments=(43, 100), given=True
    ),
    "last queries only, group of 16, 192 and 128, s = 48, nothing forced": Case(
        400, 16, 1, 192, 128, NSAConfig(32, 16, 48, 4, 0, 0, 70), query_offset=339, Tq=37
    ),
    "segments and offset, one head a group, no overlap": Case(
        199, 2, 2, 128, 16, NSAConfig(32, 32, 32, 8, 1, 2, 400), query_offset=111, traced=False, segments=(70, 120, 121)
    ),
    "shorter than a compressed token": Case(
        20, 3, 1, 16, 16, NSAConfig(32, 16, 64, 4, 1, 1, 9), traced=False, given=True
    ),
    "1 block, two heads a group": Case(
        75, 4, 2, 32, 16, NSAConfig(16, 8, 16, 1, 0, 1, 50), traced=False, ops=("selected_attention",)
    ),
    "40 blocks, segments, last queries only": Case(
        700, 4, 2, 16, 32, NSAConfig(16, 8, 16, 40, 1, 2, 50), query_offset=651, Tq=37, segments=(20,),
        ops=("selected_attention",)
    ),
    # For kernels whose tiles are 64 rows: groups of 16, 1, 64, 4 and 8, and every head size that they take.
    "64 rows: group of 16, odd length": Case(
        83, 16, 1, 128, 128, NSAConfig(16, 8, 64, 2, 0, 1, 50), traced=False, backends=("mosaic",)
    ),
    "64 rows: one head a group, segments, 64 and 128": Case(
        131, 1, 1, 64, 128, NSAConfig(16, 8, 64, 2, 1, 1, 100), B=2, segments=(43, 100), given=True,
        ops=("compressed_attention", "select_blocks", "window_attention"), backends=("mosaic",)
    ),
    "64 rows: last queries only, group of 64, 192 and 128": Case(
        170, 64, 1, 192, 128, NSAConfig(32, 16, 64, 2, 0, 0, 70), query_offset=140, Tq=5, ops=BRANCHES,
        backends=("mosaic",)
    ),
    "64 rows: segments and offset, group of 4": Case(
        199, 8, 2, 128, 128, NSAConfig(32, 32, 64, 8, 1, 2, 400), query_offset=151, traced=False,
        segments=(70, 120, 160), ops=("compressed_attention", "select_blocks", "window_attention"), backends=("mosaic",)
    ),
    "64 rows: blocks that begin before the window, segments and offset": Case(
        700, 16, 2, 64, 64, NSAConfig(32, 16, 64, 5, 1, 1, 128, False), query_offset=301, segments=(130, 420),
        ops=("select_blocks",), backends=("triton", "mosaic")
    ),
    "64 rows: blocks by segments and offset, group of 16": Case(
        330, 32, 2, 64, 64, NSAConfig(32, 16, 64, 4, 1, 2, 400), query_offset=297, segments=(70, 290, 310), given=True,
        ops=("selected_attention",), backends=("mosaic",)
    ),
    "64 rows: 1 block, group of 32": Case(
        83, 32, 1, 64, 64, NSAConfig(16, 8, 64, 1, 0, 1), traced=False, ops=("selected_attention",),
        backends=("mosaic",)
    ),
    "64 rows: 5 blocks, group of 8": Case(
        400, 8, 1, 64, 64, NSAConfig(16, 8, 64, 5, 1, 1), query_offset=370, ops=("selected_attention",),
        backends=("mosaic",)
    ),
    "64 rows: 40 blocks, last queries only, group of 64": Case(
        2700, 64, 1, 64, 64, NSAConfig(16, 8, 64, 40, 1, 1), query_offset=2693, Tq=5, ops=("selected_attention",),
        backends=("mosaic",)
    ),
    "64 rows: shorter than a compressed token, group of 8": Case(
        20, 8, 1, 256, 256, NSAConfig(32, 16, 64, 4, 1, 1, 9), traced=False, given=True, backends=("mosaic",)
    ),
}  # fmt: skip
FUSED_CASES = {
    "segments, offset, odd group, odd heads": Case(
        70, 6, 2, 48, 40, NSAConfig(16, 8, 16, 3, 1, 1, 9), B=2, query_offset=37, segments=(43,), ops=("nsa_attention",)
    ),
    "group of 4": Case(80, 8, 2, 32, 32, NSAConfig(16, 8, 16, 3, 1, 1, 20), ops=("nsa_attention",)),
    "64 rows: segments, offset, group of 8": Case(
        230, 16, 2, 64, 64, NSAConfig(16, 8, 64, 2, 0, 1, 50), query_offset=197, segments=(70, 210),
        ops=("nsa_attention",), backends=("mosaic",)
    ),
}  # fmt: skip

PAPER = NSAConfig()
# For compiled kernels. An op gets what is cheap enough for the reference.
GPU_CASES = {
    "paper's sizes": Case(
        2100, 64, 4, 128, 128, PAPER, ops=("compressed_attention", "select_blocks", "nsa_attention"), backends=BACKENDS
    ),
    "paper's sizes, shorter": Case(
        1000, 64, 4, 128, 128, PAPER, ops=("selected_attention", "window_attention"), backends=BACKENDS
    ),
    "192 and 128, segments": Case(
        777, 32, 2, 192, 128, NSAConfig(num_selected=8, window=100), B=2, segments=(43, 200, 201), given=True,
        ops=BRANCHES, backends=BACKENDS
    ),
    "192 and 128, segments, longer": Case(
        1777, 12, 2, 192, 128, NSAConfig(num_selected=8), B=2, segments=(64, 192), ops=("select_blocks",)
    ),
    "192 and 128, segments, all branches": Case(
        1555, 32, 2, 192, 128, PAPER, B=2, segments=(43,), ops=("nsa_attention",), backends=BACKENDS
    ),
    "odd group, heads and block, offset": Case(
        900, 12, 2, 40, 96, NSAConfig(32, 16, 48, 5, 1, 2, 333), query_offset=301, ops=BRANCHES
    ),
    "80 and 256, keys beyond the queries": Case(
        1500, 6, 2, 80, 256, PAPER, query_offset=601, Tq=800, traced=False, given=True, ops=BRANCHES
    ),
    "one head a group, segments": Case(
        777, 4, 4, 128, 128, PAPER, segments=(43, 200), given=True, ops=BRANCHES
    ),
    "one head a group, segments, small heads": Case(
        1024, 4, 4, 64, 64, PAPER, segments=(70, 200, 201), ops=("compressed_attention",), backends=BACKENDS
    ),
    "one head a group, odd heads, all branches": Case(
        1300, 4, 4, 64, 40, PAPER, segments=(43,), ops=("nsa_attention",)
    ),
    "one head a group, offset": Case(
        3000, 4, 4, 64, 64, NSAConfig(32, 16, 128, 4, 2, 1, 512), query_offset=1001, ops=("select_blocks",)
    ),
    "large heads": Case(777, 4, 4, 256, 128, PAPER, segments=(43,), ops=("window_attention",), backends=BACKENDS),
    "64 heads a group": Case(640, 64, 1, 64, 48, NSAConfig(16, 8, 128, 3, 1, 2, 70), ops=BRANCHES),
    "64 heads a group, offset, all branches": Case(
        1300, 64, 1, 64, 64, PAPER, query_offset=301, ops=("nsa_attention",)
    ),
    "64 rows: keys beyond the queries, group of 64": Case(
        1500, 64, 1, 64, 64, PAPER, query_offset=601, Tq=800, traced=False, given=True, ops=BRANCHES,
        backends=("mosaic",)
    ),
    "64 rows: group of 8, 256, offset": Case(
        900, 16, 2, 256, 256, NSAConfig(window=333), query_offset=301, ops=BRANCHES, backends=BACKENDS
    ),
    "64 rows: group of 8, segments, offset, all branches": Case(
        1555, 16, 2, 64, 64, PAPER, B=2, query_offset=301, segments=(43, 700), ops=("nsa_attention",),
        backends=("mosaic",)
    ),
    "64 rows: group of 32, all branches": Case(
        1300, 64, 2, 128, 128, NSAConfig(num_selected=5), traced=False, ops=("nsa_attention",), backends=("mosaic",)
    ),
    "64 rows: blocks by segments": Case(
        2001, 32, 2, 64, 64, NSAConfig(num_selected=8), B=2, segments=(64, 700), ops=("select_blocks",),
        backends=("mosaic",)
    ),
    "64 rows: many blocks, no overlap, offset": Case(
        9000, 4, 1, 128, 128, NSAConfig(16, 16, 16, 20, 2, 3), query_offset=8001, ops=("select_blocks",),
        backends=("mosaic",)
    ),
    "64 rows: group of 4": Case(
        2100, 16, 4, 128, 128, PAPER, ops=("compressed_attention", "window_attention"), backends=("mosaic",)
    ),
    "64 rows: one head a group, segments": Case(
        777, 4, 4, 128, 128, PAPER, segments=(43, 200), given=True, ops=("compressed_attention", "window_attention"),
        backends=("mosaic",)
    ),
    "64 rows: group of 32, segments": Case(
        777, 64, 2, 128, 128, NSAConfig(num_selected=5), B=2, segments=(64, 200), ops=("selected_attention",),
        backends=("mosaic",)
    ),
    "40 blocks, group of 32": Case(
        3000, 64, 2, 128, 128, NSAConfig(num_selected=40), query_offset=2100, ops=("selected_attention",),
        backends=BACKENDS
    ),
    "40 blocks, one head a group, segments": Case(
        3000, 4, 4, 64, 64, NSAConfig(num_selected=40), query_offset=2100, segments=(100,), ops=("selected_attention",)
    ),
    "1 block, group of 4": Case(1000, 16, 4, 64, 64, NSAConfig(16, 8, 64, 1, 0, 1), ops=("selected_attention",)),
    "long enough to choose tiles by overlap": Case(
        4200, 16, 1, 64, 64, PAPER, ops=("selected_attention",), backends=BACKENDS
    ),
    "so many blocks that kernels differ, offset": Case(
        4500, 8, 2, 64, 64, NSAConfig(16, 8, 16, 8, 1, 1, 512), query_offset=3000, ops=("select_blocks",)
    ),
}  # fmt: skip
# Only lowered.
LONG_CASES = {
    "64k": Case(65536, 64, 4, 128, 128, PAPER, traced=False, backends=BACKENDS),
    "last quarter of 64k": Case(65536, 64, 4, 128, 128, PAPER, query_offset=49152, ops=("select_blocks",)),
    "short, group of 3, 80 and 256": Case(
        333, 3, 1, 80, 256, NSAConfig(16, 8, 16, 16, 1, 2, 70), query_offset=7, segments=(43,)
    ),
}


def fitted(backend: str, case: Case) -> Case:
    """A case as the backend takes it: if its tiles are 64 rows, heads of 64, 8 of them a group, and blocks of 64."""
    if backend == "triton":
        return case
    config = dataclasses.replace(case.config, select_block=64)
    return dataclasses.replace(case, H=8 * case.K, Dk=64, Dv=64, config=config)


class Inputs(NamedTuple):
    """Arrays of a case. What an op does not read is there all the same."""

    q: jax.Array
    kv: BranchKV
    gates: jax.Array
    starts: jax.Array | None
    block_indices: jax.Array
    do: jax.Array
    dlse: jax.Array
    dq: jax.Array


def shapes(case: Case, dtype: Any) -> Inputs:
    """The shapes of `inputs`."""
    B, Tq, H, K, Dk, Dv = case.B, case.num_queries, case.H, case.K, case.Dk, case.Dv

    def array(*shape: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    lengths = (case.num_compressed, case.T, case.T)
    return Inputs(
        q=array(B, Tq, H, Dk),
        kv=BranchKV(*(array(B, length, K, D) for length in lengths for D in (Dk, Dv))),
        gates=array(B, Tq, H, 3, dtype=jnp.float32),
        starts=array(B, Tq, dtype=jnp.int32) if case.segments else None,
        block_indices=array(B, K, Tq, case.config.num_selected, dtype=jnp.int32),
        do=array(B, Tq, H, Dv),
        dlse=array(B, H, Tq, dtype=jnp.float32),
        dq=array(B, Tq, H, Dk),
    )


def inputs(case: Case, dtype: Any = jnp.float32) -> Inputs:
    """Standard normal arrays, gates in (0, 1), and for every query random blocks, its own among them."""
    shaped = shapes(case, dtype)
    leaves, structure = jax.tree.flatten(shaped)
    keys = jax.random.split(jax.random.key(case.T), len(leaves))
    normal = [
        jax.random.normal(key, x.shape, x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for key, x in zip(keys, leaves, strict=True)
    ]
    drawn: Inputs = jax.tree.unflatten(structure, normal)
    positions = np.arange(case.query_offset, case.query_offset + case.num_queries)
    rows = [np.array([0, *(begin + 5 * b for begin in case.segments)]) for b in range(case.B)]
    first = np.stack([begins[np.searchsorted(begins, positions, side="right") - 1] for begins in rows])
    return drawn._replace(
        gates=jax.nn.sigmoid(drawn.gates),
        starts=jnp.asarray(first, jnp.int32) if case.segments else None,
        block_indices=jnp.asarray(_random_blocks(case, first, positions)),
    )


def _random_blocks(case: Case, first: np.ndarray, positions: np.ndarray) -> np.ndarray:
    s, n = case.config.select_block, case.config.num_selected
    rng = np.random.default_rng(n)
    indices = np.full((case.B, case.K, len(positions), n), -1, np.int32)
    for b, k, row in np.ndindex(*indices.shape[:3]):
        blocks = np.arange(first[b, row] // s, positions[row] // s + 1)
        chosen = np.append(rng.choice(blocks[:-1], min(n, len(blocks)) - 1, replace=False), blocks[-1])
        indices[b, k, row, : len(chosen)] = np.sort(chosen)
    return indices


def arguments(op: str, inputs: Inputs) -> tuple[Any, ...]:
    """What a branch's op takes before the positions: q, k, v and, of selected attention, the blocks."""
    branch = BRANCHES.index(op)
    blocks = (inputs.block_indices,) if op == "selected_attention" else ()
    return inputs.q, *inputs.kv[2 * branch : 2 * branch + 2], *blocks


def with_keys(op: str, inputs: Inputs, k: jax.Array, v: jax.Array) -> Inputs:
    """The same inputs with other keys and values for one branch."""
    fields = BranchKV._fields[2 * BRANCHES.index(op) :][:2]
    return inputs._replace(kv=inputs.kv._replace(**dict(zip(fields, (k, v), strict=True))))


def backward_options(op: str, case: Case, inputs: Inputs) -> dict[str, jax.Array]:
    """What the backward pass is given beside the cotangent of o."""
    if case.given:
        return {"gate": inputs.gates[..., BRANCHES.index(op)], "dq": inputs.dq}
    return {"dlse": inputs.dlse}


def function(backend: str, op: str, case: Case | None = None) -> Any:
    """A backend's function for an op, if it has one that takes the device in context.

    A backend without a backward pass of its own, or without one for heads of a case's sizes, is tested with Triton's.
    """
    if case is not None and op.endswith("_backward") and case.Dk + case.Dv > largest_backward(backend, op):
        backend = "triton"
    if backend == "mosaic":
        skip_without_mosaic(interpreted=current_device().platform != "gpu")
    if op.endswith("_backward") and hasattr(backends.get(backend), op.removesuffix("_backward")):
        backend = backend if hasattr(backends.get(backend), op) else "triton"
    found = backends.get(backend)
    if not hasattr(found, op):
        pytest.skip(f"{backend} has no {op}")
    device = current_device()
    if device.platform == "gpu":
        try:
            found.supports(op.removesuffix("_backward"), device)  # type: ignore[attr-defined]
        except NotImplementedError as refusal:
            pytest.skip(str(refusal))
    return getattr(found, op)


def largest_backward(backend: str, op: str) -> int:
    """The head sizes of keys and values together that a backward pass takes."""
    return LARGEST_BACKWARD.get((backend, op.removesuffix("_backward")), 512)


def skip_without_mosaic(interpreted: bool) -> None:
    """Skips the test where the Mosaic GPU kernels cannot be lowered, or interpreted."""
    try:
        check_version(interpreted)
    except NotImplementedError as refusal:
        pytest.skip(f"mosaic: {refusal}")


def rematerialised(backend: str, f: Any) -> Any:
    """`jax.checkpoint`, which does not take JAX's interpreter of Mosaic GPU kernels: that has effects."""
    return f if backend == "mosaic" and current_device().platform != "gpu" else jax.checkpoint(f)


def poisoned(backend: str) -> contextlib.AbstractContextManager[None]:
    """Compiled kernels that are traced inside find NaN in their outputs."""
    return POISON.get(backend, contextlib.nullcontext)()


def lower(device_kind: str, call: Any, *shapes: Any) -> str:
    """The text of a program lowered for a GPU that need not be there."""
    with abstract(device_kind):
        return jax.jit(call).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def abstract(device_kind: str, devices: int = 1, axes: Any = jax.sharding.AxisType.Auto) -> Any:
    """A context in which programs are traced for GPUs that need not be there."""
    device = jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((devices,), ("x",), axis_types=(axes,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def exact(tree: Any) -> Any:
    """Arrays in float32 on the CPU, where the reference compiles soon: a GPU tunes float32 products for a minute."""
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
    return jax.device_put(wide, jax.devices("cpu")[0])


class Results(NamedTuple):
    """A branch's two passes."""

    o: jax.Array
    lse: jax.Array
    gradients: Gradients


def results(forward: Any, backward: Any, op: str, case: Case, inputs: Inputs, offset: Any) -> Results:
    """Both passes as the contract calls them."""
    q, *others = arguments(op, inputs)
    positions = (inputs.starts, offset)
    o, lse = forward(q, *others, *positions, **case.options)
    options = backward_options(op, case, inputs)
    return Results(o, lse, backward(q, *others, o, lse, inputs.do, *positions, **case.options, **options))


def expected_results(op: str, case: Case, inputs: Inputs) -> Results:
    """What the reference and its derivative say, in float32; delta is defined where the query sees something."""
    return _expected(op, case)(exact(inputs))


@functools.cache
def _expected(op: str, case: Case) -> Any:
    def run(inputs: Inputs) -> Results:
        q, k, v, *blocks = arguments(op, inputs)

        def call(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
            return getattr(reference, op)(q, k, v, *blocks, inputs.starts, case.query_offset, **case.options)

        (o, lse), pullback = jax.vjp(call, q, k, v)
        options = backward_options(op, case, inputs)
        do, dlse = inputs.do, jnp.where(jnp.isfinite(lse), options.get("dlse", 0.0), 0.0)
        gated = do * options["gate"][..., None] if "gate" in options else do
        dq, dk, dv = pullback((gated, dlse))
        delta = jnp.moveaxis(jnp.sum(o * do, axis=-1), 1, 2) - dlse
        return Results(o, lse, Gradients(dq + options.get("dq", 0.0), dk, dv, delta))

    return jax.jit(run)
