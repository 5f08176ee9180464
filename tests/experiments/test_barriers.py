"""The ladder of alignments, in small: each kind is trained, aligned, compared and written down."""

import barriers
import pytest
from small_training import SETTINGS, quick
from transformer_barriers import run


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_ladder_in_small(kind):
    found = run(kind, quick(SETTINGS[kind]), (0, 1))
    stages = [found, found["fine_tuned"]] if "fine_tuned" in found else [found]
    assert len(stages) == (1 if kind == "gpt" else 2)
    told = barriers.section(found)
    for stage in stages:
        [pair] = stage["pairs"]
        rows = pair["rows"]
        assert all(len(row["losses"]) == 3 for row in rows.values())
        assert abs(rows["a copy that was scrambled"]["barrier"]) < 1e-4
        for name in set(rows) - {"a copy that was scrambled", "heads ignored"}:
            assert rows[name]["losses"][-1] == pytest.approx(rows["raw"]["losses"][-1], abs=1e-4)
        assert ("heads rotated" in rows) == (kind != "bert") == (not stage["refused"])
        assert ("pseudo_perplexity" in rows["raw"]) == (kind == "bert" and stage is found)
        assert all(f"| {barriers.ROWS[name]} |" in told for name in rows)
        assert len(pair["corrected"]) == 3
        for name, losses in pair["corrected"].items():
            assert losses["mean"] == pytest.approx(rows[name]["losses"][1], rel=1e-4)
            assert losses["refit"] < losses["mean"] + 0.1
    assert ("Rotations are refused" in told) == (kind == "bert")


def test_what_breaks_the_order_is_said():
    rows = {"raw": 2.0, "feed-forward": 2.5, "heads": 1.5, "stream rotated": 1.75}
    pair = {"rows": {name: {"barrier": value} for name, value in rows.items()}}
    told = barriers.verdict({"pairs": [pair], "refused": ""})
    assert "vanilla > permutations > rotations **does not hold**: 2.000 (none), 1.500" in told
    assert "*feed-forward units permuted* is worse than *none*, by 0.500, in 1 of 1 pair" in told
    assert "*stream rotated instead, heads permuted* is worse than *+ heads permuted*" in told
    pair["rows"]["stream rotated"]["barrier"] = 0.5
    told = barriers.verdict({"pairs": [pair], "refused": ""})
    assert "rotations holds: 2.000 (none), 1.500 (+ heads permuted), 0.500" in told


def test_a_scrambled_copy_came_back_in_every_committed_result():
    for result in barriers.load():
        for value in barriers.barriers(result["pairs"], "a copy that was scrambled"):
            assert abs(value) < 1e-4
