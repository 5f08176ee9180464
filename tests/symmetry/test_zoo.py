"""Discovery finds on every set-up of the zoo at least what is known to be there, and proves it."""

import pytest
import torch
from symmetry.zoo import FLOORS, ZOO

import nlm
from nlm.symmetry.layout import references
from nlm.symmetry.stacks import joined

TOLERANCE = {"float64": 1e-9, "float32 inside": 3e-6, "float32": 3e-6}


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name: str) -> None:
    torch.manual_seed(0)
    model, args, kwargs = ZOO[name]()
    spec = nlm.trace(model.eval(), args, kwargs)
    assert spec.proven and "refuted by the proof" not in spec.pinned.values()
    proof = spec.verified
    assert proof.max_error <= TOLERANCE[proof.dtype]
    assert proof.max_error < 1e-3 * proof.control
    parameters = joined(spec.stacks, dict(model.named_parameters()))
    moved = sum(
        parameter.numel()
        for name, parameter in parameters.items()
        if any(ref.group in spec.free for layout in spec.params[name] for ref in references(layout))
    )
    fraction = moved / sum(parameter.numel() for parameter in parameters.values())
    permutations, least = FLOORS[name]
    assert spec.permutation_count >= permutations
    assert round(fraction, 3) >= least


def test_every_set_up_has_a_floor() -> None:
    assert FLOORS.keys() == ZOO.keys()
