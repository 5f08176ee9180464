"""A model with scales and shifts on the outputs of some of its modules, one row per task."""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nlm import ops
from nlm._modules import output_hooks
from nlm._multitask import MultiTaskModel, Wrapper, network_of
from nlm.correct.folding import fold_points
from nlm.correct.points import ordered_points
from nlm.correct.sequential import Fitted

Task = str | int | Tensor | Sequence[str] | None
_Self = TypeVar("_Self", bound="Correction")


class Correction(Wrapper):
    """``y * scale[row] + shift[row]`` on the output of each point's module.

    Made by :meth:`Tact.fit`, :meth:`Repair.fit` or :meth:`load`. The model itself is neither
    changed nor copied: it is hooked while it runs.

    Attributes
    ----------
    model : the merged model, plain or a :class:`MultiTaskModel`.
    points : module name -> channel dimension of its output.
    rows : task -> row of the corrections.
    """

    def __init__(
        self,
        model: nn.Module,
        points: Mapping[str, int],
        rows: Mapping[str, int],
        fitted: Sequence[Fitted],
    ) -> None:
        super().__init__()
        self.model = model
        self.points = dict(points)
        self.rows = dict(rows)
        for number, point in enumerate(self.points):
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
        """The size of all corrections."""
        return sum(table.nbytes for table in self.buffers(recurse=False))

    def correction(self, point: str) -> tuple[Tensor, Tensor]:
        """Scale and shift of one point, [rows, channels]."""
        if point not in self.points:
            raise ValueError(
                f"nlm.correct: the point is one of {', '.join(self.points)}, got {point!r}"
            )
        number = list(self.points).index(point)
        return getattr(self, f"scale_{number}"), getattr(self, f"shift_{number}")

    def forward(self, *args: Any, task: Task = None, **kwargs: Any) -> Any:
        """The corrected model's output.

        Parameters
        ----------
        task : a task's name or id for all samples, or an int64 tensor of ids or a list of names
            with one per sample. May be left out where there is one row for all.

        Raises
        ------
        ValueError
            An unknown task, or several tasks in one batch of a model whose tasks have heads of
            their own.
        """
        ids = self._ids(task)
        if isinstance(self.model, MultiTaskModel):
            kwargs["task"] = self._name_for_weights(task, ids)
        rows = self._rows_of(ids)
        hooks = {
            point: lambda output, point=point: ops.scale_shift(
                output, *self.correction(point), rows, self.points[point]
            )
            for point in self.points
        }
        with output_hooks(network_of(self), hooks, first=True):
            return self.model(*args, **kwargs)

    def fold(self, task: str | int | None = None) -> nn.Module:
        """An ordinary module that computes what this one does for a task, at no cost.

        The corrections go into the weights and biases of a copy of the network.

        Raises
        ------
        ValueError
            An unknown task, or a point that has no weight and bias of its own to fold into.
        """
        ids = self._ids(task)
        row = self._rows_of(ids)
        if isinstance(row, Tensor):
            raise ValueError(f"nlm.correct: one task is folded at a time, got {task!r}")
        if isinstance(self.model, MultiTaskModel):
            plain = self.model.for_task(self._name_for_weights(task, ids))
        else:
            plain = copy.deepcopy(network_of(self))
        corrections = {
            point: (scale[row], shift[row])
            for point in self.points
            for scale, shift in [self.correction(point)]
        }
        fold_points(plain, corrections)
        return plain

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Writes the corrections (not the model) as safetensors.

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
        metadata = {"points": json.dumps(self.points), "rows": json.dumps(self.rows)}
        write_tensors(path, tensors, {"nlm": type(self).__name__, **metadata}, force)

    @classmethod
    def load(cls: type[_Self], path: str | os.PathLike[str], model: nn.Module) -> _Self:
        """The corrections that :meth:`save` wrote, on a model.

        Raises
        ------
        ValueError
            The file holds something else, is damaged, or a point is no module of the model.
        """
        from nlm.checkpoint import read_tensors

        tensors, metadata = read_tensors(path)
        if metadata.get("nlm") != cls.__name__:
            raise ValueError(
                f"nlm.correct: a file of {cls.__name__} is read, got "
                f"{metadata.get('nlm', 'another kind')} in {os.fspath(path)!r}"
            )
        points, rows = json.loads(metadata["points"]), json.loads(metadata["rows"])
        modules = dict(network_of(model).named_modules())
        if unknown := [point for point in points if point not in modules]:
            raise ValueError(
                f"nlm.correct: the points are modules of the model, got {', '.join(unknown)} in "
                f"{os.fspath(path)!r}"
            )
        count = 1 + max(rows.values())
        fitted = [
            {p: (tensors[f"{p}.scale"][row], tensors[f"{p}.shift"][row]) for p in points}
            for row in range(count)
        ]
        return cls(model, points, rows, fitted)

    # --- tasks ------------------------------------------------------------------------------------

    def _ids(self, task: Task) -> int | Tensor | None:
        """A task's place, one per sample, or None where none is needed."""
        if task is None:
            if len(set(self.rows.values())) > 1 or isinstance(self.model, MultiTaskModel):
                raise ValueError(
                    f"nlm.correct: the task is one of {', '.join(self.tasks)}, got none"
                )
            return None
        if isinstance(task, str):
            if task not in self.rows:
                raise ValueError(
                    f"nlm.correct: the task is one of {', '.join(self.tasks)}, got {task!r}"
                )
            return self.tasks.index(task)
        if isinstance(task, int):
            ids: Tensor = torch.tensor([task])
        elif isinstance(task, Tensor):
            ids = task
        else:
            ids = torch.tensor([self._ids(name) for name in task])
        if ids.dtype != torch.int64 or ids.dim() != 1:
            raise ValueError(
                f"nlm.correct: task ids are int64 with one per sample, got {ids.dtype} of shape "
                f"{list(ids.shape)}"
            )
        if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < len(self.rows)):
            raise ValueError(
                f"nlm.correct: task ids lie in 0 to {len(self.rows) - 1}, got "
                f"{int(ids.min())} to {int(ids.max())}"
            )
        return task if isinstance(task, int) else ids

    def _rows_of(self, ids: int | Tensor | None) -> int | Tensor:
        row_of = list(self.rows.values())
        if ids is None:
            return 0
        if isinstance(ids, int):
            return row_of[ids]
        if len(set(row_of)) == 1:
            return row_of[0]
        return torch.tensor(row_of, device=ids.device)[ids]

    def _name_for_weights(self, task: Task, ids: int | Tensor | None) -> str:
        distinct = sorted(set(ids.tolist())) if isinstance(ids, Tensor) else [ids]
        if len(distinct) != 1 or distinct[0] is None:
            raise ValueError(
                f"nlm.correct: a batch for a model whose tasks have heads of their own is of one "
                f"task, got {len(distinct)}"
            )
        return self.tasks[int(distinct[0])]


def points_in_order(
    network: nn.Module, call: Any, points: Sequence[str] | Mapping[str, int]
) -> dict[str, int]:
    """The points that a user gave, checked; a mapping also names their channel dimensions."""
    found = ordered_points(network, call, points)
    return {name: points[name] for name in found} if isinstance(points, Mapping) else found
