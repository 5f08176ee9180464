"""Scale and shift of every channel, with parameters per task.

For a position i of sample n, of task t = task[n], and a channel c

    y_nic = x_nic scale_tc + shift_tc

and, with g the gradient of y,

    grad_x = g scale_tc,   grad_scale_tc = sum_{n: task[n] = t} sum_i g x,   grad_shift_tc = sum g .

Bytes: one read of x, one write of y; backward two reads, one write. Flops: 2 per element.
Numerics: float32 (float64 for float64), multiplication and addition rounded separately, so that the
kernel, the plain expression and what a compiler makes of it agree in every bit. The sums of the
gradients are taken in float64 and in a fixed order: the same bits for any number of threads.
Under ``torch.compile`` and ``torch.export`` the plain expression is emitted, which fuses for free;
a task id out of range, an error in eager code on the CPU, gives NaN there. The transforms of
``torch.func`` and forward-mode differentiation take the plain expression too.
Source: TACT's correction, Sharma et al., arXiv:2410.12766; of one task, Jordan et al., REPAIR,
arXiv:2211.08403.
"""

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nlm import _native
from nlm._registry import register
from nlm.ops._arguments import check_apart, check_tensor, is_transformed, without_gradient
from nlm.ops._channels import (
    channels_view,
    check_device,
    check_float,
    empty_like,
    normalize_dim,
    positions_last,
)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_sample(parameters: Tensor, x: Tensor, task: Tensor | None, dim: int) -> Tensor:
    """``[C]`` or ``[T, C]`` parameters, as they broadcast against x, in the computing type.

    NaN for an id out of range, which nothing refuses where the expression is compiled.
    """
    rows = torch.atleast_2d(parameters)  # [T, C]
    if task is None:
        chosen = rows[0]  # [C]
    else:
        known = (task >= 0) & (task < rows.shape[0])
        chosen = rows[torch.where(known, task, 0)]  # [N, C]
        chosen = torch.where(known[:, None], chosen, torch.nan)
    shape = [1] * x.dim()
    shape[dim] = chosen.shape[-1]
    if task is not None:
        shape[0] = chosen.shape[0]
    return chosen.reshape(shape).to(_compute_dtype(x))


def reference(x: Tensor, scale: Tensor, shift: Tensor, task: Tensor | None, dim: int) -> Tensor:
    dim %= x.dim()
    y = x.to(_compute_dtype(x)) * _per_sample(scale, x, task, dim)
    return (y + _per_sample(shift, x, task, dim)).to(x.dtype)


def reference_out(out: Tensor, x: Tensor, *args: Any) -> None:
    _check_memory(out, x, *args)
    out.copy_(reference(x, *args))


def reference_backward(
    grad: Tensor, x: Tensor, scale: Tensor, task: Tensor | None, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    dim %= x.dim()
    grad_x = (grad.to(_compute_dtype(x)) * _per_sample(scale, x, task, dim)).to(x.dtype)
    wide = grad.double()
    sums = []
    for product in (wide * x.double(), wide):
        if task is None:
            total = positions_last(product, dim).sum(1).reshape(scale.shape)
        else:
            per_sample = product.movedim(dim, 1).unsqueeze(2).flatten(2).sum(2)  # [N, C]
            rows = torch.atleast_2d(per_sample.new_zeros(scale.shape))
            total = rows.index_add(0, task, per_sample).reshape(scale.shape)
        sums.append(total.to(scale.dtype))
    return grad_x, sums[0], sums[1]


def _check(x: Tensor, scale: Tensor, shift: Tensor, task: Tensor | None, dim: int) -> int:
    """Validates; returns ``dim`` as a non-negative number."""
    check_float("scale_shift", x)
    dim = normalize_dim("scale_shift", x, dim)
    allowed = {torch.float32, _compute_dtype(x)}
    if scale.dtype not in allowed or shift.dtype != scale.dtype:
        raise TypeError(
            "nlm.scale_shift: scale and shift must both be float32 (or float64 for float64 x), "
            f"got {scale.dtype} and {shift.dtype} for {x.dtype} x"
        )
    if scale.shape != shift.shape or scale.dim() not in (1, 2) or scale.shape[-1] != x.shape[dim]:
        raise ValueError(
            f"nlm.scale_shift: scale and shift must both be [C] or [T, C] with C = {x.shape[dim]}, "
            f"got {tuple(scale.shape)} and {tuple(shift.shape)}"
        )
    check_device("scale_shift", x, "scale", scale)
    check_device("scale_shift", x, "shift", shift)
    tasks = scale.shape[0] if scale.dim() == 2 else 1
    if task is None:
        if tasks != 1:
            raise ValueError(
                f"nlm.scale_shift: task must be given for parameters of several tasks, got None "
                f"for {tasks} tasks"
            )
        return dim
    if task.dtype != torch.int64:
        raise TypeError(f"nlm.scale_shift: task must be an int or int64, got {task.dtype}")
    if dim == 0 or task.dim() != 1 or task.shape[0] != x.shape[0]:
        raise ValueError(
            "nlm.scale_shift: task must hold one id per sample along dim 0, which is not the "
            f"channel dim, got task {tuple(task.shape)} for x {tuple(x.shape)} and dim {dim}"
        )
    check_device("scale_shift", x, "task", task)
    return dim


def _check_ids(x: Tensor, scale: Tensor, shift: Tensor, task: Tensor | None, dim: int) -> None:
    if task is None or task.numel() == 0:
        return
    tasks = scale.shape[0] if scale.dim() == 2 else 1
    least, most = (int(bound) for bound in task.aminmax())
    if least < 0 or most >= tasks:
        raise ValueError(
            f"nlm.scale_shift: task ids must be in [0, {tasks}), got ids from {least} to {most}"
        )


def _out(x: Tensor, scale: Tensor, shift: Tensor, task: Tensor | None, dim: int) -> Tensor:
    return empty_like(x, _check(x, scale, shift, task, dim))


def _out_into(out: Tensor, x: Tensor, *args: Any) -> None:
    dim = _check(x, *args)
    is_like_x = (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)
    if not is_like_x or not (out.is_contiguous() or out.stride() == empty_like(x, dim).stride()):
        raise ValueError(
            "nlm.scale_shift: out must have the shape, type and device of x and be contiguous or "
            f"laid out as x, {tuple(x.shape)} {x.dtype} on {x.device} with strides {x.stride()}, "
            f"got {tuple(out.shape)} {out.dtype} on {out.device} with strides {out.stride()}"
        )


def _check_memory(out: Tensor, x: Tensor, *args: Any) -> None:
    """``out`` is x, element by element, or apart from it, and apart from all other tensors."""
    others = zip(("scale", "shift", "task"), args, strict=False)
    read = [(label, other) for label, other in others if other is not None]
    if (out.data_ptr(), out.stride()) != (x.data_ptr(), x.stride()):
        read.append(("x", x))
    check_apart("scale_shift", [("out", out)], read)


def _out_backward(
    grad: Tensor, x: Tensor, scale: Tensor, task: Tensor | None, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    dim = _check(x, scale, scale, task, dim)
    if grad.shape != x.shape or grad.dtype != x.dtype:
        raise ValueError(
            "nlm.scale_shift_backward: grad must have the shape and type of x, "
            f"{tuple(x.shape)} {x.dtype}, got {tuple(grad.shape)} {grad.dtype}"
        )
    check_device("scale_shift_backward", x, "grad", grad)
    grads = torch.empty_like(scale, memory_format=torch.contiguous_format)
    return empty_like(x, dim), grads, torch.empty_like(grads)


def _task_arguments(task: Tensor | None, scale: Tensor, x: Tensor, dim: int) -> tuple[int, ...]:
    """Address of the ids, number of tasks, outer indices per sample."""
    if task is None:
        return 0, 1, 1
    return task.data_ptr(), len(torch.atleast_2d(scale)), x.shape[1:dim].numel()


def _launch(
    kernel: Callable[..., None], runs_on: int, tensors: tuple[Tensor, ...],
    parameters: tuple[Tensor, ...], task: Tensor | None, dim: int, *, sums: Iterable[Tensor] = (),
) -> None:  # fmt: skip
    """Runs a kernel on so many threads, or on this stream. x is the last tensor but one."""
    x = tensors[-2]
    dim %= x.dim()
    views = [channels_view(tensor, dim) for tensor in tensors]
    wide = [each.to(_compute_dtype(x)).contiguous() for each in parameters]
    task = None if task is None else task.contiguous()
    kernel(
        *map(_native.view3, views), *(each.data_ptr() for each in wide),
        *_task_arguments(task, parameters[0], x, dim), *(each.data_ptr() for each in sums), runs_on,
    )  # fmt: skip


def _cpu(x: Tensor, scale: Tensor, shift: Tensor, task: Tensor | None, dim: int) -> Tensor:
    y = _native.fresh(_out(x, scale, shift, task, dim))
    _check_ids(x, scale, shift, task, dim)
    _launch(_native.cpu.scale_shift, _native.threads(), (x, y), (scale, shift), task, dim)
    return y


def _cpu_out(out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, *chosen: Any) -> None:
    _out_into(out, x, scale, shift, *chosen)
    _check_ids(x, scale, shift, *chosen)
    _check_memory(out, x, scale, shift, *chosen)
    _launch(_native.cpu.scale_shift, _native.threads(), (x, out), (scale, shift), *chosen)


def _sums(partial: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """float64 ``[2, rows, ...]`` added up by rows, as the gradients of scale and shift."""
    scale, shift = partial.sum(1)
    return scale.to(like.dtype, copy=True), shift.to(like.dtype, copy=True)


def _cpu_backward(grad: Tensor, x: Tensor, scale: Tensor, *chosen: Any) -> tuple[Tensor, ...]:
    grad_x, _, _ = _out_backward(grad, x, scale, *chosen)
    _native.fresh(grad_x)
    _check_ids(x, scale, scale, *chosen)
    sums = scale.new_empty((2, 1, *scale.shape), dtype=torch.float64)
    kernel, tensors = _native.cpu.scale_shift_backward, (grad, x, grad_x)
    _launch(kernel, _native.threads(), tensors, (scale,), *chosen, sums=sums)
    return grad_x, *_sums(sums, scale)


# An id out of range gives NaN on the GPU: an error would make the host wait for every call.
def _cuda(x: Tensor, scale: Tensor, shift: Tensor, task: Tensor | None, dim: int) -> Tensor:
    y = _out(x, scale, shift, task, dim)
    _launch(_native.cuda.scale_shift, _native.stream(x), (x, y), (scale, shift), task, dim)
    return y


def _cuda_out(out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, *chosen: Any) -> None:
    _out_into(out, x, scale, shift, *chosen)
    _check_memory(out, x, scale, shift, *chosen)
    _launch(_native.cuda.scale_shift, _native.stream(x), (x, out), (scale, shift), *chosen)


def _cuda_backward(grad: Tensor, x: Tensor, scale: Tensor, *chosen: Any) -> tuple[Tensor, ...]:
    grad_x, _, _ = _out_backward(grad, x, scale, *chosen)
    x3 = _native.view3(channels_view(x, chosen[1] % x.dim()))
    rows = _native.cuda.scale_shift_partial_rows(x3, len(torch.atleast_2d(scale)))
    sums = scale.new_empty((2, rows, *scale.shape), dtype=torch.float64)
    kernel, tensors = _native.cuda.scale_shift_backward, (grad, x, grad_x)
    _launch(kernel, _native.stream(x), tensors, (scale,), *chosen, sums=sums)
    return grad_x, *_sums(sums, scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, shift, task, dim = inputs
    ctx.save_for_backward(x, scale, shift, task)
    ctx.dim = dim


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, shift, task = ctx.saved_tensors
    if torch.is_grad_enabled():  # a graph of the gradient was asked for
        gradients = reference_backward(grad, x, scale, task, ctx.dim)
    elif ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        gradients = _BACKWARD.default(grad, x, scale, task, ctx.dim)
    else:
        return _FORWARD.default(grad, scale, torch.zeros_like(shift), task, ctx.dim), *[None] * 4
    return *gradients, None, None


_BACKWARD = register(
    "scale_shift_backward(Tensor grad, Tensor x, Tensor scale, Tensor? task, int dim)"
    " -> (Tensor, Tensor, Tensor)",
    stem="scale_shift",
    reference=reference_backward,
    out=_out_backward,
    cpu=_cpu_backward,
    cuda=_cuda_backward,
    missing={"cpu": _native.cpu_missing, "cuda": _native.cuda_missing},
    check_values=lambda grad, x, scale, task, dim: _check_ids(x, scale, scale, task, dim),
)

_FORWARD = register(
    "scale_shift(Tensor x, Tensor scale, Tensor shift, Tensor? task, int dim) -> Tensor",
    stem="scale_shift",
    reference=reference,
    out=_out,
    cpu=_cpu,
    cuda=_cuda,
    missing={"cpu": _native.cpu_missing, "cuda": _native.cuda_missing},
    check_values=_check_ids,
    backward=_backward,
    setup_context=_setup_context,
)
_FORWARD_OUT = register(
    "scale_shift_out_(Tensor(a!) out, Tensor x, Tensor scale, Tensor shift, Tensor? task, int dim)"
    " -> ()",
    stem="scale_shift",
    reference=reference_out,
    out=_out_into,
    cpu=_cpu_out,
    cuda=_cuda_out,
    missing={"cpu": _native.cpu_missing, "cuda": _native.cuda_missing},
    check_values=lambda out, *args: _check_ids(*args),
)


def _task_number(task: Any) -> int:
    if not isinstance(task, bool):
        try:
            return operator.index(task)
        except TypeError:
            pass
    raise TypeError(
        "nlm.scale_shift: task must be None, an int or an int64 tensor, "
        f"got {task!r} of type {type(task).__name__}"
    )


def scale_shift(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    task: Tensor | int | None = None,
    dim: int = 1,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``x * scale + shift`` per channel, with the parameters of each sample's task.

    Parameters
    ----------
    x : Tensor
        Any float type and layout.
    scale, shift : Tensor, shape [C] or [T, C]
        float32; or float64 where x is.
    task : Tensor of int64, shape [N], or int, optional
        A task id for each sample along dim 0, or one for all. None where there is one task.
    dim : int
        The channel dimension.
    out : Tensor, optional
        What is written to and returned instead of a new tensor: x itself, or in memory apart from
        all arguments; of the shape and type of x, contiguous or laid out as x. Into large memory
        that was written before takes about half the time. No argument may require a gradient.

    Returns
    -------
    Tensor
        Shape and type of x. Differentiable in x, scale and shift.

    Examples
    --------
    >>> import torch
    >>> x = torch.ones(2, 2)
    >>> scale, shift = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 2)
    >>> scale_shift(x, scale, shift, task=torch.tensor([1, 0])).tolist()
    [[3.0, 4.0], [1.0, 2.0]]
    >>> scale_shift(x, scale, shift, task=1).tolist()
    [[3.0, 4.0], [3.0, 4.0]]
    >>> scale_shift(x, scale[0], shift[0], out=x) is x
    True
    """
    given = {"x": x, "scale": scale, "shift": shift} | ({} if out is None else {"out": out})
    for label, value in given.items():
        check_tensor("scale_shift", label, value)
        if out is None:
            continue
        without_gradient("scale_shift", value)
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"nlm.scale_shift: where out is given, {label} must not require a gradient outside "
                "of torch.no_grad(), got requires_grad True"
            )
    if task is not None and not isinstance(task, Tensor):
        task = _task_number(task)
        tasks = scale.shape[0] if scale.dim() == 2 else 1
        if not 0 <= task < tasks:
            raise ValueError(f"nlm.scale_shift: task must be in [0, {tasks}), got {task}")
        if scale.dim() == 2 and shift.shape == scale.shape:
            scale, shift = scale[task], shift[task]
        task = None
    args = (x, scale, shift, task, dim)
    if torch.compiler.is_compiling() or any(map(is_transformed, given.values())):
        y = reference(*args[:-1], _check(*args))
        if out is None:
            return y
        _out_into(out, *args)
        return out.copy_(y)
    if out is None:
        return _FORWARD.default(*args)
    _FORWARD_OUT.default(out, *args)
    return out
