"""docs/methods.md tells the truth: its table is that of the methods, and its examples run."""

import re
from pathlib import Path

import torch
from _networks import mlp, vectors
from safetensors.torch import load_file, save_file
from streaming._plans import plan_of

import nlm
from nlm._methods import METHODS, OPTIONS, WITHOUT_BASE
from nlm.recipe import read_recipe
from nlm.recipe.mergekit import _METHODS as OF_MERGEKIT
from nlm.recipe.methods import METHODS as OF_RECIPES
from nlm.streaming import STREAMED, Plan, run

PAGE = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
WITH_DATA = ("greedy_soup", "regmean")  # what takes modules in Python
ROWS = [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in PAGE.splitlines()
    if line.startswith("| `")
]


def test_the_table_is_that_of_the_methods() -> None:
    names = [row[0].strip("`") for row in ROWS]
    assert names == [*METHODS, *WITH_DATA]
    assert set(STREAMED) == {*METHODS, "regmean"} and set(OF_RECIPES) == {*METHODS, *WITH_DATA}
    for name, (_, options, base, in_files, *_) in zip(names, ROWS, strict=True):
        assert in_files == "yes"
        assert base == ("no" if name in (*WITHOUT_BASE, *WITH_DATA) else "yes")
        if name in METHODS:
            own = {o: default for o, (default, readers) in OPTIONS.items() if name in readers}
            told = [f"`{o}`" if d is None else f"`{o}` {d}" for o, d in own.items()]
            assert options == (", ".join(told) or "-")
            assert OF_RECIPES[name].base == (base == "yes")


def test_the_names_of_mergekit_are_all_told() -> None:
    told = PAGE[PAGE.index("mergekit's own YAML") :].partition("with mergekit's")[0]
    assert set(re.findall(r"`(\w+)`", told)) - {"dare"} == set(OF_MERGEKIT)


def test_the_recipes_of_the_page_are_read(tmp_path: Path) -> None:
    for text in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL):
        (tmp_path / "recipe.yaml").write_text(text)
        assert read_recipe(tmp_path / "recipe.yaml").output.path == tmp_path / "merged"


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    negation, restored, with_data = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    base, toxic, chat = (mlp(seed).state_dict() for seed in range(3))
    names = {"nlm": nlm, "base": base, "toxic": toxic, "chat": chat}
    exec(negation, names)
    for name, start in base.items():
        torch.testing.assert_close(names["forgets"][name], start - 0.5 * (toxic[name] - start))
        moved = chat[name] - start - 0.5 * (toxic[name] - start)
        torch.testing.assert_close(names["without"][name], start + moved)

    Path("models").mkdir()
    for file, state in (("models/base", base), ("digits", toxic), ("greek", chat)):
        Path(file).mkdir()
        save_file(state, f"{file}/model.safetensors")
    experts = {"digits": Path("digits"), "greek": Path("greek")}
    plan: Plan = plan_of(Path("merged"), Path("models/base"), experts, "tall_mask")
    run(plan)
    exec(restored, names)
    merged = nlm.merge({"digits": toxic, "greek": chat}, base, "tall_mask").for_task("digits")
    found = load_file("digits-restored/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in merged.items())

    names |= {"experts": {"a": mlp(0), "b": mlp(1)}, "data": {"a": [vectors()], "b": [vectors()]}}
    names["score"] = lambda state: float(state["0.bias"].sum())
    exec(with_data, names)
    assert set(names["merged"]) == set(base) == set(names["soup"].merged)
