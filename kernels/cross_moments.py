"""Means, M2s and the co-moment matrix of one batch of two streams, in Triton.

    comoment[i, j] = sum_p (x[p, i] - mean_x[i]) (y[p, j] - mean_y[j])            # [Cx, Cy]

over the positions of two strided ``[outer, C, inner]`` views that share their positions; without y,
x with itself: half of the tiles are computed, the other half mirrored, and the diagonal is m2, so
the matrix is symmetric to the bit. 2 P Cx Cy flops, half of that without y. Compiled and
interpreted, not yet run on a GPU.

*Numerics.* ``channel_moments`` gives the float64 means; rounded to float32 they are the shifts s
and t. The tensor cores multiply (x - s)^T (y - t) in steps of ``BLOCK_P`` positions (each product
split into three), the steps are added in float32 for ``SPLIT_POSITIONS`` positions at most, and
these partial sums in float64. What the rounding of the shifts left is taken off exactly:

    comoment = sum_p (x - s)(y - t) - n (mean_x - s)(mean_y - t)

*Order.* One round is a grid of tiles x splits of the positions, each program the owner of its tile
of its split's partial sum; a second kernel adds the splits in order. Rounds and splits follow from
the shape alone: no atomics, the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from nlm.kernels._positions import counted_positions, position_offsets
from nlm.kernels.channel_moments import channel_moments

SPLIT_POSITIONS = 4096
MINIMUM_POSITIONS = 1024  # per split, where there are enough
PROGRAMS = 264  # wanted per round: two on each of 132 multiprocessors
GATHER_BLOCK = 32


@triton.jit
def triangle_tile(tile):
    """(row, column) of the tile-th tile at or below the diagonal, counted row by row."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def product_kernel(
    x,
    y,
    shift_x,  # [Cx]
    shift_y,  # [Cy]
    mask,  # uint8, not read unless HAS_MASK
    partial,  # [splits, Cx, Cy]
    round_begin,
    split_positions,
    positions,
    channels_x,
    channels_y,
    inner,
    x_stride_outer,
    x_stride_channel,
    x_stride_inner,
    y_stride_outer,
    y_stride_channel,
    y_stride_inner,
    mask_stride_outer,
    mask_stride_inner,
    SAME: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DIVIDES: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One tile (axis 0) of the shifted product over one split of the round's positions (axis 1)."""
    if SAME:
        row, column = triangle_tile(tl.program_id(0))
    else:
        rows = tl.cdiv(channels_x, BLOCK_X)
        row, column = tl.program_id(0) % rows, tl.program_id(0) // rows
    split = tl.program_id(1).to(tl.int64)
    begin = round_begin + split * split_positions
    end = tl.minimum(begin + split_positions, positions)
    steps = tl.arange(0, BLOCK_P)

    channel_x = row.to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    channel_y = column.to(tl.int64) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    is_x, is_y = channel_x < channels_x, channel_y < channels_y
    origin_x = tl.load(shift_x + channel_x, mask=is_x, other=0.0)
    origin_y = tl.load(shift_y + channel_y, mask=is_y, other=0.0)
    x += channel_x[None, :] * x_stride_channel
    y += channel_y[None, :] * y_stride_channel

    sums = tl.zeros((BLOCK_X, BLOCK_Y), ACCUMULATOR)
    for first in range(begin, end, BLOCK_P):
        at_x = position_offsets(first, steps, inner, x_stride_outer, x_stride_inner, DIVIDES)
        at_y = position_offsets(first, steps, inner, y_stride_outer, y_stride_inner, DIVIDES)
        # A mask read from memory would make these loads scalar, so it is applied afterwards: to
        # both factors, as what it hides may be NaN. Past the end one zero factor is enough.
        inside = (first + steps < end)[:, None]
        a = tl.load(x + at_x[:, None], mask=inside & is_x[None, :], other=0.0).to(ACCUMULATOR)
        b = tl.load(y + at_y[:, None], mask=inside & is_y[None, :], other=0.0).to(ACCUMULATOR)
        counted = counted_positions(
            mask, first, steps, end, inner, mask_stride_outer, mask_stride_inner, HAS_MASK, DIVIDES
        )[:, None]
        a = tl.where(counted, a - origin_x[None, :], 0.0)
        b -= origin_y[None, :]
        if HAS_MASK:
            b = tl.where(counted, b, 0.0)
        sums += tl.dot(tl.trans(a), b, input_precision=PRECISION, out_dtype=ACCUMULATOR)

    partial += split * channels_x * channels_y
    target = channel_x[:, None] * channels_y + channel_y[None, :]
    tl.store(partial + target, sums, mask=is_x[:, None] & is_y[None, :])


@triton.jit
def gather_kernel(
    partial,
    comoment,  # float64 [Cx, Cy]
    splits,
    channels_x,
    channels_y,
    SAME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the splits in order; SAME reads entry (j, i) for an (i, j) above the diagonal."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    valid = (row < channels_x) & (column < channels_y)
    target = comoment + row * channels_y + column
    if SAME:
        source = tl.maximum(row, column) * channels_y + tl.minimum(row, column)
    else:
        source = row * channels_y + column
    plane = tl.cast(channels_x, tl.int64) * channels_y
    total = tl.zeros((BLOCK, BLOCK), tl.float64)
    for _ in range(0, splits):
        total += tl.load(partial + source, mask=valid, other=0.0).to(tl.float64)
        source += plane
    tl.store(target, tl.load(target, mask=valid, other=0.0) + total, mask=valid)


def product_precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies: about 2^-21 relative for float32, 2^-16 for the 16-bit types.

    AMD has no tf32x3; the interpreter has one way only, in full precision.
    """
    if dtype == torch.float64 or triton.knobs.runtime.interpret:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "bf16x3"


def launch_options(dtype: torch.dtype, channels_x: int, channels_y: int) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages for the shape."""
    widest = 64 if dtype == torch.float64 else 128
    block_x, block_y = (
        min(widest, max(16, triton.next_power_of_2(channels)))
        for channels in (channels_x, channels_y)
    )
    options = {
        "BLOCK_X": block_x,
        "BLOCK_Y": block_y,
        "BLOCK_P": 16,
        "num_warps": 8 if block_x * block_y >= 8192 else 4,
        "num_stages": 4,
    }
    if torch.version.hip is None:
        options["maxnreg"] = 255  # else ptxas may choose 128 for sm_80, and spill
    return options


def split_positions(positions: int, tiles: int, step: int) -> int:
    """Positions per split, a multiple of ``step``, from the shape alone."""
    wanted = max(1, min(triton.cdiv(PROGRAMS, tiles), positions // MINIMUM_POSITIONS))
    return min(SPLIT_POSITIONS, triton.cdiv(triton.cdiv(positions, wanted), step) * step)


def cross_moments(
    x: torch.Tensor, y: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """(count, mean_x, m2_x, mean_y, m2_y, comoment) of one batch; without y, y's are x's.

    x ``[outer, Cx, inner]``, y ``[outer, Cy, inner]``, mask bool ``[outer, inner]`` (True =
    counted); count int64 ``[]``, the others float64. Any strides, any floating-point type.
    """
    count, mean_x, m2_x = channel_moments(x, mask)
    same = y is None
    if y is None:
        y, mean_y, m2_y = x, mean_x, m2_x
    else:
        _, mean_y, m2_y = channel_moments(y, mask)
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    shift_x, shift_y = mean_x.to(accumulator), mean_y.to(accumulator)
    comoment = torch.outer(mean_x - shift_x, mean_y - shift_y) * -count

    outer, channels_x, inner = x.shape
    channels_y, positions = y.shape[1], outer * inner
    if positions == 0 or comoment.numel() == 0:
        return count, mean_x, m2_x, mean_y, m2_y, comoment
    options = launch_options(x.dtype, channels_x, channels_y)
    rows = triton.cdiv(channels_x, options["BLOCK_X"])
    columns = triton.cdiv(channels_y, options["BLOCK_Y"])
    tiles = rows * (rows + 1) // 2 if same else rows * columns
    per_split = split_positions(positions, tiles, options["BLOCK_P"])
    splits = min(triton.cdiv(PROGRAMS, tiles), triton.cdiv(positions, per_split))
    partial = torch.empty(splits, channels_x, channels_y, dtype=accumulator, device=x.device)
    mask_bytes = None if mask is None else mask.view(torch.uint8)
    gather_grid = tuple(triton.cdiv(channels, GATHER_BLOCK) for channels in comoment.shape)
    for round_begin in range(0, positions, splits * per_split):
        product_kernel[(tiles, splits)](
            x,
            y,
            shift_x,
            shift_y,
            x if mask_bytes is None else mask_bytes,
            partial,
            round_begin,
            per_split,
            positions,
            channels_x,
            channels_y,
            inner,
            *x.stride(),
            *y.stride(),
            *((0, 0) if mask_bytes is None else mask_bytes.stride()),
            SAME=same,
            HAS_MASK=mask_bytes is not None,
            DIVIDES=inner > 1,
            ACCUMULATOR=tl.float64 if accumulator == torch.float64 else tl.float32,
            PRECISION=product_precision(x.dtype),
            enable_fp_fusion=False,
            **options,
        )
        gather_kernel[gather_grid](
            partial,
            comoment,
            splits,
            channels_x,
            channels_y,
            SAME=same,
            BLOCK=GATHER_BLOCK,
            enable_fp_fusion=False,
        )
    if same:
        comoment.diagonal().copy_(m2_x)
    return count, mean_x, m2_x, mean_y, m2_y, comoment
