"""SCE (Wan et al., FuseChat, arXiv:2408.07990): select, calculate, erase; tensor by tensor.

Of the entries in which the task vectors differ the share ``select`` with the largest variance over
the experts is kept. Expert k weighs w_k = sum tau_k^2 / sum_j sum tau_j^2 of what is kept. Per
entry the sign of sum_k tau_k is elected (0 counts +), and the others are erased:

theta = theta_0 + scale * sum_k w_k tau_k / sum_k w_k, over the experts that have the sign.

mergekit takes equal weights where the mean squares sum to less than 1e-6, as those of most
fine-tuned models do; here they are equal only where nothing is kept.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nlm._methods import check_select
from nlm._sparse import elected_mean, sce_weights, variance
from nlm._state_dict import StateDict
from nlm.merge.dare import powers, wide
from nlm.merge.linear import alike
from nlm.ops import magnitude_threshold


def sce(
    experts: Mapping[str, StateDict], base: StateDict, scale: float, select: float
) -> dict[str, Tensor]:
    """The merged entries, in the base's dtype.

    Parameters
    ----------
    experts : task -> state dict; ``base``, the state dict that their task vectors start from.
    scale : the factor on the merged task vector.
    select : the share of each tensor's entries, those that vary most among the experts, in (0, 1].

    Raises
    ------
    ValueError
        A share outside (0, 1].
    """
    check_select(select)
    merged = {}
    for name, start in base.items():
        origin, *models = alike(wide(start), *(wide(state[name]) for state in experts.values()))
        vectors = [model - origin for model in models]
        if select < 1:
            keeps = _differ_most(variance(vectors), select)
            vectors = [vector * keeps for vector in vectors]
        shares = [origin.new_tensor(w) for w in sce_weights([powers(v, 2) for v in vectors])]
        moved = elected_mean(vectors, shares) * origin.new_tensor(scale)
        merged[name] = (origin + moved).to(start.dtype)
    return merged


def _differ_most(variances: Tensor, select: float) -> Tensor:
    kept = int(select * int(variances.count_nonzero()))
    if kept == 0:
        return torch.zeros_like(variances, dtype=torch.bool)
    return variances >= magnitude_threshold([variances], kept)
