"""Recipes carried out on real checkpoints of transformers: aligned, permuted, merged, loaded."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import nlm
from nlm.checkpoint import open_checkpoint
from nlm.cli.app import run
from nlm.recipe import read_recipe
from nlm.recipe.execution import execute
from nlm.symmetry.pretrained import make_inputs, trace_config


def disturbed(model, seed, size):
    other = copy.deepcopy(model)
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=make))
    return other


def bert():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=16,
    )  # fmt: skip
    return BertForMaskedLM(config)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=40, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module", params=[bert, llama], ids=["bert", "llama"])
def made(request, tmp_path_factory):
    """Two foundations, the second a permuted and disturbed first, and an expert of each."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    first = request.param().eval()
    first.save_pretrained(folder / "first")
    spec = trace_config(str(folder / "first"))
    spec.verify(first, (), make_inputs(first))
    second = copy.deepcopy(first)
    moved = spec.apply(spec.random(1), disturbed(first, 1, 0.01).state_dict())
    second.load_state_dict(moved)
    models = {"first": first, "second": second}
    models |= {"one": disturbed(first, 2, 0.02), "two": disturbed(second, 3, 0.02)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return type(first), spec, models, folder


@pytest.fixture
def family(made, tmp_path, monkeypatch):
    """The class, the specification and the models, in the working folder too."""
    kind, spec, models, folder = made
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return kind, spec, models


RECIPE = """
foundations: {first: first, second: second}
experts:
  one: {path: one, foundation: first}
  two: {path: two, foundation: second, weight: 0.5}
align: {method: weights}
method: %s
output: {path: out}
"""


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_experts_of_two_foundations_become_one_model(family, method):
    """The same as aligning, permuting and merging in memory; loads and runs as any model."""
    kind, spec, models = family
    Path("recipe.yaml").write_text(RECIPE % method)
    assert run(["merge", "recipe.yaml", "--quiet"]) == 0
    states = {name: model.state_dict() for name, model in models.items()}
    found = nlm.align(states["first"], states["second"], spec, "weights")
    aligned = spec.apply(found.permutation, states["second"])
    moved = {"one": states["one"], "two": spec.apply(found.permutation, states["two"])}
    pair = {"a": states["first"], "b": aligned}
    names = open_checkpoint("first").tensors  # tied entries stand in a file once
    first, experts = (
        {who: {name: state[name] for name in names} for who, state in each.items()}
        for each in (pair, moved)
    )
    base = nlm.merge(first, method="linear")
    expected = nlm.merge(experts, base, method, weights={"one": 1.0, "two": 0.5})
    merged = kind.from_pretrained("out").eval()
    state = merged.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-7)
    tokens = torch.arange(12).view(1, 12) % 60
    reference = copy.deepcopy(models["first"])
    reference.load_state_dict(expected, strict=False)
    torch.testing.assert_close(logits(merged, tokens), logits(reference, tokens))
    assert not list(Path().glob(".out*"))


def test_a_permutation_that_was_found_before(family):
    """`nlm align`'s file for an expert; a merge of a model with its own permuted copy is itself."""
    kind, _, models = family
    assert run(["align", "first", "second", "-o", "p.safetensors", "--quiet"]) == 0
    Path("recipe.yaml").write_text("""
experts:
  one: {path: first}
  two: {path: second, permutation: p.safetensors}
method: linear
output: {path: out, dtype: float32}
""")
    assert run(["merge", "recipe.yaml", "--quiet", "--json"]) == 0
    merged = kind.from_pretrained("out").eval()
    tokens = torch.arange(12).view(1, 12) % 60
    apart = (logits(models["second"], tokens) - logits(models["first"], tokens)).abs().max()
    assert (logits(merged, tokens) - logits(models["first"], tokens)).abs().max() < apart


def test_a_base_that_is_the_other_foundation_is_aligned_too(family):
    kind, _, _ = family
    for base, scale in (("second", 0.0), ("first", 0.0)):
        text = RECIPE.replace("experts:", f"base: {base}\nexperts:", 1) % "task_arithmetic"
        Path("recipe.yaml").write_text(f"{text}parameters: {{scale: {scale}}}\n")
        assert run(["merge", "recipe.yaml", "--quiet", "-o", base]) == 1  # an input
        assert run(["merge", "recipe.yaml", "--quiet", "-o", f"out_{base}"]) == 0
    Path("link").symlink_to("second")
    for number, base in enumerate((Path("second").resolve(), "link")):  # the same by another path
        text = RECIPE.replace("experts:", f"base: {base}\nexperts:", 1) % "task_arithmetic"
        Path("recipe.yaml").write_text(f"{text}parameters: {{scale: 0.0}}\n")
        assert run(["merge", "recipe.yaml", "--quiet", "-o", f"again_{number}"]) == 0
        found, wanted = (
            load_file(f"{f}/model.safetensors") for f in (f"again_{number}", "out_second")
        )
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    one, other = (kind.from_pretrained(f"out_{base}").state_dict() for base in ("first", "second"))
    for name, tensor in one.items():
        assert (other[name] - tensor).abs().max() < 0.1, name  # disturbed by .01, not permuted


MERGEKIT = {
    "linear": {"weight": 0.5}, "slerp": {"t": 0.4}, "model_stock": {},
    "task_arithmetic": {"weight": 0.5, "lambda": 0.5},
    "ties": {"weight": 0.5, "density": 0.5, "normalize": False},
    "dare_linear": {"weight": 0.5, "density": 0.5}, "dare_ties": {"weight": 0.5, "density": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("method", MERGEKIT)
def test_what_is_read_of_mergekits_recipes_is_done(family, method):
    kind, _, models = family
    names = ["first", "one"] if method == "slerp" else ["one", "two"]
    recipe = {"merge_method": method, "dtype": "float32", "parameters": MERGEKIT[method]}
    recipe |= {"models": [{"model": name} for name in names]}
    if method != "linear":
        recipe["base_model"] = "first"
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run(["check", "recipe.yaml"]) == 0
    assert run(["merge", "recipe.yaml", "-o", "out", "--quiet"]) == 0
    state = kind.from_pretrained("out").state_dict()
    assert any(not torch.equal(state[n], t) for n, t in models["first"].state_dict().items())


def test_a_file_whose_tensors_are_not_aligned(family):
    """The same result as from the same tensors where they are."""
    content = Path("one/model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip() + b" "
    header += b" " * (len(header) % 2 == 0)
    odd = len(header).to_bytes(8, "little") + header + content[8 + length :]
    text = "base: first\nexperts: {one: {path: one}}\nmethod: ties\n"
    Path("recipe.yaml").write_text(text)
    assert run(["merge", "recipe.yaml", "-o", "aligned", "--quiet"]) == 0
    Path("one/model.safetensors").write_bytes(odd)
    assert run(["merge", "recipe.yaml", "-o", "odd", "--quiet"]) == 0
    files = [Path(name, "model.safetensors").read_bytes() for name in ("aligned", "odd")]
    assert files[0] == files[1]


def test_sharded_and_changed_types(family):
    kind, _, models = family
    Path("recipe.yaml").write_text("""
base: first
experts: {one: {path: one}}
method: task_arithmetic
output: {path: out, dtype: bfloat16, shard: 20kB}
""")
    execute(read_recipe(Path("recipe.yaml")))
    assert len(open_checkpoint("out").files) > 1
    merged = kind.from_pretrained("out", dtype="auto")
    assert next(merged.parameters()).dtype == torch.bfloat16
    for name, tensor in models["one"].state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name].float(), tensor, rtol=1e-2, atol=1e-4)


def test_what_cannot_be_done_is_said(family, capsys):
    Path("recipe.yaml").write_text(
        RECIPE.replace("method: weights", "method: activations, data: recipe.yaml") % "ties"
    )
    assert run(["merge", "recipe.yaml", "--quiet"]) == 1
    assert "a text needs the tokenizer" in capsys.readouterr().err.replace("\n", " ")
    assert not Path("out").exists() and not list(Path().glob(".out*"))
    save_file({"other.weight": torch.ones(3)}, "strange.safetensors")
    Path("recipe.yaml").write_text(
        RECIPE.replace("path: two", "path: strange.safetensors") % "ties"
    )
    assert run(["merge", "recipe.yaml", "--quiet"]) == 1
    assert not Path("out").exists()


def test_the_recipe_of_the_readme(family):
    kind, _, models = family
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    text = re.search(r"```yaml\n(.*?)```", readme, flags=re.DOTALL)[1]
    part = "attn" if kind.__name__.startswith("Llama") else "attention"
    Path("recipe.yaml").write_text(text.replace("attn", part))
    for name, path in (
        ("first", "models/one"),
        ("second", "models/two"),
        ("one", "experts/digits"),
        ("two", "experts/greek"),
    ):
        models[name].save_pretrained(path)
    assert run(["check", "recipe.yaml"]) == 0
    assert run(["merge", "recipe.yaml", "--quiet"]) == 0
    assert next(kind.from_pretrained("merged", dtype="auto").parameters()).dtype == torch.bfloat16


def test_files_of_weights_with_a_specification(tmp_path, monkeypatch):
    """No transformers: state dicts in files, and a specification beside them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    spec = nlm.trace(network, torch.randn(2, 5))
    spec.save("spec.json")
    state = network.state_dict()
    permutation = spec.random(0)
    save_file(state, "first.safetensors")
    save_file(spec.apply(permutation, state), "second.safetensors")
    Path("recipe.yaml").write_text("""
foundations: {first: first.safetensors, second: second.safetensors}
experts:
  one: {path: first.safetensors, foundation: first}
  two: {path: second.safetensors, foundation: second}
align: {method: weights, spec: spec.json}
method: linear
output: {path: out.safetensors}
""")
    assert run(["merge", "recipe.yaml", "--quiet"]) == 0
    merged = load_file("out.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in state.items())
    assert json.loads(Path("spec.json").read_text())


def test_folders_of_an_architecture_of_ones_own(tmp_path, monkeypatch):
    """With a specification and a permutation nothing is asked of transformers."""
    monkeypatch.chdir(tmp_path)
    network = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    spec = nlm.trace(network, torch.randn(2, 5))
    spec.save("spec.json")
    other = spec.apply(spec.random(0), network.state_dict())
    for name, state in (("first", network.state_dict()), ("second", other)):
        Path(name).mkdir()
        save_file(state, f"{name}/model.safetensors")
        Path(name, "config.json").write_text('{"model_type": "own"}')
    nlm.align(network.state_dict(), other, spec, "weights").save("p.safetensors")
    Path("recipe.yaml").write_text("""
base: first
align: {spec: spec.json}
experts:
  one: {path: first}
  two: {path: second, permutation: p.safetensors}
method: ties
output: {path: out}
""")
    assert run(["check", "recipe.yaml"]) == 0
    assert run(["merge", "recipe.yaml", "--quiet"]) == 0
    merged = load_file("out/model.safetensors")
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(merged[name], tensor)
