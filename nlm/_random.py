"""Philox4x32-10, the counter-based generator of all that is drawn: on arrays of NumPy or PyTorch.

The random numbers of a position follow from it and the seed alone (Salmon et al., Parallel Random
Numbers: As Easy as 1, 2, 3, SC 2011). Imports neither.
"""

from collections.abc import Sequence
from typing import Any

LOW = 0xFFFFFFFF
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
