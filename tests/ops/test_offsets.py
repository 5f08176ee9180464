"""Offsets beyond 2^31: every operator on rows that lie so far apart that an int overflows.

The memory between them is never touched, so it is never there.
"""

import pytest
import torch
from _compare import Sample, map_tensors, tensors_in
from _conformance import cases, check_error
from ops.test_fuzz import small
from torch import Tensor

from nlm._registry import operations

CASES = cases()
FAR = (1 << 31) + 64  # elements from the first row to the last
WRITTEN = ("scale_shift_out_",)  # what it writes to is laid out as what it reads


def far_apart(tensor: Tensor) -> Tensor:
    """The same elements, from the first index of dimension 0 to the last beyond 2^31 of them."""
    inner = tensor[0].numel()
    step = -(-FAR // (len(tensor) - 1))
    room = torch.empty(step * (len(tensor) - 1) + inner, dtype=tensor.dtype)
    strides = torch.empty(tensor.shape[1:], device="meta").stride()
    return room.as_strided(tensor.shape, (step, *strides)).copy_(tensor)


def fits(tensor: Tensor) -> bool:
    return tensor.dim() > 0 and len(tensor) > 1 and tensor.numel() > 0 and tensor.element_size() < 8


def _written(sample: Sample, name: str) -> list[Tensor]:
    schema = operations()[name].default._schema.arguments
    pairs = zip(sample.args, schema, strict=True)
    return tensors_in([value for value, argument in pairs if argument.alias_info is not None])


@pytest.mark.parametrize("name", [name for name in CASES if name not in WRITTEN])
def test_offsets_beyond_an_int(name: str) -> None:
    tried = 0
    for sample in small(name):
        written = [id(each) for each in _written(sample, name)]
        read = [each for each in tensors_in(sample.args) if id(each) not in written and fits(each)]
        for target in read[:2]:

            def moved(tensor: Tensor, target: Tensor = target) -> Tensor:
                return far_apart(tensor) if tensor is target else tensor

            far = Sample(f"{sample.name}, far apart", map_tensors(moved, sample.args))
            check_error(operations()[name], CASES[name], far)
            tried += 1
        if tried >= 6:
            break
    assert tried > 0
