"""The pages in docs: examples run as written, links lead somewhere, every table of results is shown."""

import re
from pathlib import Path

import pytest

from docs.tables import TABLES
from train.presets import parse

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
ALL = [ROOT / "README.md", *PAGES]


def examples(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and Python-Markdown make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.stem)
def test_examples_run(page):
    namespace = {"__name__": page.stem}
    for example in examples(page):
        exec(compile(example, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}: {sorted(anchors(target))}"


# Not the log of experiments, which has commands of older code, too.
TELLING = [*(page for page in ALL if page.stem != "experiments"), ROOT / "CHANGELOG.md", ROOT / "train" / "presets.py"]


@pytest.mark.parametrize("page", TELLING, ids=lambda page: page.stem)
def test_settings_are_named_as_the_trainer_takes_them(page, capsys, monkeypatch):
    """Those in groups, such as --model.nsa.window."""
    flag = r"--(?:no-)?[a-z][a-z-]*(?:\.[a-z]+(?:-[a-z]+)*)+"
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        parse(["tiny", "--help"])
    taken = set(re.findall(flag, capsys.readouterr().out))
    assert "--model.nsa.window" in taken
    assert set(re.findall(flag, page.read_text())) <= taken


def test_every_table_is_shown():
    shown = re.findall(r"<!-- table: (\w+) -->", "".join(page.read_text() for page in ALL))
    assert set(shown) == set(TABLES)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_start_page_lists_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    assert {page.name for page in PAGES} - {"index.md"} <= set(re.findall(r"\]\(([\w-]+\.md)\)", index))
