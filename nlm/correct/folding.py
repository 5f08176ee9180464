"""Folding corrections into weights: s (W x + b) + t = (s W) x + (s b + t).

The output channels are the rows of a weight, but for a transposed convolution of g groups, whose
weight is [in, out / g, ...]: the channels of group k are the columns of its rows k in/g onwards.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nlm._modules import NORMS, submodule

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FOLDED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, *NORMS, nn.SyncBatchNorm)


def fold_points(network: nn.Module, corrections: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Puts corrections into the weights of a network, in place.

    Parameters
    ----------
    corrections : point -> scale and shift, [channels]; each point a linear, convolution or batch
        norm module.

    Raises
    ------
    ValueError
        A point of another kind, among them one whose weight is computed (weight norm) or whose
        forward is its own, or one whose weight another module shares.
    """
    users: dict[int, int] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    for point, (scale, shift) in corrections.items():
        module = submodule(network, point)
        if not _is_affine(module):
            raise ValueError(
                f"nlm.correct: a correction is folded into a linear, convolution or batch norm "
                f"module with a weight and a forward of the usual kind, got "
                f"{type(module).__name__} at {point!r}"
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
    factors = scale.reshape(-1, *[1] * (ones.dim() - 1))
    if isinstance(module, _TRANSPOSED):
        columns = scale.reshape(module.groups, -1)  # [g, out / g]
        columns = columns.repeat_interleave(ones.shape[0] // module.groups, 0)  # [in, out / g]
        factors = columns.reshape(*columns.shape, *[1] * (ones.dim() - 2))
    dtype = like.dtype if like.is_floating_point() else torch.float32
    trained = all(p.requires_grad for p in (weight, bias) if p is not None)
    module.weight = nn.Parameter((ones * factors).to(dtype), trained)
    module.bias = nn.Parameter((zeros * scale + shift).to(dtype), trained)
    if isinstance(module, NORMS):
        module.affine = True


def _is_affine(module: nn.Module) -> bool:
    """Whether a module computes W x + b from a weight and a bias that are parameters of its own."""
    usual = any(type(module).forward is kind.forward for kind in _FOLDED)
    return usual and {"weight", "bias"} <= module._parameters.keys()
