"""Random problems for the ops: every size, option and shape that the contract allows, kept small."""

import dataclasses
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from nsa_jax import BranchKV, NSAConfig, num_compressed


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem, up to the values of its arrays, which follow from `seed`."""

    batch: int
    tokens: int  # T
    kv_heads: int  # K
    group: int  # G
    key_size: int  # Dk
    value_size: int  # Dv
    config: NSAConfig
    scale: float | None
    segments: bool
    offset: int  # position of the first query
    queries: int  # Tq
    traced_offset: bool
    seed: int


class Arrays(NamedTuple):
    """NumPy arguments of `nsa_attention`."""

    q: np.ndarray
    kv: BranchKV
    gates: np.ndarray
    segment_ids: np.ndarray | None


@st.composite
def configs(draw):
    """Any valid `NSAConfig` with blocks of a few tokens."""
    d = draw(st.integers(1, 4))
    chunks_in_token = draw(st.integers(1, 3))
    chunks_in_block = draw(st.integers(chunks_in_token, 4))
    num_init = draw(st.integers(0, 2))
    num_local = draw(st.integers(0, 3))
    forced = num_init + num_local
    return NSAConfig(
        compress_block=d * chunks_in_token,
        compress_stride=d,
        select_block=d * chunks_in_block,
        num_selected=draw(st.integers(max(1, forced), forced + 3)),
        num_init=num_init,
        num_local=num_local,
        window=draw(st.one_of(st.integers(1, 12), st.integers(1, 100))),
        # Where no block is forced, a query might have none.
        select_in_window=not forced or draw(st.booleans()),
    )


@st.composite
def cases(draw, max_tokens=90):
    """Any `Case` of up to `max_tokens` tokens: whole calls and slices of the queries, with and without segments."""
    # Three ranges, so that sequences shorter than a block and sequences of many blocks both come up often.
    tokens = draw(
        st.one_of(st.integers(1, 12), st.integers(13, max_tokens // 2), st.integers(max_tokens // 2, max_tokens))
    )
    whole = draw(st.booleans())
    offset = 0 if whole else draw(st.integers(0, tokens - 1))
    queries = tokens if whole else draw(st.integers(1, tokens - offset))
    return Case(
        batch=draw(st.integers(1, 2)),
        tokens=tokens,
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 5)),
        key_size=draw(st.integers(1, 9)),
        value_size=draw(st.integers(1, 9)),
        config=draw(configs()),
        scale=draw(st.sampled_from([None, 0.7])),
        segments=draw(st.booleans()),
        offset=offset,
        queries=queries,
        traced_offset=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


@st.composite
def kernel_cases(draw):
    """Any `Case` with heads and blocks as large as kernels take them, in float32."""
    d = draw(st.sampled_from([4, 8, 16]))
    per_block = draw(st.integers(-(-16 // d), max(2, 48 // d)))
    config = draw(configs())
    config = dataclasses.replace(
        config,
        compress_block=d * draw(st.integers(1, min(3, per_block))),
        compress_stride=d,
        select_block=d * per_block,
        window=draw(st.integers(1, 120)),
    )
    sizes = st.sampled_from([16, 24, 32, 48])
    return dataclasses.replace(draw(cases(max_tokens=120)), config=config, key_size=draw(sizes), value_size=draw(sizes))


def random_segment_ids(rng, batch, tokens):
    """Segments that start anywhere, with ids that neither start at 0 nor rise by 1; some rows are one segment."""
    starts = rng.random((batch, tokens)) < rng.choice([0.0, 0.05, 0.2], size=(batch, 1))
    return (rng.integers(0, 5, (batch, 1)) + np.cumsum(starts * rng.integers(1, 4, starts.shape), axis=1)).astype(
        np.int32
    )


def random_arrays(case, dtype):
    """The arrays of `case`: normal queries and keys, gates in (0, 1), segments if wanted.

    The values of one feature have one sign, the same in every branch. An output is then never a small difference of
    large terms, and its relative error says how well it was computed, however few elements it has.
    """
    rng = np.random.default_rng(case.seed)
    K, H = case.kv_heads, case.kv_heads * case.group
    signs = rng.choice([-1.0, 1.0], size=(case.value_size,))

    def keys(tokens, heads):
        return rng.normal(size=(case.batch, tokens, heads, case.key_size)).astype(dtype)

    def values(tokens):
        return (signs * rng.uniform(0.2, 2.0, size=(case.batch, tokens, K, case.value_size))).astype(dtype)

    lengths = [num_compressed(case.tokens, case.config), case.tokens, case.tokens]
    return Arrays(
        q=keys(case.queries, H),
        kv=BranchKV(*(array for tokens in lengths for array in (keys(tokens, K), values(tokens)))),
        gates=rng.random((case.batch, case.queries, H, 3)).astype(dtype),
        segment_ids=random_segment_ids(rng, case.batch, case.tokens) if case.segments else None,
    )


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """One layer with its input, its cache and its mesh, up to the values of its arrays, which follow from `seed`."""

    aspect: str  # what is looked at: "gradients", "poison", "cache" or "mesh"
    kind: str  # "nsa", "full" or "window"
    nnx: bool  # else Linen
    fields: dict  # of the layer
    window: int | None
    dtype: str
    x64: bool
    batch: int
    tokens: int
    segments: bool
    poison: float  # not finite, or large
    axes: tuple[str, ...]  # mesh axes, of two devices each
    explicit: bool
    chunk: int  # tokens of a prefill
    step_tokens: int
    paged: bool
    seed: int


# What Triton takes, as its heads and blocks are no smaller than 16.
TRITON_CONFIGS = (
    NSAConfig(16, 8, 16, 3, 1, 1, 9),
    NSAConfig(8, 4, 16, 4, 0, 2, 20),
    NSAConfig(16, 16, 16, 2, 0, 0, 12),
    NSAConfig(8, 8, 24, 3, 1, 1, 30),
)


@st.composite
def layer_cases(draw):
    """Any `LayerCase` of up to 70 tokens: both kinds of modules, all layers, implementations, dtypes and caches."""
    aspect = draw(st.sampled_from(["gradients", "poison", "cache", "mesh"]))
    kind = draw(st.sampled_from(["nsa", "nsa", "nsa", "full", "window"]))
    implementation = draw(st.sampled_from(["xla", "xla", "xla", "reference", "triton", None]))
    triton = kind != "full" and implementation == "triton"
    dtype = draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"] + ["float64"] * (not triton)))
    sizes = st.sampled_from([16, 32]) if triton else st.sampled_from([2, 4, 8, 10])
    config = draw(st.sampled_from(TRITON_CONFIGS) if triton else configs())
    axes = draw(st.sampled_from([("data",), ("tensor",), ("data", "tensor"), ("context",), ("data", "context")]))
    axes = axes if aspect == "mesh" else ()
    fields = {
        "num_kv_heads": draw(st.integers(1, 3)) * (2 if "tensor" in axes else 1),
        "head_dim": draw(sizes),
        "v_head_dim": draw(st.one_of(st.none(), sizes)),
        "rope_theta": draw(st.sampled_from([10_000.0, 10_000.0, None])),
        "qk_norm": draw(st.booleans()),
    }
    fields["num_heads"] = fields["num_kv_heads"] * draw(st.integers(1, 4))
    if kind == "nsa":
        fields |= {
            "config": config,
            "implementation": implementation,
            "compression": draw(st.sampled_from(["mlp", "linear", "mean"])),
            "share_kv": draw(st.booleans()),
            "tie_keys": draw(st.booleans()),
        }
    tokens = draw(st.integers(1, 70))
    if "context" in axes:  # two chunks a device, of whole strides
        least = max(config.compress_block - config.compress_stride, config.compress_stride)
        chunk = config.compress_stride * draw(st.integers(-(-least // config.compress_stride), 12))
        tokens = 4 * chunk
    return LayerCase(
        aspect=aspect,
        kind=kind,
        nnx=draw(st.booleans()),
        fields=fields,
        window=draw(st.integers(1, 80)) if kind == "window" else None,
        dtype=dtype,
        x64=dtype == "float64" or draw(st.booleans()),
        batch=draw(st.integers(1, 3)) * (2 if "data" in axes else 1),
        tokens=tokens,
        segments=aspect != "cache" and draw(st.booleans()),
        poison=draw(st.sampled_from([np.nan, np.inf, -np.inf, 6e4 if dtype == "float16" else 1e15])),
        axes=axes,
        explicit=draw(st.booleans()),
        chunk=draw(st.integers(1, 40)),
        step_tokens=draw(st.integers(1, 4)),
        paged=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )
