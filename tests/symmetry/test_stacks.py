"""Specifications with stacks: the entries of sibling modules as one parameter."""

from pathlib import Path

import pytest
import torch
from symmetry.mixtures import INPUT, Mixture, softmax

import nlm
from nlm.symmetry import AxisGroup, PermutationSpec, SymmetryError, parse


def written(**changes: list[str]) -> PermutationSpec:
    """A hand-written specification of the softmax mixture."""
    params = {
        "enter.weight": ["d:8", "5"],
        "enter.bias": ["d:8"],
        "router.weight": ["e:4", "d:8"],
        "router.bias": ["e:4"],
        "experts.*.0.weight": ["e:4", "f:6", "d:8"],
        "experts.*.0.bias": ["e:4", "f:6"],
        "experts.*.2.weight": ["e:4", "d:8", "f:6"],
        "experts.*.2.bias": ["e:4", "d:8"],
        "leave.weight": ["3", "d:8"],
        "leave.bias": ["3"],
    } | {name.replace("__", "."): layouts for name, layouts in changes.items()}
    groups = [AxisGroup("d", 8), AxisGroup("e", 4), AxisGroup("f", 6, ("e",))]
    stacks = {
        name: tuple(name.replace("*", str(i)) for i in range(4)) for name in params if "*" in name
    }
    layouts = {name: tuple(map(parse, dims)) for name, dims in params.items()}
    return PermutationSpec({group.id: group for group in groups}, layouts, stacks=stacks)


@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_hand_written_stacks_are_proven_and_kept(tmp_path: Path, ending: str) -> None:
    spec = written()
    spec.verify(Mixture(softmax), INPUT)
    spec.save(tmp_path / f"spec.{ending}")
    read = PermutationSpec.load(tmp_path / f"spec.{ending}")
    assert read.proven
    assert read == spec
    assert "experts.*.0.weight" in read.show()


def test_a_wrong_stack_is_refuted() -> None:
    with pytest.raises(SymmetryError, match=r"'e'.*'router\.bias'"):
        written(router__bias=["4"]).verify(Mixture(softmax), INPUT)
    with pytest.raises(SymmetryError, match="'e'"):
        written().verify(Mixture(lambda model, x: softmax(model, x) + model.experts[0](x)), INPUT)


def test_applying_is_undone_by_the_inverse() -> None:
    spec, state = written(), Mixture(softmax).state_dict()
    permutation = spec.random(3)
    moved = spec.apply(permutation, state)
    back = spec.apply(spec.inverse(permutation), moved)
    assert not torch.equal(moved["experts.0.0.weight"], state["experts.0.0.weight"])
    assert all(torch.equal(back[name], state[name]) for name in state)
    places = {tensor.untyped_storage().data_ptr() for tensor in moved.values()}
    assert len(places) == len(moved)
    other = Mixture(softmax)
    spec.apply(permutation, state, out=other.state_dict())
    assert all(torch.equal(other.state_dict()[name], moved[name]) for name in state)
    tied, again = Mixture(softmax), Mixture(softmax)
    for each in (tied, again):
        each.experts[2] = each.experts[0]
    with pytest.raises(ValueError, match="must not share memory"):
        spec.apply(permutation, tied.state_dict(), out=again.state_dict())


def test_errors() -> None:
    spec, state = written(), Mixture(softmax).state_dict()
    with pytest.raises(ValueError, match=r"missing 'experts\.2\.0\.bias'"):
        spec.apply({}, {name: t for name, t in state.items() if name != "experts.2.0.bias"})
    with pytest.raises(ValueError, match=r"one shape, got \[6\] for .* \[7\]"):
        spec.apply({}, state | {"experts.2.0.bias": torch.zeros(7)})
    with pytest.raises(ValueError, match="two or more members"):
        PermutationSpec({}, {"w.*": (parse("1"),)}, stacks={"w.*": ("w.0",)})
    with pytest.raises(ValueError, match=r"no parameter beside it, got 'w\.1'"):
        PermutationSpec(
            {},
            {"w.*": (parse("2"),), "w.1": (parse("1"),)},
            stacks={"w.*": ("w.0", "w.1")},
        )
    with pytest.raises(ValueError, match="got a stack"):
        spec.to_axes_to_perm()
    model = Mixture(softmax)
    model.experts[1] = model.experts[0]
    with pytest.raises(SymmetryError, match="a member of a stack is not shared"):
        spec.verify(model, INPUT)


@pytest.mark.parametrize("method", ["weights", "activations"])
def test_planted_experts_come_back(method: str) -> None:
    torch.manual_seed(0)
    model, other = Mixture(softmax), Mixture(softmax)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    spec = nlm.trace(model, INPUT)
    planted = spec.random(5)
    other.load_state_dict(spec.apply(planted, model.state_dict()))
    data = [torch.randn(256, 5)] if method == "activations" else None
    found = nlm.align(model, other, spec, method, data=data)
    undone = spec.compose(planted, found.permutation)
    assert all(torch.equal(undone[name], own) for name, own in spec.identity().items())
