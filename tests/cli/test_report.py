"""The report: self-contained, escaped, complete, and readable from its own JSON."""

import base64
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from nlm.cli.report import is_report, render
from nlm.cli.results import headline, shown_numbers_of_tasks


class Page(HTMLParser):
    """Collects what a page refers to and its text, and checks that its tags match."""

    void = frozenset({"meta", "img", "br", "link"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.images: list[bytes] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.void:
            self._open.append(tag)
        for name, value in attributes:
            if name in ("src", "href") and value:
                prefix, _, data = value.partition(";base64,")
                if prefix == "data:image/png":
                    self.images.append(base64.b64decode(data))
                else:
                    self.references.append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_self_contained_and_complete(results: dict[str, Any]) -> None:
    html = render(results)
    page = Page(html)
    assert page.references == []
    assert "<script" not in html and "@import" not in html and "url(" not in html
    assert len(page.images) == 5
    assert all(image.startswith(b"\x89PNG\r\n\x1a\n") for image in page.images)
    assert len(set(page.images)) == 5
    text = re.sub(r"\s+", " ", page.text)
    for words in (
        "0.870 / 0.696",
        "8 tasks",
        "4 tasks",
        "cyrillic",
        "trunk.fc2",
        "2.13.0",
        "123 s",
    ):
        assert words in text
    assert 'name="viewport"' in html


def test_the_report_comes_from_the_json_file_as_well(results: dict[str, Any]) -> None:
    assert render(json.loads(json.dumps(results))) == render(results)


def test_text_is_escaped(results: dict[str, Any]) -> None:
    results["versions"]["<script>alert(1)</script>"] = "<b>&"
    html = render(results)
    assert "<script>" not in html and "&lt;script&gt;" in html and "&lt;b&gt;&amp;" in html


@pytest.mark.parametrize(
    ("absent", "images"),
    [(["layers"], 3), (["barrier"], 4), (["alignment", "timings", "foundations"], 5)],
)
def test_a_part_that_was_not_run_is_left_out(
    results: dict[str, Any], absent: list[str], images: int
) -> None:
    for part in absent:
        del results[part]
    assert len(Page(render(results)).images) == images


def test_a_missing_cell_is_a_dash(results: dict[str, Any]) -> None:
    del results["settings"]["local"]["8"]["probe"]
    assert "\N{EN DASH}" in Page(render(results)).text


def test_is_report(results: dict[str, Any], tmp_path) -> None:
    path = tmp_path / "report.html"
    assert not is_report(path)
    path.write_text("<!doctype html><title>mine</title>")
    assert not is_report(path)
    path.write_text(render(results), encoding="utf-8")
    assert is_report(path)


def test_headline_and_the_tables_shown(results: dict[str, Any]) -> None:
    assert headline(results) == (
        "8 experts of two foundations keep of their accuracy: 0.06 merged as they are, "
        "0.74 aligned, 0.87 aligned and corrected by TACT, 0.92 with one foundation for all."
    )
    assert shown_numbers_of_tasks(results) == [4, 8]
    for by_tasks in results["settings"].values():
        for tasks in ("4", "6", "8"):
            del by_tasks[tasks]
    assert shown_numbers_of_tasks(results) == [2]
