"""BatchNorm reset: running statistics estimated anew, in forward order, on pooled moments."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nlm._modules import evaluation
from nlm._multitask import MultiTaskModel, network_of
from nlm.correct.fitting import run_task
from nlm.statistics import Data, Forward, Moments
from nlm.statistics.data import micro_batches
from nlm.statistics.observe import check_activation

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Reached(Exception):
    """Ends a forward pass at the norm that was waited for."""


def reset_batch_norm(
    model: nn.Module,
    data: Data | Mapping[str, Data],
    *,
    max_samples: int | None = None,
    micro_batch: int | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
) -> int:
    """Re-estimates the running mean and variance of every batch norm of a model, in place.

    Each norm sees inputs that come from norms already reset. Moments are pooled over all batches:
    an average of batch variances, which momentum-based resets give, loses the variance between
    batches.

    Parameters
    ----------
    model : any module, or a :class:`MultiTaskModel`, whose shared statistics are reset.
    data : a re-iterable of batches, or task -> such for a multi-task model, which are pooled.
    max_samples : per task.

    Returns
    -------
    int
        The number of norms that were reset.

    Raises
    ------
    ValueError
        No data, one value per channel, NaN or inf in an activation.
    """
    network = network_of(model)
    if isinstance(model, MultiTaskModel) != isinstance(data, Mapping):
        raise ValueError(
            f"nlm.reset_batch_norm: a multi-task model takes data per task and any other model "
            f"takes data, got {type(model).__name__} and {type(data).__name__}"
        )
    per_task: Mapping[str, Data] = data if isinstance(data, Mapping) else {"": data}
    calls: list[Callable[[], Any]] = [
        lambda task=task, batch=batch: run_task(model, task, batch, forward)  # type: ignore[misc]
        for task, samples in per_task.items()
        for batch in micro_batches(
            samples, micro_batch, max_samples, device, "nlm.reset_batch_norm"
        )
    ]
    done: set[str] = set()
    with evaluation(network):
        while (name := _reset_next(network, calls, done)) is not None:
            done.add(name)
    return len(done)


def _reset_next(network: nn.Module, calls: list[Callable[[], Any]], done: set[str]) -> str | None:
    """Resets the first norm that runs and is not yet reset; its name, or None when all are."""
    found: dict[str, Moments] = {}
    statistics: list[tuple[Tensor | None, Tensor | None]] = []

    def hook(name: str) -> Callable[..., None]:
        def measure(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            check_activation("nlm.reset_batch_norm", name, args[0])
            moments = Moments.of(args[0], 1)
            found[name] = found[name] + moments if name in found else moments
            running = module._buffers
            statistics[:] = [(running["running_mean"], running["running_var"])]
            raise _Reached

        return measure

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in network.named_modules()
        if isinstance(module, _NORMS) and module.running_mean is not None and name not in done
    ]
    try:
        for call in calls:
            try:
                call()
            except _Reached:
                pass
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return None
    [(name, moments)] = found.items()
    if int(moments.count) < 2:
        raise ValueError(
            f"nlm.reset_batch_norm: a variance needs at least two values per channel, got "
            f"{int(moments.count)} at {name!r}"
        )
    for mean, variance in statistics:
        assert mean is not None and variance is not None  # hooked only where they are kept
        mean.copy_(moments.mean)
        variance.copy_(moments.m2 / (moments.count - 1))
    return name
