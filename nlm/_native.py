"""The compiled core for tensors: what turns them into the arguments of `nlm._C` and `nlm._C_cuda`.

Both are optional: without them the operations run on their PyTorch references, which one warning in
total and :func:`nlm.info` report.
"""

import warnings
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

from nlm import _core
from nlm._core import cpu, cpu_missing, forked
from nlm._core import cuda as cuda

#: Element types as csrc/core/view.h numbers them.
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}

_SMALL, _LARGE = 1 << 17, 1 << 22  # bytes of a tensor and of a call, below which memory is reused

Result = TypeVar("Result", Tensor, list[Tensor])

_no_cuda = None if torch.version.cuda else "this PyTorch has no CUDA"
_no_gpu = None if torch.version.cuda or torch.version.hip else "this PyTorch has no CUDA"
cuda_missing = _core.cuda_missing or _no_cuda
triton_missing = _no_gpu if find_spec("triton") else "triton is not installed"

if cpu is None:
    warnings.warn(
        f"nlm: the compiled core is missing ({cpu_missing}); operations run on their slower "
        "PyTorch references. See nlm.info().",
        stacklevel=2,
    )


def threads() -> int:
    """Threads for one call: PyTorch's number; one in a forked child, where libgomp would hang."""
    return 1 if forked() else torch.get_num_threads()


def fresh(out: Result) -> Result:
    """``out``, one or more tensors just allocated and not yet written to, with their pages.

    Memory that comes from the system is zeroed on its first touch, which takes longer than most
    operations do where it happens in pages of 4 KiB, or as threads meet in larger ones.
    """
    if cpu is None:
        return out
    tensors = [out] if isinstance(out, Tensor) else out
    blocks = [(x.data_ptr(), x.nbytes) for x in tensors if x.nbytes >= _SMALL]
    if sum(size for _, size in blocks) >= _LARGE:
        cpu.provide_pages(blocks, threads())
    return out


def stream(x: Tensor) -> int:
    """Address of PyTorch's current stream on the GPU that holds ``x``."""
    return torch.cuda.current_stream(x.device).cuda_stream


def view3(x: Tensor) -> tuple[int, int, int, int, int, int, int, int]:
    """``x`` of three dimensions as csrc/core/view.h's View3. The caller keeps ``x`` alive."""
    return (x.data_ptr(), DTYPES[x.dtype], *x.shape, *x.stride())


def mask2(mask: Tensor | None) -> tuple[int, int, int]:
    """``mask`` of two dimensions, or None, as Mask2."""
    if mask is None:
        return 0, 0, 0
    outer_stride, inner_stride = mask.stride()
    return mask.data_ptr(), outer_stride, inner_stride
