"""Workloads of tall_mask and dare for gpu_suite.py."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from _gpu import Workload
from torch import Tensor


def mask_workloads() -> Iterator[Workload]:
    from nlm import ops
    from nlm.ops.tall_mask import unpack

    entries, tasks = 1 << 27, 8

    def build(expert: Tensor, base: Tensor, merged: Tensor) -> Tensor:
        return (expert - base).abs() > 0.4 * (expert - merged).abs()

    def drop(expert: Tensor, base: Tensor) -> Tensor:
        kept = torch.rand_like(base, dtype=torch.float32) >= 0.9
        return torch.where(kept, base + 10 * (expert - base), base)

    compiled_build, compiled_drop = torch.compile(build), torch.compile(drop)
    for dtype in (torch.float32, torch.bfloat16):
        models = [torch.randn(entries, device="cuda").to(dtype) for _ in range(3)]
        mask = ops.tall_mask(*models, 0.4)
        bools = unpack(mask, (entries,))
        for op, limit, providers in (
            ("tall_mask", "read", {
                "nlm": lambda m=models: ops.tall_mask(*m, 0.4),
                "expression, bools": lambda m=models: build(*m),
                "torch.compile, bools": lambda m=models: compiled_build(*m),
            }),
            ("tall_mask_apply", "copy", {
                "nlm": lambda m=models, mask=mask: ops.tall_mask_apply(mask, *m[1:]),
                "torch.where, bools": lambda m=models, mask=bools: torch.where(mask, m[2], m[1]),
            }),
            ("dare", "copy", {
                "nlm": lambda m=models: ops.dare(*m[:2], 0.9, 0),
                "where(rand, ...)": lambda m=models: drop(*m[:2]),
                "torch.compile(where(rand, ...))": lambda m=models: compiled_drop(*m[:2]),
            }),
        ):  # fmt: skip
            amount = 3 * entries * dtype.itemsize
            yield Workload(op, f"{entries >> 20} Mi", dtype, providers, amount, limit)
    masks = torch.randint(256, (tasks, entries // 8), device="cuda", dtype=torch.uint8)
    every = torch.stack([unpack(mask, (entries,)) for mask in masks])
    counted: dict[str, Callable[[], Any]] = {
        "nlm": lambda: ops.tall_mask_agreement(masks, 2),
        "expression, bools": lambda: every.sum(0, dtype=torch.uint8) >= 2,
    }
    amount = (tasks + 1) * entries / 8
    name = f"{tasks} masks of {entries >> 20} Mi"
    yield Workload("tall_mask_agreement", name, torch.uint8, counted, amount, "read")
