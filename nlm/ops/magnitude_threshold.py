"""The k-th largest magnitude of a list of tensors, which TIES trims by (arXiv:2306.01708).

With all entries of the list as one vector,

    t = the k-th largest of |x_i - base_i| ,

so that at least k entries have |x_i - base_i| >= t, and fewer than k have more. Nothing is sorted,
and no difference is stored.

Bytes: on the CPU one read of the tensors and of the base (more where a sample misleads, which
changes the time alone); on the GPU three reads, six for float64. Flops: 2 per element. Numerics: a
difference is rounded to float32, or to float64 where the tensor or its base is float64; the result
is one of these magnitudes, exactly, whatever the threads or the device. NaN counts as larger than
all numbers, as in ``torch.kthvalue`` and ``torch.topk``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nlm import _native
from nlm._registry import register
from nlm.ops._arguments import check_tensor, without_gradient
from nlm.ops._channels import FLOATS


def _difference_dtype(x: Tensor, base: Tensor | None) -> torch.dtype:
    is_wide = torch.float64 in (x.dtype, x.dtype if base is None else base.dtype)
    return torch.float64 if is_wide else torch.float32


def _pairs(tensors: list[Tensor], base: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    starts: Sequence[Tensor | None] = base or [None] * len(tensors)
    return list(zip(tensors, starts, strict=True))


def reference(tensors: list[Tensor], base: list[Tensor], k: int) -> Tensor:
    magnitudes = []
    for x, start in _pairs(tensors, base):
        dtype = _difference_dtype(x, start)
        difference = x.to(dtype) if start is None else x.to(dtype) - start.to(dtype)
        magnitudes.append(difference.abs().flatten())
    vector = torch.cat(magnitudes)
    return vector.kthvalue(vector.numel() - k + 1).values


def _out(tensors: list[Tensor], base: list[Tensor], k: int) -> Tensor:
    if base and len(base) != len(tensors):
        raise ValueError(
            "nlm.magnitude_threshold: tensors and base must have one length, "
            f"got {len(tensors)} and {len(base)}"
        )
    for t, (x, start) in enumerate(_pairs(tensors, base)):
        for each in (x,) if start is None else (x, start):
            if each.dtype not in FLOATS:
                raise TypeError(
                    "nlm.magnitude_threshold: tensors and base must be float16, bfloat16, float32 "
                    f"or float64, got {each.dtype} for tensor {t}"
                )
            if each.device != tensors[0].device:
                raise ValueError(
                    "nlm.magnitude_threshold: the tensors of a call must be on one device, "
                    f"got {tensors[0].device} and {each.device}"
                )
        if start is not None and start.shape != x.shape:
            raise ValueError(
                "nlm.magnitude_threshold: a tensor must have the shape of its base, "
                f"{tuple(start.shape)}, got {tuple(x.shape)} for tensor {t}"
            )
    size = sum(x.numel() for x in tensors)
    if not 1 <= k <= size:
        raise ValueError(
            "nlm.magnitude_threshold: k must lie between 1 and the number of entries, "
            f"got {k} of {size}"
        )
    dtypes = [_difference_dtype(x, start) for x, start in _pairs(tensors, base)]
    is_wide = torch.float64 in dtypes
    return tensors[0].new_empty((), dtype=torch.float64 if is_wide else torch.float32)


def _items(pairs: list[tuple[Tensor, Tensor | None]]) -> list[tuple[int, int, int, int, int]]:
    """The contiguous pairs as csrc/magnitude_threshold.h has them. The caller keeps them alive."""
    items = []
    for x, base in pairs:
        start = (0, 0) if base is None else (base.data_ptr(), _native.DTYPES[base.dtype])
        items.append((x.data_ptr(), _native.DTYPES[x.dtype], *start, x.numel()))
    return items


def _cpu(tensors: list[Tensor], base: list[Tensor], k: int) -> Tensor:
    result = _out(tensors, base, k)
    pairs = [(x.contiguous(), b if b is None else b.contiguous()) for x, b in _pairs(tensors, base)]
    _native.cpu.magnitude_threshold(
        _items(pairs), k, _native.DTYPES[result.dtype], result.data_ptr(), _native.threads()
    )
    return result


def _cuda(tensors: list[Tensor], base: list[Tensor], k: int) -> Tensor:
    result = _out(tensors, base, k)
    pairs = []
    for x, start in _pairs(tensors, base):
        if start is not None and start.dtype != x.dtype:
            dtype = _difference_dtype(x, start)
            x, start = x.to(dtype), start.to(dtype)
        pairs.append((x.contiguous(), start if start is None else start.contiguous()))
    scratch = result.new_zeros(_native.cuda.magnitude_threshold_scratch(), dtype=torch.uint8)
    _native.cuda.magnitude_threshold(
        _items(pairs), k, _native.DTYPES[result.dtype], result.data_ptr(),
        scratch.data_ptr(), _native.stream(result),
    )  # fmt: skip
    return result


_THRESHOLD = register(
    "magnitude_threshold(Tensor[] tensors, Tensor[] base, int k) -> Tensor",
    stem="magnitude_threshold",
    reference=reference,
    out=_out,
    cpu=_cpu,
    cuda=_cuda,
    missing={"cpu": _native.cpu_missing, "cuda": _native.cuda_missing},
)


def magnitude_threshold(
    tensors: Sequence[Tensor], k: int, base: Sequence[Tensor] | None = None
) -> Tensor:
    """The k-th largest entry of ``|tensors - base|``, over the whole list.

    Not differentiable.

    Parameters
    ----------
    tensors : sequence of Tensor
        float16, bfloat16, float32 or float64, of any shapes, on one device; types may be mixed.
        What is not contiguous is copied.
    k : int
        From 1, the largest, to the number of all entries, the smallest.
    base : sequence of Tensor, optional
        What is subtracted: one tensor for each, of its shape, and of any of these types.

    Returns
    -------
    Tensor
        A scalar on the tensors' device: float64 where any of them is, else float32. NaN where at
        least k entries are NaN.

    Examples
    --------
    >>> import torch
    >>> weight, bias = torch.tensor([[1.0, -5.0], [2.0, 0.5]]), torch.tensor([-3.0])
    >>> magnitude_threshold([weight, bias], 2).item()
    3.0
    >>> magnitude_threshold([weight], 1, base=[torch.full((2, 2), 3.0)]).item()
    8.0
    """
    for label, each in (("tensor", tensors), ("base", base or ())):
        for t, x in enumerate(each):
            check_tensor("magnitude_threshold", f"{label} {t}", x)
    detached = [without_gradient("magnitude_threshold", x) for x in tensors]
    starts = [without_gradient("magnitude_threshold", x) for x in base or ()]
    if not detached:
        return _out(detached, starts, k)
    return _THRESHOLD.default(detached, starts, k)
