"""The affine map per channel that gives one set of moments the mean and variance of another.

    scale = sqrt(var_target / var),     shift = mean_target - scale * mean.

A channel is dead where its variance is not above the rounding noise of its mean, or below 1e-8 of
the median variance of the layer's channels that vary at all: its scale would be a quotient of
rounding errors.

=============  =============  ==================================================================
merged         target         result
=============  =============  ==================================================================
alive          alive          as above
alive          dead           scale 0, shift = mean_target: the constant that the target is
dead           alive or dead  scale 1, shift = mean_target - mean: no variance can be made up
=============  =============  ==================================================================
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nlm.statistics import Moments

Target = tuple[Tensor, Tensor]  # mean and variance, float64 [channels]

_MEDIAN_SHARE = 1e-8


def match(
    merged: Moments, target_mean: Tensor, target_variance: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel, float64; ``dtype`` is that of the activations."""
    dead = is_dead(merged.mean, merged.variance, dtype)
    target_dead = is_dead(target_mean, target_variance, dtype)
    ratio = target_variance / torch.where(dead, 1.0, merged.variance)
    scale = torch.where(dead, 1.0, torch.where(target_dead, 0.0, ratio.sqrt()))
    return scale, target_mean - scale * merged.mean


def is_dead(mean: Tensor, variance: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether a channel never really varies, bool [channels]."""
    noise = (torch.finfo(dtype).eps * mean).square()
    varying = variance[variance > 0]
    median = varying.median() if varying.numel() else variance.new_zeros(())
    return variance <= torch.maximum(noise, _MEDIAN_SHARE * median)


@dataclass(frozen=True)
class Matching:
    """The rule that gives each point the mean and the variance of a target."""

    targets: Mapping[str, Target]

    def measure(
        self, output: Tensor, dim: int, mask: Tensor | None, beside: Callable[[], Tensor]
    ) -> "Seen":
        return Seen(Moments.of(output, dim, mask))

    def solve(
        self, caller: str, point: str, measured: "Seen", dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        mean, variance = self.targets[point]
        check_size(caller, point, len(mean), len(measured.merged.mean))
        return match(measured.merged, mean, variance, dtype)


@dataclass(frozen=True)
class Seen:
    """What matching keeps of batches."""

    merged: Moments

    def __add__(self, other: "Seen") -> "Seen":
        return Seen(self.merged + other.merged)

    def all_reduce(self, process_group: Any = None) -> "Seen":
        return Seen(self.merged.all_reduce(process_group))


def check_size(caller: str, point: str, experts: int, merged: int) -> None:
    """Raises ValueError where the experts have other channels than the merged model."""
    if experts != merged:
        raise ValueError(
            f"{caller}: the experts have the merged model's channels, got {experts} and {merged} "
            f"at {point!r}"
        )
