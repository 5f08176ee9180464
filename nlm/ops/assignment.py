"""The linear assignment problem, exact and batched, with the duals that prove it.

For a square matrix c, find the permutation p and numbers u, v with

    minimise sum_i c[i, p(i)];    u_i + v_j <= c_ij for all i and j,   u_i + v_p(i) = c[i, p(i)],

so that no permutation costs less than sum(u) + sum(v), which is what p costs. To maximise, the
inequality is turned round. Whoever doubts a result checks it with one read of c:

    gap = sum_i c[i, p(i)] - sum_j v_j - sum_i min_j (c_ij - v_j)    is 0 but for rounding.

Bytes: two reads of c, and of a few candidates per row; one read for few rows or with a start; with
a start and its changed rows named, one read of these and of the rows on the paths from them.
Flops: about n^2 where the rows are well matched, at most n^3.
Numerics: float64 throughout. Where several permutations are optimal, any one, but the same for any
number of threads. Duals are never unique.
Source: Jonker and Volgenant, "A shortest augmenting path algorithm for dense and sparse linear
assignment problems", Computing 38, 1987.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from nlm import _native
from nlm._registry import register
from nlm.ops._arguments import check_tensor, without_gradient

_LARGEST = 1e150  # sums of squares are finite; see csrc/assignment.h


class Assignment(NamedTuple):
    """A solved problem, or a batch of them.

    Attributes
    ----------
    columns : int64 [..., n], the column of each row.
    row_duals, column_duals : float64 [..., n], u and v.
    """

    columns: Tensor
    row_duals: Tensor
    column_duals: Tensor


def reference(
    costs: Tensor,
    maximize: bool,
    columns: Tensor | None,
    row_duals: Tensor | None,
    column_duals: Tensor | None,
    changed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """SciPy's solution, and v as the least distances over c_ij - c[i, p(i)] from p(i) to j."""
    from scipy.optimize import linear_sum_assignment  # half a second to import

    results = _out(costs, maximize, None, None, None, None)
    sign = -1.0 if maximize else 1.0
    for place in itertools.product(*map(range, costs.shape[:-2])):
        matrix = sign * costs[place].double()
        matched = torch.from_numpy(linear_sum_assignment(matrix.cpu().numpy())[1]).to(costs.device)
        least = matrix.gather(1, matched[:, None])
        v = matrix.new_zeros(len(matrix))
        for _ in range(len(matrix)):
            nearer = torch.minimum(v, (matrix - least + v[matched][:, None]).amin(0))
            if torch.equal(nearer, v):
                break
            v = nearer
        for result, found in zip(results, (matched, least[:, 0] - v[matched], v), strict=True):
            result[place] = found if result is results[0] else sign * found
    return results


def _out(
    costs: Tensor,
    maximize: bool,
    columns: Tensor | None,
    row_duals: Tensor | None,
    column_duals: Tensor | None,
    changed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if costs.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"nlm.assignment: costs must be float32 or float64, got {costs.dtype}")
    if costs.dim() < 2 or costs.shape[-1] != costs.shape[-2]:
        raise ValueError(
            "nlm.assignment: costs must be square matrices [..., n, n], as every row gets a column "
            f"of its own, got shape {tuple(costs.shape)}"
        )
    for label, given, dtype in (
        ("columns", columns, torch.int64),
        ("row duals", row_duals, torch.float64),
        ("column duals", column_duals, torch.float64),
        ("changed rows", changed, torch.bool),
    ):
        if given is not None:
            _check_start(costs, label, given, dtype)
    duals = costs.new_empty(costs.shape[:-1], dtype=torch.float64)
    return torch.empty_like(duals, dtype=torch.int64), duals, torch.empty_like(duals)


def _check_start(costs: Tensor, label: str, start: Tensor, dtype: torch.dtype) -> None:
    shape, device = costs.shape[:-1], costs.device
    if (start.shape, start.dtype, start.device) != (shape, dtype, device):
        raise ValueError(
            f"nlm.assignment: the {label} of a start must be {dtype} of shape {tuple(shape)} on "
            f"{device}, got {start.dtype} of shape {tuple(start.shape)} on {start.device}"
        )


def _check_values(
    costs: Tensor,
    maximize: bool,
    columns: Tensor | None,
    row_duals: Tensor | None,
    column_duals: Tensor | None,
    changed: Tensor | None,
) -> None:
    _check_range("costs", costs)
    _check_duals(row_duals, column_duals)


def _check_duals(row_duals: Tensor | None, column_duals: Tensor | None) -> None:
    for label, duals in (("row", row_duals), ("column", column_duals)):
        if duals is not None:
            _check_range(f"the {label} duals of a start", duals)


def _check_range(label: str, x: Tensor) -> None:
    is_right = x.double().abs() <= _LARGEST
    if not is_right.all():
        place = (~is_right).nonzero()[0].tolist()
        raise ValueError(
            f"nlm.assignment: {label} must be finite and at most {_LARGEST} in magnitude, "
            f"got {x[tuple(place)].item()} at {place}"
        )


def _cpu(
    costs: Tensor,
    maximize: bool,
    columns: Tensor | None,
    row_duals: Tensor | None,
    column_duals: Tensor | None,
    changed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    results = _out(costs, maximize, columns, row_duals, column_duals, changed)
    groups = costs[(None,) * (4 - costs.dim())] if costs.dim() < 4 else costs.flatten(0, -4)
    groups = groups if groups.stride(-1) == 1 else groups.contiguous()
    _check_duals(row_duals, column_duals)
    for result, start in zip(results, (columns, row_duals, column_duals), strict=True):
        if start is not None:
            result.copy_(start)
    marks = None if changed is None else changed.contiguous()
    solved = _native.cpu.assignment(
        _native.view3(groups[:1].flatten(0, 1)), len(groups), groups.stride(0), maximize,
        *(result.data_ptr() for result in results),
        columns is not None and column_duals is not None,
        0 if marks is None or row_duals is None else marks.data_ptr(), _native.threads(),
    )  # fmt: skip
    if not solved:
        _check_range("costs", costs)
    return results


_OPERATION = register(
    "assignment(Tensor costs, bool maximize, Tensor? columns, Tensor? row_duals, "
    "Tensor? column_duals, Tensor? changed) -> (Tensor, Tensor, Tensor)",
    stem="assignment",
    reference=reference,
    out=_out,
    cpu=_cpu,
    cuda=None,
    missing={"cpu": _native.cpu_missing},
    check_values=_check_values,
)


def assignment(
    costs: Tensor,
    maximize: bool = False,
    start: Assignment | None = None,
    changed: Tensor | None = None,
) -> Assignment:
    """The permutation with the least (or largest) sum, of every matrix of a batch.

    Not differentiable: the results do not require gradients.

    Parameters
    ----------
    costs : Tensor of float32 or float64, shape [..., n, n]
        Finite, at most 1e150 in magnitude. Contiguous rows are read in place.
    maximize : bool
        Whether the sum is to be largest.
    start : Assignment, optional
        What was returned for similar costs, with the same ``maximize``: saves work where few rows
        have changed. The sum is the optimum whatever the start; the duals are rounded as its own
        are, so that those of much larger costs certify no small difference.
    changed : Tensor of bool, shape [..., n], optional
        The rows whose costs may differ from those that ``start`` was solved for. Others are taken
        to be as they were, and most of them are not read: the sum is the optimum if that is true,
        which the gap above shows with one read.

    Returns
    -------
    Assignment
        columns int64, row_duals and column_duals float64, each [..., n].

    Examples
    --------
    >>> import torch
    >>> costs = torch.tensor([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]])
    >>> solved = assignment(costs)
    >>> solved.columns.tolist()
    [1, 0, 2]
    >>> (solved.row_duals.sum() + solved.column_duals.sum()).item()
    5.0
    """
    check_tensor("assignment", "costs", costs)
    columns = row_duals = column_duals = None
    if start is not None:
        columns, row_duals, column_duals = start
        check_tensor("assignment", "the columns of a start", columns)
        check_tensor("assignment", "the column duals of a start", column_duals)
        column_duals = without_gradient("assignment", column_duals)
    if changed is not None:
        check_tensor("assignment", "the changed rows", changed)
        check_tensor("assignment", "the row duals of a start with changed rows", row_duals)
    known = (
        None if changed is None or row_duals is None else without_gradient("assignment", row_duals)
    )
    costs = without_gradient("assignment", costs)
    found = _OPERATION.default(costs, maximize, columns, known, column_duals, changed)
    return Assignment(*found)
