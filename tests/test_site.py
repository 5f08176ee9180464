"""The documentation site: its generated pages, its navigation, and the code on its pages."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RUN = ["index.md", *sorted(str(p.relative_to(DOCS)) for p in (DOCS / "howto").glob("*.md"))]


def test_the_reference_is_of_the_public_names() -> None:
    pages = runpy.run_path(str(DOCS / "reference.py"))["pages"]()
    for name, text in pages.items():
        assert (DOCS / name).read_text() == text, "python docs/reference.py"
    there = {str(path.relative_to(DOCS)) for path in DOCS.glob("reference/*.md")}
    there |= {str(path.relative_to(DOCS)) for path in DOCS.glob("kernels/*.md")}
    assert there == set(pages)
    assert "::: nlm.align.weight_matching" in pages["reference/nlm.align.md"]


def test_the_navigation_has_every_page() -> None:
    listed = set(re.findall(r"[\w/*-]+(?:\.md|/\*)", (ROOT / "mkdocs.yml").read_text()))
    for page in DOCS.rglob("*.md"):
        name = str(page.relative_to(DOCS))
        assert name in listed or f"{page.parent.name}/*" in listed, name


def test_the_settings_are_yaml() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert settings["strict"] and settings["theme"]["font"] is False  # nothing is loaded from afar


@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs(page: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    assert blocks
    exec("\n".join(blocks), {})
