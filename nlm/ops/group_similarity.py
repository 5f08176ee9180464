"""Adds to the similarity of the units of two tensors: their products over all other positions.

The axes of a and b are of three sorts. Those of the `units` are compared in all pairs; those that
are `kept` have one matrix for each index; all others are summed over. b is read with any axis that
is not one of the units' gathered, as by `permute`:

    out[k, i, j] += weight * sum_r a[k, i, r] b[k', j, r'],

    (k', r')_x = index_x[(k, r)_p1, (k, r)_p2, ..., (k, r)_x]    for a gathered axis x, parents p,
                 (k, r)_x                                        for any other .

This is the cost of weight matching: a and b are one weight of two models, the units are those of
the group (and of the groups around it) that is being matched, and the other axes of b are in the
order found for them so far.

Bytes: one read of a and b, one read and write of out. Flops: 2 k i j r, by the sizes of the sorts.
Numerics: the kernel multiplies and sums in float32 (float64 for float64) over at most 256 terms,
with fused multiply-adds, then in float64: an entry errs by < 2e-6 sqrt(sum_r a^2 sum_r b^2), by
2e-7 of the largest on random data. The same bits for any number of threads. From 2^26 products of
float32 or float64 on BLAS multiplies parts gathered into scratch memory, up to 1.25 times as fast:
it sums up to 5120 terms in float32, errs by 1e-6 of the largest entry on random data (5e-6 where
all terms are equal), and is excepted from the rule on bits. Products must be in range, |a b| < 1e34
for float32. The reference gathers a copy of b and multiplies in float64, in which a GPU with
float64 matrix units is as fast as in float32: it is the kernel there. It goes through BLAS too.
Source: Ainsworth, Hayase, Srinivasa, "Git Re-Basin", arXiv:2209.04836, algorithm 1.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from nlm import _native
from nlm._registry import register
from nlm.ops._arguments import check_apart, check_tensor, check_written, without_gradient
from nlm.ops._channels import FLOATS
from nlm.ops._gathers import (
    Gather,
    check_gather,
    check_range,
    flatten,
    positions,
    unflatten,
)

_OP = "group_similarity_"
_MANY = 1 << 26  # products from which BLAS is the faster way
_SCRATCH = 1 << 22  # numbers of a part
_MOST_TERMS = 5120  # of a part: all of a convolution of 512 channels and 3 x 3 taps


def reference(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    units: list[int],
    kept: list[int],
    indices: list[Tensor],
    axes: list[int],
    parents: list[int],
    parent_counts: list[int],
    weight: float,
) -> None:
    gathers = _gathers(indices, axes, parents, parent_counts)
    _check_values(out, a, b, gathers)
    count = a.dim()
    sizes = [b.shape[x] if x in units else a.shape[x] for x in range(count)]
    place = positions(sizes, range(count), gathers, b.device)
    in_b = [count + x if x in units else x for x in range(count)]
    result = [*kept, *units, *(count + x for x in units)]
    gathered = b[tuple(place[x] for x in range(count))]
    out += weight * torch.einsum(a.double(), list(range(count)), gathered.double(), in_b, result)


def _gathers(
    indices: list[Tensor], axes: list[int], parents: list[int], parent_counts: list[int]
) -> list[Gather]:
    return unflatten(indices, [0] * len(indices), axes, parents, parent_counts)


def _out(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    units: list[int],
    kept: list[int],
    indices: list[Tensor],
    axes: list[int],
    parents: list[int],
    parent_counts: list[int],
    weight: float,
) -> None:
    if a.dtype not in FLOATS:
        raise TypeError(
            f"nlm.{_OP}: a must be float16, bfloat16, float32 or float64, got {a.dtype}"
        )
    if b.dtype != a.dtype or b.dim() != a.dim():
        raise TypeError(
            f"nlm.{_OP}: b must have the dtype and the number of axes of a, {a.dtype} and "
            f"{a.dim()}, got {b.dtype} and {b.dim()}"
        )
    named = [*units, *kept]
    if any(not 0 <= x < a.dim() for x in named) or len(set(named)) != len(named):
        raise ValueError(
            f"nlm.{_OP}: the axes of the units and the kept ones must be dimensions of a, each "
            f"once, got {units} and {kept} for shape {tuple(a.shape)}"
        )
    gathers = _gathers(indices, axes, parents, parent_counts)
    for gather in gathers:
        if {gather.axis, *gather.parents} & set(units):
            raise ValueError(
                f"nlm.{_OP}: a gathered axis and its parents must not hold units, got axis "
                f"{gather.axis} with parents {gather.parents} and units on {units}"
            )
        check_gather(_OP, a, gather)
    if len(set(axes)) != len(axes):
        raise ValueError(f"nlm.{_OP}: an axis must be gathered once, got {axes}")
    if any(a.shape[x] != b.shape[x] for x in {*range(a.dim())} - {*units, *axes}):
        raise ValueError(
            f"nlm.{_OP}: a and b must have one shape but for the axes of units and the gathered "
            f"ones, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    shape = [each.shape[x] for each, part in ((a, [*kept, *units]), (b, units)) for x in part]
    if out.dtype != torch.float64:
        raise TypeError(f"nlm.{_OP}: out must be float64, got {out.dtype}")
    if list(out.shape) != shape:
        raise ValueError(
            f"nlm.{_OP}: out must have the shape [*kept, *units of a, *units of b], {shape}, got "
            f"{list(out.shape)}"
        )
    extent = 0
    for step, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and step <= extent:
            raise ValueError(
                f"nlm.{_OP}: the entries of out must lie apart from one another, got strides "
                f"{out.stride()} for shape {shape}"
            )
        extent += (size - 1) * step
    if not a.device == b.device == out.device:
        raise ValueError(
            f"nlm.{_OP}: the tensors of a call must be on one device, got {out.device}, {a.device} "
            f"and {b.device}"
        )


def _check_values(out: Tensor, a: Tensor, b: Tensor, gathers: list[Gather]) -> None:
    """Index values lie in b, and out lies apart from all others."""
    for gather in gathers:
        check_range(_OP, gather, b.shape[gather.axis])
    read = [("a", a), ("b", b), *((f"the index of axis {g.axis}", g.where) for g in gathers)]
    check_apart(_OP, [("out", out)], read)


def _grid(tensor: Tensor, axes: Sequence[int], first: int = 0) -> Tensor:
    """Offsets of a row-major grid of axes; that of axis x is dimension first + x of the tensor."""
    return _offsets(
        [tensor.shape[first + x] for x in axes], [tensor.stride(first + x) for x in axes]
    )


def _offsets(shape: Sequence[int], steps: Sequence[int]) -> Tensor:
    return (_kept_offsets if math.prod(shape) <= 1 << 13 else _new_offsets)(
        *map(tuple, (shape, steps))
    )


def _new_offsets(shape: tuple[int, ...], steps: tuple[int, ...]) -> Tensor:
    found = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, step in zip(shape, steps, strict=True):
        found = (found[:, None] + torch.arange(size, device="cpu") * step).reshape(-1)
    return found


_kept_offsets = lru_cache(256)(_new_offsets)  # 16 MB at most; a small call takes half as long


def _gathered(
    a: Tensor, b: Tensor, kept: list[int], summed: list[int], gathers: list[Gather]
) -> tuple[Tensor, Tensor]:
    """Offsets in b by kept position, [batches], and by summed one, [1 or batches, terms]."""
    closed, count = [*kept, *summed], len(kept)
    sizes = [a.shape[x] for x in closed]
    given = {gather.axis for gather in gathers}
    steps = [0 if x in given else b.stride(x) for x in closed]
    batch = _offsets(sizes[:count], steps[:count]).view([*sizes[:count], *(1 for _ in summed)])
    term = _offsets(sizes[count:], steps[count:]).view([*(1 for _ in kept), *sizes[count:]])
    for index, _, axis, parents in gathers:
        own = sorted([*parents, axis], key=closed.index)
        shape = [size if x in own else 1 for x, size in zip(closed, sizes, strict=True)]
        place = index.permute([[*parents, axis].index(x) for x in own]).contiguous().view(shape)
        if set(own) <= set(kept):
            batch = batch + place * b.stride(axis)
        else:
            term = term + place * b.stride(axis)
    if math.prod(term.shape[:count]) > 1:
        term = term.expand(sizes)
    return batch.reshape(-1), term.reshape(-1, math.prod(sizes[count:]))


def _cpu(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    units: list[int],
    kept: list[int],
    indices: list[Tensor],
    axes: list[int],
    parents: list[int],
    parent_counts: list[int],
    weight: float,
) -> None:
    _out(out, a, b, units, kept, indices, axes, parents, parent_counts, weight)
    gathers = _gathers(indices, axes, parents, parent_counts)
    _check_values(out, a, b, gathers)
    if a.numel() == 0 or b.numel() == 0:
        return
    summed = sorted({*range(a.dim())} - {*units, *kept}, key=a.stride().__getitem__, reverse=True)
    first = _Operand(a, _grid(a, kept), _grid(a, units), _grid(a, summed)[None])
    batch, term = _gathered(a, b, kept, summed, gathers)
    second = _Operand(b, batch, _grid(b, units), term)
    order = range(len(kept)), range(len(kept), len(kept) + len(units))
    offsets = (_grid(out, order[0]), _grid(out, order[1]), _grid(out, order[1], len(units)))
    target = (out.data_ptr(), *(each.data_ptr() for each in offsets))
    terms = term.shape[1]
    products = len(first.row) * len(second.row) * terms
    if products >= _MANY and terms >= 64 and _is_blas_exact(a.dtype):
        _by_blas(target, first, second, weight)
    else:
        _native.cpu.group_similarity(
            first.arguments, second.arguments, target, _native.DTYPES[a.dtype], len(batch), terms,
            weight, _native.threads(),
        )  # fmt: skip


class _Operand(NamedTuple):
    """SimilarityOperand of csrc/group_similarity.h: int64 offsets of matrices [rows, terms]."""

    data: Tensor
    batch: Tensor  # [batches]
    row: Tensor  # [rows]
    term: Tensor  # [1 or batches, terms]

    @property
    def arguments(self) -> tuple[int, ...]:
        step = self.term.shape[1] if len(self.term) > 1 else 0
        addresses = [each.data_ptr() for each in self]
        return (*addresses, len(self.row), step)

    def part(self, batch: int, begin: int, end: int, block: Tensor) -> Tensor:
        """[rows, end - begin] of a batch: a view where entries lie evenly, else in ``block``."""
        data, rows, terms = self.data, len(self.row), end - begin
        term = self.term[batch if len(self.term) > 1 else 0, begin:end]
        steps = [_step(self.row), _step(term)]
        by_row, by_term = steps[1] == 1 and steps[0] >= terms, steps[0] == 1
        if by_row or (by_term and steps[1] >= rows):
            start = int(self.batch[batch] + self.row[0] + term[0])
            return data.as_strided((rows, terms), steps, data.storage_offset() + start)
        found = block[: terms * rows].view((terms, rows) if by_term else (rows, terms))
        _native.cpu.similarity_gather(
            self.arguments, _native.DTYPES[data.dtype], batch, begin, end, by_term,
            found.data_ptr(), _native.threads(),
        )  # fmt: skip
        return found.T if by_term else found


def _step(offsets: Tensor) -> int:
    """What lies between any two neighbours; 0 where that varies."""
    steps = offsets.diff()
    if len(steps) == 0:
        return 1
    return int(steps[0]) if bool((steps == steps[0]).all()) else 0


def _is_blas_exact(dtype: torch.dtype) -> bool:
    """BLAS has this type, PyTorch does not shorten it to bfloat16, and threads may be started."""
    if dtype not in (torch.float32, torch.float64):
        return False
    backend = getattr(torch.backends.mkldnn, "matmul", None)
    exact = getattr(backend, "fp32_precision", "none") in ("none", "ieee")
    return exact and torch.get_float32_matmul_precision() == "highest" and not _native.forked()


def _by_blas(target: tuple[int, ...], a: _Operand, b: _Operand, weight: float) -> None:
    """In parts whose operands and products are within 16 MB each, added up in float64."""
    terms, rows, columns = a.term.shape[1], len(a.row), len(b.row)
    parts = -(-terms // max(256, min(_MOST_TERMS, _SCRATCH // max(rows, columns))))
    step = -(-terms // parts)
    stripe = max(256, _SCRATCH // columns)
    product = _native.fresh(a.data.new_empty(min(rows, stripe), columns))
    blocks = [_native.fresh(a.data.new_empty(size * step)) for size in (rows, columns)]
    wide = product.dtype == torch.float64
    for batch in range(len(b.batch)):
        for begin in range(0, terms, step):
            end = min(begin + step, terms)
            left, right = (
                each.part(batch, begin, end, block)
                for each, block in zip((a, b), blocks, strict=True)
            )
            for row in range(0, rows, stripe):
                some = left[row : row + stripe]
                torch.mm(some, right.T, out=product[: len(some)])
                _native.cpu.similarity_add(
                    target, batch, row, row + len(some), columns, product.data_ptr(), wide, weight,
                    _native.threads(),
                )  # fmt: skip


_OPERATION = register(
    f"{_OP}(Tensor(a!) out, Tensor a, Tensor b, int[] units, int[] kept, Tensor[] indices, "
    "int[] axes, int[] parents, int[] parent_counts, float weight) -> ()",
    stem="group_similarity",
    reference=reference,
    out=_out,
    cpu=_cpu,
    cuda=None,
    missing={"cpu": _native.cpu_missing},
)


def group_similarity_(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    units: Sequence[int],
    kept: Sequence[int] = (),
    indices: Sequence[Tensor] = (),
    axes: Sequence[int] = (),
    parents: Sequence[Sequence[int]] | None = None,
    weight: float = 1.0,
) -> None:
    """Adds ``weight`` times the similarity of two tensors' units to ``out``, in place.

    Not differentiable: no gradient reaches the tensors.

    Parameters
    ----------
    out : Tensor of float64, shape [*kept sizes, *sizes of the units of a, *of the units of b]
        In any layout without overlaps, apart in memory from the other arguments.
    a, b : Tensor
        Of one float type and one shape, but for the axes of units and for gathered ones, on which
        b may be longer or shorter. Any layout; read in place.
    units : sequence of int
        The axes whose positions are compared in all pairs; none is fine.
    kept : sequence of int
        The axes that have a matrix for each index. All that remain are summed over.
    indices : sequence of Tensor
        One int64 index for each gathered axis, of shape [*parent sizes, axis size], by the sizes of
        a. Values lie in [0, size of the axis in b); they need not be a permutation.
    axes : sequence of int
        The gathered axes of b, none of which holds units.
    parents : sequence of sequences of int, optional
        Per gathered axis, the axes whose position selects the index; by default none.
    weight : float

    Examples
    --------
    >>> import torch
    >>> a, b = torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> out = torch.zeros(2, 2, dtype=torch.float64)
    >>> group_similarity_(out, a, b, units=[0])  # a @ b.T
    >>> out.tolist()
    [[1.0, 3.0], [2.0, 4.0]]
    >>> group_similarity_(out, a, b, [0], indices=[torch.tensor([1, 0])], axes=[1], weight=-1.0)
    >>> out.tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    """
    check_written(_OP, "out", out)
    for label, x in (("a", a), ("b", b)):
        check_tensor(_OP, label, x)
    nested = None if parents is None else [parents]
    found, _, *flat = flatten(_OP, [a], [indices], [axes], nested)
    targets = [[x + a.dim() if -a.dim() <= x < 0 else x for x in part] for part in (units, kept)]
    tensors = [without_gradient(_OP, x) for x in (out, a, b)]
    _OPERATION.default(*tensors, *targets, found, *flat, float(weight))
