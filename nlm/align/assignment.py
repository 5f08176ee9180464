"""The linear assignment problem: the permutation p that maximises sum_i similarity[i, p(i)]."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def best_assignment(similarity: Tensor) -> Tensor:
    """The exact optimum for a finite square matrix, int64 [n]."""
    _, columns = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).long()


def matched(similarity: Tensor, assignment: Tensor) -> Tensor:
    """The entries that an assignment picks, [n]."""
    return similarity.gather(1, assignment[:, None].to(similarity.device)).squeeze(1)
