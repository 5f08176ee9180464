"""Frank-Wolfe steps for an assignment whose objective is quadratic.

Where a group stands on both axes of a weight, the objective in its assignment P is

    f(P) = <L, P> + sum_W <W_A, P W_B P^T>,    gradient  L + sum_W (W_A P W_B^T + W_A^T P W_B),

and the best assignment for the gradient can lower f. Between P and that assignment V, both in the
polytope of doubly stochastic matrices, f is a parabola, whose top is known from the gradients at
the two ends:

    f(P + t D) - f(P) = t <grad(P), D> + t^2/2 <grad(V) - grad(P), D>,    D = V - P.

The gradient is affine in P, so that the one at the top lies between those of P and V, and only
gradients at assignments are ever computed (Frank and Wolfe, "An algorithm for quadratic
programming", Naval Research Logistics 3, 1956; Vogelstein et al., "Fast approximate quadratic
programming for graph matching", PLoS ONE 10, 2015).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nlm.align.assignment import best_assignment

_MOST_STEPS = 30
_LEAST_ASCENT = 1e-3  # of the slope towards an assignment, relative to <grad(P), P>


def relaxed(gradient: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The assignment nearest to where the steps from ``start`` end, int64 [..., n].

    Parameters
    ----------
    gradient : assignment int64 [..., n] -> float64 [..., n, n], a new tensor.
    start : int64 [..., n].
    """
    point, slope = _matrix(start), gradient(start)
    for _ in range(_MOST_STEPS):
        vertex = best_assignment(slope)
        step = _matrix(vertex) - point
        ascent = _inner(slope, step)
        if ascent <= _LEAST_ASCENT * abs(_inner(slope, point)):
            break
        bend = gradient(vertex) - slope
        curvature = _inner(bend, step)
        length = 1.0 if ascent + curvature >= 0 else -ascent / curvature
        point.add_(step, alpha=length)
        slope.add_(bend, alpha=length)
    return best_assignment(point)


def _matrix(assignment: Tensor) -> Tensor:
    """float64 [..., n, n] with a 1 in each row."""
    empty = torch.zeros(*assignment.shape, assignment.shape[-1], dtype=torch.float64)
    return empty.scatter_(-1, assignment[..., None], 1.0)


def _inner(a: Tensor, b: Tensor) -> float:
    """The sum of products, row by row: the same for any number of threads."""
    return math.fsum((a * b).sum(-1).flatten().tolist())
