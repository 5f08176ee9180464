"""Where a sample lies: arithmetic of the Triton kernels that read an ``[outer, C, inner]`` view.

A *position* is a pair (outer, inner), numbered ``p = outer * inner_size + inner``, so that
``[N, C]``, ``[N, C, H, W]`` and ``[N, L, C]`` are all read as positions x channels, in place and
through any strides.
"""

import math

import torch
import triton
import triton.language as tl


def blocks(number: int, size: int) -> int:
    """Blocks of ``size`` that hold ``number``; `triton.cdiv` imports modules on each call."""
    return -(-number // size)


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def layout_unit(x: torch.Tensor) -> int:
    """How many positions of ``[outer, C, inner]`` surely lie side by side, aligned: 1 to 16."""
    stride_outer, stride_channel, stride_inner = x.stride()
    return math.gcd(16, x.shape[2], stride_outer, stride_channel) if stride_inner == 1 else 1


@triton.jit
def position_offsets(
    first, steps, inner, stride_outer, stride_inner, DIVIDES: tl.constexpr, UNIT: tl.constexpr
):
    """Element offsets (int64) of the positions ``first + steps``; ``DIVIDES`` says that inner > 1.

    UNIT positions lie side by side in memory, from a multiple of UNIT on: `layout_unit`.
    The only 64-bit division is scalar, unless ``inner`` needs more than 31 bits. The lanes divide
    ``first % inner + steps`` as uint32, which holds the sum of two numbers below 2^31.
    """
    if DIVIDES:
        if inner.dtype == tl.int32:
            lane = (first % inner).to(tl.uint32) + steps.to(tl.uint32)
            size = inner.to(tl.uint32)
        else:
            lane = (first % inner) + steps
            size = inner
        outer_index = first // inner + (lane // size).to(tl.int64)
        inner_index = (lane % size).to(tl.int64)
        offsets = outer_index * stride_outer + inner_index * stride_inner
        # Triton 3.6 does not see through the division: without these, no load is wide.
        return tl.max_contiguous(tl.multiple_of(offsets, UNIT), UNIT)
    else:
        return (first + steps).to(tl.int64) * stride_outer


@triton.jit
def counted_positions(
    mask,  # uint8 [outer, inner], nonzero = counted; not read unless HAS_MASK
    first,
    steps,
    end,
    inner,
    stride_outer,
    stride_inner,
    HAS_MASK: tl.constexpr,
    DIVIDES: tl.constexpr,
):
    """Which of the positions ``first + steps`` lie before ``end`` and are counted by the mask."""
    counted = first + steps < end
    if HAS_MASK:
        offsets = position_offsets(first, steps, inner, stride_outer, stride_inner, DIVIDES, 1)
        counted = counted & (tl.load(mask + offsets, mask=counted, other=0) != 0)
    return counted
