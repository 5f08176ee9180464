"""Adds a batch of two streams to their means, M2s and co-moment matrix, in Triton.

    comoment[i, j] += sum_p (x[p, i] - mean_x[i]) (y[p, j] - mean_y[j])            # [Cx, Cy]

over the positions of two strided ``[outer, C, inner]`` views that share their positions, and Chan's
terms for the difference from the means so far; without y, x with itself: half of the tiles are
computed, the other half mirrored, and the diagonal is m2, so the matrix is symmetric to the bit.

*Numerics.* ``_stream.py`` centres and scales the batch: ``(x - s) / u`` as two float16 numbers, a
high and a low part, and a flag where a block of channels has a low part. The tensor cores multiply
``high high + high low + low high`` (without low parts, ``high high``) over ``ROWS`` positions. They
cut off what they add instead of rounding it, which over thousands of positions of one sign would
show (2e-5), so these sums are added in float32 outside, for ``SPLIT_POSITIONS`` positions at most,
and those in float64. What the rounding of s left is taken off exactly:

    comoment = u_x u_y sum_p (x - s) / u_x (y - t) / u_y  -  n (mean_x - s) (mean_y - t)

*Order.* One round is a grid of tiles x splits of the positions, each program the owner of its tile
of its split's partial sum; a last kernel adds the splits in order. Rounds and splits follow from
the shape alone: no float atomics, the same bits on every run.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from nlm.kernels._stream import ROWS, Stream

SPLIT_POSITIONS = 4096
MINIMUM_POSITIONS = 512  # per split, where there are enough
PROGRAMS = 132  # multiprocessors to fill evenly
PARTIAL_ELEMENTS, PART_ELEMENTS = 1 << 27, 1 << 28  # most memory: 512 MB of each
SUM_BLOCK = 32


@triton.jit
def triangle_tile(tile):
    """(row, column) of the tile-th tile at or below the diagonal, counted row by row."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def add_rounded(sums, product):
    """sums + product, outside of the tensor cores, which cut off what they should round.

    A plain sum would be moved into them; a fused multiply-add by one stays where it is.
    """
    return tl.fma(product, tl.full(product.shape, 1.0, tl.float32), sums)


@triton.jit
def product_kernel(
    x_high,  # float16 [rows, width_x]
    x_low,
    y_high,
    y_low,
    x_flags,
    y_flags,
    partial,  # float32 [splits, Cx, Cy]
    split_rows,
    rows,
    channels_x,
    channels_y,
    width_x,
    width_y,
    SAME: tl.constexpr,
    MAY_BE_WHOLE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One tile (axis 0) of the product over one split of the round's positions (axis 1)."""
    if SAME:
        row, column = triangle_tile(tl.program_id(0))
    else:
        row_count = tl.cdiv(channels_x, BLOCK_X)
        row, column = tl.program_id(0) % row_count, tl.program_id(0) // row_count
    split = tl.program_id(1).to(tl.int64)
    begin = split * split_rows
    steps = (tl.minimum(begin + split_rows, rows) - begin) // BLOCK_P

    position = tl.arange(0, BLOCK_P)[:, None]
    at_x = position * width_x + tl.arange(0, BLOCK_X)[None, :]
    at_y = position * width_y + tl.arange(0, BLOCK_Y)[None, :]
    x_high += begin * width_x + row * BLOCK_X
    x_low += begin * width_x + row * BLOCK_X
    y_high += begin * width_y + column * BLOCK_Y
    y_low += begin * width_y + column * BLOCK_Y
    step_x, step_y = BLOCK_P * width_x, BLOCK_P * width_y

    sums = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    nothing = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    cut_steps = steps
    if MAY_BE_WHOLE:
        is_cut = tl.load(x_flags + row) + tl.load(y_flags + column) > 0
        cut_steps = tl.where(is_cut, steps, 0)
        for step in range(0, steps - cut_steps):
            a = tl.load(x_high + step * step_x + at_x)
            b = tl.load(y_high + step * step_y + at_y)
            sums = add_rounded(sums, tl.dot(tl.trans(a), b, nothing))
    for step in range(0, cut_steps):
        a = tl.load(x_high + step * step_x + at_x)
        b = tl.load(y_high + step * step_y + at_y)
        a_low = tl.load(x_low + step * step_x + at_x)
        b_low = tl.load(y_low + step * step_y + at_y)
        product = tl.dot(tl.trans(a_low), b, nothing)
        product = tl.dot(tl.trans(a), b_low, product)
        product = tl.dot(tl.trans(a), b, product)
        sums = add_rounded(sums, product)

    channel_x = row.to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    channel_y = column.to(tl.int64) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    partial += split * channels_x * channels_y
    target = channel_x[:, None] * channels_y + channel_y[None, :]
    inside = (channel_x < channels_x)[:, None] & (channel_y < channels_y)[None, :]
    tl.store(partial + target, sums, mask=inside)


@triton.jit
def sum_kernel(
    comoment,  # float64 [Cx, Cy]: updated
    partial,
    x_factors,  # float64 [4, C], as state_kernel leaves them
    y_factors,
    m2,
    batch_count,
    splits,
    channels_x,
    channels_y,
    SAME: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the splits in order to the state, and in the first round what the means contribute.

    SAME takes a tile below the diagonal (or on it) to both of its places.
    """
    if SAME:
        tile_row, tile_column = triangle_tile(tl.program_id(0))
    else:
        tile_row, tile_column = tl.program_id(0), tl.program_id(1)
    row = tile_row.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tile_column.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_row, is_column = row < channels_x, column < channels_y
    valid = is_row[:, None] & is_column[None, :]
    lower = tl.maximum(row[:, None], column[None, :]) if SAME else row[:, None]
    upper = tl.minimum(row[:, None], column[None, :]) if SAME else column[None, :]
    source = partial + lower * channels_y + upper
    plane = tl.cast(channels_x, tl.int64) * channels_y
    total = tl.zeros((BLOCK, BLOCK), tl.float64)
    for _ in range(0, splits):
        total += tl.load(source, mask=valid, other=0.0).to(tl.float64)
        source += plane
    x_unit = tl.load(x_factors + row, mask=is_row, other=0.0)
    y_unit = tl.load(y_factors + column, mask=is_column, other=0.0)
    total = total * x_unit[:, None] * y_unit[None, :]
    if FIRST:
        n = tl.load(batch_count).to(tl.float64)
        x_rest = tl.load(x_factors + channels_x + row, mask=is_row, other=0.0)
        y_rest = tl.load(y_factors + channels_y + column, mask=is_column, other=0.0)
        x_spread = tl.load(x_factors + 3 * channels_x + lower, mask=valid, other=0.0)
        y_delta = tl.load(y_factors + 2 * channels_y + upper, mask=valid, other=0.0)
        total -= x_rest[:, None] * y_rest[None, :] * n
        total += x_spread * y_delta
    # Only what lies above the diagonal is read of a symmetric state.
    state = upper * channels_y + lower if SAME else lower * channels_y + upper
    total += tl.load(comoment + state, mask=valid, other=0.0)
    if SAME:
        diagonal = tl.load(m2 + row, mask=is_row, other=0.0)
        total = tl.where(row[:, None] == column[None, :], diagonal[:, None], total)
        tl.debug_barrier()  # all have read before any writes the mirrored entry
        tl.store(comoment + column[None, :] * channels_y + row[:, None], total, mask=valid)
    tl.store(comoment + row[:, None] * channels_y + column[None, :], total, mask=valid)


@dataclass(frozen=True)
class Plan:
    """Rounds and splits of the positions; from the shape alone."""

    block_x: int
    block_y: int
    tiles: int
    round_rows: int
    split_rows: int

    @property
    def splits(self) -> int:
        return triton.cdiv(self.round_rows, self.split_rows)


def make_plan(positions: int, channels_x: int, channels_y: int, same: bool) -> Plan:
    block_x, block_y = (
        min(128, max(16, triton.next_power_of_2(channels))) for channels in (channels_x, channels_y)
    )
    rows, columns = triton.cdiv(channels_x, block_x), triton.cdiv(channels_y, block_y)
    tiles = rows * (rows + 1) // 2 if same else rows * columns
    most_splits = max(1, PARTIAL_ELEMENTS // (channels_x * channels_y))
    most_rows = max(ROWS, PART_ELEMENTS // (2 * (rows * block_x + columns * block_y)))
    most_rows = min(most_rows, most_splits * SPLIT_POSITIONS)
    rounds = triton.cdiv(positions, most_rows)
    round_rows = _round_up(triton.cdiv(positions, rounds), ROWS)
    fewest = triton.cdiv(round_rows, SPLIT_POSITIONS)
    filling = triton.cdiv(tiles * fewest, PROGRAMS) * PROGRAMS // tiles
    splits = max(fewest, min(filling, most_splits, round_rows // MINIMUM_POSITIONS))
    return Plan(
        block_x, block_y, tiles, round_rows, _round_up(triton.cdiv(round_rows, splits), ROWS)
    )


def _round_up(number: int, step: int) -> int:
    return triton.cdiv(number, step) * step


def product_options(small: bool, block_x: int, block_y: int) -> dict[str, int]:
    """Positions per step, warps and pipeline stages; ``small`` for AMD, and before sm_90."""
    return {
        "BLOCK_P": 16 if small else ROWS,
        "num_warps": 8 if block_x * block_y >= 8192 else 4,
        "num_stages": 4 if small else 3,
    }


def _is_small(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] < 9


def cross_moments_(
    count: torch.Tensor,
    mean_x: torch.Tensor,
    m2_x: torch.Tensor,
    mean_y: torch.Tensor | None,
    m2_y: torch.Tensor | None,
    comoment: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> None:
    """Adds a batch to the state: float64, but for count, which is int64; contiguous.

    x ``[outer, Cx, inner]``, y ``[outer, Cy, inner]``, mask bool ``[outer, inner]`` (True =
    counted). Any strides; float32, bfloat16 or float16; at least one channel
    each.
    """
    outer, channels_x, inner = x.shape
    positions = outer * inner
    if positions == 0:
        return
    channels_y = channels_x if y is None else y.shape[1]
    plan = make_plan(positions, channels_x, channels_y, same=y is None)
    one = Stream(x, mask, plan.block_x, plan.round_rows, (count, mean_x, m2_x))
    two = one
    if y is not None:
        two = Stream(y, mask, plan.block_y, plan.round_rows, (count, mean_y, m2_y))
    partial = torch.empty(plan.splits, channels_x, channels_y, device=x.device)
    blocks = [triton.cdiv(channels, SUM_BLOCK) for channels in comoment.shape]
    sum_grid = (blocks[0] * (blocks[0] + 1) // 2,) if y is None else tuple(blocks)
    for round_begin in range(0, positions, plan.round_rows):
        for stream in (one,) if y is None else (one, two):
            stream.centre(round_begin)
        product_kernel[(plan.tiles, plan.splits)](
            one.high, one.low, two.high, two.low, one.flags, two.flags, partial,
            plan.split_rows, plan.round_rows, channels_x, channels_y, one.width, two.width,
            SAME=y is None, MAY_BE_WHOLE=x.dtype != torch.float32,
            BLOCK_X=plan.block_x, BLOCK_Y=plan.block_y,
            **product_options(_is_small(x.device), plan.block_x, plan.block_y),
        )  # fmt: skip
        sum_kernel[sum_grid](
            comoment, partial, one.factors, two.factors, m2_x, one.count, plan.splits,
            channels_x, channels_y, SAME=y is None, FIRST=round_begin == 0, BLOCK=SUM_BLOCK,
            enable_fp_fusion=False,
        )  # fmt: skip
    count += one.count
