"""docs/trust.md is made of the committed results, which have no open finding."""

import re
from pathlib import Path

import pytest
import trust_page
from _readers import KINDS

ROOT = Path(__file__).parents[2]


def test_the_page_is_made_of_the_committed_results() -> None:
    results = trust_page.load()
    fuzzing, release = results["fuzzing"], results["release"]
    assert trust_page.PAGE.read_text() == trust_page.page(results)
    assert fuzzing["findings"] == results["faults"]["wrong"] == 0
    fuzzed = {row["kind"] for row in fuzzing["rows"]}
    assert fuzzed == set(KINDS) and trust_page.unfuzzed(fuzzing) == []
    assert all(row["failed"] == 0 for row in release["rows"])
    nightly = results["nightly"]
    for name in trust_page.STAGES:
        assert nightly[name]["code"] == 0, name
    # Of the whole the code is how many stages failed: each has passed since at another commit.
    assert nightly["the whole"]["code"] == len(trust_page._again(nightly))


def test_changes_are_checked_in_forty_minutes() -> None:
    seconds = trust_page.load()["ci"].get("seconds")
    if not seconds:
        pytest.skip("no table of .ci/run is kept: NLM_STAGES=benchmarks/results/ci.json .ci/run")
    assert seconds["total"] < 40 * 60


def test_the_least_versions_are_tried_ones() -> None:
    """Of what runs with nlm, in ``.ci/release``; of tools and hosts, with ``constraints.txt``."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [
        row for row in trust_page.load()["release"]["rows"]
        if "least" in row and row["first"] == "torch"
    ]  # fmt: skip
    [least] = found
    assert project["requires-python"] == ">=" + ".".join(least["python"].split(".")[:2])
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )  # fmt: skip
    tried = {"core", "cli", "demo", "hf"}
    rooms = {"core": project["dependencies"], **project["optional-dependencies"]}
    for room, lines in rooms.items():
        for line in lines:
            if found := re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line):
                name, version = found.groups()
                versions = [least["least"][name]] if room in tried else [pinned[name]]
                assert any(_same(version, each) for each in versions), (room, line, versions)


def _same(one: str, other: str) -> bool:
    numbers = [[int(part) for part in each.split(".") if part.isdigit()] for each in (one, other)]
    most = max(map(len, numbers))
    return len({tuple(each + [0] * (most - len(each))) for each in numbers}) == 1


def test_stages_that_failed_by_night_and_passed_after_it_are_told():
    whole = {"said": ["8 stages by one command, failed: fuzz (1) seldom (2)"], "commit": "a"}
    night = {name: {"code": 0, "commit": "a"} for name in trust_page.STAGES} | {"the whole": whole}
    night["fuzz"] = {"code": 0, "commit": "b"}
    night["seldom"] = {"code": 2, "commit": "b"}
    assert trust_page._again(night) == ["fuzz"]
    assert trust_page._again({}) == []
