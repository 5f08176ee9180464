"""Conformance samples of channel_moments."""

from collections.abc import Iterator

import torch
from _compare import Case, Mistake, Sample
from torch import Tensor

from nlm import ops

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def layouts() -> Iterator[tuple[str, Tensor, int]]:
    """Tensors with a channel dimension, in every layout that the kernels tell apart."""
    make = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=torch.float64) * 2 + 3

    yield "rows", random(301, 33), 1
    yield "narrow rows", random(1001, 3), 1
    yield "many channels", random(37, 1500), 1
    yield "images", random(5, 7, 9, 11), 1
    yield "small images", random(9, 21, 3, 3), 1
    yield "channels last", random(5, 7, 9, 11).contiguous(memory_format=torch.channels_last), 1
    yield "tokens", random(4, 13, 40), -1
    yield "tokens transposed", random(4, 13, 40).transpose(1, 2), 1
    yield "channels first", random(17, 203), 0
    yield "some channels", random(3, 8, 70)[:, 2:5], 1
    yield "every second", random(40, 9, 14)[::2, :, ::2], 1
    yield "no common stride", random(4, 6, 5, 7).transpose(0, 2), 1
    yield "expanded", random(1, 9, 1).expand(3, 9, 35), 1
    yield "one channel", random(100, 1), 1
    yield "one position", random(1, 50), 1
    yield "vector", random(9), 0
    yield "no positions", random(0, 5), 1
    yield "no channels", random(5, 0), 1
    yield "long run", random(2, 3, 20011), 1
    yield "large rows", random(2003, 70), 1


def samples() -> Iterator[Sample]:
    make = torch.Generator().manual_seed(1)
    for name, x, dim in layouts():
        for dtype in FLOATS:
            short = str(dtype).removeprefix("torch.")
            yield Sample(f"{name}, {short}", (x.to(dtype), dim, None))
        positions = x.movedim(dim, 0)[0].shape if x.shape[dim] else x.movedim(dim, -1).shape[:-1]
        mask = torch.rand(positions, generator=make) > 0.4
        yield Sample(f"{name}, masked", (x.float(), dim, mask))
        yield Sample(f"{name}, nothing counted", (x.float(), dim, torch.zeros_like(mask)))
    far = torch.randn(4001, 33, generator=make) + 1e4
    yield Sample("mean 1e4", (far, 1, None))


def plain(x: Tensor, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    values = x.movedim(dim, 0).flatten(1) if x.dim() > 1 else x[:, None]
    values = values if mask is None else values[:, mask.flatten()]
    count = values.shape[1]
    if values.numel() == 0:
        return torch.tensor(count), values.sum(1), values.sum(1)
    variance, mean = torch.var_mean(values, 1, correction=0)
    return torch.tensor(count), mean, variance * count


def mistakes() -> Iterator[Mistake]:
    x = torch.ones(4, 3)
    call = ops.channel_moments
    rule = "nlm.channel_moments: "
    yield Mistake(call, (x.int(), 1), TypeError, rule + "x must be float16")
    yield Mistake(call, (x, 2), ValueError, rule + "dim must be a dimension of x, got dim 2")
    yield Mistake(call, (x, 1, torch.ones(4)), TypeError, rule + "mask must be bool, got")
    yield Mistake(
        call, (x, 1, torch.ones(3, dtype=torch.bool)), ValueError, rule + "mask must have the shape"
    )


CASES = {"channel_moments": Case(samples, mistakes, plain)}
