"""Every operator on any sizes, layouts, scales, masks, task ids, permutations and special values.

An example begins with a sample of the conformance suite, of any type. A hundred examples for each
operator; two thousand with ``HYPOTHESIS_PROFILE=nightly``.
"""

import os
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from _compare import Case, Sample, map_tensors, same_specials, tensors_in, to_float64
from _conformance import call, cases, check_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nlm._registry import operations

EXAMPLES = 2000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 100
LARGEST = 20_000  # elements of a sample: many examples rather than large ones
LAYOUTS = (
    "as it is", "unaligned", "every second", "reversed axes", "channels last", "one row for all",
)  # fmt: skip
SCALES = ("as they are", "mixed", "small", "subnormal", "large", "huge", "equal", "zero")
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
    if layout == "channels last" and tensor.dim() > 2:
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
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
    if scale in ("large", "huge"):  # near the largest of the type, or 1e38
        most = 6e4 if tensor.dtype == torch.float16 else {"large": 1e16, "huge": 1e38}[scale]
        reach = float(tensor.double().abs().nan_to_num(posinf=0).max()) if tensor.numel() else 0.0
        return (tensor.double() * (most / (reach or 1.0))).to(tensor.dtype)
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


def resized(sample: Sample, old: int, new: int) -> Sample:
    """Each dimension of a size has another one; what counts along it is counted anew."""

    def cut(tensor: Tensor) -> Tensor:
        kept = tuple(slice(new if size == old else None) for size in tensor.shape)
        found = tensor[kept].clone()
        if tensor.dtype == torch.int64 and tensor.dim() and tensor.shape[-1] == old > new:
            return found.argsort(-1).argsort(-1)  # of a permutation, one of the size left
        return found

    return Sample(f"{sample.name}, {new} for {old}", map_tensors(cut, sample.args))


def redrawn(draw: st.DrawFn, name: str, sample: Sample, generator: torch.Generator) -> Sample:
    """With other masks, task ids, permutations, seeds, weights and shares."""
    known = operations()[name].default._schema.arguments
    values = dict(zip((each.name for each in known), sample.args, strict=True))

    def integers(tensor: Tensor, most: int) -> Tensor:
        return torch.randint(most, tensor.shape, generator=generator, dtype=tensor.dtype)

    def shuffled(index: Tensor) -> Tensor:
        return index[..., torch.randperm(index.shape[-1], generator=generator)]

    for key, value in values.items():
        if key == "task" and value is not None:
            values[key] = integers(value, max(1, values["scale"].shape[0]))
        elif key in ("mask", "masks") and value is not None:
            share = draw(st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]))
            if value.dtype == torch.bool:
                values[key] = torch.rand(value.shape, generator=generator) < share
            else:  # packed: a bit for each entry
                values[key] = integers(value, 256) if 0 < share < 1 else value
        elif key == "indices":
            values[key] = [shuffled(each) for each in value]
        elif key in ("seed", "offset"):
            values[key] = draw(st.integers(0, 2**40))
        elif key in ("drop", "density"):
            values[key] = draw(st.floats(0.01, 0.99))
        elif key == "weights":
            values[key] = [draw(st.floats(-2, 2)) for _ in value]
    return Sample(sample.name, tuple(values.values()))


def taken(name: str, sample: Sample) -> bool:
    """Whether the operator takes arguments such as these, as its checks say."""
    try:
        call(operations()[name], operations()[name].default, map_tensors(torch.clone, sample.args))
    except ValueError:
        return False
    return True


def other(draw: st.DrawFn, name: str, generator: torch.Generator) -> Sample:
    """A sample of other sizes and numbers, or where these do not go together as it was."""
    sample = draw(st.sampled_from(small(name)))
    sizes = sorted({size for each in tensors_in(sample.args) for size in each.shape if size})
    trials: list[Any] = []
    if sizes and draw(st.booleans()):
        old = draw(st.sampled_from(sizes))
        trials.append(lambda before: resized(before, old, draw(st.integers(0, old))))
    if draw(st.booleans()):
        trials.append(lambda before: redrawn(draw, name, before, generator))
    for trial in trials:
        made = trial(sample)
        sample = made if taken(name, made) else sample
    return sample


@st.composite
def changed(draw: st.DrawFn, name: str) -> tuple[Sample, Sample | None]:
    """A sample with other sizes, layouts and values; and one with NaN or infinity in it."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sample = other(draw, name, generator)
    left_out = unfit(name)
    layouts, scales = ([x for x in known if x not in left_out] for known in (LAYOUTS, SCALES))
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


def in_range(name: str, sample: Sample) -> bool:
    """Whether products are in the range that ``group_similarity_`` asks for, so that its sums of
    float32 cannot overflow on the way: else it is by the order of the terms that infinity comes
    out or not. The others take any finite number."""
    if name != "group_similarity_" or CASES[name].products(*sample.args) == torch.float64:
        return True
    found = [each.detach().double().abs().nan_to_num(posinf=0) for each in inputs(sample, name)]
    return all(float(each.max()) <= 1e17 for each in found if each.numel())


FEW = 16  # entries, the largest of which may itself be what is left of terms that cancel


#: The results, counted from the last, that may be what is left of terms that cancel.
CANCELLED = {"group_similarity_": 1, "cross_moments_": 1, "scale_shift_backward": 2}


def cancels(name: str, sample: Sample) -> bool:
    """Whether that may be so of the largest entry: there are few; or of a float64 sum of float64,
    as a narrower result is rounded more than its sum.
    """
    which = {"group_similarity_": 0, "cross_moments_": 5}.get(name)
    if which is not None:
        return sample.args[which].numel() < FEW and in_range(name, sample)
    return name in CANCELLED and sample.args[0].dtype == torch.float64


def check_bound(name: str, sample: Sample) -> None:
    """The bound in the docstring on sums of products, a share of the root of the product of both
    sums of squares; on other sums a rounding for each term of what their magnitudes add up to.
    """
    operation = operations()[name]
    ours = call(operation, operation.default, sample.args)
    truth = call(operation, operation.reference, to_float64(sample.args))
    if name == "group_similarity_":
        relative = 1e-14 if sample.args[1].dtype == torch.float64 else 2e-6
        x, y = (each.double().norm() for each in inputs(sample, name))
        most = relative * abs(sample.args[-1]) * x * y + 1e-15 * (1 + sample.args[0].abs())
    elif name == "scale_shift_backward":
        grad, x, *others = sample.args
        dim = sample.args[-1]
        terms = grad.numel() // max(1, grad.shape[dim])
        sums = call(operation, operation.reference, (grad.abs(), x.abs(), *others))
        for one, other, most in zip(ours[1:], truth[1:], sums[1:], strict=True):
            assert bool(((one - other).abs() <= terms * 2**-53 * most).all()), sample.name
        return
    else:
        precision, kind = sample.args[-1], sample.args[6].dtype
        relative = {"float32": 2e-6, "bf16x3": 3e-5, "bf16": 8e-3}[precision]
        relative, least = (1e-14, 5e-324) if kind == torch.float64 else (relative, 1e-44)
        x, y = truth[2], truth[4] if len(truth) > 4 else truth[2]
        most = relative * (x[:, None] * y).sqrt() + max(sample.args[6].shape, default=1) * least
    assert bool(((ours[-1] - truth[-1]).abs() <= most).all()), f"{sample.name}: {ours} for {truth}"


def check_specials(name: str, sample: Sample) -> None:
    operation = operations()[name]
    ours = call(operation, operation.default, sample.args)
    theirs = call(operation, operation.reference, sample.args)
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert same_specials(one, other), f"{sample.name}: result {number}"


#: Held to the error of PyTorch's BLAS, which is another one on each processor, by night alone; on
#: every change to the bound in their docstrings.
BESIDE_BLAS = {name for name, case in CASES.items() if case.products is not None}


def by_bound(name: str, sample: Sample) -> bool:
    is_change = EXAMPLES == 100 and name in BESIDE_BLAS and in_range(name, sample)
    return is_change or cancels(name, sample)


@pytest.mark.parametrize("name", CASES)
def test_any_layout_and_values(name: str) -> None:
    case: Case = CASES[name]

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 100, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(changed(name))
    def holds(found: tuple[Sample, Sample | None]) -> None:
        moved, poisoned = found
        if by_bound(name, moved):
            check_bound(name, moved)
            others = replace(case, judged=lambda _, results: results[: -CANCELLED[name]])
            check_error(operations()[name], others, moved)
        else:
            check_error(operations()[name], case, moved)
        if poisoned is not None and in_range(name, moved):
            check_specials(name, poisoned)

    holds()
