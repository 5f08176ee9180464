"""scale_shift beside PyTorch, forward and backward.

Bytes: forward one read of x and one write of y; backward two reads and one write.
"""

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
    "images [256, 512, 14, 14]": ((256, 512, 14, 14), 1, 1),
    "images, 8 tasks": ((256, 512, 14, 14), 1, 8),
}


def expression(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * scale + shift


def expression_into(out: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return out.copy_(x * scale + shift)


def addcmul(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, x, scale)


def workloads() -> Iterator[Workload]:
    make = torch.Generator().manual_seed(0)
    for name, (shape, dim, tasks) in WORKLOADS.items():
        x32 = torch.randn(shape, generator=make)
        scale, shift = torch.randn(2, tasks, shape[dim], generator=make)
        task = torch.randint(tasks, shape[:1], generator=make) if tasks > 1 else None
        for dtype in (torch.float32, torch.bfloat16):
            yield from forward(name, x32.to(dtype), scale, shift, task, dim)
            yield backward(name, x32.to(dtype), scale, shift, task, dim, make)


def per_sample(parameters: Tensor, x: Tensor, task: Tensor | None, dim: int) -> Tensor:
    """Chosen, converted and shaped to broadcast against x."""
    size = [1] * x.dim()
    size[dim] = x.shape[dim]
    size[0] = 1 if task is None else x.shape[0]
    return (parameters[0] if task is None else parameters[task]).reshape(size).to(x.dtype)


def forward(
    name: str, x: Tensor, scale: Tensor, shift: Tensor, task: Tensor | None, dim: int
) -> Iterator[Workload]:
    """Into new memory, and into memory that was written before, as the copy that it is held to.

    The peers get their parameters chosen, shaped and converted beforehand.
    """
    chosen = [per_sample(parameters, x, task, dim) for parameters in (scale, shift)]
    compiled = torch.compile(expression, dynamic=False)
    providers = {
        "nlm": lambda: scale_shift(x, scale, shift, task, dim),
        "x * scale + shift": lambda: expression(x, *chosen),
        "torch.addcmul": lambda: addcmul(x, *chosen),
        "torch.compile": lambda: compiled(x, *chosen),
    }
    reference = operations()["scale_shift"].reference
    truth = (reference(x.double(), scale.double(), shift.double(), task, dim),)
    most, amount = torch.finfo(x.dtype).eps, 2.0 * x.numel() * x.element_size()
    yield Workload(name, x.dtype, providers, truth, most, amount, "copy")

    out, stock_out = torch.zeros_like(x), torch.zeros_like(x)
    compiled_into = torch.compile(expression_into, dynamic=False)
    into = {
        "nlm": lambda: scale_shift(x, scale, shift, task, dim, out=out),
        "torch.mul(out=), add_": lambda: torch.mul(x, chosen[0], out=stock_out).add_(chosen[1]),
        "torch.addcmul(out=)": lambda: torch.addcmul(chosen[1], x, chosen[0], out=stock_out),
        "torch.compile": lambda: compiled_into(stock_out, x, *chosen),
    }
    yield Workload(f"out=, {name}", x.dtype, into, truth, most, amount, "copy")


def backward(
    name: str,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    task: Tensor | None,
    dim: int,
    make: torch.Generator,
) -> Workload:
    """Gradients of x, scale and shift by autograd, through whichever forward pass."""
    grad = torch.randn(x.shape, generator=make).to(x.dtype)

    def gradients(function: Callable[..., Tensor]) -> Callable[[], Any]:
        leaves = [each.clone().requires_grad_() for each in (x, scale, shift)]
        y = function(*leaves)
        return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)

    def natural(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return expression(x, per_sample(scale, x, task, dim), per_sample(shift, x, task, dim))

    providers = {
        "nlm": gradients(lambda x, scale, shift: scale_shift(x, scale, shift, task, dim)),
        "x * scale + shift": gradients(natural),
        "torch.compile": gradients(torch.compile(natural, dynamic=False)),
    }
    exact = operations()["scale_shift_backward"].reference
    truth = exact(grad.double(), x.double(), scale.double(), task, dim)
    most, amount = torch.finfo(x.dtype).eps, 3.0 * x.numel() * x.element_size()
    return Workload(f"{name}, backward", x.dtype, providers, truth, most, amount, "copy")


if __name__ == "__main__":
    main("scale_shift", workloads)
