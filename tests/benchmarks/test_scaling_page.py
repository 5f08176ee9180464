"""docs/scaling.md is made of the committed results; the powers are those of a known curve."""

import json

import pytest
import scaling
import scaling_page
from _bench import stems


def test_the_page_is_made_of_the_committed_results() -> None:
    merged = json.loads((scaling_page.MACHINE / "host_scale.json").read_text())
    assert scaling_page.PAGE.read_text() == scaling_page.page(scaling_page.load(), merged)
    for part in scaling_page.PARTS:
        assert (scaling_page.PICTURES / f"scaling_{part}.svg").is_file()


def test_what_was_measured() -> None:
    """Every operation; 20,000 tensors; 1,000 layers; groups of 1 and of 16,384."""
    reports = scaling_page.load()
    subjects = {curve["subject"].rstrip("_") for curve in reports["operations"]["curves"]}
    assert subjects >= set(stems())
    sizes = {
        (curve["subject"].split()[0], point["size"])
        for part in ("models", "files")
        for curve in reports[part]["curves"]
        for point in curve["points"]
    }
    assert {("merge", 20_000), ("align", 1000), ("align", 1), ("align", 16384)} <= sizes
    assert ("correct", 1000) in sizes
    assert sum(report["seconds"] for report in reports.values()) < 600


def test_powers_and_memory() -> None:
    cubes = [(float(n), 3e-9 * n**3) for n in (10, 100, 1000, 10000)]
    assert scaling.power(cubes) == pytest.approx(3.0)
    held = []
    seconds, calls, memory = scaling.measured(
        lambda: held.append(bytearray(40 << 20)) or held.pop()
    )
    assert seconds > 0 and calls >= 1 and 39 << 20 < memory < 60 << 20
