"""Conformance samples of magnitude_threshold."""

from collections.abc import Iterator

import torch
from _compare import Case, Mistake, Sample
from torch import Tensor

from nlm import ops

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def lists() -> Iterator[tuple[str, list[Tensor], list[int]]]:
    """Name, float64 tensors, and the ranks that are asked for."""
    make = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=torch.float64) * 3

    long = random(200_003)
    yield "matrix", [random(33, 47)], [1, 700, 33 * 47]
    yield "state dict", [random(20, 31), random(31), random(), random(5, 1), random(0, 4)], [1, 200]
    yield "strided", [random(20, 18, 14)[::2, :, ::2], random(9, 5).T], [3, 1000]
    yield "one element", [random(1, 1)], [1]
    yield "bracketed", [long], [1, 40_000]
    yield "bracketed list", [long[:3], random(301, 401), long[7:90_001]], [40_000]
    yield "sorted", [torch.linspace(0, 5, 100_001, dtype=torch.float64)], [20_000]
    rare = torch.where(torch.arange(len(long)) % 997 == 0, long, 1e-3 * long.sign())
    yield "few values", [rare], [100, 202]  # no sample shows where the rare ones are
    yield "equal", [torch.ones(100_003, dtype=torch.float64)], [50_000]
    yield "mostly zero", [long.where(long > 2, torch.zeros(()).double())], [30_000, 60_000]
    yield "many", [random(n, 3) for n in range(90)], [9_000]


def samples() -> Iterator[Sample]:
    make = torch.Generator().manual_seed(1)
    for name, tensors, ranks in lists():
        base = [torch.randn(x.shape, generator=make, dtype=torch.float64) for x in tensors]
        size = sum(x.numel() for x in tensors)
        for dtype in FLOATS if size < 10_000 else (torch.float32, torch.float64):
            short = str(dtype).removeprefix("torch.")
            typed, typed_base = [x.to(dtype) for x in tensors], [x.to(dtype) for x in base]
            for k in ranks:
                yield Sample(f"{name}, the {k}th, {short}", (typed, [], k))
            yield Sample(f"{name} less base, {short}", (typed, typed_base, ranks[-1]))
    mixed = [torch.randn(50, n, generator=make).to(FLOATS[n % 3]) for n in range(1, 5)]
    starts = [x.to(FLOATS[(t + 1) % 3]) for t, x in enumerate(mixed)]
    yield Sample("mixed types", (mixed, starts, 100))
    mixed[1] = mixed[1].double()
    yield Sample("mixed types, one float64", (mixed, starts, 100))


def mistakes() -> Iterator[Mistake]:
    call = ops.magnitude_threshold
    rule = "nlm.magnitude_threshold: "
    x = torch.ones(4, 3)
    yield Mistake(call, ([x.int()], 1), TypeError, rule + "tensors and base must be float16")
    yield Mistake(call, ([x], 1, [x.int()]), TypeError, rule + "tensors and base must be float16")
    yield Mistake(
        call, ([x], 0), ValueError, rule + "k must lie between 1 and the number of entries, got 0"
    )
    yield Mistake(call, ([x, x], 25), ValueError, rule + "k must lie between")
    yield Mistake(call, ([x], 1, [x, x]), ValueError, rule + "tensors and base must have one")
    yield Mistake(call, ([x], 1, [x.T]), ValueError, rule + "a tensor must have the shape of its")


CASES = {"magnitude_threshold": Case(samples, mistakes)}
