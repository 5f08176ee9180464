"""The report: self-contained, escaped, complete, and readable from its own JSON."""

import base64
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nlm.cli import figures
from nlm.cli.report import is_report, render
from nlm.cli.results import headline, shown_numbers_of_tasks

_CELL = {"average": 0.5, "worst": 0.4}


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
        self.text += f"{data} "


def test_the_report_is_self_contained_and_complete(html: str) -> None:
    page = Page(html)
    assert page.references == []
    assert "<script" not in html and "@import" not in html and "url(" not in html
    assert len(page.images) == 8
    assert all(image.startswith(b"\x89PNG\r\n\x1a\n") for image in page.images)
    assert len(set(page.images)) == 8
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
    assert "http" not in re.sub('base64,[^"]*', "", html)


def test_every_number_is_on_the_page(html: str, results: dict[str, Any]) -> None:
    text = Page(html).text.split()
    for setting in results["settings"].values():
        for tasks, cells in setting.items():
            for correction, cell in cells.items():
                drawn = correction in ("plain", "repair", "tact")
                for which in ("average", "worst"):
                    if drawn or tasks in ("4", "8"):
                        assert f"{cell[which]:.3f}" in text
    for parts in (results["layers"], results["barrier"]):
        for series in parts.values():
            for values in series.values() if isinstance(series, dict) else []:
                for value in values if isinstance(values, list) else [values]:
                    assert any(f"{value:.{digits}g}" in text for digits in (3, 4))
    [surface] = results["landscapes"].values()
    for row in (surface["x"], surface["y"], *surface["values"]["average"]):
        assert all(f"{value:.4g}" in text or f"{value:.3g}" in text for value in row)
    for number in ("0.125.", "123.4", "0.830", "20.0", "0.3"):
        assert number in text


def test_a_landscape_and_a_projection_say_what_they_are(html: str) -> None:
    text = re.sub(r"\s+", " ", Page(html).text)
    assert "not corrected: average" in text and "from 0.111 to 0.444 in all pictures" in text
    assert "2 samples, each once for every model" in text
    assert text.count("7 units") == 0 and text.count("70 units, mean 0.600") == 4


def test_long_names_leave_room_for_the_picture() -> None:
    surface = {
        "x": [0.0, 1.0], "y": [0.0, 1.0], "values": {"average": [[0.0, 0.5], [0.5, 1.0]]},
        "models": {f"expert {'a' * 80}": (1.0, 0.0, 0.0), f"expert {'b' * 80}": (0.0, 1.0, 0.0)},
    }  # fmt: skip
    figure = Figure(figsize=(4.8, 3.8), layout="constrained")
    axes = figure.add_subplot()
    figures.landscape(surface, "average", (0.0, 1.0))(axes)
    FigureCanvasAgg(figure).draw()
    assert axes.get_position().width > 0.6
    assert all(len(text.get_text()) <= 24 for text in axes.texts)


def test_the_report_comes_from_the_json_file_as_well(html: str, results: dict[str, Any]) -> None:
    assert render(json.loads(json.dumps(results))) == html


def test_text_is_escaped(results: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script>"
    results["versions"][evil] = "<b>&"
    results["run"][evil] = evil
    for part in ("landscapes", "projections", "alignment", "timings", "experts", "foundations"):
        results[part][evil] = results[part].pop(next(iter(results[part])))
    results["layers"]["points"][0] = results["title"] = results["lead"] = evil
    results["notes"] = results["tasks"] = [evil]
    results["settings"][evil] = {"8": {evil: {**_CELL, "tasks": {evil: 0.5}}}}
    results["layers"]["variance_ratio"][evil] = [1.0] * 4
    results["barrier"]["loss"]["$x$"] = [0.5, 1.0, 0.5]
    html = render(results)
    assert "<script" not in html and "&lt;script&gt;" in html and "&lt;b&gt;&amp;" in html


@pytest.mark.parametrize(
    ("absent", "images"),
    [
        (["layers", "landscapes", "projections", "alignment", "timings", "foundations"], 3),
        (["barrier", "settings", "experts", "run", "versions", "seconds", "seed", "tasks"], 5),
    ],
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


def test_is_report(html: str, tmp_path) -> None:
    path = tmp_path / "report.html"
    assert not is_report(path)
    path.write_text("<!doctype html><title>mine</title>")
    assert not is_report(path)
    path.write_text(html, encoding="utf-8")
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
