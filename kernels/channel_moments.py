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
"""

import torch
import triton
import triton.language as tl
from nlm.kernels._positions import counted_positions, layout_unit, position_offsets

TILE = 4096  # elements at most
FLUSH_TILES = 64
PROGRAMS = 528  # wanted: four on each of 132 multiprocessors
MINIMUM_TILES = 4  # per program, so that the shift's tile does not weigh
MERGE_PARTIALS, MERGE_CHANNELS = 128, 16


@triton.jit
def add_tile(
    x,
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
):
    """The sums with the positions ``first + steps``; WHOLE says that all of the tile counts."""
    offsets = position_offsets(first, steps, inner, stride_outer, stride_inner, DIVIDES, UNIT)
    if WHOLE:
        deviation = tl.load(x + offsets[:, None]).to(sums.dtype) - shift[None, :]
        count += 1
    else:
        # A mask read from memory would make the loads of x scalar, so it is applied afterwards.
        inside = (first + steps < end)[:, None] & is_channel[None, :]
        tile = tl.load(x + offsets[:, None], mask=inside, other=0.0).to(sums.dtype)
        counted = counted_positions(
            mask, first, steps, end, inner, mask_stride_outer, mask_stride_inner, HAS_MASK, DIVIDES
        )
        valid = counted[:, None] & is_channel[None, :]
        deviation = tl.where(valid, tile - shift[None, :], 0.0)
        count += counted.to(tl.int64)
    return sums + deviation, tl.fma(deviation, deviation, squares), count


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
    WHOLE: tl.constexpr,  # no mask, and the blocks divide the channels
    UNIT: tl.constexpr,
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
    offsets = position_offsets(anchor, steps, inner, stride_outer, stride_inner, DIVIDES, UNIT)
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
        chunk_end = tl.minimum(chunk + FLUSH * BLOCK_P, end)
        whole_end = chunk
        if WHOLE:
            whole_end = chunk + (chunk_end - chunk) // BLOCK_P * BLOCK_P
        chunk_total = tl.zeros((BLOCK_P, BLOCK_C), ACCUMULATOR)
        chunk_squares = tl.zeros((BLOCK_P, BLOCK_C), ACCUMULATOR)
        if WHOLE:
            for first in range(chunk, whole_end, BLOCK_P):
                chunk_total, chunk_squares, count = add_tile(
                    x, mask, first, steps, end, is_channel, shift, chunk_total, chunk_squares,
                    count, inner, stride_outer, stride_inner, mask_stride_outer, mask_stride_inner,
                    HAS_MASK, DIVIDES, True, UNIT,
                )  # fmt: skip
        for first in range(whole_end, chunk_end, BLOCK_P):
            chunk_total, chunk_squares, count = add_tile(
                x, mask, first, steps, end, is_channel, shift, chunk_total, chunk_squares,
                count, inner, stride_outer, stride_inner, mask_stride_outer, mask_stride_inner,
                HAS_MASK, DIVIDES, False, UNIT,
            )  # fmt: skip
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


def tile_shape(
    channels: int, stride_channel: int, stride_position: int, element_bytes: int
) -> tuple[int, int, int]:
    """(positions, channels, warps) of a tile: long along the dimension contiguous in memory."""
    if stride_channel <= stride_position:
        block_c = min(triton.next_power_of_2(channels), 128)
        return min(TILE, 1024 * element_bytes) // block_c, block_c, 4
    block_c = min(triton.next_power_of_2(channels), 64)
    return TILE // block_c, block_c, 8


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
    if positions == 0 or channels == 0:
        counted = positions if mask is None else int(mask.sum())
        count = torch.full((), counted, dtype=torch.int64, device=x.device)
        mean, m2 = torch.zeros(2, channels, dtype=torch.float64, device=x.device)
        return count, mean, m2

    block_p, block_c, warps = tile_shape(
        channels, x.stride(1), x.stride(2 if inner > 1 else 0), x.element_size()
    )
    channel_blocks = triton.cdiv(channels, block_c)
    per_split = split_positions(positions, block_p, channel_blocks)
    splits = triton.cdiv(positions, per_split)
    count = torch.empty((), dtype=torch.int64, device=x.device)
    mean, m2 = torch.empty(2, channels, dtype=torch.float64, device=x.device)
    partial_count = torch.empty(splits, dtype=torch.int64, device=x.device)
    partial_mean, partial_m2 = torch.empty(2, splits, channels, dtype=mean.dtype, device=x.device)
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
        *x.stride(),
        *((0, 0) if mask_bytes is None else mask_bytes.stride()),
        per_split,
        HAS_MASK=mask_bytes is not None,
        DIVIDES=inner > 1,
        WHOLE=mask_bytes is None and channels % block_c == 0,
        UNIT=layout_unit(x),
        ACCUMULATOR=tl.float64 if x.dtype == torch.float64 else tl.float32,
        FLUSH=FLUSH_TILES,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    pool_kernel[(triton.cdiv(channels, MERGE_CHANNELS),)](
        partial_count, partial_mean, partial_m2, count, mean, m2, splits, channels,
        BLOCK_S=MERGE_PARTIALS, BLOCK_C=MERGE_CHANNELS, enable_fp_fusion=False,
    )  # fmt: skip
    return count, mean, m2
