"""The inputs that least squares need most: blocks of them are dropped from the cheapest on.

Of inputs x and targets y with G = S_xx + lambda I and C = S_xy + lambda W_0^T the least squares are
worse without the inputs B by

    tr(W_B^T (H_BB)^-1 W_B),     H = G^-1,   W = H C,

and H and W of the rest follow from a Schur complement, without being solved anew. Where there are
few ways to choose all are tried.

Source: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon",
1992.
"""

import itertools
import math

import torch
from torch import Tensor

from nlm.correct.normal_equations import cholesky

_TRIED = 1000  # ways to choose, at most, that are all tried
_UPDATES = 32  # of H and W, until every block were gone
_NEAR = 4  # candidates for each block that one update drops


def entries_of(blocks: Tensor, size: int) -> Tensor:
    """The inputs of some blocks of neighbours, in the blocks' order."""
    return (blocks[:, None] * size + torch.arange(size, device=blocks.device)).flatten()


def select_blocks(
    gram: Tensor, cross: Tensor, block: int, known: Tensor, name: str
) -> tuple[Tensor, Tensor]:
    """Blocks of inputs that explain much, and the least squares from them alone.

    Parameters
    ----------
    gram : G, float64 [inputs, inputs], positive definite.
    cross : C, float64 [inputs, outputs].
    block : inputs that a block has, neighbours.
    known : blocks that are kept where no others are found that explain more; as many are kept.
    name : what the message of :func:`cholesky` calls the map.

    Returns
    -------
    Tensor, Tensor
        The numbers of the blocks, int64 [kept], ascending, and W, float64 [kept * block, outputs].
    """
    total = len(gram) // block
    if math.comb(total, len(known)) <= _TRIED:
        tried = itertools.combinations(range(total), len(known))
        choices = [torch.tensor(choice, device=gram.device) for choice in tried]
    else:
        choices = [known.to(gram.device), _eliminated(gram, cross, block, len(known), name)]
    best = max(choices, key=lambda blocks: _explained(gram, cross, entries_of(blocks, block), name))
    at = entries_of(best, block)
    return best, torch.cholesky_solve(cross[at], cholesky(gram[at][:, at], name))


def _explained(gram: Tensor, cross: Tensor, at: Tensor, name: str) -> float:
    """By how much the least squares from some inputs are better than none."""
    half = torch.linalg.solve_triangular(cholesky(gram[at][:, at], name), cross[at], upper=False)
    return float(half.square().sum())


def _eliminated(gram: Tensor, cross: Tensor, block: int, count: int, name: str) -> Tensor:
    """The blocks that are left when the cheapest have been dropped, ascending."""
    total = len(gram) // block
    kept = torch.arange(total, device=gram.device)
    inverse = torch.cholesky_inverse(cholesky(gram, name))
    weight = inverse @ cross
    while (more := len(kept) - count) > 0:
        more = min(more, -(-total // _UPDATES))
        near = _prices(inverse, weight, block).argsort(stable=True)[: _NEAR * more]
        at = entries_of(near, block)
        left = near[_dearest(inverse[at][:, at], weight[at], block, more)]
        rest = torch.ones_like(kept, dtype=torch.bool)
        rest[near] = False
        rest[left] = True
        inverse, weight = _without(inverse, weight, block, rest)
        kept = kept[rest]
    return kept


def _dearest(inverse: Tensor, weight: Tensor, block: int, count: int) -> Tensor:
    """The blocks that are left when ``count`` have been dropped one by one, ascending.

    What it is given is written into: among a few candidates an update costs next to nothing.
    """
    left = torch.ones(len(inverse) // block, dtype=torch.bool, device=inverse.device)
    for _ in range(count):
        prices = _prices(inverse, weight, block).masked_fill_(~left, math.inf)
        gone = int(prices.argmin())
        left[gone] = False
        at = slice(gone * block, (gone + 1) * block)
        share = _divided(inverse[at, at], inverse[at]).T
        weight.addmm_(share, weight[at].clone(), alpha=-1)
        inverse.addmm_(share, inverse[at].clone(), alpha=-1)
        inverse[at, at] = torch.eye(block, dtype=inverse.dtype, device=inverse.device)
    return left.nonzero().flatten()


def _prices(inverse: Tensor, weight: Tensor, block: int) -> Tensor:
    """By how much the least squares are worse without each block."""
    if block == 1:
        return weight.square().sum(1) / inverse.diagonal()
    grid = inverse.unflatten(0, (-1, block)).unflatten(2, (-1, block))
    own = grid.diagonal(dim1=0, dim2=2).movedim(-1, 0)  # [blocks, block, block]
    rows = weight.unflatten(0, (-1, block))
    return (torch.linalg.solve(own, rows) * rows).sum((1, 2))


def _divided(matrix: Tensor, by: Tensor) -> Tensor:
    """matrix^-1 by, of a matrix that is a number as a rule."""
    return by / matrix if len(matrix) == 1 else torch.linalg.solve(matrix, by)


def _without(inverse: Tensor, weight: Tensor, block: int, rest: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse and the least squares of the rest of the blocks."""
    numbers = torch.arange(len(rest), device=rest.device)
    stay, gone = (entries_of(numbers[where], block) for where in (rest, ~rest))
    half = inverse[gone]
    share = torch.linalg.solve(half[:, gone], half[:, stay]).T
    weight = weight[stay] - share @ weight[gone]
    return inverse[stay][:, stay].addmm_(share, half[:, stay], alpha=-1), weight
