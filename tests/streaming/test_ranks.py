"""Processes that merge together write what one writes, bit by bit, or nothing."""

import signal
from pathlib import Path

import pytest
from _processes import THREADS, side_by_side, torchrun
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
{threads}
with Ranks.of_environment() as ranks:
    run(plan, "r", resume={resume}, progress=progress, ranks=ranks)
assert not threads_of_groups(), threads_of_groups()
"""
# The second process fails, and each keeps its error, with all of its calls, to the end.
FAILS = """
import os, sys
sys.path.insert(0, {tests!r})
from torch import distributed
from nlm.statistics import Moments
from nlm.streaming.ranks import Ranks
import torch
{threads}
is_own = {is_own}
if not is_own:
    distributed.init_process_group("gloo")
def measure(ranks):
    group, kept = ranks.group, []
    while True:
        moments = Moments.of(torch.randn(4, 3)).all_reduce(group)
        kept.append(moments)
        if ranks.rank == 1 and len(kept) == 3:
            raise ValueError("enough")
said = None
try:
    with Ranks.of_environment() as ranks:
        assert threads_of_groups()
        before = len(threads_of_groups())
        with ranks.hearing():
            measure(ranks)
except Exception as error:
    said = error
assert ranks.group is None and said.__traceback__ is not None
if is_own:
    assert not threads_of_groups(), threads_of_groups()
else:
    assert distributed.is_initialized() and 0 < len(threads_of_groups()) < before
    distributed.destroy_process_group()
sys.exit(str(said))
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


def script(root: Path, resume: bool = False, dies: str = "nobody") -> Path:
    file, tests = root / "script.py", str(Path(__file__).parents[1])
    file.write_text(
        SCRIPT.format(tests=tests, root=str(root), dies=dies, resume=resume, threads=THREADS)
    )
    return file


def assert_expected(root: Path) -> None:
    names = {file.name for file in (root / "expected").iterdir()}
    assert {file.name for file in (root / "out").iterdir()} == names
    for file in open_checkpoint(root / "expected").files:
        assert sha256_of(file) == sha256_of(root / "out" / file.name)
    assert not list(root.glob(".out*"))


@pytest.mark.parametrize("processes", [2, 4])
def test_two_and_four_processes(root, processes):
    done = torchrun(processes, script(root))
    assert done.returncode == 0, done.stderr
    assert_expected(root)


def test_one_is_killed_and_the_others_go_on_later(root):
    other, dead = side_by_side(2, script(root, dies="1"))
    assert (other.code, dead.code) == (1, -signal.SIGKILL), other.said
    assert "no longer hears" in other.said and not (root / "out").exists()
    for file in (root / ".out.partial").glob("*.safetensors"):  # as a torn disk leaves them
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    done = torchrun(2, script(root, resume=True))
    assert done.returncode == 0, done.stderr
    assert_expected(root)


@pytest.mark.parametrize("is_own", [True, False])
def test_no_thread_of_a_group_is_left_where_one_fails(tmp_path, is_own):
    """Not for what the calls that failed hold either; a group of the caller's own stays."""
    file = tmp_path / "script.py"
    tests = str(Path(__file__).parents[1])
    file.write_text(FAILS.format(tests=tests, threads=THREADS, is_own=is_own))
    other, failed = side_by_side(2, file)
    assert (other.code, failed.code) == (1, 1), (other.said, failed.said)
    assert failed.said.strip() == "enough" and "no longer hears" in other.said


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
