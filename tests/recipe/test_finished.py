"""``--resume`` of an output that is there: complete, another recipe's, or no longer what it was."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nlm.checkpoint.partial import PartialCheckpoint
from nlm.checkpoint.shards import sha256_of
from nlm.cli.app import run
from nlm.recipe import read_recipe
from nlm.recipe.execution import execute


@pytest.fixture
def merged(tmp_path, monkeypatch):
    """A recipe of two experts with a head each, and a function that merges it by the command."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "one", "two")):
        made = torch.Generator().manual_seed(seed)
        state = {f"{k}.weight": torch.randn(30, 10, generator=made) for k in range(4)}
        Path(name).mkdir()
        save_file(state | {"head": torch.full((3,), float(seed))}, f"{name}/model.safetensors")
        Path(name, "config.json").write_text('{"model_type": "mlp"}')
    text = (
        "base: base\nexperts: {one: one, two: two}\nmethod: task_arithmetic\nheads: [head]\n"
        "output: {path: out, shard: 2kB}\n"
    )
    Path("recipe.yaml").write_text(text)

    def merge(*more: str, code: int = 0) -> None:
        assert run(["merge", "recipe.yaml", "--quiet", *more]) == code

    merge()
    return merge


def state_of(folder="out"):
    files = sorted(each for each in Path(folder).rglob("*") if each.is_file())
    return {str(each): (sha256_of(each), each.stat().st_mtime_ns) for each in files}


def test_a_finished_output_is_verified(merged, capsys):
    before = state_of()
    merged("--resume")
    assert capsys.readouterr().out.splitlines()[-1] == (
        "the output is complete, as the SHA-256 of 6 files says: out"
    )
    merged("--resume", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["complete"] and found["tensors"] == 4
    assert found["files"].keys() == set(found["resumed"]) >= {"heads/one.safetensors"}
    assert all(sha256_of(Path("out", name)) == digest for name, digest in found["files"].items())
    assert state_of() == before and not list(Path().glob(".out*"))


def test_another_recipe_or_another_input_is_refused(merged, capsys):
    before = state_of()
    text = Path("recipe.yaml").read_text()
    Path("recipe.yaml").write_text(text + "parameters: {scale: 0.5}\n")
    merged("--resume", code=1)
    said = capsys.readouterr().err
    assert said.startswith("nlm: recipe.yaml:5: an output that --resume finds is of the same")
    assert "got another in" in said and said.count("\n") == 1
    Path("recipe.yaml").write_text(text)
    os.utime("two/model.safetensors", ns=(0, 0))
    merged("--resume", code=1)
    Path("out/README.md").unlink()
    merged("--resume", code=1)
    assert "got one without a card of nlm in" in capsys.readouterr().err
    del before["out/README.md"]
    assert state_of() == before
    merged("--resume", "--force")
    merged("--resume")


@pytest.mark.parametrize("name", ["model-00002-of-00004.safetensors", "heads/two.safetensors"])
def test_a_bit_that_flipped_is_found(merged, name, capsys):
    file = Path("out", name)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    merged("--resume", code=1)
    assert name in (said := capsys.readouterr().err) and "has the files of its card" in said
    file.unlink()
    merged("--resume", code=1)


def test_without_digests_nothing_is_known(merged, capsys):
    merged("--force", "--no-digest")
    merged("--resume", code=1)
    assert "(--no-digest)" in capsys.readouterr().err


def test_a_single_file_is_merged_again_and_compared(merged, capsys):
    out = Path("out.safetensors")
    text = Path("recipe.yaml").read_text().replace("heads: [head]\n", "")
    Path("recipe.yaml").write_text(text)
    more = ("--output", str(out))
    merged(*more)
    before = state_of(".")
    merged(*more, "--resume", "--json")
    assert json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))["complete"]
    assert state_of(".") == before
    state = load_file(out)
    state["head"][0] += 1
    save_file(state, out, {"format": "pt"})
    merged(*more, "--resume", code=1)
    assert "is what the recipe gives, got other bytes in" in capsys.readouterr().err
    assert not list(Path().glob(".out*"))


def test_the_digests_after_a_kill_are_those_of_the_corrected_files(merged, monkeypatch):
    """Where the output got its name and its notes did not go, a correction's files are told."""
    from nlm.recipe.models import Models

    complete = Models.complete

    def corrected(self, folder, plan, text, files, identity):
        file = next(folder.glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-4:] = bytes(4)
        file.write_bytes(content)
        files[file.name] = {"sha256": sha256_of(file)}
        complete(self, folder, plan, text, files, identity)

    monkeypatch.setattr(Models, "complete", corrected)
    end = PartialCheckpoint._end

    def die(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(PartialCheckpoint, "_end", die)
    recipe = read_recipe("recipe.yaml")
    with pytest.raises(KeyboardInterrupt):
        execute(recipe, force=True)
    monkeypatch.setattr(PartialCheckpoint, "_end", end)
    report = execute(recipe, resume=True)
    assert report.complete
    for name, digest in report.files.items():
        assert sha256_of(Path("out", name)) == digest


def test_a_kill_when_the_last_note_was_gone(merged, capsys):
    """The empty folder of the notes goes too."""
    Path("out/.nlm").mkdir()
    merged("--resume")
    assert "the output is complete" in capsys.readouterr().out
    assert not Path("out/.nlm").exists()
