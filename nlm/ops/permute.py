"""Gathers axes of a list of tensors by index arrays that may depend on other axes.

For a tensor x and an output position i,

    out[i] = x[j],    j_a = index_a[i_p1, i_p2, ..., i_a]   for a gathered axis a with parents p,
                      j_a = i_a                             for any other axis .

This is the gather convention new[i] = old[p[i]]. A parent lets a permutation differ per head or per
expert; it is always read at the *output* position. Where one dimension of a parameter is made of
several groups of axes (heads x features), the caller passes a view with these groups as axes.

`permute_out_` writes into memory that is there, which no system has to zero first. `permute_add_`
adds instead: out += weight * gathered, in float32 (float64 for float64), rounded to the output's
type once.

Bytes: one read and one write of every tensor (permute_add_: two reads, one write). Flops: none (2
per element). Numerics: permute copies bits; permute_add_ rounds after the product and after the
sum, so kernel and reference agree in every bit, for any number of threads.
Source: permutations of units as in Ainsworth et al., Git Re-Basin, arXiv:2209.04836.

A schema has no nested lists. Behind the tensors it takes one flat list each of the `indices`, of
their `owners` (positions in the list of tensors), of their `axes`, of all `parents` one after the
other, and of `parent_counts`: ``*flat`` below.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nlm import _native
from nlm._registry import register
from nlm.ops._arguments import as_numbers, check_apart, check_written, without_gradient
from nlm.ops._gathers import Gather, check_gather, check_range, flatten, positions, unflatten

_MAX_DIMS = 16  # kPermuteMaxAxes of csrc/permute.h
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


#: (size, stride, address of the index or 0, parents) of an axis, for csrc/permute.h.
_Axis = tuple[int, int, int, tuple[int, ...]]


def reference(tensors: list[Tensor], *flat: Any) -> list[Tensor]:
    gathers = unflatten(*flat)
    _check_ranges("permute", gathers)
    return [_gather(x, [g for g in gathers if g.owner == t]) for t, x in enumerate(tensors)]


def reference_out(out: list[Tensor], tensors: list[Tensor], *flat: Any) -> None:
    gathers = unflatten(*flat)
    _check_ranges("permute_out_", gathers)
    _check_memory("permute_out_", out, tensors, gathers)
    for target, result in zip(out, reference(tensors, *flat), strict=True):
        target.copy_(result)


def reference_add(
    out: list[Tensor], tensors: list[Tensor], weights: list[float], *flat: Any
) -> None:
    gathers = unflatten(*flat)
    _check_ranges("permute_add_", gathers)
    _check_memory("permute_add_", out, tensors, gathers)
    for t, (target, x, weight) in enumerate(zip(out, tensors, weights, strict=True)):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        gathered = _gather(x, [g for g in gathers if g.owner == t])
        product = gathered.to(dtype) * torch.tensor(weight, dtype=dtype)
        target.copy_(target.to(dtype) + product)


def _gather(x: Tensor, gathers: list[Gather]) -> Tensor:
    if not gathers:
        return x.clone(memory_format=torch.contiguous_format)
    where = positions(x.shape, range(x.dim()), gathers, x.device)
    return x[tuple(where[axis] for axis in range(x.dim()))].contiguous()


def _out(tensors: list[Tensor], *flat: Any) -> list[Tensor]:
    _check("permute", tensors, unflatten(*flat))
    return [x.new_empty(x.shape) for x in tensors]


def _out_into(out: list[Tensor], tensors: list[Tensor], *flat: Any) -> None:
    _check("permute_out_", tensors, unflatten(*flat))
    _check_targets("permute_out_", out, tensors)


def _out_add(out: list[Tensor], tensors: list[Tensor], weights: list[float], *flat: Any) -> None:
    _check("permute_add_", tensors, unflatten(*flat))
    _check_targets("permute_add_", out, tensors)
    if len(weights) != len(tensors):
        raise ValueError(
            "nlm.permute_add_: weights must have the tensors' length, "
            f"got {len(weights)} for {len(tensors)}"
        )
    for t, x in enumerate(tensors):
        if x.dtype not in _FLOATS:
            raise TypeError(
                "nlm.permute_add_: tensors must be float16, bfloat16, float32 or float64, "
                f"got {x.dtype} for tensor {t}"
            )


def _check_targets(op: str, out: list[Tensor], tensors: list[Tensor]) -> None:
    if len(out) != len(tensors):
        raise ValueError(
            f"nlm.{op}: out and tensors must have one length, got {len(out)} and {len(tensors)}"
        )
    for t, (target, x) in enumerate(zip(out, tensors, strict=True)):
        if target.dtype != x.dtype:
            raise TypeError(
                f"nlm.{op}: out must have the type of its tensor, {x.dtype}, "
                f"got {target.dtype} for tensor {t}"
            )
        if target.shape != x.shape or target.device != x.device:
            raise ValueError(
                f"nlm.{op}: out must have the shape and device of its tensor, "
                f"{tuple(x.shape)} on {x.device}, got {tuple(target.shape)} on {target.device} "
                f"for tensor {t}"
            )
        if not target.is_contiguous():
            raise ValueError(
                f"nlm.{op}: out must be contiguous, got strides {target.stride()} for tensor {t}"
            )


def _check(op: str, tensors: list[Tensor], gathers: list[Gather]) -> None:
    for t, x in enumerate(tensors):
        if x.dim() > _MAX_DIMS:
            raise ValueError(
                f"nlm.{op}: a tensor must have at most {_MAX_DIMS} dimensions, "
                f"got {x.dim()} for tensor {t}"
            )
        if x.device != tensors[0].device:
            raise ValueError(
                f"nlm.{op}: the tensors of a call must be on one device, "
                f"got {tensors[0].device} and {x.device}"
            )
    seen = set()
    for gather in gathers:
        x = tensors[gather.owner]
        check_gather(op, x, gather)
        if (gather.owner, gather.axis) in seen:
            raise ValueError(f"nlm.{op}: an axis must be gathered once, got {gather} twice")
        seen.add((gather.owner, gather.axis))


def _check_ranges(op: str, gathers: list[Gather]) -> None:
    """Every index value lies in its axis. An index that several tensors share is read once."""
    first: dict[int, Gather] = {}
    for gather in gathers:
        first.setdefault(id(gather.where), gather)
    for gather in first.values():
        check_range(op, gather, gather.where.shape[-1])


def _check_memory(op: str, out: list[Tensor], tensors: list[Tensor], gathers: list[Gather]) -> None:
    written = [(f"out[{t}]", target) for t, target in enumerate(out)]
    read = [(f"tensors[{t}]", x) for t, x in enumerate(tensors)]
    read += [(f"the index of {gather}", gather.where) for gather in gathers]
    check_apart(op, written, read)


def _items(
    op: str, tensors: list[Tensor], targets: list[Tensor], flat: tuple
) -> tuple[list[tuple], list[Gather]]:
    """Per tensor (source, target, [(size, stride, index, parents)]), as csrc/permute.h has it; and
    the gathers, whose contiguous indices must outlive the call. A GPU checks their values."""
    gathers = [g._replace(where=g.where.contiguous()) for g in unflatten(*flat)]
    if not tensors[0].is_cuda:
        _check_ranges(op, gathers)
    items = []
    for x, target in zip(tensors, targets, strict=True):
        axes: list[_Axis] = [
            (size, step, 0, ()) for size, step in zip(x.shape, x.stride(), strict=True)
        ]
        items.append((x.data_ptr(), target.data_ptr(), axes))
    for index, owner, axis, parents in gathers:
        x = tensors[owner]
        items[owner][2][axis] = (x.shape[axis], x.stride(axis), index.data_ptr(), parents)
    return items, gathers


def _cpu(tensors: list[Tensor], *flat: Any) -> list[Tensor]:
    out = _native.fresh(_out(tensors, *flat))
    items, _alive = _items("permute", tensors, out, flat)
    _native.cpu.permute(items, [x.element_size() for x in tensors], _native.threads())
    return out


def _cpu_out(out: list[Tensor], tensors: list[Tensor], *flat: Any) -> None:
    _out_into(out, tensors, *flat)
    items, gathers = _items("permute_out_", tensors, out, flat)
    _check_memory("permute_out_", out, tensors, gathers)
    _native.cpu.permute(items, [x.element_size() for x in tensors], _native.threads())


def _cpu_add(out: list[Tensor], tensors: list[Tensor], weights: list[float], *flat: Any) -> None:
    _out_add(out, tensors, weights, *flat)
    items, gathers = _items("permute_add_", tensors, out, flat)
    _check_memory("permute_add_", out, tensors, gathers)
    dtypes = [_native.DTYPES[x.dtype] for x in tensors]
    _native.cpu.permute_add(items, dtypes, weights, _native.threads())


def _cuda(tensors: list[Tensor], *flat: Any) -> list[Tensor]:
    out = _out(tensors, *flat)
    items, _alive = _items("permute", tensors, out, flat)
    _native.cuda.permute(items, [x.element_size() for x in tensors], _native.stream(tensors[0]))
    return out


def _cuda_out(out: list[Tensor], tensors: list[Tensor], *flat: Any) -> None:
    _out_into(out, tensors, *flat)
    items, gathers = _items("permute_out_", tensors, out, flat)
    _check_memory("permute_out_", out, tensors, gathers)
    _native.cuda.permute(items, [x.element_size() for x in tensors], _native.stream(tensors[0]))


def _cuda_add(out: list[Tensor], tensors: list[Tensor], weights: list[float], *flat: Any) -> None:
    _out_add(out, tensors, weights, *flat)
    items, gathers = _items("permute_add_", tensors, out, flat)
    _check_memory("permute_add_", out, tensors, gathers)
    dtypes = [_native.DTYPES[x.dtype] for x in tensors]
    _native.cuda.permute_add(items, dtypes, weights, _native.stream(tensors[0]))


_FLAT = "Tensor[] indices, int[] owners, int[] axes, int[] parents, int[] parent_counts"

_PERMUTE = register(
    f"permute(Tensor[] tensors, {_FLAT}) -> Tensor[]",
    stem="permute",
    reference=reference,
    out=_out,
    cpu=_cpu,
    cuda=_cuda,
    missing={"cpu": _native.cpu_missing, "cuda": _native.cuda_missing},
)

_PERMUTE_OUT = register(
    f"permute_out_(Tensor(a!)[] out, Tensor[] tensors, {_FLAT}) -> ()",
    stem="permute",
    reference=reference_out,
    out=_out_into,
    cpu=_cpu_out,
    cuda=_cuda_out,
    missing={"cpu": _native.cpu_missing, "cuda": _native.cuda_missing},
)

_PERMUTE_ADD = register(
    f"permute_add_(Tensor(a!)[] out, Tensor[] tensors, float[] weights, {_FLAT}) -> ()",
    stem="permute",
    reference=reference_add,
    out=_out_add,
    cpu=_cpu_add,
    cuda=_cuda_add,
    missing={"cpu": _native.cpu_missing, "cuda": _native.cuda_missing},
)


def permute(
    tensors: Sequence[Tensor],
    indices: Sequence[Sequence[Tensor]],
    axes: Sequence[Sequence[int]],
    parents: Sequence[Sequence[Sequence[int]]] | None = None,
    *,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Gathers axes of each tensor: contiguous tensors of the same shapes and types.

    Not differentiable: the results do not require gradients.

    Parameters
    ----------
    tensors : sequence of Tensor
        Of any types and layouts, on one device. One call for many tensors keeps all threads busy.
    indices : sequence of sequences of Tensor
        Per tensor, one int64 index per gathered axis, of shape [*parent sizes, axis size]. Values
        lie in [0, axis size), or a GPU stops, as in x[p]; they need not be a permutation.
    axes : sequence of sequences of int
        Per tensor, the gathered axes. A tensor without any is copied.
    parents : sequence of sequences of sequences of int, optional
        Per tensor and gathered axis, the axes whose output position selects the index; by default
        none.
    out : sequence of Tensor, optional
        What is written to and returned instead of new tensors: contiguous, of the tensors' shapes
        and types, in memory of their own, apart from each other, all tensors and all indices. Into
        large memory that was written before a permutation goes about twice as fast.

    Examples
    --------
    >>> import torch
    >>> w = torch.tensor([[0, 1, 2], [10, 11, 12]])
    >>> rows, columns = torch.tensor([1, 0]), torch.tensor([2, 0, 1])
    >>> permute([w], [[rows, columns]], [[0, 1]])[0].tolist()
    [[12, 10, 11], [2, 0, 1]]
    >>> per_row = torch.tensor([[0, 1, 2], [2, 1, 0]])
    >>> permute([w], [[per_row]], [[1]], [[[0]]])[0].tolist()
    [[0, 1, 2], [12, 11, 10]]
    """
    op = "permute" if out is None else "permute_out_"
    flat = flatten(op, tensors, indices, axes, parents)
    detached = [without_gradient(op, x) for x in tensors]
    if out is None:
        return _PERMUTE.default(detached, *flat) if detached else []
    targets = _targets(op, out)
    if detached or targets:
        _PERMUTE_OUT.default(targets, detached, *flat)
    return list(out)


def _targets(op: str, out: Sequence[Tensor]) -> list[Tensor]:
    for t, target in enumerate(out):
        check_written(op, f"out[{t}]", target)
    return [without_gradient(op, x) for x in out]


def permute_add_(
    out: Sequence[Tensor],
    tensors: Sequence[Tensor],
    indices: Sequence[Sequence[Tensor]],
    axes: Sequence[Sequence[int]],
    parents: Sequence[Sequence[Sequence[int]]] | None = None,
    weights: Sequence[float] | float = 1.0,
) -> None:
    """Adds ``weights[t]`` times the gathered ``tensors[t]`` to ``out[t]``, in place.

    Not differentiable: no gradient reaches the tensors.

    Parameters
    ----------
    out : sequence of Tensor
        Contiguous, of the tensors' shapes and types (float16, bfloat16, float32 or float64), in
        memory of their own: apart from each other, all tensors and all indices.
    tensors, indices, axes, parents
        As in :func:`permute`.
    weights : float or sequence of float
        One for all tensors, or one each.

    Examples
    --------
    >>> import torch
    >>> out = torch.ones(3)
    >>> permute_add_([out], [torch.arange(3.0)], [[torch.tensor([2, 0, 1])]], [[0]], weights=0.5)
    >>> out.tolist()
    [2.0, 1.0, 1.5]
    """
    flat = flatten("permute_add_", tensors, indices, axes, parents)
    each = as_numbers("permute_add_", "weights", weights, len(tensors))
    targets = _targets("permute_add_", out)
    detached = [without_gradient("permute_add_", x) for x in tensors]
    if detached:
        _PERMUTE_ADD.default(targets, detached, each, *flat)
