"""SCE of chunks: select by variance, calculate weights, erase by sign."""

from collections.abc import Iterator

import numpy as np

from nlm._methods import check_select
from nlm._sparse import Total, elected_mean, kth_largest, sce_weights, variance
from nlm.streaming import kernels
from nlm.streaming.kernels import WIDE, Block
from nlm.streaming.methods.method import Buffers, Method, Piece, chunks, wide_array


class Sce(Method):
    """The entries in which the experts differ most, weighted by their squares, of one sign."""

    scratch = 10
    selects = True
    _least: float
    _shares: list[float]

    def begin(self, piece: Piece, buffers: Buffers) -> None:
        select = self.value("select", None, piece.name)
        check_select(select)
        self._least = 0.0
        if select < 1:

            def variances() -> Iterator[np.ndarray]:
                for at in chunks(piece, buffers):
                    yield variance(self._vectors(piece, *at, buffers))

            self._least = kth_largest(variances, select, WIDE[piece.wide_type()])
        totals = [Total(2) for _ in piece.experts]
        for begin, size in chunks(piece, buffers):
            for total, vector in zip(
                totals, self._selected(piece, begin, size, buffers), strict=True
            ):
                total.add(vector)
        self._shares = sce_weights([total.value for total in totals])

    def fill(self, piece: Piece, begin: int, size: int, target: Block, buffers: Buffers) -> None:
        assert piece.base is not None
        wide = piece.wide_type()
        vectors = self._selected(piece, begin, size, buffers)
        moved = elected_mean(vectors, [WIDE[wide].type(share) for share in self._shares])
        moved *= WIDE[wide].type(self.value("scale", None, piece.name))
        start = wide_array(piece.base.at(begin), "start", wide, size, buffers)
        np.add(start, moved, out=start)
        kernels.converted(buffers.block("start", wide), target, size)

    def _vectors(self, piece: Piece, begin: int, size: int, buffers: Buffers) -> list[np.ndarray]:
        """A chunk of every task vector."""
        assert piece.base is not None
        wide = piece.wide_type()
        start = wide_array(piece.base.at(begin), "start", wide, size, buffers)
        found = []
        for k, block in enumerate(piece.experts.values()):
            vector = wide_array(block.at(begin), f"left {k}", wide, size, buffers)
            found.append(np.subtract(vector, start, out=vector))
        return found

    def _selected(self, piece: Piece, begin: int, size: int, buffers: Buffers) -> list[np.ndarray]:
        """The same, 0 where the experts differ too little."""
        vectors = self._vectors(piece, begin, size, buffers)
        if self._least > 0:
            keeps = variance(vectors) >= self._least
            for vector in vectors:
                np.multiply(vector, keeps, out=vector)
        return vectors
