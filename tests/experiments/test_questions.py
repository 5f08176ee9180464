"""The open questions, each in small, and the page that is made of their results."""

import itertools
import math

import foundation_questions
import many_models
import pytest
import size_questions
import survey_questions
import torch

from nlm.demo.world import load_glyphs


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("NLM_CACHE", str(tmp_path))


def finite(found) -> bool:
    if isinstance(found, dict):
        return all(map(finite, found.values()))
    if isinstance(found, (list, tuple)):
        return all(map(finite, found))
    return not isinstance(found, float) or math.isfinite(found)


def test_sizes(monkeypatch):
    sizes = {name: size_questions.SIZES[name] for name in ("width 64", "depth 6", "1500 images")}
    monkeypatch.setattr(size_questions, "SIZES", sizes)
    found = size_questions.run(0, small=True)
    assert list(found) == list(sizes)
    for size in found.values():
        assert list(size["settings"]) == list(size_questions.SETTINGS)
        for each in size["settings"].values():
            assert list(each["rows"]) == list(size_questions.CORRECTIONS)
    assert len(found["depth 6"]["settings"]["local"]["variance_ratio"]) == 3
    assert finite(found)


def test_foundations_and_drift(monkeypatch):
    monkeypatch.setattr(many_models, "IMAGES", 400)
    monkeypatch.setattr(foundation_questions, "COUNTS", (1, 3))
    found = foundation_questions.run(0, small=True)
    assert finite(found)
    assert list(found["foundations"]["1"]) == ["as they are"]
    assert list(found["foundations"]["3"]) == list(foundation_questions.ALIGNMENTS)
    distances = [each["distance"] for each in found["drift"].values()]
    assert distances == sorted(distances) and distances[0] > 0
    assert all(-1 <= each["cosine"] <= 1 for each in found["drift"].values())


def test_neighbours_of_merging(monkeypatch):
    monkeypatch.setattr(many_models, "IMAGES", 400)
    monkeypatch.setattr(survey_questions, "ASKED", ("upper", "arrows"))
    monkeypatch.setattr(survey_questions, "FACTORS", (0.5, 1.0))
    monkeypatch.setattr(survey_questions, "PARTINGS", (0.0, 1.0))
    found = survey_questions.run(0, small=True)
    assert finite(found)
    for rows in found["negation"].values():
        assert rows["nothing"]["factor"] == 0 and len(rows) == 5
    assert all(0 <= share <= 1 for each in found["units"].values() for share in each.values())
    parted, same = (found["children"][at] for at in ("0.0", "1.0"))
    assert len(set(same["as they are"])) == 1  # they never part
    assert len(parted["as they are"]) == survey_questions.POINTS
    world, glyphs = survey_questions.prepare(0, load_glyphs(), True), load_glyphs()
    pairs = [[survey_questions.child(world, glyphs, n, at, 256) for n in (0, 1)] for at in (0, 0.5)]
    starts = [child.state_dict()["trunk.fc1.weight"] for pair in pairs for child in pair]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(starts, 2))
