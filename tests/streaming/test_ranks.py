"""Processes that merge together write what one writes, bit by bit, or nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from streaming._checkpoints import states, write
from streaming._plans import plan_of

from nlm.checkpoint import open_checkpoint
from nlm.checkpoint.shards import sha256_of
from nlm.streaming import run
from nlm.streaming.ranks import Ranks, share

SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from streaming._plans import plan_of
from nlm.streaming import run
from nlm.streaming.ranks import Ranks
root = Path({root!r})
experts = {{task: root / task for task in ("one", "two", "three")}}
plan = plan_of(root / "out", root / "base", experts, "ties", shard_bytes=1500)
def progress(what, share):
    if os.environ["RANK"] == {dies!r} and share > 0.4:
        os.kill(os.getpid(), 9)
with Ranks.of_environment() as ranks:
    run(plan, "r", resume={resume}, progress=progress, ranks=ranks)
"""


@pytest.fixture
def root(tmp_path):
    base, *experts = states(4)
    write(tmp_path / "base", base, shards=2)
    for name, state in zip(("one", "two", "three"), experts, strict=True):
        write(tmp_path / name, state)
    experts = {name: tmp_path / name for name in ("one", "two", "three")}
    run(plan_of(tmp_path / "expected", tmp_path / "base", experts, "ties", shard_bytes=1500))
    return tmp_path


def together(root: Path, processes: int, resume: bool = False, dies: str = "nobody"):
    script = root / "script.py"
    tests = str(Path(__file__).parents[1])
    script.write_text(SCRIPT.format(tests=tests, root=str(root), dies=dies, resume=resume))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc-per-node", str(processes), str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=120,
    )  # fmt: skip


def assert_expected(root: Path) -> None:
    names = {file.name for file in (root / "expected").iterdir()}
    assert {file.name for file in (root / "out").iterdir()} == names
    for file in open_checkpoint(root / "expected").files:
        assert sha256_of(file) == sha256_of(root / "out" / file.name)
    assert not list(root.glob(".out*"))


@pytest.mark.parametrize("processes", [2, 4])
def test_two_and_four_processes(root, processes):
    done = together(root, processes)
    assert done.returncode == 0, done.stderr
    assert_expected(root)


def test_one_is_killed_and_the_others_go_on_later(root):
    done = together(root, 2, dies="1")
    assert done.returncode != 0 and not (root / "out").exists()
    for file in (root / ".out.partial").glob("*.safetensors"):  # as a torn disk leaves them
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    done = together(root, 2, resume=True)
    assert done.returncode == 0, done.stderr
    assert_expected(root)


def test_files_are_shared_by_their_bytes():
    sizes = {"a": 5, "b": 4, "c": 3, "d": 2, "e": 1}
    parts = []
    for rank in range(2):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, 2
        parts.append(share(sizes, ranks))
    assert parts[0] | parts[1] == set(sizes) and not parts[0] & parts[1]
    assert abs(sum(sizes[n] for n in parts[0]) - sum(sizes[n] for n in parts[1])) <= 1


def test_one_that_fails_before_it_hears_the_first_is_told(monkeypatch):
    """What it says stands where the others wait for the first one's word."""
    ranks = Ranks()
    assert ranks.told("here") == "here"
    monkeypatch.setattr(ranks, "gather", lambda value: [value, "MemoryError: full"])
    with pytest.raises(RuntimeError, match="process 1 failed: MemoryError: full"):
        ranks.told("here")
    with pytest.raises(RuntimeError, match="process 1 failed: MemoryError: full"), ranks.together():
        pass
