"""The linear assignment problem: the permutation p that maximises sum_i similarity[i, p(i)]."""

from torch import Tensor

from nlm import ops
from nlm.ops import Assignment


def best_assignment(similarity: Tensor) -> Tensor:
    """The exact optimum of every finite square matrix of a batch [..., n, n], int64 [..., n]."""
    return solved(similarity).columns


def solved(similarity: Tensor, start: Assignment | None = None) -> Assignment:
    """The same with what a later one starts from, of a similarity that has changed a little."""
    return ops.assignment(similarity.cpu(), maximize=True, start=start)


def matched(similarity: Tensor, assignment: Tensor) -> Tensor:
    """The entries that assignments pick, [..., n]."""
    return similarity.gather(-1, assignment[..., None].to(similarity.device)).squeeze(-1)
