"""Which inputs least squares need most, one by one and in blocks."""

import itertools

import pytest
import torch
from torch import Tensor

from nlm.correct import elimination
from nlm.correct.elimination import entries_of, select_blocks


def system(inputs: int, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(200, inputs, dtype=torch.float64) @ torch.randn(inputs, inputs).double()
    y = x @ torch.randn(inputs, outputs).double()
    return x.T @ x + torch.eye(inputs), x.T @ y


def explained(gram: Tensor, cross: Tensor, blocks: Tensor, block: int) -> float:
    at = entries_of(blocks, block)
    return float((torch.linalg.solve(gram[at][:, at], cross[at]) * cross[at]).sum())


@pytest.mark.parametrize("block", [1, 2])
def test_few_choices_are_all_tried(block):
    gram, cross = system(8, 3, 0)
    total, count = 8 // block, 4 // block
    kept, weight = select_blocks(gram, cross, block, torch.arange(count), "layer")
    choices = map(torch.tensor, itertools.combinations(range(total), count))
    best = max(choices, key=lambda blocks: explained(gram, cross, blocks, block))
    at = entries_of(best, block)
    assert torch.equal(kept, best)
    torch.testing.assert_close(weight, torch.linalg.solve(gram[at][:, at], cross[at]))


@pytest.mark.parametrize(("block", "updates"), [(1, 48), (1, 5), (3, 4), (3, 16)])
def test_the_cheapest_are_dropped(block, updates, monkeypatch):
    monkeypatch.setattr(elimination, "_UPDATES", updates)
    gram, cross = system(48, 5, 1)
    total, count = 48 // block, 24 // block
    kept, weight = select_blocks(gram, cross, block, torch.arange(count), "layer")
    at = entries_of(kept, block)
    torch.testing.assert_close(weight, torch.linalg.solve(gram[at][:, at], cross[at]))
    assert len(kept) == count and kept.tolist() == sorted(set(kept.tolist()))
    gain = explained(gram, cross, kept, block)
    for seed in range(20):
        other = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
        assert gain > explained(gram, cross, other, block)


@pytest.mark.parametrize("updates", [1, 4, 40])
def test_one_of_each_two_copies_is_dropped(updates, monkeypatch):
    """Each of the copies alone costs nothing, both of a unit together do."""
    monkeypatch.setattr(elimination, "_UPDATES", updates)
    torch.manual_seed(2)
    x = torch.randn(300, 20, dtype=torch.float64)
    order = torch.randperm(40)
    x = torch.cat([x, x], 1)[:, order]
    gram, cross = x.T @ x + 1e-6 * torch.eye(40), x.T @ x @ torch.randn(40, 6).double()
    kept, _ = select_blocks(gram, cross, 1, torch.arange(20), "layer")
    assert sorted((order[kept] % 20).tolist()) == list(range(20))


def test_inputs_that_tell_nothing_are_dropped():
    torch.manual_seed(3)
    x = torch.randn(500, 30, dtype=torch.float64)
    weight = torch.randn(30, 4, dtype=torch.float64)
    useless = torch.tensor([3, 7, 8, 15, 22, 29])
    weight[useless] = 0
    gram = x.T @ x + 1e-9 * torch.eye(30)
    kept, found = select_blocks(gram, x.T @ x @ weight, 1, torch.arange(24), "layer")
    assert not set(kept.tolist()) & set(useless.tolist())
    torch.testing.assert_close(found, weight[kept])


def test_it_is_never_worse_than_what_is_known(monkeypatch):
    better = 0
    for seed in range(10):
        gram, cross = system(9, 2, seed)
        with monkeypatch.context() as patch:
            best, _ = select_blocks(gram, cross, 1, torch.arange(4), "layer")
            patch.setattr(elimination, "_TRIED", 0)
            found, _ = select_blocks(gram, cross, 1, torch.arange(4), "layer")
            known, _ = select_blocks(gram, cross, 1, best, "layer")
        assert torch.equal(known, best)
        better += not torch.equal(found, best)
    assert better  # elimination is not always right
