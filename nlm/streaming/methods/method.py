"""What a method is: it sees tensors whole, then fills chunks of the result.

A method sees each tensor whole before it is merged (:meth:`Method.begin`: thresholds, norms,
coefficients), all tensors before the first where it needs them (:meth:`Method.survey`), and then
fills chunks of the result, any chunk in any order.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nlm.checkpoint.entries import TensorEntry
from nlm.streaming import kernels
from nlm.streaming.kernels import WIDE, Block, wide_type

_LEAST_WEIGHT = 1e-8  # a smaller sum of weights divides nothing

Value = Callable[[str, str | None, str], float]
"""(parameter, expert or None, tensor) -> its number."""


@dataclass(frozen=True)
class Piece:
    """A tensor to merge: its base and its experts in the address space.

    Attributes
    ----------
    shape : of the tensor.
    curvatures : task -> what is known of its entries: Fisher information, for Fisher averaging, or
        the Gram matrix of what a linear layer reads, for RegMean.
    """

    name: str
    shape: tuple[int, ...]
    base: Block | None
    experts: Mapping[str, Block]
    curvatures: Mapping[str, Block] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def wide_type(self) -> str:
        """The type that arithmetic on the base and all experts is done in."""
        return wide_type(*self.experts.values(), *([] if self.base is None else [self.base]))


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
    selects = False  # leaves entries of experts out: NaN among them would not be seen in the result
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


def widened(block: Block, name: str, wide: str, size: int, buffers: Buffers) -> Block:
    """The first elements of a block in a wide type: where they lie, or in the buffer of a name."""
    if block.dtype == wide:
        return block
    target = buffers.block(name, wide)
    kernels.converted(block, target, size)
    return target


def wide_array(block: Block, name: str, wide: str, size: int, buffers: Buffers) -> np.ndarray:
    """A copy of the first elements of a block, in a wide type, in the buffer of a name."""
    kernels.converted(block, buffers.block(name, wide), size)
    return buffers.array(name, wide, size)


def chunks(piece: Piece | TensorEntry, buffers: Buffers) -> Iterator[tuple[int, int]]:
    """(begin, size) of the chunks of a tensor."""
    for begin in range(0, piece.size, buffers.elements):
        yield begin, min(buffers.elements, piece.size - begin)
