"""The grid of mergers, alignments and corrections, in small; its page is of the results."""

import _pages
import every_merge
import every_merge_page
import pytest
from experiments.test_corrections import SMALL

from nlm.demo.experiment import prepare

MERGERS = ("linear", "ties", "tall_mask", "regmean")


def test_the_grid_in_small(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NLM_CACHE", str(tmp_path_factory.mktemp("cache")))
    world, told, saved = prepare(0, 2, settings=SMALL), [], []
    start = {"counts": {"2": {"local": {"linear": {"none": {"average": 0.5}}}}}}
    found = every_merge.run(
        world, (2,), start, MERGERS, ("local", "nonlocal"), lambda now: saved.append(1), told.append
    )
    assert found["counts"]["2"]["local"]["linear"] == {"none": {"average": 0.5}}  # it goes on
    assert len(told) == len(saved) == 2 * len(MERGERS) - 1
    for merger, rows in found["counts"]["2"]["nonlocal"].items():
        names = list(every_merge_page.CORRECTIONS)
        assert list(rows) == (names[:-2] if merger in every_merge.APART else names)
        assert all(0 <= row["worst"] <= row["average"] for row in rows.values())


def result(seed, *counts):
    rows = {name: {"average": 0.5} for name in every_merge_page.CORRECTIONS}
    better = rows | {"tact": {"average": 0.75}, "refit+tact": {"average": 0.7}}
    settings = {name: {"ties": better, "tall_mask": {"none": {"average": 0.25}, **{
        k: {"average": 0.5} for k in ("repair", "least_squares", "data_free", "tact")}}}
        for name in every_merge_page.SETTINGS}  # fmt: skip
    return {"seed": seed, "images": 128, "multiples": [1.0, 2.0], "thresholds": [0.3, 0.5],
            "counts": dict.fromkeys(counts, settings)}  # fmt: skip


def test_the_page_says_what_holds():
    told = every_merge_page.told([result(0, "4", "2")])
    assert "at 2 and 4 tasks" in told and "of seed 0" in told
    assert "| `tall_mask` | 0.250 | 0.500 | 0.500 | 0.500 | 0.500 | - | - |" in told
    assert "TACT is +25.0 points above no correction on average, in every cell." in told
    assert "TACT is +12.5 points above REPAIR on average, in every cell." in told
    assert "then TACT is -5.0 points above TACT on average, below it in 8 of 8 cells" in told
    assert "4 tasks: `ties` 0.750, 0.0 points behind one foundation" in told
    more = every_merge_page.told([result(0, "4", "2"), result(1, "4")])
    assert "Seeds 0, 1.\n" in more and "Seeds 0.\n" in more and "which" in more


def test_the_page_says_where_row_lengths_lose_and_how_it_is_made():
    found = result(0, "4", "2")
    for of in found["counts"].values():
        for rows in of.values():
            rows["ties"]["data_free"] = {"average": 0.46}
            rows["regmean"] = rows["ties"] | {"data_free": {"average": 0.25}}
            rows["model_stock"] = rows["ties"] | {"data_free": {"average": 0.5}}
    found["counts"]["2"] = {
        setting: rows | {"model_stock": rows["model_stock"] | {"none": {"average": 0.25}}}
        for setting, rows in found["counts"]["4"].items()
    }
    told = every_merge_page.told([found])
    assert "Row lengths are +2.1 points above no correction on average, below it in 16 of" in told
    assert "More than 5 points are lost in 8: `regmean` (8). Row lengths take" in told
    assert "leaves 0.25 at 2 and 0.50 at 4 tasks of two foundations permuted by weights" in told
    assert "and at least 0.25 of one (seed 0)" in told
    assert "every_merge.py --seeds 0 --counts 2 4\n" in told
    assert every_merge_page.lost([-6.0], [(-6.0, "`ties`, one")]).endswith("in 1: `ties` (1).")
    assert every_merge_page.lost([-4.0], [(-4.0, "`ties`, one")]) == ""


def test_an_unfinished_number_of_tasks_is_left_out():
    found = result(0, "4")
    found["counts"]["2"] = {"local": found["counts"]["4"]["local"]}
    assert every_merge_page.finished([found]) == ["4"]
    del found["counts"]["2"]["local"]
    assert not every_merge_page.whole(found, "2")


def test_the_page_is_of_the_committed_results():
    assert every_merge_page.page() == every_merge_page.PAGE.read_text()
    assert (_pages.PICTURES / every_merge_page.PICTURE).stat().st_size > 5_000
    assert f"(pictures/{every_merge_page.PICTURE})" in every_merge_page.page()


@pytest.mark.parametrize("words", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_words_are_joined(words):
    assert every_merge_page.joined(words).replace(" and", ",").split(", ") == words
