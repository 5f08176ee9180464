"""Task ids: from what a user names, and batches of several tasks that are run task by task."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

Task = str | int | Tensor | Sequence[str] | Sequence[int] | None


def task_ids(task: Any, names: tuple[str, ...]) -> int | Tensor:
    """A task's place among the names, or an int64 tensor [n] of the places of n samples' tasks.

    Parameters
    ----------
    task : a name or an id; or a tensor or an array of ids, or a list of names or ids.

    Raises
    ------
    TypeError
        Ids that are no integers.
    ValueError
        No such task, or ids of two and more dimensions.
    """
    if isinstance(task, str):
        if task not in names:
            raise ValueError(f"nlm.correct: the task is one of {', '.join(names)}, got {task!r}")
        return names.index(task)
    if isinstance(task, (Tensor, np.ndarray, Integral)):
        ids = torch.as_tensor(task)
    else:
        ids = torch.tensor([task_ids(entry, names) for entry in task], dtype=torch.int64)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"nlm.correct: task ids are integers, got {ids.dtype}")
    if ids.dim() > 1:
        raise ValueError(
            f"nlm.correct: there is one task id for all samples or one for each, got shape "
            f"{list(ids.shape)}"
        )
    if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < len(names)):
        raise ValueError(
            f"nlm.correct: task ids lie in 0 to {len(names) - 1}, got {int(ids.min())} to "
            f"{int(ids.max())}"
        )
    return ids.long() if ids.dim() else int(ids)


def task_by_task(
    run: Callable[[int, Any, dict[str, Any]], Any], ids: Tensor, args: Any, kwargs: dict[str, Any]
) -> Any:
    """The outputs of ``run(id, args, kwargs)`` on the samples of each id, in the samples' order.

    Tensor arguments with one entry per sample are divided; others go to every task.

    Raises
    ------
    ValueError
        No argument has one entry per sample, or the tasks' outputs differ in more than their number
        of samples.
    """
    count = len(ids)

    def per_sample(value: Tensor) -> bool:
        return value.dim() > 0 and len(value) == count

    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not count or not any(map(per_sample, leaves)):
        raise ValueError(
            f"nlm.correct: there is one task id per sample, got {count} for inputs of shapes "
            f"{', '.join(str(list(leaf.shape)) for leaf in leaves)}"
        )
    places, outputs = [], []
    for task in ids.unique().tolist():
        at = (ids == task).nonzero().flatten()

        def chosen(value: Tensor, at: Tensor = at) -> Tensor:
            return value[at.to(value.device)] if per_sample(value) else value

        outputs.append(run(task, *tree_map_only(Tensor, chosen, (args, kwargs))))
        places.append(at)
    if len(outputs) == 1:
        return outputs[0]
    order = torch.cat(places).argsort()
    flat, structures = zip(*map(tree_flatten, outputs), strict=True)
    forms = [[_form(leaf, len(at)) for leaf in own] for own, at in zip(flat, places, strict=True)]
    if any(form != forms[0] for form in forms) or any(s != structures[0] for s in structures):
        raise ValueError(
            f"nlm.correct: a batch for a model whose tasks have heads of their own is of one task, "
            f"or of tasks whose outputs have one shape, got {len(outputs)} tasks with outputs per "
            f"sample of {forms[0]} and {next((f for f in forms if f != forms[0]), forms[0])}"
        )
    joined = [torch.cat(column)[order.to(column[0].device)] for column in zip(*flat, strict=True)]
    return tree_unflatten(joined, structures[0])


def _form(leaf: Any, count: int) -> Any:
    """The shape of one sample's output and its type; what has no entry per sample matches none."""
    if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count:
        return list(leaf.shape[1:]), leaf.dtype
    return object()
