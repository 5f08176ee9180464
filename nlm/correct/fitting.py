"""What all fits of corrections share: tasks, points, streams and the experts' moments."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import nn

from nlm._multitask import MultiTaskModel, network_of
from nlm.correct.correction import refuse_corrected
from nlm.correct.points import Found, Points, find_points
from nlm.correct.sequential import Fit, Rule, Stream
from nlm.statistics import Data, Forward, Mask, Moments, collect_moments, run
from nlm.statistics.data import first, micro_batches, sample_count

ExpertMoments = Mapping[str, Mapping[str, Moments]]
_WATCHED = 32  # samples: those of the pass that finds the points


@dataclass
class Setup:
    """A merged model, its experts, and their calibration samples in micro-batches.

    ``apart`` says that at a point dimension 0 does not count samples.
    """

    caller: str
    model: nn.Module
    experts: dict[str, nn.Module]
    batches: dict[str, list[Any]]
    found: Found
    apart: bool
    forward: Forward | None
    mask: Mask | None
    known: ExpertMoments
    group: Any = None

    @property
    def network(self) -> nn.Module:
        return network_of(self.model)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.experts)

    @property
    def points(self) -> dict[str, int]:
        return self.found.dims

    def stream(self, task: str, both: bool = False) -> Stream:
        """The merged model on the samples of one task, and its expert beside it."""

        def call(model: nn.Module, batch: Any) -> Any:
            return run_task(model, task, batch, self.forward)

        beside = self.experts[task], partial(_run_batch, forward=self.forward)
        return Stream(self.model, call, self.batches[task], self.mask, beside if both else None)

    def fit(self, rule: Rule) -> Fit:
        """What is fitted, over all processes of the group."""
        return Fit(self.caller, self.network, self.points, rule, self.group)

    def expert_moments(self, task: str) -> Mapping[str, Moments]:
        """The moments of an expert's activations on the samples of its task."""
        if task in self.known:
            if missing := [point for point in self.points if point not in self.known[task]]:
                raise ValueError(
                    f"{self.caller}: moments are given for every point, got none of {task!r} at "
                    f"{', '.join(missing)}"
                )
            return self.known[task]
        return collect_moments(
            self.experts[task], self.points, self.batches[task], forward=self.forward,
            mask=self.mask, process_group=self.group, caller=self.caller,
        )  # fmt: skip


def _run_batch(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    return run(model, batch, forward)


def run_task(model: nn.Module, task: str, batch: Any, forward: Forward | None) -> Any:
    """The merged model on a batch, with a task's weights where it has them."""
    if isinstance(model, MultiTaskModel):
        return run(model, batch, forward, task=task)
    return run(model, batch, forward)


def check_tasks(
    caller: str,
    model: nn.Module,
    experts: Mapping[str, nn.Module],
    data: Mapping[str, Data],
) -> None:
    """Raises where the tasks of a fit do not fit together, or the model is corrected already."""
    if not isinstance(data, Mapping):
        raise TypeError(f"{caller}: data is given by task, got {type(data).__name__}")
    check_modules(caller, model, experts)
    refuse_corrected(caller, model)
    if strangers := [task for task in experts if not isinstance(task, str)]:
        raise TypeError(
            f"{caller}: a task is named by a string, got {strangers[0]!r} "
            f"({type(strangers[0]).__name__})"
        )
    if not experts or set(experts) != set(data):
        raise ValueError(
            f"{caller}: there is data for every expert, got experts for "
            f"{', '.join(experts) or 'no task'} and data for {', '.join(data) or 'no task'}"
        )
    if isinstance(model, MultiTaskModel) and (lost := set(experts) - set(model.tasks)):
        raise ValueError(
            f"{caller}: the tasks are those of the merged model ({', '.join(model.tasks)}), got "
            f"{', '.join(sorted(lost))}"
        )


def check_modules(caller: str, model: Any, experts: Any) -> None:
    """Raises TypeError where a model is no module, or experts are no mapping to modules."""
    if not isinstance(experts, Mapping | nn.ModuleDict):
        raise TypeError(f"{caller}: experts are given by task, got {type(experts).__name__}")
    own = {f"expert of {task!r}": expert for task, expert in experts.items()}
    for what, module in {"merged model": model, **own}.items():
        if not isinstance(module, nn.Module):
            raise TypeError(f"{caller}: the {what} is a module, got {type(module).__name__}")


def check_number(caller: str, label: str, value: Any, positive: bool = False) -> None:
    """Raises TypeError where something is no number, ValueError where it is not finite or below 0.

    A ``positive`` one is not 0 either.
    """
    if not isinstance(value, Real):
        raise TypeError(f"{caller}: the {label} is a number, got {value!r}")
    if not 0 <= float(value) < float("inf") or (positive and value == 0):
        rule = "positive and finite" if positive else "finite and at least 0"
        raise ValueError(f"{caller}: the {label} is {rule}, got {value}")


def prepare(
    caller: str,
    model: nn.Module,
    experts: Mapping[str, nn.Module],
    data: Mapping[str, Data],
    points: Points,
    max_samples: int | None,
    micro_batch: int | None,
    forward: Forward | None,
    mask: Mask | None,
    device: torch.device | str | None,
    moments: ExpertMoments | None = None,
    process_group: Any = None,
) -> Setup:
    """Checks the tasks, cuts the data into micro-batches and finds the points."""
    check_tasks(caller, model, experts, data)
    batches = {
        task: micro_batches(data[task], micro_batch, max_samples, device, f"{caller} ({task})")
        for task in experts
    }
    task, network = next(iter(experts)), network_of(model)

    few = first(batches[task][0], _WATCHED, caller)
    found = find_points(network, lambda: run_task(model, task, few, forward), points, _heads(model))
    if not found.dims:
        raise ValueError(f"{caller}: there is at least one point to correct, got none")
    apart = _are_apart(found, sample_count(few, caller))
    if not apart and (count := sample_count(few, caller)) > 1:  # of another length it may show
        few = first(few, count - 1, caller)
        call = partial(run_task, model, task, few, forward)
        apart = _are_apart(find_points(network, call, points, _heads(model)), count - 1)
    if process_group is not None:
        apart = _any(apart, process_group)
    return Setup(
        caller, model, dict(experts), batches, found, apart, forward, mask, moments or {},
        process_group,
    )  # fmt: skip


def _are_apart(found: Found, samples: int) -> bool:
    """Whether at a point dimension 0 is not that of the samples."""
    return any(length != samples for length in found.lengths.values())


def _any(value: bool, group: Any) -> bool:
    """Whether something is so in any process of a group."""
    import torch.distributed as distributed

    values = [False] * distributed.get_world_size(group)
    distributed.all_gather_object(values, value, group=group)
    return any(values)


def _heads(model: nn.Module) -> set[str]:
    """The modules whose weights each task of a multi-task model has for itself."""
    own = getattr(model.states, "heads", {}) if isinstance(model, MultiTaskModel) else {}
    return {name.rpartition(".")[0] for entries in own.values() for name in entries}


def expert_moments(
    experts: Mapping[str, nn.Module],
    data: Mapping[str, Data],
    *,
    points: Points = None,
    max_samples: int | None = 128,
    forward: Forward | None = None,
    mask: Mask | None = None,
    device: torch.device | str | None = None,
    process_group: Any = None,
) -> dict[str, dict[str, Moments]]:
    """task -> point -> moments of its expert, to fit several corrections from.

    Arguments and errors as for :meth:`Tact.fit`, whose ``moments`` the result is.
    """
    first = next(iter(experts.values()), None)
    setup = prepare(
        "nlm.correct", first or nn.Identity(), experts, data, points, max_samples, None, forward,
        mask, device, None, process_group,
    )  # fmt: skip
    return {task: dict(setup.expert_moments(task)) for task in setup.tasks}
