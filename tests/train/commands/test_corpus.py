"""A corpus of packages: in order, without copies, and read back by the trainer."""

import json
import tarfile
import zipfile

import pytest

from train.__main__ import main
from train.config import DataConfig
from train.data.corpus import load_corpus


@pytest.fixture
def sources(tmp_path):
    """A folder with two packages and files of its own, a wheel and a tar."""
    root = tmp_path / "packages"
    for path, text in {
        "a/z.py": "z = 1\n",
        "a/b/c.py": "c = 1\n",
        "a/b/copy.py": "z = 1\n",
        "a/data.bin": "no source",
        "a/__pycache__/x.py": "left out",
        "e/long.py": "x" * 1000,
        "e/empty.py": " \n",
        "e/f.c": "int f;\n",
        "e/short.c": "i\n",
        "own.py": "own = 1\n",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    (root / "e" / "latin.py").write_bytes("# é".encode("latin-1"))
    (root / "e" / "link.py").symlink_to(root / "own.py")
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr("w/b.py", "b = 1\n")
        wheel.writestr("w/a.py", "a = 1\n")
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz") as tar:
        tar.add(root / "a" / "b", arcname="t")
    return [str(root), str(tmp_path / "w.whl"), str(tmp_path / "t.tar.gz")]


def test_packages_become_files_in_order_without_copies(sources, tmp_path, capsys):
    out = tmp_path / "corpus"
    settings = ["--min-file-bytes", "3", "--max-file-bytes", "500", "--min-package-bytes", "1"]
    assert main(["corpus", "--out", str(out), "--sources", *sources, *settings]) == 0
    found = {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in sorted(out.iterdir())}
    assert {name: [document["path"] for document in documents] for name, documents in found.items()} == {
        "00000-packages.jsonl": ["own.py"],
        "00001-a.jsonl": ["a/z.py", "a/b/c.py"],
        "00002-e.jsonl": ["e/f.c"],
        "00003-w.whl.jsonl": ["w/a.py", "w/b.py"],  # all of t.tar.gz are copies
    }
    assert found["00001-a.jsonl"][1]["text"] == "c = 1\n"
    report = json.loads((tmp_path / "corpus.json").read_text())
    assert report["files"] == 6
    assert report["left_out"] == {"copies": 3, "not UTF-8": 1, "too short": 1, "too long": 1, "empty": 1}
    corpus = load_corpus(DataConfig(str(out), held_out_by="file", held_out_fraction=0.4))
    sides = [{side.name(i) for i in range(len(side))} for side in (corpus.train, corpus.held_out)]
    assert min(map(len, sides)) > 0
    assert not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--sources", "nowhere"], "sources: nowhere: expected a folder or an archive"),
        (["--max-file-bytes", "0"], "max_file_bytes = 0: expected at least 1"),
        (["--min-file-bytes", "0"], "min_file_bytes = 0: expected at least 1"),
        (["--min-package-bytes", "1000000000"], "sources: no package of 1000000000 bytes in"),
        (["--sources", "broken.whl"], "sources: broken.whl: cannot be read"),
        (["--out", "full"], "out = full: expected a folder that is empty or not there yet"),
    ],
)
def test_wrong_settings_are_named(sources, tmp_path, monkeypatch, wrong, message, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.whl").write_bytes(b"PK\x03\x04 broken")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["corpus", "--out", "corpus", "--sources", *sources, *wrong]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "corpus").exists()
