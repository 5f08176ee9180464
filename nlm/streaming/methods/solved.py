"""RegMean of chunks: the weights of linear layers by least squares, all else averaged."""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from nlm._least_squares import LeastSquares
from nlm._methods import check_alpha
from nlm.streaming import kernels
from nlm.streaming.kernels import Block
from nlm.streaming.methods.method import Buffers, Piece
from nlm.streaming.methods.sums import UniformSoup


@dataclass
class RegMean(UniformSoup):
    """A chunk is solved from the whole rows that it has entries of; the Gram matrices of a layer,
    one of each expert and their sum, are held.

    Attributes
    ----------
    columns : names of weights that are [inputs, outputs], which are solved whole.
    """

    columns: Collection[str] = ()
    _solver: LeastSquares | None = None
    _whole: np.ndarray | None = field(default=None, repr=False)
    scratch = 6
    selects = True

    def begin(self, piece: Piece, buffers: Buffers) -> None:
        alpha = self.value("alpha", None, piece.name)
        check_alpha(alpha)
        self._solver = self._whole = None
        if len(piece.curvatures) < len(piece.experts):
            return
        inputs = piece.shape[0 if piece.name in self.columns else 1]
        grams = [_wide(piece.curvatures[task], inputs, inputs) for task in piece.experts]
        self._solver = LeastSquares(piece.name, grams, alpha)
        if piece.name in self.columns:
            weights = [_wide(each, *piece.shape).T for each in piece.experts.values()]
            self._whole = np.ascontiguousarray(self._solver.rows(weights).T).reshape(-1)

    def fill(self, piece: Piece, begin: int, size: int, target: Block, buffers: Buffers) -> None:
        if self._solver is None:
            super().fill(piece, begin, size, target, buffers)
            return
        if self._whole is not None:
            solved = self._whole[begin : begin + size]
        else:
            length = piece.shape[1]
            first, last = begin // length, -(-(begin + size) // length)
            weights = [
                _wide(each.at(first * length), last - first, length)
                for each in piece.experts.values()
            ]
            solved = self._solver.rows(weights).reshape(-1)[begin - first * length :][:size]
        made = np.ascontiguousarray(solved)
        kernels.converted(Block(made.ctypes.data, "F64"), target, size)


def _wide(block: Block, rows: int, columns: int) -> np.ndarray:
    """A copy of a block's first elements as a matrix, float64."""
    made = np.empty((rows, columns))
    kernels.converted(block, Block(made.ctypes.data, "F64"), made.size)
    return made
