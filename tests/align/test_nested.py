"""Units inside units: block moves are optimal, nothing is lost, planted permutations come back."""

import itertools
import math

import pytest
import torch
from _structured import STRUCTURED, specification

import nlm
from nlm.align import weight_matching
from nlm.symmetry import PermutationSpec


def weights(spec: PermutationSpec, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn([layout.size for layout in layouts], generator=generator)
        for name, layouts in spec.params.items()
    }


def every_permutation(spec: PermutationSpec):
    """All that a specification allows."""
    choices = []
    for group in spec.free:
        *parents, size = spec.identity()[group].shape
        orders = [torch.tensor(order) for order in itertools.permutations(range(size))]
        choices.append(
            [
                torch.stack(lines).reshape(*parents, size)
                for lines in itertools.product(orders, repeat=math.prod(parents))
            ]
        )
    for chosen in itertools.product(*choices):
        yield dict(zip(spec.free, chosen, strict=True))


def product(a, b) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


ONE_TREE = {
    "heads": ("h:3 d:3<h", {"w": ["h:3 x d:3", "4"], "b": ["h:3 x d:3"]}),
    "two kinds of units in a head": (
        "h:3 d:2<h e:2<h",
        {"q": ["h:3 x d:2", "4"], "v": ["5", "h:3 x e:2"], "slope": ["h:3"]},
    ),
    "fused, as a sum": (
        "h:3 d:2<h e:2<h",
        {"qkv": ["(h:3 x d:2 + h:3 x d:2 + h:3 x e:2)", "4"]},
    ),
    "fused, as a family": (
        "s:3! h:3 d:2<h e:2<h",
        {"qkv": ["s:3 x s<h:3 | h:3 | h:3> x s<d:2 | d:2 | e:2>", "4"]},
    ),
    "fused, the selector on another dimension": (
        "s:2! h:3 d:2<h e:2<h",
        {"qkv": ["s:2", "5", "h:3 x s<d:2 | e:2>"]},
    ),
    "groups of queries": (
        "kv:2 rep:2<kv d:2<kv,rep e:2<kv",
        {"q": ["kv:2 x rep:2 x d:2", "4"], "k": ["kv:2 x e:2", "4"], "o": ["3", "kv:2 x rep:2"]},
    ),
    "heads that cannot move": ("h:3! d:3<h", {"w": ["h:3 x d:3", "4"]}),
    "two parents that cannot move": (
        "s:2! t:2! d:3<s,t",
        {"w": ["s:2 x d:3", "t:2", "4"], "b": ["t:2 x s:2 x d:3"]},
    ),
    "a member for each index of the selector": (
        "s:2! d:3<s e:3",
        {"w": ["s:2 x s<d:3 | d:3>", "4"]},
    ),
    "experts": ("e:3 f:2<e", {"up": ["e:3", "f:2", "4"], "down": ["e:3", "4", "f:2"]}),
    "experts, the parent fixed": ("e:3! f:3<e", {"up": ["e:3", "f:3", "4"]}),
    "grid": ("g:3", {"w": ["g:3 x 4", "2"], "v": ["2 x g:3 x 2"]}),
}


@pytest.mark.parametrize("case", ONE_TREE)
def test_a_move_is_the_optimum_of_all_permutations(case, monkeypatch):
    spec = specification(*ONE_TREE[case])
    for seed in range(2):
        a, b = weights(spec, seed), weights(spec, seed + 100)
        best = max(product(a, spec.apply(p, b)) for p in every_permutation(spec))
        for at_once in (1 << 27, 1):  # all pairs of parents together, or one after the other
            monkeypatch.setattr("nlm.align.nested._AT_ONCE", at_once)
            result = weight_matching(a, b, spec)
            assert product(a, spec.apply(result.permutation, b)) == pytest.approx(best, rel=1e-12)
            assert result.report.objective[1] == pytest.approx(best, rel=1e-12)  # in one sweep


QUADRATIC = {
    "heads of falcon": (
        "g:2 r:2<g d:2<g e:2<g",
        {"qkv": ["g:2 x (r:2 x d:2 + d:2 + e:2)", "3"], "o": ["3", "g:2 x r:2 x e:2"]},
    ),
    "a residual stream": ("r:6 f:5", {"w": ["r:6", "r:6"], "up": ["f:5", "r:6"], "b": ["r:6"]}),
    "grouped channels on both axes": (
        "g:3 c:2<g",
        {"w": ["g:3 x c:2", "g:3 x c:2", "2"], "b": ["g:3 x c:2"]},
    ),
    "a grouped convolution": (
        "g:3 o:2<g i:3<g r:5",
        {"w": ["g:3 x o:2", "i:3", "2"], "in": ["g:3 x i:3", "r:5"], "out": ["r:5", "g:3 x o:2"]},
    ),
    "a square inside each head": ("h:3 d:3<h", {"w": ["h:3", "d:3", "d:3"], "b": ["h:3 x d:3"]}),
    "a dense block": (
        "a:3 b:3",
        {"one": ["b:3", "a:3"], "two": ["4", "(a:3 + b:3)"], "three": ["b:3", "(a:3 + b:3)"]},
    ),
    "independent factors": ("h:3 d:3", {"w": ["h:3 x d:3", "4"], "v": ["h:3 x d:3", "2"]}),
    "parents in no chain": (
        "r:2 x:2<r y:2<r d:2<r,x,y",
        {"w": ["r:2 x x:2", "y:2 x d:2", "3"], "v": ["r:2", "x:2", "3"]},
    ),
    "independent parents": ("x:2 y:3 d:2<x,y", {"w": ["x:2 x d:2", "y:3", "3"]}),
    "a group with fixed parents beside one without": (
        "s:2! d:3<s e:3",
        {"w": ["s:2 x d:3", "e:3"], "v": ["e:3", "4"]},
    ),
}


@pytest.mark.parametrize("at_once", [1 << 27, 1])
@pytest.mark.parametrize("case", QUADRATIC)
def test_the_objective_never_falls(case, at_once, monkeypatch):
    monkeypatch.setattr("nlm.align.nested._AT_ONCE", at_once)
    spec = specification(*QUADRATIC[case])
    gained = 0.0
    for seed in range(8):
        a, b = weights(spec, seed), weights(spec, seed + 100)
        result = weight_matching(a, b, spec, seed=seed)
        objective = result.report.objective
        gained += objective[-1] - objective[0]
        assert objective == sorted(objective)
        assert objective[-1] == pytest.approx(
            product(a, spec.apply(result.permutation, b)), rel=1e-12
        )
        assert all(-1 <= value <= 1 for value in result.report.correlation.values())
    assert gained > 1


@pytest.mark.parametrize("case", {**ONE_TREE, **QUADRATIC})
def test_an_aligned_copy_stays(case):
    spec = specification(*{**ONE_TREE, **QUADRATIC}[case])
    a = weights(spec, 0)
    result = weight_matching(a, a, spec)
    assert all(torch.equal(result.permutation[g], p) for g, p in spec.identity().items())
    assert set(result.report.correlation) == set(spec.free)
    for group, value in result.report.correlation.items():
        assert value == pytest.approx(1.0 if any(spec.carriers(group)) else 0.0)


def test_a_selector_that_moves_is_refused():
    spec = specification("s:2 d:3 e:3", {"w": ["s:2 x s<d:3 | e:3>"]})
    with pytest.raises(ValueError, match="selects among the parts of a family is fixed, got 's'"):
        weight_matching(weights(spec, 0), weights(spec, 1), spec)


@pytest.mark.parametrize("method", ["weights", "activations", "dual"])
@pytest.mark.parametrize("case", STRUCTURED)
def test_a_planted_permutation_comes_back(case, method):
    for seed in range(3):
        torch.manual_seed(seed)
        model, spec, inputs = STRUCTURED[case]()
        spec.verify(model.eval(), inputs[:8])
        planted = spec.random(seed)
        other = STRUCTURED[case]()[0].eval()
        noisy = {
            name: tensor + 0.05 * tensor.std() * torch.randn_like(tensor)
            for name, tensor in model.state_dict().items()
        }
        other.load_state_dict(spec.apply(planted, noisy))
        data = None if method == "weights" else [inputs]
        result = nlm.align(model, other, spec, method, data=data)
        whole = spec.compose(planted, result.permutation)
        assert all(torch.equal(whole[group], still) for group, still in spec.identity().items())
        assert set(result.report.correlation) == set(spec.free)
        assert all(value > 0.9 for value in result.report.correlation.values())
        assert method == "weights" or set(result.report.samples) == set(spec.free)
        objective = result.report.objective
        assert objective == sorted(objective) and (method != "dual" or len(objective) > 1)


def test_observe_places_units_with_their_parents():
    torch.manual_seed(0)
    model, spec, inputs = STRUCTURED["experts"]()
    spec.sites.clear()
    spec.verify(model.eval(), inputs[:8])
    planted = spec.random(1)
    other = STRUCTURED["experts"]()[0].eval()
    other.load_state_dict(spec.apply(planted, model.state_dict()))
    with pytest.raises(ValueError, match=r"or at observe=.*got no module for 'e' at None"):
        nlm.align(model, other, spec, "activations", data=[inputs])
    for observe in ({"f": ("hidden", 1)}, {"f": ("hidden", -1), "e": ("gate", 1)}):
        result = nlm.align(model, other, spec, "activations", data=[inputs], observe=observe)
        whole = spec.compose(planted, result.permutation)
        assert all(torch.equal(whole[group], still) for group, still in spec.identity().items())
        assert result.report.samples == {"e": 256, "f": 256}
    with pytest.raises(
        ValueError, match=r"of its size, got \[4, 4\] for 'f' of 28 units at 'gate'"
    ):
        nlm.align(model, other, spec, "activations", data=[inputs], observe={"f": ("gate", 1)})


def test_where_a_group_is_observed():
    spec = specification(
        "s:2! h:3 d:4<h e:4<h c:5",
        {"w": ["h:3 x d:4", "h:3 x e:4", "c:5"]},
        {
            "scores": (1, "h:3"),
            "inner": (1, "d:4"),
            "q": (1, "h:3 x d:4"),
            "repeated": (1, "2 x h:3 x d:4"),
            "elsewhere": (1, "h:3 x s<d:4 | e:4>"),
            "fused": (1, "s:2 x h:3 x s<d:4 | e:4>"),
            "before": (1, "c:5"),
            "after": (1, "c:5"),
            "joined": (1, "(c:5 + 3)"),
        },
    )
    assert spec.observation_sites() == {"h": "scores", "d": "q", "e": "fused", "c": "after"}
