"""The open questions, each in small, and the page that is made of their results."""

import math

import pytest
import size_questions


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
