"""Weighted sums and inner products of tensors, in plain PyTorch.

Sums in chunks that stay in the processor's cache, so that memory is read and written once.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nlm.merge.linear import wide

_CHUNK = 1 << 15  # entries that are summed at a time
_SMALL = 1e-8  # norms below it count as 1
_PARALLEL = 0.9995  # cosine beyond which two models are interpolated linearly


def weighted_sum(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None = None,
    divisor: float = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """``base + scale * sum_k w_k (x_k - base) / divisor``, in the type of the base, or without one
    in that of the first tensor; computed in float32 at least, in this order.
    """
    first = wide(tensors[0])
    total = torch.zeros(first.shape, dtype=first.dtype, device=first.device)
    for x, weight in zip(tensors, weights, strict=True):
        total += (wide(x) if base is None else wide(x) - wide(base)) * weight
    if divisor != 1:
        total /= divisor
    if scale != 1:
        total *= scale
    if base is not None:
        total += wide(base)
    return total.to((tensors[0] if base is None else base).dtype)


def fused_mean(tensors: Sequence[Tensor], weights: Tensor, divisor: Tensor | None) -> Tensor:
    """``sum_k w_k x_k / divisor`` by PyTorch's `addcmul`, as the host's linear has it: the product
    and the sum are rounded as one where the processor can.
    """
    first = tensors[0]
    out = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    size = _CHUNK if first.is_cpu else max(first.numel(), 1)
    for target, *parts in zip(*(x.reshape(-1).split(size) for x in (out, *tensors)), strict=True):
        total = torch.zeros_like(target, dtype=weights.dtype)
        for x, weight in zip(parts, weights, strict=True):
            total.addcmul_(x, weight)
        target.copy_(total if divisor is None else total.div_(divisor))
    return out


def inner_products(tensors: Sequence[Tensor]) -> Tensor:
    """The products of all pairs, float64 ``[K, K]`` on the host."""
    vectors = [x.reshape(-1).split(_CHUNK) for x in tensors]
    products = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    for parts in zip(*vectors, strict=True):
        rows = torch.stack(parts).double()
        products += (rows @ rows.T).cpu()
    return products


def slerp(products: Sequence[Sequence[float]], t: float) -> tuple[float, float]:
    """The weights of two models with these inner products at the part t of the way."""
    norms = [norm if norm > _SMALL else 1.0 for norm in (math.sqrt(products[k][k]) for k in (0, 1))]
    cosine = products[0][1] / norms[0] / norms[1]
    if abs(cosine) > _PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
