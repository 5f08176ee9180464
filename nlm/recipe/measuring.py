"""What is measured on data before a merge: Gram matrices for RegMean, and the score of soups.

A score is a function, ``package.module:function``, which is called with the model (of files of
weights alone: with the state dict) and gives a number, larger is better; or a file of inputs with
their ``labels``, on which it is minus the model's own loss. A model that generates text needs no
labels: these are its inputs.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nlm._modules import is_transformers_conv1d
from nlm._names import matches
from nlm.checkpoint import open_checkpoint, read_tensors, write_tensors
from nlm.merge import gram_matrices
from nlm.recipe.data import TENSORS, check_data, open_data
from nlm.recipe.functions import find_function
from nlm.recipe.modules import hollow_module, load_module, names_of
from nlm.recipe.recipe import Expert
from nlm.statistics import attention_mask
from nlm.statistics.data import sample_count
from nlm.streaming.ranks import Ranks

CALLER = "nlm.recipe"


def column_weights(path: Path) -> tuple[str, ...]:
    """The weights of a folder's checkpoint that are [inputs, outputs]."""
    model = hollow_module(path)
    own = {name for name, each in model.named_modules() if is_transformers_conv1d(each)}
    names = names_of(open_checkpoint(path), model).items()
    return tuple(name for name, inside in names if inside.rpartition(".")[0] in own)


def write_grams(
    expert: Expert, model: nn.Module, heads: tuple[str, ...], file: Path, ranks: Ranks
) -> None:
    """Writes the Gram matrices of what an expert's linear layers read, under its names of entries.

    Parameters
    ----------
    model : the expert, in the order of units in which it is merged.
    ranks : each process measures its part of the batches; the first one writes.
    """
    path = expert.path
    assert expert.data is not None
    inputs = open_data(expert.data, model, str(path), CALLER, expert.samples)
    mask = attention_mask if _is_masked(inputs) else None
    own, group = ranks.part(inputs)
    if not own:
        return
    with ranks.hearing():
        grams = gram_matrices(model, own, mask=mask, process_group=group)
    if not ranks.first:
        return
    names = {own: name for name, own in names_of(open_checkpoint(path), model).items()}
    kept = {names[own]: gram for own, gram in grams.items() if own in names}
    kept = {name: gram for name, gram in kept.items() if not matches(name, heads)}
    write_tensors(file, kept, force=True)


def _is_masked(batches: list[Any]) -> bool:
    """Whether an attention mask hides anything."""
    masks = [each["attention_mask"] for each in batches if _has(each, "attention_mask")]
    return any(not bool(torch.as_tensor(mask).all()) for mask in masks)


def _has(batch: Any, name: str) -> bool:
    return isinstance(batch, Mapping) and name in batch


def open_score(text: str, folder: Path | None) -> Callable[[Path], float]:
    """A function of the path of a checkpoint that says how good it is.

    Parameters
    ----------
    folder : of a model of the soup; None where these are files of weights alone.

    Raises
    ------
    ValueError
        No such function, or inputs that are not labelled; what :func:`open_data` raises.
    """
    check_score(text, None if folder is None else hollow_module(folder), folder)
    if not Path(text).is_file():
        function: Callable[..., Any] = find_function(text, f"{CALLER}: the score")
        if folder is None:
            return lambda path: float(function(read_tensors(path)[0]))
        return lambda path: float(function(load_module(path)))
    batches = open_data(text, hollow_module(folder), str(folder), CALLER)  # type: ignore[arg-type]
    return lambda path: -_loss(load_module(path), batches)


def check_score(text: str, model: nn.Module | None, folder: Path | None) -> None:
    """Raises what :func:`open_score` would, as far as it shows before anything is read."""
    path = Path(text)
    if not path.is_file():
        find_function(text, f"{CALLER}: the score")
    elif model is None:
        raise ValueError(
            f"{CALLER}: files of weights alone are scored by package.module:function, got {text!r}"
        )
    else:
        check_data(text, model, str(folder), CALLER)
        is_labelled = path.suffix in TENSORS and "labels" in _names(path)
        if not is_labelled and not _generates(model):
            raise ValueError(
                f"{CALLER}: a score is the loss on inputs with their 'labels', got none in "
                f"{text!r} for {type(model).__name__}"
            )


def _names(path: Path) -> set[str]:
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path, allow_pickle=False) as found:
            return set(found.files)
    return set(open_checkpoint(path).tensors)


def _generates(model: nn.Module) -> bool:
    """Whether a model's labels are its inputs."""
    known: Any = model
    return hasattr(model, "can_generate") and bool(known.can_generate())


@torch.no_grad()
def _loss(model: nn.Module, batches: list[Any]) -> float:
    """The mean over the samples of the model's own loss."""
    total, count = 0.0, 0
    for batch in batches:
        given = dict(batch)
        if "labels" not in given:
            given["labels"] = given["input_ids"].clone()
            if "attention_mask" in given:
                given["labels"][given["attention_mask"] == 0] = -100
        number = sample_count(batch, CALLER)
        total += float(model(**given).loss) * number
        count += number
    return total / count
