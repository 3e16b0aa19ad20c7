"""Every recorded result says where it comes from, and every table and picture is what the results give."""

import json
import re
import subprocess
import sys

import pytest

from docs import figures, tables
from pallas_kernels.benchmarks import provenance

FOLDERS = (figures.ROOT / tables.KERNELS, figures.ROOT / tables.TRAINING)
RESULTS = sorted(
    path for folder in FOLDERS for path in folder.iterdir() if path.suffix in (".json", ".jsonl") and path.is_file()
)
# Recorded before results said where they come from. Some of it was found in the history, README.md and the files.
OLD = {
    *("block_selection_h100", "compressed_attention_h100", "decode_attention_h100", "nsa_triton_h100"),
    *("paper_shape_h100", "selected_attention_small_groups_h100", "window_g1_h100", "window_h64_h100"),
    *("h100_350m_speed", "h100x2_350m_speed", "h100x2_context"),
    *("h200x2_context", "h200x2_context_1m", "long_context_1k_plain", "long_context_1k_yarn", "long_context_4k_plain"),
    *("long_context_4k_yarn", "plan_paper_27b", "h100_60m_full", "h100_60m_nsa", "tiny_full", "tiny_nsa_paper"),
    *("tiny_moe_balanced", "tiny_moe_unbalanced"),
    *("h100_60m_recipe_arms", "h100_60m_recipe_corpus", "h100_60m_recipe_sweep"),
}
LOG = "experiments.md"  # its entries stay as they were written on their day
NOT_OURS = re.compile(r"<!-- not measured here: .+ -->\n(\|.*\n)+")  # and why
A_NUMBER = re.compile(r"\d[\d,]*(\.\d|%)|\d{1,3},\d{3}")


def name_of(path):
    return path.name.split(".")[0]


def test_what_is_called_old_is_there():
    assert sorted({name_of(path) for path in RESULTS} & OLD) == sorted(OLD)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_result_says_where_it_comes_from(path):
    path = path.with_suffix(".meta.json") if path.suffix == ".jsonl" else path
    found = json.loads(path.read_text())["provenance"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])
    assert re.fullmatch(r"[0-9a-f]{40}", found["commit"] or ""), "python -m pallas_kernels.benchmarks.provenance FILE"
    assert set(found["versions"]) == {"python", "jax", "jaxlib", "platform", "driver"}
    assert {"source", "command", "device"} <= set(found)
    if name_of(path) in OLD:
        assert "recorded_with" in found
        return
    versions = dict(found["versions"])
    if found["device"]["kind"] == "cpu":
        del versions["driver"]
    assert None not in (found["source"], found["command"], found["device"]["count"], *versions.values())


@pytest.mark.parametrize("page", figures.pages(), ids=lambda path: str(path.relative_to(figures.ROOT)))
def test_tables_of_a_page_are_what_the_results_give(page):
    text = page.read_text()
    assert text == figures.with_tables(text), "make figures"


@pytest.mark.parametrize(
    "page",
    [page for page in figures.pages() if page.name != LOG],
    ids=lambda path: str(path.relative_to(figures.ROOT)),
)
def test_every_table_of_numbers_comes_from_results(page):
    unmarked = NOT_OURS.sub("", figures.MARKED.sub("", page.read_text()))
    assert "<!-- table:" not in unmarked, "a table without <!-- end -->"
    for found in re.finditer(r"(?:^\|.*\n)+", unmarked, flags=re.MULTILINE):
        rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in found[0].splitlines()[2:]]
        for column in zip(*rows, strict=True):
            numbers = [cell for cell in column if A_NUMBER.match(cell)]
            assert 2 * len(numbers) < len(column), f"numbers that no result file gives: {numbers}"


def test_pictures_show_the_results():
    old = []
    for name, picture in figures.PICTURES.items():
        png = (figures.ROOT / figures.PICTURES_FOLDER / name).read_bytes()
        old += [name] if figures.digest_in(png) != figures.digest(picture.files) else []
    assert old == [], "make figures"


def test_every_picture_is_drawn_from_results():
    drawn = {figures.ROOT / figures.PICTURES_FOLDER / name for name in figures.PICTURES}
    assert {path for folder in FOLDERS for path in folder.glob("*.png")} == set()
    assert set((figures.ROOT / figures.PICTURES_FOLDER).glob("*.png")) == drawn
    for page in figures.pages():
        shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())
        assert {(page.parent / name).resolve() for name in shown} <= drawn


def test_an_unknown_table_is_named():
    with pytest.raises(ValueError, match=r"table: nothing: expected one of speed, "):
        figures.with_tables("<!-- table: nothing -->\n<!-- end -->\n")


def test_a_measurement_of_now_says_where_it_comes_from():
    found = provenance.provenance([sys.executable, "a b"])
    assert json.loads(json.dumps(found)) == found
    assert found["command"] == f"{sys.executable} 'a b'"
    assert found["device"] == {"kind": "cpu", "count": 8} or found["versions"]["driver"] is not None
    assert found["source"] == provenance.source_digest()


def test_a_commit_is_filled_in_only_for_the_code_that_was_measured(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    module, result = tmp_path / "nsa_jax" / "module.py", tmp_path / "result.json"
    module.parent.mkdir()
    module.write_text("a = 1\n")
    git("init", "--quiet")
    git("add", "nsa_jax")
    git("commit", "--quiet", "--message", "first")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    measured = {"commit": None, "source": provenance.source_digest(tmp_path)}
    result.write_text(json.dumps({"provenance": measured}))
    module.write_text("a = 2\n")
    monkeypatch.setattr(provenance, "source_digest", lambda digest=provenance.source_digest: digest(tmp_path))
    with pytest.raises(ValueError, match="expected the code that was measured"):
        provenance.fill_in_commit(result)
    module.write_text("a = 1\n")
    provenance.fill_in_commit(result)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(result.read_text())["provenance"]["commit"] == head.stdout.strip()
