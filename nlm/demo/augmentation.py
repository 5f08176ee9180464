"""Random views of small pictures: a labelled draw is a fresh view of a few clean renderings.

A picture p in [0, 1] of 32x32 becomes an input of 16x16

    x = (b + (c - b/2) * pool(warp(p)) + noise - 0.35) / 0.35

where ``warp`` is an affine map (rotation, scale, shear, shift), ``pool`` the 2x2 average, c the
contrast and b the background. All random numbers of a draw come from one generator before any
picture is touched, so a draw does not depend on how it is cut into chunks.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

CANVAS = 32
SIDE = CANVAS // 2
_CHUNK = 4096  # 4096 warped pictures are 16 MiB
_CENTRE, _SPREAD = 0.35, 0.35


def stream(seed: int, *names: str) -> torch.Generator:
    """A generator of its own for every (seed, names): no two draws share random numbers."""
    text = "/".join((str(seed), *names)).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def augment(
    pictures: Tensor, generator: torch.Generator, strength: float = 1.0, noise: float = 0.1
) -> Tensor:
    """Draw one random view of each picture.

    Parameters
    ----------
    pictures : uint8 Tensor [n, 32, 32]
    generator : the source of all randomness
    strength : multiplies the ranges of the affine map: rotation and shear 0.25, scale 20 %,
        shift 15 % of half the canvas
    noise : standard deviation of the pixel noise

    Returns
    -------
    float32 Tensor [n, 1, 16, 16]
    """
    n = len(pictures)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    rotation, shear = (uniform(-0.25 * strength, 0.25 * strength) for _ in range(2))
    scale_x, scale_y = (uniform(1 - 0.2 * strength, 1 + 0.2 * strength) for _ in range(2))
    shift_x, shift_y = (uniform(-0.15 * strength, 0.15 * strength) for _ in range(2))
    contrast = uniform(0.6, 1.0).view(n, 1, 1, 1)
    background = uniform(0.0, 0.3).view(n, 1, 1, 1)
    speckle = torch.randn(n, 1, SIDE, SIDE, generator=generator).mul_(noise)

    cosine, sine = torch.cos(rotation), torch.sin(rotation)
    row_x = torch.stack([cosine / scale_x, (shear - sine) / scale_x, shift_x], 1)
    row_y = torch.stack([sine / scale_y, cosine / scale_y, shift_y], 1)
    maps = torch.stack([row_x, row_y], 1)  # [n, 2, 3]

    views = [
        _warp(part, affine)
        for part, affine in zip(pictures.split(_CHUNK), maps.split(_CHUNK), strict=True)
        if n > 0
    ]
    bright = background + (contrast - background / 2) * torch.cat([speckle[:0], *views])
    return (bright + speckle - _CENTRE) / _SPREAD


def _warp(pictures: Tensor, maps: Tensor) -> Tensor:
    """Map uint8 pictures [n, 32, 32] affinely and average 2x2 blocks: [n, 1, 16, 16]."""
    canvas = pictures.unsqueeze(1).float() / 255
    grid = F.affine_grid(maps, list(canvas.shape), align_corners=False)
    return F.avg_pool2d(F.grid_sample(canvas, grid, align_corners=False), 2)
