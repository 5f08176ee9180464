"""Drops entries of rows at random, the smaller ones more often (DELLA's MagPrune), in Triton.

    out[i] = x[i] factors[r]   where the word of rank r is at least least[r],   0 x[i]   elsewhere

with r the rank of |x[i]| in its segment of a row: :mod:`nlm.ops.magprune`.

*Ranks.* The places of a segment are sorted by counting, 4 bits of the magnitudes at a time from the
lowest on. A digit keeps the order of what it does not tell apart, so that of equal magnitudes the
first comes first. Where a place goes is the number of lower digits in all, of equal ones in earlier
tiles, and of equal ones before it in its tile: a running sum over a one-hot ``[BLOCK, 16]``. The
last digit's targets are the ranks: its pass draws, multiplies and writes instead of moving.

*Programs.* A segment of up to ``SHORT`` entries belongs to one program, which takes all passes over
it; places go back and forth between two rows of scratch that it keeps for its next segments, so
that they stay in the cache. A longer one is cut into chunks, a program each, and every pass is a
launch that counts and one that moves. What is summed are integers and nothing is added by atomics:
the same bits on every run, and as the reference.

Bytes per pass and entry: 4 and 4 of places, 2 of x where it is read in order and at its place; 4
passes for 16 bits, 8 for 32, 16 for 64.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from nlm.kernels._positions import blocks, next_power_of_2

DIGIT = tl.constexpr(4)
BINS = tl.constexpr(16)
BLOCK, WARPS = 512, 8
SHORT = 1 << 15
CHUNK = 1 << 13
PROGRAMS = 132 * 8  # at most of short segments, for each of which there is scratch
WAVE = 1 << 26  # places of longer segments that are sorted together: 512 MB of scratch
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Table = tuple[np.ndarray, np.ndarray]


@triton.jit
def places_at(source, at, end, is_ordered):
    """What stands at ``at`` of the order that ``source`` holds, or of memory's."""
    place = tl.load(source + at, mask=at < tl.where(is_ordered, end, 0), other=0)
    return tl.where(is_ordered, place, at)


@triton.jit
def digits_of(bits, place, inside, number, DIGITS: tl.constexpr):
    """Digits of the magnitudes at ``place``: int32 in [0, BINS), BINS outside.

    They are numbered from the lowest; the last has a sign, which is left out.
    """
    found = tl.load(bits + place, mask=inside, other=0) >> (number * DIGIT)
    lower = tl.where(number == DIGITS - 1, BINS // 2 - 1, BINS - 1)
    return tl.where(inside, found.to(tl.int32) & lower, BINS)


@triton.jit
def count_digits(
    bits, source, begin, end, number, is_ordered, DIGITS: tl.constexpr, BLOCK: tl.constexpr
):
    """How often each digit occurs in [begin, end): int32 [BINS]. Of memory, or of the order that
    ``source`` holds."""
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for tile in range(begin, end, BLOCK):
        at = tile + tl.arange(0, BLOCK)
        inside = at < end
        place = places_at(source, at, end, is_ordered)
        digit = digits_of(bits, place, inside, number, DIGITS)
        counts += tl.sum((digit[:, None] == bins[None, :]).to(tl.int32), 0)
    return counts


@triton.jit
def words_at(position, seed):
    """The random words of positions, int64: uint32, as :mod:`nlm.ops.dare` has them."""
    counter = position >> 2
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    first, second, third, fourth = tl.philox(seed, low, high, zero, zero)
    which = position & 3
    lower = tl.where(which == 0, first, second)
    return tl.where(which < 2, lower, tl.where(which == 2, third, fourth))


@triton.jit
def prune(out, x, place, rank, inside, least, factors, position, seed, WIDE: tl.constexpr):
    """Writes the entries at ``place``, whose ranks are known."""
    drawn = words_at(position + rank, seed)
    limit = tl.load(least + rank, mask=inside, other=0).to(tl.uint32, bitcast=True)
    factor = tl.load(factors + rank, mask=inside, other=0.0).to(WIDE)
    factor = tl.where(drawn >= limit, factor, tl.zeros_like(factor))
    value = tl.load(x + place, mask=inside, other=0.0).to(WIDE)
    tl.store(out + place, (value * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def move(
    out, x, bits, source, target, starts, begin, end, number, least, factors, position, seed,
    DIGITS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Takes [begin, end) of the order, at first that of memory, to where its digits go, which is
    from ``starts`` on; by the last digit it prunes instead."""
    bins = tl.arange(0, BINS)
    for tile in range(begin, end, BLOCK):
        at = tile + tl.arange(0, BLOCK)
        inside = at < end
        place = places_at(source, at, end, number > 0)
        digit = digits_of(bits, place, inside, number, DIGITS)
        here = (digit[:, None] == bins[None, :]).to(tl.int32)  # [BLOCK, BINS]
        upto = tl.cumsum(here, 0) + starts[None, :]
        goal = tl.sum(here * upto, 1) - 1
        starts += tl.sum(here, 0)
        if number == DIGITS - 1:
            prune(out, x, place, goal, inside, least, factors, position, seed, WIDE)
        else:
            tl.store(target + goal, place, mask=inside)


@triton.jit
def segment_of(segment, segments, length, SEGMENT: tl.constexpr):
    """(where a segment begins among all entries, its length, where its chances begin)."""
    part = (segment % segments).to(tl.int64) * SEGMENT
    begin = (segment // segments).to(tl.int64) * length + part
    count = tl.minimum(length - part, SEGMENT).to(tl.int32)
    return begin, count, tl.where((part > 0) & (count < SEGMENT), SEGMENT, 0)


@triton.jit(do_not_specialize=["offset", "seed"])
def short_kernel(
    out,
    x,
    bits,  # x as integers
    scratch,  # int32 [programs, 2, length]
    least,  # uint32 as int32
    factors,  # float64
    offset,
    seed,
    rows,
    length,
    DIGITS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every num_programs-th row, by all digits."""
    places = scratch + tl.program_id(0).to(tl.int64) * 2 * length
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        begin = tl.cast(row, tl.int64) * length
        for number in range(0, DIGITS):
            source, target = places + number % 2 * length, places + (1 - number % 2) * length
            counts = count_digits(bits + begin, source, 0, length, number, False, DIGITS, BLOCK)
            move(
                out + begin, x + begin, bits + begin, source, target,
                tl.cumsum(counts, 0) - counts, 0, length, number, least, factors, offset + begin,
                seed, DIGITS, WIDE, BLOCK,
            )  # fmt: skip
            tl.debug_barrier()  # what was written is read next, and what was read written


@triton.jit(do_not_specialize=["number"])
def count_kernel(
    counts,  # int32 [segments here, BINS, chunks]
    bits,
    source,  # int32 [segments here, SEGMENT]
    first,  # segment of this wave
    segments,  # of a row
    length,
    number,
    DIGITS: tl.constexpr,
    SEGMENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts a digit in one chunk (axis 1) of one segment (axis 0)."""
    here, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, count, _ = segment_of(first + here, segments, length, SEGMENT)
    found = count_digits(
        bits + begin, source + here * SEGMENT, chunk * CHUNK,
        tl.minimum((chunk + 1) * CHUNK, count), number, number > 0, DIGITS, BLOCK,
    )  # fmt: skip
    tl.store(counts + (here * BINS + tl.arange(0, BINS)) * tl.num_programs(1) + chunk, found)


@triton.jit(do_not_specialize=["offset", "seed", "number"])
def move_kernel(
    out,
    x,
    bits,
    source,  # int32 [segments here, SEGMENT]
    target,
    ends,  # int64 [segments here, BINS, chunks]: the counts of a segment, summed up
    counts,
    least,  # of whole segments, then of the last one of a row
    factors,
    offset,
    seed,
    first,
    segments,
    length,
    number,
    DIGITS: tl.constexpr,
    WIDE: tl.constexpr,
    SEGMENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Moves one chunk (axis 1) of one segment (axis 0) by a digit."""
    here, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, count, chances = segment_of(first + here, segments, length, SEGMENT)
    at = (here * BINS + tl.arange(0, BINS)) * tl.num_programs(1) + chunk
    starts = (tl.load(ends + at) - tl.load(counts + at)).to(tl.int32)
    places = here * SEGMENT
    move(
        out + begin, x + begin, bits + begin, source + places, target + places, starts,
        chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, count), number, least + chances,
        factors + chances, offset + begin, seed, DIGITS, WIDE, BLOCK,
    )  # fmt: skip


@dataclass(frozen=True)
class Pruning:
    """What all launches take."""

    out: torch.Tensor
    x: torch.Tensor
    chances: tuple[torch.Tensor, torch.Tensor]
    segment: int
    offset: int
    seed: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.out, self.x, self.x.view(INTEGERS[self.x.element_size()])

    @property
    def options(self) -> dict[str, Any]:
        digits = 8 * self.x.element_size() // DIGIT.value
        return {"DIGITS": digits, "num_warps": WARPS, "enable_fp_fusion": False}

    @property
    def wide(self) -> Any:
        return tl.float64 if self.x.dtype == torch.float64 else tl.float32

    def short(self) -> None:
        rows, length = self.x.shape
        programs = min(rows, PROGRAMS)
        scratch = self.x.new_empty(programs, 2, length, dtype=torch.int32)
        short_kernel[(programs,)](
            *self.tensors, scratch, *self.chances, self.offset, self.seed, rows, length,
            WIDE=self.wide, BLOCK=min(BLOCK, max(16, next_power_of_2(length))), **self.options,
        )  # fmt: skip

    def long(self) -> None:
        rows, length = self.x.shape
        longest, segments = min(self.segment, length), blocks(length, self.segment)
        together = max(1, min(WAVE // longest, rows * segments))
        order = self.x.new_empty(2, together, longest, dtype=torch.int32)
        chunks = blocks(longest, CHUNK)
        counts = self.x.new_empty(together, BINS.value, chunks, dtype=torch.int32)
        out, x, bits = self.tensors
        options = {"SEGMENT": longest, "CHUNK": CHUNK, "BLOCK": BLOCK} | self.options
        for first in range(0, rows * segments, together):
            grid = min(together, rows * segments - first), chunks
            for number in range(options["DIGITS"]):
                source, target = order[number % 2], order[1 - number % 2]
                where = first, segments, length, number
                count_kernel[grid](counts, bits, source, *where, **options)
                ends = counts.view(together, -1).cumsum(1)
                move_kernel[grid](
                    out, x, bits, source, target, ends, counts, *self.chances, self.offset,
                    self.seed, *where, WIDE=self.wide, **options,
                )  # fmt: skip


def magprune(
    out: torch.Tensor, x: torch.Tensor, tables: list[Table], segment: int, offset: int, seed: int
) -> None:
    """Prunes rows of x into ``out``: both ``[rows, length]``, contiguous, of one float type.

    ``tables``: least and factors by rank, of a whole segment (or of a row, where it is shorter) and
    of the last one of a row, as :func:`nlm._random.chances_by_rank` gives them; a whole segment has
    ``segment`` entries, at most 2^31.
    """
    if x.numel() == 0:
        return
    least = np.concatenate([each for each, _ in tables]).view(np.int32)
    factors = np.concatenate([each for _, each in tables])
    chances = torch.from_numpy(least).to(x.device), torch.from_numpy(factors).to(x.device)
    work = Pruning(out, x, chances, segment, offset, seed)
    if x.shape[1] <= min(SHORT, segment):
        work.short()
    else:
        work.long()
