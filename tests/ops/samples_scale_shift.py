"""Conformance samples of scale_shift, into new and given memory, and its backward operator."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from _compare import Case, Mistake, Sample
from ops.samples_channel_moments import FLOATS, layouts
from torch import Tensor

from nlm import ops
from nlm.ops._channels import empty_like


def _arguments() -> Iterator[tuple[str, tuple]]:
    """Name and (x, scale, shift, task, dim)."""
    make = torch.Generator().manual_seed(2)
    for name, x, dim in layouts():
        for dtype in FLOATS:
            short = str(dtype).removeprefix("torch.")
            for tasks in (1, 3):
                if tasks > 1 and dim == 0:
                    continue
                size = (x.shape[dim],) if tasks == 1 else (tasks, x.shape[dim])
                scale, shift = torch.randn(2, *size, generator=make, dtype=torch.float64)
                if dtype != torch.float64:
                    scale, shift = scale.float(), shift.float()
                task = None
                if tasks > 1:
                    task = torch.randint(tasks, (x.shape[0],), generator=make)
                yield f"{name}, {tasks} tasks, {short}", (x.to(dtype), scale, shift, task, dim)


def samples() -> Iterator[Sample]:
    for name, args in _arguments():
        yield Sample(name, args)
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
        x = every[~every.isnan(), None].expand(-1, 2)
        scale, shift = torch.tensor([[0.50048828125, -3.0], [1e-8, 6.1e-5]])
        yield Sample(f"every value, {dtype}", (x, scale, shift, None, 1))


def out_samples() -> Iterator[Sample]:
    """Into contiguous memory, and into what is laid out as x."""
    for name, (x, scale, shift, task, dim) in _arguments():
        if x.dtype in (torch.float32, torch.bfloat16):
            like = torch.empty(x.shape, dtype=x.dtype) if task is None else x
            out = empty_like(like, dim % x.dim()).fill_(math.nan)
            yield Sample(name, (out, x, scale, shift, task, dim))


def backward_samples() -> Iterator[Sample]:
    make = torch.Generator().manual_seed(3)
    for name, (x, scale, _, task, dim) in _arguments():
        grad = torch.randn(x.shape, generator=make).to(x.dtype)
        yield Sample(name, (grad, x, scale, task, dim))


def plain_backward(
    grad: Tensor, x: Tensor, scale: Tensor, task: Tensor | None, dim: int
) -> tuple[Tensor, ...]:
    """What autograd makes of the plain expression in the type of x."""
    with torch.enable_grad():
        leaves = [x.detach().clone(), scale.to(x.dtype), torch.zeros_like(scale, dtype=x.dtype)]
        for leaf in leaves:
            leaf.requires_grad_()
        shape = [1] * x.dim()
        shape[dim] = x.shape[dim]
        if task is not None:
            shape[0] = x.shape[0]
        chosen = [p if task is None else torch.atleast_2d(p)[task] for p in leaves[1:]]
        y = leaves[0] * chosen[0].reshape(shape) + chosen[1].reshape(shape)
        return torch.autograd.grad(y, leaves, grad)


def gradients() -> Iterator[Sample]:
    make = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=torch.float64)

    yield Sample("images", (random(2, 3, 2, 2), random(3), random(3), None, 1))
    tasks = torch.tensor([1, 0, 1])
    yield Sample("tokens", (random(3, 2, 4), random(2, 4), random(2, 4), tasks, 2))


def mistakes() -> Iterator[Mistake]:
    call = ops.scale_shift
    rule = "nlm.scale_shift: "
    x, one, two = torch.ones(4, 3), torch.ones(3), torch.ones(2, 3)
    ids = torch.tensor([0, 1, 1, 0])
    yield Mistake(call, (x.int(), one, one), TypeError, rule + "x must be float16")
    yield Mistake(call, (x, one, one, None, 2), ValueError, rule + "dim must be a dimension of x")
    yield Mistake(call, (x, one.double(), one.double()), TypeError, rule + "scale and shift must")
    yield Mistake(
        call, (x, torch.ones(2), torch.ones(2)), ValueError, rule + "scale and shift must"
    )
    yield Mistake(call, (x, two, one), ValueError, rule + "scale and shift must both be")
    yield Mistake(call, (x, two, two), ValueError, rule + "task must be given for parameters of")
    yield Mistake(call, (x, two, two, 2), ValueError, rule + "task must be in [0, 2), got 2")
    yield Mistake(call, (x, two, two, ids.int()), TypeError, rule + "task must be an int or int64")
    yield Mistake(
        call, (x, two, two, ids[:3]), ValueError, rule + "task must hold one id per sample"
    )
    yield Mistake(
        call, (x, two, two, ids + 1), ValueError, rule + "task ids must be in [0, 2)", True
    )


def into(out: Tensor, *args: Any) -> Tensor:
    return ops.scale_shift(*args, out=out)


def out_mistakes() -> Iterator[Mistake]:
    x, one = torch.ones(4, 3), torch.ones(3)
    like = "nlm.scale_shift: out must have the shape, type and device of x"
    yield Mistake(into, (x.double(), x, one, one), ValueError, like)
    yield Mistake(into, (x[:3].clone(), x, one, one), ValueError, like)
    yield Mistake(into, (torch.ones(3, 4).T, x, one, one), ValueError, like)
    both = torch.ones(5, 3)
    shared = "nlm.scale_shift: a tensor that is written to must not share memory"
    yield Mistake(into, (both[1:], both[:4], one, one), ValueError, shared, True)
    yield Mistake(into, (both[1:], x, both[1], one), ValueError, shared, True)


def backward_mistakes() -> Iterator[Mistake]:
    x, one = torch.ones(4, 3), torch.ones(3)
    call = torch.ops.nlm.scale_shift_backward
    yield Mistake(
        call, (x[:2], x, one, None, 1), ValueError, "nlm.scale_shift_backward: grad must have"
    )


CASES = {
    "scale_shift": Case(samples, mistakes, gradients=gradients),
    "scale_shift_out_": Case(out_samples, out_mistakes),
    "scale_shift_backward": Case(backward_samples, backward_mistakes, plain_backward),
}
