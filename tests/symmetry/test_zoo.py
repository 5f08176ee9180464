"""Discovery finds on every set-up of the zoo at least what is known to be there, and proves it."""

import pytest
import torch
from symmetry.zoo import FLOORS, UNREAD, ZOO

import nlm
from nlm.symmetry.layout import references
from nlm.symmetry.outputs import named_tensors
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


@pytest.mark.parametrize("name", UNREAD)
def test_what_nothing_reads_stays_and_has_no_effect(name: str) -> None:
    torch.manual_seed(0)
    model, args, kwargs = ZOO[name]()
    kwargs.pop("token_type_ids", None)
    spec = nlm.trace(model.eval(), args, kwargs)
    why = {place.rpartition(":")[0]: why for place, why in spec.pinned.items()}
    assert {entry for entry in why if why[entry] == "not read"} == UNREAD[name]
    assert spec.permutation_count == FLOORS[name][0]
    with torch.no_grad():
        before = named_tensors(model(*args, **kwargs))
        for entry in UNREAD[name]:
            model.state_dict()[entry].fill_(torch.nan)
        after = named_tensors(model(*args, **kwargs))
    assert all(torch.equal(before[output], after[output]) for output in before)
