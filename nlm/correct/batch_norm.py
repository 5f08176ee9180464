"""BatchNorm reset: running statistics estimated anew, in forward order, on pooled moments."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nlm._modules import NORMS, evaluation
from nlm._multitask import MultiTaskModel, network_of
from nlm.correct.correction import exclusive
from nlm.correct.fitting import run_task
from nlm.correct.sequential import Reached, advance, check_count
from nlm.statistics import Data, Forward, Moments
from nlm.statistics.data import micro_batches


@dataclass
class Statistics:
    """Running statistics of a norm, and the moments that they will be."""

    name: str
    mean: Tensor
    variance: Tensor
    moments: Moments

    @classmethod
    def of(cls, name: str, norm: nn.Module, inputs: Tensor) -> "Statistics":
        """Those of a batch norm that reads ``inputs``."""
        moments = Moments.of(inputs, 1)
        mean, variance = norm._buffers["running_mean"], norm._buffers["running_var"]
        assert mean is not None and variance is not None  # asked only where they are kept
        return cls(name, mean, variance, moments)


def reset_batch_norm(
    model: nn.Module,
    data: Data | Mapping[str, Data],
    *,
    max_samples: int | None = None,
    micro_batch: int | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> int:
    """Re-estimates the running mean and variance of every batch norm of a model, in place.

    Each norm sees inputs that come from norms already reset. Moments are pooled over all batches:
    an average of batch variances, which momentum-based resets give, loses the variance between
    batches (Jordan et al., REPAIR, arXiv:2211.08403, reset norms so).

    Parameters
    ----------
    model : any module, or a :class:`MultiTaskModel`: statistics that its tasks share are those of
        all tasks' data together, those that each task has for itself those of its own.
    data : a re-iterable of batches, or task -> such for a multi-task model.
    max_samples : per task.
    micro_batch, forward, device : as for :meth:`Tact.fit`.
    progress : called with (norm, norms done, norms); what it raises cancels.

    Returns
    -------
    int
        The number of norms that were reset.

    Raises
    ------
    TypeError
        Data that cannot be iterated again and again, or batches of no known form.
    ValueError
        No data, one value per channel, NaN or inf in an activation, norms that do not run in one
        order for all data.
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
    total = sum(map(is_kept, network.modules()))
    with exclusive(model), evaluation(network):
        while (name := reset_next(network, calls, done)) is not None:
            done.add(name)
            if progress is not None:
                progress(name, len(done), total)
    return len(done)


def reset_next(
    network: nn.Module, calls: Sequence[Callable[[], Any]], done: set[str]
) -> str | None:
    """Resets the first norm that runs and is not yet reset; its name, or None when all are."""
    found: list[Statistics] = []

    def hook(name: str) -> Callable[..., None]:
        def measure(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(Statistics.of(name, module, args[0]))
            raise Reached

        return measure

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in network.named_modules()
        if is_kept(module) and name not in done
    ]
    try:
        for call in calls:
            advance(call)
    finally:
        for handle in handles:
            handle.remove()
    names = sorted({own.name for own in found})
    if len(names) > 1:
        raise ValueError(
            f"nlm.reset_batch_norm: all data run through the norms in one order, got "
            f"{' and '.join(names)} at one place"
        )
    write_statistics(found, "nlm.reset_batch_norm")
    return names[0] if names else None


def write_statistics(found: Iterable[Statistics], caller: str, process_group: Any = None) -> None:
    """Writes the running statistics of a norm from the moments of all batches together.

    A task with statistics of its own has them in memory of its own. Over the processes of a group
    the moments of all of them count.

    Raises
    ------
    ValueError
        NaN or inf in the inputs of the norm, or one value per channel.
    """
    pooled: dict[int, Statistics] = {}
    for own in found:
        known = pooled.setdefault(own.mean.data_ptr(), own)
        if known is not own:
            known.moments = known.moments + own.moments
    for own in pooled.values():
        if process_group is not None:
            own.moments = own.moments.all_reduce(process_group)
        if not own.moments.m2.isfinite().all():
            raise ValueError(
                f"{caller}: activations are finite, got NaN or inf before {own.name!r}"
            )
        check_count(caller, own.name, own.moments)
        own.mean.copy_(own.moments.mean)
        own.variance.copy_(own.moments.m2 / (own.moments.count - 1))


def is_kept(module: nn.Module) -> bool:
    """Whether a module is a batch norm with running statistics."""
    return isinstance(module, NORMS) and module.running_mean is not None
