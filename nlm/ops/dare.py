"""DARE: drops entries of a task vector at random and rescales the others.

With theta_0 the base, theta_t an expert, p the drop rate and u_i a random number in [0, 1),

    out_i = theta_0i + s (theta_t - theta_0)_i   where u_i >= p,     out_i = theta_0i   elsewhere;

s = 1 / (1 - p) leaves the expected value where it was, and s = 1 does not rescale.

The random numbers are counter-based. Entry i, counted in row-major order, has position offset + i;
its u is 2^-32 times word position % 4 of Philox4x32-10 with the counter (position / 4, 0) and the
seed as key, the lower 32 bits first. So a mask follows from the seed and the positions alone: it is
the same for any number of threads, on any device, and for a tensor that is taken in chunks, each
with the offset of its first entry.

Bytes: two reads, one write. Flops: 3 per entry, and a fourth of a Philox, 20 multiplications.
Numerics: float32 (float64 for float64), every operation rounded by itself, one rounding to the
type of the expert at the end: kernel and reference agree in every bit, for any number of threads.
Sources: Yu et al., Language Models are Super Mario, arXiv:2311.03099; Salmon et al., Parallel
Random Numbers: As Easy as 1, 2, 3, SC 2011.
"""

import torch
from torch import Tensor

from nlm import _native
from nlm._random import LOW, philox
from nlm._registry import register
from nlm.ops._arguments import check_positions, check_seed, check_tensor, without_gradient
from nlm.ops._channels import FLOATS


def random_words(seed: int, offset: int, count: int, device: torch.device) -> Tensor:
    """The words of positions [offset, offset + count), as int64 ``[count]``."""
    counters = torch.arange(offset // 4, (offset + count + 3) // 4, device=device)
    zero = torch.zeros_like(counters)
    words = philox((counters & LOW, counters >> 32, zero, zero), (seed & LOW, seed >> 32))
    return torch.stack(words, -1).reshape(-1)[offset % 4 :][:count]


def _threshold(drop: float) -> int:
    """Words below it are dropped."""
    return int(drop * 2**32)


def _scale(drop: float, rescale: bool) -> float:
    return 1 / (1 - drop) if rescale else 1.0


def reference(
    expert: Tensor, base: Tensor, drop: float, seed: int, offset: int, rescale: bool
) -> Tensor:
    words = random_words(seed, offset, expert.numel(), expert.device).reshape(expert.shape)
    wide = torch.float64 if expert.dtype == torch.float64 else torch.float32
    start = base.to(wide)
    moved = start + _scale(drop, rescale) * (expert.to(wide) - start)
    return torch.where(words >= _threshold(drop), moved, start).to(expert.dtype).contiguous()


def _out(
    expert: Tensor, base: Tensor, drop: float, seed: int, offset: int, rescale: bool
) -> Tensor:
    if expert.dtype not in FLOATS or base.dtype != expert.dtype:
        raise TypeError(
            "nlm.dare: expert and base must both be float16, bfloat16, float32 or float64, "
            f"got {expert.dtype} and {base.dtype}"
        )
    if base.shape != expert.shape or base.device != expert.device:
        raise ValueError(
            f"nlm.dare: base must have the shape and device of expert, {tuple(expert.shape)} on "
            f"{expert.device}, got {tuple(base.shape)} on {base.device}"
        )
    if not 0 <= drop < 1:
        raise ValueError(f"nlm.dare: drop must lie in [0, 1), got {drop}")
    check_seed("dare", seed)
    check_positions("dare", offset, expert.numel())
    return torch.empty_like(expert, memory_format=torch.contiguous_format)


def _cpu(
    expert: Tensor, base: Tensor, drop: float, seed: int, offset: int, rescale: bool
) -> Tensor:
    out = _native.fresh(_out(expert, base, drop, seed, offset, rescale))
    expert, base = expert.contiguous(), base.contiguous()
    _native.cpu.dare(
        expert.data_ptr(), base.data_ptr(), out.data_ptr(), _native.DTYPES[expert.dtype],
        expert.numel(), seed, offset, _threshold(drop), _scale(drop, rescale), _native.threads(),
    )  # fmt: skip
    return out


def _cuda(
    expert: Tensor, base: Tensor, drop: float, seed: int, offset: int, rescale: bool
) -> Tensor:
    out = _out(expert, base, drop, seed, offset, rescale)
    expert, base = expert.contiguous(), base.contiguous()
    _native.cuda.dare(
        expert.data_ptr(), base.data_ptr(), out.data_ptr(), _native.DTYPES[expert.dtype],
        expert.numel(), seed, offset, _threshold(drop), _scale(drop, rescale),
        _native.stream(expert),
    )  # fmt: skip
    return out


_DARE = register(
    "dare(Tensor expert, Tensor base, float drop, int seed, int offset, bool rescale) -> Tensor",
    stem="dare",
    reference=reference,
    out=_out,
    cpu=_cpu,
    cuda=_cuda,
    missing={"cpu": _native.cpu_missing, "cuda": _native.cuda_missing},
)


def dare(
    expert: Tensor,
    base: Tensor,
    drop: float,
    seed: int,
    offset: int = 0,
    rescale: bool = True,
) -> Tensor:
    """The base plus what is left of a task vector of which random entries are dropped.

    Not differentiable: the result does not require gradients.

    Parameters
    ----------
    expert, base : Tensor
        Of one shape and float type, any layout.
    drop : float
        The share p of the entries that is dropped, in [0, 1).
    seed : int
        In [0, 2^63). Tensors that are to be dropped from independently have seeds of their own.
    offset : int
        Position of the first entry, for a part of a tensor that is taken in chunks.
    rescale : bool
        Whether the entries that are kept are divided by 1 - p.

    Returns
    -------
    Tensor
        Contiguous, of the shape and type of the expert.

    Examples
    --------
    >>> import torch
    >>> expert, base = torch.ones(8), torch.zeros(8)
    >>> dare(expert, base, 0.5, seed=0).tolist()
    [0.0, 2.0, 2.0, 2.0, 2.0, 0.0, 2.0, 0.0]
    >>> dare(expert[3:], base[3:], 0.5, seed=0, offset=3).tolist()
    [2.0, 2.0, 0.0, 2.0, 0.0]
    """
    for label, value in (("expert", expert), ("base", base)):
        check_tensor("dare", label, value)
    check_seed("dare", seed)
    tensors = [without_gradient("dare", x) for x in (expert, base)]
    return _DARE.default(*tensors, drop, seed, offset, rescale)
