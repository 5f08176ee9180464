"""Folding corrections into weights: s (W x + b) + t = (s W) x + (s b + t)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nlm._modules import submodule

_ROWS_FIRST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_points(network: nn.Module, corrections: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Puts corrections into the weights of a network, in place.

    Parameters
    ----------
    corrections : point -> scale and shift, [channels]; each point a linear, convolution or batch
        norm module.

    Raises
    ------
    ValueError
        A point of another kind, or whose weight another module shares.
    """
    users: dict[int, int] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    for point, (scale, shift) in corrections.items():
        module = submodule(network, point)
        if not isinstance(module, _ROWS_FIRST + _NORMS):
            raise ValueError(
                f"nlm.correct: a correction is folded into a linear, convolution or batch norm "
                f"module, got {type(module).__name__} at {point!r}"
            )
        if any(users[id(parameter)] > 1 for parameter in module.parameters(recurse=False)):
            raise ValueError(
                f"nlm.correct: a correction is folded into weights that one module uses, got "
                f"shared ones at {point!r}"
            )
        _fold(module, scale, shift)


def _fold(module: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Scales and shifts a module's output, computed in float64, kept in the weights' dtype."""
    like = next((p for p in [*module.parameters(), *module.buffers()]), scale)
    scale, shift = (part.to(like.device, torch.float64) for part in (scale, shift))
    parameters = module._parameters
    weight, bias = parameters["weight"], parameters["bias"]
    ones = torch.ones_like(scale) if weight is None else weight.detach().double()
    zeros = torch.zeros_like(shift) if bias is None else bias.detach().double()
    rows = scale.reshape(-1, *[1] * (ones.dim() - 1))
    dtype = like.dtype if like.is_floating_point() else torch.float32
    module.weight = nn.Parameter((ones * rows).to(dtype))
    module.bias = nn.Parameter((zeros * scale + shift).to(dtype))
