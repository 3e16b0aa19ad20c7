"""Files of every format that the loader takes, and ways in which they come damaged."""

import bz2
import gzip
import io
import json
import lzma

import numpy as np
import pyarrow
from backports import zstd
from pyarrow import feather, ipc, parquet

TEXTS = [f"document {i}: naïve café, 東京 🙂 {'x' * i}" for i in range(6)]
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TALKS = [
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": f"question {i}"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {"role": "assistant", "content": f"answer {i}", "weight": i % 2},
    ]
    for i in range(4)
]
PLAIN_TALKS = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a 🙂"}] for i in range(4)]
SHAREGPT = [{"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": "a"}]} for i in range(4)]
COMPLETIONS = [{"prompt": f"question {i}", "completion": "answer"} for i in range(4)]


def lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def written(write, table):
    file = io.BytesIO()
    write(table, file)
    return file.getvalue()


def stream(table, file):
    with ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def array(values):
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def undamaged():
    """(data.format, ending, bytes, documents) of every kind of file."""
    records = [{"text": text} for text in TEXTS]
    table = pyarrow.table({"id": range(6), "text": TEXTS})
    talks = pyarrow.table({"messages": PLAIN_TALKS})
    files = [
        ("auto", ".txt", "\n".join(TEXTS).encode(), 1),
        ("auto", ".jsonl", lines(records), 6),
        ("auto", ".json", json.dumps(records).encode(), 6),
        ("auto", ".json", json.dumps(records[0], indent=1).encode(), 1),
        ("auto", ".json", lines(records), 6),
        ("auto", ".parquet", written(parquet.write_table, table), 6),
        ("auto", ".parquet", written(lambda *args: parquet.write_table(*args, compression="zstd"), table), 6),
        ("auto", ".parquet", written(lambda *args: parquet.write_table(*args, write_page_checksum=True), table), 6),
        (
            "auto",
            ".parquet",
            written(parquet.write_table, pyarrow.table({"text": pyarrow.array(TEXTS, "string_view")})),
            6,
        ),
        (
            "auto",
            ".parquet",
            written(parquet.write_table, pyarrow.table({"text": table["text"].dictionary_encode()})),
            6,
        ),
        ("auto", ".arrow", written(lambda *args: feather.write_feather(*args, compression="uncompressed"), table), 6),
        ("auto", ".feather", written(lambda *args: feather.write_feather(*args, compression="zstd"), table), 6),
        ("auto", ".arrow", written(stream, table), 6),
        ("auto", ".npy", array(np.arange(40, dtype=np.uint16)), 0),
        ("auto", ".bin", np.arange(40, dtype=np.uint16).tobytes(), 0),
        ("chat", ".jsonl", lines({"messages": talk, "tools": [{"name": "f"}]} for talk in TALKS), 4),
        ("chat", ".json", json.dumps([{"messages": talk} for talk in TALKS]).encode(), 4),
        ("chat", ".parquet", written(parquet.write_table, talks), 4),
        ("chat", ".arrow", written(stream, talks), 4),
        ("sharegpt", ".jsonl", lines(SHAREGPT), 4),
        ("sharegpt", ".parquet", written(parquet.write_table, pyarrow.Table.from_pylist(SHAREGPT)), 4),
        ("prompt-completion", ".jsonl", lines(COMPLETIONS), 4),
        ("prompt-completion", ".parquet", written(parquet.write_table, pyarrow.Table.from_pylist(COMPLETIONS)), 4),
    ]
    return files + [
        (name, ending + packed, compress(data), documents)
        for name, ending, data, documents in files
        for packed, compress in COMPRESS.items()
        if ending in (".txt", ".jsonl", ".json") or packed == ".gz"
    ]


def truncated(data, rng):
    return data[: rng.integers(len(data) + 1)]


def flipped(data, rng):
    """One to eight bits."""
    values = np.frombuffer(data, np.uint8).copy()
    for bit in rng.integers(8 * len(values), size=rng.integers(1, 9)):
        values[bit // 8] ^= 1 << (bit % 8)
    return values.tobytes()


def overwritten(data, rng):
    begin = rng.integers(len(data))
    return data[:begin] + rng.bytes(rng.integers(1, 20)) + data[begin + rng.integers(20) :]


def zeroed(data, rng):
    begin, size = rng.integers(len(data)), rng.integers(1, 200)
    return data[:begin] + bytes(len(data[begin : begin + size])) + data[begin + size :]


def continued(data, rng):
    return data + rng.bytes(rng.integers(1, 40))


def doubled(data, rng):
    return data + data


def reencoded(data, rng):
    """Text in another encoding; of other files, their bytes taken for text."""
    text = data.decode("utf-8", errors="replace") if rng.integers(4) else data.decode("latin-1")
    encoding = rng.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "utf-8-sig", "shift-jis"])
    return text.encode(str(encoding), errors="replace")


def renamed(data, rng):
    """Other columns or fields, where names are not compressed."""
    old = [b"text", b"messages", b"role", b"content", b"from", b"conversations", b"prompt", b"completion"]
    present = [name for name in old if name in data] or [b"a"]
    name = present[rng.integers(len(present))]
    return data.replace(name, name[::-1])


def retyped(data, rng):
    """Numbers, nulls and lists where there was text."""
    values = [b"null", b"3", b"[]", b'["a"]', b"{}", b'"\\ud800"', b"1e999", b"[" * 2000]
    parts = data.split(b'"')
    if len(parts) < 4:
        return flipped(data, rng)
    at = 2 * rng.integers((len(parts) - 1) // 2) + 1
    value = values[rng.integers(len(values))]
    return b'"'.join(parts[:at]) + value + b'"'.join(parts[at + 1 :])


DAMAGES = [truncated, flipped, overwritten, zeroed, continued, doubled, reencoded, renamed, retyped]
ENDINGS = [".txt", ".jsonl", ".json", ".parquet", ".arrow", ".jsonl.gz", ".json.zst", ".txt.xz", ".bz2", ".npy", ""]


def damaged(number, files):
    """The `number`-th damaged file: data.format, ending, bytes and what was done; always the same."""
    rng = np.random.default_rng(number)
    name, ending, data, _ = files[number % len(files)]
    damage = DAMAGES[number // len(files) % len(DAMAGES)]
    done = damage.__name__
    data = damage(data, rng)
    if rng.integers(10) == 0:
        ending = ENDINGS[rng.integers(len(ENDINGS))]
        done += " and named otherwise"
    return name, ending, data, f"{done} {ending} of format {name}"
