"""Conformance samples of cross_moments_."""

from collections.abc import Iterator
from typing import Any

import torch
from _compare import Case, Mistake, Sample
from ops.samples_channel_moments import FLOATS, layouts
from torch import Tensor

from nlm import ops
from nlm.ops.cross_moments import _merge

ALL_DTYPES = ("rows", "images", "tokens")


def state(channels_x: int, channels_y: int | None = None) -> tuple[Tensor | None, ...]:
    """The empty state of two streams, or of one stream taken twice."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    count, square = torch.zeros((), dtype=torch.int64), channels_y is None
    second = (None, None) if square else (zeros(channels_y), zeros(channels_y))
    matrix = zeros(channels_x, channels_x if square else channels_y)
    return (count, zeros(channels_x), zeros(channels_x), *second, matrix)


def samples() -> Iterator[Sample]:
    make = torch.Generator().manual_seed(2)
    for number, (name, x, dim) in enumerate(layouts()):
        channels = min(x.shape[dim], 150)
        x = x.narrow(dim, 0, channels)
        y = (x.sin() + 2).narrow(dim, channels // 3, channels - channels // 3)
        positions = x.movedim(dim, 0)[0].shape if channels else x.movedim(dim, -1).shape[:-1]
        mask = torch.rand(positions, generator=make) > 0.4
        for dtype in FLOATS if name in ALL_DTYPES else (torch.float32,):
            short = f"{name}, {str(dtype).removeprefix('torch.')}"
            first, second = x.to(dtype), y.to(dtype)
            yield Sample(
                f"{short}, one stream", (*state(channels), first, None, dim, None, "float32")
            )
            both = state(channels, second.shape[dim])
            masked = mask if number % 2 else None
            yield Sample(f"{short}, two streams", (*both, first, second, dim, masked, "float32"))
    x, y = torch.randn(2, 301, 9, generator=make).unbind()
    later = state(9, 9)
    ops.cross_moments_(*later, y + 4, x, 1)
    yield Sample("second batch", (*later, x, y, 1, None, "float32"))
    nothing = torch.zeros(301, dtype=torch.bool)
    yield Sample("nothing counted", (*later, x, y, 1, nothing, "float32"))
    far = torch.randn(4001, 33, generator=make) + 1e4
    yield Sample("mean 1e4", (*state(33), far, None, 1, None, "float32"))
    for precision in ("bf16x3", "bf16"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            first, second = far.to(dtype), far[:, :18].sin().to(dtype)
            short = f"{precision} of {str(dtype).removeprefix('torch.')}"
            yield Sample(f"{short}, one stream", (*state(33), first, None, 1, None, precision))
            both = state(33, 18)
            yield Sample(f"{short}, two streams", (*both, first, second, 1, None, precision))


def plain(*args: Any) -> None:
    """Centred by the mean and multiplied, all in the type of x."""
    *before, x, y, dim, mask, _ = args

    def centred(tensor: Tensor) -> tuple[Tensor, Tensor]:
        values = tensor.movedim(dim, 0).flatten(1) if tensor.dim() > 1 else tensor[:, None]
        values = values if mask is None else values[:, mask.flatten()]
        mean = values.mean(1, keepdim=True) if values.shape[1] else values.sum(1, keepdim=True)
        return mean[:, 0].double(), values - mean

    mean_x, x_centred = centred(x)
    mean_y, y_centred = (mean_x, x_centred) if y is None else centred(y)
    moments = [
        torch.tensor(x_centred.shape[1]),
        mean_x, x_centred.square().sum(1).double(),
        mean_y, y_centred.square().sum(1).double(),
        (x_centred @ y_centred.T).double(),
    ]  # fmt: skip
    _merge(tuple(before), tuple(moments))


def products(*args: Any) -> torch.dtype:
    if args[10] != "float32":
        return torch.bfloat16
    return torch.float64 if args[6].dtype == torch.float64 else torch.float32


def mistakes() -> Iterator[Mistake]:
    call = ops.cross_moments_
    rule = "nlm.cross_moments_: "
    x, y, one, two = torch.ones(4, 2), torch.ones(4, 3), state(2), state(2, 3)
    yield Mistake(call, (*one, x.int()), TypeError, rule + "x must be float16")
    yield Mistake(call, (*one, x, None, 2), ValueError, rule + "dim must be a dimension of x")
    yield Mistake(call, (*two, x, y.double()), TypeError, rule + "y must have the dtype of x")
    yield Mistake(call, (*two, x, y[:3]), ValueError, rule + "y must have the shape of x except")
    yield Mistake(call, (*two, x), ValueError, rule + "mean_y and m2_y must be given if and only")
    yield Mistake(
        call, (*one, x, y), ValueError, rule + "mean_y and m2_y must be given if and only"
    )
    yield Mistake(
        call,
        (one[0], one[1].float(), *one[2:], x),
        TypeError,
        rule + "mean_x must be torch.float64",
    )
    yield Mistake(call, (*two[:5], one[5], x, y), ValueError, rule + "comoment must have shape")
    turned = torch.zeros(3, 2, dtype=torch.float64).T
    yield Mistake(call, (*two[:5], turned, x, y), ValueError, rule + "comoment must be contiguous")
    yield Mistake(
        call, (*one, x, None, 1, torch.ones(4)), TypeError, rule + "mask must be bool, got"
    )
    yield Mistake(
        call,
        (*one, x, None, 1, None, "tf32"),
        ValueError,
        rule + "precision must be one of float32, bf16x3, bf16, got 'tf32'",
    )


CASES = {"cross_moments_": Case(samples, mistakes, plain, products)}
