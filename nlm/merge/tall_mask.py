"""TALL-masks (Wang et al., arXiv:2405.07813): which entries of a merge each task lives in.

With theta = theta_0 + sum_t tau_t, task t keeps the merged entries where

    |theta_t - theta_0|  >  lambda_t |theta_t - theta|

and theta_0 elsewhere. An entry that no task moved is kept by none. A consensus keeps, for all tasks
alike, the entries that at least k masks have: it drops what serves one task alone or none.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nlm._methods import check_agreement, check_mask_threshold
from nlm._state_dict import StateDict
from nlm.merge.linear import alike
from nlm.merge.task_arithmetic import task_arithmetic
from nlm.ops import tall_mask, tall_mask_agreement, tall_mask_apply


def tall_masks(
    experts: Mapping[str, StateDict],
    base: StateDict,
    merged: StateDict,
    threshold: float | Mapping[str, float],
) -> dict[str, dict[str, Tensor]]:
    """task -> name -> mask of the entries that a task keeps from the merge.

    A mask is uint8, a bit per entry, as :func:`nlm.ops.tall_mask` has it.

    Parameters
    ----------
    experts : task -> state dict; ``base``, the state dict that their task vectors start from.
    merged : the merged state dict.
    threshold : lambda_t > 0, one for all or per task; 0.2 to 0.6 in the paper, chosen per task on
        validation data.

    Raises
    ------
    ValueError
        A task without a threshold, or one that is not positive.
    """
    masks: dict[str, dict[str, Tensor]] = {}
    for task, state in experts.items():
        if isinstance(threshold, Mapping):
            if task not in threshold:
                raise ValueError(
                    f"nlm.merge: there is one mask threshold per task, got none for {task!r}"
                )
            limit = float(threshold[task])
        else:
            limit = float(threshold)
        check_mask_threshold(limit, task)
        masks[task] = {}
        for name, start in base.items():
            expert, origin, whole = alike(state[name], start, merged[name])
            masks[task][name] = tall_mask(expert, origin, whole, limit)
    return masks


def consensus(
    experts: Mapping[str, StateDict],
    base: StateDict,
    scale: float,
    weights: Mapping[str, float],
    threshold: float | Mapping[str, float],
    agreement: int,
) -> dict[str, Tensor]:
    """The base, plus the scaled sum of the task vectors where ``agreement`` masks or more agree.

    Parameters
    ----------
    experts : task -> state dict; ``base``, the state dict that their task vectors start from.
    scale : the factor on the sum; ``weights``, task -> the factor on its task vector.
    threshold : lambda_t of the masks, see :func:`tall_masks`.
    agreement : from 1 to the number of experts.

    Raises
    ------
    ValueError
        An agreement of less than 1 or of more than there are experts, and what
        :func:`tall_masks` raises.
    """
    check_agreement(agreement, len(experts))
    whole = task_arithmetic(experts, base, 1.0, weights)
    masks = tall_masks(experts, base, whole, threshold)
    scaled = task_arithmetic(experts, base, scale, weights)
    merged = {}
    for name, start in base.items():
        kept, _ = tall_mask_agreement(torch.stack([own[name] for own in masks.values()]), agreement)
        merged[name] = tall_mask_apply(kept, start, scaled[name])
    return merged
