"""The result of a merge: a plain state dict of what is shared, and what each task keeps."""

import json
import os
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from nlm._multitask import MultiTaskModel
from nlm.ops import tall_mask_apply
from nlm.ops.tall_mask import unpack


class Merged(dict[str, Tensor]):
    """Merged weights: itself the dict of the shared entries.

    Attributes
    ----------
    heads : task -> the entries that were not merged.
    masks : task -> name -> mask on the merged task vector (TALL-mask), a bit per entry as
        :func:`nlm.ops.tall_mask` has it, else empty; :meth:`mask` is one as bools.
    base : where the merged task vector starts, for the masks; else empty.
    """

    def __init__(
        self,
        shared: Mapping[str, Tensor],
        heads: Mapping[str, Mapping[str, Tensor]],
        masks: Mapping[str, Mapping[str, Tensor]],
        base: Mapping[str, Tensor],
    ) -> None:
        super().__init__(shared)
        self.heads = {task: dict(own) for task, own in heads.items()}
        self.masks = {task: dict(own) for task, own in masks.items()}
        self.base = dict(base)
        self._masked: dict[str, tuple[list[tuple[Tensor, int]], dict[str, Tensor]]] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return tuple(self.heads)

    def for_task(self, task: str) -> dict[str, Tensor]:
        """The complete state dict of one task.

        Raises
        ------
        ValueError
            The task is unknown.
        """
        if task not in self.heads:
            raise ValueError(f"nlm.merge: the task is one of {', '.join(self.tasks)}, got {task!r}")
        return {**self, **self._with_mask(task), **self.heads[task]}

    def mask(self, task: str, name: str) -> Tensor:
        """The entries that a task keeps from the merge, as bools of their shape."""
        return unpack(self.masks[task][name], self[name].shape)

    def model(self, network: nn.Module) -> MultiTaskModel:
        """The merged model: ``network`` run with the weights of the task at hand."""
        return MultiTaskModel(network, self)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by names of their own: ``shared.*``, ``base.*``, ``heads.TASK.*``,
        ``masks.TASK.*``."""
        flat = {f"shared.{name}": tensor for name, tensor in self.items()}
        flat |= {f"base.{name}": tensor for name, tensor in self.base.items()}
        for kind, per_task in (("heads", self.heads), ("masks", self.masks)):
            for task, own in per_task.items():
                flat |= {f"{kind}.{_escaped(task)}.{name}": t for name, t in own.items()}
        return flat

    def replaced(self, tensors: Mapping[str, Tensor]) -> "Merged":
        """The same merge with other tensors, named as in :meth:`tensors`."""
        return _assembled(self.tasks, tensors)

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Writes the merged weights, with all heads and masks, to ``path`` as safetensors.

        Raises
        ------
        FileExistsError
            The file exists and ``force`` is false.
        """
        from nlm.checkpoint import write_tensors

        write_tensors(
            path, self.tensors(), {"nlm": "Merged", "tasks": json.dumps(self.tasks)}, force
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Merged":
        """The merged weights that :meth:`save` wrote to ``path``, on the CPU.

        Raises
        ------
        ValueError
            The file holds something else or is damaged.
        """
        from nlm.checkpoint import read_kind
        from nlm.checkpoint.texts import parse_json, whole

        tensors, metadata = read_kind(path, "Merged", "nlm.merge")
        if "tasks" not in metadata:
            raise ValueError(
                f"nlm.merge: a file of Merged names its tasks, got {os.fspath(path)!r} without them"
            )
        with whole(path, "Merged", "nlm.merge"):
            tasks = parse_json(metadata["tasks"])
            if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
                raise ValueError("tasks that are no list of names")
            found = _assembled(tasks, tensors)
            found._check_masks()
        return found

    def _check_masks(self) -> None:
        """Raises ValueError where masks are not those of the merged entries."""
        for task, masks in self.masks.items():
            for name, mask in masks.items():
                tall_mask_apply(mask, self.base[name], self[name])
                if task not in self.heads:
                    raise ValueError(f"a mask of the unknown task {task!r}")

    def _with_mask(self, task: str) -> dict[str, Tensor]:
        """The entries that a task's mask changes, kept until one of their sources changes."""
        masks = self.masks.get(task, {})
        if torch.compiler.is_compiling():
            return self._masked_now(masks)
        sources = [t for name, mask in masks.items() for t in (mask, self[name], self.base[name])]
        if any(tensor.is_inference() for tensor in sources):  # without a version to compare
            return self._masked_now(masks)
        seen, found = self._masked.get(task, ([], {}))
        if len(seen) != len(sources) or any(
            old is not new or version != new._version
            for (old, version), new in zip(seen, sources, strict=True)
        ):
            found = self._masked_now(masks)
            self._masked[task] = ([(tensor, tensor._version) for tensor in sources], found)
        return found

    def _masked_now(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: tall_mask_apply(mask, self.base[n], self[n]) for n, mask in masks.items()}


def _assembled(tasks: Iterable[str], tensors: Mapping[str, Tensor]) -> Merged:
    """The merge whose :meth:`Merged.tensors` these are."""
    parts: dict[str, dict[str, Tensor]] = {"shared": {}, "base": {}}
    per_task: dict[str, dict[str, dict[str, Tensor]]] = {"heads": {}, "masks": {}}
    names = {_escaped(task): task for task in tasks}
    per_task["heads"] = {task: {} for task in names.values()}
    for full, tensor in tensors.items():
        kind, _, name = full.partition(".")
        if kind in parts:
            parts[kind][name] = tensor
        else:
            task, _, name = name.partition(".")
            per_task[kind].setdefault(names[task], {})[name] = tensor
    return Merged(parts["shared"], per_task["heads"], per_task["masks"], parts["base"])


def _escaped(task: str) -> str:
    """A task's name without dots, so that a name after it stays apart from it."""
    return task.replace("%", "%25").replace(".", "%2E")
