"""Every method of recipes gives from files what nlm.merge gives from the same numbers in memory."""

import math
from pathlib import Path

import pytest
import torch
from _networks import mlp, vectors
from safetensors.torch import load_file, save_file
from streaming._checkpoints import TASKS, states, write
from streaming.test_engine import assert_same, loaded

import nlm
from nlm._names import is_statistic
from nlm.recipe import RecipeError, check, forecast, read_recipe
from nlm.recipe.execution import execute
from nlm.recipe.methods import METHODS

#: What is told beside the method: in the recipe, and in memory where it is called otherwise.
GIVEN = {
    "linear": {}, "uniform_soup": {}, "model_stock": {}, "slerp": {"t": 0.3},
    "task_arithmetic": {"scale": -0.7},  # negation
    "ties": {"density": 0.4, "dialect": "mergekit"},
    "dare": {"drop": 0.6, "rescale": "l1"}, "dare_ties": {"drop": 0.5},
    "breadcrumbs": {"density": 0.3, "gamma": 0.05, "scale": 0.4},
    "breadcrumbs_ties": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.2}, "della_linear": {"density": 0.4, "rescale": "l1"},
    "sce": {"select": 0.25}, "tall_mask": {"mask_threshold": 0.6},
    "consensus": {"mask_threshold": 0.3, "agreement": 3, "scale": 0.4}, "fisher": {"floor": 0.1},
}  # fmt: skip


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The base, the experts and their Fisher information, also in the working folder."""
    monkeypatch.chdir(tmp_path)
    base, *experts = states(4, torch.bfloat16)
    tasks = dict(zip(TASKS, experts, strict=True))
    make = torch.Generator().manual_seed(1)
    for state in (base, *experts):
        state["logit_scale"] = torch.randn((), generator=make).bfloat16()  # without dimensions
    write(tmp_path / "base", base)
    fishers = {}
    for task, state in tasks.items():
        write(tmp_path / task, state)
        fishers[task] = {
            name: torch.rand(tensor.shape, generator=make)
            for name, tensor in state.items()
            if tensor.is_floating_point() and not is_statistic(name)
        }
        save_file(fishers[task], f"{task}-fisher.safetensors")
    return base, tasks, fishers


def recipe_of(method: str, tasks, weights=None, given=None) -> str:
    """The text of a recipe that says all of it."""
    own = METHODS[method]
    lines = [f"method: {method}", "output: out", "experts:"]
    for task in tasks:
        keys = {"path": task, **({"fisher": f"{task}-fisher.safetensors"} if own.of_each else {})}
        keys |= {"weight": weights[task]} if weights else {}
        lines.append(f"  {task}: {{{', '.join(f'{k}: {v}' for k, v in keys.items())}}}")
    lines += ["base: base"] if own.base else []
    lines += ["seed: 7"] if own.random else []
    given = GIVEN[method] if given is None else given
    lines += [f"parameters: {{{', '.join(f'{k}: {v}' for k, v in given.items())}}}"]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("method", GIVEN)
def test_a_recipe_is_the_merge_in_memory(models, method):
    base, tasks, fishers = models
    tasks = dict(list(tasks.items())[:2]) if method == "slerp" else tasks
    weights = dict(zip(tasks, (0.5, 1.5, -0.75), strict=False))
    weights = weights if "weight" in METHODS[method].parameters else None
    Path("recipe.yaml").write_text(recipe_of(method, tasks, weights))
    recipe = read_recipe("recipe.yaml")
    expected_bytes = forecast(recipe)
    report = execute(recipe)
    masks = sum(file.stat().st_size for file in Path().glob("out/masks/*")) if tasks else 0
    assert 0 <= report.written + masks - expected_bytes.written < 9000  # headers
    assert sum(expected_bytes.inputs.values()) == report.read
    more = {"weights": weights} if weights else {}
    more |= {"seed": 7} if METHODS[method].random else {}
    more |= {"fishers": fishers} if method == "fisher" else {}
    start = base if METHODS[method].base else None
    expected = nlm.merge(tasks, start, method, **GIVEN[method], **more)
    assert_same(loaded(Path("out")), dict(expected))
    if method == "tall_mask":
        for task in tasks:
            assert_same(load_file(f"out/masks/{task}.safetensors"), expected.masks[task])


def test_numbers_differ_from_tensor_to_tensor_and_expert_to_expert(models):
    base, tasks, _ = models
    rules = "[{filter: up, value: 0.1}, {value: 0.9}]"
    text = recipe_of("breadcrumbs", tasks, given={"density": rules, "gamma": 0.02})
    Path("recipe.yaml").write_text(text.replace("path: two", "path: two, gamma: 0.3"))
    execute(read_recipe("recipe.yaml"))
    found = loaded(Path("out"))
    gammas = {"one": 0.02, "two": 0.3, "three": 0.02}
    parts = [
        nlm.merge({task: state}, base, "breadcrumbs", density=0.1, gamma=gammas[task])
        for task, state in tasks.items()
    ]
    name = "layers.0.up.weight"
    total = sum(part[name].float() - base[name].float() for part in parts)
    unit = torch.finfo(torch.bfloat16).eps * 4
    assert float((found[name].float() - base[name].float() - total).abs().max()) < unit
    changed = (
        (found[name] != base[name]).float().mean(),
        (found["embed.weight"] != base["embed.weight"]).float().mean(),
    )
    assert changed[0] < 0.3 and changed[1] > 0.8


def problems_of(text: str) -> list[str]:
    Path("recipe.yaml").write_text(text)
    return check(read_recipe("recipe.yaml"))


def test_fisher_files_are_checked_before_any_work(models):
    _, tasks, fishers = models
    text = recipe_of("fisher", tasks)
    assert problems_of(text) == []
    Path("one-fisher.safetensors").unlink()
    del fishers["two"]["norm.weight"]
    save_file(fishers["two"], "two-fisher.safetensors")
    fishers["three"]["norm.weight"] = torch.ones(3)
    save_file(fishers["three"], "three-fisher.safetensors")
    first, second, third = problems_of(text)
    assert first.startswith("recipe.yaml:4: ") and "one-fisher.safetensors" in first
    assert second.startswith(
        "recipe.yaml:5: the Fisher information of an entry is a number for each of its weights, "
        "got none for 'norm.weight' [8] of 'two' in "
    )
    assert "got F32 [3] for 'norm.weight' [8] of 'three'" in third
    with pytest.raises(RecipeError):
        execute(read_recipe("recipe.yaml"))
    assert not Path("out").exists()


def test_fisher_information_is_permuted_as_its_expert_is(tmp_path, monkeypatch):
    """Two foundations, the second a permuted first: as if the second expert were of the first."""
    monkeypatch.chdir(tmp_path)
    model = mlp(0)
    foundation = model.state_dict()
    table = {"0.weight": ("p", None), "0.bias": ("p",), "2.weight": ("q", "p"), "2.bias": ("q",)}
    table |= {"4.weight": (None, "q"), "4.bias": (None,)}
    spec = nlm.PermutationSpec.from_axes_to_perm(table, foundation)
    spec.verify(model, vectors())
    spec.save("spec.json")
    moves = spec.random(1)
    make = torch.Generator().manual_seed(0)
    experts, fishers = (
        {
            task: {n: at * t + torch.rand(t.shape, generator=make) for n, t in foundation.items()}
            for task in "ab"
        }
        for at in (1.0, 0.0)
    )
    expected = nlm.merge(experts, method="fisher", fishers=fishers)
    save_file(foundation, "f.safetensors")
    save_file(spec.apply(moves, foundation), "g.safetensors")
    for kind, states_of in (("expert", experts), ("fisher", fishers)):
        save_file(states_of["a"], f"{kind}-a.safetensors")
        save_file(spec.apply(moves, states_of["b"]), f"{kind}-b.safetensors")
    Path("recipe.yaml").write_text("""
        foundations: {f: f.safetensors, g: g.safetensors}
        align: {method: weights, spec: spec.json}
        experts:
          a: {path: expert-a.safetensors, foundation: f, fisher: fisher-a.safetensors}
          b: {path: expert-b.safetensors, foundation: g, fisher: fisher-b.safetensors}
        method: fisher
        output: out.safetensors
    """)
    execute(read_recipe("recipe.yaml"))
    assert_same(load_file("out.safetensors"), dict(expected))


@pytest.mark.parametrize(("bad", "told"), [(-math.pi, r"-3\.14.*"), (math.nan, "nan")])
def test_bad_information_writes_nothing(models, bad, told):
    _, tasks, fishers = models
    fishers["two"]["norm.weight"][3] = bad
    save_file(fishers["two"], "two-fisher.safetensors")
    Path("recipe.yaml").write_text(recipe_of("fisher", tasks))
    with pytest.raises(ValueError, match=rf"at least 0, got {told} in 'norm\.weight' of 'two'"):
        execute(read_recipe("recipe.yaml"))
    assert not Path("out").exists() and not list(Path().glob(".out*"))


def test_tall_mask_keeps_a_base_to_restore_from(models):
    _, tasks, _ = models
    text = recipe_of("tall_mask", tasks)
    assert problems_of(text) == []
    assert problems_of(text.replace("output: out", "output: out.safetensors")) == [
        "recipe.yaml:2: masks are written to a folder, got the file 'out.safetensors'"
    ]
    two = text.replace("base: base", "foundations: {f: base, g: one}")
    two = two.replace("{path:", "{foundation: f, path:")
    [problem] = problems_of(two)
    assert problem.startswith("recipe.yaml:1: tall_mask restores tasks from a base that stays")


def test_numbers_that_do_not_go_together_are_found_before_any_work(models):
    _, tasks, _ = models
    for agreement in (4, 1.5):
        assert problems_of(recipe_of("consensus", tasks, given={"agreement": agreement})) == [
            "recipe.yaml:8: an agreement lies in [1, 3], the number of experts, got "
            f"{float(agreement)}"
        ]
    several = {"density": "[{filter: up, value: 0.3}, {value: 0.4}]"}  # no ties, no one density
    assert problems_of(recipe_of("breadcrumbs_ties", tasks, given=several)) == []
    zero = dict(zip(tasks, (1.0, -1.0, 0.0), strict=True))
    assert any("sum" in each for each in problems_of(recipe_of("fisher", tasks, zero)))
    text = recipe_of("della", tasks, given={"density": 0.4, "epsilon": 0.3})
    assert problems_of(text) == []
    assert problems_of(text.replace("path: two", "path: two, density: 0.9")) == [
        "recipe.yaml:5: density - epsilon and density + epsilon lie in (0, 1), got density 0.9 and "
        "epsilon 0.3"
    ]
