"""Pool and select: whole units and attention heads of the members instead of means of them.

Where a mean of two units that hardly correlate is like neither, both are put before the layer that
reads them, and the best are kept, as many as one member has. Of pooled inputs x and a target y with
normal equations G = S_xx + lambda I and C = S_xy, the least squares without the block B is worse by

    tr(W_B^T (H_BB)^-1 W_B),     H = G^-1,   W = H C,

so blocks are dropped from the cheapest on, a few at a time, H and W brought up to date after each
(optimal brain surgeon). Where there are few ways to choose, as of attention heads, all are tried.

Source: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon",
1992.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nlm.correct.normal_equations import cholesky
from nlm.correct.walk import Step
from nlm.symmetry import PermutationSpec
from nlm.symmetry.layout import Layout, Product, Ref

_TRIED = 1000  # ways to choose, at most, that are all tried
_AT_ONCE = 1 / 32  # of the blocks of the pool, dropped between two updates


@dataclass(frozen=True)
class Pool:
    """Units that a step makes and the only layer of another one reads.

    Attributes
    ----------
    reader : the step that makes them.
    writer : the step that reads them.
    blocks : how many units (or attention heads) a member has.
    """

    reader: Step
    writer: Step
    blocks: int


def find_pools(steps: Sequence[Step], spec: PermutationSpec) -> list[Pool]:
    """The pools of a network: groups of units that one step makes and one layer alone reads."""
    found = []
    for writer in steps:
        outer = _outer(spec, writer.layers[0], 1) if len(writer.layers) == 1 else None
        if outer is None or writer.norm is not None:
            continue
        carriers = {name.rpartition(".")[0] for name, _ in spec.carriers(outer.group)}
        for reader in steps:
            makes = reader.norm is None and carriers == {*reader.layers, *writer.layers}
            if makes and reader is not writer and all(_outer(spec, name, 0) == outer for name in reader.layers):
                found.append(Pool(reader, writer, outer.size))
    return found


def _outer(spec: PermutationSpec, layer: str, dim: int) -> Ref | None:
    """The group that runs slowest along a dimension of a layer's weight."""
    layouts: Sequence[Layout] = spec.params.get(f"{layer}.weight", ())
    layout = layouts[dim] if dim < len(layouts) else None
    first = layout.parts[0] if isinstance(layout, Product) else layout
    return first if isinstance(first, Ref) else None


def select(gram: Tensor, cross: Tensor, block: int, count: int, name: str) -> tuple[Tensor, Tensor]:
    """The best blocks of inputs, and the least squares from them alone.

    Parameters
    ----------
    gram : G, float64 [inputs, inputs], positive definite.
    cross : C, float64 [inputs, outputs].
    block : inputs a block has, neighbours.
    count : blocks to keep.
    name : what the message of :func:`cholesky` calls the map.

    Returns
    -------
    Tensor, Tensor
        The numbers of the blocks, int64 [count], ascending, and W, float64 [count * block, outputs].
    """
    total = len(gram) // block
    if math.comb(total, count) <= _TRIED:
        return _tried(gram, cross, block, count, name)
    kept = torch.arange(total, device=gram.device)
    inverse = torch.cholesky_inverse(cholesky(gram, name))
    weight = inverse @ cross
    while len(kept) > count:
        grid = inverse.unflatten(0, (-1, block)).unflatten(2, (-1, block))
        own = grid.diagonal(dim1=0, dim2=2).movedim(-1, 0)  # [blocks, block, block]
        rows = weight.unflatten(0, (-1, block))
        price = (torch.linalg.solve(own, rows) * rows).sum((1, 2))
        dropped = min(len(kept) - count, max(1, int(total * _AT_ONCE)))
        order = price.argsort(stable=True)
        out, rest = (_inputs(part, block) for part in (order[:dropped], order[dropped:].sort()[0]))
        share = torch.linalg.solve(inverse[out][:, out], inverse[out][:, rest]).T
        weight = weight[rest] - share @ weight[out]
        inverse = inverse[rest][:, rest] - share @ inverse[out][:, rest]
        kept = kept[order[dropped:].sort()[0]]
    return kept, weight


def _tried(gram: Tensor, cross: Tensor, block: int, count: int, name: str) -> tuple[Tensor, Tensor]:
    """The choice that explains most, of all there are."""
    best: tuple[float, Tensor, Tensor] | None = None
    for choice in itertools.combinations(range(len(gram) // block), count):
        kept = torch.tensor(choice, device=gram.device)
        at = _inputs(kept, block)
        weight = torch.cholesky_solve(cross[at], cholesky(gram[at][:, at], name))
        gain = float((weight * cross[at]).sum())
        if best is None or gain > best[0]:
            best = gain, kept, weight
    assert best is not None  # there is at least one choice
    return best[1:]


def _inputs(blocks: Tensor, block: int) -> Tensor:
    """The inputs of some blocks, in their order."""
    return (blocks[:, None] * block + torch.arange(block, device=blocks.device)).flatten()
