"""Methods on what is left of the task vectors, when some of their entries have been dropped.

At random (DARE), by magnitude (breadcrumbs), or at random by the rank of the magnitude (DELLA);
then Task Arithmetic, or TIES without trimming.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from nlm._methods import check_dropping, check_middle, check_ranked, tensor_seed
from nlm._random import RANKED
from nlm._sparse import Total, l1_factor, middle_ranks
from nlm.streaming import kernels
from nlm.streaming.kernels import WIDE, Block, wide_type
from nlm.streaming.methods.method import Buffers, Method, Piece, chunks, wide_array, widened
from nlm.streaming.methods.ties import Ties, limit_at


@dataclass
class Sparse(Method):
    """What the methods of this family share.

    Attributes
    ----------
    ties : what elects signs; None for the sum.
    """

    ties: Ties | None = None
    scratch = 5
    selects = True

    def begin(self, piece: Piece, buffers: Buffers) -> None:
        if self.ties is not None:
            self.ties.begin(piece, buffers)

    def fill(self, piece: Piece, begin: int, size: int, target: Block, buffers: Buffers) -> None:
        base, _ = self._at(piece, begin)
        assert base is not None
        left = [
            self._left(piece, task, begin, size, buffers, f"left {k}")
            for k, task in enumerate(piece.experts)
        ]
        if self.ties is not None:
            self.ties.fill_from(piece, base, left, size, target, buffers)
            return
        scale, divisor = self.value("scale", None, piece.name), self._divisor(piece)
        kernels.weighted_sum(base, left, self._weights(piece), target, size, divisor, scale)

    def again(self) -> tuple[str, ...]:
        return () if self.ties is None else self.ties.again()

    def _left(
        self, piece: Piece, task: str, begin: int, size: int, buffers: Buffers, name: str
    ) -> Block:
        """A chunk of the base plus what is left of one task vector, in a wide type."""
        raise NotImplementedError


@dataclass
class Drawn(Sparse):
    """Entries are dropped at random: what DARE and DELLA share."""

    seed: int = 0
    rescale: str = "expected"
    _factors: dict[str, float] = field(default_factory=dict)

    def begin(self, piece: Piece, buffers: Buffers) -> None:
        for task in piece.experts:
            self._check(piece, task)
        self._factors = {}
        if self.rescale == "l1":
            self._factors = {task: self._factor(piece, task, buffers) for task in piece.experts}
        super().begin(piece, buffers)

    def _check(self, piece: Piece, task: str) -> None:
        """Raises ValueError where an expert's numbers are out of range."""
        raise NotImplementedError

    def _factor(self, piece: Piece, task: str, buffers: Buffers) -> float:
        """What gives what is left of a task vector its L1 norm."""
        raise NotImplementedError


@dataclass
class Dare(Drawn):
    """Entries are dropped at random, all with one probability."""

    def _check(self, piece: Piece, task: str) -> None:
        check_dropping(self.value("drop", task, piece.name), self.seed, self.rescale)

    def _left(
        self, piece: Piece, task: str, begin: int, size: int, buffers: Buffers, name: str
    ) -> Block:
        assert piece.base is not None
        wide = wide_type(piece.base, piece.experts[task])
        start = widened(piece.base.at(begin), "start", wide, size, buffers)
        expert = widened(piece.experts[task].at(begin), "expert", wide, size, buffers)
        target = buffers.block(name, wide)
        drop = self.value("drop", task, piece.name)
        seed = tensor_seed(self.seed, task, piece.name)
        factors = {"expected": 1 / (1 - drop), "none": 1.0}
        factor = self._factors[task] if self.rescale == "l1" else factors[self.rescale]
        kernels.dare(expert, start, target, size, drop, seed, begin, factor)
        return target

    def _factor(self, piece: Piece, task: str, buffers: Buffers) -> float:
        assert piece.base is not None
        wide = wide_type(piece.base, piece.experts[task])
        drop, seed = self.value("drop", task, piece.name), tensor_seed(self.seed, task, piece.name)

        def parts() -> Iterable[tuple[np.ndarray, np.ndarray]]:
            for begin, size in chunks(piece, buffers):
                vector = _vector(piece, task, begin, size, buffers)
                zero, left = (buffers.array(name, wide, size) for name in ("start", "left 0"))
                zero[:] = 0
                expert, start, target = (
                    buffers.block(name, wide) for name in ("expert", "start", "left 0")
                )
                kernels.dare(expert, start, target, size, drop, seed, begin, 1.0)
                yield vector, left

        return _l1_factor(parts)


@dataclass
class Breadcrumbs(Sparse):
    """The largest entries and the smallest are dropped."""

    _limits: dict[str, tuple[float, float]] = field(default_factory=dict)

    def begin(self, piece: Piece, buffers: Buffers) -> None:
        self._limits = {task: self._found(piece, task) for task in piece.experts}
        super().begin(piece, buffers)

    def _found(self, piece: Piece, task: str) -> tuple[float, float]:
        """The least magnitude that is kept, and the least that is too large."""
        density, gamma = (self.value(name, task, piece.name) for name in ("density", "gamma"))
        check_middle(density, gamma)
        kept, larger = middle_ranks(density, gamma, piece.size)
        least = float(limit_at([piece], task, kept + larger)) if kept else math.inf
        return least, float(limit_at([piece], task, larger)) if larger else math.inf

    def _left(
        self, piece: Piece, task: str, begin: int, size: int, buffers: Buffers, name: str
    ) -> Block:
        assert piece.base is not None
        wide = wide_type(piece.base, piece.experts[task])
        start = wide_array(piece.base.at(begin), "start", wide, size, buffers)
        expert = wide_array(piece.experts[task].at(begin), "expert", wide, size, buffers)
        target = buffers.array(name, wide, size)
        magnitude = np.abs(np.subtract(expert, start, out=target), out=target)
        least, too_large = self._limits[task]
        keeps = (magnitude >= least) & (magnitude < too_large)
        np.copyto(target, start)
        np.copyto(target, expert, where=keeps)
        return buffers.block(name, wide)


@dataclass
class Della(Drawn):
    """Entries are dropped at random, the smaller ones of a row more often.

    A chunk is computed from the whole rows that it has entries of, which are of 2^20 entries at
    most: longer ones are cut (:mod:`nlm.ops.magprune`). One that is longer than a chunk is held,
    for each expert.
    """

    _held: dict[str, tuple[tuple[str, int, int], np.ndarray]] = field(default_factory=dict)
    scratch = 8

    def _check(self, piece: Piece, task: str) -> None:
        check_dropping(0.0, self.seed, self.rescale)
        check_ranked(*self._numbers(piece, task))

    def _numbers(self, piece: Piece, task: str) -> tuple[float, float]:
        density, epsilon = (self.value(n, task, piece.name) for n in ("density", "epsilon"))
        return density, epsilon

    def _left(
        self, piece: Piece, task: str, begin: int, size: int, buffers: Buffers, name: str
    ) -> Block:
        assert piece.base is not None
        wide = wide_type(piece.base, piece.experts[task])
        start = wide_array(piece.base.at(begin), "start", wide, size, buffers)
        left = buffers.array(name, wide, size)
        left[:] = self._kept(piece, task, begin, size, wide)
        if task in self._factors:
            left *= WIDE[wide].type(self._factors[task])
        left += start
        return buffers.block(name, wide)

    def _kept(self, piece: Piece, task: str, begin: int, size: int, wide: str) -> np.ndarray:
        """A chunk of what is left of a task vector, not yet of its L1 norm."""
        length = piece.size // piece.shape[0] if len(piece.shape) > 1 else piece.size
        if length <= RANKED:
            first, last = begin // length, -(-(begin + size) // length)
            rows = self._rows(piece, task, first * length, (last - first, length), size, wide)
            return rows[begin - first * length :][:size]
        parts = []
        at = begin
        while at < begin + size:  # the segments of long rows that the chunk has entries of
            row, place = divmod(at, length)
            start = place // RANKED * RANKED
            count = min(RANKED, length - start)
            left = self._rows(piece, task, row * length + start, (1, count), size, wide)
            parts.append(left[place - start :][: begin + size - at])
            at += len(parts[-1])
        return np.concatenate(parts)

    def _rows(
        self, piece: Piece, task: str, begin: int, shape: tuple[int, int], size: int, wide: str
    ) -> np.ndarray:
        """What is left of whole rows of a task vector, flat; a chunk that asks has ``size``."""
        place = piece.name, begin, shape[0]
        if self._held.get(task, ((), None))[0] == place:
            return self._held[task][1]
        assert piece.base is not None
        vector, left = np.empty((2, shape[0] * shape[1]), WIDE[wide])
        source, target = (Block(array.ctypes.data, wide) for array in (vector, left))
        pair = [piece.experts[task].at(begin), piece.base.at(begin)]
        kernels.weighted_sum(None, pair, [1.0, -1.0], source, len(vector))
        kernels.magprune(
            source, target, *shape, *self._numbers(piece, task),
            tensor_seed(self.seed, task, piece.name), begin, self.rescale == "expected",
        )  # fmt: skip
        self._held.pop(task, None)
        if size < shape[1]:
            self._held[task] = place, left
        return left

    def _factor(self, piece: Piece, task: str, buffers: Buffers) -> float:
        assert piece.base is not None
        wide = wide_type(piece.base, piece.experts[task])

        def parts() -> Iterable[tuple[np.ndarray, np.ndarray]]:
            for begin, size in chunks(piece, buffers):
                vector = _vector(piece, task, begin, size, buffers)
                yield vector, self._kept(piece, task, begin, size, wide)

        return _l1_factor(parts)


def _vector(piece: Piece, task: str, begin: int, size: int, buffers: Buffers) -> np.ndarray:
    """A chunk of one task vector, in the buffer "expert"."""
    assert piece.base is not None
    wide = wide_type(piece.base, piece.experts[task])
    start = wide_array(piece.base.at(begin), "start", wide, size, buffers)
    vector = wide_array(piece.experts[task].at(begin), "expert", wide, size, buffers)
    return np.subtract(vector, start, out=vector)


def _l1_factor(parts: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]) -> float:
    """What gives the second of pairs of chunks the L1 norm of the first."""
    before, after = Total(1), Total(1)
    for vector, left in parts():
        before.add(vector)
        after.add(left)
    return l1_factor(before.value, after.value)
