"""Workloads of magnitude_threshold, magprune and sign_merge for gpu_suite.py."""

from collections.abc import Iterator

import torch
from _gpu import Workload
from torch import Tensor


def selection_workloads() -> Iterator[Workload]:
    from nlm import ops

    for dtype in (torch.float32, torch.bfloat16):
        for size in (3_700_000, 100_000_000):
            x, base = torch.randn(2, size, device="cuda", dtype=dtype)
            k = size // 5

            def plain(x: Tensor = x, base: Tensor = base, k: int = k) -> Tensor:
                return (x.float() - base.float()).abs().kthvalue(x.numel() - k + 1).values

            def ordered(x: Tensor = x, base: Tensor = base, k: int = k) -> Tensor:
                return (x.float() - base.float()).abs().sort().values[-k]

            providers = {
                "nlm": lambda x=x, base=base, k=k: ops.magnitude_threshold([x], k, [base]),
                "kthvalue": plain,
                "sort": ordered,
            }
            amount = 2 * size * x.element_size()
            yield Workload("magnitude_threshold", f"{size}", dtype, providers, amount, "read")


def magprune_workloads() -> Iterator[Workload]:
    from nlm import ops

    def shares(x: Tensor) -> Tensor:
        return torch.linspace(0.2, 0.8, x.shape[1], device="cuda")

    def once(x: Tensor) -> Tensor:
        order = x.abs().argsort(dim=1)
        chance = torch.empty(x.shape, device="cuda").scatter_(1, order, shares(x).expand(x.shape))
        return torch.where(torch.rand_like(chance) <= chance, x / chance, 0).to(x.dtype)

    def twice(x: Tensor) -> Tensor:
        chance = shares(x)[x.abs().argsort(dim=1).argsort(dim=1)]
        return (x * torch.bernoulli(chance) / chance).to(x.dtype)

    compiled = torch.compile(once)
    for dtype in (torch.float32, torch.bfloat16):
        for rows, length in ((4096, 4096), (4096, 14336), (8, 1 << 20)):
            x = torch.randn(rows, length, device="cuda").to(dtype)
            providers = {
                "nlm": lambda x=x: ops.magprune(x, 0.5, 0.3, 0),
                "scatter to one argsort": lambda x=x: once(x),
                "argsort of argsort": lambda x=x: twice(x),
                "torch.compile(scatter to one argsort)": lambda x=x: compiled(x),
            }
            amount = 2 * x.numel() * x.element_size()
            yield Workload("magprune", f"{rows} x {length}", dtype, providers, amount, "copy")


def sign_merge_workloads() -> Iterator[Workload]:
    from nlm import ops

    for dtype in (torch.float32, torch.bfloat16):
        for count in (2, 4, 8):
            base, *experts = torch.randn(count + 1, 100_000_000, device="cuda", dtype=dtype)
            limits = torch.linspace(0.5, 1, count, device="cuda")

            def plain(base: Tensor = base, experts: list = experts, t: Tensor = limits) -> Tensor:
                start = base.float()
                values = [x.float() - start for x in experts]
                values = [torch.where(v.abs() < t[k], 0.0, v) for k, v in enumerate(values)]
                plus = sum(values[1:], values[0]) >= 0
                agrees = [torch.where(plus, v > 0, v < 0) for v in values]
                total = sum(torch.where(a, v, 0.0) for a, v in zip(agrees, values, strict=True))
                share = sum(a.float() for a in agrees)
                return (start + 0.4 * total / share.clamp(min=1)).to(base.dtype)

            def ours(base: Tensor = base, experts: list = experts, t: Tensor = limits) -> Tensor:
                models = [[x] for x in experts]
                return ops.sign_merge([base], models, t, scale=0.4, dialect="peft")[0]

            providers = {
                "nlm": ours,
                "expression": plain,
                "torch.compile(expression)": torch.compile(plain),
            }
            amount = (count + 2) * base.numel() * base.element_size()
            yield Workload("sign_merge", f"{count} experts", dtype, providers, amount, "copy")
