"""inner_products beside PyTorch. Bytes: one read of the base and of each tensor."""

from collections.abc import Callable, Iterator

import torch
from _bench import Workload, main
from torch import Tensor

from nlm.ops import inner_products

SIZES = {"3.7 M": 3_700_000, "100 M": 100_000_000}
COUNTS = (2, 4)


def expression(base: Tensor, tensors: list[Tensor]) -> Tensor:
    """As one writes it, in float64."""
    vectors = torch.stack(tensors).double() - base.double()
    return vectors @ vectors.T


def matmul(base: Tensor, tensors: list[Tensor]) -> Tensor:
    """The same in float32."""
    vectors = torch.stack(tensors).float() - base.float()
    return vectors @ vectors.T


def dots(base: Tensor, tensors: list[Tensor]) -> Tensor:
    """The same by dot products of two vectors each."""
    vectors = [x.float() - base.float() for x in tensors]
    return torch.stack([torch.stack([torch.dot(x, y) for y in vectors]) for x in vectors])


def fusible(base: Tensor, tensors: list[Tensor]) -> Tensor:
    """The same for a compiler to make one loop of; its sums are float32."""
    vectors = [x.float() - base.float() for x in tensors]
    products = {
        (i, j): (x * y).sum() for i, x in enumerate(vectors) for j, y in enumerate(vectors[: i + 1])
    }
    each = range(len(vectors))
    return torch.stack([torch.stack([products[max(i, j), min(i, j)] for j in each]) for i in each])


def workloads() -> Iterator[Workload]:
    for name, size in SIZES.items():
        for count in COUNTS:
            for dtype in (torch.float32, torch.bfloat16):
                torch.compiler.reset()
                compiled = torch.compile(fusible, dynamic=False)
                make = torch.Generator().manual_seed(0)
                args = (
                    torch.randn(size, generator=make).to(dtype),
                    [torch.randn(size, generator=make).to(dtype) for _ in range(count)],
                )

                def call(function: Callable[..., Tensor], args: tuple = args) -> Callable:
                    return lambda: function(*args)

                def ours(args: tuple = args) -> Tensor:
                    return inner_products(args[1], args[0])

                providers = {
                    "nlm": ours,
                    "matmul": call(matmul),
                    "dot": call(dots),
                    "torch.compile": call(compiled),
                }
                if size * count < 100_000_000:  # its temporaries are float64
                    providers["expression"] = call(expression)
                parts = (
                    [x[i : i + 10_000_000] for x in (args[0], *args[1])]
                    for i in range(0, size, 10_000_000)
                )
                truth = sum(expression(start, each) for start, *each in parts)
                amount = float(count + 1) * size * dtype.itemsize
                title = f"{count} tensors, {name}"
                yield Workload(title, dtype, providers, (truth,), 1e-12, amount, "read")


if __name__ == "__main__":
    main("inner_products", workloads)
