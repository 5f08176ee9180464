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
Numerics: the kernel multiplies and sums in float32 (float64 for float64) over at most 128 terms,
with fused multiply-adds, then in float64: an entry errs by < 2e-6 sqrt(sum_r a^2 sum_r b^2), by
1e-7 on random data. Products must be in range, |a b| < 1e36 for float32. The same bits for any
number of threads. The reference gathers a copy of b and multiplies in float64, in which a GPU with
float64 matrix units is as fast as in float32: it is the kernel there. It goes through BLAS and is
excepted.
Source: Ainsworth, Hayase, Srinivasa, "Git Re-Basin", arXiv:2209.04836, algorithm 1.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nlm import _native
from nlm._registry import register
from nlm.ops._arguments import check_apart, check_tensor, check_written, without_gradient
from nlm.ops._channels import FLOATS
from nlm.ops.permute import _check_gather, _flatten, _Gather, _unflatten

_OP = "group_similarity_"


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
    place = _positions(sizes, list(range(count)), gathers, b.device)
    in_b = [count + x if x in units else x for x in range(count)]
    result = [*kept, *units, *(count + x for x in units)]
    gathered = b[tuple(place[x] for x in range(count))]
    out += weight * torch.einsum(a.double(), list(range(count)), gathered.double(), in_b, result)


def _gathers(
    indices: list[Tensor], axes: list[int], parents: list[int], parent_counts: list[int]
) -> list[_Gather]:
    return _unflatten(indices, [0] * len(indices), axes, parents, parent_counts)


def _positions(
    sizes: Sequence[int], axes: list[int], gathers: list[_Gather], device: torch.device
) -> dict[int, Tensor]:
    """Axis -> its index in b at every position of a grid of these axes, broadcastable."""
    grid = {
        x: torch.arange(sizes[x], device=device).view([-1 if x == y else 1 for y in axes])
        for x in axes
    }
    found = dict(grid)
    for index, _, axis, parents in gathers:
        found[axis] = index[(*(grid[p] for p in parents), grid[axis])]
    return found


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
        _check_gather(_OP, a, gather)
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


def _check_values(out: Tensor, a: Tensor, b: Tensor, gathers: list[_Gather]) -> None:
    """Index values lie in b, and out lies apart from all others."""
    for gather in gathers:
        size = b.shape[gather.axis]
        if gather.where.numel() > 0:
            low, high = (int(value) for value in torch.aminmax(gather.where))
            if low < 0 or high >= size:
                raise ValueError(
                    f"nlm.{_OP}: the values of an index must lie in [0, {size}), got {low} to "
                    f"{high} for axis {gather.axis}"
                )
    read = [("a", a), ("b", b), *((f"the index of axis {g.axis}", g.where) for g in gathers)]
    check_apart(_OP, [("out", out)], read)


def _grid(tensor: Tensor, axes: Sequence[int], first: int = 0) -> Tensor:
    """Offsets of a row-major grid of axes; that of axis x is dimension first + x of the tensor."""
    found = torch.zeros(1, dtype=torch.int64)
    for x in axes:
        steps = torch.arange(tensor.shape[first + x]) * tensor.stride(first + x)
        found = (found[:, None] + steps).reshape(-1)
    return found


def _gathered(
    a: Tensor, b: Tensor, kept: list[int], summed: list[int], gathers: list[_Gather]
) -> tuple[Tensor, Tensor]:
    """Offsets in b by kept position, [batches], and by summed one, [1 or batches, terms]."""
    closed = [*kept, *summed]
    sizes = [a.shape[x] for x in closed]
    parents = {gather.axis: gather.parents for gather in gathers}
    ones = [1] * len(closed)
    batch = torch.zeros([*sizes[: len(kept)], *ones[len(kept) :]], dtype=torch.int64)
    term = torch.zeros([*ones[: len(kept)], *sizes[len(kept) :]], dtype=torch.int64)
    for x, place in _positions(a.shape, closed, gathers, a.device).items():
        if {x, *parents.get(x, ())} <= set(kept):
            batch = batch + place * b.stride(x)
        else:
            term = term + place * b.stride(x)
    if math.prod(term.shape[: len(kept)]) > 1:
        term = term.expand(sizes)
    return batch.reshape(-1), term.reshape(-1, math.prod(sizes[len(kept) :]))


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
    batch, term = _gathered(a, b, kept, summed, gathers)
    order = range(len(kept)), range(len(kept), len(kept) + len(units))
    offsets = [
        _grid(a, kept), _grid(a, units), _grid(a, summed), batch, _grid(b, units), term,
        _grid(out, order[0]), _grid(out, order[1]), _grid(out, order[1], len(units)),
    ]  # fmt: skip
    _native.cpu.group_similarity(
        a.data_ptr(), b.data_ptr(), out.data_ptr(), _native.DTYPES[a.dtype],
        [each.data_ptr() for each in offsets],
        (len(offsets[0]), len(offsets[1]), len(offsets[4]), term.shape[1]), len(term) > 1,
        weight, _native.threads(),
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
    found, _, *flat = _flatten(_OP, [a], [indices], [axes], nested)
    targets = [[x + a.dim() if -a.dim() <= x < 0 else x for x in part] for part in (units, kept)]
    tensors = [without_gradient(_OP, x) for x in (out, a, b)]
    _OPERATION.default(*tensors, *targets, found, *flat, float(weight))
