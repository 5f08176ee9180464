"""ZipIt!'s matching functions on nlm: ``metric -> merges, unmerges``.

They are passed to ZipIt's ``ModelMerge`` in place of its own::

    from nlm.integrations.zipit import match_tensors_nlm, match_tensors_nlm_zip

    merge.transform(model, dataloader, transform_fn=match_tensors_nlm_zip)

From the metric of N models side by side, ``"covariance"`` or ``"cossim"`` of ``[N d, N d]``, come

    merges    [d', N d], the mean of the units that become one: its rows sum to 1
    unmerges  [N d, d'], 1 where a unit of a model went, else 0

with d' = (1 - r) N d. Where ZipIt has a function of its own, this is what nlm does instead:

``match_tensors_nlm`` for ``match_tensors_permute``: units of every model are assigned to those of
the first, exactly, by signed correlation.

``match_tensors_nlm_zip`` for ``match_tensors_zipit``: units are clustered wherever they are most
alike, in one model or across several, by complete linkage (:mod:`nlm.align.zipping`), which is
ZipIt's greedy matching with alpha = 1 and beta = 1; the two numbers are not read.

A unit without variance correlates with nothing (one of negative variance too, which sums in float32
make); a metric with NaN or inf is refused; the metric is left as it is. Merges are exact means:
ZipIt divides by a sum to which it adds 1e-5.

References: Stoica et al., ZipIt!, arXiv:2305.03053.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nlm.align.zipping import clusters
from nlm.ops import assignment

__all__ = ["match_tensors_nlm", "match_tensors_nlm_zip"]

_WHERE = "nlm.integrations.zipit"
_DEAD = 1e-14  # of the largest variance

Matrices = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, float]


def match_tensors_nlm(
    metric: Mapping[str, Tensor],
    r: float = 0.5,
    get_merge_value: bool = False,
    add_bias: bool = False,
    **kwargs: Any,
) -> Matrices:
    """Every model's units in the order of the first one's, by exact assignment.

    Parameters
    ----------
    metric : with a float matrix ``[N d, N d]`` of all models' units: "covariance", or "cossim".
    r : the share of units that go, 1 - 1/N.
    get_merge_value : whether the mean similarity of what was matched is returned, too.
    add_bias : whether unmerges have a row and a column more for each model's bias.
    kwargs : what else the host passes on to a matching function; not read.

    Returns
    -------
    merges ``[d, N d]``, unmerges ``[N d, d]`` (with a bias ``[N (d + 1), d + 1]``), of PyTorch's
    default type on the metric's device.

    Raises
    ------
    ValueError
        No such matrix, one that is not square, not finite, or has no N models' units, r outside
        [0, 1).
    TypeError
        A matrix of another type than float.
    """
    similarity, device = _similarity(metric)
    models, size = _models(len(similarity), r)
    own = torch.arange(size)
    places = [own]
    if models > 1:
        blocks = similarity[:size].unflatten(1, (models, size)).transpose(0, 1)[1:]
        columns = assignment(blocks.contiguous(), maximize=True).columns  # [N - 1, d]
        places += list(columns.argsort(dim=1))  # unit of a model -> that of the first
    matched = [similarity[place, number * size + own] for number, place in enumerate(places)][1:]
    value = float(torch.cat(matched).mean()) if matched else 1.0
    return _matrices(torch.cat(places), models, size, device, add_bias, value, get_merge_value)


def match_tensors_nlm_zip(
    metric: Mapping[str, Tensor],
    r: float = 0.5,
    get_merge_value: bool = False,
    add_bias: bool = False,
    **kwargs: Any,
) -> Matrices:
    """All models' units clustered wherever they are most alike.

    Parameters
    ----------
    r : the share of units that go; of N d units int((1 - r) N d + 1e-4) are left.
    metric, get_merge_value, add_bias, kwargs : see :func:`match_tensors_nlm`. The value is the mean
        similarity of the pairs of units that became one.

    Returns
    -------
    merges ``[d', N d]``, unmerges ``[N d, d']`` (with a bias ``[N (d + 1), d' + 1]``), of PyTorch's
    default type on the metric's device.

    Raises
    ------
    ValueError, TypeError
        See :func:`match_tensors_nlm`.
    """
    similarity, device = _similarity(metric)
    models, _ = _models(len(similarity), r)
    left = max(1, int(len(similarity) * (1 - r) + 1e-4))
    place = clusters(similarity, left)
    pairs = (place[:, None] == place).triu(1)
    value = float(similarity[pairs].mean()) if bool(pairs.any()) else 1.0
    return _matrices(place, models, left, device, add_bias, value, get_merge_value)


def _similarity(metric: Mapping[str, Tensor]) -> tuple[Tensor, torch.device]:
    """The similarity of all units, float64 on the CPU, and the device of the metric."""
    name = next((each for each in ("covariance", "cossim") if each in metric), None)
    if name is None:
        raise ValueError(
            f"{_WHERE}: a metric has 'covariance' or 'cossim', got "
            f"{', '.join(map(repr, metric)) or 'none'}"
        )
    given = metric[name]
    if not given.is_floating_point():
        raise TypeError(f"{_WHERE}: {name!r} is of a float type, got {given.dtype}")
    if given.dim() != 2 or given.shape[0] != given.shape[1] or not len(given):
        raise ValueError(
            f"{_WHERE}: {name!r} is a square matrix of all models' units, got {list(given.shape)}"
        )
    found = given.detach().cpu().double()
    if bad := int((~found.isfinite()).sum()):
        raise ValueError(
            f"{_WHERE}: {name!r} is finite, got {bad} NaN or inf of {found.numel()} entries"
        )
    if name == "covariance":
        variance = found.diagonal()
        live = variance > _DEAD * variance.max()
        scale = torch.where(live, variance, 1.0).rsqrt() * live
        found = (found * scale[:, None] * scale).clamp_(-1, 1)
    return found, given.device


def _models(units: int, r: float) -> tuple[int, int]:
    """The number of models, and of units of each."""
    if not 0 <= r < 1:
        raise ValueError(f"{_WHERE}: the share of units that go lies in [0, 1), got {r}")
    models = int(1 / (1 - r) + 0.5)
    if units % models:
        raise ValueError(
            f"{_WHERE}: the models have as many units each, got {units} units of {models} models "
            f"(r = {r})"
        )
    return models, units // models


def _matrices(
    place: Tensor,
    models: int,
    left: int,
    device: torch.device,
    add_bias: bool,
    value: float,
    get_merge_value: bool,
) -> Matrices:
    """What maps units to their places, ``place[i]`` that of unit i, and back."""
    unmerge = torch.zeros(len(place), left).scatter_(1, place[:, None], 1.0)
    merge = (unmerge / unmerge.sum(0)).T.contiguous()
    if add_bias:
        parts = []
        for part in unmerge.chunk(models):
            parts.append(torch.nn.functional.pad(part, (0, 1, 0, 1)))
            parts[-1][-1, -1] = 1.0
        unmerge = torch.cat(parts)
    found = merge.to(device), unmerge.to(device)
    return (*found, value) if get_merge_value else found
