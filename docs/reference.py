"""A page of API reference for every public module, written when the documentation is built (a hook of MkDocs)."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGES = ("nsa_jax", "pallas_kernels", "train")

# The pages in the order that one reads them in; those that are not there are left out.
PAGES = (
    "index",
    "installing",
    "ops",
    "layers",
    "caches-and-decoding",
    "integrations",
    "sharding",
    "training",
    "results",
    "experiments",
    "kernels",
    "adding-a-backend",
    "comparison",
    "glossary",
)


def modules(package: str) -> list[str]:
    """Names of the package and of everything in it, without those that begin with an underscore."""
    parts = (path.relative_to(ROOT).with_suffix("").parts for path in (ROOT / package).rglob("*.py"))
    names = {".".join(part for part in name if part != "__init__") for name in parts}
    return sorted(name for name in names if "._" not in name)


def on_config(config: Any) -> Any:
    """The order of the pages: those named above, then all others, then the reference."""
    written = {str(path.relative_to(ROOT / "docs").with_suffix("")) for path in (ROOT / "docs").rglob("*.md")}
    names = [*(name for name in PAGES if name in written), *sorted(written - set(PAGES))]
    reference = [{package: [f"reference/{name}.md" for name in modules(package)]} for package in PACKAGES]
    config.nav = [*(f"{name}.md" for name in names), {"API reference": reference}]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to notebooks lead to the copies beside the pages."""
    return markdown.replace("](../notebooks/", "](notebooks/")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the reference, and the notebooks."""
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        files.append(File.generated(config, f"notebooks/{notebook.name}", abs_src_path=str(notebook)))
    for package in PACKAGES:
        for name in modules(package):
            files.append(File.generated(config, f"reference/{name}.md", content=f"# `{name}`\n\n::: {name}\n"))
    return files
