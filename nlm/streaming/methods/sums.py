"""Methods that are sums: of experts, or of their task vectors, with weights per tensor or entry."""

from collections.abc import Iterator, Mapping

import numpy as np

from nlm import _coefficients
from nlm._methods import check_floor, check_importance
from nlm._sparse import Total, importance_mean, importance_unit
from nlm.streaming import kernels
from nlm.streaming.kernels import WIDE, Block, wide_type
from nlm.streaming.methods.method import Buffers, Method, Piece, chunks, wide_array


class Linear(Method):
    """The weighted mean."""

    needs_base = False

    @property
    def is_mean(self) -> bool:
        return self.normalize

    def begin(self, piece: Piece, buffers: Buffers) -> None:
        if self.is_mean and sum(self._weights(piece)) == 0:
            raise ValueError(
                f"nlm.merge: the weights of a mean do not sum to zero, got {self._weights(piece)} "
                f"for {piece.name!r}"
            )

    def fill(self, piece: Piece, begin: int, size: int, target: Block, buffers: Buffers) -> None:
        _, experts = self._at(piece, begin)
        weights, divisor = self._weights(piece), self._divisor(piece)
        kernels.weighted_sum(None, experts, weights, target, size, divisor)


class UniformSoup(Linear):
    """The plain mean: every weight is 1."""

    def _weights(self, piece: Piece) -> list[float]:
        return [1.0] * len(piece.experts)


class Slerp(Method):
    """Spherical interpolation between two experts."""

    needs_base = False
    _factors: tuple[float, float]

    def begin(self, piece: Piece, buffers: Buffers) -> None:
        if len(piece.experts) != 2:
            raise ValueError(f"nlm.merge: 'slerp' merges two experts, got {len(piece.experts)}")
        products = kernels.inner_products(None, list(piece.experts.values()), piece.size)
        self._factors = _coefficients.slerp(products.tolist(), self.value("t", None, piece.name))

    def fill(self, piece: Piece, begin: int, size: int, target: Block, buffers: Buffers) -> None:
        kernels.weighted_sum(None, self._at(piece, begin)[1], self._factors, target, size)


class ModelStock(Method):
    """From the base towards the experts' mean, as far as their angles say."""

    _ratio: float

    def begin(self, piece: Piece, buffers: Buffers) -> None:
        if len(piece.experts) < 2:
            raise ValueError(
                f"nlm.merge: 'model_stock' merges two experts or more, got {len(piece.experts)}"
            )
        vectors = list(piece.experts.values())
        products = kernels.inner_products(piece.base, vectors, piece.size)
        self._ratio = _coefficients.model_stock(products.tolist())

    def fill(self, piece: Piece, begin: int, size: int, target: Block, buffers: Buffers) -> None:
        base, experts = self._at(piece, begin)
        count = len(experts)
        kernels.weighted_sum(base, experts, [1.0] * count, target, size, count, self._ratio)


class TaskArithmetic(Method):
    """The base plus the scaled sum of the task vectors."""

    def fill(self, piece: Piece, begin: int, size: int, target: Block, buffers: Buffers) -> None:
        base, experts = self._at(piece, begin)
        scale, divisor = self._scale(piece), self._divisor(piece)
        kernels.weighted_sum(base, experts, self._weights(piece), target, size, divisor, scale)

    def _scale(self, piece: Piece) -> float:
        return self.value("scale", None, piece.name)


class Fisher(Linear):
    """The mean weighted by the experts' Fisher information, entry by entry."""

    scratch = 7
    is_mean = True
    _unit: float

    def begin(self, piece: Piece, buffers: Buffers) -> None:
        super().begin(piece, buffers)
        check_floor(self.value("floor", None, piece.name))
        if missing := [task for task in piece.experts if task not in piece.curvatures]:
            raise ValueError(
                f"nlm.merge: Fisher averaging has the Fisher information of every expert, got none "
                f"for {', '.join(map(repr, missing))}"
            )

        totals = [self._total(piece, task, buffers) for task in piece.experts]
        self._unit = importance_unit(totals, piece.size)

    def _total(self, piece: Piece, task: str, buffers: Buffers) -> float:
        """The sum of an expert's Fisher information in a tensor."""
        total = Total(1)
        wide = self._wide(piece)
        for begin, size in chunks(piece, buffers):
            part = wide_array(piece.curvatures[task].at(begin), "fisher", wide, size, buffers)
            check_importance(float(part.min()), piece.name, task)
            total.add(part)
        check_importance(total.value, piece.name, task)
        return total.value

    def _wide(self, piece: Piece) -> str:
        return wide_type(*piece.experts.values(), *piece.curvatures.values())

    def fill(self, piece: Piece, begin: int, size: int, target: Block, buffers: Buffers) -> None:
        wide = self._wide(piece)

        def each(blocks: Mapping[str, Block], name: str) -> Iterator[np.ndarray]:
            for task in piece.experts:  # one buffer for all: the mean reads them in turn
                yield wide_array(blocks[task].at(begin), name, wide, size, buffers)

        weights = [WIDE[wide].type(weight) for weight in self._weights(piece)]
        merged = buffers.array("merged", wide, size)
        merged[:] = importance_mean(
            each(piece.experts, "expert"), each(piece.curvatures, "fisher"), weights, self._unit,
            self.value("floor", None, piece.name),
        )  # fmt: skip
        kernels.converted(buffers.block("merged", wide), target, size)
