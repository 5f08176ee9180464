"""Conformance samples of permute, permute_out_ and permute_add_."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from _compare import Case, Mistake, Sample
from torch import Tensor

from nlm import ops
from nlm.ops._gathers import flatten

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHERS = (torch.bool, torch.int8, torch.int16, torch.int64, torch.complex64, torch.complex128)

#: A tensor, the axes that are gathered, and the parents of each.
Grid = tuple[Tensor, Sequence[int], Sequence[Sequence[int]]]


def grids() -> Iterator[tuple[str, list[Grid]]]:
    make = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=torch.float64) * 3

    matrix = random(33, 47)
    yield "rows", [(matrix, [0], [()])]
    yield "columns", [(matrix, [1], [()])]
    yield "rows and columns", [(matrix, [0, 1], [(), ()])]
    yield "transposed", [(matrix.T, [1, 0], [(), ()])]
    yield "every second", [(random(20, 9, 14)[::2, :, ::2], [0, 2], [(), ()])]
    yield "convolution", [(random(17, 13, 3, 3), [0, 1], [(), ()])]
    yield "middle only", [(random(5, 11, 6, 3), [1], [()])]
    yield "heads", [(random(4, 8, 15), [0, 1], [(), (0,)])]
    yield "experts", [(random(3, 10, 7), [0, 1], [(), (0,)]), (random(3, 7, 10), [2], [(0,)])]
    yield "two parents", [(random(3, 4, 5, 6), [2], [(3, 0)])]
    yield "parent behind", [(random(6, 4), [0], [(1,)])]
    yield "expanded", [(random(1, 9).expand(5, 9), [1], [()])]
    yield "large", [(random(301, 401), [0, 1], [(), ()])]
    yield "long", [(random(200_003), [0], [()])]
    yield "many", [(random(n, 3), [0], [()]) for n in range(1, 30)]
    yield "one element", [(random(1, 1), [0, 1], [(), (0,)])]
    yield "scalar", [(random(), [], [])]
    yield "copy", [(random(7, 6).T, [], [])]
    yield "empty", [(random(0, 5), [0, 1], [(), ()]), (random(4, 0), [0], [()])]


def arguments(grid: list[Grid], dtype: torch.dtype) -> tuple:
    make = torch.Generator().manual_seed(1)
    indices = [
        [
            torch.rand((*(x.shape[p] for p in own), x.shape[axis]), generator=make).argsort(-1)
            for axis, own in zip(axes, parents, strict=True)
        ]
        for x, axes, parents in grid
    ]
    tensors = [x.to(dtype) for x, _, _ in grid]
    flat = flatten("permute", tensors, indices, [g[1] for g in grid], [g[2] for g in grid])
    return tensors, flat


def samples() -> Iterator[Sample]:
    for name, grid in grids():
        for dtype in FLOATS + OTHERS if name == "rows and columns" else (torch.float32,):
            tensors, flat = arguments(grid, dtype)
            yield Sample(f"{name}, {str(dtype).removeprefix('torch.')}", (tensors, *flat))


def samples_out() -> Iterator[Sample]:
    for sample in samples():
        tensors, *flat = sample.args
        out = [torch.full(x.shape, 3).to(x.dtype) for x in tensors]
        yield Sample(sample.name, (out, tensors, *flat))


def samples_add() -> Iterator[Sample]:
    for name, grid in grids():
        for dtype in FLOATS if name in ("rows", "columns", "large") else (torch.float32,):
            tensors, flat = arguments(grid, dtype)
            out = [torch.linspace(-2, 2, x.numel()).reshape(x.shape).to(dtype) for x in tensors]
            weights = [0.3 + t for t in range(len(tensors))]
            short = str(dtype).removeprefix("torch.")
            yield Sample(f"{name}, {short}", (out, tensors, weights, *flat))


def mistakes() -> Iterator[Mistake]:
    call = ops.permute
    rule = "nlm.permute: "
    x, index = [torch.ones(2, 3)], torch.arange(3)
    yield Mistake(
        call, (x, [[index.int()]], [[1]]), TypeError, rule + "an index must be int64, got"
    )
    yield Mistake(call, (x, [[index]], [[2]]), ValueError, rule + "a gathered axis must be")
    yield Mistake(call, (x, [[index]], [[0]]), ValueError, rule + "an index must have shape")
    yield Mistake(
        call, (x, [[index]], [[1]], [[[1]]]), ValueError, rule + "the parents of an axis must be"
    )
    yield Mistake(
        call, (x, [[index] * 2], [[1, -1]]), ValueError, rule + "an axis must be gathered once, got"
    )
    yield Mistake(
        call, (x, [[index + 1]], [[1]]), ValueError, rule + "the values of an index must lie", True
    )
    deep = [torch.ones([1] * 17)]
    yield Mistake(call, (deep, [[]], [[]]), ValueError, rule + "a tensor must have at most 16")


def mistakes_out(op: str, call: Callable) -> Iterator[Mistake]:
    """``call(out, tensors, indices, axes)``"""
    rule = f"nlm.{op}: "
    x, index = torch.ones(2, 3), torch.arange(3)
    nothing: tuple = ([[]], [[]])
    yield Mistake(call, ([x.double()], [x], *nothing), TypeError, rule + "out must have the type")
    yield Mistake(call, ([x[:1]], [x], *nothing), ValueError, rule + "out must have the shape and")
    yield Mistake(
        call, ([torch.ones(3, 2).T], [x], *nothing), ValueError, rule + "out must be contiguous"
    )
    yield Mistake(call, ([], [x], *nothing), ValueError, rule + "out and tensors must have one")
    yield Mistake(
        call,
        ([x], [x], *nothing),
        ValueError,
        rule + "a tensor that is written to must not share memory",
        True,
    )
    yield Mistake(
        call, ([x.clone()], [x], [[index + 1]], [[1]]),
        ValueError, rule + "the values of an index must lie", True,
    )  # fmt: skip


def into(out: list[Tensor], *args: Any) -> list[Tensor]:
    return ops.permute(*args, out=out)


def mistakes_add() -> Iterator[Mistake]:
    yield from mistakes_out("permute_add_", ops.permute_add_)
    whole = [torch.ones(2, dtype=torch.int64)]
    yield Mistake(
        ops.permute_add_, (whole, [whole[0].clone()], [[]], [[]]),
        TypeError, "nlm.permute_add_: tensors must be float16",
    )  # fmt: skip


CASES = {
    "permute": Case(samples, mistakes),
    "permute_out_": Case(samples_out, lambda: mistakes_out("permute_out_", into)),
    "permute_add_": Case(samples_add, mistakes_add),
}
