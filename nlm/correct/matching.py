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

import torch
from torch import Tensor

from nlm.statistics import Moments

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
