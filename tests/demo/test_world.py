"""Loading: the experts asked for, the same from the cache, and a cache that heals itself."""

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

from nlm.demo import Demo, Settings, cache, load


def weights(demo: Demo) -> dict[str, torch.Tensor]:
    """Every tensor of a world's networks, by name."""
    found: dict[str, torch.Tensor] = {}
    for index, foundation in enumerate(demo.foundations):
        found |= {f"foundation {index} {k}": v for k, v in foundation.state_dict().items()}
    for task, experts in demo.experts.items():
        for index, expert in experts.items():
            found |= {f"{task} {index} {k}": v for k, v in expert.state_dict().items()}
    return found


def assert_same(first: Demo, second: Demo) -> None:
    expected, got = weights(first), weights(second)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def files(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_every_task_has_an_expert_of_a_and_each_second_one_of_b(world: Demo) -> None:
    assert {task: list(experts) for task, experts in world.experts.items()} == {
        "digits": [0],
        "upper": [0, 1],
    }
    assert list(world.tasks) == ["digits", "upper"]
    assert not torch.equal(
        world.experts["upper"][0].state_dict()["trunk.fc1.weight"],
        world.experts["upper"][1].state_dict()["trunk.fc1.weight"],
    )


def test_a_second_load_reads_the_cache(world: Demo, cache_folder: Path, small: Settings) -> None:
    before = files(cache_folder)
    assert len(before) == 6  # glyphs, two foundations, three experts
    assert_same(world, load(seed=0, tasks=2, settings=small))
    assert files(cache_folder) == before


def test_one_deleted_expert_is_trained_again_alone(
    world: Demo, cache_folder: Path, small: Settings
) -> None:
    before = files(cache_folder)
    [expert] = cache_folder.glob("*expert-upper-b*")
    expert.unlink()
    assert_same(world, load(seed=0, tasks=2, settings=small))
    after = files(cache_folder)
    assert [name for name in after if after[name] != before[name]] == [expert.name]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "other settings"])
def test_a_damaged_file_is_made_again_with_one_warning(
    world: Demo, cache_folder: Path, small: Settings, damage: str
) -> None:
    [file] = cache_folder.glob("*expert-upper-a*")
    whole = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        file.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    elif damage == "emptied":
        file.write_bytes(b"")
    else:
        [other] = cache_folder.glob("*expert-upper-b*")
        file.write_bytes(other.read_bytes())
    with pytest.warns(UserWarning, match=rf"must be whole, got '.*{file.name}' damaged") as caught:
        again = load(seed=0, tasks=2, settings=small)
    assert len(caught) == 1
    assert_same(world, again)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(seed=0, tasks=2, settings=small)


def test_the_key_covers_what_training_depends_on() -> None:
    assert cache.key(seed=0, recipe={"epochs": 1}) == cache.key(recipe={"epochs": 1}, seed=0)
    assert cache.key(seed=0, recipe={"epochs": 1}) != cache.key(seed=0, recipe={"epochs": 2})


def test_a_cache_that_cannot_be_written_costs_a_warning_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    monkeypatch.setenv("NLM_CACHE", os.fspath(blocker / "cache"))
    with pytest.warns(UserWarning, match="the cache folder must be writable"):
        made = cache.remember("x", cache.key(a=1), lambda: {"x": torch.ones(2)})
    assert torch.equal(made["x"], torch.ones(2))


def test_progress_runs_from_zero_to_one(world: Demo, small: Settings) -> None:
    calls: list[tuple[str, float]] = []
    load(seed=0, tasks=2, settings=small, progress=lambda what, share: calls.append((what, share)))
    shares = [share for _, share in calls]
    assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares)
    assert "training the expert of upper from foundation B" in dict(calls)


@pytest.mark.parametrize("tasks", [0, 9, -1])
def test_a_wrong_number_of_tasks_is_refused(tasks: int) -> None:
    with pytest.raises(ValueError, match=rf"nlm\.demo: tasks must lie in 1\.\.8, got {tasks}"):
        load(tasks=tasks)


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"network must be one of cnn64, cnn64_norm, mlp512, got"):
        Settings(network="vgg")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from nlm.demo._extras import require

    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.partition(".")[0] == "fontTools"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"needs fonttools, .*: pip install nlm\[demo\]"):
        require("fontTools.ttLib", "fonttools")
