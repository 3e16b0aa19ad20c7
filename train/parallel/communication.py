"""What the devices of a mesh send one another: counted in a compiled program, and timed in a trace."""

import collections
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from train.trace import kernels, length, union

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
        """Bytes that a device receives in one run, by the algorithms that send least (rings)."""
        others = (self.devices - 1) / self.devices
        factor = {"all-reduce": 2 * others, "reduce-scatter": self.devices - 1, "collective-permute": 1}
        return self.times * self.result_bytes * factor.get(self.kind, others)


def collectives(program: str) -> list[Collective]:
    """Every collective in the text of a compiled program (`compiled.as_text()`), with how often its loops run it.

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
    """Devices in one replica group. HLO writes groups in three ways."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match.group(2))
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return match.group(1).count(",") + 1
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match.group(1))}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", match.group(2)))
    return 2  # a permutation: pairs


def _result_bytes(types: str, *, paired: bool) -> int:
    """Bytes of an instruction's results. Asynchronous ones are `paired`: operands come first, and counters last."""
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
      Seconds of one GPU, on average. In "communication_s" a collective runs (or waits for the other GPUs). "hidden_s"
      is the part of that time in which other kernels run too. In "computation_s" other kernels run.

    Raises:
      ValueError: the trace has no kernel of a GPU.
    """
    of_gpus = kernels(profile)
    totals: dict[str, float] = dict.fromkeys(("communication_s", "hidden_s", "computation_s"), 0.0)
    for gpu in of_gpus:
        communication = union((begin, end) for name, begin, end in gpu if name.startswith("nccl"))
        computation = union((begin, end) for name, begin, end in gpu if not name.startswith("nccl"))
        both = length(communication) + length(computation) - length(union([*communication, *computation]))
        totals["communication_s"] += length(communication) / 1e9
        totals["hidden_s"] += both / 1e9
        totals["computation_s"] += length(computation) / 1e9
    return {name: seconds / len(of_gpus) for name, seconds in totals.items()}
