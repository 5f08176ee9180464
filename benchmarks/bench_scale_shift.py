"""scale_shift beside PyTorch. Bytes: one read of x, one write of y."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from _bench import Workload, main
from torch import Tensor

from nlm._registry import operations
from nlm.ops import scale_shift

WORKLOADS = {
    "tokens, 8 tasks": ((64, 197, 768), 2, 8),
    "rows [65536, 768]": ((65536, 768), 1, 1),
    "images [64, 256, 28, 28]": ((64, 256, 28, 28), 1, 1),
    "images, 8 tasks": ((64, 256, 28, 28), 1, 8),
}


def expression(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * scale + shift


def addcmul(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, x, scale)


def workloads() -> Iterator[Workload]:
    compiled = torch.compile(expression)
    reference = operations()["scale_shift"].reference
    make = torch.Generator().manual_seed(0)
    for name, (shape, dim, tasks) in WORKLOADS.items():
        x32 = torch.randn(shape, generator=make)
        scale, shift = torch.randn(2, tasks, shape[dim], generator=make)
        task = torch.randint(tasks, shape[:1], generator=make) if tasks > 1 else None
        size = [1] * len(shape)
        size[dim] = shape[dim]
        size[0] = shape[0] if task is not None else 1
        for dtype in (torch.float32, torch.bfloat16):
            x = x32.to(dtype)
            # The peers get their parameters chosen, shaped and converted beforehand.
            chosen = [
                (p[0] if task is None else p[task]).reshape(size).to(dtype) for p in (scale, shift)
            ]

            def call(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
                return lambda: function(*args)

            providers = {
                "nlm": call(scale_shift, x, scale, shift, task, dim),
                "x * scale + shift": call(expression, x, *chosen),
                "torch.addcmul": call(addcmul, x, *chosen),
                "torch.compile": call(compiled, x, *chosen),
            }
            truth = (reference(x.double(), scale.double(), shift.double(), task, dim),)
            most = torch.finfo(dtype).eps
            amount = 2.0 * x.numel() * x.element_size()
            yield Workload(name, dtype, providers, truth, most, amount, "copy")


if __name__ == "__main__":
    main("scale_shift", workloads)
