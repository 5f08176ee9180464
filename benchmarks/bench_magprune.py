"""magprune beside PyTorch. Bytes: one read, one write; the limit is a copy.

The chances are such that next to nothing is dropped, so that all can be held to one result; no
provider's time depends on them.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _bench import Workload, main
from torch import Tensor

from nlm.ops import magprune

SHAPES = {"1024 x 768": (1024, 768), "4096 x 4096": (4096, 4096), "8 x 1 M": (8, 1 << 20)}
DENSITY, EPSILON = 1 - 2.0**-39, 2.0**-40


def shares(x: Tensor) -> Tensor:
    low, high = DENSITY - EPSILON, DENSITY + EPSILON
    return torch.linspace(low, high, x.shape[1], dtype=torch.float64).float()


def sorted_once(x: Tensor) -> Tensor:
    """The probabilities go to the places of the ranks; a number is drawn for each entry."""
    order = x.abs().argsort(dim=1)
    chance = torch.empty(x.shape).scatter_(1, order, shares(x).expand(x.shape))
    return torch.where(torch.rand_like(chance) <= chance, x / chance, 0).to(x.dtype)


def sorted_twice(x: Tensor) -> Tensor:
    """As published implementations have it: the ranks are the order of the order."""
    ranks = x.abs().argsort(dim=1).argsort(dim=1)
    chance = shares(x)[ranks]
    kept = torch.bernoulli(chance)
    return (x * kept / chance).to(x.dtype)


def workloads() -> Iterator[Workload]:
    make = torch.Generator().manual_seed(0)
    torch.compiler.reset()  # or it gives up after eight shapes, types and numbers of threads
    compiled = torch.compile(sorted_once)
    for (name, shape), dtype in itertools.product(SHAPES.items(), (torch.float32, torch.bfloat16)):
        x = torch.randn(shape, generator=make).to(dtype)

        def call(function: Callable[..., Any], *args: Any, x: Tensor = x) -> Callable[[], Any]:
            return lambda: function(x, *args)

        providers = {
            "nlm": call(magprune, DENSITY, EPSILON, 0),
            "scatter to one argsort": call(sorted_once),
            "argsort of argsort": call(sorted_twice),
            "torch.compile(scatter to one argsort)": call(compiled),
        }
        amount = 2.0 * x.numel() * dtype.itemsize
        yield Workload(name, dtype, providers, (x,), 1e-6, amount, "copy")


if __name__ == "__main__":
    main("magprune", workloads)
