"""dare beside PyTorch. Bytes: two reads, one write.

The drop rate is one at which next to nothing is dropped, so that all can be held to one result;
no provider's time depends on it.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _bench import Workload, main
from torch import Tensor
from torch.nn import functional as F

from nlm.ops import dare

SIZES = {"3.7 M": 3_700_000, "100 M": 100_000_000}
DROP = 2.0**-40


def bernoulli(expert: Tensor, base: Tensor) -> Tensor:
    kept = torch.bernoulli(torch.full_like(base, 1 - DROP))
    return base + (expert - base) * kept / (1 - DROP)


def uniform(expert: Tensor, base: Tensor) -> Tensor:
    kept = torch.rand_like(base, dtype=torch.float32) < 1 - DROP
    return torch.where(kept, base + (expert - base) / (1 - DROP), base)


def dropout(expert: Tensor, base: Tensor) -> Tensor:
    return F.dropout(expert - base, DROP, training=True, inplace=True).add_(base)


def workloads() -> Iterator[Workload]:
    make = torch.Generator().manual_seed(0)
    compiled = torch.compile(uniform)
    for (size, entries), dtype in itertools.product(SIZES.items(), (torch.float32, torch.bfloat16)):
        # Small integers: all arithmetic on them is exact in both types.
        expert, base = (
            torch.randint(-9, 10, (entries,), generator=make, dtype=torch.int8).to(dtype)
            for _ in range(2)
        )

        def call(
            function: Callable[..., Any], *args: Any, models: tuple = (expert, base)
        ) -> Callable[[], Any]:
            return lambda: function(*models, *args)

        providers = {
            "nlm": call(dare, DROP, 0),
            "base + vector * bernoulli": call(bernoulli),
            "where(rand, ...)": call(uniform),
            "dropout(vector) + base": call(dropout),
            "torch.compile(where(rand, ...))": call(compiled),
        }
        amount = 3.0 * entries * dtype.itemsize
        yield Workload(f"{size} entries", dtype, providers, (expert,), 0.0, amount, "copy")


if __name__ == "__main__":
    main("dare", workloads)
