"""Adds a batch of two streams to their means, M2s and co-moment matrix, in Triton.

    comoment[i, j] += sum_p (x[p, i] - mean_x[i]) (y[p, j] - mean_y[j])            # [Cx, Cy]

over the positions of two strided ``[outer, C, inner]`` views that share their positions, and Chan's
terms for the difference from the means so far; without y, x with itself: half of the tiles are
computed, the other half mirrored, and the diagonal is m2, so the matrix is symmetric to the bit.

*Numerics.* ``_stream.py`` centres and scales the batch: ``(x - s) / u`` as two float16 numbers, a
high and a low part, which whole blocks of channels lack. The tensor cores multiply
``high high + high low + low high`` (of whole blocks, ``high high``) over ``ROWS`` positions. They
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
from nlm.kernels._descriptors import descriptor, is_hopper
from nlm.kernels._positions import blocks, next_power_of_2
from nlm.kernels._stream import ROWS, Stream, is_cut

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
def load_part(
    parts, first, column, width, there,
    TMA: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows of ``parts`` from ``first`` on; zeros unless ``there``, which is None where they are."""
    if TMA:
        if there is not None:
            first = tl.where(there > 0, first, -BLOCK_P)  # above the first row, zeros are read
        return parts.load([tl.cast(first, tl.int32), column])
    else:
        at = tl.arange(0, BLOCK_P)[:, None] * width + tl.arange(0, BLOCK_C)[None, :]
        source = parts + (first * width + column) + at
        if there is None:
            return tl.load(source)
        else:
            return tl.load(source, mask=tl.broadcast_to(there, at.shape) > 0, other=0.0)


@triton.jit
def product_kernel(
    x_parts,  # float16 [2 rows, width_x], or a descriptor of it if TMA
    y_parts,
    x_factors,  # float64, as state_kernel leaves them
    y_factors,
    partial,  # float32 [splits, Cx, Cy]
    split_rows,
    rows,
    channels_x,
    channels_y,
    width_x,
    width_y,
    SAME: tl.constexpr,
    MAY_BE_WHOLE: tl.constexpr,
    TMA: tl.constexpr,
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
    at_x, at_y = row * BLOCK_X, column * BLOCK_Y
    channel_x = at_x.to(tl.int64) + tl.arange(0, BLOCK_X)
    channel_y = at_y.to(tl.int64) + tl.arange(0, BLOCK_Y)

    sums = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    nothing = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    x_cut, y_cut = None, None
    cut_steps = steps
    if MAY_BE_WHOLE:
        x_cut = is_cut(x_factors, channel_x, channels_x)
        y_cut = is_cut(y_factors, channel_y, channels_y)
        cut_steps = tl.where(x_cut + y_cut > 0, steps, 0)
        for step in range(0, steps - cut_steps):
            first = begin + step * BLOCK_P
            a = load_part(x_parts, first, at_x, width_x, None, TMA, BLOCK_P, BLOCK_X)
            b = load_part(y_parts, first, at_y, width_y, None, TMA, BLOCK_P, BLOCK_Y)
            sums = add_rounded(sums, tl.dot(tl.trans(a), b, nothing))
    for step in range(0, cut_steps):
        first = begin + step * BLOCK_P
        a = load_part(x_parts, first, at_x, width_x, None, TMA, BLOCK_P, BLOCK_X)
        b = load_part(y_parts, first, at_y, width_y, None, TMA, BLOCK_P, BLOCK_Y)
        a_low = load_part(x_parts, rows + first, at_x, width_x, x_cut, TMA, BLOCK_P, BLOCK_X)
        b_low = load_part(y_parts, rows + first, at_y, width_y, y_cut, TMA, BLOCK_P, BLOCK_Y)
        product = tl.dot(tl.trans(a_low), b, nothing)
        product = tl.dot(tl.trans(a), b_low, product)
        product = tl.dot(tl.trans(a), b, product)
        sums = add_rounded(sums, product)

    partial += split * channels_x * channels_y
    target = channel_x[:, None] * channels_y + channel_y[None, :]
    inside = (channel_x < channels_x)[:, None] & (channel_y < channels_y)[None, :]
    tl.store(partial + target, sums, mask=inside)


@triton.jit
def sum_kernel(
    count,  # int64 [], of the state: updated in the first round
    comoment,  # float64 [Cx, Cy]: updated
    partial,
    x_factors,
    y_factors,
    m2,
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
    x_unit = tl.load(x_factors + 2 * channels_x + row, mask=is_row, other=0.0)
    y_unit = tl.load(y_factors + 2 * channels_y + column, mask=is_column, other=0.0)
    total = total * x_unit[:, None] * y_unit[None, :]
    if FIRST:
        n = tl.load(x_factors + 6 * channels_x)
        x_rest = tl.load(x_factors + 3 * channels_x + row, mask=is_row, other=0.0)
        y_rest = tl.load(y_factors + 3 * channels_y + column, mask=is_column, other=0.0)
        x_spread = tl.load(x_factors + 5 * channels_x + lower, mask=valid, other=0.0)
        y_delta = tl.load(y_factors + 4 * channels_y + upper, mask=valid, other=0.0)
        total -= x_rest[:, None] * y_rest[None, :] * n
        total += x_spread * y_delta
        if tl.program_id(0) + tl.program_id(1) == 0:
            tl.store(count, tl.load(count) + n.to(tl.int64))
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
        return blocks(self.round_rows, self.split_rows)


def make_plan(positions: int, channels_x: int, channels_y: int, same: bool) -> Plan:
    block_x, block_y = (
        min(128, max(16, next_power_of_2(channels))) for channels in (channels_x, channels_y)
    )
    rows, columns = blocks(channels_x, block_x), blocks(channels_y, block_y)
    tiles = rows * (rows + 1) // 2 if same else rows * columns
    most_splits = max(1, PARTIAL_ELEMENTS // (channels_x * channels_y))
    most_rows = max(ROWS, PART_ELEMENTS // (2 * (rows * block_x + columns * block_y)))
    most_rows = min(most_rows, most_splits * SPLIT_POSITIONS)
    rounds = blocks(positions, most_rows)
    round_rows = _round_up(blocks(positions, rounds), ROWS)
    fewest = blocks(round_rows, SPLIT_POSITIONS)
    filling = blocks(tiles * fewest, PROGRAMS) * PROGRAMS // tiles
    splits = max(fewest, min(filling, most_splits, round_rows // MINIMUM_POSITIONS))
    return Plan(block_x, block_y, tiles, round_rows, _round_up(blocks(round_rows, splits), ROWS))


def _round_up(number: int, step: int) -> int:
    return blocks(number, step) * step


def product_options(small: bool, block_x: int, block_y: int) -> dict[str, int]:
    """Positions per step, warps and pipeline stages; ``small`` for AMD, and before sm_90."""
    return {
        "BLOCK_P": 16 if small else ROWS,
        "num_warps": 8 if block_x * block_y >= 8192 else 4,
        "num_stages": 4 if small else 3,
    }


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
    x_parts, y_parts = (
        descriptor(stream.parts, (ROWS, stream.block)) or stream.parts for stream in (one, two)
    )
    options = product_options(not is_hopper(x.device), plan.block_x, plan.block_y)
    sum_rows, sum_columns = blocks(channels_x, SUM_BLOCK), blocks(channels_y, SUM_BLOCK)
    sum_grid = (sum_rows * (sum_rows + 1) // 2, 1) if y is None else (sum_rows, sum_columns)
    for round_begin in range(0, positions, plan.round_rows):
        for stream in (one,) if y is None else (one, two):
            stream.centre(round_begin)
        product_kernel[(plan.tiles, plan.splits)](
            x_parts, y_parts, one.factors, two.factors, partial, plan.split_rows,
            plan.round_rows, channels_x, channels_y, one.width, two.width, SAME=y is None,
            MAY_BE_WHOLE=one.may_be_whole, TMA=x_parts is not one.parts,
            BLOCK_X=plan.block_x, BLOCK_Y=plan.block_y, **options,
        )  # fmt: skip
        sum_kernel[sum_grid](
            count, comoment, partial, one.factors, two.factors, m2_x, plan.splits,
            channels_x, channels_y, SAME=y is None, FIRST=round_begin == 0, BLOCK=SUM_BLOCK,
            enable_fp_fusion=False,
        )  # fmt: skip
