"""Activations of several models, so that they can be matched as weights are.

For one module, the correlations of every two models' units are the blocks C_mn of a symmetric
matrix. In the objective of :mod:`nlm.align.many` no model stands against itself, so that c I can
stand on the diagonal; with c above the sum of any row it is positive definite, and the rows of its
Cholesky factor are one tensor F_m for each model with

    F_m F_n^T = C_mn,        <P_m(F_m), P_n(F_n)> = sum of the correlations that P_m, P_n match.

To all that is done with weights F is a parameter more, whose rows are the units.

Memory: twice the square of (models x units), for each module that is seen, in float64; the factors
come from LAPACK, which may round differently for other numbers of threads.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nlm.align.seen import Seen, correlate
from nlm.align.similarity import Correlation
from nlm.statistics import Data
from nlm.symmetry import Layout, PermutationSpec
from nlm.symmetry.layout import Fixed

Pairs = Mapping[tuple[int, int], Sequence[Correlation]]


def correlate_all(
    models: Sequence[nn.Module], spec: PermutationSpec, data: Data, **options: Any
) -> dict[tuple[int, int], Seen]:
    """What the modules of every two models show; for each pair one walk over the data.

    ``options`` : see :func:`nlm.align.seen.correlate`.
    """
    return {
        (one, two): correlate(models[one], models[two], spec, data, **options)
        for one, two in itertools.combinations(range(len(models)), 2)
    }


def factors(pairs: Pairs, count: int) -> dict[str, tuple[tuple[Layout, ...], list[Tensor]]]:
    """A parameter of all ``count`` models for each module: its layouts, and a tensor of each model.

    ``pairs`` : for every two of them, the first one before, the same modules in the same order.
    """
    found: dict[str, tuple[tuple[Layout, ...], list[Tensor]]] = {}
    for number, alike in enumerate(zip(*pairs.values(), strict=True)):
        layout = alike[0].layouts[1]
        whole = torch.zeros(count, layout.size, count, layout.size, dtype=torch.float64)
        for (one, two), correlation in zip(pairs, alike, strict=True):
            matrix = correlation.products()
            whole[one, :, two], whole[two, :, one] = matrix, matrix.mT
        matrix = whole.view(count * layout.size, -1)
        matrix.diagonal().fill_(1.01 * float(matrix.abs().sum(1).max()) or 1.0)
        parts = torch.linalg.cholesky(matrix).contiguous().view(count, layout.size, -1)
        found[f"activations {number}"] = (layout, Fixed(len(matrix))), list(parts)
    return found
