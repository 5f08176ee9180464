"""TIES of chunks: trim, elect a sign, average those who agree."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nlm._methods import kept_entries
from nlm.streaming import kernels
from nlm.streaming.kernels import Block, wide_type
from nlm.streaming.methods.method import Buffers, Method, Piece


@dataclass
class Ties(Method):
    """Trim, elect a sign, average those who agree: the three dialects of :mod:`nlm.merge.ties`."""

    dialect: str = "global"
    trims: bool = True
    _limits: dict[str, np.ndarray] = field(default_factory=dict)
    _everywhere: np.ndarray | None = None
    _ballots: dict[str, np.ndarray] = field(default_factory=dict)
    _against: bool = False
    scratch = 2
    selects = True

    def __post_init__(self) -> None:
        kept_entries(1.0, 0, self.dialect)
        self.surveys = self.trims and self.dialect == "global"

    def survey(self, pieces: Sequence[Piece]) -> None:
        limits = []
        for task in pieces[0].experts:
            densities = {self.value("density", task, piece.name) for piece in pieces}
            if len(densities) > 1:
                raise ValueError(
                    "nlm.merge: the global dialect of TIES trims all tensors together, with one "
                    f"density, got {min(densities)} to {max(densities)} for {task!r}"
                )
            limits.append(_limit(pieces, task, densities.pop(), self.dialect))
        self._everywhere = np.stack(limits)

    def begin(self, piece: Piece, buffers: Buffers) -> None:
        if self._everywhere is not None:
            self._limits[piece.name] = self._everywhere
        elif self.trims:
            densities = {t: self.value("density", t, piece.name) for t in piece.experts}
            limits = [_limit([piece], t, d, self.dialect) for t, d in densities.items()]
            self._limits = {piece.name: np.stack(limits)}
        else:
            self._limits = {piece.name: np.zeros(len(piece.experts))}
        if not self._against:
            self._ballots[piece.name] = np.zeros(2, np.int64)

    def fill(self, piece: Piece, begin: int, size: int, target: Block, buffers: Buffers) -> None:
        base, experts = self._at(piece, begin)
        assert base is not None
        self.fill_from(piece, base, experts, size, target, buffers)

    def fill_from(
        self,
        piece: Piece,
        base: Block,
        experts: Sequence[Block],
        size: int,
        target: Block,
        buffers: Buffers,
    ) -> None:
        """Merges one chunk of these experts."""
        start, result = base, target
        if base.dtype != target.dtype:
            wide = wide_type(base, target)
            result = buffers.block("merged", wide)
            if base.dtype != wide:
                start = buffers.block("start", wide)
                kernels.converted(base, start, size)
            if target.dtype == wide:
                result = target
        scale = self.value("scale", None, piece.name)
        ballot = kernels.sign_merge(
            start, experts, self._weights(piece), self._limits[piece.name], scale, self.dialect,
            result, size, self._against,
        )  # fmt: skip
        if not self._against:
            self._ballots[piece.name] += ballot
        if result != target:
            kernels.converted(result, target, size)

    def ballots(self) -> dict[str, list[int]]:
        """name -> the sum of the signs of all votes, and how many are 0 with entries kept."""
        return {name: ballot.tolist() for name, ballot in self._ballots.items()}

    def remember(self, ballots: Mapping[str, Sequence[int]]) -> None:
        """Takes over the ballots of tensors that were merged before."""
        self._ballots |= {name: np.array(ballot, np.int64) for name, ballot in ballots.items()}

    def again(self) -> tuple[str, ...]:
        if self.dialect != "global" or sum(int(each[0]) for each in self._ballots.values()) >= 0:
            return ()
        self._against = True
        return tuple(name for name, ballot in self._ballots.items() if ballot[1])


def _limit(pieces: Sequence[Piece], task: str, density: float, dialect: str) -> np.ndarray:
    """The least magnitude that TIES keeps."""
    entries = sum(piece.size for piece in pieces)
    return limit_at(pieces, task, kept_entries(density, entries, dialect))


def limit_at(pieces: Sequence[Piece], task: str, kept: int) -> np.ndarray:
    """The kept-th largest magnitude: 0 where all entries are kept, infinity where none is."""
    entries = sum(piece.size for piece in pieces)
    if not 0 < kept < entries:
        return np.asarray(0.0 if kept >= entries else math.inf)
    pairs = [(p.experts[task], p.base, p.size) for p in pieces if p.base is not None]
    return kernels.magnitude_threshold(pairs, kept).astype(np.float64)
