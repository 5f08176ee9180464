"""Loading what ``nlm merge`` wrote: the merged model with its tasks' heads and corrections.

A merged folder holds a model of transformers, and beside it, where a recipe asked for it,

``heads/TASK.safetensors``, ``heads/TASK.json``
    what each task keeps for itself, and the configuration of its expert;
``nlm_correction.safetensors``
    corrections of the activations, one row per task;
``tasks/TASK/``
    the model of a task with its head and its corrections folded in.
"""

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import torch
from torch import Tensor, nn

from nlm.checkpoint import read_tensors
from nlm.checkpoint.names import file_name
from nlm.correct.by_name import load_correction
from nlm.merge.result import Merged
from nlm.symmetry.pretrained import entry_names, load_model, read_config

SIDE_CAR = "nlm_correction.safetensors"
HEADS = "heads"
TASKS = "tasks"


def load(
    path: str | os.PathLike[str], task: str | None = None, *, dtype: torch.dtype | str = "auto"
) -> nn.Module:
    """A model that ``nlm merge`` wrote, in evaluation mode.

    Parameters
    ----------
    path : a merged folder.
    task : the task that the model is for.
    dtype : of the weights; "auto" is that of the files.

    Returns
    -------
    nn.Module
        With a task, a model of its class in transformers: with the task's head, and its corrections
        folded in where that is exact, else computed where they stand. Without one the model of all
        tasks, called as ``model(..., task="digits")`` where tasks have heads or corrections of
        their own; a correction is a :class:`nlm.correct.Correction`, heads alone a
        :class:`nlm.MultiTaskModel`.

    Raises
    ------
    FileNotFoundError
        There is no such folder, or no model in it.
    ValueError
        An unknown task; none for a folder that has a model for each task; a folder with masks;
        damaged files.

    Examples
    --------
    >>> import nlm
    >>> model = nlm.load("merged")  # doctest: +SKIP
    >>> logits = model(input_ids=tokens, task="digits").logits  # doctest: +SKIP
    >>> digits = nlm.load("merged", task="digits")  # doctest: +SKIP
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"nlm.load: a merged model is a folder, got {str(folder)!r}")
    if (folder / "masks").is_dir():
        raise ValueError(
            f"nlm.load: masks are applied before a model is loaded "
            f"(nlm.streaming.masks.write_task), got masks in {str(folder)!r}"
        )
    folded = _names(folder / TASKS, "*/config.json", lambda file: file.parent.name)
    headed = _names(folder / HEADS, "*.safetensors", lambda file: file.stem)
    side_car = folder / SIDE_CAR
    if task is None:
        if folded:
            raise ValueError(
                f"nlm.load: a folder with a model for each task is loaded for one of "
                f"{', '.join(folded)}, got no task"
            )
        model = _all_tasks(folder, headed, dtype) if headed else _plain(folder, dtype)
        return load_correction(side_car, model) if side_car.is_file() else model
    if folded:
        _check(task, folded)
        return _plain(folder / TASKS / file_name(task), dtype)
    if headed:
        _check(task, headed)
    model = with_head(folder, task, dtype) if headed else _plain(folder, dtype)
    if not side_car.is_file():
        if not headed:
            raise ValueError(
                f"nlm.load: a folder without heads and corrections is one model for all tasks, got "
                f"task {task!r} for {str(folder)!r}"
            )
        return model
    corrected = load_correction(side_car, model)
    _check(task, corrected.tasks)
    return corrected.inline(task) if corrected.unfoldable() else corrected.fold(task)


def with_head(folder: Path, task: str, dtype: torch.dtype | str = "auto") -> nn.Module:
    """The merged model with the head of a task, of the class of the task's expert."""
    file = folder / HEADS / f"{file_name(task)}.safetensors"
    settings = file.with_suffix(".json")
    config = read_config(str(settings)) if settings.is_file() else None
    model = load_model(str(folder), config=config, dtype=dtype, plain=True)
    own = _head(file, model)
    entries = model.state_dict()
    for name, tensor in own.items():
        if name not in entries or entries[name].shape != tensor.shape:
            found = list(entries[name].shape) if name in entries else "none"
            raise ValueError(
                f"nlm.load: a head is one of the model's, got {list(tensor.shape)} for {name!r} of "
                f"{task!r} and {found} in {type(model).__name__}"
            )
    model.load_state_dict(own, strict=False)
    return model


def _plain(folder: Path, dtype: torch.dtype | str) -> nn.Module:
    return load_model(str(folder), dtype=dtype, plain=True)


def _all_tasks(folder: Path, tasks: tuple[str, ...], dtype: torch.dtype | str) -> nn.Module:
    """The network of the first task with the heads of all."""
    first = with_head(folder, tasks[0], dtype)
    heads = {
        task: _head(folder / HEADS / f"{file_name(task)}.safetensors", first) for task in tasks
    }
    own = {name for head in heads.values() for name in head}
    shared = {name: tensor for name, tensor in first.state_dict().items() if name not in own}
    types = {name: each.dtype for name, each in first.state_dict().items()}
    heads = {
        task: {name: each.to(types[name]) for name, each in head.items()}
        for task, head in heads.items()
    }
    return Merged(shared, heads, {}, {}).model(first)


def _head(file: Path, model: nn.Module) -> dict[str, Tensor]:
    """The entries of a head by the names that the model has for them."""
    own, _ = read_tensors(file)
    names = entry_names(model, own)
    return {names[name]: tensor for name, tensor in own.items()}


def _names(folder: Path, pattern: str, of: Callable[[Path], str]) -> tuple[str, ...]:
    """The tasks that have something in a folder."""
    return tuple(sorted(unquote(of(file)) for file in folder.glob(pattern)))


def _check(task: str, known: tuple[str, ...]) -> None:
    if task not in known:
        raise ValueError(f"nlm.load: the task is one of {', '.join(known)}, got {task!r}")
