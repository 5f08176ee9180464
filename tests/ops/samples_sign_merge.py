"""Conformance samples of sign_merge's operator."""

from collections.abc import Iterator

import torch
from _compare import Case, Mistake, Sample
from torch import Tensor

from nlm import ops
from nlm.ops.sign_merge import DIALECTS

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def models() -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """Name, base and experts in float64; rounded values, so that votes of 0 occur."""
    make = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=make, dtype=torch.float64) * 3).round()

    for count, shape in ((1, (7, 5)), (2, (33, 47)), (3, (1, 9)), (8, (13, 3, 3)), (5, (0, 4))):
        yield f"{count} of {shape}", random(*shape), [random(*shape) for _ in range(count)]
    yield "scalar", random(), [random(), random()]
    strided = [random(20, 18)[::2, ::3], random(6, 10).T]
    yield "strided", random(6, 10).T, strided
    yield "one opponent", random(301), [random(301)] * 2 + [-random(301)]
    yield "long", random(100_003), [random(100_003) for _ in range(3)]


def samples() -> Iterator[Sample]:
    weights = [1.0, -0.5, 2.0, 0.3, 1.0, 1.5, 0.0, 1.0]
    for name, base, experts in models():
        thresholds = torch.linspace(0, 2, len(experts) + 1)[1:]
        factors = weights[: len(experts)]
        for dialect in DIALECTS:
            for dtype in FLOATS if base.numel() < 10_000 else FLOATS[1:3]:
                typed = base.to(dtype), [x.to(dtype) for x in experts]
                short = f"{name}, {dialect}, {str(dtype).removeprefix('torch.')}"
                yield Sample(short, (*typed, thresholds, factors, 0.7, dialect))
        mixed = [x.to(FLOATS[k % 3]) for k, x in enumerate(experts)]
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            args = (base.to(dtype), mixed, thresholds.double() / 3, factors, 0.3, "global")
            yield Sample(f"{name}, mixed types, {dtype}", args)


def samples_tied() -> Iterator[Sample]:
    make = torch.Generator().manual_seed(1)
    for sample in samples():
        base, experts, thresholds, weights, scale, dialect = sample.args
        if dialect != "global":
            continue
        merged = torch.randn(base.shape, generator=make).to(base.dtype)
        contested = torch.randint(2, (-(-base.numel() // 64),), generator=make, dtype=torch.uint8)
        yield Sample(sample.name, (merged, base, experts, thresholds, weights, scale, contested))


def mistakes() -> Iterator[Mistake]:
    call = ops.sign_merge
    rule = "nlm.sign_merge: "
    x, one, two = torch.ones(4, 3), torch.ones(1), torch.ones(2)
    yield Mistake(call, ([x], [[x]], one, 1.0, 1.0, "old"), ValueError, rule + "dialect must be")
    yield Mistake(call, ([x], [], one[:0]), ValueError, rule + "there must be 1 to 128 experts")
    yield Mistake(call, ([x], [[x]] * 129, one), ValueError, rule + "there must be 1 to 128")
    yield Mistake(call, ([x], [[x.int()]], one), TypeError, rule + "base and experts must be")
    yield Mistake(call, ([x], [[x.T]], one), ValueError, rule + "an expert must have the shape")
    yield Mistake(call, ([x], [[x, x]], one), ValueError, rule + "an expert must have as many")
    yield Mistake(call, ([x], [[x]], two), ValueError, rule + "there must be one threshold and")
    yield Mistake(
        call, ([x], [[x]], one, [1.0, 2.0]), ValueError, rule + "there must be one threshold and"
    )
    yield Mistake(call, ([x], [[x]], one.int()), TypeError, rule + "thresholds must be float32")


def mistakes_tied() -> Iterator[Mistake]:
    call = torch.ops.nlm.sign_merge_tied_
    rule = "nlm.sign_merge_tied_: "
    x, one, flags = torch.ones(4, 3), torch.ones(1), torch.ones(1, dtype=torch.uint8)
    for merged in (x.clone()[:2], x.clone().double(), torch.ones(3, 4).T):
        args = (merged, x, [x], one, [1.0], 1.0, flags)
        yield Mistake(call, args, ValueError, rule + "merged must be contiguous, with")
    args = (x.clone(), x, [x], one, [1.0], 1.0, flags.repeat(2))
    yield Mistake(call, args, ValueError, rule + "contested must be uint8 of shape (1,)")
    args = (x, x, [x.clone()], one, [1.0], 1.0, flags)
    yield Mistake(call, args, ValueError, rule + "a tensor that is written to must", True)


CASES = {
    "sign_merge": Case(samples, mistakes),
    "sign_merge_tied_": Case(samples_tied, mistakes_tied),
}
