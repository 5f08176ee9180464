"""Count, mean and sum of squared deviations of every channel, in one read.

For the counted positions i of x (all dimensions but the channel's) and a channel c

    count = n,    mean_c = 1/n sum_i x_ic,    m2_c = sum_i (x_ic - mean_c)^2,

so that m2 / count is the biased variance, and two results a, b merge without the data:

    n = n_a + n_b,   delta = mean_b - mean_a,
    mean = mean_a + delta n_b / n,   m2 = m2_a + m2_b + delta^2 n_a n_b / n .

Bytes: one read of x (and of the mask). Flops: 3 per element.
Numerics: float64 sums, with fused multiply-adds where the instruction set has them, of deviations
from the mean of the channel's first eight counted values. 16-bit values are summed as they are:
float64 holds their squares and the sums of these exactly, unless some are far smaller than others.
The same bits for any number of threads. No position counted: 0, 0, 0. Any finite float32 is in
range; of float64 the deviations must stay below about 1e150, as their squares are summed in
float64.
Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances", 1979.
"""

import torch
from torch import Tensor

from nlm import _native
from nlm._registry import register
from nlm.ops._arguments import check_tensor, without_gradient
from nlm.ops._channels import (
    channels_view,
    check_float,
    check_mask,
    normalize_dim,
    positions_last,
    positions_view,
)


def reference(x: Tensor, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    values = positions_last(x, dim % x.dim()).double()  # [C, positions]
    if mask is not None:
        values = values[:, mask.reshape(-1)]
    count = values.shape[1]
    mean = values.sum(1) / max(count, 1)
    m2 = (values - mean[:, None]).square().sum(1)
    return torch.tensor(count, device=x.device), mean, m2


def _out(x: Tensor, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    check_float("channel_moments", x)
    dim = normalize_dim("channel_moments", x, dim)
    if mask is not None:
        check_mask("channel_moments", x, mask, dim)
    count = x.new_empty((), dtype=torch.int64)
    mean = x.new_empty(x.shape[dim], dtype=torch.float64)
    return count, mean, torch.empty_like(mean)


def _cpu(x: Tensor, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    count, mean, m2 = _out(x, dim, mask)
    x3 = channels_view(x, dim % x.dim())
    mask2 = None if mask is None else positions_view(mask, dim % x.dim())
    _native.cpu.channel_moments(
        _native.view3(x3), _native.mask2(mask2),
        count.data_ptr(), mean.data_ptr(), m2.data_ptr(), _native.threads(),
    )  # fmt: skip
    return count, mean, m2


def _cuda(x: Tensor, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from nlm.kernels.channel_moments import channel_moments as launch

    count, mean, m2 = _out(x, dim, mask)
    mask2 = None if mask is None else positions_view(mask, dim % x.dim())
    launch(count, mean, m2, channels_view(x, dim % x.dim()), mask2)
    return count, mean, m2


_OPERATION = register(
    "channel_moments(Tensor x, int dim, Tensor? mask) -> (Tensor, Tensor, Tensor)",
    stem="channel_moments",
    reference=reference,
    out=_out,
    cpu=_cpu,
    cuda=_cuda,
    missing={"cpu": _native.cpu_missing, "cuda": _native.triton_missing},
)


def channel_moments(
    x: Tensor, dim: int = 1, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations per channel.

    Not differentiable: the results do not require gradients.

    Parameters
    ----------
    x : Tensor
        Any float type, any layout; a non-contiguous tensor is read in place where possible.
    dim : int
        The channel dimension; all others are reduced.
    mask : Tensor of bool, optional
        The positions that count; x's shape without ``dim``.

    Returns
    -------
    count : Tensor of int64, shape []
    mean, m2 : Tensor of float64, shape [C]

    Examples
    --------
    >>> import torch
    >>> count, mean, m2 = channel_moments(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    >>> count.item(), mean.tolist(), (m2 / count).tolist()
    (2, [2.0, 5.0], [1.0, 0.0])
    """
    check_tensor("channel_moments", "x", x)
    if mask is not None:
        check_tensor("channel_moments", "mask", mask)
    return _OPERATION.default(without_gradient("channel_moments", x), dim, mask)
