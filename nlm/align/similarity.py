"""The similarity of the units of two models, read off one parameter.

For a parameter W that a group stands on, with the group's axis unfolded to the front and all other
axes contracted,

    S[i, j] = sum_r  W_A[i, r] W_B[j, r],

where W_B has every other axis in its current permutation. Biases and norm parameters are vectors:
their S is an outer product (a scalar product would not depend on the permutation).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nlm import ops
from nlm.symmetry.gather import gathers
from nlm.symmetry.layout import Fixed, Layout, Product, Ref, Sum, pin
from nlm.symmetry.permutation import Groups, Permutation


def permuted(
    tensor: Tensor, layouts: tuple[Layout, ...], groups: Groups, permutation: Permutation
) -> Tensor:
    """One parameter in a permutation's order."""
    plan = list(gathers(layouts, groups, permutation))
    if not plan:
        return tensor
    [moved] = ops.permute(
        [tensor],
        [[gather.index for gather in plan]],
        [[gather.axis for gather in plan]],
        [[gather.parents for gather in plan]],
    )
    return moved


def similarity(
    a: Tensor,
    b: Tensor,
    layouts: tuple[Layout, ...],
    dim: int,
    group: str,
    groups: Groups,
    permutation: Permutation,
) -> Tensor:
    """The similarity of a group's units on one dimension of one parameter, float64 [n, n].

    ``b`` is taken in the current permutation everywhere but in ``group`` on ``dim``.
    """
    others = tuple(
        pin(layout, {group}) if axis == dim else layout for axis, layout in enumerate(layouts)
    )
    b = permuted(b, others, groups, permutation)
    size = groups[group].size
    total = torch.zeros(size, size, dtype=torch.float64)
    for start, length, before in _places(layouts[dim], group):
        unfolded = [_unfold(side, dim, start, length, before, size) for side in (a, b)]
        total += unfolded[0] @ unfolded[1].T
    return total


def squared_norms(tensor: Tensor, layout: Layout, dim: int, group: str, size: int) -> Tensor:
    """The squared norms of a group's units on one dimension of one parameter, float64 [n]."""
    total = torch.zeros(size, dtype=torch.float64)
    for start, length, before in _places(layout, group):
        total += _unfold(tensor, dim, start, length, before, size).square().sum(dim=1)
    return total


def _unfold(side: Tensor, dim: int, start: int, length: int, before: int, size: int) -> Tensor:
    """The group's axis in front and everything else behind it, [size, rest]."""
    block = side.narrow(dim, start, length).movedim(dim, 0)
    after = length // (before * size)
    grid = block.reshape(before, size, after, *block.shape[1:])
    return grid.transpose(0, 1).reshape(size, -1)


def _places(layout: Layout, group: str, start: int = 0) -> Iterator[tuple[int, int, int]]:
    """Where a group stands along a layout: (start, length, number of positions before its axis).

    Raises
    ------
    NotImplementedError
        The group stands inside a family, or in a sum inside a product.
    """
    if isinstance(layout, Ref):
        if layout.group == group:
            yield start, layout.size, 1
    elif isinstance(layout, Sum):
        for part in layout.parts:
            yield from _places(part, group, start)
            start += part.size
    elif isinstance(layout, Product):
        before = 1
        for part in layout.parts:
            if isinstance(part, Ref) and part.group == group:
                yield start, layout.size, before
            elif not isinstance(part, (Ref, Fixed)):
                raise NotImplementedError(
                    f"nlm.align: groups are matched in sums of products of groups, got '{layout}'"
                )
            before *= part.size
    elif not isinstance(layout, Fixed):
        raise NotImplementedError(
            f"nlm.align: groups are matched in sums of products of groups, got '{layout}'"
        )
