"""Folding corrections into weights, where that is exact.

Into what makes the point's output, a layer or a norm: s (W x + b) + t = (s W) x + (s b + t); or, if
layers alone read it, into all of them: W (s x + t) + b = (W s) x + (W t + b). The second holds for
a convolution only where it does not pad with zeros, which are no corrected values.

The output channels are the rows of a weight, but for a transposed convolution of g groups, whose
weight is [in, out / g, ...]: the channels of group k are the columns of its rows k in/g onwards.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nlm._functions import is_place
from nlm._modules import NORMS, channel_dim, is_transformers_conv1d, submodule

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (*NORMS, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm)
_LAST = (nn.LayerNorm,)  # and transformers' Conv1D: the channels are the weight's last dimension

Readers = Mapping[str, Sequence[str]]
Fold = Callable[[Tensor, Tensor], None]


def fold_points(
    network: nn.Module,
    dims: Mapping[str, int],
    readers: Readers,
    corrections: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Puts corrections into the weights of a network, in place.

    Parameters
    ----------
    dims, readers : point -> its channel dimension, and what reads it.
    corrections : point -> scale and shift, [channels].

    Raises
    ------
    ValueError
        Points that cannot be folded exactly: all of them are named, with the reasons.
    """
    folds = _folds(network, dims, readers)
    if reasons := _reasons(folds):
        found = "; ".join(f"{point!r} ({reason})" for point, reason in reasons.items())
        raise ValueError(
            f"nlm.correct: every correction is folded into weights that take it exactly, got "
            f"points without such: {found}"
        )
    for point, (scale, shift) in corrections.items():
        for fold in folds[point]:
            assert callable(fold)  # no point has a reason
            fold(scale, shift)


def unfoldable(network: nn.Module, dims: Mapping[str, int], readers: Readers) -> dict[str, str]:
    """point -> why it cannot be folded exactly, of those that cannot."""
    return _reasons(_folds(network, dims, readers))


def _reasons(folds: Mapping[str, list[Fold | str]]) -> dict[str, str]:
    found = {point: [each for each in of if isinstance(each, str)] for point, of in folds.items()}
    return {point: ", ".join(reasons) for point, reasons in found.items() if reasons}


def _folds(
    network: nn.Module, dims: Mapping[str, int], readers: Readers
) -> dict[str, list[Fold | str]]:
    """point -> how it is folded into one module after the other, or why it is not."""
    users = Counter(
        id(parameter)
        for module in network.modules()
        for parameter in module.parameters(recurse=False)
    )
    modules = dict(network.named_modules())
    shared = {name for name, module in modules.items() if _is_shared(module, users)}
    found: dict[str, list[Fold | str]] = {}
    for point, dim in dims.items():
        own = _own(network, point, dim, shared)
        if isinstance(own, str) and point in readers:
            inward = [_inward(modules, reader, dim, shared) for reader in readers[point]]
            if all(callable(each) for each in inward) and inward:
                found[point] = inward
                continue
            barred = [each for each in inward if isinstance(each, str)]
            own = f"{own}, and it is read by {' and '.join(dict.fromkeys(barred)) or 'nothing'}"
        found[point] = [own]
    return found


def _own(network: nn.Module, point: str, dim: int, shared: set[str]) -> Fold | str:
    """How a correction is folded into what makes the point's output."""
    if is_place(point):
        return "a function has no weights"
    name, module = point, submodule(network, point)
    if isinstance(module, nn.MultiheadAttention):
        name, module = f"{point}.out_proj", module.out_proj
    if not _is_affine(module):
        return f"{type(module).__name__} has no weight and bias that it applies in the usual way"
    if name in shared:
        return "its weights are shared"
    if dim != channel_dim(name, module):
        return f"its weights stand for another dimension than {dim}"
    return partial(_fold, module)


def _inward(
    modules: Mapping[str, nn.Module], reader: str, dim: int, shared: set[str]
) -> Fold | str:
    """How a correction is folded into a layer that reads the point."""
    if reader not in modules:
        return f"{reader!r}"
    module: Any = modules[reader]
    linear = type(module).forward is nn.Linear.forward or is_transformers_conv1d(module)
    convolution = any(type(module).forward is kind.forward for kind in _CONVOLUTIONS)
    kind = f"{reader!r}, "
    if not (linear or convolution) or not {"weight", "bias"} <= module._parameters.keys():
        return f"{kind}a {type(module).__name__}"
    if reader in shared:
        return f"{kind}whose weights are shared"
    if dim != (-1 if linear else 1):
        return f"{kind}along another dimension"
    if convolution and module.padding_mode == "zeros" and _pads(module):
        return f"{kind}which pads with zeros"
    return partial(_fold_inward, module)


def _pads(module: Any) -> bool:
    if isinstance(module.padding, str):
        return module.padding != "valid"
    return any(module.padding)


def _is_shared(module: nn.Module, users: Counter[int]) -> bool:
    return any(users[id(parameter)] > 1 for parameter in module.parameters(recurse=False))


def _is_affine(module: nn.Module) -> bool:
    """Whether a module computes W x + b from a weight and a bias that are parameters of its own."""
    kinds = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED, *_NORMS)
    usual = any(type(module).forward is kind.forward for kind in kinds)
    usual |= is_transformers_conv1d(module)
    return usual and {"weight", "bias"} <= module._parameters.keys()


def _fold(module: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Scales and shifts a module's output."""
    scale, shift, weight, bias = _wide(module, scale, shift)
    sizes = getattr(module, "normalized_shape", scale.shape)
    weight = scale.new_ones(sizes) if weight is None else weight
    bias = scale.new_zeros(sizes) if bias is None else bias
    if isinstance(module, _TRANSPOSED):
        columns = scale.reshape(module.groups, -1)  # [g, out / g]
        columns = columns.repeat_interleave(weight.shape[0] // module.groups, 0)  # [in, out / g]
        factors = columns.reshape(*columns.shape, *[1] * (weight.dim() - 2))
    elif isinstance(module, _LAST) or is_transformers_conv1d(module):
        factors = scale
    else:
        factors = scale.reshape(-1, *[1] * (weight.dim() - 1))
    _keep(module, weight * factors, bias * scale + shift)


def _fold_inward(module: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Scales and shifts a module's input."""
    scale, shift, weight, bias = _wide(module, scale, shift)
    assert weight is not None  # of a layer
    if is_transformers_conv1d(module):
        added, weight = shift @ weight, weight * scale[:, None]
    else:
        groups = getattr(module, "groups", 1)
        scales, shifts = (  # [out, in / g, 1, ...]
            part.reshape(groups, -1)
            .repeat_interleave(len(weight) // groups, 0)
            .reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
            for part in (scale, shift)
        )
        added, weight = (weight * shifts).flatten(1).sum(1), weight * scales
    _keep(module, weight, added if bias is None else bias + added)


def _wide(
    module: nn.Module, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """A correction and a module's weight and bias, in float64."""
    weight, bias = (module._parameters[name] for name in ("weight", "bias"))
    device = _like(module, scale).device
    scale, shift = (part.to(device, torch.float64) for part in (scale, shift))
    wide = [None if part is None else part.detach().double() for part in (weight, bias)]
    return scale, shift, wide[0], wide[1]


def _like(module: nn.Module, otherwise: Tensor) -> Tensor:
    return next(iter([*module.parameters(), *module.buffers()]), otherwise)


def _keep(module: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Sets a module's weight and bias, in the type that it has, trained where they were."""
    like = _like(module, weight)
    dtype = like.dtype if like.is_floating_point() else torch.float32
    old = [module._parameters[name] for name in ("weight", "bias")]
    trained = all(part.requires_grad for part in old if part is not None)
    module.weight = nn.Parameter(weight.to(dtype), trained)
    module.bias = nn.Parameter(bias.to(dtype), trained)
    if isinstance(module, NORMS):
        module.affine = True
