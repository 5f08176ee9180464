"""TALL-masks of chunks: the merge that they are of, and the consensus of all."""

import numpy as np

from nlm._methods import check_agreement, check_mask_threshold
from nlm.checkpoint.headers import ITEM_BYTES
from nlm.streaming import kernels
from nlm.streaming.kernels import Block
from nlm.streaming.methods.method import Buffers, Method, Piece, widened
from nlm.streaming.methods.sums import TaskArithmetic


class TallMask(TaskArithmetic):
    """The whole sum of the task vectors, which the masks that go beside it are of."""

    def begin(self, piece: Piece, buffers: Buffers) -> None:
        for task in piece.experts:
            check_mask_threshold(self.value("mask_threshold", task, piece.name), task)

    def _scale(self, piece: Piece) -> float:
        return 1.0


class Consensus(Method):
    """The scaled sum of the task vectors where enough masks agree, the base elsewhere."""

    scratch = 6
    selects = True

    def begin(self, piece: Piece, buffers: Buffers) -> None:
        for task in piece.experts:
            check_mask_threshold(self.value("mask_threshold", task, piece.name), task)
        check_agreement(self.value("agreement", None, piece.name), len(piece.experts))

    def fill(self, piece: Piece, begin: int, size: int, target: Block, buffers: Buffers) -> None:
        base, experts = self._at(piece, begin)
        assert base is not None
        weights = self._weights(piece)
        whole = buffers.block("whole", base.dtype)
        kernels.weighted_sum(base, experts, weights, whole, size)
        masks = [
            mask_of(
                expert, base, whole, size, self.value("mask_threshold", task, piece.name), buffers
            )
            for task, expert in zip(piece.experts, experts, strict=True)
        ]
        least = int(self.value("agreement", None, piece.name))
        kept = kernels.tall_mask_agreement(np.stack(masks), least)
        scale = self.value("scale", None, piece.name)
        scaled, start = buffers.block("scaled", target.dtype), base
        kernels.weighted_sum(base, experts, weights, scaled, size, 1.0, scale)
        if base.dtype != target.dtype:
            start = buffers.block("start", target.dtype)
            kernels.converted(base, start, size)
        kernels.tall_mask_apply(kept, start, scaled, target, size)


def mask_of(
    expert: Block, base: Block, merged: Block, size: int, limit: float, buffers: Buffers
) -> np.ndarray:
    """The mask of a chunk, uint8, in the type of all three, or in a wide one."""
    blocks = {"expert": expert, "start": base, "merged": merged}
    dtypes = {block.dtype for block in blocks.values()}
    common = dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"
    expert, base, merged = (
        widened(block, name, common, size, buffers) for name, block in blocks.items()
    )
    return kernels.tall_mask(expert, base, merged, size, limit)


def masked(mask: np.ndarray, base: Block, merged: Block, size: int, buffers: Buffers) -> memoryview:
    """The bytes of a chunk: ``merged`` where a bit is set, and ``base`` in its type elsewhere."""
    start, target = base, buffers.block("target", merged.dtype)
    if base.dtype != merged.dtype:
        start = buffers.block("start", merged.dtype)
        kernels.converted(base, start, size)
    kernels.tall_mask_apply(mask, start, merged, target, size)
    count = size * ITEM_BYTES[merged.dtype]
    return buffers.array("target", "F64", buffers.elements).view(np.uint8).data[:count]
