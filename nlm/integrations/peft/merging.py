"""The functions of ``peft.utils.merge_utils``, computed by nlm: same arguments, same results.

With weights w_k and what is kept of the task tensors d_k (all, the largest of each, or a random
part, divided by the density),

    task_arithmetic, magnitude_prune, dare_linear    sum_k w_k d_k
    ties, dare_ties                                  the mean of the w_k d_k whose sign is elected

where the sign is that of sum_k d_k ("total") or of sum_k sign(d_k) ("frequency"), 0 counting as +.
Results are of the type that the host's have. float32 results are the host's but for entries as
large as the smallest that is kept, of which the host keeps some and nlm all, and for the last bit
of a sum. What is drawn at random is drawn from nlm's generator, seeded by PyTorch's: the same after
``torch.manual_seed``, but not the host's.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from nlm.integrations import _host
from nlm.ops import dare, magnitude_threshold, sign_merge, weighted_sum

_WHERE = "nlm.integrations.peft"
_OLDEST, _TOO_NEW = "0.21", "0.22"
_PATCHED = "peft.tuners.lora.model"  # it has imported the functions by name


def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum of the task tensors.

    Parameters
    ----------
    task_tensors : of one shape and type, on one device.
    weights : one for each, [n].
    """
    return _sum(_computable(task_tensors), weights, task_tensors[0])


def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of the largest entries of each task tensor.

    Parameters
    ----------
    density : the share of a tensor's entries that is kept; from 1 on all are, with a warning.

    Raises
    ------
    ValueError
        A negative density.
    """
    wide = _computable(task_tensors)
    if _prunes(density):
        limits = _limits(wide, density)
        wide = [x * (x.abs() >= limit) for x, limit in zip(wide, limits, strict=True)]
    return _sum(wide, weights, task_tensors[0])


def ties(
    task_tensors: list[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: str = "total",
) -> Tensor:
    """TIES: of the largest entries of each task tensor the mean of those with the elected sign.

    Parameters
    ----------
    density : see :func:`magnitude_prune`.
    majority_sign_method : "total" or "frequency".

    Raises
    ------
    ValueError
        A negative density, or another method.
    """
    wide = _computable(task_tensors)
    limits = _limits(wide, density if _prunes(density) else 1.0)
    return _elected(wide, limits, weights, majority_sign_method, task_tensors[0])


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of a random part of each task tensor, divided by the density.

    Raises
    ------
    ValueError
        A density that is not positive.
    """
    return _sum(_dropped(task_tensors, density), weights, task_tensors[0])


def dare_ties(
    task_tensors: list[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: str = "total",
) -> Tensor:
    """TIES on a random part of each task tensor, divided by the density.

    Raises
    ------
    ValueError
        A density that is not positive, or another method than "total" and "frequency".
    """
    wide = _dropped(task_tensors, density)
    return _elected(wide, _limits(wide, 1.0), weights, majority_sign_method, task_tensors[0])


def _computable(task_tensors: Sequence[Tensor]) -> list[Tensor]:
    """In float32 at least: narrow types are rounded once, at the end."""
    if not task_tensors:
        raise ValueError(f"{_WHERE}: there is at least one task tensor, got none")
    return [x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in task_tensors]


def _prunes(density: float) -> bool:
    """Whether a density leaves anything out, after checking it as the host does."""
    if density < 0:
        raise ValueError(f"{_WHERE}: a density is at least 0, got {density}")
    if density >= 1:
        warnings.warn(
            f"{_WHERE}: all entries are kept from a density of 1 on, got {density}", stacklevel=3
        )
    return density < 1


def _limits(tensors: list[Tensor], density: float) -> Tensor:
    """For each tensor the least magnitude that is kept: infinity where nothing is."""
    kept = int(density * tensors[0].numel())
    if kept >= tensors[0].numel():
        return torch.zeros(len(tensors), device=tensors[0].device)
    if kept == 0:
        return torch.full((len(tensors),), math.inf, device=tensors[0].device)
    return torch.stack([magnitude_threshold([x], kept) for x in tensors])


def _dropped(task_tensors: list[Tensor], density: float) -> list[Tensor]:
    if density <= 0:
        raise ValueError(
            f"{_WHERE}: what is divided by a density has a positive one, got {density}"
        )
    wide = _computable(task_tensors)
    if not _prunes(density):
        return wide
    zero = torch.zeros_like(wide[0])
    keys = [int(torch.randint(2**63 - 1, ())) for _ in wide]
    return [dare(x, zero, 1 - density, key) for x, key in zip(wide, keys, strict=True)]


def _sum(tensors: list[Tensor], weights: Tensor, like: Tensor) -> Tensor:
    return weighted_sum(tensors, weights.tolist()).to(_type(like, weights))


def _elected(
    tensors: list[Tensor], limits: Tensor, weights: Tensor, method: str, like: Tensor
) -> Tensor:
    """The mean, weighted after the vote, of what agrees with the elected sign."""
    if method not in ("total", "frequency"):
        raise ValueError(
            f"{_WHERE}: the majority sign method is total or frequency, got {method!r}"
        )
    kind = torch.promote_types(_type(like, weights), torch.float32)  # the host's, of its division
    if method == "total":
        zero, experts = torch.zeros_like(tensors[0]), [[x] for x in tensors]
        [merged] = sign_merge([zero], experts, limits, weights.tolist(), 1.0, "peft")
        return merged.to(kind)
    signs = [x.sign() * (x.abs() >= limit) for x, limit in zip(tensors, limits, strict=True)]
    elected = torch.stack(signs).sum(0).ge(0).to(signs[0].dtype).mul_(2).sub_(1)
    agree = [sign == elected for sign in signs]
    count = torch.stack(agree).sum(0).clamp_(min=1)
    kept = [x * each for x, each in zip(tensors, agree, strict=True)]
    return (weighted_sum(kept, weights.tolist()) / count).to(kind)


def _type(like: Tensor, weights: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, weights.dtype)


_FUNCTIONS = {
    each.__name__: each for each in (task_arithmetic, magnitude_prune, ties, dare_linear, dare_ties)
}
_stock: dict[str, Any] = {}


def _replace() -> None:
    place = import_module(_PATCHED)
    _stock.update({name: getattr(place, name) for name in _FUNCTIONS})
    for name, function in _FUNCTIONS.items():
        setattr(place, name, function)


def _restore() -> None:
    place = import_module(_PATCHED)
    for name in _FUNCTIONS:
        setattr(place, name, _stock.pop(name))


_switch = _host.Switch(_replace, _restore)


@contextmanager
def use_as_default() -> Iterator[None]:
    """Within it ``LoraModel.add_weighted_adapter`` merges on nlm, in all threads of the process.

    The functions of ``peft.tuners.lora.model`` are replaced, where they are called from, and put
    back at the end. ``peft.utils.merge_utils`` stays as it is.

    Raises
    ------
    ImportError
        peft is missing, or of another version.
    """
    _host.check(_WHERE, "peft", _OLDEST, _TOO_NEW)
    with _switch():
        yield
