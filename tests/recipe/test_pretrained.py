"""Recipes on models of transformers, end to end: checked, aligned, merged, loaded, and the function
of what was loaded."""

from pathlib import Path

import _pretrained as tiny
import pytest
import torch
from safetensors.torch import save_file

import nlm
from nlm.cli.app import run

BY_DEFAULT = ("bert", "gpt2", "llama", "vit")
SELDOM = ("roberta", "mistral", "qwen2", "clip", "t5")
nightly = pytest.mark.nightly


def marked(names, default):
    """The models, those that are not run by default marked so."""
    return [name if name in default else pytest.param(name, marks=nightly) for name in names]


RECIPE = """
foundations: {first: first, second: second}
experts: {a: {path: a, foundation: first}, b: {path: b, foundation: second}}
align: %s
method: linear
output: {path: %s}
"""


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Traced once for all tests, and anew for this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_twins(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A foundation with an expert, and both with their units in another order."""
    first = tiny.foundation(getattr(tiny, name))
    expert = tiny.disturbed(first, 2, 0.05)
    first.save_pretrained("first")
    expert.save_pretrained("a")
    tiny.permuted(first, Path("first")).save_pretrained("second")
    tiny.permuted(expert, Path("first")).save_pretrained("b")
    return expert, tiny.inputs(expert, 24)


def merged(recipe: str, output: str, kind: type) -> torch.nn.Module:
    """What a recipe gives, checked and merged by the command and loaded by transformers."""
    Path("recipe.yaml").write_text(recipe)
    assert run(["check", "recipe.yaml"]) == 0
    assert run(["merge", "recipe.yaml", "--quiet", "--no-sync"]) == 0
    assert not list(Path().glob(".*"))
    return kind.from_pretrained(output).eval()


@pytest.mark.parametrize("name", marked((*BY_DEFAULT, *SELDOM), ("bert", "vit")))
def test_a_permuted_copy_merged_with_its_original(folder, name):
    """It is the original's function to float accuracy, and that of plain averaging is not."""
    expert, batch = write_twins(name)
    wanted = tiny.outputs(expert, batch)
    model = merged(RECIPE % ("weights", "out"), "out", type(expert))
    plain = merged(RECIPE % ("none", "plain"), "plain", type(expert))
    error, other = (
        float((tiny.outputs(each, batch) - wanted).abs().max()) for each in (model, plain)
    )
    assert error < 1e-5 * float(wanted.std()) and other > 0.1 * float(wanted.std())


SEEN = [
    *((name, "activations", ()) for name in BY_DEFAULT),
    *((name, "activations", nightly) for name in SELDOM),
    *((name, "dual", nightly) for name in (*BY_DEFAULT, *SELDOM)),
    *((name, "orthogonal", nightly) for name in ("gpt2", "llama", "mistral", "qwen2", "vit", "t5")),
]


@pytest.mark.parametrize(
    ("name", "method"), [pytest.param(name, how, marks=mark) for name, how, mark in SEEN]
)
def test_by_what_is_seen_on_data(folder, name, method, capsys):
    expert, batch = write_twins(name)
    save_file(batch, "data.safetensors")
    align = f"{{method: {method}, data: data.safetensors, samples: 20}}"
    model = merged(RECIPE % (align, "out"), "out", type(expert))
    wanted = tiny.outputs(expert, batch)
    assert float((tiny.outputs(model, batch) - wanted).abs().max()) < 1e-4 * float(wanted.std())
    card = Path("out/README.md").read_text()
    assert f"was aligned with 'first' by {method}" in card and "| expert 'b' | b |" in card


@nightly
def test_a_post_norm_model_is_not_rotated(folder, capsys):
    """Said before anything is merged."""
    _, batch = write_twins("bert")
    save_file(batch, "data.safetensors")
    Path("recipe.yaml").write_text(RECIPE % ("{method: orthogonal, data: data.safetensors}", "out"))
    assert run(["merge", "recipe.yaml", "--quiet"]) == 1
    assert "align other models by permutations" in capsys.readouterr().err
    assert not Path("out").exists() and not list(Path().glob(".out*"))


@pytest.mark.parametrize(
    "correct", [pytest.param(False, marks=nightly), True], ids=["merged", "tact"]
)
def test_experts_with_heads_of_their_own(folder, correct):
    """Classifiers of two sizes on a masked language model's trunk: each is permuted with it."""
    from transformers import BertForSequenceClassification

    first = tiny.foundation(tiny.bert)
    first.save_pretrained("first")
    tiny.permuted(first, Path("first")).save_pretrained("second")
    batch = {"input_ids": tiny.inputs(first, 16)["input_ids"]}
    save_file(batch, "data.safetensors")
    wanted = {}
    for task, labels in (("a", 3), ("b", 4)):
        config = first.config.__class__(**{**first.config.to_dict(), "num_labels": labels})
        expert = BertForSequenceClassification(config).eval()
        expert.load_state_dict(first.state_dict(), strict=False)
        expert = tiny.disturbed(expert, labels, 0.0)
        torch.nn.init.normal_(expert.classifier.weight)
        expert.save_pretrained(task)
        wanted[task] = tiny.outputs(expert, batch)
        if task == "b":
            moved = tiny.permuted(expert, Path("b"), like=Path("first"))
            moved.save_pretrained(task)
    text = RECIPE % ("weights", "out") + "heads: [cls, classifier, bert.pooler]\n"
    if correct:
        text += "correct: {method: tact, data: {a: data.safetensors, b: data.safetensors}}\n"
    Path("recipe.yaml").write_text(text)
    assert run(["check", "recipe.yaml"]) == 0
    assert run(["merge", "recipe.yaml", "--quiet"]) == 0
    together = nlm.load("out")
    for task, logits in wanted.items():
        alone = nlm.load("out", task=task)
        assert type(alone) is BertForSequenceClassification
        assert alone.config.num_labels == logits.shape[1]
        for found in (tiny.outputs(alone, batch), tiny.outputs(together, batch, task=task)):
            torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
