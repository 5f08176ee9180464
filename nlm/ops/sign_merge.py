"""TIES' merge of experts against their base, without their task vectors (arXiv:2306.01708).

For an entry, with the differences d_k = expert_k - base, thresholds t_k and weights w_k,

    trim     d_k := 0 where |d_k| < t_k
    elect    s    = sign(sum_k v_k),   v_k = w_k d_k   (in peft v_k = d_k)
    merge    m    = sum_{k: sign(v_k) = s} w_k d_k / share
    merged        = base + scale m

where the share is the number of k with sign(v_k) = s, in mergekit the sum of their weights, and 1
where that is 0, and in mergekit_sum always. A vote of 0 elects +; in global the sign that most
votes of all entries have. The four dialects are those of `nlm.merge`.

Bytes: one read of the base and of each expert, one write. Flops: about 12 per entry and expert.
Numerics: float32 (float64 where any tensor is), every operation rounded by itself and summed in
the experts' order, so that kernel and reference agree in every bit, for any number of threads; the
result is rounded to the base's type once. A kept NaN, or infinities of both signs, give NaN.

The operator merges one tensor, with + for votes of 0. It also returns the ballot of the global
dialect (the sum of the signs of all votes, and the number of votes of 0 with entries kept) and a
byte for each 64 entries: whether there are such votes among them. Only where the sum of a whole
list is negative does `sign_merge` merge these groups again, with -.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nlm import _native
from nlm._core import DIALECTS
from nlm._registry import register
from nlm.ops._arguments import (
    as_numbers,
    check_apart,
    check_tensor,
    compute_dtype,
    without_gradient,
)
from nlm.ops._channels import FLOATS

_MOST_EXPERTS = 128  # kSignMergeExperts
_GROUP = 64  # kSignMergeGroup


def _groups(base: Tensor) -> int:
    return -(-base.numel() // _GROUP)


def _thresholds(thresholds: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``dtype``, rounded up, so that no magnitude of that type changes sides."""
    if thresholds.dtype == dtype or dtype == torch.float64:
        return thresholds.to(dtype).contiguous()
    near = thresholds.to(dtype)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near < thresholds, above, near)


def reference(
    base: Tensor,
    experts: list[Tensor],
    thresholds: Tensor,
    weights: list[float],
    scale: float,
    dialect: str,
    tie: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype([base, *experts])
    start = base.to(dtype)
    numbers = torch.tensor([scale, *weights], dtype=dtype, device=base.device)
    vote = torch.zeros_like(start)
    voices, values = [], []
    for expert, threshold, weight in zip(
        experts, _thresholds(thresholds, dtype), numbers[1:], strict=True
    ):
        difference = expert.to(dtype) - start
        kept = torch.where(difference.abs() < threshold, 0.0, difference)
        values.append(kept * weight)
        voices.append(kept if dialect == "peft" else values[-1])
        vote = vote + voices[-1]
    elects_plus = vote >= 0 if dialect != "global" or tie > 0 else vote > 0
    total, share = torch.zeros_like(start), torch.zeros_like(start)
    for voice, value, weight in zip(voices, values, numbers[1:], strict=True):
        agrees = torch.where(elects_plus, voice > 0, voice < 0)
        total = total + torch.where(agrees, value, 0.0)
        part = {"mergekit": weight, "mergekit_sum": 0.0}.get(dialect, 1.0)
        share = share + torch.where(agrees, part, 0.0)
    mean = total / torch.where(share == 0, 1.0, share)
    merged = torch.where(vote.isnan(), vote, start + numbers[0] * mean)
    contested = (vote == 0) & torch.stack(voices).ne(0).any(0)
    ballot = torch.stack([(vote > 0).sum() - (vote < 0).sum(), contested.sum()])
    groups = contested.new_zeros(_groups(base) * _GROUP)
    groups[: base.numel()] = contested.flatten()
    flags = groups.view(-1, _GROUP).any(1).to(torch.uint8)
    if dialect != "global":
        ballot, flags = torch.zeros_like(ballot), torch.zeros_like(flags)
    return merged.to(base.dtype).contiguous(), ballot, flags


def reference_tied(
    merged: Tensor,
    base: Tensor,
    experts: list[Tensor],
    thresholds: Tensor,
    weights: list[float],
    scale: float,
    contested: Tensor,
) -> None:
    _check_memory(merged, base, experts, thresholds, contested)
    again, _, _ = reference(base, experts, thresholds, weights, scale, "global", -1)
    chosen = contested.bool().repeat_interleave(_GROUP)[: base.numel()].view(base.shape)
    merged.copy_(torch.where(chosen, again, merged))


def _out(
    base: Tensor,
    experts: list[Tensor],
    thresholds: Tensor,
    weights: list[float],
    scale: float,
    dialect: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if dialect not in DIALECTS:
        raise ValueError(
            f"nlm.sign_merge: dialect must be one of {', '.join(DIALECTS)}, got {dialect!r}"
        )
    if not 1 <= len(experts) <= _MOST_EXPERTS:
        raise ValueError(
            f"nlm.sign_merge: there must be 1 to {_MOST_EXPERTS} experts, got {len(experts)}"
        )
    for x in (base, *experts):
        if x.dtype not in FLOATS:
            raise TypeError(
                "nlm.sign_merge: base and experts must be float16, bfloat16, float32 or float64, "
                f"got {x.dtype}"
            )
        if x.shape != base.shape or x.device != base.device:
            raise ValueError(
                "nlm.sign_merge: an expert must have the shape and device of its base, "
                f"{tuple(base.shape)} on {base.device}, got {tuple(x.shape)} on {x.device}"
            )
    if tuple(thresholds.shape) != (len(experts),) or len(weights) != len(experts):
        raise ValueError(
            f"nlm.sign_merge: there must be one threshold and one weight for each of the "
            f"{len(experts)} experts, got thresholds {tuple(thresholds.shape)} and {len(weights)} "
            "weights"
        )
    if thresholds.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"nlm.sign_merge: thresholds must be float32 or float64, got {thresholds.dtype}"
        )
    if thresholds.device != base.device:
        raise ValueError(
            f"nlm.sign_merge: thresholds must be on the device of the base, {base.device}, "
            f"got {thresholds.device}"
        )
    ballot, flags = (2, torch.int64), (_groups(base), torch.uint8)
    return (
        base.new_empty(base.shape),
        base.new_empty(ballot[0], dtype=ballot[1]),
        base.new_empty(flags[0], dtype=flags[1]),
    )


def _out_tied(
    merged: Tensor,
    base: Tensor,
    experts: list[Tensor],
    thresholds: Tensor,
    weights: list[float],
    scale: float,
    contested: Tensor,
) -> None:
    _out(base, experts, thresholds, weights, scale, "global")
    like = (base.shape, base.dtype, base.device)
    if (merged.shape, merged.dtype, merged.device) != like or not merged.is_contiguous():
        raise ValueError(
            "nlm.sign_merge_tied_: merged must be contiguous, with the shape, type and device of "
            f"the base, got {tuple(merged.shape)} {merged.dtype} on {merged.device}"
        )
    if contested.dtype != torch.uint8 or tuple(contested.shape) != (_groups(base),):
        raise ValueError(
            f"nlm.sign_merge_tied_: contested must be uint8 of shape {(_groups(base),)}, "
            f"got {contested.dtype} of {tuple(contested.shape)}"
        )


def _check_memory(
    merged: Tensor, base: Tensor, experts: list[Tensor], thresholds: Tensor, contested: Tensor
) -> None:
    read = [("base", base), ("thresholds", thresholds), ("contested", contested)]
    read += [(f"experts[{k}]", x) for k, x in enumerate(experts)]
    check_apart("sign_merge_tied_", [("merged", merged)], read)


def _alike(base: Tensor, experts: list[Tensor]) -> list[Tensor]:
    """The base and the experts in one type: theirs, or else the one that is computed in."""
    if all(x.dtype == base.dtype for x in experts):
        return [base, *experts]
    dtype = compute_dtype([base, *experts])
    return [x.to(dtype) for x in (base, *experts)]


def _launch(
    kernel: Callable[..., None], runs_on: int, models: list[Tensor], thresholds: Tensor,
    weights: list[float], numbers: tuple[float, int], merged: Tensor, contested: Tensor,
    ballot: Tensor | None,
) -> None:  # fmt: skip
    """Runs a kernel for the base and the experts on so many threads, or on this stream. Without a
    ballot it merges the contested groups again."""
    limits = _thresholds(thresholds, compute_dtype(models))
    base, *experts = (x.contiguous() for x in models)
    target = merged if base.dtype == merged.dtype else merged.to(base.dtype)
    item = (
        base.data_ptr(), target.data_ptr(), _native.DTYPES[base.dtype], base.numel(),
        limits.data_ptr(), *numbers, contested.data_ptr(), ballot is None,
    )  # fmt: skip
    each = [
        (x.data_ptr(), _native.DTYPES[x.dtype], w) for x, w in zip(experts, weights, strict=True)
    ]
    kernel(item, each, 0 if ballot is None else ballot.data_ptr(), runs_on)
    if target is not merged:
        merged.copy_(target)


def _cpu(
    base: Tensor, experts: list[Tensor], thresholds: Tensor, weights: list[float], scale: float,
    dialect: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    merged, ballot, contested = _out(base, experts, thresholds, weights, scale, dialect)
    _native.fresh(merged)
    if dialect != "global":
        contested.zero_()
    kernel, numbers = _native.cpu.sign_merge, (scale, DIALECTS.index(dialect))
    _launch(
        kernel, _native.threads(), [base, *experts], thresholds, weights, numbers,
        merged, contested, ballot,
    )  # fmt: skip
    return merged, ballot, contested


def _cuda(
    base: Tensor, experts: list[Tensor], thresholds: Tensor, weights: list[float], scale: float,
    dialect: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    merged, ballot, contested = _out(base, experts, thresholds, weights, scale, dialect)
    kernel, numbers = _native.cuda.sign_merge, (scale, DIALECTS.index(dialect))
    _launch(
        kernel, _native.stream(base), _alike(base, experts), thresholds, weights, numbers,
        merged, contested.zero_(), ballot.zero_(),
    )  # fmt: skip
    return merged, ballot, contested


def _merge_again(
    kernel: Callable[..., None], runs_on: int, models: list[Tensor], merged: Tensor, base: Tensor,
    experts: list[Tensor], thresholds: Tensor, weights: list[float], scale: float,
    contested: Tensor,
) -> None:  # fmt: skip
    _out_tied(merged, base, experts, thresholds, weights, scale, contested)
    _check_memory(merged, base, experts, thresholds, contested)
    flags = contested.contiguous()
    _launch(kernel, runs_on, models, thresholds, weights, (scale, 0), merged, flags, None)


def _cpu_tied(merged: Tensor, base: Tensor, experts: list[Tensor], *rest: Any) -> None:
    kernel, models = _native.cpu.sign_merge, [base, *experts]
    _merge_again(kernel, _native.threads(), models, merged, base, experts, *rest)


def _cuda_tied(merged: Tensor, base: Tensor, experts: list[Tensor], *rest: Any) -> None:
    kernel, models = _native.cuda.sign_merge, _alike(base, experts)
    _merge_again(kernel, _native.stream(base), models, merged, base, experts, *rest)


_MISSING = {"cpu": _native.cpu_missing, "cuda": _native.cuda_missing}
_MERGE = register(
    "sign_merge(Tensor base, Tensor[] experts, Tensor thresholds, float[] weights, float scale,"
    " str dialect) -> (Tensor, Tensor, Tensor)",
    stem="sign_merge",
    reference=reference,
    out=_out,
    cpu=_cpu,
    cuda=_cuda,
    missing=_MISSING,
)

_TIED = register(
    "sign_merge_tied_(Tensor(a!) merged, Tensor base, Tensor[] experts, Tensor thresholds,"
    " float[] weights, float scale, Tensor contested) -> ()",
    stem="sign_merge",
    reference=reference_tied,
    out=_out_tied,
    cpu=_cpu_tied,
    cuda=_cuda_tied,
    missing=_MISSING,
)


def sign_merge(
    base: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    thresholds: Tensor,
    weights: Sequence[float] | float = 1.0,
    scale: float = 1.0,
    dialect: str = "global",
) -> list[Tensor]:
    """The base plus the scaled TIES mean of the experts, for a list of tensors: one vector.

    Not differentiable. With dialect "global" the host waits for the GPU once.

    Parameters
    ----------
    base : sequence of Tensor
        float16, bfloat16, float32 or float64, on one device. What is not contiguous is copied.
    experts : sequence of sequences of Tensor
        For each of up to 128 experts a tensor for each of the base's, of its shape.
    thresholds : Tensor, shape [experts]
        float32 or float64: an expert's differences below its threshold are trimmed; 0 keeps all,
        infinity keeps none. See `magnitude_threshold`.
    weights : float or sequence of float
        One for all experts, or one each.
    scale : float
    dialect : str
        "global", "mergekit", "peft" or "mergekit_sum".

    Returns
    -------
    list of Tensor
        Contiguous, of the base's shapes and types.

    Examples
    --------
    >>> import torch
    >>> base = [torch.zeros(4)]
    >>> experts = [[torch.tensor([4.0, -3.0, 0.5, 1.0])], [torch.tensor([2.0, 1.0, -4.0, 0.1])]]
    >>> sign_merge(base, experts, torch.tensor([1.0, 1.0]))[0].tolist()
    [3.0, -3.0, -4.0, 1.0]
    """
    check_tensor("sign_merge", "thresholds", thresholds)
    if any(len(expert) != len(base) for expert in experts):
        raise ValueError(
            "nlm.sign_merge: an expert must have as many tensors as the base, "
            f"got {[len(expert) for expert in experts]} for {len(base)}"
        )
    for t, x in enumerate(base):
        check_tensor("sign_merge", f"base {t}", x)
        for k, expert in enumerate(experts):
            check_tensor("sign_merge", f"tensor {t} of expert {k}", expert[t])
    factors = as_numbers("sign_merge", "weights", weights, len(experts))
    starts = [without_gradient("sign_merge", x) for x in base]
    models = [[without_gradient("sign_merge", x[t]) for x in experts] for t in range(len(base))]
    limits = without_gradient("sign_merge", thresholds)

    results = [
        _MERGE.default(start, own, limits, factors, float(scale), dialect)
        for start, own in zip(starts, models, strict=True)
    ]
    if dialect == "global" and results and not limits.is_meta:
        ballots = torch.stack([ballot for _, ballot, _ in results]).tolist()
        if sum(signs for signs, _ in ballots) < 0:
            for t, ((merged, _, contested), (_, count)) in enumerate(
                zip(results, ballots, strict=True)
            ):
                if count:
                    _TIED.default(
                        merged, starts[t], models[t], limits, factors, float(scale), contested
                    )
    return [merged for merged, _, _ in results]
