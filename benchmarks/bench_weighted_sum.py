"""weighted_sum beside PyTorch. Bytes: one read of the base and of each tensor, one write."""

from collections.abc import Callable, Iterator

import torch
from _bench import Workload, main
from torch import Tensor

from nlm._registry import operations
from nlm.ops import weighted_sum

SIZES = {"3.7 M": 3_700_000, "100 M": 100_000_000}
COUNTS = (2, 8)
CHECKED = 1_000_000  # entries that are held to the reference
SCALE = 0.4
STACKED = 500_000_000  # entries of all tensors above which an expression's temporaries fill 8 GB


def expression(base: Tensor, tensors: list[Tensor], weights: list[float]) -> Tensor:
    """Task Arithmetic as one writes it, on stacked task vectors."""
    start = base.float()
    vectors = torch.stack(tensors).float() - start
    factors = torch.tensor(weights)[:, None]
    return (start + SCALE * (factors * vectors).sum(0)).to(base.dtype)


def fusible(base: Tensor, tensors: list[Tensor], weights: list[float]) -> Tensor:
    """The same without a stack, for a compiler to make one loop of."""
    start = base.float()
    values = [weight * (x.float() - start) for x, weight in zip(tensors, weights, strict=True)]
    return (start + SCALE * sum(values[1:], values[0])).to(base.dtype)


def in_place(base: Tensor, tensors: list[Tensor], weights: list[float]) -> Tensor:
    """The same as a sum of the tensors alone: no differences, one pass for each."""
    total = base * (1 - SCALE * sum(weights))
    for x, weight in zip(tensors, weights, strict=True):
        total.add_(x, alpha=SCALE * weight)
    return total


def workloads() -> Iterator[Workload]:
    reference = operations()["weighted_sum"].reference
    for name, size in SIZES.items():
        for count in COUNTS:
            for dtype in (torch.float32, torch.bfloat16):
                torch.compiler.reset()
                compiled = torch.compile(fusible, dynamic=False)
                make = torch.Generator().manual_seed(0)
                base, *tensors = (
                    torch.randn(size, generator=make).to(dtype) for _ in range(count + 1)
                )
                weights = [1 - k / 10 for k in range(count)]
                args = (base, tensors, weights)

                def call(function: Callable[..., Tensor], args: tuple = args) -> Callable:
                    return lambda: function(*args)[:CHECKED]

                def ours(args: tuple = args) -> Tensor:
                    base, tensors, weights = args
                    return weighted_sum(tensors, weights, base, scale=SCALE)[:CHECKED]

                providers = {"nlm": ours, "add_": call(in_place), "torch.compile": call(compiled)}
                if count * size <= STACKED:
                    providers["stacked expression"] = call(expression)
                first = base[:CHECKED], [x[:CHECKED] for x in tensors]
                truth = reference(*first, weights, 1.0, SCALE, dtype).double()
                amount = float(count + 2) * size * dtype.itemsize
                title = f"{count} tensors, {name}"
                yield Workload(title, dtype, providers, (truth,), 0.0, amount, "copy")


if __name__ == "__main__":
    main("weighted_sum", workloads)
