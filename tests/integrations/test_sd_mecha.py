"""Recipes with nlm's methods, merged by a real sd-mecha."""

import math
from pathlib import Path

import pytest
import torch
from _networks import mlp
from safetensors.torch import load_file, save_file
from torch import Tensor

import nlm

pytest.importorskip("sd_mecha", reason="a host, of the extra [hosts]")

import sd_mecha
from sd_mecha.extensions.merge_methods import resolve

from nlm.align import weight_matching
from nlm.integrations import sd_mecha as on_nlm

pytestmark = pytest.mark.host

State = dict[str, Tensor]

MLP = {
    "0.weight": ("P_0", None), "0.bias": ("P_0",), "2.weight": ("P_1", "P_0"), "2.bias": ("P_1",),
    "4.weight": (None, "P_1"), "4.bias": (None,),
}  # fmt: skip


def models(count: int = 4, seed: int = 0) -> list[State]:
    """A base and what is fine-tuned from it: float32, one entry in float64, one of integers."""
    make = torch.Generator().manual_seed(seed)
    shapes = {"up.weight": (40, 30), "up.bias": (40,), "down.weight": (7, 40, 3, 3)}
    base = {name: torch.randn(shape, generator=make) for name, shape in shapes.items()}
    found = [base] + [
        {name: x + 0.1 * torch.randn(x.shape, generator=make) for name, x in base.items()}
        for _ in range(count - 1)
    ]
    for number, state in enumerate(found):
        state["down.weight"] = state["down.weight"].double()
        state["ids"] = torch.arange(5)
        state["norm.running_var"] = torch.full((4,), float(number))
    return found


def merged(recipe: object, **more) -> State:
    """In the models' own types."""
    own = {"merge_dtype": None, "merge_device": None, "output_dtype": None, "threads": 0}
    found = dict(sd_mecha.merge(recipe, **{**own, **more}))
    found.pop("__metadata__", None)
    return found


def nodes(states: list[State]) -> list:
    return [sd_mecha.model(state) for state in states]


def experts(states: list[State]) -> dict[str, State]:
    return {str(place): state for place, state in enumerate(states)}


CASES = {
    "nlm_task_arithmetic": ({"alpha": 0.4}, "task_arithmetic", {"scale": 0.4}),
    "nlm_ties": (
        {"alpha": 0.4, "k": 0.3},
        "ties",
        {"scale": 0.4, "density": 0.3, "dialect": "mergekit"},
    ),
    "nlm_dare": ({"probability": 0.7, "seed": 3}, "dare", {"drop": 0.7, "seed": 3}),
    "nlm_dare_ties": (
        {"probability": 0.7, "seed": 3, "dialect": "peft", "rescale": "l1"},
        "dare_ties",
        {"drop": 0.7, "seed": 3, "dialect": "peft", "rescale": "l1"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_methods_are_those_of_merge(name: str) -> None:
    """Bit for bit, of all types, integers and statistics among them."""
    base, *others = models()
    options, method, ours = CASES[name]
    weights = {"0": 0.5, "1": 1.25, "2": -0.5}
    found = merged(
        getattr(on_nlm, name)(*nodes([base, *others]), weights="0.5, 1.25 -0.5", **options)
    )
    expected = nlm.merge(experts(others), base, method, weights=weights, **ours)
    assert set(found) == set(expected)
    for entry, each in expected.items():
        assert found[entry].dtype == each.dtype and torch.equal(found[entry], each), entry


def test_means_are_those_of_merge() -> None:
    states = models(3)
    found = merged(on_nlm.nlm_linear(*nodes(states), weights="1 2 3"))
    expected = nlm.merge(experts(states), method="linear", weights={"0": 1, "1": 2, "2": 3})
    for name in ("up.weight", "up.bias", "down.weight", "ids"):
        assert torch.equal(found[name], expected[name])
    found = merged(on_nlm.nlm_slerp(*nodes(states[:2]), alpha=0.3))
    expected = nlm.merge(experts(states[:2]), method="slerp", t=0.3)
    for name, each in expected.items():
        assert torch.equal(found[name], each)


def test_float32_is_the_hosts_but_for_rounding() -> None:
    """The mean, Task Arithmetic, and TIES where the host elects by sums."""
    states = [{n: x.float() for n, x in state.items() if "." in n} for state in models()]
    for state in states:
        del state["norm.running_var"]
    base, *others = nodes(states)
    size = states[0]["up.weight"].numel()
    k = 0.25
    deltas = [sd_mecha.subtract(other, base) for other in others]
    mean, add = sd_mecha.n_average(*deltas), resolve("add_difference")
    pairs = [
        (on_nlm.nlm_linear(*others), sd_mecha.n_average(*others)),
        (
            on_nlm.nlm_task_arithmetic(base, *others, alpha=0.5 / len(others)),
            add(base, mean, alpha=0.5),
        ),
        (
            on_nlm.nlm_ties(base, *others, alpha=0.5, k=(size - int((1 - k) * size) + 1) / size),
            add(base, sd_mecha.ties_sum(*deltas, k=k, vote_sgn=True), alpha=0.5),
        ),
    ]
    for ours, hosts in pairs:
        one, other = merged(ours), merged(hosts)
        torch.testing.assert_close(one["up.weight"], other["up.weight"], rtol=1e-5, atol=1e-6)


def test_numbers_by_entry_and_types_of_the_host(tmp_path: Path) -> None:
    """What the host does for every method: literals by key, casts, files, worker threads."""
    base, *others = models()
    files = []
    for number, state in enumerate([base, *others]):
        files.append(tmp_path / f"{number}.safetensors")
        save_file(state, files[-1])
    alpha = {name: float(number) / 4 for number, name in enumerate(base)}
    recipe = on_nlm.nlm_ties(*map(sd_mecha.model, files), k=0.3, alpha=alpha)
    out = tmp_path / "out.safetensors"
    sd_mecha.merge(recipe, output=out, output_dtype=torch.float32, threads=3)
    for name, each in load_file(out).items():
        wide = [{name: state[name].float()} for state in (base, *others)]
        if name in ("ids", "norm.running_var"):
            expected = wide[0][name] if name == "ids" else torch.full((4,), 2.0)
        else:
            expected = nlm.merge(
                experts(wide[1:]), wide[0], "ties", density=0.3, scale=alpha[name],
                dialect="mergekit",
            )[name]  # fmt: skip
        assert each.dtype == torch.float32 and torch.equal(each, expected), name


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A network, a permuted copy, an expert of the copy, and the files of specification and way."""
    folder = tmp_path_factory.mktemp("networks")
    state_a = mlp(0).state_dict()
    spec = nlm.PermutationSpec.from_axes_to_perm(MLP, state_a)
    spec.save(folder / "spec.json")
    order = spec.random(4)
    make = torch.Generator().manual_seed(1)
    expert = {n: x + 0.1 * torch.randn(x.shape, generator=make) for n, x in state_a.items()}
    state_b, moved = spec.apply(order, state_a), spec.apply(order, expert)
    weight_matching(state_a, state_b, spec).save(folder / "b_to_a.safetensors")
    return {
        "a": state_a, "b": state_b, "expert": expert, "moved": moved,
        "spec": str(folder / "spec.json"), "alignment": str(folder / "b_to_a.safetensors"),
    }  # fmt: skip


@pytest.mark.parametrize("threads", [0, 3])
def test_a_model_is_brought_into_anothers_order(networks: dict, threads: int) -> None:
    """Found once for all entries; the mean of a network and its permuted copy is the network."""
    a, b = (sd_mecha.model(networks[name]) for name in "ab")
    recipe = sd_mecha.weighted_sum(a, on_nlm.nlm_align(a, b, spec=networks["spec"]), alpha=0.5)
    found = merged(recipe, merge_dtype=torch.float32, merge_device="cpu", threads=threads)
    assert set(found) == set(networks["a"])
    for name, each in networks["a"].items():
        torch.testing.assert_close(found[name], each.float(), rtol=1e-6, atol=1e-7)


def test_an_expert_follows_its_foundation(networks: dict) -> None:
    """Whole, and as a difference; and by an alignment that was found before."""
    a, b, moved = (sd_mecha.model(networks[name]) for name in ("a", "b", "moved"))
    spec, alignment = networks["spec"], networks["alignment"]
    for recipe in (
        on_nlm.nlm_align_expert(a, b, moved, spec=spec),
        on_nlm.nlm_permute(moved, alignment=alignment, spec=spec),
    ):
        found = merged(recipe)
        assert all(torch.equal(found[name], each) for name, each in networks["expert"].items())
    shift = sd_mecha.subtract(moved, b)
    for recipe in (
        on_nlm.nlm_align_expert(a, b, shift, spec=spec),
        on_nlm.nlm_permute(shift, alignment=alignment, spec=spec),
    ):
        found = merged(resolve("add_difference")(a, recipe))
        for name in ("0.weight", "2.bias", "4.weight"):
            torch.testing.assert_close(found[name], networks["expert"][name])


def test_the_hosts_cache_keeps_the_permutation(networks: dict) -> None:
    a, b = (sd_mecha.model(networks[name]) for name in "ab")
    node = on_nlm.nlm_align(a, b, spec=networks["spec"])
    cache = {node: node.merge_method.create_cache()}
    first = merged(node, cache=cache)
    [(key, permutation)] = cache[node].items()
    assert key[:3] == (networks["spec"], 100, 0) and permutation
    second = merged(node, cache=cache)
    assert all(torch.equal(first[name], second[name]) for name in networks["a"])
    cache[node][key] = {name: torch.arange(len(index)) for name, index in permutation.items()}
    still = merged(node, cache=cache)
    assert all(torch.equal(still[name], networks["b"][name]) for name in networks["b"])


def test_entries_beside_the_specification(networks: dict) -> None:
    """Parts of a checkpoint that no specification knows are refused, or left where it is said."""
    a, b = (
        networks[name] | {"vae.weight": torch.full((2,), float(i))} for i, name in enumerate("ab")
    )
    kwargs = {"spec": networks["spec"]}
    for recipe in (
        lambda **more: on_nlm.nlm_align(*nodes([a, b]), **kwargs, **more),
        lambda **more: on_nlm.nlm_permute(
            *nodes([b]), alignment=networks["alignment"], **kwargs, **more
        ),
    ):
        with pytest.raises(ValueError, match=r"entries of its specification.*vae\.weight"):
            merged(recipe())
        found = merged(recipe(strict=False))
        assert torch.equal(found["vae.weight"], torch.ones(2))
        assert all(torch.equal(found[name], each) for name, each in networks["a"].items())


def test_a_tied_head_may_be_left_out(tmp_path: Path) -> None:
    """As files of language models do; not another entry."""
    make = torch.Generator().manual_seed(0)
    state = {
        "embed": torch.randn(20, 8, generator=make), "up": torch.randn(12, 8, generator=make),
        "gate": torch.randn(12, 8, generator=make), "down": torch.randn(8, 12, generator=make),
    }  # fmt: skip
    table = {"embed": (None, "r"), "up": ("f", "r"), "gate": ("f", "r"), "down": ("r", "f")}
    full, tied = state | {"head": state["embed"]}, {"head": (None, "r")}
    spec = nlm.PermutationSpec.from_axes_to_perm(table | tied, full)
    spec.save(tmp_path / "spec.json")
    moved = spec.apply(spec.random(2), full)
    del moved["head"]
    named = {"spec": str(tmp_path / "spec.json")}
    found = merged(on_nlm.nlm_align(*nodes([state, moved]), **named))
    assert set(found) == set(state)
    assert all(torch.equal(found[name], each) for name, each in state.items())
    del state["gate"]
    with pytest.raises(ValueError, match=r"got missing 'gate'$"):
        merged(on_nlm.nlm_align(*nodes([state, moved]), **named))


def test_a_recipe_is_text(networks: dict, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.safetensors" for name in "ab"}
    for name, file in files.items():
        save_file(networks[name], file)
    a, b = (sd_mecha.model(file) for file in files.values())
    recipe = on_nlm.nlm_linear(
        a, on_nlm.nlm_align(a, b, spec=networks["spec"]), weights="0.25, 0.75"
    )
    text = sd_mecha.serialize(recipe, finalize=False)
    assert 'merge "nlm_align" &0 &1 ' in text
    found = merged(sd_mecha.deserialize(text.splitlines()))
    for name in ("0.weight", "4.bias"):
        torch.testing.assert_close(found[name], networks["a"][name])


def test_mistakes_are_said(networks: dict) -> None:
    states = models()
    base, *others = nodes(states)
    a, b = networks["a"], networks["b"]
    bad = b | {"4.weight": b["4.weight"].clone().fill_(math.nan)}
    where = r"^nlm\.integrations\.sd_mecha: "
    for recipe, says in (
        (on_nlm.nlm_ties(base, *others, weights="1, 2"), r"got '1, 2' for 3$"),
        (on_nlm.nlm_linear(*others, weights="1, 2, x"), r"got '1, 2, x' for 3$"),
        (on_nlm.nlm_ties(base, *others, dialect="global"), "merges one tensor at a time"),
        (
            on_nlm.nlm_align(*nodes([a, bad]), spec=networks["spec"]),
            r"all entries, finite, got none for '4\.weight' of b$",
        ),
    ):
        with pytest.raises(ValueError, match=f"{where}.*{says}"):
            merged(recipe)
    for recipe, says in (
        (on_nlm.nlm_ties(base, *others, dialect="other"), "dialect is one of .*'other'"),
        (on_nlm.nlm_dare(base, *others, probability=1.5), r"lies in \[0, 1\), got 1.5"),
        (on_nlm.nlm_align(*nodes([a, a | b]), spec="vit-b-16"), "got missing .* and extra"),
    ):
        with pytest.raises(ValueError, match=says):
            merged(recipe)
    with pytest.raises(FileNotFoundError):
        merged(on_nlm.nlm_align(*nodes([a, b]), spec="nowhere.json"))
