"""Permutations of axis groups: checked, drawn, composed and inverted.

A permutation is a plain dict ``{group id: int64 tensor [*parent sizes, size]}`` in the gather
convention ``new[i] = old[p[i]]``. Where a group has parents (the units inside a head have the head
as parent), there is one permutation per index of the parents, looked up by the *new* index of the
parents. A group that is left out stays as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Permutation = dict[str, Tensor]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class AxisGroup:
    """A set of units that are permuted together wherever they occur.

    Parameters
    ----------
    id : its name in layouts and permutations.
    size : the number of units.
    parents : ids of the groups whose index its permutation may depend on; with their own parents.
        The number of independent permutations is the product of the parents' sizes.
    origin : where it was found, for people ("trunk.conv1").
    fixed : its units stay where they are. It is a group because others depend on its index: the
        heads of a model with ALiBi slopes cannot move, the units inside each head can.
    """

    id: str
    size: int
    parents: tuple[str, ...] = ()
    origin: str = ""
    fixed: bool = False


Groups = Mapping[str, AxisGroup]


def is_free(groups: Groups, group: str) -> bool:
    """Whether a name is that of a group whose units may move."""
    return group in groups and not groups[group].fixed


def index_shape(groups: Groups, group: str) -> tuple[int, ...]:
    """``[*parent sizes, size]``, the shape of the group's index array."""
    return (*(groups[parent].size for parent in groups[group].parents), groups[group].size)


def identity(groups: Groups, group: str) -> Tensor:
    """The index array that leaves a group as it is."""
    shape = index_shape(groups, group)
    return torch.arange(shape[-1]).expand(shape).contiguous()


def check(groups: Groups, permutation: Mapping[str, Tensor]) -> Permutation:
    """The permutation with every group filled in.

    Raises
    ------
    ValueError
        An unknown group, a wrong shape, or indices that are no permutation.
    """
    for group in permutation:
        if group not in groups:
            raise ValueError(
                f"nlm.symmetry: a permutation names groups of its specification "
                f"({', '.join(groups) or 'which has none'}), got {group!r}"
            )
    full: Permutation = {}
    for group in groups:
        if group not in permutation:
            full[group] = identity(groups, group)
            continue
        index = torch.as_tensor(permutation[group]).cpu()
        expected = index_shape(groups, group)  # of any size, where a file says it
        if index.dtype not in _INTEGERS or index.shape != expected:
            raise ValueError(
                f"nlm.symmetry: the index array of group {group!r} must be int64 of shape "
                f"{list(expected)}, got {index.dtype} of shape {list(index.shape)}"
            )
        index = index.long()
        _check_rows(group, index)
        if groups[group].fixed and not torch.equal(index, identity(groups, group)):
            raise ValueError(
                f"nlm.symmetry: a fixed group stays in order, got {_first_lines(index)} for "
                f"{group!r}"
            )
        full[group] = index
    return full


def check_rows(permutation: Mapping[str, Tensor]) -> None:
    """Raises ValueError where something is no permutation of any group."""
    for group, index in permutation.items():
        if index.dtype not in _INTEGERS or not index.dim():
            raise ValueError(
                f"nlm.symmetry: the index array of group {group!r} must be int64 of shape "
                f"[*parent sizes, size], got {index.dtype} of shape {list(index.shape)}"
            )
        _check_rows(group, index.long())


def _check_rows(group: str, index: Tensor) -> None:
    if not _is_permutation(index):
        raise ValueError(
            f"nlm.symmetry: the index array of group {group!r} must hold each of 0 to "
            f"{index.shape[-1] - 1} once, got {_first_lines(index)}"
        )


def _is_permutation(index: Tensor) -> bool:
    """Whether every row of the last dimension holds each of its positions once."""
    if index.numel() == 0:
        return True
    low, high = torch.aminmax(index)
    if low < 0 or high >= index.shape[-1]:
        return False
    seen = torch.zeros(index.shape, dtype=torch.bool)
    return bool(seen.scatter_(-1, index, True).all())


def random(groups: Groups, seed: int) -> Permutation:
    """A uniform permutation of every group that is not fixed; none of two or more units stays."""
    generator = torch.Generator().manual_seed(seed)
    drawn: Permutation = {}
    for group in groups:
        shape = index_shape(groups, group)
        still = drawn[group] = identity(groups, group)
        while not groups[group].fixed:
            drawn[group] = torch.rand(shape, generator=generator, dtype=torch.float64).argsort(-1)
            if shape[-1] < 2 or still.numel() == 0 or not torch.equal(drawn[group], still):
                break
    return drawn


def compose(groups: Groups, first: Permutation, second: Permutation) -> Permutation:
    """The permutation that acts as ``first`` and then ``second``."""
    return {
        group: first[group][_parents_of(groups, second, group)].gather(-1, second[group])
        for group in groups
    }


def inverse(groups: Groups, permutation: Permutation) -> Permutation:
    """The permutation that undoes another one."""
    undone: Permutation = {}
    for group in sorted(groups, key=lambda name: len(groups[name].parents)):
        source = permutation[group][_parents_of(groups, undone, group)]
        undone[group] = source.argsort(dim=-1)
    return {group: undone[group] for group in groups}


def _parents_of(groups: Groups, permutation: Permutation, group: str) -> tuple[Tensor, ...] | slice:
    """For each new index of a group's parents the old one, as an index of the parents' axes."""
    parents = groups[group].parents
    if not parents:
        return slice(None)
    grid = torch.meshgrid(*(torch.arange(groups[parent].size) for parent in parents), indexing="ij")
    new = dict(zip(parents, grid, strict=True))
    return tuple(
        permutation[parent][(*(new[above] for above in groups[parent].parents), new[parent])]
        for parent in parents
    )


def _first_lines(index: Tensor) -> str:
    values = index.flatten().tolist()
    return f"{values[:8]}{'...' if len(values) > 8 else ''}"
