"""TALL-masks (Wang et al., arXiv:2405.07813): which entries of a merge each task lives in.

With theta = theta_0 + sum_t tau_t, task t keeps the merged entries where

    |theta_t - theta_0|  >  lambda_t |theta_t - theta|

and theta_0 elsewhere. An entry that no task moved is kept by none.
"""

from collections.abc import Mapping

from torch import Tensor

from nlm._state_dict import StateDict
from nlm.merge.linear import wide


def tall_masks(
    experts: Mapping[str, StateDict],
    base: StateDict,
    merged: StateDict,
    threshold: float | Mapping[str, float],
) -> dict[str, dict[str, Tensor]]:
    """task -> name -> bool mask of the entries that a task keeps from the merge.

    Parameters
    ----------
    threshold : lambda_t > 0, one for all or per task; 0.2 to 0.6 in the paper, chosen per task on
        validation data.

    Raises
    ------
    ValueError
        A task without a threshold, or one that is not positive.
    """
    masks = {}
    for task, state in experts.items():
        if isinstance(threshold, Mapping):
            if task not in threshold:
                raise ValueError(
                    f"nlm.merge: there is one mask threshold per task, got none for {task!r}"
                )
            limit = float(threshold[task])
        else:
            limit = float(threshold)
        if not limit > 0:
            raise ValueError(f"nlm.merge: a mask threshold is positive, got {limit} for {task!r}")
        masks[task] = {
            name: (wide(state[name]) - wide(start)).abs()
            > limit * (wide(state[name]) - wide(merged[name])).abs()
            for name, start in base.items()
        }
    return masks
