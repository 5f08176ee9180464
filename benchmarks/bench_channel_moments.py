"""channel_moments beside PyTorch. Bytes: one read of x."""

from collections.abc import Iterator

import torch
from _bench import Workload, main
from torch import Tensor

from nlm._registry import operations
from nlm.ops import channel_moments

WORKLOADS = {
    "tokens [64, 197, 768]": ((64, 197, 768), 2),
    "rows [65536, 768]": ((65536, 768), 1),
    "images [256, 512, 14, 14]": ((256, 512, 14, 14), 1),
    "small images [512, 512, 7, 7]": ((512, 512, 7, 7), 1),
}


def var_mean(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    others = [d for d in range(x.dim()) if d != dim]
    variance, mean = torch.var_mean(x, others, correction=0)
    return mean, variance


def products(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Fast and not centred: sums as products with a vector of ones, squares chunk by chunk."""
    if dim == x.dim() - 1:
        rows = x.reshape(-1, x.shape[-1])
        n = len(rows)
        total = torch.zeros(2, x.shape[dim])
        for chunk in rows.split(4096):
            ones = chunk.new_ones(1, len(chunk))
            total[0] += (ones @ chunk)[0]
            total[1] += (ones @ (chunk * chunk))[0]
    else:
        flat = x.flatten(2)  # [N, C, L]
        n = flat.shape[0] * flat.shape[2]
        total = torch.zeros(2, x.shape[dim])
        for chunk in flat.split(max(1, (1 << 20) // flat[0].numel())):
            total[0] += chunk.sum((0, 2))
            total[1] += (chunk * chunk).sum((0, 2))
    mean = total[0] / n
    return mean, total[1] / n - mean.square()


def workloads() -> Iterator[Workload]:
    compiled = torch.compile(var_mean)
    reference = operations()["channel_moments"].reference
    for name, (shape, dim) in WORKLOADS.items():
        x32 = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = x32.to(dtype)

            def ours(x: Tensor = x, dim: int = dim) -> tuple[Tensor, Tensor]:
                count, mean, m2 = channel_moments(x, dim)
                return mean, m2 / count

            count, mean, m2 = reference(x, dim, None)
            providers = {
                "nlm": ours,
                "torch.var_mean": lambda x=x, dim=dim: var_mean(x, dim),
                "torch.compile(var_mean)": lambda x=x, dim=dim: compiled(x, dim),
            }
            if dtype == torch.float32:
                providers["sums of x and x * x"] = lambda x=x, dim=dim: products(x, dim)
            amount = float(x.numel() * x.element_size())
            truth = (mean, m2 / count)
            yield Workload(name, dtype, providers, truth, 1e-12, amount, "read")


if __name__ == "__main__":
    main("channel_moments", workloads)
