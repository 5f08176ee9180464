"""assignment beside SciPy and `lap` (if installed). Bytes: one read of the costs.

Speed here is a matter of the instance, not of the bandwidth: how many times the costs are read is
what a fraction of the limit says. The truth is the bound that the duals prove: no sum is larger.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _bench import Workload, main
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from nlm.ops import assignment

try:
    from lap import lapjv
except ImportError:
    lapjv = None

SIZES = (64, 256, 1024, 4096, 8192)
HARD = 2048  # rows beyond which SciPy takes minutes on rank one


def uniform(size: int, make: torch.Generator) -> Tensor:
    return torch.rand(size, size, generator=make)


def planted(size: int, make: torch.Generator) -> Tensor:
    """A permutation of 4 in noise of deviation 1, to be maximised."""
    noise = torch.randn(size, size, generator=make)
    return noise + 4 * torch.eye(size)[torch.randperm(size, generator=make)]


def correlations(size: int, make: torch.Generator) -> Tensor:
    """Of the units of two networks that see the same samples, each with noise of its own."""
    signal = torch.randn(min(2 * size, 2048), size // 4, generator=make) @ torch.randn(
        size // 4, size, generator=make
    )
    a, b = (signal + signal.std() * torch.randn(signal.shape, generator=make) for _ in range(2))
    a, b = ((x - x.mean(0)) / x.std(0) for x in (a, b[:, torch.randperm(size, generator=make)]))
    return a.T @ b / len(a)


def products(size: int, make: torch.Generator) -> Tensor:
    """Of weights that differ in scale most of all: a matrix of rank one in noise."""
    noise = torch.randn(size, size, generator=make)
    return torch.randn(size, 1, generator=make) @ torch.randn(1, size, generator=make) + noise / 10


def few_integers(size: int, make: torch.Generator) -> Tensor:
    return torch.randint(10, (size, size), generator=make).float()


def all_equal(size: int, make: torch.Generator) -> Tensor:
    return torch.ones(size, size)


KINDS = (uniform, planted, correlations, products, few_integers, all_equal)


def total(costs: Tensor, columns: Tensor) -> Tensor:
    return costs.gather(-1, columns[..., None]).double().sum()


def by_scipy(costs: Tensor) -> Tensor:
    matrices = costs.flatten(0, -3).numpy() if costs.dim() > 2 else costs[None].numpy()
    found = [linear_sum_assignment(matrix, maximize=True)[1] for matrix in matrices]
    return torch.stack([torch.from_numpy(each) for each in found]).reshape(costs.shape[:-1])


def by_lap(costs: Tensor) -> Tensor:
    matrices = costs.flatten(0, -3).numpy() if costs.dim() > 2 else costs[None].numpy()
    found = [torch.from_numpy(lapjv(-matrix)[1]).long() for matrix in matrices]
    return torch.stack(found).reshape(costs.shape[:-1])


def exchanged(costs: Tensor, make: torch.Generator) -> tuple[Tensor, Tensor]:
    """With 5 % of the rows exchanged among themselves and noise on them; and which these are."""
    rows = torch.randperm(len(costs), generator=make)[: len(costs) // 20]
    other = costs.clone()
    other[rows] = costs[rows.roll(1)] + 0.1 * costs.std() * torch.randn(
        len(rows), len(costs), generator=make
    )
    return other, torch.zeros(len(costs), dtype=torch.bool).index_fill(0, rows, True)


def cold(costs: Tensor) -> dict[str, Callable[[], Any]]:
    providers = {
        "nlm": lambda: total(costs, assignment(costs, maximize=True).columns),
        "scipy": lambda: total(costs, by_scipy(costs)),
    }
    if lapjv is not None:
        providers["lap"] = lambda: total(costs, by_lap(costs))
    return providers


def workloads() -> Iterator[Workload]:
    make = torch.Generator().manual_seed(0)
    for size in SIZES:
        for kind in KINDS:
            if size <= HARD or kind is not products:
                name = f"{kind.__name__.replace('_', ' ')} {size}"
                costs = kind(size, make)
                yield workload(name, costs, cold(costs))
    heads = correlations(64 * 12, make).unfold(0, 64, 64).unfold(1, 64, 64)
    yield workload("144 heads of 64", heads, cold(heads))
    for size in (1024, 4096):
        for kind in (uniform, planted, correlations):
            costs = kind(size, make)
            start = assignment(costs, maximize=True)
            other, rows = exchanged(costs, make)

            def solved(costs: Tensor = other, **given: Any) -> Tensor:
                return total(costs, assignment(costs, True, **given).columns)

            providers = {
                "nlm": partial(solved, start=start, changed=rows),
                "nlm, rows not named": partial(solved, start=start),
                "nlm without a start": solved,
                "scipy": lambda other=other: total(other, by_scipy(other)),
            }
            yield workload(f"{kind.__name__} {size}, 5 % changed", other, providers)


def workload(name: str, costs: Tensor, providers: dict[str, Callable[[], Any]]) -> Workload:
    amount = float(costs.numel() * costs.element_size())
    v = assignment(costs, maximize=True).column_duals
    bound = sum((row - v[..., None, :]).amax(-1).sum() for row in costs.split(1024, -2)) + v.sum()
    return Workload(name, costs.dtype, providers, (bound,), 1e-9, amount, "read")


if __name__ == "__main__":
    main("assignment", workloads)
