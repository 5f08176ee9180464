"""A model with scales and shifts on the outputs of some of its modules, one row per task."""

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from nlm._functions import is_place
from nlm._modules import OutputHook, channel_count, lock_of, output_hooks, stop_nesting
from nlm._multitask import MultiTaskModel, Wrapper, network_of
from nlm.checkpoint import read_kind
from nlm.checkpoint.texts import build, parse_json
from nlm.correct.folding import Readers, fold_points, unfoldable
from nlm.correct.inline import ONE_GRAPH, Inlined
from nlm.correct.sequential import Fitted, corrector
from nlm.correct.tasks import Task, task_by_task, task_ids

_Self = TypeVar("_Self", bound="Correction")


class Correction(Wrapper):
    """``y * scale[row] + shift[row]`` on the output of each point's module.

    Made by :meth:`Tact.fit`, :meth:`Repair.fit` or :meth:`load`. The model itself is neither
    changed nor copied: it is hooked while it runs, and runs in one thread at a time.

    Attributes
    ----------
    model : the merged model, plain or a :class:`MultiTaskModel`.
    points : module or function call (:mod:`nlm.correct.points`) -> channel dimension of its output.
    rows, fitted : task -> row of the corrections; of each row, point -> scale and shift ``[C]``.
    readers : point -> the layers that read it and the other functions that do, where it is known.
    apart : whether at a point dimension 0 does not count samples, as in [length, n, channels] or
        where samples are cut up. A batch of several tasks is then run once per task.
    """

    _kind: ClassVar[str] = "Correction"  # what its files are called, those of subclasses too
    _run_uncompiled: ClassVar[Any] = None

    def __init__(
        self,
        model: nn.Module,
        points: Mapping[str, int],
        rows: Mapping[str, int],
        fitted: Sequence[Fitted],
        readers: Readers | None = None,
        apart: bool = False,
    ) -> None:
        refuse_corrected("nlm.correct", model)
        super().__init__()
        self.model = model
        self.points = dict(points)
        self.rows = dict(rows)
        self.readers = {point: list(of) for point, of in (readers or {}).items()}
        self.apart = apart
        self._unseen: set[str] = set()  # points of which nothing tells yet that the model has them
        self._calls = any(is_place(point) for point in self.points)
        self._keep_from_compilers()
        for number, point in enumerate(self.points):
            check_channels("nlm.correct", point, [len(row[point][0]) for row in fitted])
            for part, name in enumerate(("scale", "shift")):
                table = torch.stack([row[point][part] for row in fitted])  # [rows, channels]
                self.register_buffer(f"{name}_{number}", table)

    def inner(self) -> nn.Module:
        return self.model

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names; their places are the ids that a call takes."""
        return tuple(self.rows)

    @property
    def parameter_bytes(self) -> int:
        """The size of all corrections, which is that of their file but for its header."""
        return sum(table.nbytes for table in self.buffers(recurse=False))

    def correction(self, point: str) -> tuple[Tensor, Tensor]:
        """Scale and shift of one point, [rows, channels].

        float64 where the activations that they were fitted on are, else float32.

        Raises
        ------
        ValueError
            The name is none of the points.
        """
        if point not in self.points:
            raise ValueError(
                f"nlm.correct: the point is one of {', '.join(self.points)}, got {point!r}"
            )
        number = list(self.points).index(point)
        return getattr(self, f"scale_{number}"), getattr(self, f"shift_{number}")

    def forward(self, *args: Any, task: Task = None, **kwargs: Any) -> Any:
        """The corrected model's output for ``args`` and ``kwargs``, which are the model's own.

        Parameters
        ----------
        task : a task's name or id for all samples, or ids or names with one per sample. May be
            left out where there is one row for all. A batch of several tasks takes one pass, but
            for a :class:`MultiTaskModel` and where :attr:`apart` says so: one per task, on that
            task's samples.

        Raises
        ------
        TypeError
            Task ids that are no integers.
        ValueError
            An unknown task, not one per sample, or several tasks in one batch whose outputs have
            other shapes.
        """
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break(msg=ONE_GRAPH)
        ids = self._ids(task)
        with exclusive(self.model):
            own = isinstance(self.model, MultiTaskModel)
            rows = self._rows_of(ids)
            if not own and not (self.apart and isinstance(rows, Tensor)):
                return self._run(args, kwargs, rows)

            def run(place: int, args: Any, kwargs: dict[str, Any]) -> Any:
                kwargs = {**kwargs, "task": self.tasks[place]} if own else kwargs
                return self._run(args, kwargs, self._rows_of(place))

            if isinstance(ids, Tensor):
                return task_by_task(run, ids, args, kwargs)
            assert ids is not None  # a multi-task model needs a task
            return run(ids, args, kwargs)

    def fold(self, task: str | int | None = None) -> nn.Module:
        """An ordinary module that computes what this one does for a task, at no cost.

        The corrections go into the weights and biases of a copy of the network.

        Raises
        ------
        ValueError
            An unknown task, or points that cannot be folded exactly: all are named.
        """
        plain, corrections = self._plain(task)
        fold_points(plain, self.points, self.readers, corrections)
        return plain

    def unfoldable(self) -> dict[str, str]:
        """point -> why it cannot be folded exactly, of the points that cannot.

        A correction is folded into the layer or norm that makes the point's output, or into the
        layers that read it. The sum at a residual addition is read by the next addition too,
        weights may be shared with other modules, and a convolution that pads with zeros reads
        values that are not corrected. What reads a point was seen on the calibration data.
        """
        network = network_of(self)
        if isinstance(self.model, MultiTaskModel):
            network = self.model.for_task(self.tasks[0])
        return unfoldable(network, self.points, self.readers)

    def inline(self, task: str | int | None = None) -> nn.Module:
        """A module of its own that compiles and exports: ``torch.compile``, ``torch.export``, ONNX.

        It is one graph (``fullgraph=True``), with the corrections of all tasks or of one in it. The
        corrected model itself compiles piece by piece only, and where functions are points not at
        all. Weights are copied: what is done to this model later does not reach the other.

        Parameters
        ----------
        task : the task that it is for. Without one it is called as ``module(x, task=ids)``, int64
            [n], one per sample; ids are not checked, and one out of range gives NaN.

        Raises
        ------
        ValueError
            An unknown task, or none for a model of which several tasks do not run in one pass.
        """
        if task is None and len(set(self.rows.values())) > 1:
            if self.apart or isinstance(self.model, MultiTaskModel):
                raise ValueError(
                    f"nlm.correct: a model that runs each task of a batch apart is inlined for one "
                    f"of {', '.join(self.tasks)}, got none"
                )
            with exclusive(self.model):
                plain = copy.deepcopy(network_of(self))
            rows = list(self.rows.values())
            tables = {point: self.correction(point) for point in self.points}
            chosen = {point: (table[0][rows], table[1][rows]) for point, table in tables.items()}
            return Inlined(plain, chosen, self.points)
        return Inlined(*self._plain(task), self.points)

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Writes the corrections (not the model) to ``path``, safetensors with their size on top.

        Raises
        ------
        FileExistsError
            The file exists and ``force`` is false.
        """
        from nlm.checkpoint import write_tensors

        tensors = {}
        for point in self.points:
            for name, table in zip(("scale", "shift"), self.correction(point), strict=True):
                tensors[f"{point}.{name}"] = table
        facts = ("points", "rows", "readers", "apart", "parameter_bytes")
        metadata = {fact: json.dumps(getattr(self, fact)) for fact in facts}
        write_tensors(path, tensors, {"nlm": self._kind, **metadata}, force)

    @classmethod
    def load(cls: type[_Self], path: str | os.PathLike[str], model: nn.Module) -> _Self:
        """The corrections that :meth:`save` wrote to ``path``, on a model.

        Raises
        ------
        ValueError
            The file holds something else, is damaged, or a point is no module of the model or has
            another number of channels there. Whether modules call the functions that are points,
            the first call tells, and raises it there.
        """
        tensors, metadata = read_kind(path, cls._kind, "nlm.correct")
        try:
            named = [name for name in _FACTS if name in metadata]
            facts = build(_Facts, {name: parse_json(metadata[name]) for name in named})
            points, rows = facts.points, facts.rows
            tables = {p: (tensors[f"{p}.scale"], tensors[f"{p}.shift"]) for p in points}
            for point, both in tables.items():
                _check_tables(point, *both, rows)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"nlm.correct: a file of corrections names its points and rows and has tables for "
                f"every point, got {error} in {os.fspath(path)!r}"
            ) from error
        modules = dict(network_of(model).named_modules())
        if unknown := [point for point in points if point.partition(":")[0] not in modules]:
            raise ValueError(
                f"nlm.correct: the points are modules of the model, got {', '.join(unknown)} in "
                f"{os.fspath(path)!r}"
            )
        for point, (scale, _) in tables.items():
            count = None if is_place(point) else channel_count(modules[point])
            if count not in (None, scale.shape[-1]):
                raise ValueError(
                    f"nlm.correct: corrections have the model's channels, got {scale.shape[-1]} "
                    f"for {count} at {point!r}"
                )
        home = next((tensor.device for tensor in model.state_dict().values()), None)
        fitted = [
            {p: (scale[row].to(home), shift[row].to(home)) for p, (scale, shift) in tables.items()}
            for row in range(1 + max(rows.values()))
        ]
        loaded = cls(model, points, rows, fitted, facts.readers, facts.apart)
        loaded._unseen = {point for point in points if is_place(point)}
        return loaded

    def _plain(self, task: str | int | None) -> tuple[nn.Module, dict[str, tuple[Tensor, Tensor]]]:
        """A copy of the network with a task's weights, and the task's corrections, [channels]."""
        ids = self._ids(task)
        if isinstance(ids, Tensor):
            raise ValueError(f"nlm.correct: one task is folded at a time, got {task!r}")
        row = self._rows_of(ids)
        with exclusive(self.model):
            if isinstance(self.model, MultiTaskModel):
                assert ids is not None  # a multi-task model needs a task
                plain = self.model.for_task(self.tasks[ids])
            else:
                plain = copy.deepcopy(network_of(self))
        stop_nesting(plain)  # as it was when it was corrected
        tables = {point: self.correction(point) for point in self.points}
        return plain, {point: (scale[row], shift[row]) for point, (scale, shift) in tables.items()}

    # --- running ----------------------------------------------------------------------------------

    def _ids(self, task: Task) -> int | Tensor | None:
        """A task's place, one per sample, or None where none is needed."""
        if task is not None:
            return task_ids(task, self.tasks)
        if len(set(self.rows.values())) > 1 or isinstance(self.model, MultiTaskModel):
            raise ValueError(f"nlm.correct: the task is one of {', '.join(self.tasks)}, got none")
        return None

    def _rows_of(self, ids: int | Tensor | None) -> int | Tensor:
        row_of = list(self.rows.values())
        if isinstance(ids, int):
            return row_of[ids]
        if ids is None or len(set(row_of)) == 1:
            return row_of[0]
        return torch.tensor(row_of, device=ids.device)[ids]

    def _run(self, args: Any, kwargs: dict[str, Any], rows: int | Tensor) -> Any:
        if self._calls:
            return self._run_uncompiled(args, kwargs, rows)
        return self._run_hooked(args, kwargs, rows)

    def _keep_from_compilers(self) -> None:
        """Made where functions are points alone: it imports PyTorch's compiler, for a second."""
        if self._calls and Correction._run_uncompiled is None:
            reason = "a compiler does not see which functions are points: inline()"
            disabled = torch.compiler.disable(Correction._run_hooked, reason=reason)
            Correction._run_uncompiled = disabled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep_from_compilers()

    def _run_hooked(self, args: Any, kwargs: dict[str, Any], rows: int | Tensor) -> Any:
        def hook(point: str) -> OutputHook:
            scale, shift = self.correction(point)
            correct = corrector(network, point, self.points[point])

            def at_point(output: Tensor) -> Tensor:
                self._unseen.discard(point)
                chosen = rows.to(output.device) if isinstance(rows, Tensor) else rows
                return correct(output, scale, shift, chosen)

            return at_point

        network = network_of(self)
        with output_hooks(network, {point: hook(point) for point in self.points}):
            output = self.model(*args, **kwargs)
        if self._unseen:
            raise ValueError(
                f"nlm.correct: the points are functions that the model's modules call, got "
                f"{', '.join(sorted(self._unseen))}"
            )
        return output

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves the tables with the model; they stay float32 where it becomes float16 or such."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, table in before.items():
            moved = self._buffers[name]
            assert table is not None and moved is not None  # all of them are registered as tensors
            if moved.dtype not in (torch.float32, torch.float64):
                self._buffers[name] = table.to(moved.device, torch.float32)
        return self


@dataclass
class _Facts:
    """What the header of a file says."""

    points: dict[str, int]
    rows: dict[str, int]
    readers: dict[str, list[str]] = field(default_factory=dict)
    apart: bool = False


_FACTS = tuple(each.name for each in fields(_Facts))


def _check_tables(point: str, scale: Tensor, shift: Tensor, rows: Mapping[str, int]) -> None:
    """Raises ValueError where a point's scales and shifts are not [rows, channels], and finite."""
    if scale.dim() != 2 or scale.shape != shift.shape or scale.dtype != shift.dtype:
        raise ValueError(
            f"{scale.dtype} {list(scale.shape)} and {shift.dtype} {list(shift.shape)} at {point!r}"
        )
    if scale.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{scale.dtype} at {point!r}")
    if not rows or not all(0 <= row < len(scale) for row in rows.values()):
        raise ValueError(f"rows {dict(rows)} of {len(scale)} at {point!r}")
    if not (scale.isfinite().all() and shift.isfinite().all()):
        raise ValueError(f"NaN or infinity at {point!r}")


def check_channels(caller: str, point: str, counts: Sequence[int]) -> None:
    """Raises ValueError where the tasks' numbers of channels at a point differ."""
    if len(set(counts)) > 1:
        raise ValueError(
            f"{caller}: a point has as many channels for every task (heads are no points), got "
            f"{', '.join(map(str, counts))} at {point!r}"
        )


def refuse_corrected(caller: str, model: nn.Module) -> None:
    """Raises ValueError where a model is corrected already: its points would be hooked twice."""
    while isinstance(model, Wrapper):
        if isinstance(model, Correction):
            raise ValueError(
                f"{caller}: a model is corrected once (fold the earlier correction into it, or "
                f"correct its .model instead), got a {type(model).__name__}"
            )
        model = model.inner()


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """No other thread hooks or runs the model's network in the block.

    A multi-task model's own lock is taken where it has one: its calls take it too.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"nlm.correct: a merged model is a module, got {type(model).__name__}")
    own = getattr(model, "lock", None) if isinstance(model, MultiTaskModel) else None
    with own if own is not None else lock_of(network_of(model)):
        yield
