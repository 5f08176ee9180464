"""Count, mean and sum of squared deviations per channel, in Triton.

    n = #positions,   mean[c] = sum_p x[p, c] / n,   m2[c] = sum_p (x[p, c] - mean[c])^2

over the positions of a strided ``[outer, C, inner]`` view. x is read once, and one tile per program
twice (for the shift).

*Numerics.* A program owns a range of positions and a block of channels. Its shift is the mean of
the first tile with a counted position, so a large common mean is gone
before anything is squared. Deviations are summed in float32 with fused multiply-adds, slot by slot
(``FLUSH_TILES`` terms a slot at most), flushed into float64 and left as a partial (n, mean, m2). A
second kernel pools the partials in float64 (Chan):

    mean = sum_s n_s mean_s / n,   m2 = sum_s m2_s + n_s (mean_s - mean)^2

float64 input is float64 throughout; for the other types |x - shift| has to stay below 1.8e19,
where its square leaves float32. The ranges follow from the shape alone, and there are no atomics:
the bits are the same on every run.

*Partials* are one float64 array: mean ``[splits, C]``, m2 ``[splits, C]``, and n ``[splits]``.
"""

import torch
import triton
import triton.language as tl
from nlm.kernels._descriptors import descriptor
from nlm.kernels._positions import (
    blocks,
    counted_positions,
    layout_unit,
    next_power_of_2,
    position_offsets,
)

TILE = 4096  # elements at most
FLUSH_TILES = 64
PROGRAMS = 528  # wanted: four on each of 132 multiprocessors
MINIMUM_TILES = 4  # per program, so that the shift's tile does not weigh
MERGE_PARTIALS, MERGE_CHANNELS = 128, 16
TMA_STAGES = 4  # tiles on their way to a program


@triton.jit
def load_tile(
    x, column, first, steps, inside, inner, stride_outer, stride_inner,
    DIVIDES: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The channels from ``column`` on of the positions ``first + steps``.

    Zero where not ``inside``, which is None where all of the tile is; a descriptor knows by itself
    where x ends, and is not asked for less.
    """
    if STAGES is not None:
        return x.load([tl.cast(first, tl.int32), column])
    else:
        offsets = position_offsets(first, steps, inner, stride_outer, stride_inner, DIVIDES, UNIT)
        if inside is None:
            return tl.load(x + offsets[:, None])
        else:
            return tl.load(x + offsets[:, None], mask=inside, other=0.0)


@triton.jit
def add_tile(
    x,
    column,
    mask,
    first,
    steps,
    end,
    is_channel,
    shift,
    sums,
    squares,
    count,
    inner,
    stride_outer,
    stride_inner,
    mask_stride_outer,
    mask_stride_inner,
    HAS_MASK: tl.constexpr,
    DIVIDES: tl.constexpr,
    WHOLE: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The sums with the positions ``first + steps``; WHOLE says that all of the tile counts."""
    # A mask read from memory would make the loads of x scalar, so it is applied afterwards.
    inside = None if WHOLE else (first + steps < end)[:, None] & is_channel[None, :]
    tile = load_tile(
        x, column, first, steps, inside, inner, stride_outer, stride_inner, DIVIDES, UNIT, STAGES
    )
    deviation = tile.to(sums.dtype) - shift[None, :]
    if WHOLE:
        count += 1
    else:
        counted = counted_positions(
            mask, first, steps, end, inner, mask_stride_outer, mask_stride_inner, HAS_MASK, DIVIDES
        )
        deviation = tl.where(counted[:, None] & is_channel[None, :], deviation, 0.0)
        count += counted.to(tl.int64)
    return sums + deviation, tl.fma(deviation, deviation, squares), count


@triton.jit
def accumulate_kernel(
    x,
    mask,  # uint8, not read unless HAS_MASK
    partial,  # float64
    positions,
    channels,
    inner,
    stride_outer,
    stride_channel,
    stride_inner,
    mask_stride_outer,
    mask_stride_inner,
    split_positions,
    HAS_MASK: tl.constexpr,
    DIVIDES: tl.constexpr,
    WHOLE: tl.constexpr,  # no mask, and no block has channels of which nothing may be read
    UNIT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    FLUSH: tl.constexpr,  # tiles
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,  # None, or tiles on their way: then x is a descriptor of [positions, C]
):
    """The moments of one split of the positions (axis 1) and one block of channels (axis 0)."""
    split = tl.program_id(1).to(tl.int64)
    begin = split * split_positions
    end = tl.minimum(begin + split_positions, positions)
    steps = tl.arange(0, BLOCK_P)
    column = tl.program_id(0) * BLOCK_C
    channel = column.to(tl.int64) + tl.arange(0, BLOCK_C)
    is_channel = channel < channels
    if STAGES is None:
        x += tl.multiple_of(channel * stride_channel, UNIT)[None, :]

    anchor = begin
    if HAS_MASK:
        anchor = end
        for first in range(begin, end, BLOCK_P):
            counted = counted_positions(
                mask, first, steps, end, inner, mask_stride_outer, mask_stride_inner, True, DIVIDES
            )
            anchor = tl.minimum(
                anchor, tl.where(tl.max(counted.to(tl.int32), axis=0) > 0, first, end)
            )
    counted = counted_positions(
        mask, anchor, steps, end, inner, mask_stride_outer, mask_stride_inner, HAS_MASK, DIVIDES
    )
    valid = counted[:, None] & is_channel[None, :]
    tile = load_tile(
        x, column, anchor, steps, valid, inner, stride_outer, stride_inner, DIVIDES, UNIT, STAGES
    ).to(ACCUMULATOR)
    if STAGES is not None:
        tile = tl.where(valid, tile, 0.0)
    seen = tl.maximum(tl.sum(counted.to(tl.int32), axis=0), 1)
    shift = tl.sum(tile, axis=0) / seen.to(ACCUMULATOR)
    # A shift that is NaN or inf (or whose sum overflowed) is dropped: the elements carry it anyway.
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)

    count = tl.zeros((BLOCK_P,), tl.int64)
    total = tl.zeros((BLOCK_C,), tl.float64)
    squares = tl.zeros((BLOCK_C,), tl.float64)
    for chunk in range(begin, end, FLUSH * BLOCK_P):
        chunk_end = tl.minimum(chunk + FLUSH * BLOCK_P, end)
        whole_end = chunk
        if WHOLE:
            whole_end = chunk + (chunk_end - chunk) // BLOCK_P * BLOCK_P
        chunk_total = tl.zeros((BLOCK_P, BLOCK_C), ACCUMULATOR)
        chunk_squares = tl.zeros((BLOCK_P, BLOCK_C), ACCUMULATOR)
        if WHOLE:
            for first in tl.range(chunk, whole_end, BLOCK_P, num_stages=STAGES):
                chunk_total, chunk_squares, count = add_tile(
                    x, column, mask, first, steps, end, is_channel, shift, chunk_total,
                    chunk_squares, count, inner, stride_outer, stride_inner, mask_stride_outer,
                    mask_stride_inner, HAS_MASK, DIVIDES, True, UNIT, STAGES,
                )  # fmt: skip
        for first in range(whole_end, chunk_end, BLOCK_P):
            chunk_total, chunk_squares, count = add_tile(
                x, column, mask, first, steps, end, is_channel, shift, chunk_total,
                chunk_squares, count, inner, stride_outer, stride_inner, mask_stride_outer,
                mask_stride_inner, HAS_MASK, DIVIDES, False, UNIT, STAGES,
            )  # fmt: skip
        total += tl.sum(chunk_total.to(tl.float64), axis=0)
        squares += tl.sum(chunk_squares.to(tl.float64), axis=0)

    n = tl.sum(count, axis=0)
    mean_deviation = total / tl.maximum(n, 1).to(tl.float64)
    m2 = squares - total * mean_deviation
    row = split * channels + channel
    plane = tl.num_programs(1).to(tl.int64) * channels
    tl.store(partial + row, shift.to(tl.float64) + mean_deviation, mask=is_channel)
    tl.store(partial + plane + row, tl.where(m2 < 0.0, 0.0, m2), mask=is_channel)
    if tl.program_id(0) == 0:
        tl.store(partial + 2 * plane + split, n.to(tl.float64))


@triton.jit
def pooled(partial, splits, channels, channel, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """(n, mean, m2) of a block of channels over all splits, one of which may hold no position.

    n is a float64, as exact as an integer up to 2^53.
    """
    is_channel = channel < channels
    plane = tl.cast(splits, tl.int64) * channels
    n = tl.zeros((BLOCK_S,), tl.float64)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float64)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        valid = (split[:, None] < splits) & is_channel[None, :]
        rows = split[:, None].to(tl.int64) * channels + channel[None, :]
        split_count = tl.load(partial + 2 * plane + split, mask=split < splits, other=0.0)
        split_mean = tl.load(partial + rows, mask=valid, other=0.0)
        n += split_count
        total += split_count[:, None] * split_mean
    all_positions = tl.sum(n, axis=0)
    pooled_mean = tl.sum(total, axis=0) / tl.maximum(all_positions, 1.0)

    squares = tl.zeros((BLOCK_S, BLOCK_C), tl.float64)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        valid = (split[:, None] < splits) & is_channel[None, :]
        rows = split[:, None].to(tl.int64) * channels + channel[None, :]
        split_count = tl.load(partial + 2 * plane + split, mask=split < splits, other=0.0)
        split_mean = tl.load(partial + rows, mask=valid, other=0.0)
        split_m2 = tl.load(partial + plane + rows, mask=valid, other=0.0)
        apart = split_mean - pooled_mean[None, :]
        between = split_count[:, None] * apart * apart
        counted = (split_count > 0.0)[:, None] & is_channel[None, :]
        squares += tl.where(counted, split_m2 + between, 0.0)
    return all_positions, pooled_mean, tl.sum(squares, axis=0)


@triton.jit
def pool_kernel(
    partial,
    count,  # int64 []
    mean,  # float64 [C]
    m2,  # float64 [C]
    splits,
    channels,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Chan's formula over all splits, for one block of channels."""
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    n, pooled_mean, pooled_m2 = pooled(partial, splits, channels, channel, BLOCK_S, BLOCK_C)
    tl.store(mean + channel, pooled_mean, mask=channel < channels)
    tl.store(m2 + channel, pooled_m2, mask=channel < channels)
    if tl.program_id(0) == 0:
        tl.store(count, n.to(tl.int64))


def tile_shape(
    channels: int, stride_channel: int, stride_position: int, element_bytes: int
) -> tuple[int, int, int]:
    """(positions, channels, warps) of a tile: long along the dimension contiguous in memory."""
    if stride_channel <= stride_position:
        block_c = min(next_power_of_2(channels), 128)
        return min(TILE, 1024 * element_bytes) // block_c, block_c, 4
    block_c = min(next_power_of_2(channels), 64)
    return TILE // block_c, block_c, 8


def split_positions(positions: int, block_p: int, channel_blocks: int) -> int:
    """Positions per split, a multiple of the tile, from the shape alone."""
    tiles = blocks(positions, block_p)
    splits = max(1, min(blocks(PROGRAMS, channel_blocks), tiles // MINIMUM_TILES))
    return blocks(tiles, splits) * block_p


def accumulate(x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """The partials of x ``[outer, C, inner]``, not empty, and how many there are.

    mask uint8 ``[outer, inner]``, nonzero = counted.
    """
    outer, channels, inner = x.shape
    positions, strides = outer * inner, x.stride()
    block_p, block_c, warps = tile_shape(
        channels, strides[1], strides[2 if inner > 1 else 0], x.element_size()
    )
    channel_blocks = blocks(channels, block_c)
    per_split = split_positions(positions, block_p, channel_blocks)
    splits = blocks(positions, per_split)
    partial = torch.empty(splits * (2 * channels + 1), dtype=torch.float64, device=x.device)
    rows = descriptor(x, (block_p, block_c)) if mask is None else None
    accumulate_kernel[(channel_blocks, splits)](
        x if rows is None else rows,
        x if mask is None else mask,
        partial,
        positions,
        channels,
        inner,
        *strides,
        *((0, 0) if mask is None else mask.stride()),
        per_split,
        HAS_MASK=mask is not None,
        DIVIDES=inner > 1,
        WHOLE=mask is None and (rows is not None or channels % block_c == 0),
        UNIT=layout_unit(x),
        ACCUMULATOR=tl.float64 if x.dtype == torch.float64 else tl.float32,
        FLUSH=FLUSH_TILES,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        STAGES=None if rows is None else TMA_STAGES,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return partial, splits


def channel_moments(
    count: torch.Tensor,
    mean: torch.Tensor,
    m2: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    """Writes count, mean and m2 of x: int64 ``[]``, float64 ``[C]`` and ``[C]``, contiguous.

    x ``[outer, C, inner]``, mask bool ``[outer, inner]`` (True = counted). Any strides, any
    floating-point type.
    """
    outer, channels, inner = x.shape
    if x.numel() == 0:
        if mask is None:
            count.fill_(outer * inner)
        else:
            count.copy_(mask.sum())
        mean.zero_()
        m2.zero_()
        return
    partial, splits = accumulate(x, None if mask is None else mask.view(torch.uint8))
    pool_kernel[(blocks(channels, MERGE_CHANNELS),)](
        partial, count, mean, m2, splits, channels,
        BLOCK_S=MERGE_PARTIALS, BLOCK_C=MERGE_CHANNELS, enable_fp_fusion=False,
    )  # fmt: skip
