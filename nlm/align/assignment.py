"""The linear assignment problem: the permutation p that maximises sum_i similarity[i, p(i)]."""

from torch import Tensor

from nlm import ops


def best_assignment(similarity: Tensor) -> Tensor:
    """The exact optimum of every finite square matrix of a batch [..., n, n], int64 [..., n]."""
    return ops.assignment(similarity.cpu(), maximize=True).columns


def matched(similarity: Tensor, assignment: Tensor) -> Tensor:
    """The entries that assignments pick, [..., n]."""
    return similarity.gather(-1, assignment[..., None].to(similarity.device)).squeeze(-1)
