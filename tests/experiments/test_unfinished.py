"""A run that was ended goes on where nothing has changed, and only there."""

import json
import subprocess

import nonlocal_merging
import pytest
import torch
from nonlocal_merging import CHANGED, commit, networks, unfinished, write
from torch import nn

from nlm.demo import Demo

START = {"commit": "abc", "ridges": (0.1, 1.0), "networks": "1", "settings": {}}


def test_a_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "found.json"
    assert unfinished(path, START) is START
    write(path, START | {"settings": {"local": 1}, "rows": ["none"]})
    assert unfinished(path, START)["settings"] == {"local": 1}


@pytest.mark.parametrize("change", [{"commit": "d"}, {"ridges": (0.1,)}, {"networks": "2"}])
def test_a_run_of_other_settings_begins_anew(tmp_path, change):
    path = tmp_path / "found.json"
    write(path, START | {"settings": {"local": 1}})
    start = START | change
    assert unfinished(path, start) is start


def test_a_run_of_changed_sources_begins_anew(tmp_path):
    path, start = tmp_path / "found.json", START | {"commit": f"abc{CHANGED}"}
    write(path, start | {"settings": {"local": 1}})
    assert json.loads(path.read_text())["commit"] == start["commit"]
    assert unfinished(path, start) is start


def test_the_commit_says_whether_sources_were_changed(tmp_path, monkeypatch):
    here = tmp_path / "benchmarks" / "experiments"
    source, result = tmp_path / "nlm" / "a.py", here / "results" / "a.json"
    for path in (source, result):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    monkeypatch.setattr(nonlocal_merging, "HERE", here)
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "a"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    clean = commit()
    assert len(clean) == 40
    result.write_text("2")
    (result.parent / "b.json").write_text("2")
    assert commit() == clean
    source.write_text("2")
    assert commit() == clean + CHANGED
    source.write_text("1")
    (source.parent / "b.py").write_text("1")
    assert commit() == clean + CHANGED


def test_other_networks_have_another_digest():
    def demo(seed: int) -> Demo:
        torch.manual_seed(seed)
        one, two, expert = (nn.Sequential(nn.Linear(3, 2)) for _ in range(3))
        return Demo(0, (one, two), {"a": {0: expert}}, {}, None)  # type: ignore[arg-type]

    assert networks(demo(0)) == networks(demo(0)) != networks(demo(1))
