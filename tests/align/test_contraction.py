"""A similarity of which only the changed terms are replaced is the one made afresh."""

import pytest
import torch
from _structured import specification

from nlm.align import nested
from nlm.align.descent import Descent
from nlm.align.similarity import Comparison
from nlm.symmetry import PermutationSpec
from nlm.symmetry.gather import Gathers

CASES = {
    "layers": (
        "r:40 f:50",
        {"up": ["f:50", "r:40"], "bias": ["f:50"], "down": ["r:40", "f:50"], "conv": ["r:40", "9"]},
    ),
    "heads": (
        "r:40 h:8 d:5<h",
        {"q": ["h:8 x d:5", "r:40"], "o": ["r:40", "h:8 x d:5"], "in": ["r:40", "7"]},
    ),
    "experts": (
        "r:40 e:8 f:12<e",
        {"up": ["e:8", "f:12", "r:40"], "down": ["e:8", "r:40", "f:12"], "in": ["r:40", "7"]},
    ),
    "experts that cannot move": (
        "r:40 e:8! f:12<e",
        {"up": ["e:8", "f:12", "r:40"], "down": ["e:8", "r:40", "f:12"], "in": ["r:40", "7"]},
    ),
    "fused": ("r:40 a:30 b:30", {"w": ["(a:30 + b:30)", "r:40"], "v": ["r:40", "a:30", "b:30"]}),
}


def nearly(spec: PermutationSpec, permutation: dict, swaps: int, seed: int) -> dict:
    """A permutation of which a few pairs of units are exchanged."""
    random = torch.Generator().manual_seed(seed)
    changed = {}
    for name, index in permutation.items():
        changed[name] = index.clone()
        if not spec.groups[name].fixed and len(index.shape) <= 2:
            lines = changed[name].reshape(-1, index.shape[-1])
            for _ in range(swaps):
                line = lines[int(torch.randint(len(lines), (), generator=random))]
                pair = torch.randperm(len(line), generator=random)[:2]
                line[pair] = line[pair.flip(0)]
    return changed


@pytest.mark.parametrize("case", CASES)
def test_replaced_terms_give_the_similarity_made_afresh(case, monkeypatch):
    replaced = []
    add_change = nested.add_change
    monkeypatch.setattr(nested, "add_change", lambda *args: replaced.append(add_change(*args)))
    spec = specification(*CASES[case])
    random = torch.Generator().manual_seed(0)
    a, b = (
        {
            name: torch.randn([layout.size for layout in layouts], generator=random)
            for name, layouts in spec.params.items()
        }
        for _ in range(2)
    )

    def moves() -> list[nested.Move]:
        comparisons = [Comparison(a[name], b[name], spec.params[name]) for name in spec.params]
        return Descent(spec.groups, comparisons)._moves

    kept = moves()
    permutation = spec.random(1)
    for step in range(6):
        for move, fresh in zip(kept, moves(), strict=True):
            found, expected = move.solve(permutation), fresh.solve(permutation)
            for name, similarity in fresh._kept.items():
                error = (move._kept[name].similarity - similarity.similarity).abs().max()
                assert error <= 2e-6 * similarity.similarity.abs().max()
            assert all(torch.equal(found[name], expected[name]) for name in spec.groups)
        permutation = nearly(spec, permutation, 1 + step % 3, step)
    assert len(replaced) > 5


@pytest.mark.parametrize("case", CASES)
def test_the_gain_of_a_few_swaps_is_the_difference_of_the_values(case):
    spec = specification(*CASES[case])
    random = torch.Generator().manual_seed(0)
    before = spec.random(1)
    after = nearly(spec, before, 2, 0)
    orders = [Gathers(spec.groups, each) for each in (before, after)]
    for layouts in spec.params.values():
        a, b = (torch.randn([x.size for x in layouts], generator=random) for _ in range(2))
        comparison = Comparison(a, b, layouts)
        old, new = (comparison.value(order) for order in orders)
        assert abs(comparison.gain(*orders, old) - (new - old)) <= 1e-12 * comparison.scale
