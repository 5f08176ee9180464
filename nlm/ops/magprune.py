"""MagPrune: drops entries of task vectors at random, the smaller ones of a row more often.

Of a row x of n entries the one of rank r, counted from the smallest magnitude (of equal ones the
first comes first), is kept with probability

    p_r = density - epsilon + 2 epsilon r / (n - 1),     out = x / p_r or 0;

without rescaling x or 0. A density of 1 keeps all. Rows of more than 2^20 entries are cut into
segments of so many, which are ranked one by one, so that what is held is bounded.

The random number of rank r is 2^-32 times the Philox word of position offset + i + r, with i where
the row or segment begins, as in :mod:`nlm.ops.dare`: what is kept follows from the seed, the
positions and the ranks alone, for any number of threads, on any device.

Bytes: two reads, one write; per entry a sort by counting, on the CPU 4 passes over 8 bytes in the
cache (3 of longer rows), on the GPU 8 over 4 bytes and the entry (4 of 16-bit types). Numerics:
float32 (float64 for float64), one product per entry, rounded to the type of x: kernels and
reference agree in every bit. NaN and infinity rank last and stay NaN where they are dropped, as 0
times them.
Source: Deep et al., DELLA-Merging, arXiv:2406.11617.
"""

from typing import Any

import torch
from torch import Tensor

from nlm import _native
from nlm._random import RANKED, chances_by_rank
from nlm._registry import register
from nlm.ops._arguments import check_positions, check_seed, check_tensor, without_gradient
from nlm.ops._channels import FLOATS
from nlm.ops.dare import random_words


def reference(
    x: Tensor, density: float, epsilon: float, seed: int, offset: int, rescale: bool
) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, length = x.shape
    for begin in range(0, length, RANKED):
        part = x[:, begin : begin + RANKED].to(wide)
        chances = chances_by_rank(part.shape[1], density, epsilon, rescale)
        least, factors = (torch.from_numpy(each.astype(float)).to(x.device) for each in chances)
        starts = range(offset + begin, offset + rows * length, length)
        words = [random_words(seed, start, part.shape[1], x.device) for start in starts]
        drawn = torch.stack(words) if words else part.long()
        values = torch.where(drawn >= least, factors, 0.0).to(wide)
        order = part.abs().sort(dim=1, stable=True).indices
        factor = torch.empty_like(part).scatter_(1, order, values)
        out[:, begin : begin + RANKED] = (part * factor).to(x.dtype)
    return out


def _out(
    x: Tensor, density: float, epsilon: float, seed: int, offset: int, rescale: bool
) -> Tensor:
    if x.dtype not in FLOATS:
        raise TypeError(
            f"nlm.magprune: x must be float16, bfloat16, float32 or float64, got {x.dtype}"
        )
    if x.dim() != 2:
        raise ValueError(f"nlm.magprune: x must be [rows, length], got {tuple(x.shape)}")
    in_range = 0 <= epsilon < density and density + epsilon < 1
    if not (density == 1 or in_range):
        raise ValueError(
            "nlm.magprune: density - epsilon and density + epsilon must lie in (0, 1), or density "
            f"be 1, got density {density} and epsilon {epsilon}"
        )
    check_seed("magprune", seed)
    check_positions("magprune", offset, x.numel())
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _tables(length: int, density: float, epsilon: float, rescale: bool) -> list[tuple[Any, Any]]:
    """Chances by rank of the segments of a row, and of its last one where that is shorter."""
    lengths = min(length, RANKED), length % RANKED
    return [chances_by_rank(each, density, epsilon, rescale) for each in lengths]


def _cpu(
    x: Tensor, density: float, epsilon: float, seed: int, offset: int, rescale: bool
) -> Tensor:
    out = _native.fresh(_out(x, density, epsilon, seed, offset, rescale))
    x = x.contiguous()
    rows, length = x.shape
    tables = _tables(length, density, epsilon, rescale)
    addresses = [(least.ctypes.data, factors.ctypes.data) for least, factors in tables]
    _native.cpu.magprune(
        x.data_ptr(), out.data_ptr(), _native.DTYPES[x.dtype], rows, length, RANKED, offset, seed,
        *addresses, _native.threads(),
    )  # fmt: skip
    return out


def _cuda(
    x: Tensor, density: float, epsilon: float, seed: int, offset: int, rescale: bool
) -> Tensor:
    from nlm.kernels.magprune import magprune as launch

    out = _out(x, density, epsilon, seed, offset, rescale)
    tables = _tables(x.shape[1], density, epsilon, rescale)
    launch(out, x.contiguous(), tables, RANKED, offset, seed)
    return out


_MAGPRUNE = register(
    "magprune(Tensor x, float density, float epsilon, int seed, int offset, bool rescale) -> "
    "Tensor",
    stem="magprune",
    reference=reference,
    out=_out,
    cpu=_cpu,
    cuda=_cuda,
    missing={"cpu": _native.cpu_missing, "cuda": _native.triton_missing},
)


def magprune(
    x: Tensor,
    density: float,
    epsilon: float,
    seed: int,
    offset: int = 0,
    rescale: bool = True,
) -> Tensor:
    """What is left of the rows of a task vector, of which smaller entries are dropped more often.

    Not differentiable: the result does not require gradients.

    Parameters
    ----------
    x : Tensor [rows, length]
        Of any float type and layout.
    density : float
        The share that is kept on average, in (0, 1]; 1 keeps all.
    epsilon : float
        The smallest entry of a row is kept with probability density - epsilon, the largest with
        density + epsilon.
    seed : int
        In [0, 2^63). Tensors that are to be dropped from independently have seeds of their own.
    offset : int
        Position of the first entry, for rows of a tensor that is taken in parts.
    rescale : bool
        Whether the entries that are kept are divided by their probability.

    Returns
    -------
    Tensor
        Contiguous, of the shape and type of x.

    Examples
    --------
    >>> import torch
    >>> magprune(torch.tensor([[4.0, 1.0, 2.0, 3.0]]), 0.5, 0.25, seed=2, rescale=False).tolist()
    [[4.0, 0.0, 0.0, 3.0]]
    """
    check_tensor("magprune", "x", x)
    check_seed("magprune", seed)
    return _MAGPRUNE.default(
        without_gradient("magprune", x), density, epsilon, seed, offset, rescale
    )
