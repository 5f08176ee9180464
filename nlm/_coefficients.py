"""Coefficients of merges that follow from inner products alone (nlm.ops.inner_products).

``products[i][j]`` is the inner product of the flattened tensors i and j: nested lists or an array.
The formulas and limits are those of mergekit 0.1.5, in float64. Imports no torch.
"""

import math
from collections.abc import Sequence
from typing import Any

_LEAST_NORM = 1e-8  # vectors that are shorter are taken to be of length 1
_LINEAR = 0.9995  # cosine above which two directions are one
_LEAST_NORMS = 1e-6  # the product of two norms that a cosine is divided by at least
_SINGULAR = 1e-6


def slerp(products: Sequence[Any], t: float) -> tuple[float, float]:
    """The factors of two vectors in spherical interpolation (Shoemake, SIGGRAPH 1985).

    With angle a between them, sin((1 - t) a) / sin a and sin(t a) / sin a; 1 - t and t where they
    are nearly parallel, or opposite.
    """
    norms = [math.sqrt(products[k][k]) for k in (0, 1)]
    first, second = (norm if norm > _LEAST_NORM else 1.0 for norm in norms)
    cosine = _clamped(products[0][1] / first / second)
    if abs(cosine) > _LINEAR:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def model_stock(products: Sequence[Any]) -> float:
    """How far to go from the base to the experts' mean (Jang et al., Model Stock, 2403.19522).

    ``products`` are those of K >= 2 task vectors. With c the mean cosine of two of them,
    K c / (1 + (K - 1) c); 0 where that is singular.
    """
    count = len(products)
    norms = [math.sqrt(products[k][k]) for k in range(count)]
    cosines = [
        _clamped(products[i][j] / max(norms[i] * norms[j], _LEAST_NORMS))
        for i in range(count)
        for j in range(i + 1, count)
    ]
    cosine = sum(cosines) / len(cosines)
    below = 1 + (count - 1) * cosine
    return 0.0 if abs(below) < _SINGULAR else count * cosine / below


def _clamped(cosine: float) -> float:
    return max(-1.0, min(1.0, cosine))
