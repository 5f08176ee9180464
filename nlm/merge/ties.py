"""TIES-Merging (Yadav et al., arXiv:2306.01708): trim, elect a sign, average those who agree.

Of every task vector tau_t = theta_t - theta_0 only the largest entries are kept; per entry the sign
of the sum of what was kept is elected, and the task vectors that have this sign are averaged. Three
public dialects differ:

============  ==========================  =============================  ========================
dialect       the density is of           the sign is that of            the mean is over
============  ==========================  =============================  ========================
``global``    the whole task vector       sum_t tau_t; where it is 0,    the number that agree
              (the authors', FusionBench)  the majority of all signs
``mergekit``  each tensor, at least one   sum_t w_t tau_t, 0 counts +    the weights that agree
``peft``      each tensor                 sum_t tau_t, 0 counts +        the number that agree
============  ==========================  =============================  ========================

Weights multiply the task vectors before the vote in ``global`` and ``mergekit`` and after it in
``peft``. Entries as large as the k-th largest are all kept, so that ties are kept together.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nlm._state_dict import StateDict
from nlm.merge.linear import wide

DIALECTS = ("global", "mergekit", "peft")


def ties(
    experts: Mapping[str, StateDict],
    base: StateDict,
    density: float,
    scale: float,
    weights: Mapping[str, float],
    dialect: str,
) -> dict[str, Tensor]:
    """The base plus the scaled TIES mean of the task vectors, in the base's dtype.

    Raises
    ------
    ValueError
        An unknown dialect, or a density outside (0, 1].
    """
    if dialect not in DIALECTS:
        raise ValueError(
            f"nlm.merge: the TIES dialect is one of {', '.join(DIALECTS)}, got {dialect!r}"
        )
    if not 0 < density <= 1:
        raise ValueError(f"nlm.merge: a density lies in (0, 1], got {density}")
    blocks = [tuple(base)] if dialect == "global" else [(name,) for name in base]
    merged: dict[str, Tensor] = {}
    for names in blocks:
        start = torch.cat([wide(base[name]).flatten() for name in names])
        vectors = torch.stack(
            [
                torch.cat([wide(state[name]).flatten() for name in names]) - start
                for state in experts.values()
            ]
        )  # [tasks, entries]
        factors = torch.tensor(
            [weights[task] for task in experts], dtype=start.dtype, device=start.device
        )[:, None]
        direction = _ties_mean(_trim(vectors, density, dialect), factors, dialect)
        values = start + scale * direction
        sizes = [base[name].numel() for name in names]
        for name, value in zip(names, values.split(sizes), strict=True):
            merged[name] = value.reshape(base[name].shape).to(base[name].dtype)
    return merged


def _trim(vectors: Tensor, density: float, dialect: str) -> Tensor:
    """Each row with its largest entries kept and the others set to zero."""
    entries = vectors.shape[1]
    if dialect == "mergekit":
        kept = max(1, int(density * entries))
    else:
        kept = int(density * entries)
    if kept >= entries or entries == 0:
        return vectors
    if kept == 0:
        return torch.zeros_like(vectors)
    magnitudes = vectors.abs()
    threshold = magnitudes.kthvalue(entries - kept + 1, dim=1, keepdim=True).values
    return torch.where(magnitudes >= threshold, vectors, 0.0)


def _ties_mean(trimmed: Tensor, weights: Tensor, dialect: str) -> Tensor:
    """The mean over the entries that have the elected sign, [entries]."""
    weighted = trimmed * weights
    if dialect == "global":
        sign = weighted.sum(0).sign()
        majority = sign.sum().sign()
        sign = torch.where(
            sign == 0, majority if majority != 0 else torch.ones_like(majority), sign
        )
    else:
        vote = (weighted if dialect == "mergekit" else trimmed).sum(0)
        sign = torch.where(vote >= 0, 1.0, -1.0).to(trimmed.dtype)
    if dialect == "mergekit":
        agree = weighted.sign() == sign
        share = (agree * weights).sum(0)
        share = torch.where(share == 0, torch.ones_like(share), share)
    else:
        agree = trimmed.sign() == sign if dialect == "peft" else weighted.sign() == sign
        share = agree.sum(0).clamp(min=1).to(trimmed.dtype)
    return (weighted * agree).sum(0) / share
