"""One stream of channels, centred and scaled for tensor cores: a part of ``cross_moments``.

The partials of ``channel_moments`` are pooled to the batch's float64 means and m2, which are merged
into the state's. Per channel a shift s (the mean, rounded) and a power of two u with
``std < u <= 2 std`` make ``(x - s) / u`` of order one, which two float16 numbers, high + low, hold
to 2^-22 of its size and 2^-24 of one: deviations below 65504 u, which fewer than 4e9 positions
cannot exceed.

A bfloat16 or float16 stream keeps s = 0 where |mean| <= std, which costs a bit of the float32 sums
and leaves its values as they are: then what high lacks is at most 2^-25, low is zero, and a block
of channels that all keep s = 0 is *whole*: its low part is neither written nor read.

*Factors* are one float64 array of six rows ``[C]``, s, 1 / u, u, mean - s, delta and
n_a n_b / n delta (of the means, in Chan's formula), and the batch's count n_b behind them.
"""

import torch
import triton
import triton.language as tl
from nlm.kernels._positions import blocks, counted_positions, layout_unit, position_offsets
from nlm.kernels.channel_moments import MERGE_CHANNELS, MERGE_PARTIALS, accumulate, pooled

ROWS = 64  # positions are centred in blocks of these


@triton.jit
def state_kernel(
    count,  # int64 [], of the state
    mean,  # float64 [C], of the state: updated
    m2,
    partial,  # float64, of the batch
    factors,  # float64 [6 C + 1]
    splits,
    channels,
    DROPPED: tl.constexpr,  # low bits of float32 that the stream's type lacks
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merges one stream's means and m2 by Chan's formula, and says how to centre and scale it."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    n_b, new_mean, new_m2 = pooled(
        partial, splits, channels, channel.to(tl.int64), BLOCK_S, BLOCK_C
    )
    n_a = tl.load(count).to(tl.float64)
    old_mean, old_m2 = tl.load(mean + channel, valid), tl.load(m2 + channel, valid)
    infinity = float("inf")

    weight = n_b / tl.maximum(n_a + n_b, 1.0)
    delta = tl.where(n_b > 0.0, new_mean - old_mean, 0.0)
    spread = n_a * weight * delta
    # Where a mean is infinite, delta * weight would turn it into NaN.
    mean_now = tl.where(tl.abs(delta) < infinity, old_mean + delta * weight, old_mean + new_mean)
    tl.store(mean + channel, mean_now, valid)
    tl.store(m2 + channel, old_m2 + new_m2 + spread * delta, valid)

    variance = new_m2 / tl.maximum(n_b, 1.0)
    origin = new_mean.to(tl.float32)
    if DROPPED > 0:
        whole = origin.to(tl.int32, bitcast=True) + (1 << (DROPPED - 1))
        origin = (whole >> DROPPED << DROPPED).to(tl.float32, bitcast=True)
        origin = tl.where(new_mean * new_mean <= variance, 0.0, origin)
    origin = tl.where(tl.abs(origin) < infinity, origin, 0.0).to(tl.float64)
    # The power of two of the standard deviation, from the bits of float32: exact on every device.
    deviation = tl.sqrt(variance).to(tl.float32)
    bits = deviation.to(tl.int32, bitcast=True)
    exponent = tl.minimum(tl.maximum((bits >> 23) & 255, 2), 252)
    known = (deviation > 0.0) & (deviation < infinity)
    exponent = tl.where(known, exponent, 126) + 1
    unit = (exponent << 23).to(tl.float32, bitcast=True)
    shrink = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    factors += channel
    tl.store(factors, origin, valid)
    tl.store(factors + channels, shrink.to(tl.float64), valid)
    tl.store(factors + 2 * channels, unit.to(tl.float64), valid)
    tl.store(factors + 3 * channels, new_mean - origin, valid)
    tl.store(factors + 4 * channels, delta, valid)
    tl.store(factors + 5 * channels, spread, valid)
    tl.store(factors + 6 * channels, n_b, channel == 0)


@triton.jit
def is_cut(factors, channel, channels):
    """1 where a block of channels of 16 bits has a shift, and so a low part, or else 0."""
    shift = tl.load(factors + channel, mask=channel < channels, other=0.0)
    return tl.max((shift != 0.0).to(tl.int32), axis=0)


@triton.jit
def centre_kernel(
    x,
    factors,
    mask,  # uint8, not read unless HAS_MASK
    parts,  # float16 [2 rows, blocks * BLOCK_C]: high, and below it low
    round_begin,
    rows,
    positions,
    channels,
    width,
    inner,
    stride_outer,
    stride_channel,
    stride_inner,
    mask_stride_outer,
    mask_stride_inner,
    HAS_MASK: tl.constexpr,
    MAY_BE_WHOLE: tl.constexpr,
    DIVIDES: tl.constexpr,
    UNIT: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(x - shift) / unit in two float16 numbers; zero where nothing counts."""
    row = tl.program_id(1).to(tl.int64) * TILE_P
    first = round_begin + row
    steps = tl.arange(0, TILE_P)
    channel = tl.program_id(0).to(tl.int64) * TILE_C + tl.arange(0, TILE_C)
    is_channel = channel < channels
    origin = tl.load(factors + channel, mask=is_channel, other=0.0).to(tl.float32)
    factor = tl.load(factors + channels + channel, mask=is_channel, other=0.0).to(tl.float32)
    offsets = position_offsets(first, steps, inner, stride_outer, stride_inner, DIVIDES, UNIT)
    # A mask read from memory would make the loads of x scalar, so it is applied afterwards.
    inside = (first + steps < positions)[:, None] & is_channel[None, :]
    source = x + tl.multiple_of(channel * stride_channel, UNIT)[None, :] + offsets[:, None]
    values = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    counted = counted_positions(
        mask, first, steps, positions, inner, mask_stride_outer, mask_stride_inner,
        HAS_MASK, DIVIDES,
    )  # fmt: skip
    # Each term is scaled before the difference, which could leave float32.
    centred = values * factor[None, :] - (origin * factor)[None, :]
    centred = tl.where(counted[:, None] & is_channel[None, :], centred, 0.0)
    upper = centred.to(tl.float16)
    # NaN, so that infinity comes out as it does where there is a low part: infinity - infinity.
    upper = tl.where(tl.abs(upper.to(tl.float32)) < float("inf"), upper, float("nan"))
    target = parts + (row + steps)[:, None] * width + channel[None, :]
    tl.store(target, upper)
    has_low = 1
    if MAY_BE_WHOLE:
        block = tl.program_id(0) * TILE_C // BLOCK_C * BLOCK_C + tl.arange(0, BLOCK_C)
        has_low = is_cut(factors, block, channels)
    if has_low > 0:
        lower = (centred - upper.to(tl.float32)).to(tl.float16)
        tl.store(target + tl.cast(rows, tl.int64) * width, lower)


class Stream:
    """One of the two: its batch's moments, merged into the state's, and what centres it."""

    def __init__(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        block: int,
        rows: int,
        state: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> None:
        self.x, self.block, self.rows = x, block, rows
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.may_be_whole = x.dtype != torch.float32
        channels = x.shape[1]
        self.width = blocks(channels, block) * block
        partial, splits = accumulate(x, self.mask)
        self.factors = torch.empty(6 * channels + 1, dtype=torch.float64, device=x.device)
        self.parts = torch.empty(2 * rows, self.width, dtype=torch.float16, device=x.device)
        state_kernel[(blocks(channels, MERGE_CHANNELS),)](
            *state, partial, self.factors, splits, channels,
            DROPPED={torch.bfloat16: 16, torch.float16: 13}.get(x.dtype, 0),
            BLOCK_S=MERGE_PARTIALS, BLOCK_C=MERGE_CHANNELS, enable_fp_fusion=False,
        )  # fmt: skip

    def centre(self, round_begin: int) -> None:
        """Fills ``parts`` with one round's positions."""
        outer, channels, inner = self.x.shape
        tile = min(64, self.block)
        centre_kernel[(self.width // tile, self.rows // ROWS)](
            self.x, self.factors, self.x if self.mask is None else self.mask, self.parts,
            round_begin, self.rows, outer * inner, channels, self.width, inner, *self.x.stride(),
            *((0, 0) if self.mask is None else self.mask.stride()),
            HAS_MASK=self.mask is not None, MAY_BE_WHOLE=self.may_be_whole, DIVIDES=inner > 1,
            UNIT=layout_unit(self.x), TILE_P=ROWS, TILE_C=tile, BLOCK_C=self.block,
            enable_fp_fusion=False,
        )  # fmt: skip
