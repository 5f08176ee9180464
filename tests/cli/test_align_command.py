"""``nlm align``: files, folders and functions in, a permutation and its page out."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nlm
from nlm.align import AlignmentResult, OrthogonalAlignment
from nlm.cli.app import run

SOURCES = """
import sys, torch
sys.path.insert(0, {tests!r})
from _networks import mlp, vectors

def a():
    model, data = mlp(seed=0), batches()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(100):
        x, y = data[step % 2]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, vectors()

def b():
    model, example = a()
    spec = __import__("nlm").trace(model, example)
    model.load_state_dict(spec.apply(spec.random(3), model.state_dict()))
    return model, example

@__import__("functools").cache
def turned(again=True):
    import nlm.gauge, small_transformers as small

    torch.manual_seed(0)
    model, (images, _) = small.vit(4, small.Size(12, 1, 2, 16)).eval(), pictures()[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if again:
        spec = nlm.trace(model, images[:4])
        gauge = nlm.gauge.find(model, images[:4], spec)
        state = gauge.fold(spec.apply(spec.random(1), model.state_dict()))
        model.load_state_dict(gauge.apply(gauge.random(1), state))
    return model, images[:4]

def straight():
    return turned(again=False)

def pictures():
    images = torch.randn(200, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return [(images, torch.arange(200) % 4)]

def batches():
    make = torch.Generator().manual_seed(0)
    x = torch.randn(40, 12, generator=make)
    return [(x[:20], x[:20].argmax(1) % 4), (x[20:], x[20:].argmax(1) % 4)]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with functions that make models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("NLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pairs.py").write_text(SOURCES.format(tests=str(Path(__file__).parents[1])))
    monkeypatch.delitem(sys.modules, "pairs", raising=False)
    return tmp_path


def planted() -> tuple[nlm.PermutationSpec, dict[str, torch.Tensor]]:
    """The specification of the pair, and the permutation that undoes the planted one."""
    import pairs

    model, example = pairs.a()
    spec = nlm.trace(model, example)
    return spec, spec.inverse(spec.random(3))


def is_undone(file: str) -> bool:
    spec, wanted = planted()
    found = AlignmentResult.load(file).permutation
    return all(torch.equal(found[name], wanted[name]) for name in spec.free)


def test_help_needs_no_torch(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it would fail
    assert run(["align", "--help"]) == 0
    assert "--data" in capsys.readouterr().out


def test_by_weights_a_planted_permutation_is_undone(capsys) -> None:
    assert run(["align", "pairs:a", "pairs:b", "-o", "p.safetensors", "--html", "p.html"]) == 0
    out = capsys.readouterr().out
    assert is_undone("p.safetensors")
    assert "1.000" in out and "Verified in float64" in out and "by weights" in out
    page = Path("p.html").read_text()
    assert "cosine of their weights" in page and "Objective against the sweep" in page
    assert "Barrier" not in page


def test_by_weights_from_other_starts(capsys) -> None:
    assert run(["align", "pairs:a", "pairs:b", "-o", "p.safetensors", "--frank-wolfe"]) == 0
    assert is_undone("p.safetensors")
    assert "Aligned by weights and Frank-Wolfe steps" in capsys.readouterr().out
    command = ["align", "pairs:a", "pairs:b", "-o", "q.safetensors", "--layerwise"]
    assert run(command) == 0
    assert len(AlignmentResult.load("q.safetensors").report.descents) == 2


def test_by_activations_with_the_barrier(capsys) -> None:
    command = ["align", "pairs:a", "pairs:b", "--data", "pairs:batches", "--quiet"]
    written = ["-o", "p.safetensors", "--html", "p.html", "--json", "p.json"]
    assert run([*command, *written]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    before, after = map(float, re.findall(r"([-.\de]+) (?:not )?aligned", captured.out))
    assert before > 0.01 and after < 1e-4
    page = Path("p.html").read_text()
    assert "Loss against the share" in page and "12 units" not in page and "24 units" in page
    assert run(["report", "p.json", "-o", "again.html"]) == 0
    assert Path("again.html").read_text() == page
    assert run([*command, "--weights", "-o", "w.safetensors", "--html", "w.html"]) == 0
    assert AlignmentResult.load("w.safetensors").report.method == "weights"
    assert "Loss against the share" in Path("w.html").read_text()


def test_files_of_weights_with_a_specification(capsys) -> None:
    spec, _ = planted()
    import pairs

    spec.save("spec.json")
    for name in ("a", "b"):
        save_file(getattr(pairs, name)()[0].state_dict(), f"{name}.safetensors")
    command = ["align", "a.safetensors", "b.safetensors", "-o", "p.safetensors"]
    assert run(command) == 1
    assert "a file of weights needs --spec" in capsys.readouterr().err
    assert run([*command, "--spec", "spec.json"]) == 0
    assert is_undone("p.safetensors")
    capsys.readouterr()
    data = [*command, "--force", "--spec", "spec.json", "--data", "pairs:batches", "--quiet"]
    assert run(data) == 1
    assert "data needs two models" in capsys.readouterr().err


def test_what_exists_is_refused_before_the_work(capsys) -> None:
    Path("p.safetensors").write_text("mine")
    assert run(["align", "no:a", "no:b", "-o", "p.safetensors"]) == 1
    assert "--force" in capsys.readouterr().err
    assert Path("p.safetensors").read_text() == "mine"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("missing.txt", "data is a file or package.module:function"),
        ("pairs:nothing", "nlm align: the data package.module:function exists"),
        ("unequal.safetensors", "one entry per sample in every tensor"),
    ],
)
def test_wrong_data_is_one_sentence(data: str, words: str, capsys) -> None:
    save_file({"x": torch.ones(3, 12), "y": torch.ones(4)}, "unequal.safetensors")
    command = ["align", "pairs:a", "pairs:b", "--data", data, "-o", "p.safetensors", "--quiet"]
    assert run(command) == 1
    assert words in capsys.readouterr().err
    assert not Path("p.safetensors").exists()


def language_models(folder: Path) -> None:
    """A small GPT-2 and a permuted copy of it, with tokens for letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz .\n")}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    config = GPT2Config(
        vocab_size=len(letters), n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    spec = nlm.trace(model, (), {"input_ids": torch.arange(16)[None], "use_cache": False})
    other = copy.deepcopy(model)
    other.load_state_dict(spec.apply(spec.random(1), model.state_dict()))
    for name, each in (("a", model), ("b", other)):
        each.save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / name)


def test_folders_and_a_text(folder: Path, capsys) -> None:
    language_models(folder)
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    command = ["align", "a", "b", "--data", "text.txt", "-o", "p.safetensors", "--html", "p.html"]
    assert run([*command, "--quiet"]) == 0
    out = capsys.readouterr().out
    _, after = map(float, re.findall(r"([-.\de]+) (?:not )?aligned", out))
    assert after < 1e-4
    tokens, mask = torch.arange(64).reshape(4, 16) % 29, torch.ones(4, 16, dtype=torch.int64)
    save_file({"input_ids": tokens, "attention_mask": mask}, "ids.safetensors")
    ids = ["align", "a", "b", "--data", "ids.safetensors", "--samples", "3", "-o", "q.safetensors"]
    assert run([*ids, "--stride", "4", "--residual", "identity", "--quiet"]) == 0
    report = AlignmentResult.load("q.safetensors").report
    assert set(report.samples.values()) == {12} and "g0" not in report.samples


def test_by_weights_and_activations(folder: Path, capsys) -> None:
    language_models(folder)
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    command = ["align", "a", "b", "--dual", "0.5", "-o", "p.safetensors", "--quiet"]
    assert run(command) == 1
    assert "--orthogonal and --dual with --data, got --dual" in capsys.readouterr().err
    assert run([*command, "--data", "text.txt"]) == 0
    assert "Aligned by weights and activations in" in capsys.readouterr().out
    assert AlignmentResult.load("p.safetensors").report.method == "dual"


def test_up_to_rotations(capsys) -> None:
    import pairs

    command = ["align", "pairs:straight", "pairs:turned", "--orthogonal", "-o", "p.safetensors"]
    assert run(command) == 1
    assert "--orthogonal and --dual with --data, got --orthogonal" in capsys.readouterr().err
    assert run([*command, "--data", "pairs:pictures", "--html", "p.html", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "by orthogonal maps" in out and "Barrier of the loss" in out
    assert "matched by orthogonal maps" in Path("p.html").read_text()
    found = OrthogonalAlignment.load("p.safetensors")
    there = found.fold(pairs.straight()[0].state_dict())
    back = found.apply(pairs.turned()[0].state_dict())
    assert all(torch.allclose(there[name], back[name], atol=1e-4) for name in there)
