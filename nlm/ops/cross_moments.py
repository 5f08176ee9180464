"""Adds a batch to the joint moments of two streams of channels, x and y.

For the samples i of all batches so far (all dimensions but the channel's) the state holds

    count = n,   mean_x = 1/n sum_i x_i   [cx],   m2_x = sum_i (x_i - mean_x)^2   [cx],   y alike,
    comoment = sum_i (x_i - mean_x) (y_i - mean_y)^T   [cx, cy] .

A batch b is reduced to the same quantities about its own means and merged into the state a:

    n = n_a + n_b,   delta = mean_b - mean_a,   mean = mean_a + delta n_b / n,
    m2 = m2_a + m2_b + delta^2 n_a n_b / n,
    comoment = comoment_a + comoment_b + delta_x delta_y^T n_a n_b / n .

Without y the same stream is taken twice: comoment is exactly symmetric, m2_x is its diagonal, half
of the products are computed, and only what lies above the diagonal is read.

Bytes: one read of x and y. Flops: 2 n cx cy (n cx^2 without y).
Numerics: means and m2 in float64 throughout. The kernels take deviations in float64, round them to
float32 (not for float64), and multiply and sum them in float32 over at most 256 samples, then in
float64, with fused multiply-adds: an entry of comoment errs by < 2e-6 sqrt(m2_x m2_y), by 1e-8 on
random data. On a CPU with AMX, precision "bf16x3" multiplies the deviations as pairs of bfloat16
numbers, high high + high low + low high: an entry errs by < 1e-6 for independent random streams,
by 5e-6 where x and y are alike (low low adds up), by 3e-5 at most. "bf16" multiplies them rounded
to bfloat16: 2e-4 on random data, 8e-3 at most. Means and m2 do not depend on the precision,
elsewhere nothing does. The same bits for any number of threads. The reference is float64
throughout; it goes through BLAS and is excepted. Any finite float32 is in range; of float64 the
deviations must stay below about 1e150, as their squares are summed in float64.
Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances", 1979.
"""

import torch
from torch import Tensor

from nlm import _native
from nlm._registry import register
from nlm.ops._arguments import check_apart, check_tensor, check_written, without_gradient
from nlm.ops._channels import (
    channels_view,
    check_device,
    check_float,
    check_mask,
    normalize_dim,
    positions_last,
    positions_view,
)


def reference(
    count: Tensor,
    mean_x: Tensor,
    m2_x: Tensor,
    mean_y: Tensor | None,
    m2_y: Tensor | None,
    comoment: Tensor,
    x: Tensor,
    y: Tensor | None,
    dim: int,
    mask: Tensor | None,
    precision: str = "float32",
) -> None:
    _check_memory((count, mean_x, m2_x, mean_y, m2_y, comoment), x, y, mask)
    n, batch_mean_x, batch_m2_x, deviations_x = _centre(x, dim % x.dim(), mask)
    batch_mean_y, batch_m2_y, deviations_y = None, None, deviations_x
    if y is not None:
        _, batch_mean_y, batch_m2_y, deviations_y = _centre(y, dim % x.dim(), mask)
    products = deviations_x @ deviations_y.T
    batch = (n, batch_mean_x, batch_m2_x, batch_mean_y, batch_m2_y, products)
    _merge((count, mean_x, m2_x, mean_y, m2_y, comoment), batch)


def _centre(x: Tensor, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count, mean, m2, and the deviations [c, n], in float64."""
    values = positions_last(x, dim).double()  # [c, positions]
    if mask is not None:
        values = values[:, mask.reshape(-1)]
    n = values.shape[1]
    mean = values.sum(1) / max(n, 1)
    deviations = values - mean[:, None]
    return torch.tensor(n, device=x.device), mean, deviations.square().sum(1), deviations


#: In the order of csrc/cross_moments.h.
PRECISIONS = ("float32", "bf16x3", "bf16")
_STATE = ("count", "mean_x", "m2_x", "mean_y", "m2_y", "comoment")
State = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]


def _merge(state: State, batch: State) -> None:
    """Chan's merge of one batch's (count, mean_x, m2_x, mean_y, m2_y, comoment) into the state."""
    count, mean_x, m2_x, mean_y, m2_y, comoment = state
    batch_count, batch_mean_x, batch_m2_x, batch_mean_y, batch_m2_y, batch_comoment = batch
    weight = batch_count.double() / (count + batch_count).clamp(min=1)
    fraction = count * weight
    delta_x = _merge_channels(mean_x, m2_x, batch_mean_x, batch_m2_x, weight, fraction)
    delta_y = delta_x
    if not (mean_y is None or m2_y is None or batch_mean_y is None or batch_m2_y is None):
        delta_y = _merge_channels(mean_y, m2_y, batch_mean_y, batch_m2_y, weight, fraction)
    comoment += batch_comoment + fraction * torch.outer(delta_x, delta_y)
    if mean_y is None:
        above = torch.triu(comoment, 1)
        comoment.copy_(above + above.T + torch.diag(m2_x))
    count += batch_count


def _merge_channels(
    mean: Tensor, m2: Tensor, batch_mean: Tensor, batch_m2: Tensor, weight: Tensor, fraction: Tensor
) -> Tensor:
    """Merges in place; returns the difference of the means, 0 for an empty batch."""
    delta = torch.where(weight > 0, batch_mean - mean, 0.0)
    # Where a mean is infinite, delta * weight would turn it into NaN.
    mean += torch.where(delta.isfinite(), delta * weight, batch_mean)
    m2 += batch_m2 + fraction * delta.square()
    return delta


def _out(
    count: Tensor,
    mean_x: Tensor,
    m2_x: Tensor,
    mean_y: Tensor | None,
    m2_y: Tensor | None,
    comoment: Tensor,
    x: Tensor,
    y: Tensor | None,
    dim: int,
    mask: Tensor | None,
    precision: str = "float32",
) -> None:
    check_float("cross_moments_", x)
    dim = normalize_dim("cross_moments_", x, dim)
    if y is not None:
        _check_second_stream(x, y, dim)
    if mask is not None:
        check_mask("cross_moments_", x, mask, dim)
    if precision not in PRECISIONS:
        raise ValueError(
            f"nlm.cross_moments_: precision must be one of {', '.join(PRECISIONS)}, "
            f"got {precision!r}"
        )
    channels_x = x.shape[dim]
    channels_y = channels_x if y is None else y.shape[dim]
    _check_state("count", count, torch.int64, (), x)
    _check_state("mean_x", mean_x, torch.float64, (channels_x,), x)
    _check_state("m2_x", m2_x, torch.float64, (channels_x,), x)
    for name, tensor in (("mean_y", mean_y), ("m2_y", m2_y)):
        if (tensor is None) != (y is None):
            raise ValueError(
                "nlm.cross_moments_: mean_y and m2_y must be given if and only if y is, "
                f"got {name} {'without' if y is None else 'missing for'} y"
            )
        if tensor is not None:
            _check_state(name, tensor, torch.float64, (channels_y,), x)
    _check_state("comoment", comoment, torch.float64, (channels_x, channels_y), x)


def _check_memory(state: State, x: Tensor, y: Tensor | None, mask: Tensor | None) -> None:
    written = zip(_STATE, state, strict=True)
    check_apart(
        "cross_moments_",
        [(label, tensor) for label, tensor in written if tensor is not None],
        [(label, t) for label, t in (("x", x), ("y", y), ("mask", mask)) if t is not None],
    )


def _check_second_stream(x: Tensor, y: Tensor, dim: int) -> None:
    if y.dtype != x.dtype:
        raise TypeError(f"nlm.cross_moments_: y must have the dtype of x, {x.dtype}, got {y.dtype}")
    same_rank = y.dim() == x.dim()
    if not same_rank or any(y.shape[d] != x.shape[d] for d in range(x.dim()) if d != dim):
        raise ValueError(
            f"nlm.cross_moments_: y must have the shape of x except along dim {dim}, "
            f"{tuple(x.shape)}, got {tuple(y.shape)}"
        )
    check_device("cross_moments_", x, "y", y)


def _check_state(
    label: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], x: Tensor
) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"nlm.cross_moments_: {label} must be {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"nlm.cross_moments_: {label} must have shape {shape}, got {tuple(tensor.shape)}"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"nlm.cross_moments_: {label} must be contiguous, got strides {tensor.stride()}"
        )
    check_device("cross_moments_", x, label, tensor)


def _cpu(
    count: Tensor,
    mean_x: Tensor,
    m2_x: Tensor,
    mean_y: Tensor | None,
    m2_y: Tensor | None,
    comoment: Tensor,
    x: Tensor,
    y: Tensor | None,
    dim: int,
    mask: Tensor | None,
    precision: str = "float32",
) -> None:
    _out(count, mean_x, m2_x, mean_y, m2_y, comoment, x, y, dim, mask, precision)
    _check_memory((count, mean_x, m2_x, mean_y, m2_y, comoment), x, y, mask)
    dim %= x.dim()
    x3 = channels_view(x, dim)
    y3 = None if y is None else channels_view(y, dim)
    mask2 = None if mask is None else positions_view(mask, dim)
    state = [0 if t is None else t.data_ptr() for t in (mean_x, m2_x, mean_y, m2_y, comoment)]
    _native.cpu.cross_moments(
        _native.view3(x3), None if y3 is None else _native.view3(y3), _native.mask2(mask2),
        PRECISIONS.index(precision), count.data_ptr(), *state, _native.threads(),
    )  # fmt: skip


def _cuda(
    count: Tensor,
    mean_x: Tensor,
    m2_x: Tensor,
    mean_y: Tensor | None,
    m2_y: Tensor | None,
    comoment: Tensor,
    x: Tensor,
    y: Tensor | None,
    dim: int,
    mask: Tensor | None,
    precision: str = "float32",
) -> None:
    from nlm.kernels.cross_moments import cross_moments_ as launch

    state = (count, mean_x, m2_x, mean_y, m2_y, comoment)
    _out(*state, x, y, dim, mask, precision)
    if x.dtype == torch.float64 or comoment.numel() == 0:  # nothing to gain on cuBLAS
        reference(*state, x, y, dim, mask)
        return
    _check_memory(state, x, y, mask)
    dim %= x.dim()
    y3 = None if y is None else channels_view(y, dim)
    mask2 = None if mask is None else positions_view(mask, dim)
    launch(*state, channels_view(x, dim), y3, mask2)


_OPERATION = register(
    "cross_moments_(Tensor(a!) count, Tensor(b!) mean_x, Tensor(c!) m2_x, Tensor(d!)? mean_y, "
    "Tensor(e!)? m2_y, Tensor(f!) comoment, Tensor x, Tensor? y, int dim, Tensor? mask, "
    "str precision) -> ()",
    stem="cross_moments",
    reference=reference,
    out=_out,
    cpu=_cpu,
    cuda=_cuda,
    missing={"cpu": _native.cpu_missing, "cuda": _native.triton_missing},
)


def cross_moments_(
    count: Tensor,
    mean_x: Tensor,
    m2_x: Tensor,
    mean_y: Tensor | None,
    m2_y: Tensor | None,
    comoment: Tensor,
    x: Tensor,
    y: Tensor | None = None,
    dim: int = 1,
    mask: Tensor | None = None,
    precision: str = "float32",
) -> None:
    """Adds a batch to the running joint moments of x and y, in place.

    Not differentiable: no gradient reaches x and y.

    Parameters
    ----------
    count : Tensor of int64, shape []
    mean_x, m2_x : Tensor of float64, shape [cx]
    mean_y, m2_y : Tensor of float64, shape [cy], or None where y is None
    comoment : Tensor of float64, shape [cx, cy]
        The state, all zero before the first batch; contiguous, written to, and in memory apart
        from each other and from x, y and mask.
    x : Tensor
        Any float type, any layout; a non-contiguous tensor is read in place where possible.
    y : Tensor, optional
        The second stream: x's dtype, and x's shape except along ``dim``. Without it, x twice.
    dim : int
        The channel dimension; all others hold samples.
    mask : Tensor of bool, optional
        The samples that count; x's shape without ``dim``.
    precision : {"float32", "bf16x3", "bf16"}
        The least that the products keep of the deviations: see Numerics above. Less is faster on a
        CPU with AMX, and changes nothing elsewhere.

    Examples
    --------
    >>> import torch
    >>> count = torch.zeros((), dtype=torch.int64)
    >>> mean, m2 = torch.zeros(2, 2, dtype=torch.float64)
    >>> comoment = torch.zeros(2, 2, dtype=torch.float64)
    >>> for batch in torch.tensor([[[1.0, 5.0]], [[3.0, 1.0]]]):
    ...     cross_moments_(count, mean, m2, None, None, comoment, batch)
    >>> count.item(), mean.tolist(), comoment.tolist()
    (2, [2.0, 3.0], [[2.0, -4.0], [-4.0, 8.0]])
    """
    values = (count, mean_x, m2_x, mean_y, m2_y, comoment)
    for label, value in zip(_STATE, values, strict=True):
        if value is not None or label not in ("mean_y", "m2_y"):
            check_written("cross_moments_", label, value)
    for label, value in (("x", x), ("y", y), ("mask", mask)):
        if value is not None or label == "x":
            check_tensor("cross_moments_", label, value)
    state = [None if t is None else without_gradient("cross_moments_", t) for t in values]
    streams = [None if t is None else without_gradient("cross_moments_", t) for t in (x, y)]
    _OPERATION.default(*state, *streams, dim, mask, precision)
