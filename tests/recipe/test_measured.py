"""RegMean and greedy soups in recipes: measured on data, streamed, the results of nlm.merge."""

from pathlib import Path

import _pretrained as tiny
import pytest
import torch
from safetensors.torch import load_file, save_file

import nlm
from nlm.checkpoint import write_tensors
from nlm.merge import gram_matrices, greedy_soup, regmean
from nlm.recipe import RecipeError, check, read_recipe
from nlm.recipe.execution import execute
from nlm.recipe.modules import load_module
from nlm.symmetry.pretrained import trace_config

TASKS = ("a", "b", "c")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folders of three experts of each architecture, with inputs of each."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLM_CACHE", str(folder / "cache"))
        for name in ("bert", "gpt2"):
            (own := folder / name).mkdir()
            first = tiny.foundation(getattr(tiny, name))
            for task in TASKS:
                tiny.disturbed(first, ord(task), 0.1).save_pretrained(own / task)
                save_file(tiny.inputs(first, 24, ord(task)), own / f"{task}.safetensors")
            first.save_pretrained(own / "first")
            second = tiny.permuted(tiny.disturbed(first, 5, 0.08), own / "first")
            second.save_pretrained(own / "second")
        yield folder


def recipe(text: str, **more):
    Path("recipe.yaml").write_text(text)
    found = read_recipe("recipe.yaml")
    return found if not more else execute(found, **more)


def by_data(tasks=TASKS) -> str:
    each = (f"  {task}: {{path: {task}, data: {task}.safetensors}}" for task in tasks)
    return "experts:\n" + "\n".join(each) + "\nmethod: regmean\nparameters: {alpha: 0.7}\n"


def difference(found, expected) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name].double() - expected[name]).abs().max()) for name in expected)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_regmean_of_data_is_that_of_memory(home, name, tmp_path, monkeypatch):
    """Whatever the chunks; of transposed layers too."""
    monkeypatch.chdir(home / name)
    experts = {task: load_module(Path(task)) for task in TASKS}
    data = {task: [load_file(f"{task}.safetensors")] for task in TASKS}
    expected = {n: x.double() for n, x in regmean(experts, data, alpha=0.7).items()}
    mean = {n: x.double() for n, x in nlm.merge(experts, method="uniform_soup").items()}
    for memory in (64 << 20, 200_000):
        out = tmp_path / str(memory)
        execute(recipe(by_data()), out, memory=memory)
        found = load_module(out).state_dict()
        assert difference(found, expected) < 1e-6
        assert difference(found, mean) > 1e-3
    assert not list(tmp_path.glob(".*"))


def test_gram_matrices_in_files(home, tmp_path, monkeypatch):
    """As whoever has the data sends them."""
    monkeypatch.chdir(home / "bert")
    lines = []
    for task in TASKS:
        model = load_module(Path(task))
        grams = gram_matrices(model, [load_file(f"{task}.safetensors")])
        write_tensors(tmp_path / f"{task}.safetensors", grams)
        lines.append(f"  {task}: {{path: {task}, gram: {tmp_path}/{task}.safetensors}}")
    text = "experts:\n" + "\n".join(lines) + "\nmethod: regmean\nparameters: {alpha: 0.7}\n"
    made = recipe(text)
    assert check(made) == []
    execute(made, tmp_path / "files")
    execute(recipe(by_data()), tmp_path / "data")
    files, data = (load_module(tmp_path / each).state_dict() for each in ("files", "data"))
    assert difference(files, {name: x.double() for name, x in data.items()}) < 1e-6
    bad = {**grams, "classifier": torch.ones(3, 3)}
    write_tensors(tmp_path / "c.safetensors", bad, force=True)
    (problem,) = check(made)
    assert problem.startswith("recipe.yaml:4: a Gram matrix is [inputs, inputs] of a linear layer")
    assert "'classifier', no weight, of 'c'" in problem


def test_regmean_of_experts_of_two_foundations(home, tmp_path, monkeypatch):
    """What is measured is measured on the expert in the order in which it is merged."""
    monkeypatch.chdir(home / "bert")
    tiny.disturbed(load_module(Path("second")), 9, 0.1).save_pretrained(tmp_path / "d")
    text = (
        "foundations: {first: first, second: second}\nexperts:\n"
        "  a: {path: a, foundation: first, data: a.safetensors}\n"
        f"  d: {{path: {tmp_path}/d, foundation: second, data: b.safetensors, samples: 20}}\n"
        "align: weights\nmethod: regmean\nparameters: {alpha: 0.7}\n"
    )
    assert check(recipe(text)) == []
    execute(recipe(text), tmp_path / "out")
    found = load_module(tmp_path / "out").state_dict()
    spec = trace_config("first")
    spec.verify(load_module(Path("first")), (), load_file("a.safetensors"))
    states = [load_module(Path(each)).state_dict() for each in ("first", "second")]
    permutation = nlm.align(*states, spec).permutation
    moved = load_module(tmp_path / "d")
    moved.load_state_dict(spec.apply(permutation, moved.state_dict()))
    data = {"a": [load_file("a.safetensors")], "d": [load_file("b.safetensors")]}
    data["d"] = [{name: x[:20] for name, x in data["d"][0].items()}]
    expected = regmean({"a": load_module(Path("a")), "d": moved}, data, alpha=0.7)
    assert difference(found, {name: x.double() for name, x in expected.items()}) < 1e-6
    permuted = text.replace("data: b.safetensors, samples: 20", "gram: b.safetensors")
    assert any(
        "is permuted are measured as it is merged" in each for each in check(recipe(permuted))
    )


SOUP = "experts: {a: a, b: b, c: c}\nmethod: greedy_soup\nscore: SCORE\n"


def test_a_greedy_soup_by_the_models_own_loss(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home / "gpt2")
    tokens = load_file("a.safetensors")
    save_file(tokens, tmp_path / "validation.safetensors")
    text = SOUP.replace("SCORE", f"{tmp_path}/validation.safetensors")
    assert check(recipe(text)) == []
    execute(recipe(text), tmp_path / "out")
    experts = {task: load_module(Path(task)) for task in TASKS}
    body = experts["a"]

    def score(state) -> float:
        body.load_state_dict(state)
        with torch.no_grad():
            return -float(body(**tokens, labels=tokens["input_ids"]).loss)

    states = {
        task: {n: x.clone() for n, x in m.state_dict().items()} for task, m in experts.items()
    }
    expected = greedy_soup(states, score)
    found = load_module(tmp_path / "out").state_dict()
    assert difference(found, {n: x.double() for n, x in expected.merged.items()}) < 1e-7
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"A greedy soup of {', '.join(map(repr, expected.ingredients))}, of score" in card
    assert not list(tmp_path.glob(".*"))


def test_a_greedy_soup_by_a_function(home, tmp_path, monkeypatch):
    """Called with a module, and of files of weights with the state dict; what harms is left out."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("x", 5.0), ("y", 2.5), ("z", 1.0)):
        save_file({"w": torch.tensor([value])}, f"{name}.safetensors")
    Path("scores_of_soups.py").write_text(
        "def near(state):\n    return -abs(float(state['w'][0]) - 2)\n"
        "def none(state):\n    return float('nan')\n"
    )
    text = (
        "experts: {x: x.safetensors, y: y.safetensors, z: z.safetensors}\nmethod: greedy_soup\n"
        "score: scores_of_soups:near\n"
    )
    execute(recipe(text), tmp_path / "out.safetensors")
    assert load_file("out.safetensors")["w"].tolist() == [1.75]  # of y and z
    with pytest.raises(ValueError, match="a score is a number, got NaN for 'x'"):
        execute(recipe(text.replace("near", "none")), tmp_path / "other.safetensors")
    assert not Path("other.safetensors").exists() and not list(tmp_path.glob(".*"))


def test_what_is_wrong_is_said_before_any_work(home, monkeypatch):
    monkeypatch.chdir(home / "bert")
    for text, message in (
        (by_data().replace(", data: b.safetensors", ""), ":3: regmean has Gram matrices of every"),
        (by_data().replace("data: b.safetensors", "data: b.safetensors, gram: g"), "got both for"),
        (SOUP.replace("score: SCORE", ""), ":2: greedy_soup alone has a score, got none for"),
        (SOUP.replace("greedy_soup", "linear"), ":3: greedy_soup alone has a score, got one for"),
        (by_data().replace("0.7", "1.7"), ":6: alpha lies in [0, 1], got 1.7"),
    ):
        with pytest.raises(RecipeError) as error:
            recipe(text)
        assert message in str(error.value)
    for text, message in (
        (by_data().replace("b.safetensors", "none.txt"), ":3: data is a file or package.module"),
        (SOUP.replace("SCORE", "none:none"), ":3: the score package.module:function exists, got"),
        (SOUP.replace("SCORE", "a.safetensors"), ":3: a score is the loss on inputs with their"),
        (SOUP.replace("SCORE", "json:loads") + "heads: [cls]\n", ":4: a soup is of models of one"),
    ):
        assert any(message in each for each in check(recipe(text))), check(recipe(text))
