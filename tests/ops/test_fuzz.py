"""Every operator on any layout, scale and special values of its conformance samples.

A hundred examples for each; two thousand with ``HYPOTHESIS_PROFILE=nightly``.
"""

import os
from functools import cache

import pytest
import torch
from _compare import Case, Sample, map_tensors, same_specials, tensors_in
from _conformance import call, cases, check_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nlm._registry import operations

EXAMPLES = 2000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 100
LARGEST = 20_000  # elements of a sample: many examples rather than large ones
LAYOUTS = ("as it is", "unaligned", "every second", "reversed axes", "one row for all")
SCALES = ("as they are", "mixed", "small", "subnormal", "equal", "zero")
SPECIALS = (float("nan"), float("inf"), -float("inf"))
CASES = cases()


@cache
def small(name: str) -> list[Sample]:
    found = [
        sample
        for sample in CASES[name].samples()
        if sum(each.numel() for each in tensors_in(sample.args)) <= LARGEST
    ]
    assert found
    return found


def relaid(tensor: Tensor, layout: str) -> Tensor:
    """The same elements elsewhere in memory; for "one row for all" its first row in each."""
    if layout == "unaligned":
        flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
        return flat.view(tensor.shape).copy_(tensor)
    if layout == "every second":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if layout == "reversed axes":
        order = list(reversed(range(tensor.dim())))
        return tensor.permute(order).contiguous().permute(order)
    if layout == "one row for all" and tensor.dim() and tensor.shape[0]:
        return tensor[:1].expand(tensor.shape)
    return tensor


def scaled(tensor: Tensor, scale: str, generator: torch.Generator) -> Tensor:
    narrow = tensor.dtype in (torch.float16, torch.bfloat16)
    if scale == "mixed":  # nothing overflows that did not before
        powers = torch.randint(-6, 1, tensor.shape, generator=generator).double()
        return (tensor.double() * (2.0 if narrow else 10.0) ** powers).to(tensor.dtype)
    if scale == "small":
        return tensor * (2**-4 if narrow else 1e-12)
    if scale == "subnormal":
        tiny = torch.finfo(tensor.dtype).tiny
        steps = torch.randint(-3, 4, tensor.shape, generator=generator)
        return torch.empty_like(tensor).copy_(steps) * tiny / 2
    if scale == "equal":
        return torch.full_like(tensor, 1.5)
    return torch.zeros_like(tensor) if scale == "zero" else tensor


def unfit(name: str) -> tuple[str, ...]:
    """What an operator does not take, or no exact comparison fits: the roundings of equal products
    do not cancel, of equal costs one solution is as good as another, and the duals are no more
    exact than those of the start.
    """
    if CASES[name].products is not None:
        return ("one row for all", "equal")
    if name == "scale_shift_out_":  # what it writes to is laid out as what it reads
        return LAYOUTS[1:]
    tied = ("one row for all", *SCALES[1:])  # the duals of a start are of the costs as they are
    return tied if CASES[name].judged is not None else ()


def inputs(sample: Sample, name: str) -> list[Tensor]:
    """The floating tensors that the operator only reads."""
    schema = operations()[name].default._schema.arguments
    read = [
        value
        for value, argument in zip(sample.args, schema, strict=True)
        if argument.alias_info is None
    ]
    return [each for each in tensors_in(read) if each.is_floating_point()]


@st.composite
def changed(draw: st.DrawFn, name: str) -> tuple[Sample, Sample | None]:
    """A sample with other layouts and values; and one with NaN or infinity in it."""
    sample = draw(st.sampled_from(small(name)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    layouts, scales = ([x for x in known if x not in unfit(name)] for known in (LAYOUTS, SCALES))
    ours = {
        id(each): (draw(st.sampled_from(layouts)), draw(st.sampled_from(scales)))
        for each in inputs(sample, name)
    }

    def change(tensor: Tensor) -> Tensor:
        if id(tensor) not in ours:
            return tensor
        layout, scale = ours[id(tensor)]
        return relaid(scaled(tensor, scale, generator), layout)

    told = ", ".join(f"{layout}, {scale}" for layout, scale in ours.values())
    moved = Sample(f"{sample.name}: {told}", map_tensors(change, sample.args))
    targets = [each for each in inputs(moved, name) if each.numel()]
    if not (CASES[name].poison and targets):
        return moved, None
    target = draw(st.sampled_from(targets))
    value, place = draw(st.sampled_from(SPECIALS)), draw(st.integers(0, target.numel() - 1))

    def poison(tensor: Tensor) -> Tensor:
        if tensor is not target:
            return tensor
        poisoned = tensor.clone()  # laid out as it is
        poisoned[torch.unravel_index(torch.tensor(place), tensor.shape)] = value
        return poisoned

    return moved, Sample(f"{moved.name}, {value} at {place}", map_tensors(poison, moved.args))


def check_specials(name: str, sample: Sample) -> None:
    operation = operations()[name]
    ours = call(operation, operation.default, sample.args)
    theirs = call(operation, operation.reference, sample.args)
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert same_specials(one, other), f"{sample.name}: result {number}"


#: Held to the error of PyTorch's BLAS, which is another one on each processor: by night.
BESIDE_BLAS = {name for name, case in CASES.items() if case.products is not None}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.nightly] if name in BESIDE_BLAS else [])
        for name in CASES
    ],
)
def test_any_layout_and_values(name: str) -> None:
    case: Case = CASES[name]

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 100, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(changed(name))
    def holds(found: tuple[Sample, Sample | None]) -> None:
        moved, poisoned = found
        check_error(operations()[name], case, moved)
        if poisoned is not None:
            check_specials(name, poisoned)

    holds()
