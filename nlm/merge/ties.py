"""TIES-Merging (Yadav et al., arXiv:2306.01708): trim, elect a sign, average those who agree.

Of every task vector tau_t = theta_t - theta_0 only the largest entries are kept; per entry the sign
of the sum of what was kept is elected, and the task vectors that have this sign are averaged. Four
public dialects differ:

============  ==========================  =============================  ========================
dialect       the density is of           the sign is that of            the mean is over
============  ==========================  =============================  ========================
``global``    the whole task vector       sum_t tau_t; where it is 0,    the number that agree
              (the authors', FusionBench)  the majority of all signs
``mergekit``  each tensor, at least one   sum_t w_t tau_t, 0 counts +    the weights that agree
``peft``      each tensor                 sum_t tau_t, 0 counts +        the number that agree
============  ==========================  =============================  ========================

``mergekit_sum`` is ``mergekit`` with ``normalize: false``: the sum of those who agree, not divided.
Weights multiply the task vectors before the vote in ``global`` and ``mergekit`` and after it in
``peft``. Entries as large as the k-th largest are all kept, so that ties are kept together.

No task vector is stored: `nlm.ops.magnitude_threshold` and `nlm.ops.sign_merge` take differences
as they read.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nlm._methods import kept_entries
from nlm._state_dict import StateDict
from nlm.merge.linear import computable
from nlm.ops import magnitude_threshold, sign_merge


def ties(
    experts: Mapping[str, StateDict],
    base: StateDict,
    density: float,
    scale: float,
    weights: Mapping[str, float],
    dialect: str,
) -> dict[str, Tensor]:
    """The base plus the scaled TIES mean of the task vectors, in the base's dtype.

    Parameters
    ----------
    experts : task -> state dict; ``base``, the state dict that their task vectors start from.
    density : the share of entries that is left, the largest ones, in (0, 1].
    scale : the factor on the mean; ``weights``, task -> what its entries count for.
    dialect : "global", "mergekit" or "peft": over what is trimmed, and how the mean is taken.

    Raises
    ------
    ValueError
        An unknown dialect, or a density outside (0, 1].
    """
    blocks = [tuple(base)] if dialect == "global" else [(name,) for name in base]
    factors = [weights[task] for task in experts]
    merged: dict[str, Tensor] = {}
    for names in blocks:
        start = [computable(base[name]) for name in names]
        models = [[computable(state[name]) for name in names] for state in experts.values()]
        thresholds = torch.stack([threshold(model, start, density, dialect) for model in models])
        results = sign_merge(start, models, thresholds, factors, scale, dialect)
        for name, result in zip(names, results, strict=True):
            merged[name] = result.to(base[name].dtype)
    return merged


def threshold(model: list[Tensor], start: list[Tensor], density: float, dialect: str) -> Tensor:
    """The least magnitude that is kept: 0 where all entries are, infinity where none is."""
    entries = sum(tensor.numel() for tensor in model)
    kept = kept_entries(density, entries, dialect)
    if 0 < kept < entries:
        return magnitude_threshold(model, kept, start)
    least = 0.0 if kept >= entries else math.inf
    return torch.tensor(least, device=model[0].device)
