"""Tensor descriptors, by which the copy engine of sm_90 (TMA) brings tiles into shared memory.

``NLM_TMA=1`` asks for them; they are taken where its rules allow, on sm_90 and later and in the
interpreter. Everywhere else, and by default, kernels read through pointers: no GPU has timed
descriptors yet. ``benchmarks/gpu_suite.py`` checks and times both; "tma_defaults" in its JSON says,
by the rule of that function in ``benchmarks/_gpu.py``, what an operation should do unasked.
"""

import functools
import os

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

ASKED_FOR = os.environ.get("NLM_TMA") == "1"
LARGEST_BOX = 256  # rows of one copy


def has_tma(capability: tuple[int, int]) -> bool:
    """Of an NVIDIA GPU of this compute capability."""
    return capability >= (9, 0)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether kernels may be those of sm_90 and later; in the interpreter they are."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and has_tma(torch.cuda.get_device_capability(device))


def descriptor(x: torch.Tensor, block: tuple[int, int]) -> TensorDescriptor | None:
    """``x``, ``[n, C]`` or ``[outer, C, inner]``, as rows ``[n, C]`` for loads of ``block``.

    What lies outside of x is read as zero. None: x has to be read through pointers.
    """
    if not ASKED_FOR or not is_hopper(x.device):
        return None
    rows = x if x.dim() == 2 else as_rows(x)
    if rows is None or not fits(rows, block):
        return None
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), list(block))


def fits(rows: torch.Tensor, block: tuple[int, int]) -> bool:
    """Whether TMA copies blocks of ``rows [n, C]``: aligned to 16 bytes, channels side by side."""
    (count, channels), (step, unit), size = rows.shape, rows.stride(), rows.element_size()
    aligned = rows.data_ptr() % 16 == 0 and step * size % 16 == 0 and block[1] * size >= 16
    return (
        aligned
        and unit == 1
        and step >= channels
        and size <= 4
        and block[0] <= LARGEST_BOX
        and count < 2**31
    )


def as_rows(x: torch.Tensor) -> torch.Tensor | None:
    """``[outer, C, inner]`` as ``[positions, C]``, where the positions are evenly apart."""
    (outer, channels, inner), (stride_outer, stride_channel, stride_inner) = x.shape, x.stride()
    if inner == 1:
        return x[:, :, 0]
    if outer > 1 and stride_outer != inner * stride_inner:
        return None
    return x.as_strided((outer * inner, channels), (stride_inner, stride_channel))
