"""The merge methods, tensor by tensor and chunk by chunk.

A method sees each tensor whole before it is merged (:meth:`Method.begin`: thresholds, norms,
coefficients), all tensors before the first where it needs them (:meth:`Method.survey`), and then
fills chunks of the result, any chunk in any order. The results are those of :func:`nlm.merge`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nlm import _coefficients
from nlm._core import DIALECTS
from nlm._methods import OPTIONS, RESCALES, check_dropping, kept_entries, tensor_seed
from nlm.streaming import kernels
from nlm.streaming.kernels import WIDE, Block, wide_type

_LEAST_WEIGHT = 1e-8  # a smaller sum of weights divides nothing

Value = Callable[[str, str | None, str], float]
"""(parameter, expert or None, tensor) -> its number."""


@dataclass(frozen=True)
class Piece:
    """A tensor to merge: its base and its experts in the address space."""

    name: str
    size: int
    base: Block | None
    experts: Mapping[str, Block]


class Buffers:
    """Working memory for chunks of at most so many elements, allocated once."""

    def __init__(self, elements: int) -> None:
        self.elements = elements
        self._arrays: dict[str, np.ndarray] = {}

    def block(self, name: str, dtype: str) -> Block:
        """The buffer of a name, as elements of a type."""
        return Block(self.array(name, dtype, 0).ctypes.data, dtype)

    def array(self, name: str, dtype: str, size: int) -> np.ndarray:
        """The first elements of a buffer, of a type that NumPy has."""
        if name not in self._arrays:
            self._arrays[name] = np.empty(self.elements, np.float64)
        return self._arrays[name].view(WIDE[dtype] if dtype in WIDE else np.uint16)[:size]


@dataclass
class Method:
    """A way to merge.

    Attributes
    ----------
    value : the numbers of its parameters, which may differ from tensor to tensor.
    normalize : whether a sum is divided by the sum of its weights.
    """

    value: Value
    normalize: bool = False
    needs_base = True
    surveys = False
    scratch = 0

    def survey(self, pieces: Sequence[Piece]) -> None:
        """Reads all tensors, before the first is merged."""

    def begin(self, piece: Piece, buffers: Buffers) -> None:
        """Reads a tensor, before its first chunk."""

    def fill(self, piece: Piece, begin: int, size: int, target: Block, buffers: Buffers) -> None:
        """Writes elements ``begin`` to ``begin + size`` of the merged tensor."""
        raise NotImplementedError

    def again(self) -> tuple[str, ...]:
        """The tensors that are to be filled once more, after the last."""
        return ()

    def _weights(self, piece: Piece) -> list[float]:
        return [self.value("weight", task, piece.name) for task in piece.experts]

    def _divisor(self, piece: Piece) -> float:
        total = sum(self._weights(piece)) if self.normalize else 1.0
        return total if abs(total) > _LEAST_WEIGHT else 1.0

    def _at(self, piece: Piece, begin: int) -> tuple[Block | None, list[Block]]:
        base = None if piece.base is None else piece.base.at(begin)
        return base, [block.at(begin) for block in piece.experts.values()]


class Linear(Method):
    """The weighted mean."""

    needs_base = False

    def begin(self, piece: Piece, buffers: Buffers) -> None:
        if self.normalize and sum(self._weights(piece)) == 0:
            raise ValueError(
                f"nlm.merge: the weights of a mean do not sum to zero, got {self._weights(piece)} "
                f"for {piece.name!r}"
            )

    def fill(self, piece: Piece, begin: int, size: int, target: Block, buffers: Buffers) -> None:
        _, experts = self._at(piece, begin)
        weights, divisor = self._weights(piece), self._divisor(piece)
        kernels.weighted_sum(None, experts, weights, target, size, divisor)


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
        scale, divisor = self.value("scale", None, piece.name), self._divisor(piece)
        kernels.weighted_sum(base, experts, self._weights(piece), target, size, divisor, scale)


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


@dataclass
class Dare(Method):
    """Random drop and rescale before Task Arithmetic, or before TIES without trimming."""

    seed: int = 0
    rescale: str = "expected"
    ties: Ties | None = None
    _factors: dict[str, np.ndarray] = field(default_factory=dict)
    scratch = 5

    def begin(self, piece: Piece, buffers: Buffers) -> None:
        for task in piece.experts:
            check_dropping(self.value("drop", task, piece.name), self.seed, self.rescale)
        if self.rescale == "l1":
            self._factors = {t: self._factor(piece, t, buffers) for t in piece.experts}
        if self.ties is not None:
            self.ties.begin(piece, buffers)

    def fill(self, piece: Piece, begin: int, size: int, target: Block, buffers: Buffers) -> None:
        base, _ = self._at(piece, begin)
        assert base is not None
        dropped = [
            self._dropped(piece, task, begin, size, buffers, f"dropped {k}")
            for k, task in enumerate(piece.experts)
        ]
        if self.ties is not None:
            self.ties.fill_from(piece, base, dropped, size, target, buffers)
            return
        scale, divisor = self.value("scale", None, piece.name), self._divisor(piece)
        kernels.weighted_sum(base, dropped, self._weights(piece), target, size, divisor, scale)

    def again(self) -> tuple[str, ...]:
        return () if self.ties is None else self.ties.again()

    def _dropped(
        self, piece: Piece, task: str, begin: int, size: int, buffers: Buffers, name: str
    ) -> Block:
        """A chunk of the base plus what is left of one task vector, in a wide type."""
        assert piece.base is not None
        wide = wide_type(piece.base, piece.experts[task])
        if self.rescale == "l1":
            kept = self._vectors(piece, task, begin, size, buffers, name)[1]
            base = buffers.array("start", wide, size)
            kernels.converted(piece.base.at(begin), buffers.block("start", wide), size)
            np.multiply(kept, self._factors[task], out=kept)
            np.add(base, kept, out=kept)
            return buffers.block(name, wide)
        start = self._wide(piece.base.at(begin), "start", wide, size, buffers)
        expert = self._wide(piece.experts[task].at(begin), "expert", wide, size, buffers)
        target = buffers.block(name, wide)
        drop = self.value("drop", task, piece.name)
        seed = tensor_seed(self.seed, task, piece.name)
        kernels.dare(expert, start, target, size, drop, seed, begin, self.rescale == "expected")
        return target

    def _wide(self, block: Block, name: str, wide: str, size: int, buffers: Buffers) -> Block:
        if block.dtype == wide:
            return block
        target = buffers.block(name, wide)
        kernels.converted(block, target, size)
        return target

    def _vectors(
        self, piece: Piece, task: str, begin: int, size: int, buffers: Buffers, name: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """A chunk of one task vector, and what is left of it, not rescaled."""
        assert piece.base is not None
        wide = wide_type(piece.base, piece.experts[task])
        kernels.converted(piece.base.at(begin), buffers.block("start", wide), size)
        kernels.converted(piece.experts[task].at(begin), buffers.block("expert", wide), size)
        vector = buffers.array("expert", wide, size)
        start = buffers.array("start", wide, size)
        np.subtract(vector, start, out=vector)
        start[:] = 0
        drop, seed = self.value("drop", task, piece.name), tensor_seed(self.seed, task, piece.name)
        kernels.dare(
            buffers.block("expert", wide), buffers.block("start", wide), buffers.block(name, wide),
            size, drop, seed, begin, False,
        )  # fmt: skip
        return vector, buffers.array(name, wide, size)

    def _factor(self, piece: Piece, task: str, buffers: Buffers) -> np.ndarray:
        """sum |tau| / sum |kept tau|, 1 where nothing is kept, in the wide type."""
        assert piece.base is not None
        sums = np.zeros(2)
        for begin in range(0, piece.size, buffers.elements):
            size = min(buffers.elements, piece.size - begin)
            parts = self._vectors(piece, task, begin, size, buffers, "dropped 0")
            sums += [np.abs(part).sum(dtype=np.float64) for part in parts]
        factor = sums[0] / sums[1] if sums[1] > 0 else 1.0
        return np.asarray(factor, WIDE[wide_type(piece.base, piece.experts[task])])


def _limit(pieces: Sequence[Piece], task: str, density: float, dialect: str) -> np.ndarray:
    """The least magnitude that is kept: 0 where all entries are, infinity where none is."""
    entries = sum(piece.size for piece in pieces)
    kept = kept_entries(density, entries, dialect)
    if not 0 < kept < entries:
        return np.asarray(0.0 if kept >= entries else math.inf)
    pairs = [(p.experts[task], p.base, p.size) for p in pieces if p.base is not None]
    return kernels.magnitude_threshold(pairs, kept).astype(np.float64)


def method_of(name: str, value: Value, options: Mapping[str, Any]) -> Method:
    """The method of a name.

    Parameters
    ----------
    value : the numbers that may differ from tensor to tensor: weight, scale, density, drop.
    options : "dialect", "rescale" and "seed".

    Raises
    ------
    ValueError
        A method that is not merged by streaming, or an unknown dialect or rescaling.
    """
    if name not in STREAMED:
        raise ValueError(f"nlm.streaming: the method is one of {', '.join(STREAMED)}, got {name!r}")
    dialect = options.get("dialect", OPTIONS["dialect"][0])
    rescale = options.get("rescale", OPTIONS["rescale"][0])
    for what, known, given in (("dialect", DIALECTS, dialect), ("rescaling", RESCALES, rescale)):
        if given not in known:
            raise ValueError(f"nlm.merge: the {what} is one of {', '.join(known)}, got {given!r}")
    if options.get("filter_wise"):
        raise ValueError("nlm.streaming: Model Stock is computed by whole tensors, got filter_wise")
    if name in _SIMPLE:
        return _SIMPLE[name](value, bool(options.get("normalize", name == "linear")))
    if name == "ties":
        return Ties(value, dialect=dialect)
    seed = check_dropping(0.0, options.get("seed"), rescale)
    inner = Ties(value, dialect=dialect, trims=False) if name == "dare_ties" else None
    return Dare(value, bool(options.get("normalize")), seed, rescale, inner)


_SIMPLE: dict[str, type[Method]] = {
    "linear": Linear, "slerp": Slerp, "task_arithmetic": TaskArithmetic, "model_stock": ModelStock,
}  # fmt: skip
STREAMED = (*_SIMPLE, "ties", "dare", "dare_ties")
