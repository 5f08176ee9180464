"""A tensor with a channel dimension, as the kernels see it: ``x[outer, channel, inner]``.

``[N, C]``, ``[N, C, *]``, ``[N, L, C]`` and every other layout become a strided view of three
dimensions; data are copied only where no such view exists (outer or inner dimensions that do not
merge, as after a transposition among them).
"""

import math

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def normalize_dim(name: str, x: Tensor, dim: int) -> int:
    """``dim`` as a non-negative number; ``name`` is the operation that complains."""
    if not -x.dim() <= dim < x.dim():
        raise ValueError(
            f"nlm.{name}: dim must be a dimension of x, got dim {dim} for shape {tuple(x.shape)}"
        )
    return dim % x.dim()


def check_float(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(
            f"nlm.{name}: x must be float16, bfloat16, float32 or float64, got {x.dtype}"
        )


def check_mask(name: str, x: Tensor, mask: Tensor, dim: int) -> None:
    """``mask`` is bool, on x's device, and has x's shape without ``dim`` (non-negative)."""
    if mask.dtype != torch.bool:
        raise TypeError(f"nlm.{name}: mask must be bool, got {mask.dtype}")
    expected = (*x.shape[:dim], *x.shape[dim + 1 :])
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"nlm.{name}: mask must have the shape of x without dim {dim}, {expected}, "
            f"got {tuple(mask.shape)}"
        )
    check_device(name, x, "mask", mask)


def check_device(name: str, x: Tensor, label: str, other: Tensor) -> None:
    if other.device != x.device:
        raise ValueError(
            f"nlm.{name}: {label} must be on the device of x, {x.device}, got {other.device}"
        )


def channels_view(x: Tensor, dim: int) -> Tensor:
    """``x`` as ``[outer, C, inner]``: a view where one exists, else a contiguous copy."""
    outer, inner = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
    return _view(x, (outer, x.shape[dim], inner))


def positions_view(mask: Tensor, dim: int) -> Tensor:
    """A mask over the positions of a tensor with channels at ``dim``, as ``[outer, inner]``."""
    outer, inner = math.prod(mask.shape[:dim]), math.prod(mask.shape[dim:])
    return _view(mask, (outer, inner))


def empty_like(x: Tensor, dim: int) -> Tensor:
    """Uninitialised memory of x's shape, in x's layout where that has a `channels_view`."""
    result = torch.empty_like(x)
    outer, inner = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
    if _try_view(result, (outer, x.shape[dim], inner)) is None:
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
    return result


def _try_view(x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    try:
        return x.view(shape)
    except RuntimeError:  # "view size is not compatible": there is no other way to ask
        return None


def _view(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    view = _try_view(x, shape)
    return x.contiguous().view(shape) if view is None else view


def positions_last(x: Tensor, dim: int) -> Tensor:
    """``x`` as ``[C, positions]``, for references."""
    positions = math.prod(x.shape[:dim]) * math.prod(x.shape[dim + 1 :])
    return x.movedim(dim, 0).reshape(x.shape[dim], positions)
