"""A permutation is carried over to a network with the same trunk and another head."""

import copy

import pytest
import torch
from torch import nn

import nlm
from nlm.symmetry.transfer import transferred


def network(*head: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU())
    whole = nn.Sequential()
    whole.add_module("trunk", trunk)
    whole.add_module("head", nn.Sequential(*head))
    return whole


def test_the_trunk_moves_and_the_head_follows():
    x = torch.randn(4, 5)
    one = network(nn.Linear(6, 3))
    other = network(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 2))
    specs = [nlm.trace(each, x) for each in (one, other)]
    permutation = specs[0].random(1)
    moved = transferred(permutation, *specs, heads="head")
    with pytest.raises(
        ValueError, match=r"lay out its entries alike, got .* for 'head\.0\.weight'"
    ):
        transferred(permutation, *specs)
    assert len(moved) == 2 < len(specs[1].free)  # the units of the head's own layer stay
    again = copy.deepcopy(other)
    again.load_state_dict(specs[1].apply(moved, other.state_dict()))
    torch.testing.assert_close(again(x), other(x))
    trunk = specs[0].apply(permutation, one.state_dict())
    for name, tensor in again.state_dict().items():
        if name.startswith("trunk"):
            assert torch.equal(tensor, trunk[name])
    assert not torch.equal(again.head[0].weight, other.head[0].weight)


def test_what_is_fixed_in_the_other_one():
    """Features that are read in their order, and a trunk that is laid out otherwise."""
    x = torch.randn(4, 5)
    one, other = network(nn.Linear(6, 3)), network(nn.Identity())
    specs = [nlm.trace(each, x) for each in (one, other)]
    permutation = specs[0].random(1)
    with pytest.raises(ValueError, match="got a group that is fixed there, 'g1'"):
        transferred(permutation, *specs)
    assert transferred({"g0": permutation["g0"]}, *specs).keys() == {"g0"}
    wide = nn.Sequential()
    wide.add_module("trunk", nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 6), nn.ReLU()))
    with pytest.raises(ValueError, match="networks with the same trunk lay out its entries alike"):
        transferred(permutation, specs[0], nlm.trace(wide, x))
