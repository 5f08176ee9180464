"""Conformance samples of tall_mask, tall_mask_apply and tall_mask_agreement."""

import math
from collections.abc import Iterator

import torch
from _compare import Case, Mistake, Sample
from ops.samples_channel_moments import FLOATS
from torch import Tensor

from nlm import ops


def entries() -> Iterator[tuple[str, Tensor]]:
    """Tensors of numbers of entries on both sides of bytes, words and tasks; and all layouts."""
    make = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=torch.float64)

    for count in (0, 1, 7, 8, 9, 63, 64, 65, 32767, 32768, 32769, 150_001):
        yield f"{count} entries", random(count)
    yield "matrix", random(37, 21)
    yield "one row", random(1, 133)
    yield "transposed", random(13, 40).T
    yield "every second", random(30, 9, 14)[::2, :, ::2]
    yield "off the alignment", random(1003)[3:]
    yield "channels last", random(5, 7, 3, 3).contiguous(memory_format=torch.channels_last)
    yield "scalar", random()


def models(x: Tensor, specials: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """An expert, a base and a merge; some entries are those of the base, or of the merge."""
    make = torch.Generator().manual_seed(x.numel())
    base, merged = (x + torch.randn(x.shape, generator=make, dtype=x.dtype) for _ in range(2))
    kind = torch.randint(4, x.shape, generator=make)
    expert = torch.where(kind == 0, base, torch.where(kind == 1, merged, x))
    if specials and x.numel() > 100 and x.dim() == 1:
        expert[5:8] = torch.tensor([math.nan, math.inf, -math.inf])
        base[20:23] = torch.tensor([math.nan, math.inf, -math.inf])
        merged[21:25] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    strided = torch.empty_like(x)  # keeps the layout of x where it is dense
    return expert, base, strided.copy_(merged)


def samples() -> Iterator[Sample]:
    for name, x in entries():
        expert, base, merged = models(x)
        for dtype in FLOATS:
            tensors = [t.to(dtype) for t in (expert, base, merged)]
            short = str(dtype).removeprefix("torch.")
            yield Sample(f"{name}, {short}", (*tensors, 0.37))


def random_masks(*shape: int) -> Tensor:
    make = torch.Generator().manual_seed(shape[-1])
    return torch.randint(256, shape, generator=make, dtype=torch.uint8)


def samples_apply() -> Iterator[Sample]:
    for name, x in entries():
        _, base, merged = models(x)
        mask = random_masks((x.numel() + 7) // 8)
        for dtype in FLOATS:
            short = str(dtype).removeprefix("torch.")
            yield Sample(f"{name}, {short}", (mask, base.to(dtype), merged.to(dtype)))


def samples_agreement() -> Iterator[Sample]:
    for tasks in (1, 2, 3, 4, 15, 16, 255):
        for least in (1, 2, tasks, tasks + 1):
            yield Sample(f"{least} of {tasks}", (random_masks(tasks, 77), least))
    for count in (0, 1, 8, 63, 64, 65, 16384, 16385, 30_000):
        yield Sample(f"2 of 5 with {count} bytes", (random_masks(5, count), 2))
    yield Sample("transposed", (random_masks(33, 6).T, 3))
    yield Sample("every second", (random_masks(4, 90)[:, ::2], 2))
    yield Sample("1000 of 3", (random_masks(3, 40), 1000))


def gradients() -> Iterator[Sample]:
    _, base, merged = models(torch.ones(3, 5, dtype=torch.float64))
    yield Sample("matrix", (random_masks(2), base, merged))


def mistakes() -> Iterator[Mistake]:
    call, rule, x = ops.tall_mask, "nlm.tall_mask: ", torch.ones(4, 3)
    yield Mistake(call, (x.int(), x, x, 0.4), TypeError, rule + "expert must be float16")
    yield Mistake(
        call, (x, x.half(), x, 0.4), TypeError, rule + "base must have the type of expert"
    )
    yield Mistake(call, (x, x, x[:2], 0.4), ValueError, rule + "merged must have the shape and")
    for limit in (0.0, -1.0, math.nan, math.inf):
        yield Mistake(
            call,
            (x, x, x, limit),
            ValueError,
            rule + f"limit must be positive and finite, got {limit}",
        )


def mistakes_apply() -> Iterator[Mistake]:
    call, rule, x = ops.tall_mask_apply, "nlm.tall_mask_apply: ", torch.ones(4, 3)
    mask = torch.zeros(2, dtype=torch.uint8)
    yield Mistake(call, (mask, x.int(), x.int()), TypeError, rule + "base must be float16")
    yield Mistake(call, (mask, x, x.half()), TypeError, rule + "merged must have the type of base")
    yield Mistake(
        call, (mask, x, x[:2]), ValueError, rule + "merged must have the shape and device"
    )
    yield Mistake(call, (mask.bool(), x, x), TypeError, rule + "mask must be uint8, got torch.bool")
    yield Mistake(
        call, (mask[:1], x, x), ValueError, rule + "mask must have one dimension of a bit"
    )


def mistakes_agreement() -> Iterator[Mistake]:
    call, rule = ops.tall_mask_agreement, "nlm.tall_mask_agreement: "
    masks = torch.zeros(2, 3, dtype=torch.uint8)
    yield Mistake(call, (masks.bool(), 1), TypeError, rule + "masks must be uint8, got torch.bool")
    yield Mistake(call, (masks[0], 1), ValueError, rule + "masks must be [T, bytes] with T from 1")
    yield Mistake(call, (masks[:0], 1), ValueError, rule + "masks must be [T, bytes] with T from 1")
    yield Mistake(call, (masks.repeat(128, 1), 1), ValueError, rule + "masks must be [T, bytes]")
    yield Mistake(call, (masks, 0), ValueError, rule + "least must be at least 1, got 0")


CASES = {
    "tall_mask": Case(samples, mistakes),
    "tall_mask_apply": Case(samples_apply, mistakes_apply, gradients=gradients),
    "tall_mask_agreement": Case(samples_agreement, mistakes_agreement),
}
