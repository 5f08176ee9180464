"""Philox4x32-10, the counter-based generator of all that is drawn: on arrays of NumPy or PyTorch.

The random numbers of a position follow from it and the seed alone (Salmon et al., Parallel Random
Numbers: As Easy as 1, 2, 3, SC 2011). Imports no torch.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

LOW = 0xFFFFFFFF
RANKED = 1 << 20  # entries that are ranked together at most
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85


def philox(counter: Sequence[Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Four random words for four words of counters, int64 ``[n]`` each."""
    x0, x1, x2, x3 = counter
    for _ in range(10):
        # Products of 64 bits wrap around to a negative int64; its bits are theirs.
        product0, product1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0 = (product1 >> 32) & LOW ^ x1 ^ key[0]
        x2 = (product0 >> 32) & LOW ^ x3 ^ key[1]
        x1, x3 = product1 & LOW, product0 & LOW
        key = (key[0] + _WEYL[0]) & LOW, (key[1] + _WEYL[1]) & LOW
    return x0, x1, x2, x3


@lru_cache(maxsize=16)
def chances_by_rank(
    length: int, density: float, epsilon: float, rescale: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Per rank of ``length``: words below the first, uint32, are dropped, and the entries of others
    multiplied by the second, float64: 1 over the probability to be kept, or 1.

    That is from density - epsilon for the smallest to density + epsilon for the largest; 1 for all
    where the density is 1.
    """
    shares = np.linspace(density - epsilon, density + epsilon, length)
    shares = np.ones(length) if density >= 1 else shares
    factors = 1 / shares if rescale else np.ones(length)
    return ((1 - shares) * 2.0**32).astype(np.uint32), factors
