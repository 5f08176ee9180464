"""Conformance samples of inner_products."""

from collections.abc import Iterator

import torch
from _compare import Case, Mistake, Sample
from ops.samples_sign_merge import FLOATS, models

from nlm import ops
from nlm.ops.inner_products import reference


def samples() -> Iterator[Sample]:
    for name, base, tensors in models():
        for dtype in FLOATS if base.numel() < 10_000 else FLOATS[1:3]:
            start, typed = base.to(dtype), [x.to(dtype) for x in tensors]
            short = f"{name}, {str(dtype).removeprefix('torch.')}"
            yield Sample(f"{short}, with a base", (start, typed))
            yield Sample(f"{short}, without", (None, typed))
        mixed = [x.to(FLOATS[k % 4]) for k, x in enumerate(tensors)]
        yield Sample(f"{name}, mixed types", (base.float(), mixed))


def mistakes() -> Iterator[Mistake]:
    call, rule, x = ops.inner_products, "nlm.inner_products: ", torch.ones(4, 3)
    yield Mistake(call, ([],), ValueError, rule + "there must be 1 to 128 tensors, got 0")
    yield Mistake(call, ([x] * 129,), ValueError, rule + "there must be 1 to 128 tensors, got 129")
    yield Mistake(call, ([x, x.int()],), TypeError, rule + "base and tensors must be float16")
    yield Mistake(call, ([x, x.T],), ValueError, rule + "base and tensors must have one shape")
    yield Mistake(call, ([x], x[:2]), ValueError, rule + "base and tensors must have one shape")


CASES = {"inner_products": Case(samples, mistakes, plain=reference)}
