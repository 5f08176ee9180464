"""Partial matching: which of the matched units are merged, and which both models keep.

A merged pair whose units correlate by s loses the part (1 - s) / 2 of their variance, a pair that
is kept apart loses nothing and widens its layers. So the pairs that are least alike are kept apart:
a share of each group (Stoica et al., ZipIt!, arXiv:2305.03053), or, within a budget of parameters
for the whole network, as many of each group as minimise

    sum over the groups g of  mean over the units i of g of  (1 - s_i) [i is merged]

(Nasery et al., PLeaS, arXiv:2407.02447, whose layers compete by measured accuracies). The number of
parameters is a polynomial in the widths, with products of a layer's own and those that it reads. On
a grid of shares it becomes linear, with a variable for each combination of the widths that are
multiplied, tied to those of the single widths by their margins: an integer program, which SciPy's
HiGHS solves to a ten-thousandth of the best value (ResNet-50, 37 groups in steps of 1/8: in 4 to 9
seconds).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nlm.align.result import AlignmentResult
from nlm.symmetry.widening import Widening, kept_apart

if TYPE_CHECKING:
    from scipy.sparse import coo_array

Grid = dict[str, list[int]]  # group -> the numbers of merged pairs to choose from

_TIE = 1e-6  # what the whole of one model's parameters counts for beside the variance lost


def partial_matching(
    found: AlignmentResult,
    widening: Widening,
    *,
    share: float | Mapping[str, float] | None = None,
    budget: float | None = None,
    steps: int = 8,
) -> dict[str, Tensor]:
    """The units of two aligned models in a wide one, the best matched of which are shared.

    Parameters
    ----------
    found : the alignment of the two models.
    widening : the groups that can be widened; of all others everything is merged.
    share : the share of pairs that are merged in each group; in those that a mapping leaves out,
        all. 1 is the ordinary merge, 0 keeps the two models side by side.
    budget : or: at most so many times the parameters of one model.
    steps : the shares to choose from under a budget: 0, 1 / steps, ..., 1.

    Returns
    -------
    group -> int64 ``[2, n]``, the wide unit of each unit of the first model and of the second, in
    the first one's order: what :func:`nlm.merge.merge_partial` merges by.

    Raises
    ------
    ValueError
        Not one of ``share`` and ``budget``, or one out of range; a group that cannot be widened, or
        of which the alignment says nothing.
    """
    if (share is None) == (budget is None):
        raise ValueError(
            f"nlm.align: one of share and budget is given, got share={share!r} and "
            f"budget={budget!r}"
        )
    if missing := [group for group in widening.written if group not in found.similarity]:
        raise ValueError(
            f"nlm.align: the alignment has the similarity of every unit, got none for "
            f"{missing[0]!r}"
        )
    similarity = {group: found.similarity[group].cpu().double() for group in widening.written}
    if budget is not None:
        merged = _within(budget, similarity, widening, steps)
    else:
        shares = share if isinstance(share, Mapping) else dict.fromkeys(similarity, share)
        merged = _counts(shares, similarity, widening)
    units = {}
    for group, count in merged.items():
        own = torch.ones(len(similarity[group]), dtype=torch.bool)
        own[similarity[group].argsort(descending=True, stable=True)[:count]] = False
        units[group] = kept_apart(own)
    return units


def _counts(
    shares: Mapping[str, float | None], similarity: Mapping[str, Tensor], widening: Widening
) -> dict[str, int]:
    """The numbers of merged pairs that shares say."""
    counts = {}
    for group, share in shares.items():
        if group not in similarity:
            raise ValueError(
                f"nlm.align: the groups that can be widened are {', '.join(similarity) or 'none'}, "
                f"got {group!r} ({widening.refused.get(group, 'unknown')})"
            )
        if share is None or not 0 <= share <= 1:
            raise ValueError(
                f"nlm.align: the share of merged pairs lies in 0..1, got {share} for {group!r}"
            )
        counts[group] = round(share * len(similarity[group]))
    return counts


def _within(
    budget: float, similarity: Mapping[str, Tensor], widening: Widening, steps: int
) -> dict[str, int]:
    """The numbers of merged pairs that lose the least variance within a budget of parameters."""
    if not budget >= 1 or steps < 1:
        raise ValueError(
            f"nlm.align: a budget is at least the parameters of one model, and there is a step, "
            f"got budget={budget} and steps={steps}"
        )
    sizes = {group: len(each) for group, each in similarity.items()}
    grid = {g: sorted({round(n * k / steps) for k in range(steps + 1)}) for g, n in sizes.items()}
    if not grid:
        return {}
    tables = _tables(widening, sizes, grid)
    constant = float(tables.pop((), np.zeros(())))
    one_model = constant + sum(float(table[(-1,) * table.ndim]) for table in tables.values())
    cost = np.concatenate([table.ravel() for table in tables.values()]) / one_model
    lost = _TIE * cost
    whole = np.zeros(len(cost), dtype=np.int64)
    start = 0
    first: dict[str, int] = {}
    for key, table in tables.items():
        if len(key) == 1:
            [group] = key
            first[group] = start
            ordered = similarity[group].sort(descending=True).values.numpy()
            sums = np.concatenate([[0.0], (1 - ordered).cumsum()])
            lost[start : start + table.size] += sums[grid[group]] / sizes[group]
            whole[start : start + table.size] = 1
        start += table.size
    from scipy.optimize import Bounds, LinearConstraint, milp  # half a second to import

    margins, right = _margins(tables, first)
    limit = LinearConstraint(cost[None], -np.inf, budget - constant / one_model)
    result = milp(
        lost,
        constraints=[LinearConstraint(margins, right, right), limit],
        integrality=whole,
        bounds=Bounds(0, 1),
    )
    if result.x is None:
        raise RuntimeError(f"nlm.align: SciPy's milp finds a best choice, got {result.message!r}")
    return {
        group: counts[int(result.x[first[group] : first[group] + len(counts)].argmax())]
        for group, counts in grid.items()
    }


def _tables(
    widening: Widening, sizes: Mapping[str, int], grid: Grid
) -> dict[tuple[str, ...], np.ndarray]:
    """The parameters of the monomials in some groups, for every combination of grid points.

    The groups on which they depend, once each -> float64 ``[grid points of each]``. Every group has
    a table of its own.
    """
    tables: dict[tuple[str, ...], np.ndarray] = {
        (group,): np.zeros(len(counts)) for group, counts in grid.items()
    }
    for key, times in widening.parameters().items():
        groups = tuple(dict.fromkeys(key))
        table = np.full([len(grid[group]) for group in groups], float(times))
        for axis, group in enumerate(groups):
            widths = 2 * sizes[group] - np.array(grid[group], dtype=float)
            shape = [-1 if other == axis else 1 for other in range(len(groups))]
            table *= widths.reshape(shape) ** key.count(group)
        tables[groups] = tables.get(groups, 0) + table
    return tables


def _margins(
    tables: Mapping[tuple[str, ...], np.ndarray], first: Mapping[str, int]
) -> tuple["coo_array", np.ndarray]:
    """One grid point is taken of every group, and a combination as often as each of its points."""
    entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # rows, columns, values
    right: list[float] = []
    start = 0

    def add(row: np.ndarray, column: np.ndarray, value: float) -> None:
        entries.append((row.ravel(), column.ravel(), np.full(row.size, value)))

    for key, table in tables.items():
        own = start + np.arange(table.size).reshape(table.shape)
        start += table.size
        if len(key) == 1:
            add(np.full(table.size, len(right)), own, 1.0)
            right.append(1.0)
            continue
        for axis, group in enumerate(key):
            points = np.arange(table.shape[axis])
            add(len(right) + np.indices(table.shape)[axis], own, 1.0)
            add(len(right) + points, first[group] + points, -1.0)
            right += [0.0] * len(points)
    from scipy.sparse import coo_array

    rows, columns, values = map(np.concatenate, zip(*entries, strict=True))
    return coo_array((values, (rows, columns)), shape=(len(right), start)), np.array(right)
