"""Recipes that correct: what is written, what nlm.load makes of it, and what it does."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import _pretrained as tiny
import pytest
import torch
from safetensors.torch import load_file, save_file

import nlm
from nlm.checkpoint import open_checkpoint
from nlm.cli.app import run
from nlm.loading import SIDE_CAR
from nlm.recipe import read_recipe
from nlm.recipe.execution import execute
from nlm.statistics import collect_moments

MODELS = ("llama", "bert", "gpt2", "vit")
RECIPE = """
foundations: {first: first, second: second}
experts: {a: {path: a, foundation: first}, b: {path: b, foundation: second}}
align: {method: activations, data: a.safetensors}
method: linear
correct: {method: METHOD, data: {a: a.safetensors, b: b.safetensors}}
output: {path: OUT}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> a folder with two foundations, experts and data, made when it is asked for."""
    home = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLM_CACHE", str(home / "cache"))

        def make(name: str) -> Path:
            folder = home / name
            if not folder.exists():
                folder.mkdir()
                first = tiny.foundation(getattr(tiny, name))
                first.save_pretrained(folder / "first")
                second = tiny.permuted(tiny.disturbed(first, 5, 0.08), folder / "first")
                second.save_pretrained(folder / "second")
                for task, model in (("a", first), ("b", second)):
                    tiny.disturbed(model, ord(task), 0.05).save_pretrained(folder / task)
                    save_file(tiny.inputs(first, 24, ord(task)), folder / f"{task}.safetensors")
            return folder

        yield make


@pytest.fixture
def family(made, tmp_path, monkeypatch):
    """Goes to a folder with one of the models; what is written there is the test's alone."""

    def go(name: str) -> type:
        from transformers import AutoConfig

        shutil.copytree(made(name), tmp_path, dirs_exist_ok=True)
        monkeypatch.chdir(tmp_path)
        return getattr(__import__("transformers"), AutoConfig.from_pretrained("a").architectures[0])

    return go


def merge(method: str, out: str, more: str = "") -> None:
    text = RECIPE.replace("METHOD", method).replace("OUT", out + more)
    if method == "none":
        text = text.replace("correct: {method: none,", "# ")
    Path("recipe.yaml").write_text(text)
    assert run(["check", "recipe.yaml"]) == 0
    assert run(["merge", "recipe.yaml", "--quiet", "--no-sync"]) == 0
    assert not list(Path().glob(".*"))


def spreads(model: torch.nn.Module, points: dict[str, int], data: dict) -> torch.Tensor:
    """The logarithms of the standard deviations of all points' channels."""
    found = collect_moments(model, points, [data])
    return torch.cat([found[point].variance.clamp_min(1e-12).log() / 2 for point in points])


@pytest.mark.parametrize(
    "name", [MODELS[0], *(pytest.param(each, marks=pytest.mark.nightly) for each in MODELS[1:])]
)
def test_refit_and_tact(family, name):
    """On the data that they saw refit comes closer to the experts, and TACT has their spread."""
    kind = family(name)
    for method in ("none", "refit", "tact"):
        merge(method, method)
    plain, refitted = (nlm.load(out) for out in ("none", "refit"))
    assert type(plain) is type(refitted) is kind
    tact = nlm.load("tact")
    assert isinstance(tact, nlm.Tact) and tact.tasks == ("a", "b")
    assert sorted(each.name for each in Path("tact").glob("*.safetensors")) == [
        "model.safetensors", SIDE_CAR,
    ]  # fmt: skip
    same = load_file("none/model.safetensors"), load_file("tact/model.safetensors")
    assert all(torch.equal(same[0][entry], same[1][entry]) for entry in same[0])
    first = load_file("a.safetensors")
    uncorrected = tiny.outputs(plain, first)
    for task in ("a", "b"):
        data = load_file(f"{task}.safetensors")
        expert = kind.from_pretrained(task).eval()
        alone = nlm.load("tact", task=task)
        assert type(alone) is kind
        torch.testing.assert_close(
            tiny.outputs(alone, data), tiny.outputs(tact, data, task=task), rtol=1e-3, atol=1e-4
        )
        own = tiny.outputs(expert, data)
        before, after = (
            float((tiny.outputs(each, data) - own).square().mean()) for each in (plain, refitted)
        )
        assert after < 0.75 * before
        if task == "a":  # whose units are in the order of the merged model
            wanted = spreads(expert, tact.points, data)
            before, after = (
                float((spreads(each, tact.points, data) - wanted).abs().mean())
                for each in (plain, alone)
            )
            assert before > 0.05 and after < 1e-5
    for corrected in (refitted, nlm.load("tact", task="a")):
        found = tiny.outputs(corrected, first)
        assert found.isfinite().all()
        assert float((found - uncorrected).abs().max()) > 1e-3 * float(uncorrected.std())


def test_the_other_corrections_and_a_folder_for_each_task(family):
    kind = family("gpt2")
    data = load_file("a.safetensors")
    for method in ("repair", "least_squares", "data_free", "tact_at_once", "refit+tact"):
        merge(method, "out")
        model = nlm.load("out")
        assert isinstance(model, nlm.correct.Correction)
        assert tiny.outputs(model, data, task="b").isfinite().all()
        if method == "refit+tact":
            weights = load_file("out/model.safetensors")
        shutil.rmtree("out")
    merge("refit", "out")
    assert all(torch.equal(weights[n], t) for n, t in load_file("out/model.safetensors").items())
    shutil.rmtree("out")
    merge("tact", "out")
    merge("tact", "apart", ", per_task: folded, dtype: float16")
    assert not Path("apart", SIDE_CAR).exists()
    for task in ("a", "b"):
        stock = kind.from_pretrained(f"apart/tasks/{task}", dtype="auto").eval()
        assert stock.dtype == torch.float16 and stock.config.use_cache
        found = tiny.outputs(stock.float(), data)
        wanted = tiny.outputs(nlm.load("out"), data, task=task)
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
        again = tiny.outputs(nlm.load("apart", task=task, dtype=torch.float32), data)
        assert torch.equal(found, again)
    for path, task, why in (
        ("apart", None, "a folder with a model for each task is loaded for one of a, b, got no"),
        ("apart", "c", "the task is one of a, b, got 'c'"),
        ("out", "c", "the task is one of a, b, got 'c'"),
        ("a", "a", "one model for all tasks, got task 'a'"),
    ):
        with pytest.raises(ValueError, match=why):
            nlm.load(path, task)
    Path("a/masks").mkdir()
    with pytest.raises(ValueError, match="masks are applied before a model is loaded"):
        nlm.load("a")
    with pytest.raises(FileNotFoundError, match="a merged model is a folder, got 'none'"):
        nlm.load("none")


def test_experts_of_one_foundation(family, capsys):
    """Nothing is aligned; a mistake in what is folded is told before any work."""
    kind = family("gpt2")
    Path("recipe.yaml").write_text("""
base: first
experts: {a: {path: a}}
method: task_arithmetic
correct: {method: tact, data: {a: a.safetensors}, samples: 20}
output: {path: out, per_task: folded}
""")
    assert run(["merge", "recipe.yaml", "--quiet", "--no-digest"]) == 0
    data = {name: each[:20] for name, each in load_file("a.safetensors").items()}
    expert = tiny.outputs(kind.from_pretrained("a").eval(), data)
    torch.testing.assert_close(
        tiny.outputs(nlm.load("out", task="a"), data), expert, rtol=1e-3, atol=1e-3
    )
    text = Path("recipe.yaml").read_text()
    for old, new, why in (
        (
            "tact",
            "data_free",
            "a folded correction needs a bias, and weights of its own, .*'lm_head'",
        ),
        ("tact", "batch_norm", "batch_norm has batch norms to estimate anew, got none in GPT2LMH"),
        ("path: out,", "path: out.safetensors,", "a corrected model is a folder, got the file"),
    ):
        Path("recipe.yaml").write_text(text.replace(old, new).replace(": out,", ": new,"))
        assert run(["merge", "recipe.yaml", "--quiet"]) == 1
        assert re.search(why, capsys.readouterr().err)


def test_files_types_and_the_card(family):
    """Corrected weights stand in the shards in their type, with the digests that the card has."""
    family("gpt2")
    merge("refit", "out", ", dtype: bfloat16, shard: 10kB")
    files = open_checkpoint("out").files
    assert len(files) > 1
    card = Path("out/README.md").read_text()
    for file in files:
        assert f"| {file.name} | {hashlib.sha256(file.read_bytes()).hexdigest()} |" in card
    assert "Corrected by refit ('a': 24 samples of `a.safetensors`, SHA-256 " in card
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "bfloat16"
    assert nlm.load("out").dtype == torch.bfloat16
    assert nlm.load("out", dtype=torch.float32).dtype == torch.float32


def test_a_correction_that_is_stopped(family):
    """The merge is kept to be resumed, and ends as if it had not been stopped."""
    family("gpt2")
    merge("refit+tact", "whole")
    text = Path("recipe.yaml").read_text().replace("whole", "out")
    Path("recipe.yaml").write_text(text)

    def stop(what: str, share: float) -> None:
        if what == "correcting: b":  # refit has been through, TACT has fitted one task
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(read_recipe("recipe.yaml"), progress=stop)
    assert not Path("out").exists() and Path(".out.partial/model.safetensors").exists()
    torn = Path(".out.partial/model.safetensors")
    with torn.open("r+b") as file:  # as if the weights were being rewritten
        file.seek(-64, 2)
        file.write(bytes(64))
    execute(read_recipe("recipe.yaml"), resume=True)
    for name in ("model.safetensors", SIDE_CAR):
        found, wanted = load_file(f"out/{name}"), load_file(f"whole/{name}")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[each], wanted[each]) for each in wanted)
    assert not list(Path().glob(".out*"))


@pytest.mark.nightly
def test_two_processes_write_what_one_does(family):
    family("gpt2")
    merge("refit+tact", "one", ", shard: 10kB")
    text = Path("recipe.yaml").read_text().replace("path: one", "path: two")
    Path("recipe.yaml").write_text(text)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", "-m", "nlm", "merge", "recipe.yaml", "--quiet"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert " s by 2 processes: " in Path("two/README.md").read_text()  # aligned on shares of data
    names = sorted(each.name for each in Path("one").glob("*.safetensors"))
    assert sorted(each.name for each in Path("two").glob("*.safetensors")) == names
    for name in names:
        found, wanted = load_file(f"two/{name}"), load_file(f"one/{name}")
        assert all(torch.equal(found[each], wanted[each]) for each in wanted)


@pytest.fixture
def one_thread():
    """A forked child waits for ever for the threads that PyTorch left with its parent."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.nightly
def test_killed_at_any_step(family, one_thread):
    """kill -9 at every fourth report of progress: nothing is there, and a resume ends the same."""
    family("gpt2")
    merge("refit+tact", "whole", ", shard: 10kB")
    Path("recipe.yaml").write_text(Path("recipe.yaml").read_text().replace("whole", "out"))
    recipe = read_recipe("recipe.yaml")
    wanted = {file.name: load_file(file) for file in Path("whole").glob("*.safetensors")}
    step, seen, stages = 0, [], set()
    while True:
        step += 4
        events = iter(range(step))

        def die(what: str, share: float, events=events) -> None:
            Path("last").write_text(what)
            if next(events, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        if not (child := os.fork()):
            try:
                execute(recipe, progress=die, force=True)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
        seen.append(step)
        stages.add(Path("last").read_text().partition(":")[0].partition(" ")[0])
        assert not Path("out").exists()
        execute(recipe, resume=True)
        found = {file.name: load_file(file) for file in Path("out").glob("*.safetensors")}
        assert found.keys() == wanted.keys()
        for name, tensors in found.items():
            assert all(torch.equal(tensors[each], wanted[name][each]) for each in wanted[name])
        assert not list(Path().glob(".out*"))
        shutil.rmtree("out")
    assert len(seen) > 10 and {"correcting", "permuting"} <= stages
