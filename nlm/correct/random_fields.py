"""Inputs that nobody collected: random fields with the spectrum of natural images.

Refit on them needs no data: where all experts see the *same* random inputs, the mean of their
features is a target for what the merged network keeps of them. On the demo's networks this recovers
45 % (two tasks) to 61 % (eight) of what TACT gains on data (docs/corrections.md). In single trials
white noise gave less, other shapes (discs, binary fields) as much, and fields of their own for each
task took away from the merge, for the layers then learn to tell the fields apart. Batch norms take
the fields' statistics, which costs them: there look at REPAIR first.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CALLER = "nlm.correct.random_fields"


def random_fields(
    shape: Sequence[int],
    samples: int = 1024,
    *,
    exponent: float = 2.0,
    seed: int = 0,
    batch: int = 256,
) -> list[Tensor]:
    """Batches of Gaussian random fields, as data for a refit of networks of images.

    The power at frequency f falls as f^-exponent, which at 2 is the spectrum of natural images
    (Field 1987); networks that learn from such noise see real images well (Baradad et al. 2021,
    arXiv:2106.05963). Given to :func:`nlm.refit` for every task, *the same list for all*::

        fields = nlm.correct.random_fields((1, 16, 16))
        refitted = nlm.refit(merged, experts, dict.fromkeys(experts, fields), max_samples=None)

    Parameters
    ----------
    shape : of one sample: channels, then one to three axes of space or time.
    samples : how many.
    exponent : how fast the power falls; 0 is white noise.
    seed : of the draws, as for :meth:`torch.Generator.manual_seed`.
    batch : samples in a batch.

    Returns
    -------
    list of torch.Tensor
        float32 [batch, *shape] on the CPU; the mean square of each sample is 1, as that of inputs
        which are normalised.

    Raises
    ------
    ValueError
        A shape without a channel or an axis of space, or with more than three of these; a count
        below 1, an exponent that is not finite.
    """
    shape = tuple(int(n) for n in shape)
    size = shape[1:]
    if not 1 <= len(size) <= 3 or min(shape) < 1:
        raise ValueError(
            f"{CALLER}: a sample has channels and one to three axes of space, each at least 1, "
            f"got {shape}"
        )
    if samples < 1 or batch < 1:
        raise ValueError(f"{CALLER}: samples and batch are at least 1, got {samples} and {batch}")
    if not math.isfinite(exponent):
        raise ValueError(f"{CALLER}: the exponent is finite, got {exponent}")
    generator = torch.Generator().manual_seed(seed)
    squares = _squared_frequencies(size)
    logarithm = squares.log() * (-exponent / 4)
    amplitude = (logarithm - logarithm.max()).exp().float()  # of any exponent: at most 1
    axes = tuple(range(-len(size), 0))
    batches = []
    for begin in range(0, samples, batch):
        white = torch.randn(min(batch, samples - begin), *shape, generator=generator)
        fields = torch.fft.irfftn(torch.fft.rfftn(white, dim=axes) * amplitude, s=size, dim=axes)
        length = fields.flatten(1).square().mean(1).sqrt()
        batches.append(fields / length.view(-1, *[1] * len(shape)))
    return batches


def _squared_frequencies(size: Sequence[int]) -> Tensor:
    """|f|^2 of what rfftn gives, in cycles per entry; the mean counts as the lowest of the rest."""
    along = [torch.fft.fftfreq(n, dtype=torch.float64) for n in size[:-1]]
    along.append(torch.fft.rfftfreq(size[-1], dtype=torch.float64))
    squares = torch.stack(torch.meshgrid(*along, indexing="ij")).square().sum(0)
    squares.view(-1)[0] = 1 / max(size) ** 2
    return squares
