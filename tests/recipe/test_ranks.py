"""Recipes that several processes do together: what one writes, bit by bit or to rounding."""

import shutil
import signal
from pathlib import Path

import _pretrained as tiny
import pytest
import torch
from _processes import THREADS, side_by_side, torchrun
from safetensors.torch import load_file, save_file

from nlm.checkpoint.shards import sha256_of
from nlm.loading import SIDE_CAR
from nlm.recipe import read_recipe
from nlm.recipe.execution import execute

FOUNDATIONS = "foundations: {first: first, second: second}\n"
RECIPES = {
    "regmean": FOUNDATIONS + (
        "experts:\n"
        "  a: {path: a, foundation: first, data: a.safetensors}\n"
        "  b: {path: b, foundation: second, data: b.safetensors, samples: 70}\n"
        "align: weights\nmethod: regmean\nparameters: {alpha: 0.7}\n"
    ),
    "soup": "experts: {a: a, c: c}\nmethod: greedy_soup\nscore: a.safetensors\n",
    "tact": FOUNDATIONS + (
        "experts: {a: {path: a, foundation: first}, b: {path: b, foundation: second}}\n"
        "align: weights\nmethod: linear\n"
        "correct: {method: tact, data: {a: a.safetensors, b: b.safetensors}}\n"
    ),
    "few": FOUNDATIONS + (
        "experts: {a: {path: a, foundation: first}, b: {path: b, foundation: second}}\n"
        "align: weights\nmethod: linear\n"
        "correct: {method: repair, samples: 10, data: {a: a.safetensors, b: b.safetensors}}\n"
    ),
}  # fmt: skip
SCRIPT = f"""
import os, sys
from pathlib import Path
from nlm.recipe import read_recipe
from nlm.recipe.execution import execute
from nlm.streaming.ranks import Ranks
{THREADS}
victim, resume, *names = sys.argv[1:]
def progress(what, share):
    if os.environ["RANK"] == victim and what.startswith(("measuring expert b", "correcting")):
        os.kill(os.getpid(), 9)
with Ranks.of_environment() as ranks:
    for name in names:
        recipe, out = read_recipe(name + ".yaml"), Path("together", name)
        execute(recipe, out, ranks=ranks, progress=progress, resume=resume == "1")
assert not threads_of_groups(), threads_of_groups()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Recipes, their models, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLM_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        first = tiny.foundation(tiny.gpt2)
        first.save_pretrained("first")
        second = tiny.permuted(tiny.disturbed(first, 5, 0.08), Path("first"))
        second.save_pretrained("second")
        for task, model in (("a", first), ("b", second), ("c", first)):
            tiny.disturbed(model, ord(task), 0.05).save_pretrained(task)
            save_file(tiny.inputs(first, 80, ord(task)), f"{task}.safetensors")
        Path("alone").mkdir()
        Path("together").mkdir()
        Path("script.py").write_text(SCRIPT)
        for name, text in RECIPES.items():
            Path(f"{name}.yaml").write_text(text)
            execute(read_recipe(f"{name}.yaml"), Path("alone", name))
        yield folder


def assert_as_alone(name: str) -> None:
    alone, found = (Path(each, name) for each in ("alone", "together"))
    files = sorted(str(each.relative_to(alone)) for each in alone.rglob("*"))
    assert files == sorted(str(each.relative_to(found)) for each in found.rglob("*"))
    for file in (each for each in files if each.endswith(".safetensors")):
        if name in ("soup", "few") or (name == "tact" and file != SIDE_CAR):
            assert sha256_of(alone / file) == sha256_of(found / file), file
        one, many = load_file(alone / file), load_file(found / file)
        assert one.keys() == many.keys()
        for each, expected in one.items():
            torch.testing.assert_close(many[each], expected, rtol=2e-6, atol=1e-7)
    assert not list(Path("together").glob(".*"))


@pytest.mark.parametrize("processes", [2, 4])
def test_what_is_measured_on_data_is_that_of_one_process(home, processes, monkeypatch):
    monkeypatch.chdir(home)
    done = torchrun(processes, Path("script.py"), "nobody", "0", *RECIPES)
    assert done.returncode == 0, done.stderr
    for name in RECIPES:
        assert_as_alone(name)
        shutil.rmtree(Path("together", name))


@pytest.mark.parametrize(("name", "victim"), [("regmean", 1), ("tact", 0)])
def test_one_is_killed_as_all_measure(home, name, victim, monkeypatch):
    """The other ends with a sentence; resumed together, they write what one does."""
    monkeypatch.chdir(home)
    ended = side_by_side(2, Path("script.py"), str(victim), "0", name)
    dead, other = ended[victim], ended[1 - victim]
    assert (dead.code, other.code) == (-signal.SIGKILL, 1), other.said
    last = other.said.strip().splitlines()[-1]
    assert "that process" in last and "no longer hears" in last, other.said
    assert not Path("together", name).exists()
    done = torchrun(2, Path("script.py"), "nobody", "1", name)
    assert done.returncode == 0, done.stderr
    assert_as_alone(name)
    shutil.rmtree(Path("together", name))
