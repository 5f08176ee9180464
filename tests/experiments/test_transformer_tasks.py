"""Tasks of small transformers: what they are made of, and the comparison in small."""

import math

import pytest
import torch
from small_tasks import ORDERS, TEXT_TASKS, task
from small_training import encode
from transformer_tasks import CONTROLS, CORRECTIONS, PLACES, run
from transformer_tasks_page import joined, section

from nlm.demo.tasks import Sizes

FILES = 40


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_text_tasks(name):
    made = task("gpt", name, 0, Sizes(60, 30, 20, 30), 48, FILES)
    for split, count in ((made.train, 60), (made.validation, 30), (made.test, 30)):
        assert split.inputs.shape == (count, 48)
        assert set(split.labels.tolist()) <= set(range(len(made.classes)))
    again = task("gpt", name, 0, Sizes(60, 30, 20, 30), 48, FILES)
    assert torch.equal(again.test.inputs, made.test.inputs)
    other = task("gpt", name, 1, Sizes(60, 30, 20, 30), 48, FILES)
    assert not torch.equal(other.test.inputs, made.test.inputs)


def test_shuffled_words_are_the_words():
    made = task("gpt", "order", 0, Sizes(200, 30, 20, 30), 48, FILES)
    [space] = encode(b" ", FILES).tolist()
    assert made.classes == ORDERS
    spaces = [(made.train.inputs[made.train.labels == n] == space).sum(1) for n in range(3)]
    assert all(len(each) > 20 and each.float().mean() > 1 for each in spaces)


class Enough(Exception):
    pass


def stop(found):
    raise Enough


def test_the_comparison_in_small(tmp_path, monkeypatch):
    monkeypatch.setenv("NLM_CACHE", str(tmp_path))
    found = run("gpt", (0,), small=True)
    rows, refits = found["seeds"]["0"]["rows"], found["seeds"]["0"]["refits"]
    assert list(refits) == list(PLACES[:-1])
    for scores in refits.values():
        assert list(scores) == ["plain", "tact", "refit_tact", "refit_default"]
        assert all(math.isfinite(row["average"]) for row in scores.values())
    assert list(rows) == list(PLACES[:-1])
    again = run("gpt", (0,), small=True, before=lambda start: found)  # all is there
    assert again is found
    assert "### The same, solved anew" in section(found)
    both = joined([found, found | {"seeds": {"1": found["seeds"]["0"]}}])
    assert list(both["seeds"]) == ["0", "1"] and "seeds 0, 1." in section(both)[0]
    with pytest.raises(AssertionError, match="tuning"):
        joined([found, found | {"tuning": {}}])
    found["seeds"]["0"]["networks"] = "others"
    with pytest.raises(Enough):
        run("gpt", (0,), small=True, save=stop, before=lambda start: found)
    assert list(found["seeds"]["0"]["rows"]) == [PLACES[0]]  # all is measured anew
    for counts in rows.values():
        for scores in counts.values():
            assert list(scores) == [*CORRECTIONS, *CONTROLS]
            assert all(math.isfinite(row["average"]) for row in scores.values())
