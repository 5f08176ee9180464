"""TALL-masks in bits: the entries of a merge that a task lives in.

With theta_0 the base, theta_t a task's expert and theta the merge, entry i is one of task t's where

    |theta_t - theta_0|_i  >  lambda |theta_t - theta|_i .

A mask is a vector of ceil(n / 8) uint8: entry i, counted in row-major order, is bit i % 8 from the
lowest of byte i / 8, and the bits behind the last entry are zero (numpy.packbits with
bitorder="little"). `tall_mask_apply` is theta where a bit is set and theta_0 elsewhere.
`tall_mask_agreement` keeps the bits that at least k of several masks have, and counts them: the
entries of a consensus.

Bytes: building reads three tensors and writes n / 8 bytes; applying reads two and n / 8 bytes and
writes one; agreement reads T masks and writes one. Flops: 4 per entry to build, none to apply.
Numerics: differences, product and comparison are rounded as in the plain expression in float32
(float64 for float64), NaN compares as false, and applying copies bits: kernel and reference agree
in every bit, for any number of threads.
Under ``torch.compile`` and ``torch.export`` applying emits the plain expression.
Source: Wang et al., Localizing Task Information for Improved Model Merging and Compression,
arXiv:2405.07813.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nlm import _native
from nlm._registry import register
from nlm.ops._arguments import check_tensor, is_transformed, without_gradient
from nlm.ops._channels import FLOATS

_MOST_MASKS = 255  # kMostMasks of csrc/tall_mask.h


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _bit_values(like: Tensor) -> Tensor:
    return torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=like.device)


def _pack(flags: Tensor) -> Tensor:
    """Bools of any shape as bits."""
    padded = torch.nn.functional.pad(flags.reshape(-1).to(torch.uint8), (0, -flags.numel() % 8))
    return (padded.view(-1, 8) * _bit_values(flags)).sum(1, dtype=torch.uint8)


def unpack(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """The bits of a mask as bools of the shape of the entries."""
    flags = (mask[:, None] & _bit_values(mask)) != 0  # [bytes, 8]
    return flags.reshape(-1)[: math.prod(shape)].reshape(tuple(shape))


def reference(expert: Tensor, base: Tensor, merged: Tensor, limit: float) -> Tensor:
    expert, base, merged = map(_wide, (expert, base, merged))
    return _pack((expert - base).abs() > limit * (expert - merged).abs())


def reference_apply(mask: Tensor, base: Tensor, merged: Tensor) -> Tensor:
    return torch.where(unpack(mask, base.shape), merged, base).contiguous()


def reference_agreement(masks: Tensor, least: int) -> tuple[Tensor, Tensor]:
    flags = (masks[..., None] & _bit_values(masks)) != 0  # [T, bytes, 8]
    kept = flags.sum(0) >= least
    return _pack(kept), kept.sum()


def _check_alike(op: str, **tensors: Tensor) -> None:
    (first, x), *others = tensors.items()
    if x.dtype not in FLOATS:
        raise TypeError(
            f"nlm.{op}: {first} must be float16, bfloat16, float32 or float64, got {x.dtype}"
        )
    for name, other in others:
        if other.dtype != x.dtype:
            raise TypeError(
                f"nlm.{op}: {name} must have the type of {first}, {x.dtype}, got {other.dtype}"
            )
        if other.shape != x.shape or other.device != x.device:
            raise ValueError(
                f"nlm.{op}: {name} must have the shape and device of {first}, {tuple(x.shape)} on "
                f"{x.device}, got {tuple(other.shape)} on {other.device}"
            )


def _out(expert: Tensor, base: Tensor, merged: Tensor, limit: float) -> Tensor:
    _check_alike("tall_mask", expert=expert, base=base, merged=merged)
    if not (limit > 0 and math.isfinite(limit)):
        raise ValueError(f"nlm.tall_mask: limit must be positive and finite, got {limit}")
    return expert.new_empty((expert.numel() + 7) // 8, dtype=torch.uint8)


def _out_apply(mask: Tensor, base: Tensor, merged: Tensor) -> Tensor:
    _check_alike("tall_mask_apply", base=base, merged=merged)
    if mask.dtype != torch.uint8:
        raise TypeError(f"nlm.tall_mask_apply: mask must be uint8, got {mask.dtype}")
    if mask.dim() != 1 or mask.shape[0] != (base.numel() + 7) // 8 or mask.device != base.device:
        raise ValueError(
            "nlm.tall_mask_apply: mask must have one dimension of a bit per entry of base, "
            f"{(base.numel() + 7) // 8} bytes on {base.device}, got {tuple(mask.shape)} on "
            f"{mask.device}"
        )
    return torch.empty_like(base, memory_format=torch.contiguous_format)


def _out_agreement(masks: Tensor, least: int) -> tuple[Tensor, Tensor]:
    if masks.dtype != torch.uint8:
        raise TypeError(f"nlm.tall_mask_agreement: masks must be uint8, got {masks.dtype}")
    if masks.dim() != 2 or not 1 <= masks.shape[0] <= _MOST_MASKS:
        raise ValueError(
            f"nlm.tall_mask_agreement: masks must be [T, bytes] with T from 1 to {_MOST_MASKS}, "
            f"got {tuple(masks.shape)}"
        )
    if least < 1:
        raise ValueError(f"nlm.tall_mask_agreement: least must be at least 1, got {least}")
    return masks.new_empty(masks.shape[1]), masks.new_empty((), dtype=torch.int64)


def _cpu(expert: Tensor, base: Tensor, merged: Tensor, limit: float) -> Tensor:
    mask = _native.fresh(_out(expert, base, merged, limit))
    expert, base, merged = (x.contiguous() for x in (expert, base, merged))
    _native.cpu.tall_mask(
        expert.data_ptr(), base.data_ptr(), merged.data_ptr(), _native.DTYPES[expert.dtype],
        expert.numel(), limit, mask.data_ptr(), _native.threads(),
    )  # fmt: skip
    return mask


def _cpu_apply(mask: Tensor, base: Tensor, merged: Tensor) -> Tensor:
    out = _native.fresh(_out_apply(mask, base, merged))
    mask, base, merged = (x.contiguous() for x in (mask, base, merged))
    _native.cpu.tall_mask_apply(
        mask.data_ptr(), base.data_ptr(), merged.data_ptr(), base.element_size(), base.numel(),
        out.data_ptr(), _native.threads(),
    )  # fmt: skip
    return out


def _cpu_agreement(masks: Tensor, least: int) -> tuple[Tensor, Tensor]:
    kept, count = _out_agreement(masks, least)
    masks = masks.contiguous()
    _native.cpu.tall_mask_agreement(
        masks.data_ptr(), *masks.shape, least, kept.data_ptr(), count.data_ptr(), _native.threads()
    )
    return kept, count


def _cuda(expert: Tensor, base: Tensor, merged: Tensor, limit: float) -> Tensor:
    mask = _out(expert, base, merged, limit)
    expert, base, merged = (x.contiguous() for x in (expert, base, merged))
    _native.cuda.tall_mask(
        expert.data_ptr(), base.data_ptr(), merged.data_ptr(), _native.DTYPES[expert.dtype],
        expert.numel(), limit, mask.data_ptr(), _native.stream(mask),
    )  # fmt: skip
    return mask


def _cuda_apply(mask: Tensor, base: Tensor, merged: Tensor) -> Tensor:
    out = _out_apply(mask, base, merged)
    mask, base, merged = (x.contiguous() for x in (mask, base, merged))
    _native.cuda.tall_mask_apply(
        mask.data_ptr(), base.data_ptr(), merged.data_ptr(), base.element_size(), base.numel(),
        out.data_ptr(), _native.stream(mask),
    )  # fmt: skip
    return out


def _cuda_agreement(masks: Tensor, least: int) -> tuple[Tensor, Tensor]:
    kept, _ = _out_agreement(masks, least)
    masks = masks.contiguous()
    counts = masks.new_zeros(_native.cuda.tall_mask_walks(masks.shape[1]), dtype=torch.int64)
    _native.cuda.tall_mask_agreement(
        masks.data_ptr(), *masks.shape, least, kept.data_ptr(), counts.data_ptr(),
        _native.stream(masks),
    )  # fmt: skip
    return kept, counts.sum()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient goes to the merge where a bit is set, and to the base elsewhere."""
    (mask,) = ctx.saved_tensors
    zero = torch.zeros_like(grad)
    return None, _APPLY.default(mask, grad, zero), _APPLY.default(mask, zero, grad)


_BUILD = register(
    "tall_mask(Tensor expert, Tensor base, Tensor merged, float limit) -> Tensor",
    stem="tall_mask",
    reference=reference,
    out=_out,
    cpu=_cpu,
    cuda=_cuda,
    missing={"cpu": _native.cpu_missing, "cuda": _native.cuda_missing},
)

_APPLY = register(
    "tall_mask_apply(Tensor mask, Tensor base, Tensor merged) -> Tensor",
    stem="tall_mask",
    reference=reference_apply,
    out=_out_apply,
    cpu=_cpu_apply,
    cuda=_cuda_apply,
    missing={"cpu": _native.cpu_missing, "cuda": _native.cuda_missing},
    backward=_backward,
    setup_context=_setup_context,
)

_AGREEMENT = register(
    "tall_mask_agreement(Tensor masks, int least) -> (Tensor, Tensor)",
    stem="tall_mask",
    reference=reference_agreement,
    out=_out_agreement,
    cpu=_cpu_agreement,
    cuda=_cuda_agreement,
    missing={"cpu": _native.cpu_missing, "cuda": _native.cuda_missing},
)


def tall_mask(expert: Tensor, base: Tensor, merged: Tensor, limit: float) -> Tensor:
    """The entries of a merge that an expert lives in, a bit each. Not differentiable.

    Parameters
    ----------
    expert, base, merged : Tensor
        Of one shape and float type.
    limit : float
        lambda > 0: 0.2 to 0.6 in the paper; the larger, the fewer entries.

    Returns
    -------
    Tensor of uint8, shape [ceil(n / 8)]
        Entry i is bit i % 8, from the lowest, of byte i / 8; padding is zero.

    Examples
    --------
    >>> import torch
    >>> expert, merged = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 3.0, 1.0])
    >>> tall_mask(expert, torch.zeros(3), merged, 0.4).tolist()
    [5]
    """
    tensors = {"expert": expert, "base": base, "merged": merged}
    for label, value in tensors.items():
        check_tensor("tall_mask", label, value)
    return _BUILD.default(*(without_gradient("tall_mask", x) for x in tensors.values()), limit)


def tall_mask_apply(mask: Tensor, base: Tensor, merged: Tensor) -> Tensor:
    """``merged`` where a mask's bit is set, ``base`` elsewhere.

    Parameters
    ----------
    mask : Tensor of uint8, shape [ceil(n / 8)]
        As :func:`tall_mask` makes it.
    base, merged : Tensor
        Of one shape and float type, with n entries.

    Returns
    -------
    Tensor
        Contiguous, of their shape and type. Differentiable in base and merged.

    Examples
    --------
    >>> import torch
    >>> mask = torch.tensor([5], dtype=torch.uint8)
    >>> tall_mask_apply(mask, torch.zeros(3), torch.tensor([1.0, 3.0, 1.0])).tolist()
    [1.0, 0.0, 1.0]
    """
    for label, value in (("mask", mask), ("base", base), ("merged", merged)):
        check_tensor("tall_mask_apply", label, value)
    if torch.compiler.is_compiling() or any(map(is_transformed, (base, merged))):
        _out_apply(mask, base, merged)
        return reference_apply(mask, base, merged)
    return _APPLY.default(mask, base, merged)


def tall_mask_agreement(masks: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """The entries that at least ``least`` of several masks have, as a mask, and their number.

    Parameters
    ----------
    masks : Tensor of uint8, shape [T, bytes]
        1 to 255 masks as :func:`tall_mask` makes them, padding zero.
    least : int
        1 keeps the entries of any task, T those of all, more keeps none.

    Returns
    -------
    kept : Tensor of uint8, shape [bytes]
    count : Tensor of int64, shape []

    Examples
    --------
    >>> import torch
    >>> masks = torch.tensor([[0b011], [0b110]], dtype=torch.uint8)
    >>> kept, count = tall_mask_agreement(masks, 2)
    >>> kept.tolist(), count.item()
    ([2], 1)
    """
    check_tensor("tall_mask_agreement", "masks", masks)
    return _AGREEMENT.default(masks, least)
