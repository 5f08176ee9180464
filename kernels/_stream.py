"""One stream of channels, centred and scaled for tensor cores: a part of ``cross_moments``.

``channel_moments`` gives the batch's float64 means and m2, which are merged into the state's. Per
channel a shift s (the mean, rounded) and a power of two u with ``std < u <= 2 std`` make
``(x - s) / u`` of order one, which two float16 numbers, high + low, hold to 2^-22 of its size and
2^-24 of one: deviations below 65504 u, which fewer than 4e9 positions cannot exceed.

A bfloat16 or float16 stream keeps s = 0 where |mean| <= std, which costs a bit of the float32 sums
and leaves its values as they are: then there is no low part, and a flag per block of channels says
so.
"""

import torch
import triton
import triton.language as tl
from nlm.kernels._positions import counted_positions, layout_unit, position_offsets
from nlm.kernels.channel_moments import channel_moments

ROWS = 64  # positions are centred in blocks of these
STATE_BLOCK = 128


@triton.jit
def state_kernel(
    count,  # int64 [], of the state
    mean,  # float64 [C], of the state: updated
    m2,
    batch_count,
    batch_mean,
    batch_m2,
    shift,  # float32 [C]
    shrink,  # float32 [C]: 1 / u
    factors,  # float64 [4, C]: u, mean - shift, delta, n_a n_b / n delta
    flags,  # int32, one per channel block: cleared
    channels,
    flag_count,
    DROPPED: tl.constexpr,  # low bits of float32 that the stream's type lacks
    BLOCK: tl.constexpr,
):
    """Merges one stream's means and m2 by Chan's formula, and says how to centre and scale it."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = channel < channels
    n_a, n_b = tl.load(count), tl.load(batch_count)
    old_mean, new_mean = tl.load(mean + channel, valid), tl.load(batch_mean + channel, valid)
    old_m2, new_m2 = tl.load(m2 + channel, valid), tl.load(batch_m2 + channel, valid)
    infinity = float("inf")

    weight = n_b.to(tl.float64) / tl.maximum(n_a + n_b, 1).to(tl.float64)
    delta = tl.where(n_b > 0, new_mean - old_mean, 0.0)
    spread = n_a.to(tl.float64) * weight * delta
    # Where a mean is infinite, delta * weight would turn it into NaN.
    mean_now = tl.where(tl.abs(delta) < infinity, old_mean + delta * weight, old_mean + new_mean)
    tl.store(mean + channel, mean_now, valid)
    tl.store(m2 + channel, old_m2 + new_m2 + spread * delta, valid)

    variance = new_m2 / tl.maximum(n_b, 1).to(tl.float64)
    origin = new_mean.to(tl.float32)
    if DROPPED > 0:
        whole = origin.to(tl.int32, bitcast=True) + (1 << (DROPPED - 1))
        origin = (whole >> DROPPED << DROPPED).to(tl.float32, bitcast=True)
        origin = tl.where(new_mean * new_mean <= variance, 0.0, origin)
    origin = tl.where(tl.abs(origin) < infinity, origin, 0.0)
    # The power of two of the standard deviation, from the bits of float32: exact on every device.
    deviation = tl.sqrt(variance).to(tl.float32)
    bits = deviation.to(tl.int32, bitcast=True)
    exponent = tl.minimum(tl.maximum((bits >> 23) & 255, 2), 252)
    known = (deviation > 0.0) & (deviation < infinity)
    exponent = tl.where(known, exponent, 126) + 1
    unit = (exponent << 23).to(tl.float32, bitcast=True)
    tl.store(shift + channel, origin, valid)
    tl.store(shrink + channel, ((254 - exponent) << 23).to(tl.float32, bitcast=True), valid)
    tl.store(factors + channel, unit.to(tl.float64), valid)
    tl.store(factors + channels + channel, new_mean - origin.to(tl.float64), valid)
    tl.store(factors + 2 * channels + channel, delta, valid)
    tl.store(factors + 3 * channels + channel, spread, valid)
    tl.store(flags + channel, 0, channel < flag_count)


@triton.jit
def centre_kernel(
    x,
    shift,
    shrink,
    mask,  # uint8, not read unless HAS_MASK
    high,  # float16 [rows, blocks * BLOCK_C]
    low,
    flags,
    round_begin,
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
    DIVIDES: tl.constexpr,
    UNIT: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(x - shift) * shrink in two float16 numbers; zero where nothing counts."""
    row = tl.program_id(1).to(tl.int64) * TILE_P
    first = round_begin + row
    steps = tl.arange(0, TILE_P)
    channel = tl.program_id(0).to(tl.int64) * TILE_C + tl.arange(0, TILE_C)
    is_channel = channel < channels
    origin = tl.load(shift + channel, mask=is_channel, other=0.0)
    factor = tl.load(shrink + channel, mask=is_channel, other=0.0)
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
    lower = (centred - upper.to(tl.float32)).to(tl.float16)
    target = (row + steps)[:, None] * width + channel[None, :]
    tl.store(high + target, upper)
    tl.store(low + target, lower)
    is_cut = tl.max(tl.max((lower != 0.0).to(tl.int32), axis=1), axis=0)
    if is_cut > 0:
        tl.atomic_max(flags + tl.program_id(0) * TILE_C // BLOCK_C, 1)


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
        self.x, self.block = x, block
        self.mask = None if mask is None else mask.view(torch.uint8)
        channels = x.shape[1]
        self.count, mean, m2 = channel_moments(x, mask)
        self.blocks = triton.cdiv(channels, block)
        self.width = self.blocks * block
        self.shift, self.shrink = torch.empty(2, channels, device=x.device)
        self.factors = torch.empty(4, channels, dtype=torch.float64, device=x.device)
        self.flags = torch.empty(self.blocks, dtype=torch.int32, device=x.device)
        self.high, self.low = torch.empty(2, rows, self.width, dtype=torch.float16, device=x.device)
        state_kernel[(triton.cdiv(channels, STATE_BLOCK),)](
            *state, self.count, mean, m2, self.shift, self.shrink, self.factors, self.flags,
            channels, self.blocks,
            DROPPED={torch.bfloat16: 16, torch.float16: 13}.get(x.dtype, 0),
            BLOCK=STATE_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip

    def centre(self, round_begin: int) -> None:
        """Fills ``high`` and ``low`` with one round's positions."""
        outer, channels, inner = self.x.shape
        tile = min(64, self.block)
        centre_kernel[(self.width // tile, len(self.high) // ROWS)](
            self.x, self.shift, self.shrink, self.x if self.mask is None else self.mask,
            self.high, self.low, self.flags, round_begin, outer * inner, channels, self.width,
            inner, *self.x.stride(),
            *((0, 0) if self.mask is None else self.mask.stride()),
            HAS_MASK=self.mask is not None, DIVIDES=inner > 1, UNIT=layout_unit(self.x),
            TILE_P=ROWS, TILE_C=tile, BLOCK_C=self.block, enable_fp_fusion=False,
        )  # fmt: skip
