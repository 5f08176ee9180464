"""Model Breadcrumbs (Davari and Belilovsky, arXiv:2312.06795): no outliers and no noise.

Of n entries of each tensor of a task vector the int(density n) largest are kept that remain when
the int(gamma n) largest of all are taken away; fewer are taken away where too few would remain. So
mergekit has it. Entries as large as a threshold stand on one side of it together.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nlm._methods import check_middle
from nlm._sparse import middle_ranks
from nlm._state_dict import StateDict
from nlm.merge.dare import wide
from nlm.merge.linear import alike
from nlm.ops import magnitude_threshold


def breadcrumbs(
    experts: Mapping[str, StateDict], base: StateDict, density: float, gamma: float
) -> dict[str, dict[str, Tensor]]:
    """task -> name -> the base plus what is left of the task vector, in float32 at least.

    Parameters
    ----------
    experts : task -> state dict; ``base``, the state dict that their task vectors start from.
    density : the share of a task vector's entries that is left, in (0, 1].
    gamma : the share of each tensor's largest entries that is taken away first, in [0, 1).

    Raises
    ------
    ValueError
        A density outside (0, 1], or a gamma outside [0, 1).
    """
    check_middle(density, gamma)
    return {
        task: {name: _left(state[name], start, density, gamma) for name, start in base.items()}
        for task, state in experts.items()
    }


def _left(expert: Tensor, base: Tensor, density: float, gamma: float) -> Tensor:
    expert, base = alike(wide(expert), wide(base))
    keeps = is_middle(expert, base, *middle_ranks(density, gamma, expert.numel()))
    return torch.where(keeps, expert, base)


def is_middle(x: Tensor, base: Tensor | None, kept: int, larger: int) -> Tensor:
    """Where \\|x - base\\| is among the ``kept`` largest behind the ``larger`` ones."""
    starts = None if base is None else [base]

    def at(rank: int) -> Tensor | float:
        if 0 < rank < x.numel():
            return magnitude_threshold([x], rank, starts)
        return 0.0 if rank else math.inf

    magnitude = (x if base is None else x - base).abs()
    if kept <= 0:
        return torch.zeros_like(magnitude, dtype=torch.bool)
    least = magnitude >= at(kept + larger)
    return least & (magnitude < at(larger)) if larger > 0 else least
