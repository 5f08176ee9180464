"""What is kept of task vectors, on arrays: by variance (SCE), importance (Fisher).

:mod:`nlm.merge` applies these to tensors and :mod:`nlm.streaming` to chunks of files. Functions
that say so take arrays of NumPy or tensors of PyTorch: every operation is of single entries and
rounded by itself, so that the bits are the same. Imports no torch.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

_GROUP = 64  # entries of which one partial sum is taken
_LEAST = 1e-37  # a smaller mean importance is none: its inverse is no float32
_BLOCK = 1 << 16  # entries that are summed together, in the cache


class Total:
    r"""A sum of \|x\|^p in float64 whose bits do not depend on the chunks, multiples of 64."""

    def __init__(self, power: int) -> None:
        self.value = 0.0
        self._of = {1: np.abs, 2: np.square}[power]

    def add(self, array: np.ndarray) -> None:
        """Adds the entries of an array, a part at a time that stays in the cache."""
        flat = array.reshape(-1)
        for begin in range(0, flat.size, _BLOCK):
            part = flat[begin : begin + _BLOCK].astype(np.float64)
            self._of(part, out=part)
            whole = part.size // _GROUP * _GROUP
            groups = part[:whole].reshape(-1, _GROUP).sum(axis=1)
            each = [np.array([self.value]), groups, part[whole:]]
            self.value = float(np.cumsum(np.concatenate(each))[-1])  # in order, as `sum` is not


def l1_factor(before: float, after: float) -> float:
    """What gives a task vector its L1 norm back; 1 where nothing is left."""
    return before / after if after > 0 else 1.0


def middle_ranks(density: float, gamma: float, entries: int) -> tuple[int, int]:
    """How many entries breadcrumbs keeps, and how many larger ones it drops."""
    kept = int(density * entries)
    return kept, min(int(gamma * entries), entries - kept)


def variance(vectors: Sequence[Any]) -> Any:
    """The population variance per entry, of arrays or tensors."""
    mean = vectors[0]
    for vector in vectors[1:]:
        mean = mean + vector
    mean = mean / len(vectors)
    total = (vectors[0] - mean) ** 2
    for vector in vectors[1:]:
        total = total + (vector - mean) ** 2
    return total / len(vectors)


def elected_mean(vectors: Sequence[Any], weights: Sequence[Any]) -> Any:
    """The weighted mean of those entries whose sign is that of the sum of all; 0 where none is.

    ``vectors`` are arrays or tensors, ``weights`` scalars of their type.
    """
    vote = vectors[0]
    for vector in vectors[1:]:
        vote = vote + vector
    is_up = vote >= 0
    total: Any = 0
    below: Any = 0
    for vector, weight in zip(vectors, weights, strict=True):
        agrees = (is_up & (vector > 0)) | (~is_up & (vector < 0))
        total = total + (vector * agrees) * weight
        below = below + agrees * weight
    return total / (below + (below == 0))


def sce_weights(squares: Sequence[float]) -> list[float]:
    """The experts' weights from the sums of squares of what is selected; equal where all are 0."""
    total = math.fsum(squares)
    return [each / total if total > 0 else 1 / len(squares) for each in squares]


def importance_unit(sums: Sequence[float], entries: int) -> float:
    """1 / the mean importance of a tensor over its experts, from the sums of each; 1 for 0."""
    mean = math.fsum(sums) / max(1, entries * len(sums))
    return 1 / mean if mean > _LEAST else 1.0


def importance_mean(
    tensors: Iterable[Any],
    importances: Iterable[Any],
    weights: Sequence[Any],
    unit: float,
    floor: float,
) -> Any:
    """sum_k w_k F_k x_k / sum_k w_k F_k of arrays or tensors, ``unit`` F_k at least ``floor``.

    ``weights`` are scalars of the tensors' one type.
    """
    total: Any = 0
    below: Any = 0
    for x, importance, factor in zip(tensors, importances, weights, strict=True):
        weight = (importance * unit).clip(floor, None) * factor
        total = total + weight * x
        below = below + weight
    return total / below


def kth_largest(
    chunks: Callable[[], Iterable[np.ndarray]], share: float, dtype: np.dtype[Any]
) -> float:
    """The least of the int(share * m) largest of numbers that are at least 0, m of them not 0.

    Nothing is stored: each pass over the chunks, two for float32 and four for float64, counts 16
    bits of those numbers that begin as the one that is sought. Infinity where none is.
    """
    bits = np.dtype(f"u{dtype.itemsize}")
    digits = 8 * dtype.itemsize
    found, rank = 0, 0
    for shift in range(digits - 16, -1, -16):
        counts = np.zeros(1 << 16, np.int64)
        for chunk in chunks():
            words = chunk.view(bits)
            if shift + 16 < digits:
                words = words[words >> bits.type(shift + 16) == found]
            else:
                rank += int(np.count_nonzero(words))
            digit = (words >> bits.type(shift)) & bits.type(0xFFFF)
            counts += np.bincount(digit.astype(np.int64), minlength=1 << 16)
        if shift + 16 == digits:
            rank = int(share * rank)
            if rank == 0:
                return math.inf
        above = np.cumsum(counts[::-1])  # how many have this digit or a larger one
        place = int(np.searchsorted(above, rank))
        rank -= int(above[place]) - int(counts[::-1][place])
        found = found << 16 | (0xFFFF - place)
    return float(np.array(found, bits).view(dtype))
