"""Conformance samples of dare."""

import math
from collections.abc import Iterator

import torch
from _compare import Case, Mistake, Sample
from ops.samples_channel_moments import FLOATS
from ops.samples_tall_mask import entries, models

from nlm import ops


def samples() -> Iterator[Sample]:
    for number, (name, x) in enumerate(entries()):
        expert, base, _ = models(x, specials=False)
        for dtype in FLOATS:
            short = str(dtype).removeprefix("torch.")
            args = (expert.to(dtype), base.to(dtype), 0.3, number << 40, number % 4, True)
            yield Sample(f"{name}, {short}", args)
    x = torch.linspace(-3, 3, 1001)
    for offset in (1, 2, 3, 5, (1 << 34) - 500, (1 << 62) + 2):
        yield Sample(f"offset {offset}", (x, x.flip(0), 0.5, (1 << 63) - 1, offset, False))
    for drop in (0.0, 0.9, 1 - 2.0**-40):
        yield Sample(f"drop {drop}", (x, x.flip(0), drop, 7, 0, True))


def mistakes() -> Iterator[Mistake]:
    call, rule, x = ops.dare, "nlm.dare: ", torch.ones(4, 3)
    yield Mistake(call, (x.int(), x, 0.5, 0), TypeError, rule + "expert and base must both be")
    yield Mistake(call, (x, x.half(), 0.5, 0), TypeError, rule + "expert and base must both be")
    yield Mistake(
        call, (x, x[:2], 0.5, 0), ValueError, rule + "base must have the shape and device"
    )
    for drop in (1.0, -0.1, math.nan):
        yield Mistake(
            call, (x, x, drop, 0), ValueError, rule + f"drop must lie in [0, 1), got {drop}"
        )
    for seed in (-1, 1 << 63):
        yield Mistake(call, (x, x, 0.5, seed), ValueError, rule + "seed must lie in [0, 2^63), got")
    for offset in (-1, (1 << 63) - 9):
        yield Mistake(
            call, (x, x, 0.5, 0, offset), ValueError, rule + "offset must leave all positions in"
        )


CASES = {"dare": Case(samples, mistakes)}
