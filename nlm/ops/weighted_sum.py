"""The weighted sum of tensors, or of their differences from a base: linear merging.

With weights w_k, a divisor d and a scale s, of tensors x_k of any float types,

    out = s (w_1 x_1 + ... + w_K x_K) / d                         without a base
    out = b + s (w_1 (x_1 - b) + ... + w_K (x_K - b)) / d         with a base b
    out = b                                                       with a base and no tensor.

Linear merging has d = sum w_k, Task Arithmetic a base and s, Model Stock both; the last line
converts a tensor to another type. Entry i of the result depends on entries i alone: tensors that
are taken in chunks give the same bits.

Bytes: one read of the base and of each tensor, one write. Flops: 3 per entry and tensor.
Numerics: float32 (float64 where any tensor is; w_k, d and s are rounded to it), every operation
rounded by itself, in this order: the sum begins at +0 and takes the tensors one after another, is
divided by d, multiplied by s and added to b, and then rounded once to the result's type. Kernel
and reference agree in every bit, for any number of threads. So does mergekit 0.1.5 for float32 on
the CPU in task_arithmetic (s its lambda, d the sum of its weights, or 1) of up to 3 tensors, and of
up to 17 but for the last entries, fewer than 32, which `torch.sum` adds in another order. In its
linear a product is not rounded before it is added (`addcmul_` with AVX2): last bits differ.
Sources: Wortsman et al., Model Soups, arXiv:2203.05482; Ilharco et al., Editing Models with Task
Arithmetic, arXiv:2212.04089.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nlm import _native
from nlm._registry import register
from nlm.ops._arguments import (
    as_numbers,
    check_tensor,
    check_vectors,
    compute_dtype,
    without_gradient,
)
from nlm.ops._channels import FLOATS


def reference(
    base: Tensor | None,
    tensors: list[Tensor],
    weights: list[float],
    divisor: float,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    models = _models(base, tensors)
    wide = compute_dtype(models)
    start = None if base is None else base.to(wide)
    numbers = torch.tensor([divisor, scale, *weights], dtype=wide, device=models[0].device)
    total = torch.zeros_like(models[0], dtype=wide)
    for x, weight in zip(tensors, numbers[2:], strict=True):
        total = total + weight * (x.to(wide) if start is None else x.to(wide) - start)
    total = total / numbers[0] * numbers[1]
    if start is not None:
        total = start + total if tensors else start
    return total.to(dtype, memory_format=torch.contiguous_format, copy=True)


def _models(base: Tensor | None, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [*tensors] if base is None else [base, *tensors]


def _check(base: Tensor | None, tensors: Sequence[Tensor]) -> None:
    check_vectors("weighted_sum", base, tensors, 1 if base is None else 0)


def _out(
    base: Tensor | None,
    tensors: list[Tensor],
    weights: list[float],
    divisor: float,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    _check(base, tensors)
    if len(weights) != len(tensors):
        raise ValueError(
            f"nlm.weighted_sum: there must be one weight for each of the {len(tensors)} tensors, "
            f"got {len(weights)}"
        )
    if dtype not in FLOATS:
        raise TypeError(
            f"nlm.weighted_sum: dtype must be float16, bfloat16, float32 or float64, got {dtype}"
        )
    first = _models(base, tensors)[0]
    return first.new_empty(first.shape, dtype=dtype)


def _launch(
    kernel: Callable[..., None], runs_on: int, base: Tensor | None, tensors: Sequence[Tensor],
    weights: list[float], numbers: tuple[float, float], out: Tensor,
) -> None:  # fmt: skip
    """Runs a kernel on so many threads, or on this stream."""
    packed = [x.contiguous() for x in tensors]
    start = out if base is None else base.contiguous()
    each = [
        (x.data_ptr(), _native.DTYPES[x.dtype], weight)
        for x, weight in zip(packed, weights, strict=True)
    ]
    kernel(
        0 if base is None else start.data_ptr(), _native.DTYPES[start.dtype], each, *numbers,
        out.data_ptr(), _native.DTYPES[out.dtype], out.numel(), runs_on,
    )  # fmt: skip


def _cpu(
    base: Tensor | None, tensors: list[Tensor], weights: list[float], divisor: float, scale: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out = _native.fresh(_out(base, tensors, weights, divisor, scale, dtype))
    kernel, threads = _native.cpu.weighted_sum, _native.threads()
    _launch(kernel, threads, base, tensors, weights, (divisor, scale), out)
    return out


def _cuda(
    base: Tensor | None, tensors: list[Tensor], weights: list[float], divisor: float, scale: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out = _out(base, tensors, weights, divisor, scale, dtype)
    models = _models(base, tensors)
    kind = dtype if all(x.dtype == dtype for x in models) else compute_dtype(models)
    target = out if kind == dtype else out.new_empty(out.shape, dtype=kind)
    start = None if base is None else base.to(kind)
    each = [x.to(kind) for x in tensors]
    kernel, stream = _native.cuda.weighted_sum, _native.stream(out)
    _launch(kernel, stream, start, each, weights, (divisor, scale), target)
    return out if target is out else out.copy_(target)


_WEIGHTED_SUM = register(
    "weighted_sum(Tensor? base, Tensor[] tensors, float[] weights, float divisor, float scale,"
    " ScalarType dtype) -> Tensor",
    stem="weighted_sum",
    reference=reference,
    out=_out,
    cpu=_cpu,
    cuda=_cuda,
    missing={"cpu": _native.cpu_missing, "cuda": _native.cuda_missing},
)


def weighted_sum(
    tensors: Sequence[Tensor],
    weights: Sequence[float] | float = 1.0,
    base: Tensor | None = None,
    divisor: float = 1.0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weighted sum of tensors; with a base, that of their differences added to it.

    Not differentiable: the result does not require gradients.

    Parameters
    ----------
    tensors : sequence of Tensor
        Up to 128 of one shape on one device, each float16, bfloat16, float32 or float64, in any
        layout; none only with a base. What is not contiguous is copied.
    weights : float or sequence of float
        One for all tensors, or one each.
    base : Tensor, optional
        Of that shape; of any of these types.
    divisor, scale : float
        The sum is divided by the one and multiplied by the other.
    dtype : torch.dtype, optional
        Of the result; default that of the base, else of the first tensor.

    Returns
    -------
    Tensor
        Contiguous.

    Examples
    --------
    >>> import torch
    >>> one, two = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0])
    >>> weighted_sum([one, two], [3.0, 1.0], divisor=4.0).tolist()
    [1.75, 3.5]
    >>> weighted_sum([two], base=one, scale=0.5).tolist()
    [2.5, 5.0]
    >>> weighted_sum([], base=one, dtype=torch.float16)
    tensor([1., 2.], dtype=torch.float16)
    """
    for k, x in enumerate(tensors):
        check_tensor("weighted_sum", f"tensor {k}", x)
    if base is not None:
        check_tensor("weighted_sum", "base", base)
        base = without_gradient("weighted_sum", base)
    _check(base, tensors)
    each = [without_gradient("weighted_sum", x) for x in tensors]
    factors = as_numbers("weighted_sum", "weights", weights, len(each))
    if dtype is None:
        dtype = _models(base, each)[0].dtype
    return _WEIGHTED_SUM.default(base, each, factors, float(divisor), float(scale), dtype)
