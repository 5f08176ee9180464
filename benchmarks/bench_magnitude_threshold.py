"""magnitude_threshold beside PyTorch and numpy. Bytes: one read of the values and of the base."""

from collections.abc import Callable, Iterator

import torch
from _bench import Workload, main
from torch import Tensor

from nlm.ops import magnitude_threshold

SHARE = 0.2  # of the values that are kept: TIES' default
SIZES = {"3.7 M": 3_700_000, "100 M": 100_000_000}
SORTED = 10_000_000  # above, a sort takes half a minute


def magnitudes(x: Tensor, base: Tensor) -> Tensor:
    return (x.float() - base.float()).abs_()


def partition(x: Tensor, base: Tensor, k: int) -> Tensor:
    values = magnitudes(x, base).numpy()
    values.partition(x.numel() - k)
    return torch.tensor(values[x.numel() - k])


def kthvalue(x: Tensor, base: Tensor, k: int) -> Tensor:
    return magnitudes(x, base).kthvalue(x.numel() - k + 1).values


def topk(x: Tensor, base: Tensor, k: int) -> Tensor:
    return magnitudes(x, base).topk(k).values[-1]


def argsort(x: Tensor, base: Tensor, k: int) -> Tensor:
    values = magnitudes(x, base)
    return values[values.argsort(descending=True)[k - 1]]


def workloads() -> Iterator[Workload]:
    for name, size in SIZES.items():
        for dtype in (torch.float32, torch.bfloat16):
            make = torch.Generator().manual_seed(0)
            base = torch.randn(size, generator=make)
            x = (base + 0.01 * torch.randn(size, generator=make)).to(dtype)
            base, k = base.to(dtype), int(SHARE * size)

            def call(
                function: Callable[..., Tensor], x: Tensor = x, base: Tensor = base, k: int = k
            ) -> Callable[[], Tensor]:
                return lambda: function(x, base, k)

            providers = {
                "nlm": lambda x=x, base=base, k=k: magnitude_threshold([x], k, [base]),
                "numpy.partition": call(partition),
                "torch.kthvalue": call(kthvalue),
            }
            if size <= SORTED:
                providers |= {"torch.topk": call(topk), "torch.argsort": call(argsort)}
            truth = (partition(x, base, k).double(),)
            amount = 2.0 * size * dtype.itemsize
            yield Workload(name, dtype, providers, truth, 0.0, amount, "read")
    state: list[Tensor] = []
    for width in (400, 300, 700):  # many tensors of a model, as one vector
        state += [torch.randn(width, width), torch.randn(width)] * 5
    x, k = torch.cat([each.flatten() for each in state]), 700_000
    providers = {
        "nlm": lambda: magnitude_threshold(state, k),
        "cat, numpy.partition": lambda: partition(
            torch.cat([each.flatten() for each in state]), torch.zeros(()), k
        ),
    }
    truth = (partition(x, torch.zeros(()), k).double(),)
    yield Workload("30 tensors", x.dtype, providers, truth, 0.0, 4.0 * x.numel(), "read")


if __name__ == "__main__":
    main("magnitude_threshold", workloads)
