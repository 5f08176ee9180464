"""The table of corrections, in small: every row is measured and written down."""

import _corrections_parts
import corrections
import corrections_page
import pytest

from nlm.demo import Recipe, Settings, Sizes
from nlm.demo.experiment import prepare

SMALL = Settings(
    network="mlp512",
    foundation_images=512,
    sizes=Sizes(train=256, validation=40, calibration=128, test=64),
    foundation=Recipe(1, 2e-3, 1.0),
    expert=Recipe(1, 1e-3, 0.01),
)


def test_the_table_in_small(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NLM_CACHE", str(tmp_path_factory.mktemp("cache")))
    told = []
    world = prepare(0, 3, settings=SMALL)
    found = corrections.run(world, (2,), ("permuted", "local"), told.append)
    rows = set(corrections.ROWS) - {"batch_norm"}  # there is no norm
    assert list(found["settings"]) == ["permuted", "local"] and len(told) == 2 * len(rows)
    for setting in found["settings"].values():
        assert set(setting["2"]) == rows
        for name, at in setting["2"].items():
            assert 0 < at["worst"] <= at["average"] and at["seconds"] > 0
            assert (at["bytes"] > 0) == (name in ("free", "noise", "tact", "tact_once"))
    page = corrections_page.section([found, found])
    assert all(
        page[-1].count(f"| {row['title']} | {row['needs']} |") for row in found["rows"].values()
    )
    assert "± 0.000" in page[-1] and "### Experts of one foundation" in page


def test_rows_are_added_to_results_of_the_same_networks(tmp_path_factory, monkeypatch, tmp_path):
    monkeypatch.setenv("NLM_CACHE", str(tmp_path_factory.mktemp("cache")))
    world, path = prepare(0, 2, settings=SMALL), tmp_path / "corrections_mlp512_seed0.json"
    start = {"network": "mlp512", "seed": 0, "networks": "n", "threads": 1, "commit": "new"}
    with pytest.raises(SystemExit, match="of the same network, got None in"):
        corrections.committed(path, start)
    told = []
    found = corrections.run(world, (2,), ("local",), told.append, {**start, "settings": {}})
    at = found["settings"]["local"]["2"]
    kept = {name: dict(row) for name, row in at.items()}
    del at["refit"], at["refit_fields"]
    corrections.write(path, found | {"commit": "old", "added": {"batch_norm": "older"}})
    for name, other in (("networks", "m"), ("threads", 2), ("seed", 1)):
        with pytest.raises(SystemExit, match=f"of the same {name}, got "):
            corrections.committed(path, start | {name: other})
    with pytest.raises(SystemExit, match="added by a revision, got new-changed"):
        corrections.committed(path, start | {"commit": "new-changed"})
    found = corrections.committed(path, start)
    assert found["commit"] == "old" and found["added"] == {}  # it has no such row
    told.clear()
    found = corrections.run(world, (2,), ("local",), told.append, found, revision="new")
    assert len(told) == 2 and found["commit"] == "old"
    assert found["added"] == {"refit": "new", "refit_fields": "new"}
    for name, row in found["settings"]["local"]["2"].items():
        assert row["average"] == kept[name]["average"]


def result(seed, **averages):
    at = {
        name: {"average": average, "worst": average - 0.1, "scale": 0.5, "average_at_zero": 0.5,
               "worst_at_zero": 0.25, "seconds": 0.5, "bytes": 4096 if name == "tact" else 0}
        for name, average in averages.items()
    }  # fmt: skip
    rows = {name: {"title": name.upper(), "needs": "nothing"} for name in averages}
    local = {"4": {"tact": {"average": 0.98}}}
    return {"seed": seed, "rows": rows, "settings": {"permuted": {"4": at}, "local": local}}


def test_the_page_says_what_is_recovered():
    results = [result(0, none=0.5, shared=0.7, tact=0.9), result(1, none=0.7, shared=0.8, tact=0.9)]
    assert corrections_page.share(results, "shared", "4") == pytest.approx(0.5)
    told = corrections_page.verdict(results)
    assert "of what TACT gains: SHARED 50%. TACT ends 8.0 points behind" in told
    assert corrections_page.goals({"repair": 0.4, "least_squares": 0.6, "free": 0.49}) == (
        " Half of it by one set of scales and shifts for all tasks: met (60%)."
        " Half of it without data: missed (49%)."
    )
    lines = corrections_page.table(results, "permuted").splitlines()
    assert lines[-1] == (
        "| TACT | nothing | 0.900 ± 0.000 / 0.80 | 0.500 ± 0.000 / 0.25 | 4,096 | 0.50 |"
    )
    assert lines[-3].startswith("| NONE | nothing | 0.600 ± 0.141 / 0.50 |")


def test_every_number_of_tasks(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NLM_CACHE", str(tmp_path_factory.mktemp("cache")))
    kept: list[int] = []
    start = {"seed": 0, "counts": {"2": {"none": {"average": 0.5}}}}
    world = prepare(0, 3, settings=SMALL)
    found = corrections.every_number(world, (2, 3), start, lambda all: kept.append(1), lambda _: 0)
    assert found["counts"]["2"]["none"] == {"average": 0.5} and len(kept) == 11  # it goes on
    assert list(found["counts"]["3"]) == list(corrections_page.SHORT) == list(corrections.SHORT)


def test_the_page_says_where_a_goal_is_missed():
    def scores(**averages):
        return {name: {"average": each, "worst": each} for name, each in averages.items()}

    three = scores(none=0.5, repair=0.6, least_squares=0.6, refit=0.9, refit_fields=0.65, tact=0.8)
    two = scores(none=0.5, repair=0.9, least_squares=0.7, refit=0.7, refit_fields=0.5, tact=0.8)
    both = {"seed": 0, "counts": {"2": two, "3": three}}
    told = corrections_page.every_number([both])
    assert "from three tasks on: met for every seed" in told[-1]
    assert (
        "by least squares missed at 3 (33%) tasks; by refit met at every number; "
        "by refit on random fields missed at 2 (0%) tasks." in told[-1]
    )
    row = next(line for line in told[1].splitlines() if line.startswith("| 3 |"))
    assert row.endswith("| 0.650 / 0.65 | 0.800 / 0.80 | 33% | 133% | 50% | 20.0 | 20.0 |")
    worse = {"3": {**three, "repair": {"average": 0.9, "worst": 0.9}}}
    told = corrections_page.every_number([{"seed": 0, "counts": worse}])
    assert "from three tasks on: missed at 3 tasks" in told[-1]


def test_the_page_says_how_far_two_runs_of_one_seed_are_apart():
    at = {name: {"average": 0.5} for name in corrections_page.SHORT}
    tables = [{"seed": 0, "settings": {"permuted": {"2": at}}}]
    every = [{"seed": 0, "counts": {"2": at, "3": at}}, {"seed": 1, "counts": {"2": at}}]
    assert corrections_page.changed(tables, every) == ""
    every[0]["counts"]["2"] = at | {"none": {"average": 0.52}}
    told = corrections_page.changed(tables, every)
    assert told.endswith("one seed differs by 0.3 points on average, 2.0 at most.")


def test_the_page_says_what_needs_no_data_recovers():
    rows = {"none": 0.5, "shared_free": 0.6, "free": 0.65, "noise": 0.55, "tact": 0.7}
    at = {name: {"average": each, "worst": each} for name, each in rows.items()}
    less = at | {"free": {"average": 0.55, "worst": 0.5}, "shared_free": at["none"]}
    fields = {count: {"refit_fields": at["noise"]} for count in ("2", "4")}
    told = _corrections_parts.without_data(
        [{"seed": 0, "networks": "n", "counts": {"2": at, "4": less}}],
        [{"seed": 0, "networks": "n", "settings": {"permuted": fields}}],
    )
    assert "| 2 | 0.500 / 0.50 | 0.600 / 0.60 (50%) | 0.650 / 0.65 (75%) |" in told[1]
    assert "met at 2 tasks (75%), missed at 4 tasks (25%)" in told[-1]


def test_a_missed_goal_has_its_reason():
    [told] = corrections_page.why(corrections_page.goals({"repair": 0.6, "free": 0.4}))
    assert told.startswith("Why half is missed: without data, the lengths of rows tell")
    assert corrections_page.why(corrections_page.goals({"repair": 0.6, "free": 0.6})) == []


def test_the_page_says_what_task_vectors_add_to_layers_solved_anew():
    def found(average):
        row = {"average": average, "worst": 0.5, "seconds": 2.0, "bytes": 8, "ridge": 0.1}
        rows = {name: row for name in _corrections_parts.SOLVED}
        settings = {name: {"4": rows} for name in _corrections_parts.SOLVED_SETTINGS}
        return {"seed": 0, "scale": 0.3, "images": 512, "ridges": [0.1, 1.0], "settings": settings}

    told = _corrections_parts.solved([found(0.9)], [found(0.85)])
    assert "| refit | 512 images | 0.900 / 0.50 | 0.850 / 0.50 | 8 | 2.0 |" in told[3]
    assert "refit, low rank +5.0," in told[-1] and "does as well" not in told[-1]
    assert "have a ridge of 0.1; at the other, validation images choose it of 0.1, 1.0" in told[-1]
    assert "without a digest" in told[-1]
    known, other = ([found(0.9) | {"networks": digest}] for digest in ("a", "b"))
    told = _corrections_parts.solved(known, known)[-1]
    assert "refit, low rank +0.0," in told and "does as well" in told and "digest" not in told
    assert _corrections_parts.solved(known, other)[-1].endswith("networks of other digests.")
    assert _corrections_parts.solved([found(0.9)], []) == []


def test_results_of_another_run_are_told_by_the_rows_that_both_hold():
    def found(seed, **averages):
        rows = {name: {"average": each} for name, each in averages.items()}
        return {"seed": seed, "settings": {"local": {"2": rows, "4": rows}}}

    merging = [found(0, plain=0.5, tact=0.8, probe=0.1), found(1, plain=0.1)]
    tables = [found(0, none=0.52, tact=0.8, probe=0.9)]
    cells = _corrections_parts.both(merging, tables, _corrections_parts.MERGING)
    assert cells == [(0.5, 0.52), (0.8, 0.8)] * 2
    told = _corrections_parts.another_run(cells, "the tables")
    assert told.startswith("These are of another run than the tables, of another revision")
    assert told.endswith("differs by 1.0 points on average, 2.0 at most.")
    assert _corrections_parts.another_run([(0.5, 0.5001)], "the tables") == ""
    assert _corrections_parts.another_run([], "the tables") == ""
