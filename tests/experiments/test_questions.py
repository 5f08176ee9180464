"""The open questions, each in small, and the page that is made of their results."""

import itertools
import math

import _pages
import _text_questions
import foundation_questions
import many_models
import pytest
import questions_page
import size_questions
import survey_questions
import text_questions
import torch

from nlm.demo.training import Recipe
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
    assert list(found["tasks"]["2"]) == ["2", "3", "4"]
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


def test_text(monkeypatch):
    monkeypatch.setattr(text_questions, "TEXT_TASKS", ("kind",))
    monkeypatch.setattr(text_questions, "NETWORKS", (0, 1))
    monkeypatch.setattr(text_questions, "TUNING", Recipe(1, 1e-3, 0.1, batch=20))
    found = text_questions.run(0, small=True)
    assert finite(found)
    [widths], [pair] = found["widths"].values(), found["calibration"]
    assert len(widths) == 1
    assert len(pair) == len(text_questions.KINDS) + len(text_questions.AMOUNTS) - 1
    [[lines]] = found["fine_tuned"].values()
    raw, rotated = lines.values()
    assert len(raw) == text_questions.POINTS and raw[1:-1] != rotated[1:-1]
    assert raw[0] == pytest.approx(rotated[0], rel=1e-4)  # the ends compute the same
    assert raw[-1] == pytest.approx(rotated[-1], rel=1e-4)


def test_kinds_of_text():
    settings = text_questions.settings_of(16, True)
    drawn = {
        kind: torch.cat(text_questions.calibration(kind, 150, settings))
        for kind in text_questions.KINDS
    }
    assert all(each.shape == (150, settings.length) for each in drawn.values())
    code, shuffled = drawn["code"], drawn["words shuffled"]
    assert not torch.equal(code, shuffled)
    counts = [torch.bincount(each.flatten(), minlength=100) for each in (code, shuffled)]
    assert (counts[0] - counts[1]).abs().sum() <= 0.05 * code.numel()


def test_the_pictures_are_drawn_from_what_is_found():
    pictures = questions_page.draw()
    assert len(set(pictures.values())) == len(pictures)
    for name in pictures:
        assert f"(pictures/{name})" in questions_page.page()
        assert 5_000 < (_pages.PICTURES / name).stat().st_size < 60_000


def test_what_is_an_m():
    assert _text_questions.is_m([1.0, 0.9, 1.5, 0.8, 0.9])
    assert not _text_questions.is_m([1.0, 1.1, 1.5, 0.8, 0.9])
    assert _text_questions.depth([1.0, 0.9, 1.5, 0.8, 0.9]) == pytest.approx(0.1)
    assert _text_questions.depth([1.0, 1.1, 1.0]) == 0


def test_means_with_their_errors():
    assert _pages.spread([1.0]) == "1.000"
    assert _pages.spread([1.0, 3.0], 1) == "2.0 ± 1.0"
    assert [_pages.counted([0] * n, "pair") for n in (1, 3)] == ["1 pair", "3 pairs"]
    assert _pages.table(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|--:|\n| 1 | 2 |"
