"""The tables of README.md and docs/, each made from recorded results. `docs.figures` writes them into the pages."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.metrics import read_metrics

ROOT = Path(__file__).parents[1]
KERNELS = Path("pallas_kernels/benchmarks/results")
TRAINING = Path("train/results")

ATTENTIONS = {"nsa": "NSA", "full": "full"}  # as tables call them

Row = Sequence[object]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table in Markdown, from result files."""

    files: tuple[Path, ...]
    rows: Callable[..., list[Row]]  # from what is in each file; the first row is the heading


def read(file: Path) -> Any:
    """What a result file holds, and NAME.meta.json of .jsonl: the "steps" of a run, or the "runs" of an experiment."""
    if file.suffix != ".jsonl":
        return json.loads((ROOT / file).read_text())
    meta = json.loads((ROOT / file).with_suffix(".meta.json").read_text())
    if file in EXPERIMENTS:
        return {**meta, "runs": [json.loads(line) for line in (ROOT / file).read_text().splitlines()]}
    return {**meta, "steps": read_metrics(ROOT / file)}


def markdown(name: str) -> str:
    """A table and a line that says what was measured where and when.

    Raises:
      ValueError: there is no such table.
    """
    if name not in TABLES:
        raise ValueError(f"table: {name}: expected one of {', '.join(TABLES)}")
    table = TABLES[name]
    records = [read(file) for file in table.files]
    heading, *rows = (" | ".join(map(str, row)) for row in table.rows(*records))
    rule = "|".join(["---"] * (heading.count(" | ") + 1))
    lines = [f"| {heading} |", f"|{rule}|", *(f"| {row} |" for row in rows)]
    return "\n".join(lines) + f"\n\n{_origin(records)}\n"


def _origin(records: list[Any]) -> str:
    """Where and when each of the records was measured, once for each place."""
    found: dict[str, list[str]] = {}
    for record in records:
        origin = record["provenance"]
        device, jax = origin["device"], origin["versions"]["jax"]
        where = "a device that was not recorded" if device is None else f"{device['count']} x {device['kind']}"
        commit = "no commit" if origin["commit"] is None else f"commit {origin['commit'][:7]}"
        how = "recorded with " if "recorded_with" in origin else ""
        when = found.setdefault(where if jax is None else f"{where}, JAX {jax}", [])
        if (new := f"{origin['date'][:10]}, {how}{commit}") not in when:
            when.append(new)
    return "*Measured on " + "; ".join(f"{where} ({' and '.join(when)})" for where, when in found.items()) + ".*"


def _length(tokens: int) -> str:
    return f"{tokens // 2**20}M" if tokens >= 2**20 else f"{tokens // 1024}k"


def _three_digits(value: float) -> str:
    """Or as many as stand before the point."""
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def _both(row: dict[str, Any] | None) -> str:
    """Forward and backward; nothing where there is no such row."""
    if not row:
        return ""
    times = row["forward_ms"]["median"], row.get("backward_ms")
    return " / ".join(_three_digits(time) for time in times if time is not None)


def _times_as_fast(dense: dict[str, Any] | None, nsa: dict[str, Any] | None) -> str:
    if not dense or not nsa:
        return ""
    forward = dense["forward_ms"]["median"] / nsa["forward_ms"]["median"]
    return f"{forward:.2f} / {dense['backward_ms'] / nsa['backward_ms']:.2f}"


class _Ops:
    """The rows of files of `python -m pallas_kernels.benchmarks`, by length, op and selection.

    Of our kernels those of a backend; None: of the one that a file names first.
    """

    def __init__(self, records: Sequence[Any], backend: str | None = None):
        self.rows: dict[tuple[int, str, str | None], dict[str, Any]] = {}
        for record in records:
            backends = [row.get("backend") for row in record["rows"]]
            shown = {"cudnn", backend or next((each for each in backends if each != "cudnn"), None)}
            found = (row for row, each in zip(record["rows"], backends, strict=True) if each in shown)
            self.rows |= {(row["T"], row["op"], row["selection"]): row for row in found if "error" not in row}
        self.lengths = sorted({T for T, _, _ in self.rows})

    def __call__(self, T: int, op: str, selection: str | None = None) -> dict[str, Any] | None:
        return self.rows.get((T, op, selection))


PARTS = {
    "compressed attention": ("compressed_attention", None),
    "scoring and top-n": ("block_selection", None),
    "selected attention, random": ("selected_attention", "random"),
    "selected attention, local": ("selected_attention", "local"),
    "window": ("window_attention", None),
}
AGAINST_DENSE = (
    "dense (ms, forward / backward)",
    "NSA, random",
    "NSA, local",
    "dense / NSA, random",
    "dense / NSA, local",
)


def _against_dense(at: _Ops, T: int) -> Row:
    """The whole attention beside dense attention, and how many times as fast it is."""
    dense, random, local = at(T, "dense"), at(T, "nsa", "random"), at(T, "nsa", "local")
    ratios = (_times_as_fast(dense, nsa) for nsa in (random, local))
    return (*map(_both, (dense, random, local)), *ratios)


def speed(*records: Any) -> list[Row]:
    """The whole attention against dense attention."""
    at = _Ops(records)
    return [("tokens", *AGAINST_DENSE), *((_length(T), *_against_dense(at, T)) for T in at.lengths)]


def backends(record: Any) -> list[Row]:
    """The whole attention by the kernels of each backend, against dense attention."""
    at = {shown: _Ops([record], name) for name, shown in BACKENDS.items()}
    lengths = at["Triton"].lengths
    rows = [(_length(T), shown, *_against_dense(at[shown], T)) for T in lengths for shown in at]
    return [("tokens", "kernels", *AGAINST_DENSE), *rows]


def parts_by_backend(record: Any) -> list[Row]:
    """Both passes of each op by the kernels of each backend, and cuDNN's window."""
    at = [_Ops([record], name) for name in BACKENDS]
    table: list[Row] = [("tokens", "op", *(f"{name} (ms, forward / backward)" for name in BACKENDS.values()))]
    for T in at[0].lengths:
        table += [(_length(T), name, *(_both(of_backend(T, *op)) for of_backend in at)) for name, op in PARTS.items()]
    return table


def parts(record: Any) -> list[Row]:
    """The forward pass of each op by itself."""
    at = _Ops([record])
    table: list[Row] = [("tokens", *(f"{name} (ms)" for name in PARTS))]
    for T in at.lengths:
        table.append((_length(T), *(_three_digits(at.rows[T, *key]["forward_ms"]["median"]) for key in PARTS.values())))
    return table


def memory(*records: Any) -> list[Row]:
    """Of forward and backward, by the compiler's count."""
    at = _Ops(records)
    table: list[Row] = [("tokens", "NSA (GiB)", "dense (GiB)")]
    for T in at.lengths:
        found = (at(T, "nsa", "random"), at(T, "dense"))
        table.append((_length(T), *(f"{row['forward_backward_memory_gib']:.2f}" if row else "" for row in found)))
    return table


def paper_heads(record: Any) -> list[Row]:
    """The whole attention with random selection against dense attention, whose heads are padded."""
    at = _Ops([record])
    table: list[Row] = [("tokens", "dense, padded (ms, forward / backward)", "NSA", "dense / NSA")]
    for T in at.lengths:
        dense, nsa = at(T, "dense"), at(T, "nsa", "random")
        table.append((_length(T), _both(dense), _both(nsa), _times_as_fast(dense, nsa)))
    return table


def small_groups(record: Any) -> list[Row]:
    """The fastest tile of each way through the selected branch's forward pass."""
    ways = {
        "query-major": "query-major, one query",
        "query-major, several queries": "query-major, union of queries",
        "block-major": "block-major",
    }
    rows = [row for row in record["rows"] if row["pass"] == "forward"]
    table: list[Row] = [("query heads per key/value head", *(f"{name} (ms)" for name in ways))]
    for G in sorted({row["G"] for row in rows}):
        cells = []
        for way in ways.values():
            random, local = min((r["random_ms"], r["local_ms"]) for r in rows if (r["G"], r["path"]) == (G, way))
            cells.append(f"{_three_digits(random)} / {_three_digits(local)}")
        table.append((G, *cells))
    return table


def window(*records: Any) -> list[Row]:
    """Our window and cuDNN's."""
    table: list[Row] = [("tokens", "heads, key/value heads, size", "ours, forward / backward (ms)", "cuDNN")]
    for record in records:
        at, shape = _Ops([record]), record["shape"]
        for T in at.lengths:
            heads = f"{shape['H']}, {shape['K']}, {shape['Dk']}"
            table.append((_length(T), heads, _both(at(T, "window_attention")), _both(at(T, "dense_window"))))
    return table


def decoding(record: Any) -> list[Row]:
    """One layer's step."""
    table: list[Row] = [("batch", "tokens", "NSA (ms)", "dense (ms)", "dense / NSA", "bandwidth, NSA")]
    for row in sorted(record["rows"], key=lambda row: (row["batch"], row["T"])):
        times = (f"{row[f'{name}_ms']['median']:.3f}" for name in ("nsa", "dense"))
        share = f"{row['nsa_bandwidth_share']:.0%}"
        table.append((row["batch"], _length(row["T"]), *times, f"{row['dense / nsa']:.2f}", share))
    return table


def model_decoding(record: Any) -> list[Row]:
    """A whole model's step."""
    at = {(row["attention"], row["batch"]): row for row in record["rows"]}
    table: list[Row] = [("batch", "NSA, tokens/s", "full, tokens/s", "NSA / full", "caches, NSA / full (GiB)")]
    for batch in record["batches"]:
        nsa, full = at["nsa", batch], at["full", batch]
        speeds = nsa["tokens_per_second"], full["tokens_per_second"]
        caches = f"{_three_digits(nsa['cache_gib'])} / {_three_digits(full['cache_gib'])}"
        table.append((batch, *(f"{speed:,.0f}" for speed in speeds), f"{speeds[0] / speeds[1]:.2f}", caches))
    return table


def decoding_kernels(record: Any) -> list[Row]:
    """What a GPU does in a whole model's step, the longest first."""
    table: list[Row] = [("attention, batch", "kernel", "launches a step", "us a step")]
    for row in record["rows"]:
        name, profile = f"{row['attention']}, {row['batch']}", row["profile"]
        table += [
            (name, each["name"].split("(")[0], f"{each['launches']:.4g}", f"{each['us']:.1f}")
            for each in profile["kernels"]
            if each["us"] >= 0.02 * profile["busy_us"]
        ]
        table.append((name, "all", f"{profile['launches']:.4g}", f"{profile['busy_us']:.0f}"))
        table.append((name, "between them", "", f"{profile['idle_us']:.0f}"))
    return table


def training(record: Any) -> list[Row]:
    """Tokens per second of a training step, by length."""
    at = {(row["attention"], row["length"]): row for row in record["rows"]}
    table: list[Row] = [
        ("context", "NSA, tokens/s (MFU)", "full, tokens/s (MFU)", "NSA / full", "memory, NSA / full (GiB)")
    ]
    for length in record["lengths"]:
        nsa, full = at["nsa", length], at["full", length]
        cells = (f"{r['tokens_per_second']:,.0f} ({r['model_flop_utilisation']:.1%})" for r in (nsa, full))
        ratio = nsa["tokens_per_second"] / full["tokens_per_second"]
        memory = f"{nsa['memory_gib']:.1f} / {full['memory_gib']:.1f}"
        table.append((_length(length), *cells, f"{ratio:.2f}", memory))
    return table


def determinism(record: Any) -> list[Row]:
    """Speed and memory of a training step whose gradients repeat bit for bit, and of one whose need not."""
    table: list[Row] = [("attention", "gradients", "tokens/s, median", "lowest to highest", "memory (GiB)")]
    for row in record["rows"]:
        gradients = "may differ" if "do not repeat" in row["determinism"] else "repeat"
        speed, span = f"{row['tokens_per_second']:,.0f}", f"{row['lowest']:,.0f} to {row['highest']:,.0f}"
        table.append((row["attention"], gradients, speed, span, f"{row['memory_gib']:.1f}"))
    return table


def _by_mesh(record: Any) -> dict[tuple[str, int, str], Any]:
    return {
        (row["attention"], row["length"], ", ".join(f"{axis} {n}" for axis, n in row["mesh"].items())): row
        for row in record["rows"]
    }


def meshes(record: Any) -> list[Row]:
    """Tokens per second on each device."""
    at = _by_mesh(record)
    names = [mesh for mesh in dict.fromkeys(mesh for _, _, mesh in at) if mesh]
    table: list[Row] = [("attention", "tokens", "one GPU, tokens/s", *(f"{mesh}, tokens/s on each" for mesh in names))]
    for attention in record["attentions"]:
        for length in record["lengths"]:
            alone = at[attention, length, ""]["tokens_per_second"]
            cells = []
            for mesh in names:
                row = at[attention, length, mesh]
                each = row["tokens_per_second"] / row["devices"]
                cells.append(f"{each:,.0f} ({each / alone:.0%})")
            table.append((ATTENTIONS[attention], _length(length), f"{alone:,.0f}", *cells))
    return table


def communication(record: Any) -> list[Row]:
    """Milliseconds of a step that devices communicate, and of these the hidden ones."""
    at = _by_mesh(record)
    names = [mesh for mesh in dict.fromkeys(mesh for _, _, mesh in at) if mesh]
    table: list[Row] = [("attention", "tokens", *(f"{mesh}: communication, hidden (ms)" for mesh in names))]
    for attention in record["attentions"]:
        for length in record["lengths"]:
            found = [at[attention, length, mesh]["seconds_of_a_step"] for mesh in names]
            cells = (f"{1e3 * x['communication_s']:.0f}, {1e3 * x['hidden_s']:.0f}" for x in found)
            table.append((ATTENTIONS[attention], _length(length), *cells))
    return table


def context(*records: Any) -> list[Row]:
    """One layer's attention with its tokens split over devices."""
    table: list[Row] = [
        ("tokens", "device", "one, forward / backward (ms)", "one (GiB)", "two, forward / backward (ms)", "two (GiB)")
    ]
    found = []
    for record in records:
        kind = record["provenance"]["device"]["kind"].removeprefix("NVIDIA ").split()[0]
        at = {(row["T"], row["devices"]): row for row in record["rows"] if "error" not in row}
        for T in record["lengths"]:
            cells = []
            for devices in (1, 2):
                row = at.get((T, devices))
                cells += [_both(row), f"{row['both_memory_gib']:.0f}" if row else ""]
            found.append((T, kind, cells))
    return table + [(_length(T), kind, *cells) for T, kind, cells in sorted(found)]


def quality(*records: Any) -> list[Row]:
    """Held-out loss at the end of a run with each attention."""
    table: list[Row] = [("attention", "training tokens", "held-out bits per byte")]
    for run in records:
        end = run["steps"][-1]
        tokens = end["step"] * run["tokens_per_step"]
        shown = f"{tokens / 1e6:.3g}M" if tokens >= 1e6 else f"{tokens / 1e3:.3g}k"
        layout = f", {run['layout']} layout" if "layout" in run else ""
        table.append((ATTENTIONS[run["attention"]] + layout, shown, f"{end['held_out_bits_per_byte']:.3f}"))
    return table


def experts(*records: Any) -> list[Row]:
    """How evenly experts are used at the end of runs with the balancing bias and without."""
    table: list[Row] = [("", "largest load / mean load, last 25 steps", "held-out bits per byte")]
    for name, run in zip(("with the balancing bias", "without"), records, strict=True):
        load = statistics.mean(step["router_load_mean"] for step in run["steps"][-25:])
        table.append((name, f"{load:.2f}", f"{run['steps'][-1]['held_out_bits_per_byte']:.3f}"))
    return table


def positions(*records: Any) -> list[Row]:
    """Held-out bits per byte by position."""
    table: list[Row] = [("positions", *LONG_CONTEXT)]
    for buckets in zip(*(record["buckets"] for record in records), strict=True):
        losses = (f"{bucket['bits_per_byte']:.3f}" for bucket in buckets)
        table.append((f"{buckets[0]['begin']} to {buckets[0]['end'] - 1}", *losses))
    return table


def arms(record: Any) -> list[Row]:
    """Held-out loss of kinds of attention under one recipe, by seed."""
    table: list[Row] = [
        (
            "attention",
            "parameters",
            "seeds",
            "loss, nats per token",
            "bits per byte, mean",
            "first 1024 positions",
            "last 4096",
        )
    ]
    for name, shown in ARMS.items():
        runs = [run for run in record["runs"] if run["name"] == name]
        finals = [run["final"] for run in runs]
        eighths = [statistics.mean(final["loss_by_eighth"][i] for final in finals) for i in range(8)]
        table.append(
            (
                shown,
                f"{runs[0]['parameters'] / 1e6:.1f}M",
                len(runs),
                ", ".join(f"{final['loss']:.3f}" for final in finals),
                f"{statistics.mean(final['bits_per_byte'] for final in finals):.3f}",
                f"{eighths[0]:.3f}",
                f"{statistics.mean(eighths[4:]):.3f}",
            )
        )
    return table


def selection(record: Any) -> list[Row]:
    """The share of attention that chosen blocks hold, averaged over layers and heads, and their skill by layer."""
    table: list[Row] = [("attention", "seed", "random", "chosen", "best possible", "skill, first layer to last")]
    for name, shown in ARMS.items():
        for run in record["runs"]:
            if run["name"] != name or run["selection"] is None:
                continue
            means = (statistics.mean(map(statistics.mean, run["selection"][w])) for w in ("random", "chosen", "best"))
            table.append((shown, run["seed"], *(f"{mean:.2f}" for mean in means), _skill_by_layer(run["selection"])))
    return table


def pooling(record: Any) -> list[Row]:
    """Held-out loss and skill of selection for several phi, by seed."""
    table: list[Row] = [("attention", "seed", "loss, nats per token", "bits per byte", "skill, first layer to last")]
    for name, shown in POOLING.items():
        for run in record["runs"]:
            if run["name"] == name:
                final = run["final"]
                skill = "" if run["selection"] is None else _skill_by_layer(run["selection"])
                table.append((shown, run["seed"], f"{final['loss']:.3f}", f"{final['bits_per_byte']:.3f}", skill))
    return table


def tokens_100m(record: Any) -> list[Row]:
    """Held-out loss of NSA's default layout and of full attention, by seed and by position."""
    table: list[Row] = [
        ("attention", "seed", "loss, nats per token", "bits per byte", "first 1024", "last 4096", "skill by layer")
    ]
    for name, shown in TOKENS_100M.items():
        for run in record["runs"]:
            if run["name"] == name:
                final = run["final"]
                by_position = final["bits_per_byte_by_sixteenth"]
                parts = (statistics.mean(part) for part in (by_position[:2], by_position[8:]))
                table.append(
                    (
                        shown,
                        run["seed"],
                        f"{final['loss']:.3f}",
                        f"{final['bits_per_byte']:.3f}",
                        *(f"{part:.3f}" for part in parts),
                        "" if run["selection"] is None else _skill_by_layer(run["selection"]),
                    )
                )
    return table


def tokens_100m_means(record: Any) -> list[Row]:
    """Held-out loss of kinds of attention, as means over seeds, beside full attention of the same seeds."""
    losses = {(run["name"], run["seed"]): run["final"] for run in record["runs"]}
    table: list[Row] = [("attention", "seeds", "loss, nats per token", "beside full attention", "last half of the row")]
    for name, shown in TOKENS_100M.items():
        pairs = [(losses[each], losses["full", each[1]]) for each in losses if each[0] == name]
        late = [[statistics.mean(one["bits_per_byte_by_sixteenth"][8:]) for one in pair] for pair in pairs]
        ratios = (
            statistics.mean(own / full for own, full in both)
            for both in ([[one["loss"] for one in pair] for pair in pairs], late)
        )
        shares = ("" if name == "full" else f"{100 * (ratio - 1):+.1f}%" for ratio in ratios)
        table.append((shown, len(pairs), f"{statistics.mean(own['loss'] for own, _ in pairs):.3f}", *shares))
    return table


def conversion(record: Any) -> list[Row]:
    """Held-out loss of a dense checkpoint that goes over to NSA, and of the same one trained further as it is."""
    runs = {run["name"]: {each["tokens"]: each for each in run["evals"]} for run in record["runs"]}
    table: list[Row] = [("tokens of training", "full attention", "NSA", "difference", "NSA as annealed so far")]
    for tokens, nsa in runs["nsa"].items():
        full = runs["full"].get(tokens)
        annealed = nsa.get("loss_as_trained")
        table.append(
            (
                f"{tokens / 1e6:.0f}M" if tokens else "0",
                "" if full is None else f"{full['loss']:.4f}",
                f"{nsa['loss']:.4f}",
                "" if full is None else f"{100 * (nsa['loss'] / full['loss'] - 1):+.1f}%",
                "" if annealed is None else f"{annealed:.4f}",
            )
        )
    return table


def _skill_by_layer(shares: dict[str, list[list[float]]]) -> str:
    """(chosen - random) / (best - random) of each layer, from the shares of its heads."""
    means = ([statistics.mean(layer) for layer in shares[what]] for what in ("random", "chosen", "best"))
    return " ".join(f"{(chosen - random) / (best - random):.2f}" for random, chosen, best in zip(*means, strict=True))


def needle(*records: Any) -> list[Row]:
    """Needles that a pretrained model finds, of all and by length."""
    table: list[Row] = []
    for name, record in zip(NEEDLES, records, strict=True):
        lengths = sorted({cell["length"] for cell in record["cells"]})
        table = table or [("model", "all", *(f"{_length(length)} tokens" for length in lengths))]
        found = []
        for chosen in (lengths, *([length] for length in lengths)):
            cells = [cell for cell in record["cells"] if cell["length"] in chosen]
            found.append(f"{sum(cell['solved'] for cell in cells)} of {sum(cell['problems'] for cell in cells)}")
        table.append((name, *found))
    return table


def plan(record: Any) -> list[Row]:
    """What a step of a large model would take."""
    table: list[Row] = [
        ("rows x tokens", "mesh", "memory (GB)", "received, counted (GB)", "by formula (GB)", "by formula in bf16 (GB)")
    ]
    for row in record["rows"]:
        mesh = ", ".join(f"{axis} {n}" for axis, n in row["mesh"].items())
        received = f"{row['received_gb']:.2f}", f"{row['predicted_gb']:.2f}", f"{row['predicted_bf16_gb']:.1f}"
        table.append((f"{row['rows']} x {_length(row['length'])}", mesh, f"{row['memory_gb']:.1f}", *received))
    return table


def pretrained(record: Any) -> list[Row]:
    """How far a pretrained model's numbers are from those of transformers."""
    same = [record[f"same_{name}"] for name in ("continuation", "tokens")]
    words = ["the same" if value else "another" for value in same]
    versions = f"transformers {record['packages']['transformers']}, PyTorch {record['packages']['torch']}"
    return [
        (
            "file",
            f"error of the logits of {record['tokens']} tokens",
            "same first choice",
            "continuation",
            "tokens",
            "beside",
        ),
        (
            record["model"]["source"],
            f"{record['relative_error']:.1e}",
            f"{record['same_first_choice']:.1%}",
            *words,
            versions,
        ),
    ]


ARMS = {
    "full": "full attention",
    "nsa_mean_shared_fine": "NSA: mean, shared keys and values, fine blocks",
    "nsa_mean_shared": "NSA: mean, shared keys and values",
    "nsa_tied_fine": "NSA: tied keys, fine blocks",
    "nsa": "NSA: the paper's layout",
}
POOLING = {
    "full": "full attention",
    "nsa_mean_of_rotated_fine": "NSA: means of rotated keys, fine blocks",
    "nsa_mean_fine": "NSA: means rotated afterwards, fine blocks",
    "nsa_residual_fine": "NSA: means of rotated keys and an MLP added, fine blocks",
    "nsa_mean_of_rotated": "NSA: means of rotated keys",
}
TOKENS_100M = {
    "full": "full attention",
    "nsa": "NSA",
    "nsa_beyond": "NSA, blocks before the window",
    "nsa_fine": "NSA, compressed 16/8, 32 blocks of 32",
    "nsa_more": "NSA, 32 blocks of 64",
    "nsa_fine_more": "NSA, compressed 16/8, 64 blocks of 32",
}
BACKENDS = {"triton": "Triton", "mosaic": "Mosaic"}
RECIPE_ARMS = TRAINING / "h100_60m_recipe_arms.jsonl"
POOLING_RUNS = TRAINING / "h100_60m_pooling.jsonl"
LONGER_RUNS = TRAINING / "h100_60m_100m.jsonl"
CONVERSION = TRAINING / "smollm2_conversion.jsonl"
NEEDLES = {
    "dense, as it is": TRAINING / "smollm2_needle.json",
    "full attention, trained further": TRAINING / "smollm2_needle_full.json",
    "NSA": TRAINING / "smollm2_needle_nsa.json",
}
EXPERIMENTS = (RECIPE_ARMS, POOLING_RUNS, LONGER_RUNS, CONVERSION)  # files with a line for each run
SPEED = (KERNELS / "nsa_h100.json",)
TRITON_SPEED = KERNELS / "nsa_triton_h100.json"
H100_60M = tuple(TRAINING / f"h100_60m_{attention}.jsonl" for attention in ("nsa", "full"))
TINY = tuple(TRAINING / f"tiny_{attention}.jsonl" for attention in ("nsa", "full", "nsa_paper"))
MOE = tuple(TRAINING / f"tiny_moe_{name}.jsonl" for name in ("balanced", "unbalanced"))
LONG_CONTEXT = {
    "1k model, no scaling": TRAINING / "long_context_1k_plain.json",
    "1k model, YaRN": TRAINING / "long_context_1k_yarn.json",
    "continued at 4k, no scaling": TRAINING / "long_context_4k_plain.json",
    "continued at 4k, YaRN": TRAINING / "long_context_4k_yarn.json",
}

TABLES = {
    "speed": Table(SPEED, speed),
    "speed_backends": Table((KERNELS / "backends_h100.json",), backends),
    "speed_parts": Table((TRITON_SPEED,), parts),
    "speed_parts_backends": Table((KERNELS / "backends_h100.json",), parts_by_backend),
    "memory": Table(SPEED, memory),
    "speed_paper_heads": Table((KERNELS / "paper_shape_h100.json",), paper_heads),
    "speed_small_groups": Table((KERNELS / "selected_attention_small_groups_h100.json",), small_groups),
    "window": Table((TRITON_SPEED, KERNELS / "window_g1_h100.json", KERNELS / "window_h64_h100.json"), window),
    "decoding_layer": Table((KERNELS / "decode_attention_h100.json",), decoding),
    "decoding_model": Table((TRAINING / "h100_350m_decoding.json",), model_decoding),
    "decoding_kernels": Table((TRAINING / "h100_350m_decoding.json",), decoding_kernels),
    "training_speed": Table((TRAINING / "h100_350m_speed.json",), training),
    "training_speed_full_remat": Table((TRAINING / "h100_350m_speed_full_remat.json",), training),
    "determinism": Table((TRAINING / "h100_60m_deterministic.json",), determinism),
    "meshes": Table((TRAINING / "h100x2_350m_speed.json",), meshes),
    "communication": Table((TRAINING / "h100x2_350m_speed.json",), communication),
    "context": Table(
        tuple(TRAINING / f"{name}.json" for name in ("h100x2_context", "h200x2_context", "h200x2_context_1m")), context
    ),
    "quality_60m": Table(H100_60M, quality),
    "quality_tiny": Table(TINY, quality),
    "moe_balance": Table(MOE, experts),
    "long_context": Table(tuple(LONG_CONTEXT.values()), positions),
    "quality_recipe": Table((RECIPE_ARMS,), arms),
    "selection": Table((RECIPE_ARMS,), selection),
    "pooling": Table((POOLING_RUNS,), pooling),
    "quality_100m": Table((LONGER_RUNS,), tokens_100m),
    "quality_100m_means": Table((LONGER_RUNS,), tokens_100m_means),
    "pretrained": Table((TRAINING / "smollm2_135m_transformers.json",), pretrained),
    "conversion": Table((CONVERSION,), conversion),
    "needle": Table(tuple(NEEDLES.values()), needle),
    "plan": Table((TRAINING / "plan_paper_27b.json",), plan),
}
