"""A part of low rank that each task adds to the layers that all tasks share.

Refit leaves one network, whose layers are a compromise between the tasks. Here each task walks the
network once more, on its own samples, and each layer gets the update of rank r that brings it
nearest to what the task's expert has there, from the network's *own* inputs with all earlier layers
updated:

    min_D,b  sum_i |(W + D) x_i + b - y_i|^2 + lambda |D|^2,      rank D <= r ,

reduced-rank regression in the metric of the task's normal equations A = S_xx + lambda I = L L^T.
With C = S_xy - S_xx W^T the sum is |L^T D^T - L^-1 C|^2 and a constant, so that
D^T = L^-T [L^-1 C]_r, [.]_r the r largest terms of the singular value decomposition. With full rank
it is what :func:`nlm.refit` gives for the task alone. A bias belongs to it, a shift as TACT's is.

The ranks are as large as a share of the layers' own size allows; what one layer cannot use (of few
channels, as first convolutions are) the later ones may. Batch norms keep the statistics that all
tasks share.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nlm._multitask import MultiTaskModel, TaskStates
from nlm.correct.correction import exclusive
from nlm.correct.fitting import check_number, check_tasks
from nlm.correct.normal_equations import NormalEquations
from nlm.correct.refit import Route, walked
from nlm.correct.solving import Walk
from nlm.correct.tasks import Task, task_by_task, task_ids
from nlm.correct.updates import Same, Update, Updated, check_update, updated
from nlm.correct.walk import Step
from nlm.statistics import Data, Forward, Mask
from nlm.statistics.data import micro_batches

CALLER = "nlm.LowRank"
_Self = TypeVar("_Self", bound="LowRank")


class LowRankWalk(Walk):
    """A walk that updates one task's copy of the network, and keeps the update."""

    caller = CALLER

    def __init__(
        self, model: nn.Module, ridge: float | None, mask: Mask | None, share: float
    ) -> None:
        super().__init__(model, ridge, mask)
        self.update = Update()
        self._share = share
        self._unused = 0.0  # numbers that earlier layers left

    def take(self, step: Step) -> None:
        if not step.layers:
            return
        equations = self.equations(step)
        biased = step.norm is not None or self.is_biased(step)
        alive = self._affine(step.norm)[2] if step.norm is not None else None
        whitened = list(self._whitened(step, equations, biased, alive))
        first, taken = 0, []
        for name in step.layers:
            rows = len(self.matrix(name)) // len(equations)
            rank = self._afford(self.matrix(name), len(equations), biased)
            if rank is not None:
                outputs = slice(first, first + rows)
                self._add(name, [_truncated(f, w[:, outputs], rank) for f, w in whitened])
                taken.append(name)
            first += rows
        if biased:
            self._shift(step, taken, equations, alive)

    def _whitened(
        self, step: Step, equations: Sequence[NormalEquations], biased: bool, alive: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """L and L^-1 C of each group of channels; nothing is wanted of a norm's dead channels."""
        count = len(equations)
        weight = torch.cat([self.matrix(name) for name in step.layers])
        live = weight.new_ones(len(weight)) if alive is None else alive
        for part, own, wanted in zip(
            weight.chunk(count), equations, live.chunk(count), strict=True
        ):
            factor, off = own.residual(part, self.ridge, biased, step.layers[0], CALLER)
            yield factor, torch.linalg.solve_triangular(factor, off * wanted, upper=False)

    def _afford(self, weight: Tensor, groups: int, biased: bool) -> int | None:
        """The rank that the share of a layer pays for, after its bias; None if not even that."""
        self._unused += self._share * weight.numel()
        outputs, inputs = weight.shape
        bias = outputs if biased else 0
        if self._unused < bias:
            return None
        cost = outputs + groups * inputs
        rank = min(int((self._unused - bias) / cost), outputs // groups, inputs)
        self._unused -= bias + rank * cost
        return rank

    def _add(self, name: str, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Adds the product of factors, one of each group of channels, to a layer's weight."""
        left, right = (torch.stack(sides) for sides in zip(*parts, strict=True))
        if self._has_columns(name):
            left, right = right.mT, left.mT
        entry = f"{name}.weight"
        weight = self.weights[entry]
        if left.shape[-1]:
            factors = left.to(weight.dtype).contiguous(), right.to(weight.dtype).contiguous()
            self.update.factors[entry] = factors
            weight.copy_(updated(weight, *factors))

    def _shift(
        self,
        step: Step,
        taken: Sequence[str],
        equations: Sequence[NormalEquations],
        alive: Tensor | None,
    ) -> None:
        """Sets the biases of layers, or the running mean of a norm that stands for one."""
        weight = torch.cat([self.matrix(name) for name in step.layers]).double()
        parts = zip(weight.chunk(len(equations)), equations, strict=True)
        bias = torch.cat([own.bias(part, True) for part, own in parts])
        if alive is not None:
            bias = torch.where(alive, bias, self.biases(step))
        sizes = [len(self.matrix(name)) for name in step.layers]
        for name, own in zip(step.layers, bias.split(sizes), strict=True):
            entry = f"{name}.bias" if self.is_biased(step) else f"{step.norm}.running_mean"
            if name in taken:
                if not self.is_biased(step):
                    own = self.weights[entry] - own
                self.weights[entry].copy_(own)
                self.update.values[entry] = self.weights[entry].clone()


def _truncated(factor: Tensor, whitened: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The update [outputs, rank], [rank, inputs] that is nearest in a system's metric."""
    u, s, vh = torch.linalg.svd(whitened, full_matrices=False)
    root = s[:rank].sqrt()
    right = torch.linalg.solve_triangular(factor.T, u[:, :rank] * root, upper=True)
    return vh[:rank].T * root, right.T


class LowRank(MultiTaskModel):
    """A merged model with a part of low rank for each task: ``model(x, task="digits")``.

    Made by :meth:`fit` or :meth:`load`, of a refitted ``network`` as a rule, and the tasks'
    ``states`` of it. It is a
    :class:`MultiTaskModel`, which :meth:`Tact.fit` corrects further; ``model.for_task(task)`` is
    the plain network with the update in its weights, at no cost at run time.
    """

    states: Updated

    def forward(self, *args: Any, task: Task, **kwargs: Any) -> Any:
        """The network's output for ``args`` and ``kwargs`` with the weights of one task, or of
        each sample's.

        Parameters
        ----------
        task : a task's name or id, or names or ids with one per sample: one pass for each task.

        Raises
        ------
        TypeError, ValueError
            As :meth:`Correction.forward` does.
        """

        def run(place: int, args: Any, kwargs: dict[str, Any]) -> Any:
            return super(LowRank, self).forward(*args, task=self.tasks[place], **kwargs)

        ids = task_ids(task, self.tasks)
        if isinstance(ids, Tensor):
            return task_by_task(run, ids, args, kwargs)
        return run(ids, args, kwargs)

    @property
    def updates(self) -> dict[str, Update]:
        """task -> what it adds."""
        return self.states.updates

    @property
    def parameter_bytes(self) -> int:
        """The size of all tasks' updates, which is that of their file but for its header."""
        return sum(
            tensor.nbytes
            for update in self.updates.values()
            for tensor in update.tensors().values()
        )

    @property
    def ranks(self) -> dict[str, dict[str, int]]:
        """task -> weight -> the rank of its update; 0 stands for a bias alone and is left out."""
        return {
            task: {name: left.shape[-1] for name, (left, _) in update.factors.items()}
            for task, update in self.updates.items()
        }

    @classmethod
    def fit(
        cls: type[_Self],
        model: nn.Module,
        experts: Mapping[str, nn.Module],
        data: Mapping[str, Data],
        *,
        share: float = 0.05,
        ridge: float | None = None,
        points: str | Sequence[str] | None = None,
        max_samples: int | None = 512,
        micro_batch: int | None = None,
        recompute: bool = False,
        forward: Forward | None = None,
        mask: Mask | None = None,
        device: torch.device | str | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> _Self:
        """Fits each task's part on its unlabelled samples.

        Parameters
        ----------
        model : the merged model, refitted as a rule, which stays as it is.
        experts, data : task -> its aligned expert, and a re-iterable of batches of its inputs.
        share : the size of each task's part beside that of the layers that it is added to.
        ridge : the pull towards the shared weights; otherwise as for :func:`nlm.refit`.
        points : patterns of the names of the layers. By default all that :func:`nlm.refit` finds in
            a task's plain network: of a head of several layers all but the last.
        max_samples, micro_batch, recompute, forward, mask, device : as for :func:`nlm.refit`.
        progress : called with ("task: layers", steps done, steps of the task).

        Raises
        ------
        TypeError, ValueError
            A share that is no positive, finite number, and what :func:`nlm.refit` raises.

        References
        ----------
        Izenman: Reduced-rank regression for the multivariate linear model, Journal of Multivariate
        Analysis 5 (1975).
        """
        check_number(CALLER, "share", share, positive=True)
        if ridge is not None:
            check_number(CALLER, "ridge", ridge)
        check_tasks(CALLER, model, experts, data)
        with exclusive(model):
            below = _states_of(model, tuple(experts))
        updates: dict[str, Update] = {}
        for task, expert in experts.items():
            plain = _plain(model, task)
            samples = micro_batches(data[task], micro_batch, max_samples, device, CALLER)
            walks: list[LowRankWalk] = []

            def build(fitted: nn.Module, *_: Any, walks: list[LowRankWalk] = walks) -> Walk:
                walks.append(LowRankWalk(fitted, ridge, mask, share))
                return walks[0]

            told = None if progress is None else partial(_told, progress, task)
            route = Route(CALLER, points, False, recompute, forward, told)
            walked(plain, [expert], [("", batch, [expert]) for batch in samples], build, route)
            updates[task] = walks[0].update
        return cls(_plain(model, next(iter(experts))), Updated(below, updates))

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Writes the tasks' parts (not the model) to ``path``, safetensors with their size on top.

        Raises
        ------
        FileExistsError
            The file exists and ``force`` is false.
        """
        from nlm.checkpoint import write_tensors

        tensors = {
            f"{number}.{name}": tensor
            for number, update in enumerate(self.updates.values())
            for name, tensor in update.tensors().items()
        }
        facts = {"tasks": list(self.updates), "parameter_bytes": self.parameter_bytes}
        metadata = {name: json.dumps(value) for name, value in facts.items()}
        write_tensors(path, tensors, {"nlm": "LowRank", **metadata}, force)

    @classmethod
    def load(cls: type[_Self], path: str | os.PathLike[str], model: nn.Module) -> _Self:
        """The parts that :meth:`save` wrote to ``path``, on the model that they were fitted to.

        Raises
        ------
        ValueError
            The file holds something else, is damaged, or does not fit the model.
        """
        from nlm.checkpoint import read_kind
        from nlm.checkpoint.texts import parse_json, whole

        tensors, metadata = read_kind(path, "LowRank", "nlm.correct")
        with whole(path, "LowRank", "nlm.correct"):
            tasks = parse_json(metadata.get("tasks", "null"))
            if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
                raise ValueError("tasks that are no list of names")
            own: dict[str, dict[str, Tensor]] = {task: {} for task in tasks}
            if not tasks or len(own) < len(tasks):
                raise ValueError(f"tasks whose names are none or alike, {tasks}")
            numbers = {str(number): task for number, task in enumerate(tasks)}
            for full, tensor in tensors.items():
                number, _, name = full.partition(".")
                own[numbers[number]][name] = tensor
            updates = {task: Update.of(each) for task, each in own.items()}
        if isinstance(model, MultiTaskModel) and (lost := set(tasks) - set(model.tasks)):
            raise ValueError(
                f"{CALLER}: the tasks are those of the model, got {', '.join(sorted(lost))} in "
                f"{os.fspath(path)!r}"
            )
        below = _states_of(model, tuple(tasks))
        for task, update in updates.items():
            check_update(CALLER, update, below.for_task(task), path)
        home = next(iter(below.for_task(tasks[0]).values())).device
        moved = {
            task: Update.of({name: tensor.to(home) for name, tensor in update.tensors().items()})
            for task, update in updates.items()
        }
        return cls(_plain(model, tasks[0]), Updated(below, moved))


def _told(progress: Callable[[str, int, int], None], task: str, *rest: Any) -> None:
    what, done, total = rest
    progress(f"{task}: {what}", done, total)


def _states_of(model: nn.Module, tasks: tuple[str, ...]) -> TaskStates:
    """What holds a model's weights for each task."""
    if isinstance(model, MultiTaskModel):
        return model.states
    return Same(tasks, {name: tensor.detach() for name, tensor in model.state_dict().items()})


def _plain(model: nn.Module, task: str) -> nn.Module:
    """The network with a task's weights: a model of one for all tasks itself."""
    return model.for_task(task) if isinstance(model, MultiTaskModel) else model
