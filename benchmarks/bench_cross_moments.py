"""cross_moments_ beside PyTorch. Flops: 2 n cx cy for two streams, n cx (cx + 1) for one."""

from collections.abc import Iterator

import torch
from _bench import Workload, main
from torch import Tensor

from nlm._registry import operations
from nlm.ops import cross_moments_

WORKLOADS = {  # name -> shape, channel dim, numbers of streams
    "rows [65536, 64]": ((65536, 64), 1, (1, 2)),
    "rows [65536, 768]": ((65536, 768), 1, (1, 2)),
    "rows [16384, 4096]": ((16384, 4096), 1, (2,)),
    "images [256, 256, 28, 28]": ((256, 256, 28, 28), 1, (1, 2)),
    "tokens [64, 197, 768]": ((64, 197, 768), 2, (1, 2)),
}


def state(channels: int, streams: int) -> list[Tensor | None]:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    second = [zeros(channels), zeros(channels)] if streams == 2 else [None, None]
    count = torch.zeros((), dtype=torch.int64)
    return [count, zeros(channels), zeros(channels), *second, zeros(channels, channels)]


def samples_first(x: Tensor, dim: int) -> Tensor:
    return x.movedim(dim, -1).reshape(-1, x.shape[dim])


def centred_product(x: Tensor, y: Tensor, dim: int) -> Tensor:
    x, y = samples_first(x, dim), samples_first(y, dim)
    return (x - x.mean(0)).T @ (y - y.mean(0))


def plain_product(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Fast and not centred: the means are taken out of the product afterwards."""
    x, y = samples_first(x, dim), samples_first(y, dim)
    return (x.T @ y).sub_(torch.outer(x.sum(0), y.mean(0)))


def workloads() -> Iterator[Workload]:
    reference = operations()["cross_moments_"].reference
    make = torch.Generator().manual_seed(0)
    for name, (shape, dim, numbers) in WORKLOADS.items():
        torch.compiler.reset()  # one graph per shape and type, below the limit of recompilations
        compiled = torch.compile(centred_product, dynamic=False)
        x32 = torch.randn(shape, generator=make) + 1
        y32 = torch.randn(shape, generator=make) + 0.5 * x32
        for dtype in (torch.float32, torch.bfloat16):
            for streams in numbers:
                x = x32.to(dtype)
                y = x if streams == 1 else y32.to(dtype)
                second = None if streams == 1 else y
                channels = x.shape[dim]
                samples = x.numel() // channels

                def ours(
                    precision: str = "float32",
                    x: Tensor = x,
                    second: Tensor | None = second,
                    dim: int = dim,
                    n: int = streams,
                ) -> Tensor:
                    moments = state(x.shape[dim], n)
                    cross_moments_(*moments, x, second, dim, None, precision)
                    return moments[-1]

                def exact(
                    x: Tensor = x, second: Tensor | None = second, dim: int = dim, n: int = streams
                ) -> tuple[Tensor, ...]:
                    moments = state(x.shape[dim], n)
                    reference(*moments, x, second, dim, None)
                    return (moments[-1],)

                providers = {
                    "nlm": ours,
                    "centred product": lambda x=x, y=y, dim=dim: centred_product(x, y, dim),
                    "torch.compile(centred)": (
                        lambda x=x, y=y, dim=dim, compiled=compiled: compiled(x, y, dim)
                    ),
                    "product - n mean mean": lambda x=x, y=y, dim=dim: plain_product(x, y, dim),
                    "nlm bf16x3": lambda ours=ours: ours("bf16x3"),
                    "nlm bf16": lambda ours=ours: ours("bf16"),
                }
                flops = samples * channels * (channels + 1 if streams == 1 else 2 * channels)
                yield Workload(f"{name} x{streams}", dtype, providers, exact, 2e-6, flops, "gemm")


if __name__ == "__main__":
    main("cross_moments", workloads)
