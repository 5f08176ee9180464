"""The result of a merge: a plain state dict of what is shared, and what each task keeps."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nlm._multitask import MultiTaskModel


class Merged(dict[str, Tensor]):
    """Merged weights: itself the dict of the shared entries.

    Attributes
    ----------
    heads : task -> the entries that were not merged.
    masks : task -> name -> bool mask on the merged task vector (TALL-mask), else empty.
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
        self._base = dict(base)
        self._masked: dict[str, dict[str, Tensor]] = {}

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
        if task in self.masks and task not in self._masked:
            self._masked[task] = {
                name: torch.where(mask, self[name], self._base[name])
                for name, mask in self.masks[task].items()
            }
        return {**self, **self._masked.get(task, {}), **self.heads[task]}

    def model(self, network: nn.Module) -> MultiTaskModel:
        """The merged model: ``network`` run with the weights of the task at hand."""
        return MultiTaskModel(network, self)
