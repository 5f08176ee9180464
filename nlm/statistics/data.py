"""Walking over a user's data.

Data is anything that can be iterated again and again and yields batches: a tensor, a tuple or list
with the inputs first, or a dict of keyword arguments; NumPy arrays stand for tensors. A model gets
the tensor, the inputs alone, or the keyword arguments. ``forward(model, batch, **kwargs)`` is for
all other models: it gets the whole batch, labels included, and passes ``kwargs`` (``task="digits"``
for a multi-task model) on to the model. ``mask(batch)`` tells which positions of an activation
count: bool, of its shape without the channel dimension; None where all do.

A tensor has one entry per sample along dimension 0, or is shared by all samples: of length 1 there,
or without dimensions.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

Data = Iterable[Any]
Forward = Callable[..., Any]
Mask = Callable[[Any], Tensor | None]


def batches(
    data: Data,
    max_samples: int | None = None,
    device: torch.device | str | None = None,
    caller: str = "nlm",
) -> Iterator[Any]:
    """The batches of some data, on a device, cut after ``max_samples`` samples in all. ``caller``
    begins the messages of errors.

    Raises
    ------
    TypeError
        The data is a bare tensor or one bare batch, or can be iterated only once; a number of
        samples that is no integer.
    ValueError
        There is not a single sample, or ``max_samples`` is below 1.
    """
    _check_data(data, caller)
    _check_number_of("max_samples", max_samples, caller)
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"{caller}: at least one sample is used, got max_samples={max_samples}")
    seen = 0
    for batch in data:
        if isinstance(batch, Mapping):
            batch = dict(batch)  # a tokeniser's BatchEncoding among them
        batch = tree_map(_as_tensor, batch)
        size = sample_count(batch, caller)
        if max_samples is not None and seen + size > max_samples:
            size = max_samples - seen
            batch = cut(batch, 0, size, caller)
        if size:
            seen += size
            yield batch if device is None else tree_map_only(Tensor, lambda t: t.to(device), batch)
        if seen == max_samples:
            break
    if not seen:
        raise ValueError(f"{caller}: data holds at least one sample, got none")


def cut(batch: Any, start: int, stop: int, caller: str = "nlm") -> Any:
    """The samples from ``start`` to ``stop`` of a batch.

    Raises
    ------
    ValueError
        The tensors' lengths differ, so that it is not known which of them count samples.
    """
    size = sample_count(batch, caller)
    if start == 0 and stop >= size:
        return batch
    if len(lengths := _lengths(batch)) > 1:
        raise ValueError(
            f"{caller}: a batch that is cut has tensors with one entry per sample, or one for all, "
            f"got lengths {', '.join(map(str, sorted(lengths)))}"
        )
    return tree_map_only(Tensor, lambda t: t[start:stop] if _length(t) == size else t, batch)


def first(batch: Any, count: int, caller: str = "nlm") -> Any:
    """The first samples of a batch; all of it where it is not known which tensors count them.

    ``caller`` begins the messages of errors.
    """
    return cut(batch, 0, count, caller) if len(_lengths(batch)) == 1 else batch


def labelled(batch: Any, caller: str) -> tuple[Any, Tensor]:
    """The inputs and labels of a batch.

    Raises
    ------
    ValueError
        The batch is no pair.
    TypeError
        The labels are no tensor.
    """
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ValueError(f"{caller}: a batch is (inputs, labels), got {type(batch).__name__}{size}")
    if not isinstance(batch[1], Tensor):
        raise TypeError(f"{caller}: labels are a tensor, got {type(batch[1]).__name__}")
    return batch[0], batch[1]


def micro_batches(
    data: Data,
    size: int | None,
    max_samples: int | None = None,
    device: torch.device | str | None = None,
    caller: str = "nlm",
) -> list[Any]:
    """The samples of some data in batches of ``size``; as many as fit together with None.

    Batches of unequal shapes behind the sample dimension, and those with tensors that all their
    samples share, are kept apart.
    """
    chunks = list(batches(data, max_samples, device, caller))
    _check_number_of("a micro-batch's size", size, caller)
    if size is not None:
        if size < 1:
            raise ValueError(f"{caller}: a micro-batch has at least one sample, got {size}")
        return [
            cut(chunk, start, start + size, caller)
            for chunk in _joined(chunks)
            for start in range(0, sample_count(chunk, caller), size)
        ]
    return _joined(chunks)


def run(model: nn.Module, batch: Any, forward: Forward | None = None, **kwargs: Any) -> Any:
    """The outputs of a model for a batch: ``forward(model, batch, **kwargs)``, or the obvious call.

    The model gets a copy, so that one that writes into its input leaves the data as they are.
    """
    batch = tree_map_only(Tensor, Tensor.clone, batch)
    if forward is not None:
        return forward(model, batch, **kwargs)
    if isinstance(batch, Mapping):
        return model(**batch, **kwargs)
    if isinstance(batch, (tuple, list)):
        return model(batch[0], **kwargs)
    return model(batch, **kwargs)


def _check_data(data: Any, caller: str) -> None:
    one_batch = isinstance(data, tuple) and any(isinstance(x, (Tensor, np.ndarray)) for x in data)
    if (
        isinstance(data, (Tensor, np.ndarray, Mapping, Iterator, str))
        or not hasattr(data, "__iter__")
        or one_batch
    ):
        hint = " of tensors (one batch, perhaps: data=[(inputs, labels)])" if one_batch else ""
        raise TypeError(
            f"{caller}: data is a re-iterable of batches, such as a list of tensors or a "
            f"DataLoader, got {type(data).__name__}{hint}"
        )


def _check_number_of(what: str, value: Any, caller: str) -> None:
    if value is not None and not isinstance(value, Integral):
        raise TypeError(f"{caller}: {what} is an integer, or None, got {value!r}")


def _as_tensor(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc":
        return torch.from_numpy(leaf.copy())  # a copy has no negative strides and can be written to
    return leaf


def _length(tensor: Tensor) -> int:
    return len(tensor) if tensor.dim() else 1


def _lengths(batch: Any) -> set[int]:
    """The lengths of a batch's tensors that are not 1, which a tensor for all samples may have."""
    return {_length(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)} - {1}


def sample_count(batch: Any, caller: str) -> int:
    """The number of samples: the length of the first tensor that is not one for all samples."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not any(leaf.dim() for leaf in tensors):
        raise TypeError(
            f"{caller}: a batch is a tensor, a tuple with the inputs first, or a dict of tensors, "
            f"got {type(batch).__name__}"
        )
    return next((length for leaf in tensors if (length := _length(leaf)) != 1), 1)


def _joined(chunks: list[Any]) -> list[Any]:
    """Neighbouring batches of the same shapes and types put together."""
    groups: list[list[Any]] = []
    for chunk in chunks:
        if groups and _form(groups[-1][0]) == _form(chunk) and _per_sample(groups[-1][0]):
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return [group[0] if len(group) == 1 else _concatenated(group) for group in groups]


def _per_sample(batch: Any) -> bool:
    """Whether every tensor of a batch has as many entries."""
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return all(leaf.dim() for leaf in leaves) and len({len(leaf) for leaf in leaves}) == 1


def _form(batch: Any) -> tuple[Any, ...]:
    """What batches that are put together have in common; other objects are not looked into."""
    leaves, structure = tree_flatten(batch)
    form: list[Any] = [structure, _per_sample(batch)]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            form.append((leaf.dtype, leaf.device, tuple(leaf.shape[1:])))
        else:
            form.append(leaf if isinstance(leaf, (str, int, float, type(None))) else id(leaf))
    return tuple(form)


def _concatenated(group: list[Any]) -> Any:
    leaves = [tree_flatten(batch)[0] for batch in group]
    structure = tree_flatten(group[0])[1]
    joined = [
        torch.cat(column) if isinstance(column[0], Tensor) else column[0]
        for column in zip(*leaves, strict=True)
    ]
    return tree_unflatten(joined, structure)
