"""The compiled operations on blocks of memory, wherever they lie: in files, or in buffers.

What :mod:`nlm.ops` does for tensors, without the copies and checks: a block is packed and aligned,
and its owner outlives the call.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from nlm import _core
from nlm._core import DIALECTS, DTYPES
from nlm._random import RANKED, chances_by_rank
from nlm.checkpoint.headers import ITEM_BYTES

WIDE: dict[str, np.dtype[Any]] = {"F32": np.dtype("float32"), "F64": np.dtype("float64")}
GROUP = 64  # entries of one byte of sign_merge's `contested`


@dataclass(frozen=True)
class Block:
    """Elements in memory: the address of the first, and their type as safetensors calls it."""

    address: int
    dtype: str

    def at(self, begin: int) -> "Block":
        """The block from its element ``begin`` on."""
        return Block(self.address + begin * ITEM_BYTES[self.dtype], self.dtype)

    @property
    def code(self) -> int:
        return DTYPES[self.dtype]


def wide_type(*blocks: Block) -> str:
    """The type that arithmetic on these is done in."""
    return "F64" if any(block.dtype == "F64" for block in blocks) else "F32"


def check_core() -> None:
    """Raises where there is no compiled core.

    Raises
    ------
    RuntimeError
        It was not built.
    """
    if _core.cpu is None:
        raise RuntimeError(
            f"nlm.streaming: checkpoints are merged by the compiled core, got none "
            f"({_core.cpu_missing})"
        )


def isa() -> str:
    """The instruction set in use."""
    return str(_core.cpu.isa)


@contextmanager
def bus_errors_explained(places: Sequence[tuple[int, int, str]]) -> Iterator[None]:
    """Within, a mapped file that becomes shorter ends the process with a sentence that names it.

    ``places`` are those of the files: address, bytes and name.
    """
    _core.cpu.explain_bus_errors(places)
    try:
        yield
    finally:
        _core.cpu.explain_bus_errors([])


def weighted_sum(
    base: Block | None,
    terms: Sequence[Block],
    weights: Sequence[float],
    target: Block,
    size: int,
    divisor: float = 1.0,
    scale: float = 1.0,
) -> None:
    """``target = base + scale (sum_k w_k (x_k - base)) / divisor``; see nlm/ops/weighted_sum.py."""
    start = base or Block(0, "F32")
    _core.cpu.weighted_sum(
        start.address, start.code,
        [(x.address, x.code, w) for x, w in zip(terms, weights, strict=True)],
        divisor, scale, target.address, target.code, size, _core.threads(),
    )  # fmt: skip


def converted(source: Block, target: Block, size: int) -> None:
    """``target = source``, in the target's type."""
    weighted_sum(source, [], [], target, size)


def magnitude_threshold(pairs: Sequence[tuple[Block, Block, int]], rank: int) -> np.ndarray:
    """The rank-th largest ``|x - base|`` over pairs of blocks of so many elements, a scalar."""
    dtype = wide_type(*(block for x, base, _ in pairs for block in (x, base)))
    result = np.empty((), WIDE[dtype])
    items = [(x.address, x.code, base.address, base.code, size) for x, base, size in pairs]
    _core.cpu.magnitude_threshold(items, rank, DTYPES[dtype], result.ctypes.data, _core.threads())
    return result


def sign_merge(
    base: Block,
    experts: Sequence[Block],
    weights: Sequence[float],
    thresholds: np.ndarray,
    scale: float,
    dialect: str,
    target: Block,
    size: int,
    against: bool = False,
) -> np.ndarray:
    """TIES of one block, ``target`` of the base's type; the ballot, int64 ``[2]``.

    ``against`` elects - where the votes are 0.
    """
    limits = _thresholds(thresholds, WIDE[wide_type(base, *experts)])
    ballot = np.zeros(2, np.int64)
    contested = np.zeros(-(-size // GROUP), np.uint8)
    each = [(x.address, x.code, w) for x, w in zip(experts, weights, strict=True)]

    def call(again: bool) -> None:
        item = (
            base.address, target.address, base.code, size, limits.ctypes.data, scale,
            DIALECTS.index(dialect), contested.ctypes.data, again,
        )  # fmt: skip
        _core.cpu.sign_merge(item, each, 0 if again else ballot.ctypes.data, _core.threads())

    call(False)
    if against:
        call(True)
    return ballot


def _thresholds(thresholds: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """As ``dtype``, rounded up, so that no magnitude of that type changes sides."""
    near = thresholds.astype(dtype)
    return np.where(near < thresholds, np.nextafter(near, dtype.type(np.inf)), near)


def dare(
    expert: Block, base: Block, target: Block, size: int, drop: float, seed: int, offset: int,
    scale: float,
) -> None:  # fmt: skip
    """DARE of one block, all of one type; ``offset`` is its position in the tensor.

    What is kept of the task vector is multiplied by ``scale``.
    """
    _core.cpu.dare(
        expert.address, base.address, target.address, expert.code, size, seed, offset,
        int(drop * 2**32), scale, _core.threads(),
    )  # fmt: skip


def magprune(
    x: Block, target: Block, rows: int, length: int, density: float, epsilon: float, seed: int,
    offset: int, rescale: bool,
) -> None:  # fmt: skip
    """MagPrune of rows ``[rows, length]``, both blocks of one type; see nlm/ops/magprune.py."""
    tables = [
        chances_by_rank(each, density, epsilon, rescale)
        for each in (min(length, RANKED), length % RANKED)
    ]
    addresses = [(least.ctypes.data, factors.ctypes.data) for least, factors in tables]
    _core.cpu.magprune(
        x.address, target.address, x.code, rows, length, RANKED, offset, seed, *addresses,
        _core.threads(),
    )  # fmt: skip


def tall_mask(expert: Block, base: Block, merged: Block, size: int, limit: float) -> np.ndarray:
    """The entries that an expert lives in, a bit each; all blocks of one type."""
    mask = np.empty(-(-size // 8), np.uint8)
    _core.cpu.tall_mask(
        expert.address, base.address, merged.address, expert.code, size, limit, mask.ctypes.data,
        _core.threads(),
    )  # fmt: skip
    return mask


def tall_mask_agreement(masks: np.ndarray, least: int) -> np.ndarray:
    """The bits that at least so many masks ``[T, bytes]`` have."""
    kept, count = np.empty(masks.shape[1], np.uint8), np.empty((), np.int64)
    _core.cpu.tall_mask_agreement(
        masks.ctypes.data, *masks.shape, least, kept.ctypes.data, count.ctypes.data,
        _core.threads(),
    )  # fmt: skip
    return kept


def tall_mask_apply(mask: np.ndarray, base: Block, merged: Block, target: Block, size: int) -> None:
    """``merged`` where a bit is set and ``base`` elsewhere, all of one type."""
    _core.cpu.tall_mask_apply(
        mask.ctypes.data, base.address, merged.address, ITEM_BYTES[base.dtype], size,
        target.address, _core.threads(),
    )  # fmt: skip


def inner_products(base: Block | None, vectors: Sequence[Block], size: int) -> np.ndarray:
    """The Gram matrix of vectors less their base, float64 ``[vectors, vectors]``."""
    gram = np.zeros((len(vectors), len(vectors)))
    start = base or Block(0, "F32")
    _core.cpu.inner_products(
        start.address, start.code, [(x.address, x.code) for x in vectors], size,
        gram.ctypes.data, _core.threads(),
    )  # fmt: skip
    return gram
