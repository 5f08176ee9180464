"""Conformance samples of weighted_sum."""

from collections.abc import Iterator

import torch
from _compare import Case, Mistake, Sample
from ops.samples_sign_merge import FLOATS, models

from nlm import ops

WEIGHTS = [1.0, -0.5, 2.0, 0.3, 1.0, 1.5, 0.0, 1e-3]


def samples() -> Iterator[Sample]:
    for name, base, tensors in models():
        weights = WEIGHTS[: len(tensors)]
        for dtype in FLOATS if base.numel() < 10_000 else FLOATS[1:3]:
            start, typed = base.to(dtype), [x.to(dtype) for x in tensors]
            short = f"{name}, {str(dtype).removeprefix('torch.')}"
            yield Sample(f"{short}, with a base", (start, typed, weights, 1.0, 0.7, dtype))
            yield Sample(f"{short}, without", (None, typed, weights, 3.0, 1.0, dtype))
            yield Sample(f"{short}, alone", (start, [], [], 1.0, 1.0, FLOATS[len(tensors) % 4]))
        mixed = [x.to(FLOATS[k % 3]) for k, x in enumerate(tensors)]
        for k, dtype in enumerate(FLOATS):
            args = (base.to(dtype), mixed, weights, 0.9, -0.3, FLOATS[3 - k])
            yield Sample(f"{name}, mixed types, {dtype}", args)


def mistakes() -> Iterator[Mistake]:
    call, rule, x = ops.weighted_sum, "nlm.weighted_sum: ", torch.ones(4, 3)
    yield Mistake(call, ([],), ValueError, rule + "there must be 1 to 128 tensors, got 0")
    yield Mistake(call, ([x] * 129, 1.0, x), ValueError, rule + "there must be 0 to 128 tensors")
    yield Mistake(call, ([x.int()],), TypeError, rule + "base and tensors must be float16")
    yield Mistake(call, ([x, x.T],), ValueError, rule + "base and tensors must have one shape")
    yield Mistake(call, ([x], 1.0, x[:2]), ValueError, rule + "base and tensors must have one")
    yield Mistake(call, ([x], [1.0, 2.0]), ValueError, rule + "there must be one weight for each")
    args = ([x], 1.0, None, 1.0, 1.0, torch.int32)
    yield Mistake(call, args, TypeError, rule + "dtype must be float16, bfloat16, float32 or")


CASES = {"weighted_sum": Case(samples, mistakes)}
