"""Walking over a user's data.

Data is anything that can be iterated again and again and yields batches: a tensor, a tuple or list
with the inputs first, or a dict of keyword arguments.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

Data = Iterable[Any]
Forward = Callable[[nn.Module, Any], Any]
Mask = Callable[[Any], Tensor]


def batches(
    data: Data,
    max_samples: int | None = None,
    device: torch.device | str | None = None,
    caller: str = "nlm",
) -> Iterator[Any]:
    """The batches of some data, on a device, cut after ``max_samples`` samples in all.

    Raises
    ------
    TypeError
        The data is a bare tensor or can be iterated only once.
    ValueError
        There is not a single sample.
    """
    if isinstance(data, (Tensor, Mapping)) or iter(data) is data:
        raise TypeError(
            f"{caller}: data is a re-iterable of batches, such as a list of tensors or a "
            f"DataLoader, got {type(data).__name__}"
        )
    seen = 0
    for batch in data:
        if isinstance(batch, Mapping):
            batch = dict(batch)  # a tokeniser's BatchEncoding among them
        size = _size(batch, caller)
        if max_samples is not None and seen + size > max_samples:
            size = max_samples - seen
            batch = cut(batch, 0, size)
        if size:
            seen += size
            yield batch if device is None else tree_map_only(Tensor, lambda t: t.to(device), batch)
        if seen == max_samples:
            break
    if not seen:
        raise ValueError(f"{caller}: data holds at least one sample, got none")


def cut(batch: Any, start: int, stop: int) -> Any:
    """The samples from ``start`` to ``stop`` of a batch."""
    return tree_map_only(Tensor, lambda tensor: tensor[start:stop], batch)


def micro_batches(
    data: Data,
    size: int | None,
    max_samples: int | None = None,
    device: torch.device | str | None = None,
    caller: str = "nlm",
) -> list[Any]:
    """The samples of some data in batches of ``size``; as many as fit together with None.

    Batches of unequal shapes behind the sample dimension are kept apart.
    """
    chunks = list(batches(data, max_samples, device, caller))
    if size is not None:
        if size < 1:
            raise ValueError(f"{caller}: a micro-batch has at least one sample, got {size}")
        return [
            cut(chunk, start, start + size)
            for chunk in _joined(chunks)
            for start in range(0, _size(chunk, caller), size)
        ]
    return _joined(chunks)


def run(model: nn.Module, batch: Any, forward: Forward | None = None, **kwargs: Any) -> Any:
    """The outputs of a model for a batch: ``forward(model, batch)``, or the obvious call."""
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch, **kwargs)
    if isinstance(batch, (tuple, list)):
        return model(batch[0], **kwargs)
    return model(batch, **kwargs)


def _size(batch: Any, caller: str) -> int:
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors:
        raise TypeError(
            f"{caller}: a batch is a tensor, a tuple with the inputs first, or a dict of tensors, "
            f"got {type(batch).__name__}"
        )
    return len(tensors[0])


def _joined(chunks: list[Any]) -> list[Any]:
    """Neighbouring batches of the same shapes and types put together."""
    groups: list[list[Any]] = []
    for chunk in chunks:
        if groups and _form(groups[-1][0]) == _form(chunk):
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return [group[0] if len(group) == 1 else _concatenated(group) for group in groups]


def _form(batch: Any) -> tuple[Any, ...]:
    return (
        type(batch),
        *((leaf.dtype, tuple(leaf.shape[1:])) if isinstance(leaf, Tensor) else leaf
          for leaf in tree_leaves(batch)),
    )  # fmt: skip


def _concatenated(group: list[Any]) -> Any:
    from torch.utils._pytree import tree_flatten, tree_unflatten

    leaves = [tree_flatten(batch)[0] for batch in group]
    structure = tree_flatten(group[0])[1]
    joined = [
        torch.cat(column) if isinstance(column[0], Tensor) else column[0]
        for column in zip(*leaves, strict=True)
    ]
    return tree_unflatten(joined, structure)
