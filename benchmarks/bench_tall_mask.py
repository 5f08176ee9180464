"""TALL-masks in bits beside PyTorch: building, applying and counting masks.

Bytes: to build, three reads; to apply, two reads and one write; to count, one read of eight masks
and one write, where the peers read and write bools. What builds bools elsewhere is packed by numpy;
what applies or counts them has them given.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from _bench import Workload, main
from torch import Tensor

from nlm.ops import tall_mask, tall_mask_agreement, tall_mask_apply
from nlm.ops.tall_mask import unpack

SIZES = {"3.7 M": 3_700_000, "100 M": 100_000_000}
LIMIT = 0.4
TASKS, LEAST = 8, 2


def build(expert: Tensor, base: Tensor, merged: Tensor) -> Tensor:
    return (expert - base).abs() > LIMIT * (expert - merged).abs()


def choose(bools: Tensor, base: Tensor, merged: Tensor) -> Tensor:
    return torch.where(bools, merged, base)


def multiply(bools: Tensor, base: Tensor, merged: Tensor) -> Tensor:
    return base + bools * (merged - base)


def agree(bools: Tensor) -> Tensor:
    return (bools.sum(0, dtype=torch.uint8) >= LEAST).sum()


def packed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: torch.from_numpy(np.packbits(function(*args).numpy(), bitorder="little"))


def call(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: function(*args)


def workloads() -> Iterator[Workload]:
    for size, entries in SIZES.items():
        yield from workloads_of(size, entries)


def workloads_of(size: str, entries: int) -> Iterator[Workload]:
    make = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        # Small integers: all arithmetic on them is exact in both types.
        tensors = [
            torch.randint(-9, 10, (entries,), generator=make, dtype=torch.int8).to(dtype)
            for _ in range(3)
        ]
        _, base, merged = tensors
        amount = 3.0 * entries * dtype.itemsize + entries / 8
        mask = packed(build)(*tensors)
        providers = {
            "nlm": call(tall_mask, *tensors, LIMIT),
            "expression, packbits": call(packed(build), *tensors),
            "torch.compile, packbits": call(packed(torch.compile(build)), *tensors),
        }
        yield Workload(f"build, {size}", dtype, providers, (mask,), 0.0, amount, "read")

        bools = unpack(mask, (entries,))
        truth = (choose(bools, base, merged),)
        providers = {
            "nlm": call(tall_mask_apply, mask, base, merged),
            "torch.where": call(choose, bools, base, merged),
            "base + mask * vector": call(multiply, bools, base, merged),
            "torch.compile(where)": call(torch.compile(choose), bools, base, merged),
        }
        yield Workload(f"apply, {size}", dtype, providers, truth, 0.0, amount, "copy")

    masks = torch.randint(256, (TASKS, entries // 8), generator=make, dtype=torch.uint8)
    every = torch.stack([unpack(mask, (entries,)) for mask in masks])
    providers = {
        "nlm": call(lambda: tall_mask_agreement(masks, LEAST)[1]),
        "expression on bools": call(agree, every),
        "torch.compile on bools": call(torch.compile(agree), every),
    }
    amount = (TASKS + 1) * entries / 8
    yield Workload(
        f"count 8 masks, {size}", torch.uint8, providers, (agree(every),), 0.0, amount, "read"
    )


if __name__ == "__main__":
    main("tall_mask", workloads)
