"""Gathered axes: the arguments of `permute` and `group_similarity_`.

A schema has no nested lists: what a caller nests reaches an operation as flat lists.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nlm.ops._arguments import check_tensor


class Gather(NamedTuple):
    """One gathered axis."""

    where: Tensor
    owner: int
    axis: int
    parents: tuple[int, ...]

    def __str__(self) -> str:
        return f"axis {self.axis} of tensor {self.owner}"


def flatten(
    op: str,
    tensors: Sequence[Tensor],
    indices: Sequence[Sequence[Tensor]],
    axes: Sequence[Sequence[int]],
    parents: Sequence[Sequence[Sequence[int]]] | None,
) -> tuple[list[Tensor], list[int], list[int], list[int], list[int]]:
    """The nested arguments as the schema's flat lists; negative axes count from the end."""
    if parents is None:
        parents = [[()] * len(own) for own in axes]
    lengths = len(tensors), len(indices), len(axes), len(parents)
    if len(set(lengths)) != 1:
        raise ValueError(
            f"nlm.{op}: tensors, indices, axes and parents must have one length, got {lengths}"
        )
    flat: tuple[list, list, list, list, list] = ([], [], [], [], [])
    for t, (x, own) in enumerate(
        zip(tensors, zip(indices, axes, parents, strict=True), strict=True)
    ):
        check_tensor(op, f"tensor {t}", x)
        counts = tuple(len(each) for each in own)
        if len(set(counts)) != 1:
            raise ValueError(
                f"nlm.{op}: a tensor must have as many indices as axes and parents, "
                f"got {counts} for tensor {t}"
            )
        for index, axis, axis_parents in zip(*own, strict=True):
            check_tensor(op, f"the index for axis {axis} of tensor {t}", index)
            flat[0].append(index)
            flat[1].append(t)
            flat[2].append(_from_start(axis, x))
            flat[3].extend(_from_start(p, x) for p in axis_parents)
            flat[4].append(len(axis_parents))
    return flat


def _from_start(axis: int, x: Tensor) -> int:
    return axis + x.dim() if -x.dim() <= axis < 0 else axis


def unflatten(
    indices: list[Tensor],
    owners: list[int],
    axes: list[int],
    parents: list[int],
    parent_counts: list[int],
) -> list[Gather]:
    remaining = iter(parents)
    return [
        Gather(index, owner, axis, tuple(itertools.islice(remaining, count)))
        for index, owner, axis, count in zip(indices, owners, axes, parent_counts, strict=True)
    ]


def check_gather(op: str, x: Tensor, gather: Gather) -> None:
    index, _, axis, parents = gather
    shape = tuple(x.shape)
    if not 0 <= axis < x.dim():
        raise ValueError(
            f"nlm.{op}: a gathered axis must be a dimension of its tensor, "
            f"got {gather} of shape {shape}"
        )
    if any(not 0 <= p < x.dim() for p in parents) or len({axis, *parents}) != 1 + len(parents):
        raise ValueError(
            f"nlm.{op}: the parents of an axis must be other dimensions of its tensor, each once, "
            f"got parents {parents} for {gather} of shape {shape}"
        )
    if index.dtype != torch.int64:
        raise TypeError(f"nlm.{op}: an index must be int64, got {index.dtype} for {gather}")
    expected = (*(shape[p] for p in parents), shape[axis])
    if tuple(index.shape) != expected:
        raise ValueError(
            f"nlm.{op}: an index must have shape [*parent sizes, axis size], {expected} for "
            f"{gather}, got {tuple(index.shape)}"
        )
    if index.device != x.device:
        raise ValueError(
            f"nlm.{op}: an index must be on the device of its tensor, {x.device}, "
            f"got {index.device} for {gather}"
        )


def check_range(op: str, gather: Gather, size: int) -> None:
    """Every index value lies in an axis of this size."""
    if gather.where.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(gather.where))
    if low < 0 or high >= size:
        raise ValueError(
            f"nlm.{op}: the values of an index must lie in [0, {size}), got {low} to {high} for "
            f"{gather}"
        )


def positions(
    sizes: Sequence[int], axes: Sequence[int], gathers: list[Gather], device: torch.device
) -> dict[int, Tensor]:
    """Axis -> its index at every position of a grid of these axes, broadcastable."""
    grid = {
        x: torch.arange(sizes[x], device=device).view([-1 if x == y else 1 for y in axes])
        for x in axes
    }
    found = dict(grid)
    for index, _, axis, parents in gathers:
        found[axis] = index[(*(grid[p] for p in parents), grid[axis])]
    return found
