"""Weights of which each task has changes of its own: products of two factors, and biases."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nlm._multitask import TaskStates


@dataclass
class Update:
    """What one task adds.

    Attributes
    ----------
    factors : weight -> left [groups, a, rank] and right [groups, rank, b]; their product, in the
        weight's shape, is added to it.
    values : other entries, biases as a rule, which are replaced.
    """

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    def on(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with the update in it."""
        own = dict(state)
        for name, (left, right) in self.factors.items():
            own[name] = updated(own[name], left, right)
        return own | self.values

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by names of their own."""
        found = dict(self.values)
        for name, (left, right) in self.factors.items():
            found |= {f"{name}:left": left, f"{name}:right": right}
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Update":
        """The update whose tensors these are.

        Raises
        ------
        KeyError
            A factor without the other one.
        """
        made = cls()
        for full, tensor in tensors.items():
            name, _, side = full.rpartition(":")
            if side == "left" and name:
                made.factors[name] = tensor, tensors[f"{name}:right"]
            elif side == "right" and name:
                tensors[f"{name}:left"]
            else:
                made.values[full] = tensor
        return made


def updated(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """A weight and the product of two factors."""
    return weight + (left @ right).reshape(weight.shape)


@dataclass
class Same:
    """One state dict for all tasks."""

    tasks: Sequence[str]
    state: dict[str, Tensor]

    def for_task(self, task: str) -> Mapping[str, Tensor]:
        return self.state

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.state)

    def replaced(self, tensors: Mapping[str, Tensor]) -> "Same":
        return Same(self.tasks, dict(tensors))


@dataclass
class Updated:
    """The weights of every task with its update, which is added when they are asked for."""

    below: TaskStates
    updates: dict[str, Update]

    @property
    def tasks(self) -> Sequence[str]:
        return tuple(self.updates)

    def for_task(self, task: str) -> Mapping[str, Tensor]:
        return self.updates[task].on(self.below.for_task(task))

    def tensors(self) -> dict[str, Tensor]:
        """Those of the weights below, and ``update.NUMBER.ENTRY`` for each task in its turn."""
        found = self.below.tensors()
        for number, update in enumerate(self.updates.values()):
            found |= {f"update.{number}.{name}": t for name, t in update.tensors().items()}
        return found

    def replaced(self, tensors: Mapping[str, Tensor]) -> "Updated":
        below = {name: tensors[name] for name in self.below.tensors()}
        updates = {}
        for number, (task, update) in enumerate(self.updates.items()):
            own = {name: tensors[f"update.{number}.{name}"] for name in update.tensors()}
            updates[task] = Update.of(own)
        return Updated(self.below.replaced(below), updates)


def check_update(
    caller: str, update: Update, state: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Raises ValueError where an update is none of a state dict's entries."""
    try:
        for name, tensor in update.tensors().items():
            entry = name.rpartition(":")[0] or name
            if entry not in state:
                raise ValueError(f"none called {entry!r}")
            if tensor.dtype != state[entry].dtype or not tensor.isfinite().all():
                raise ValueError(f"{tensor.dtype} for {state[entry].dtype}, or NaN, in {name!r}")
        for name, (left, right) in update.factors.items():
            groups, rows, rank = left.shape
            *others, columns = right.shape
            weight = state[name]
            if (
                others != [groups, rank]
                or weight.shape[:1] != (groups * rows,)
                or weight.numel() != groups * rows * columns
            ):
                raise ValueError(f"{list(left.shape)} and {list(right.shape)} for {name!r}")
        for name, value in update.values.items():
            if value.shape != state[name].shape:
                raise ValueError(f"{list(value.shape)} for {name!r}")
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{caller}: the parts are finite and fit the model's entries, got {error} in "
            f"{os.fspath(path)!r}"
        ) from error
