"""docs/faults.md tells the truth: it is made of the committed results, and nothing went wrong."""

import json

import faults_page


def test_the_page_is_made_of_the_committed_results() -> None:
    report = json.loads(faults_page.RESULTS.read_text())
    assert faults_page.PAGE.read_text() == faults_page.page(report)
    assert report["wrong"] == 0
    assert sum(each["kills"] for each in report["kills"]) >= 200 and len(report["faults"]) >= 50
