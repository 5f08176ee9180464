"""Conformance samples of magprune."""

import math
from collections.abc import Iterator

import torch
from _compare import Case, Mistake, Sample
from ops.samples_channel_moments import FLOATS

from nlm import ops


def samples() -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)
    for number, shape in enumerate(
        ((1, 1), (3, 2), (5, 31), (4, 33), (7, 130), (300, 257), (2, 70_001), (0, 5), (3, 0))
    ):
        x = torch.randn(shape, generator=make, dtype=torch.float64)
        for dtype in FLOATS:
            short = str(dtype).removeprefix("torch.")
            args = (x.to(dtype), 0.4, 0.3, number << 40, number, True)
            yield Sample(f"{list(shape)}, {short}", args)
    x = torch.randint(-4, 5, (40, 300), generator=make).float()
    yield Sample("many of one size", (x, 0.5, 0.4, 7, 0, True))
    yield Sample("all of one size", (torch.ones(6, 100), 0.5, 0.4, 7, 0, True))
    yield Sample("columns", (x.T, 0.5, 0.0, 7, 0, False))
    for offset in (1, 2, 3, (1 << 34) - 500, (1 << 62) + 2):
        yield Sample(f"offset {offset}", (x, 0.5, 0.2, (1 << 63) - 1, offset, False))
    yield Sample("all are kept", (x, 1.0, 0.3, 7, 0, True))
    special = torch.randn(4, 90, generator=make)
    special[0, 5], special[1, 7], special[2, 0], special[3, 3] = math.inf, -math.inf, math.nan, 0.0
    yield Sample("not finite", (special, 0.5, 0.4, 3, 0, True))


def mistakes() -> Iterator[Mistake]:
    call, rule, x = ops.magprune, "nlm.magprune: ", torch.ones(4, 3)
    yield Mistake(call, (x.int(), 0.5, 0.1, 0), TypeError, rule + "x must be float16, bfloat16")
    yield Mistake(call, (x[0], 0.5, 0.1, 0), ValueError, rule + "x must be [rows, length], got (3,")
    for density, epsilon in ((0.0, 0.0), (0.5, 0.5), (0.5, -0.1), (1.1, 0.0), (math.nan, 0.1)):
        yield Mistake(
            call, (x, density, epsilon, 0), ValueError, rule + "density - epsilon and density + eps"
        )
    for seed in (-1, 1 << 63):
        yield Mistake(call, (x, 0.5, 0.1, seed), ValueError, rule + "seed must lie in [0, 2^63)")
    for offset in (-1, (1 << 63) - 9):
        yield Mistake(
            call, (x, 0.5, 0.1, 0, offset), ValueError, rule + "offset must leave all positions in"
        )


CASES = {"magprune": Case(samples, mistakes)}
