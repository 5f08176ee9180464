"""Checks of arguments before a raw pointer is written: tensors, memory of their own, no derivative.

The public functions call `check_tensor` and `without_gradient`, in every mode of PyTorch; a kernel
and its reference call `check_apart`, since a meta tensor has no memory.
"""

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nlm.ops._channels import FLOATS

MOST_VECTORS = 128  # kWeightedSumTensors, kInnerProductsTensors


def check_tensor(name: str, label: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"nlm.{name}: {label} must be a tensor, got {type(value).__name__}")


def compute_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """What tensors of any float types are computed in: float32, or float64 where any is."""
    is_wide = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if is_wide else torch.float32


def check_vectors(name: str, base: Tensor | None, tensors: Sequence[Tensor], least: int) -> None:
    """The tensors and their base, if there is one, are floats of one shape on one device."""
    if not least <= len(tensors) <= MOST_VECTORS:
        raise ValueError(
            f"nlm.{name}: there must be {least} to {MOST_VECTORS} tensors, got {len(tensors)}"
        )
    models = [*tensors] if base is None else [base, *tensors]
    for x in models:
        if x.dtype not in FLOATS:
            raise TypeError(
                f"nlm.{name}: base and tensors must be float16, bfloat16, float32 or float64, "
                f"got {x.dtype}"
            )
        if x.shape != models[0].shape or x.device != models[0].device:
            raise ValueError(
                f"nlm.{name}: base and tensors must have one shape and device, got "
                f"{tuple(models[0].shape)} on {models[0].device} and {tuple(x.shape)} on {x.device}"
            )


def as_numbers(name: str, label: str, values: Any, count: int) -> list[float]:
    """``values``, a number for all or a sequence of one each, as a list."""
    if isinstance(values, Real):
        return [float(values)] * count
    each = list(values) if isinstance(values, Iterable) else [values]
    if not all(isinstance(value, Real) for value in each):
        raise TypeError(
            f"nlm.{name}: {label} must be a number or a sequence of one number per tensor, "
            f"got {values!r}"
        )
    return [float(value) for value in each]


def is_transformed(x: Tensor) -> bool:
    """``x`` carries a tangent or belongs to a ``torch.func`` transform, which see no kernel."""
    return (
        torch._C._functorch.is_functorch_wrapped_tensor(x)
        or forward_ad.unpack_dual(x).tangent is not None
    )


def without_gradient(name: str, x: Tensor) -> Tensor:
    """``x`` detached: the result of an operation without a derivative must not require a gradient.

    A derivative that is asked for here and now (``torch.func``, forward mode) would come out as
    zero, and is refused.
    """
    if not torch.compiler.is_compiling() and _is_differentiated(x):
        raise TypeError(
            f"nlm.{name}: the inputs of an operation that is not differentiable must be detached "
            f"under torch.func and forward-mode differentiation, got one of shape {tuple(x.shape)} "
            "that is being differentiated"
        )
    return x.detach()


def _is_differentiated(x: Tensor) -> bool:
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_gradtrackingtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return forward_ad.unpack_dual(x).tangent is not None


def check_written(name: str, label: str, value: Any) -> None:
    """``value`` is a tensor that may be written to: the write is not part of a graph."""
    check_tensor(name, label, value)
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"nlm.{name}: {label} is written to and must not require a gradient outside of "
            f"torch.no_grad(), got requires_grad True for shape {tuple(value.shape)}"
        )


def check_apart(
    name: str, written: Iterable[tuple[str, Tensor]], read: Iterable[tuple[str, Tensor]]
) -> None:
    """No written tensor shares memory with any other of the call, or has an element twice.

    Tensors are taken as intervals from their first to their last element: interleaved views are
    refused too. One sort, so that many tensors cost n log n.
    """
    written = [(label, x) for label, x in written if x.numel()]
    for label, x in written:
        if not x.is_contiguous() and _overlaps_itself(x):
            raise ValueError(
                f"nlm.{name}: a tensor that is written to must have each element once in memory, "
                f"got {label} of shape {tuple(x.shape)} with strides {x.stride()}"
            )
    spans = [(*_extent(x), True, label) for label, x in written]
    spans += [(*_extent(x), False, label) for label, x in read if x.numel()]
    spans.sort()
    furthest: dict[bool, tuple[int, str]] = {}  # by "is written": the furthest end so far
    for begin, end, is_written, label in spans:
        for other_is_written, (other_end, other) in furthest.items():
            if begin < other_end and (is_written or other_is_written):
                first, second = (label, other) if is_written else (other, label)
                raise ValueError(
                    f"nlm.{name}: a tensor that is written to must not share memory with another "
                    f"argument, got an overlap of {first} with {second}"
                )
        if is_written not in furthest or furthest[is_written][0] < end:
            furthest[is_written] = (end, label)


def _overlaps_itself(x: Tensor) -> bool:
    """Whether dimensions lie inside one another in memory; so may a few that do not overlap."""
    reach = 0
    for step, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += (size - 1) * step
    return False


def _extent(x: Tensor) -> tuple[int, int]:
    """The first address of a tensor with elements, and the one behind its last."""
    begin = x.data_ptr()
    if x.is_contiguous():
        return begin, begin + x.nbytes
    last = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return begin, begin + (last + 1) * x.element_size()


def check_seed(op: str, seed: int) -> None:
    """Raises ValueError unless a key of random numbers can be made of a seed."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"nlm.{op}: seed must lie in [0, 2^63), got {seed}")


def check_positions(op: str, offset: int, count: int) -> None:
    """Raises ValueError unless random numbers have a position for each of some entries."""
    if not 0 <= offset <= 2**63 - 8 - count:
        raise ValueError(
            f"nlm.{op}: offset must leave all positions in [0, 2^63 - 8), got {offset} for "
            f"{count} entries"
        )
