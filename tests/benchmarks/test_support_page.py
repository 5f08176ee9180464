"""docs/support.md is made of the committed results, which are of the whole zoo and without faults;
and the way of one network goes as it says."""

import json
import sys

import pytest
import support
import support_page


def test_the_page_is_made_of_the_committed_results() -> None:
    report = json.loads(support_page.RESULTS.read_text())
    assert support_page.PAGE.read_text() == support_page.page(report)
    assert report["faults"] == 0
    there = [(row["room"], row["name"]) for row in report["rows"]]
    assert there == [(room, name) for room, name, _ in support.networks()]


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_a_network_goes_the_way(name: str) -> None:
    makers = {each: (room, make) for room, each, make in support.networks()}
    room, make = makers[name]
    row = support.row(room, name, make)
    del row["seconds"]
    known = json.loads(support_page.RESULTS.read_text())["rows"]
    expected = next(each for each in known if each["name"] == name)
    assert row == {key: value for key, value in expected.items() if key != "seconds"}
    assert "symmetry.zoo" in sys.modules
