"""The linear assignment problem: the permutation p that maximises sum_i similarity[i, p(i)]."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def best_assignment(similarity: Tensor) -> Tensor:
    """The exact optimum of every finite square matrix of a batch [..., n, n], int64 [..., n]."""
    *batch, _, size = similarity.shape
    matrices = similarity.reshape(-1, size, size).cpu().numpy()
    found = torch.empty(len(matrices), size, dtype=torch.int64)
    for number, matrix in enumerate(matrices):
        found[number] = torch.from_numpy(linear_sum_assignment(matrix, maximize=True)[1])
    return found.reshape(*batch, size)


def matched(similarity: Tensor, assignment: Tensor) -> Tensor:
    """The entries that assignments pick, [..., n]."""
    return similarity.gather(-1, assignment[..., None].to(similarity.device)).squeeze(-1)
