"""The tables and pictures of README.md and docs/, made from the recorded results: `python -m docs.figures`.

In a page, a table stands between two comments, and what stands there is written by this program:

    <!-- table: speed -->
    <!-- end -->

Pictures are written into docs/figures. Each holds a digest of the results that it shows, and is drawn again when they
have changed, or when it is not there. `--list` names all tables and pictures and the files that they come from.
"""

import dataclasses
import functools
import hashlib
import re
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from docs.tables import H100_60M, LONG_CONTEXT, MOE, ROOT, SPEED, TABLES, TINY, markdown, read
from pallas_kernels.benchmarks import plot
from train.plot import plot_curves, plot_loads, plot_positions

PICTURES_FOLDER = Path("docs/figures")
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
KEYWORD = b"Results"  # of the PNG's text that holds the digest


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG, from result files."""

    files: tuple[Path, ...]
    write: Callable[[Path], None]


def pages() -> list[Path]:
    """The pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def with_tables(text: str) -> str:
    """A page with every table as the results give it."""
    return MARKED.sub(lambda found: f"{found[1]}{markdown(found[2])}{found[3]}", text)


def digest(files: Sequence[Path]) -> str:
    """Of the contents of result files."""
    found = hashlib.sha256()
    for file in files:
        found.update(file.name.encode() + (ROOT / file).read_bytes())
    return found.hexdigest()


def digest_in(png: bytes) -> str | None:
    """The digest that a picture holds, if it does."""
    found = re.search(KEYWORD + rb"\0([0-9a-f]{64})", png)
    return found[1].decode() if found else None


def with_digest(png: bytes, value: str) -> bytes:
    """The picture, with a chunk of text after its header (PNG specification, section 11.3.4.3)."""
    text = KEYWORD + b"\0" + value.encode()
    chunk = len(text).to_bytes(4) + b"tEXt" + text + zlib.crc32(b"tEXt" + text).to_bytes(4)
    return png[:33] + chunk + png[33:]


def _write_speed(path: Path) -> None:
    records = [read(file) for file in SPEED]
    plot.plot([row for record in records for row in record["rows"]], path, plot.describe(records[0]))


def _write_curves(path: Path, nsa: Path, full: Path) -> None:
    plot_curves({"NSA": ROOT / nsa, "full": ROOT / full}, path, read(nsa)["tokens_per_step"])


def _write_positions(path: Path) -> None:
    plot_positions({name: ROOT / file for name, file in LONG_CONTEXT.items()}, path)


def _write_loads(path: Path) -> None:
    plot_loads(
        {name: ROOT / file for name, file in zip(("with the balancing bias", "without"), MOE, strict=True)}, path
    )


PICTURES = {
    "speed.png": Picture(SPEED, _write_speed),
    "h100_60m.png": Picture(H100_60M, functools.partial(_write_curves, nsa=H100_60M[0], full=H100_60M[1])),
    "tiny.png": Picture(TINY[:2], functools.partial(_write_curves, nsa=TINY[0], full=TINY[1])),
    "long_context.png": Picture(tuple(LONG_CONTEXT.values()), _write_positions),
    "tiny_moe_loads.png": Picture(MOE, _write_loads),
}


def main(arguments: list[str]) -> None:
    """Writes every table and every picture that differs from the results, and says which."""
    if arguments == ["--list"]:
        for name, made in {**TABLES, **{str(PICTURES_FOLDER / name): p for name, p in PICTURES.items()}}.items():
            print(f"{name}: {', '.join(map(str, made.files))}")
        return
    if arguments:
        raise SystemExit("usage: python -m docs.figures [--list]")
    for page in pages():
        text = page.read_text()
        if (new := with_tables(text)) != text:
            page.write_text(new)
            print(f"wrote the tables of {page.relative_to(ROOT)}")
    for name, picture in PICTURES.items():
        path, value = ROOT / PICTURES_FOLDER / name, digest(picture.files)
        if not path.exists() or digest_in(path.read_bytes()) != value:
            path.parent.mkdir(exist_ok=True)
            picture.write(path)
            path.write_bytes(with_digest(path.read_bytes(), value))
            print(f"drew {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])
