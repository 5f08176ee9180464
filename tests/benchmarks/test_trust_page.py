"""docs/trust.md is made of the committed results, which have no open finding."""

import trust_page
from _readers import KINDS


def test_the_page_is_made_of_the_committed_results() -> None:
    fuzzing, release, nightly = trust_page.load()
    assert trust_page.PAGE.read_text() == trust_page.page(fuzzing, release, nightly)
    assert fuzzing["findings"] == 0
    assert {row["kind"] for row in fuzzing["rows"]} == set(KINDS)
    assert all(row["failed"] == 0 for row in release["rows"])
    assert all(found["code"] == 0 for found in nightly.values())
