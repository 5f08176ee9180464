"""Conformance samples of group_similarity_."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from _compare import Case, Mistake, Sample
from torch import Tensor

from nlm import ops
from nlm.ops._gathers import positions
from nlm.ops.group_similarity import _gathers

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ALL_DTYPES = ("units first", "units last", "both gathered", "experts")


def index(*shape: int, seed: int = 0) -> Tensor:
    """Independent permutations of the last size."""
    make = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=make).argsort(-1)


#: A pair of tensors, the axes of the units, the kept ones, and per gathered axis its index, itself
#: and its parents.
Problem = tuple[
    Tensor, Tensor, Sequence[int], Sequence[int], Sequence[tuple[Tensor, int, Sequence[int]]]
]


def problems() -> Iterator[tuple[str, Problem]]:
    make = torch.Generator().manual_seed(4)

    def pair(*shape: int) -> tuple[Tensor, Tensor]:
        a, b = torch.randn(2, *shape, generator=make, dtype=torch.float64)
        return a, b

    yield "units first", (*pair(65, 131), [0], [], [(index(131), 1, ())])
    yield "units last", (*pair(131, 65), [1], [], [(index(131), 0, ())])
    yield "both gathered", (*pair(9, 37, 8), [1], [], [(index(9), 0, ()), (index(8), 2, ())])
    yield "in order", (*pair(33, 300), [0], [], [])
    yield "transposed", (*(x.T for x in pair(131, 50)), [0], [], [(index(131), 1, ())])
    yield "every second", (*(x[::2, 1::2] for x in pair(81, 99)), [1], [], [(index(41), 0, ())])
    yield "convolution, out", (*pair(35, 21, 3, 3), [0], [], [(index(21), 1, ())])
    yield "convolution, in", (*pair(35, 21, 3, 3), [1], [], [(index(35), 0, ())])
    yield "convolution of 25", (*pair(7, 4, 5, 5), [0], [], [(index(4), 1, ())])
    yield "heads", (*pair(4, 9, 50), [0, 1], [], [(index(50), 2, ())])
    yield "units in a head", (*pair(4, 9, 50), [1], [0], [(index(4), 0, ()), (index(50), 2, ())])
    experts = [(index(5), 0, ()), (index(5, 13), 2, (0,))]
    yield "experts", (*pair(5, 17, 13), [1], [0], experts)
    yield "all experts together", (*pair(5, 17, 13), [1], [], experts)
    yield "kept behind", (*pair(6, 7, 8), [0], [2], [(index(6, 7)[0], 2, ())][:0])
    yield "index of a kept axis by a summed one", (
        *pair(3, 4, 5), [2], [1], [(index(3, 4), 1, (0,))],
    )  # fmt: skip
    yield "many small", (*pair(700, 5, 6), [1], [0], [(index(700), 0, ()), (index(6), 2, ())])
    yield "several blocks", (*pair(100, 2200), [0], [], [(index(2200), 1, ())])
    yield "several stripes", (*pair(1601, 3), [0], [], [(index(3), 1, ())])
    a, b = pair(60, 40)
    yield "other units", (a[:33], b[20:], [0], [], [(index(40), 1, ())])
    yield "a part of the terms", (a[:, :7], b, [0], [], [(index(40)[:7], 1, ())])
    yield "vectors", (*pair(77), [0], [], [])
    yield "no units", (*pair(301, 401), [], [], [(index(301), 0, ())])
    yield "no units, kept", (*pair(31, 41), [], [0], [(index(41), 1, ())])
    yield "one element", (*pair(1, 1), [0], [], [(index(1), 1, ())])
    yield "scalar", (*pair(), [], [], [])
    yield "empty", (*pair(0, 5), [1], [], [(index(0), 0, ())])
    yield "no units at all", (*pair(3, 0), [1], [], [])
    yield "expanded", (a[:1].expand(9, 40), b[:9], [1], [], [(index(9), 0, ())])


def arguments(problem: Problem, dtype: torch.dtype, weight: float) -> tuple[Any, ...]:
    a, b, units, kept, gathers = problem
    shape = [each.shape[x] for each, part in ((a, [*kept, *units]), (b, units)) for x in part]
    out = torch.linspace(-1, 1, max(torch.Size(shape).numel(), 1), dtype=torch.float64)
    tensors = [x.to(dtype) for x in (a, b)]
    parents = [parent for _, _, own in gathers for parent in own]
    counts = [len(own) for _, _, own in gathers]
    found = [each for each, _, _ in gathers], [axis for _, axis, _ in gathers]
    out = out[: torch.Size(shape).numel()].reshape(shape)
    return out, *tensors, list(units), list(kept), *found, parents, counts, weight


def samples() -> Iterator[Sample]:
    for number, (name, problem) in enumerate(problems()):
        for dtype in FLOATS if name in ALL_DTYPES else (torch.float32,):
            args = arguments(problem, dtype, 1.0 if number % 3 else -0.75)
            yield Sample(f"{name}, {str(dtype).removeprefix('torch.')}", args)
    a, b = torch.randn(2, 4, 9, 50, generator=torch.Generator().manual_seed(5))
    turned = torch.zeros(4, 4, 9, 9, dtype=torch.float64).permute(0, 2, 1, 3)
    yield Sample("heads, in another layout", (turned, a, b, [0, 1], [], [], [], [], [], 1.0))


def plain(out: Tensor, a: Tensor, b: Tensor, units: list, kept: list, *rest: Any) -> None:
    """Gathered and multiplied, all in the type of a."""
    sizes = [b.shape[x] if x in units else a.shape[x] for x in range(a.dim())]
    place = positions(sizes, range(a.dim()), _gathers(*rest[:4]), b.device)
    gathered = b[tuple(place.values())]
    count = a.dim()
    in_b = [count + x if x in units else x for x in range(count)]
    result = [*kept, *units, *(count + x for x in units)]
    out += rest[4] * torch.einsum(a, list(range(count)), gathered, in_b, result).double()


def products(*args: Any) -> torch.dtype:
    return torch.float64 if args[1].dtype == torch.float64 else torch.float32


def mistakes() -> Iterator[Mistake]:
    call = ops.group_similarity_
    rule = "nlm.group_similarity_: "
    out, a, order = torch.zeros(3, 3, dtype=torch.float64), torch.ones(3, 4), torch.arange(4)
    yield Mistake(call, (out, a.int(), a.int(), [0]), TypeError, rule + "a must be float16")
    yield Mistake(call, (out, a, a.double(), [0]), TypeError, rule + "b must have the dtype and")
    yield Mistake(call, (out, a, a[0], [0]), TypeError, rule + "b must have the dtype and")
    for units, kept in (([2], []), ([0, 0], []), ([0], [0])):
        yield Mistake(call, (out, a, a, units, kept), ValueError, rule + "the axes of the units")
    yield Mistake(
        call, (out, a, a, [0], [], [order[:3]], [0]), ValueError, rule + "a gathered axis and its"
    )
    yield Mistake(
        call, (out, a, a, [0], [], [order], [1], [[0]]), ValueError, rule + "a gathered axis and"
    )
    yield Mistake(
        call, (out, a, a, [0], [], [order.int()], [1]), TypeError, rule + "an index must be int64"
    )
    yield Mistake(
        call, (out, a, a, [0], [], [order[:3]], [1]), ValueError, rule + "an index must have shape"
    )
    yield Mistake(
        call, (out, a, a, [0], [], [order, order], [1, 1]), ValueError,
        rule + "an axis must be gathered once",
    )  # fmt: skip
    yield Mistake(call, (out, a, a[:, :3], [0]), ValueError, rule + "a and b must have one shape")
    yield Mistake(call, (out.float(), a, a, [0]), TypeError, rule + "out must be float64, got")
    yield Mistake(call, (out[:2], a, a, [0]), ValueError, rule + "out must have the shape [*kept")
    spread = torch.zeros(1, 1, dtype=torch.float64).expand(3, 3)  # no longer so on another device
    yield Mistake(call, (spread, a, a, [0]), ValueError, rule + "the entries of out must lie", True)
    yield Mistake(
        call, (out, a, a, [0], [], [order + 1], [1]), ValueError,
        rule + "the values of an index must lie in [0, 4), got 1 to 4", True,
    )  # fmt: skip
    shared = torch.ones(3, 3, dtype=torch.float64)
    yield Mistake(
        call, (shared, shared, shared, [0]), ValueError,
        rule + "a tensor that is written to must not share memory", True,
    )  # fmt: skip


CASES = {"group_similarity_": Case(samples, mistakes, plain, products)}
