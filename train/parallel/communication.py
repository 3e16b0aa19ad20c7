"""What the devices of a mesh send one another in a step: counted in the compiled program, by formula, and in time."""

import collections
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nsa_jax.context import received_bytes as received_bytes_over_context
from train.config import TrainConfig
from train.model.transformer import Transformer
from train.parallel.sharding import BATCH_AXES, RULES, SHARE_AXES, padded_length

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective operation of a compiled program."""

    kind: str  # of `KINDS`
    devices: int  # that take part in one group
    result_bytes: int  # on one device
    times: int  # that a run of the program executes it
    source: str  # where in the traced program it comes from

    @property
    def received_bytes(self) -> float:
        """What a device receives in one run, by the algorithms that send least (rings)."""
        others = (self.devices - 1) / self.devices
        factor = {"all-reduce": 2 * others, "reduce-scatter": self.devices - 1, "collective-permute": 1}
        return self.times * self.result_bytes * factor.get(self.kind, others)


def collectives(program: str) -> list[Collective]:
    """Every collective of a compiled program's text (`compiled.as_text()`), with the trips of the loops around it.

    Raises:
      ValueError: a loop that communicates does not say how often it runs.
    """
    computations = _computations(program)
    times: dict[str, float] = collections.defaultdict(float)
    times |= {name: 1.0 for name, (is_entry, _) in computations.items() if is_entry}
    found = []
    for name in _callers_first(computations):
        for line in computations[name][1]:
            for callee, trips in _calls(line):
                times[callee] += times[name] * trips if times[name] else 0
            match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
            if match is None:
                continue
            types, kind, start = match.groups()
            if not math.isfinite(times[name]):
                raise ValueError(f"a loop of unknown length communicates: {line.strip()[:200]}")
            source = re.search(r'op_name="([^"]*)"', line)
            size = _result_bytes(types, paired=start is not None and kind != "all-reduce")
            found.append(Collective(kind, _group_size(line), size, int(times[name]), source.group(1) if source else ""))
    return found


def received_bytes(found: list[Collective]) -> dict[str, float]:
    """Bytes that a device receives in one run, by the kind of collective."""
    total: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for collective in found:
        total[collective.kind] += collective.received_bytes
    return {kind: size for kind, size in total.items() if size}


def _computations(program: str) -> dict[str, tuple[bool, list[str]]]:
    """Lines of every computation by its name, and whether it is the entry."""
    computations: dict[str, tuple[bool, list[str]]] = {}
    lines: list[str] = []
    for line in program.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = []
            computations[match.group(2)] = match.group(1) is not None, lines
        else:
            lines.append(line)
    return computations


def _calls(line: str) -> Iterator[tuple[str, float]]:
    """Computations that an instruction runs, and how often; infinity where it does not say."""
    trips = 1.0
    if " while(" in line:
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        trips = float(known.group(1)) if known else math.inf
    for callee in re.findall(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", line):
        yield callee, trips
    for callees in re.findall(r"branch_computations=\{([^}]*)\}", line):
        for callee in callees.split(","):
            yield callee.strip().lstrip("%"), 1


def _callers_first(computations: dict[str, tuple[bool, list[str]]]) -> list[str]:
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name in seen or name not in computations:
            return
        seen.add(name)
        for line in computations[name][1]:
            for callee, _ in _calls(line):
                visit(callee)
        order.append(name)

    for name in computations:
        visit(name)
    return order[::-1]


def _group_size(line: str) -> int:
    """Devices in one replica group, of which HLO has three spellings."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match.group(2))
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return match.group(1).count(",") + 1
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match.group(1))}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", match.group(2)))
    return 2  # a permutation: pairs


def _result_bytes(types: str, *, paired: bool) -> int:
    """Of an instruction's results; asynchronous ones are `paired` with operands that come first, and have counters."""
    arrays = [(kind, sizes.split(",")) for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", types)]
    if paired:
        arrays = [(kind, sizes) for kind, sizes in arrays if sizes != [""]]
        arrays = arrays[len(arrays) // 2 :]
    return sum(ITEM_BYTES.get(kind, 4) * math.prod(int(size) for size in sizes if size) for kind, sizes in arrays)


def overlap(profile: Any) -> dict[str, float]:
    """How much of the communication in a trace of GPUs is hidden behind computation.

    Args:
      profile: a `jax.profiler.ProfileData` of programs that communicate through NCCL.

    Returns:
      Seconds, of one GPU on average: "communication_s" in which a collective runs (or waits for the other GPUs),
      "hidden_s" of these in which other kernels run too, and "computation_s" in which other kernels run.

    Raises:
      ValueError: the trace has no kernel of a GPU.
    """
    totals: dict[str, float] = dict.fromkeys(("communication_s", "hidden_s", "computation_s"), 0.0)
    gpus = 0
    for plane in profile.planes:
        events = [
            (event.name, event.start_ns, event.start_ns + event.duration_ns)
            for line in plane.lines
            if plane.name.startswith("/device:GPU") and line.name.startswith("Stream")
            for event in line.events
        ]
        if not events:
            continue
        gpus += 1
        communication = _union((begin, end) for name, begin, end in events if name.startswith("nccl"))
        computation = _union((begin, end) for name, begin, end in events if not name.startswith("nccl"))
        both = _length(communication) + _length(computation) - _length(_union([*communication, *computation]))
        totals["communication_s"] += _length(communication) / 1e9
        totals["hidden_s"] += both / 1e9
        totals["computation_s"] += _length(computation) / 1e9
    if not gpus:
        raise ValueError("profile: no kernel of a GPU in it")
    return {name: seconds / gpus for name, seconds in totals.items()}


def _union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same points in intervals that do not overlap, ascending."""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


def _length(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end - begin for begin, end in intervals)


def predicted_bytes(config: TrainConfig, vocab_size: int, sizes: Mapping[str, int]) -> dict[str, float]:
    """Bytes that a device receives in one step, by purpose, as the design has it: those of all microbatches.

    With z the size of a number of the compute dtype, and passes = 1 forward and, under remat, 1 more:

    * "parameters": what the F devices along "fsdp" and "context" share is gathered for use, (F - 1) / F of it, in every
      pass of the layers; the backward pass uses what the last of them gathered. Norms in float32, the rest rounded
      before.
    * "gradients": of every parameter, all-reduced over the devices that hold other tokens ("data", "fsdp", "expert" and
      "context"; routed experts: not over "expert"); that of the tokens' embeddings in float32. On GPUs and
      TPUs the compiler turns the all-reduce and the slice that each of the F takes of it into a reduce-scatter, which
      is half of it.
    * "tensor": all-reduces of [rows, tokens, embed_dim]: in every forward pass behind attention and (but for the last
      of two passes) the MLP, in the backward pass one for each projection that reads the residual stream; of the
      embeddings, and of the loss's gradient; of phi's and the gates' gradients, whose heads are split.
    * "experts": `train.moe` says what: gathers of the parameters and reduce-scatters of their gradients, then summed
      over the other devices that have the same expert; tokens and their routing to the devices along "expert" in every
      pass, and results back in the first; the same the other way in the backward pass; sums over "tensor" of results
      and of the residual stream's gradient.
    * "context": `nsa_jax.context.received_bytes`, again in every pass, the selected keys and values once more in the
      backward pass unless remat keeps what attention computed, and gradients on the way back. Attention on kernels,
      that is: other implementations compute it again whatever remat says.

    Left out are scalars and single numbers per token.

    Args:
      config: of the run.
      vocab_size: of the tokenizer.
      sizes: devices along `train.sharding.MESH_AXES`.
    """
    model, R, C = config.model, sizes["tensor"], sizes["context"]
    F = math.prod(sizes[name] for name in SHARE_AXES)
    shards = math.prod(sizes[name] for name in BATCH_AXES)
    z = jnp.dtype(model.dtype).itemsize
    passes = 1 if model.remat == "none" else 2
    batch = config.data.batch_size // config.optimizer.accumulate
    T = padded_length(config.data.sequence_length, C, model.nsa.compress_stride)
    rows, tokens = batch // shards, T // C
    total = dict.fromkeys(("parameters", "gradients", "tensor", "experts", "context"), 0.0)

    boxed = jax.eval_shape(Transformer(model, vocab_size).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    rules = dict(RULES)
    for path, box in jax.tree_util.tree_leaves_with_path(
        boxed["params"], is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    ):
        name = path[-1].key
        names = [axis for axis in box.names if axis != "embed"]
        split = math.prod([sizes[rules[axis]] for axis in names if rules[axis] is not None])
        size = math.prod(box.value.shape) / split * (4 if name in ("scale", "router_kernel") else z)
        if "expert" in names or name.startswith(("shared_", "router_")):
            alike = sizes["data"] * (1 if "expert" in names else sizes["expert"])
            total["experts"] += (_others(F) * (passes + 1) + 2 * _others(alike) / F) * size
            continue
        if "embed" in box.names:
            total["parameters"] += _others(F) * size * (passes if "layers" in names else 1)
        over_rows = shards // (sizes["expert"] if "expert" in names else 1)
        if not name.startswith("phi_"):
            if name == "embedding":  # each use's gradient is summed by itself, that of the tokens' rows in float32
                size = size / z * 4 + (size if model.tie_embeddings else 0)
            total["gradients"] += 2 * (_others(over_rows) + _others(C)) * size
        elif C > 1:  # summed by hand, over everything at once
            total["gradients"] += 2 * _others(over_rows * C * R) * size
        else:
            total["gradients"] += 2 * (_others(over_rows) + _others(R)) * size

    layers, residual = model.num_layers, rows * tokens * model.embed_dim * z
    nsa = model.attention == "nsa"
    branches = 3 if nsa and not model.share_kv else 1
    gate_hidden = rows * tokens * max(1, model.embed_dim // 4) * z if nsa else 0
    with_experts = layers - model.moe.first_dense if model.moe.num_routed else 0
    times = layers * (passes + 1 + 2 * branches) + (layers - with_experts) * (1 + 2) + 2
    total["tensor"] += 2 * _others(R) * (times * residual + layers * gate_hidden)

    # The weights of a token's experts, and as many bytes of indices. A second pass needs no results.
    routing = rows * tokens * model.moe.top_k * 4
    along_expert = (passes + 1) * (residual + routing) + passes * routing + 2 * residual
    total["experts"] += with_experts * ((sizes["expert"] - 1) * along_expert + 2 * 2 * _others(R) * residual)

    K, Dk = model.num_kv_heads // R, model.head_dim
    Dv = Dk if model.v_head_dim is None else model.v_head_dim
    heads = {"num_heads": model.num_heads // R, "num_kv_heads": K, "head_dim": Dk, "v_head_dim": Dv}
    once = received_bytes_over_context(model.attention, model.nsa, T=T, devices=C, **heads, itemsize=z)
    again = _others(C) * T * K * (Dk + Dv) * z if nsa and model.remat != "attention" else 0
    total["context"] += layers * rows * ((passes + 1) * once + again)
    return {purpose: config.optimizer.accumulate * size for purpose, size in total.items()}


def _others(devices: int) -> float:
    return (devices - 1) / devices
