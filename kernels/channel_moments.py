"""Count, mean and sum of squared deviations per channel, in Triton.

    n = #positions,   mean[c] = sum_p x[p, c] / n,   m2[c] = sum_p (x[p, c] - mean[c])^2

over the positions of a strided ``[outer, C, inner]`` view. x is read once, and one tile per program
twice (for the shift). Compiled and interpreted, not yet run on a GPU.

*Numerics.* A program owns a range of positions and a block of channels. Its shift is the mean of
the first tile's worth of positions from the first counted one on, so a large common mean is gone
before anything is squared. Deviations are summed in float32, slot by slot (``FLUSH_TILES`` terms a
slot at most), flushed into float64 and left as a partial (n, mean, m2). A second kernel pools the
partials in float64 (Chan):

    mean = sum_s n_s mean_s / n,   m2 = sum_s m2_s + n_s (mean_s - mean)^2

float64 input is float64 throughout; for the other types |x - shift| has to stay below 1.8e19,
where its square leaves float32. The ranges follow from the shape alone, and there are no atomics:
the bits are the same on every run.
"""

import torch
import triton
import triton.language as tl
from nlm.kernels._positions import counted_positions, position_offsets

TILE = 2048  # elements: 16 a thread
FLUSH_TILES = 64
PROGRAMS = 1024  # wanted: eight on each of 128 multiprocessors
MINIMUM_TILES = 4  # per program, so that the shift's tile does not weigh
MERGE_PARTIALS, MERGE_CHANNELS = 128, 16


@triton.jit
def accumulate_kernel(
    x,
    mask,  # uint8, not read unless HAS_MASK
    partial_count,  # int64 [splits]
    partial_mean,  # float64 [splits, C]
    partial_m2,  # float64 [splits, C]
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
    ACCUMULATOR: tl.constexpr,
    FLUSH: tl.constexpr,  # tiles
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The moments of one split of the positions (axis 1) and one block of channels (axis 0)."""
    split = tl.program_id(1).to(tl.int64)
    begin = split * split_positions
    end = tl.minimum(begin + split_positions, positions)
    steps = tl.arange(0, BLOCK_P)
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < channels
    x += channel[None, :] * stride_channel

    anchor = begin
    if HAS_MASK:
        anchor = end
        for first in range(begin, end, BLOCK_P):
            counted = counted_positions(
                mask, first, steps, end, inner, mask_stride_outer, mask_stride_inner, True, DIVIDES
            )
            anchor = tl.minimum(anchor, tl.min(tl.where(counted, first + steps, end), axis=0))
    counted = counted_positions(
        mask, anchor, steps, end, inner, mask_stride_outer, mask_stride_inner, HAS_MASK, DIVIDES
    )
    offsets = position_offsets(anchor, steps, inner, stride_outer, stride_inner, DIVIDES)
    valid = counted[:, None] & is_channel[None, :]
    tile = tl.load(x + offsets[:, None], mask=valid, other=0.0).to(ACCUMULATOR)
    seen = tl.maximum(tl.sum(counted.to(tl.int32), axis=0), 1)
    shift = tl.sum(tile, axis=0) / seen.to(ACCUMULATOR)
    # A shift that is NaN or inf (or whose sum overflowed) is dropped: the elements carry it anyway.
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)

    count = tl.zeros((BLOCK_P,), tl.int64)
    total = tl.zeros((BLOCK_C,), tl.float64)
    squares = tl.zeros((BLOCK_C,), tl.float64)
    for chunk in range(begin, end, FLUSH * BLOCK_P):
        chunk_total = tl.zeros((BLOCK_P, BLOCK_C), ACCUMULATOR)
        chunk_squares = tl.zeros((BLOCK_P, BLOCK_C), ACCUMULATOR)
        for first in range(chunk, tl.minimum(chunk + FLUSH * BLOCK_P, end), BLOCK_P):
            counted = counted_positions(
                mask, first, steps, end, inner, mask_stride_outer, mask_stride_inner,
                HAS_MASK, DIVIDES,
            )  # fmt: skip
            offsets = position_offsets(first, steps, inner, stride_outer, stride_inner, DIVIDES)
            # A mask read from memory would make the loads of x scalar, so it is applied afterwards.
            inside = (first + steps < end)[:, None] & is_channel[None, :]
            tile = tl.load(x + offsets[:, None], mask=inside, other=0.0).to(ACCUMULATOR)
            valid = counted[:, None] & is_channel[None, :]
            deviation = tl.where(valid, tile - shift[None, :], 0.0)
            chunk_total += deviation
            chunk_squares += deviation * deviation
            count += counted.to(tl.int64)
        total += tl.sum(chunk_total.to(tl.float64), axis=0)
        squares += tl.sum(chunk_squares.to(tl.float64), axis=0)

    n = tl.sum(count, axis=0)
    mean_deviation = total / tl.maximum(n, 1).to(tl.float64)
    m2 = squares - total * mean_deviation
    row = split * channels + channel
    tl.store(partial_mean + row, shift.to(tl.float64) + mean_deviation, mask=is_channel)
    tl.store(partial_m2 + row, tl.where(m2 < 0.0, 0.0, m2), mask=is_channel)
    if tl.program_id(0) == 0:
        tl.store(partial_count + split, n)


@triton.jit
def pool_kernel(
    partial_count,
    partial_mean,
    partial_m2,
    count,  # int64 []
    mean,  # float64 [C]
    m2,  # float64 [C]
    splits,
    channels,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Chan's formula over all splits, for one block of channels; a split may hold no position."""
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < channels
    n = tl.zeros((BLOCK_S,), tl.int64)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float64)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        valid = (split[:, None] < splits) & is_channel[None, :]
        rows = split[:, None].to(tl.int64) * channels + channel[None, :]
        split_count = tl.load(partial_count + split, mask=split < splits, other=0)
        split_mean = tl.load(partial_mean + rows, mask=valid, other=0.0)
        n += split_count
        total += split_count.to(tl.float64)[:, None] * split_mean
    all_positions = tl.sum(n, axis=0)
    pooled_mean = tl.sum(total, axis=0) / tl.maximum(all_positions, 1).to(tl.float64)

    squares = tl.zeros((BLOCK_S, BLOCK_C), tl.float64)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        valid = (split[:, None] < splits) & is_channel[None, :]
        rows = split[:, None].to(tl.int64) * channels + channel[None, :]
        split_count = tl.load(partial_count + split, mask=split < splits, other=0)
        split_mean = tl.load(partial_mean + rows, mask=valid, other=0.0)
        split_m2 = tl.load(partial_m2 + rows, mask=valid, other=0.0)
        apart = split_mean - pooled_mean[None, :]
        between = split_count.to(tl.float64)[:, None] * apart * apart
        counted = (split_count > 0)[:, None] & is_channel[None, :]
        squares += tl.where(counted, split_m2 + between, 0.0)

    tl.store(mean + channel, pooled_mean, mask=is_channel)
    tl.store(m2 + channel, tl.sum(squares, axis=0), mask=is_channel)
    if tl.program_id(0) == 0:
        tl.store(count, all_positions)


def tile_shape(channels: int, stride_channel: int, stride_position: int) -> tuple[int, int]:
    """(positions, channels) of a tile: long along the dimension that is contiguous in memory."""
    widest = 128 if stride_channel <= stride_position else 16
    block_c = min(triton.next_power_of_2(channels), widest)
    return TILE // block_c, block_c


def split_positions(positions: int, block_p: int, channel_blocks: int) -> int:
    """Positions per split, a multiple of the tile, from the shape alone."""
    tiles = triton.cdiv(positions, block_p)
    splits = max(1, min(triton.cdiv(PROGRAMS, channel_blocks), tiles // MINIMUM_TILES))
    return triton.cdiv(tiles, splits) * block_p


def channel_moments(
    x: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(count, mean, m2) of x: int64 ``[]``, float64 ``[C]`` and ``[C]``.

    x ``[outer, C, inner]``, mask bool ``[outer, inner]`` (True = counted). Any strides, any
    floating-point type.
    """
    outer, channels, inner = x.shape
    positions = outer * inner
    double = {"dtype": torch.float64, "device": x.device}
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    mean, m2 = torch.zeros(2, channels, **double)
    if positions == 0 or channels == 0:
        return count + (mask.sum() if mask is not None else positions), mean, m2

    stride_outer, stride_channel, stride_inner = x.stride()
    block_p, block_c = tile_shape(
        channels, stride_channel, stride_inner if inner > 1 else stride_outer
    )
    channel_blocks = triton.cdiv(channels, block_c)
    per_split = split_positions(positions, block_p, channel_blocks)
    splits = triton.cdiv(positions, per_split)
    partial_count = torch.empty(splits, dtype=torch.int64, device=x.device)
    partial_mean, partial_m2 = torch.empty(2, splits, channels, **double)
    mask_bytes = None if mask is None else mask.view(torch.uint8)
    accumulate_kernel[(channel_blocks, splits)](
        x,
        x if mask_bytes is None else mask_bytes,
        partial_count,
        partial_mean,
        partial_m2,
        positions,
        channels,
        inner,
        stride_outer,
        stride_channel,
        stride_inner,
        *((0, 0) if mask_bytes is None else mask_bytes.stride()),
        per_split,
        HAS_MASK=mask_bytes is not None,
        DIVIDES=inner > 1,
        ACCUMULATOR=tl.float64 if x.dtype == torch.float64 else tl.float32,
        FLUSH=FLUSH_TILES,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=4,
        enable_fp_fusion=False,
    )
    pool_kernel[(triton.cdiv(channels, MERGE_CHANNELS),)](
        partial_count, partial_mean, partial_m2, count, mean, m2, splits, channels,
        BLOCK_S=MERGE_PARTIALS, BLOCK_C=MERGE_CHANNELS, enable_fp_fusion=False,
    )  # fmt: skip
    return count, mean, m2
