"""The short form of benchmarks/experiments/faults.py: kills, and errors of the system and of files.

Each merge is a real process; the preloaded library fails, stops or kills it at a call on a file.
"""

import os
import random
import re
import shutil
import signal
import tempfile
import threading
from pathlib import Path

import pytest
from _fault_list import FAULTS
from _faults import Programs, World
from faults import inject, kill_at_calls, kill_at_moments, kill_one_of

from nlm.checkpoint.shards import sha256_of
from nlm.recipe import read_recipe
from nlm.recipe.models import Models
from nlm.streaming import MEMORY
from nlm.streaming.ranks import Ranks

# one of each kind
SHORT = list({re.sub(r" \d+$", "", f.name): f for f in FAULTS if f.recipe == "dare"}.values())

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="the library is compiled here")


@pytest.fixture(scope="module")
def disturbed():
    memory = Path("/dev/shm")  # nothing waits for a disk there
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        world = World(Path(folder))
        with Programs(world.folder) as programs:
            yield world, programs


def test_killed_before_its_calls(disturbed):
    """What a killed merge leaves is nothing, resumable or whole; resumed, it is what it would have
    been."""
    report = kill_at_calls(*disturbed, False, step=24)
    assert report["wrong"] == [] and sum(report["states"].values()) >= 6
    assert "partial" in report["states"]


def test_the_last_steps_of_a_replacement(disturbed):
    """Killed between the renames and removals that end it."""
    report = kill_at_calls(*disturbed, True, first=-22, step=3)
    assert report["wrong"] == [] and report["states"]["whole"] > 1


def test_the_last_steps_of_a_single_file(disturbed):
    """Killed as it gets its name and its notes go: it is there whole, and nothing beside it."""
    world, programs = disturbed
    out = world.run / "out.safetensors"
    world.clear()
    calls = programs.run(world.arguments("dare", out=out), "any 0 0", world.run).calls
    digest = sha256_of(out)
    for number in range(calls - 9, calls, 2):
        world.clear()
        programs.run(world.arguments("dare", out=out), f"any {number} kill", world.run)
        done = programs.run(world.arguments("dare", "--resume", out=out))
        assert sha256_of(out) == digest and world.left() == ["out.safetensors"]
        assert done.code == 0, done.said


@pytest.mark.parametrize("fault", SHORT, ids=lambda fault: fault.name)
def test_a_fault(disturbed, fault):
    """An error is one sentence that names the file, and the output is not there, or whole."""
    assert inject(*disturbed, fault)["wrong"] == []


def test_a_pause_by_others_is_no_end(disturbed):
    """As of a whole machine: a merge that is stopped meanwhile has neither ended nor failed."""
    world, programs = disturbed
    world.clear()
    process = programs.start(world.arguments("dare"), "write 6 hold", world.run)
    assert programs.wait(process, for_hold=True).is_held
    os.kill(process, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (process, signal.SIGCONT)).start()
    assert programs.go_on(process).code == 0 and world.state("dare") == "whole"


@pytest.mark.nightly
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault(disturbed, fault):
    assert inject(*disturbed, fault)["wrong"] == []


@pytest.mark.nightly
@pytest.mark.parametrize("replaces", [False, True])
def test_killed_before_every_call(disturbed, replaces):
    assert kill_at_calls(*disturbed, replaces)["wrong"] == []


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", ["ties", "dare"])
def test_killed_at_random_moments(disturbed, recipe):
    assert kill_at_moments(*disturbed, recipe, 20, random.Random(1))["wrong"] == []


@pytest.mark.nightly
@pytest.mark.parametrize(("size", "victim"), [(2, 0), (4, 2)])
def test_one_of_many_is_killed(disturbed, size, victim):
    """The others end with a sentence, soon; resumed together, they write what one writes."""
    report = kill_one_of(*disturbed, size, victim)
    assert report["wrong"] == [] and report["seconds"] < 60


def test_a_process_that_joins_knows_the_merge_by_the_same_files(disturbed, tmp_path):
    """Also by the specification's and the permutation's, which the first one alone opens."""
    recipe = read_recipe(disturbed[0].folder / "ties.yaml")
    second = Ranks()
    second.rank, second.size = 1, 2
    first, other = (
        Models(recipe, tmp_path, MEMORY, lambda *_: None, ranks) for ranks in (Ranks(), second)
    )
    stamps = first.plan(tmp_path / "out").stamps()
    assert stamps == other.plan(tmp_path / "out").stamps()
    assert {"spec.json", "two-to-base.safetensors"} <= {file.name for file in stamps}
