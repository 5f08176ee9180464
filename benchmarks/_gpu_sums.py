"""Workloads of weighted_sum and inner_products for gpu_suite.py."""

from collections.abc import Iterator

import torch
from _gpu import Workload
from torch import Tensor


def weighted_sum_workloads() -> Iterator[Workload]:
    from nlm import ops

    for dtype in (torch.float32, torch.bfloat16):
        for count in (2, 8):
            base, *tensors = torch.randn(count + 1, 100_000_000, device="cuda", dtype=dtype)

            def plain(base: Tensor = base, tensors: list = tensors) -> Tensor:
                start = base.float()
                values = [x.float() - start for x in tensors]
                return (start + 0.4 * sum(values[1:], values[0])).to(base.dtype)

            def ours(base: Tensor = base, tensors: list = tensors) -> Tensor:
                return ops.weighted_sum(tensors, 1.0, base, scale=0.4)

            providers = {
                "nlm": ours,
                "expression": plain,
                "torch.compile(expression)": torch.compile(plain),
            }
            amount = (count + 2) * base.numel() * base.element_size()
            yield Workload("weighted_sum", f"{count} tensors", dtype, providers, amount, "copy")


def inner_products_workloads() -> Iterator[Workload]:
    from nlm import ops

    for dtype in (torch.float32, torch.bfloat16):
        for count in (2, 4):
            base, *tensors = torch.randn(count + 1, 100_000_000, device="cuda", dtype=dtype)

            def plain(base: Tensor = base, tensors: list = tensors) -> Tensor:
                vectors = torch.stack(tensors).float() - base.float()
                return vectors @ vectors.T

            providers = {
                "nlm": lambda base=base, tensors=tensors: ops.inner_products(tensors, base),
                "matmul, float32": plain,
            }
            amount = (count + 1) * base.numel() * base.element_size()
            yield Workload("inner_products", f"{count} tensors", dtype, providers, amount, "read")
