"""Ridge least squares of a linear map, from moments that stream over the samples.

With S_xx = sum_i (x_i - mean_x) (x_i - mean_x)^T over the samples i of all batches, and S_xy alike,
of all maps y ~ W x + b the one with the least

    sum_i |W x_i + b - y_i|^2 + lambda |W - W_0|^2,    lambda = ridge * mean(diag S_xx)

is, with b left free,

    W = W_0 + ((S_xx + lambda I)^-1 (S_xy - S_xx W_0^T))^T,    b = mean_y - W mean_x ,

solved in float64 by Cholesky. Without a bias the sums are about zero instead of the means.

A convolution is such a map of its (channel, tap) pairs, one for each of its groups. They are laid
side by side a few samples at a time: a tile has 16 MiB at most, or one sample.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nlm.statistics import CrossMoments

_TILE = 1 << 24  # bytes


class NormalEquations:
    """The sums over samples of one map from ``inputs`` to ``outputs`` channels."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | str | None = None) -> None:
        self.xx = CrossMoments.zeros(inputs, device=device)
        self.xy = CrossMoments.zeros(inputs, outputs, device)

    def update(self, x: Tensor, y: Tensor, dim: int, mask: Tensor | None = None) -> None:
        """Adds samples; arguments as for :func:`nlm.ops.cross_moments_`."""
        self.xx.update(x, None, dim, mask)
        self.xy.update(x, y, dim, mask)

    def all_reduce(self, process_group: Any) -> "NormalEquations":
        """The sums over the samples of all processes of a torch.distributed group."""
        found = NormalEquations(0, 0)
        found.xx, found.xy = (each.all_reduce(process_group) for each in (self.xx, self.xy))
        return found

    @property
    def finite(self) -> bool:
        """Whether no NaN or inf has come in."""
        return bool((self.xx.x.m2.sum() + self.xy.y.m2.sum()).isfinite())

    def system(self, ridge: float | None, biased: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """S_xx + lambda I, S_xy and lambda, float64; about zero where there is no bias.

        ``ridge`` is None for :func:`default_ridge`. Inputs that never vary have lambda = ridge.
        """
        count, mean_x = self.xx.count, self.xx.mean_x
        gram, cross = self.xx.comoment, self.xy.comoment
        if not biased:
            gram = gram + count * torch.outer(mean_x, mean_x)
            cross = cross + count * torch.outer(mean_x, self.xy.y.mean)
        level = gram.diagonal().mean()
        pull = torch.where(level > 0, level, 1.0)
        pull *= default_ridge(int(count), len(gram)) if ridge is None else ridge
        damped = gram.clone()
        damped.diagonal().add_(pull)
        return damped, cross, pull

    def solve(
        self, start: Tensor, ridge: float | None, biased: bool, name: str
    ) -> tuple[Tensor, Tensor]:
        """The weight [outputs, inputs] and the bias [outputs], float64; see above.

        Parameters
        ----------
        start : W_0, [outputs, inputs].
        ridge : at least 0; None for :func:`default_ridge`.
        biased : whether there is a bias; without, the second result is zero.
        name : what the message of :func:`cholesky` calls the map.
        """
        factor, wanted = self.residual(start, ridge, biased, name)
        weight = start.double() + torch.cholesky_solve(wanted, factor).T
        return weight, self.bias(weight, biased)

    def residual(
        self, start: Tensor, ridge: float | None, biased: bool, name: str, caller: str = "nlm.refit"
    ) -> tuple[Tensor, Tensor]:
        """The factor of the system's matrix, and S_xy - S_xx W_0^T; arguments as above."""
        damped, cross, pull = self.system(ridge, biased)
        start = start.double()
        return cholesky(damped, name, caller), cross - damped @ start.T + pull * start.T

    def bias(self, weight: Tensor, biased: bool) -> Tensor:
        """The best bias beside a weight, float64 [outputs]; zero where there is none."""
        found = self.xy.y.mean - weight @ self.xx.mean_x
        return found if biased else torch.zeros_like(found)


def cholesky(matrix: Tensor, name: str, caller: str = "nlm.refit") -> Tensor:
    """The factor of a system's matrix.

    Raises
    ------
    ValueError
        The inputs depend on one another, and the ridge is 0 or next to it.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    smallest = factor.diagonal().amin().square()
    noise = torch.finfo(matrix.dtype).eps * len(matrix) * matrix.diagonal().amax()
    if failed or not smallest > noise:
        raise ValueError(
            f"{caller}: inputs that depend on one another take a larger ridge, got {len(matrix)} "
            f"of {name!r} whose normal equations are singular"
        )
    return factor


def default_ridge(samples: int, inputs: int) -> float:
    """A fifth of the inputs per sample, from 0.001 (enough samples) to 1 (next to none)."""
    return min(1.0, max(1e-3, inputs / (5 * max(samples, 1))))


def as_linear(
    layer: nn.Module, x: Tensor, y: Tensor, mask: Tensor | None
) -> Iterator[tuple[int, Tensor, Tensor, int, Tensor | None]]:
    """What a layer reads, with its taps, beside what it is to give, group by group, in tiles.

    Parameters
    ----------
    layer : a linear or a convolution layer.
    x, y : its inputs, and outputs for them.
    mask : the positions that count, bool of the outputs' shape without the channels.

    Yields
    ------
    int, Tensor, Tensor, int, Tensor or None
        The number of the group, inputs, outputs, the dimension of both on which the channels stand,
        and the mask of what stands on the others.
    """
    if not isinstance(layer, nn.modules.conv._ConvNd):
        yield 0, x, y, -1, mask
        return
    rank = len(layer.kernel_size)
    if x.dim() == 1 + rank:
        x, y, mask = x[None], y[None], None if mask is None else mask[None]
    if any(padding := layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, padding, mode)
    sample, channel, *along = x.stride()
    tapped = x.as_strided(
        (*x.shape[:2], *layer.kernel_size, *y.shape[2:]),
        (
            sample, channel,
            *(step * length for step, length in zip(layer.dilation, along, strict=True)),
            *(step * length for step, length in zip(layer.stride, along, strict=True)),
        ),
    )  # fmt: skip
    per_sample = tapped.shape[1:].numel() * x.itemsize // layer.groups
    count = max(1, _TILE // max(1, per_sample))
    for start in range(0, len(x), count):
        part = slice(start, start + count)
        counted = None if mask is None else mask[part].flatten(1)
        groups = zip(
            tapped[part].chunk(layer.groups, 1), y[part].chunk(layer.groups, 1), strict=True
        )
        for group, (inputs, outputs) in enumerate(groups):
            yield group, inputs.flatten(1, 1 + rank).flatten(2), outputs.flatten(2), 1, counted
