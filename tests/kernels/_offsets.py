"""A kernel that stores what `position_offsets` computes: the interpreter wants it in a module."""

import triton
import triton.language as tl
from nlm.kernels._positions import position_offsets


@triton.jit
def offsets_of(out, first, inner, stride_outer, stride_inner, STEPS: tl.constexpr):
    steps = tl.arange(0, STEPS)
    tl.store(
        out + steps, position_offsets(first, steps, inner, stride_outer, stride_inner, True, 1)
    )
