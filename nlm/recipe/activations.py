"""What the activations of a pass take, from shapes alone: models without weights are run on inputs
without values, and the bytes of what is alive are counted operation by operation."""

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nlm._modules import evaluation
from nlm.recipe.data import BATCH, batch_shapes
from nlm.recipe.methods import BY_WEIGHTS, SAMPLES
from nlm.recipe.modules import hollow_module
from nlm.recipe.opened import Opened
from nlm.recipe.recipe import Recipe

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def activation_bytes(recipe: Recipe, opened: Opened) -> int | None:
    """The most bytes of activations that are alive in one pass of one model of a recipe.

    None where that is not known: no model is run, data comes from a function, or a model cannot be
    run without weights. A correction takes the samples of a task together; what it keeps between
    its points, and an alignment of two models, is not in it.
    """
    found: list[int] = []
    for path, text, samples, most in _passes(recipe, opened):
        try:
            model = hollow_module(path)
            shapes = batch_shapes(text, model, samples, most)
            if shapes is None:
                return None
            found.append(pass_bytes(model, shapes))
        except Exception:  # whatever a model does with values that are not there
            return None
    return max(found) if found else None


def _passes(recipe: Recipe, opened: Opened) -> Iterator[tuple[Path, str, int | None, int]]:
    """(folder, data, the most samples of it, the most of a batch) of each model that is run."""
    align, correct = recipe.align, recipe.correct
    sees = recipe.aligns and align is not None and align.method not in BY_WEIGHTS
    first = next(iter(opened.foundations.values()), None)
    if sees and first is not None and first.folder is not None:
        assert align is not None and align.data is not None
        yield first.path, align.data, align.samples, BATCH
    for name, expert in opened.experts.items():
        if expert.folder is None:
            continue
        own = recipe.expert(name)
        if own.data is not None:
            yield expert.path, own.data, own.samples, BATCH
        if correct is not None and (text := correct.data.get(name)) is not None:
            samples = correct.samples or SAMPLES
            yield expert.path, text, samples, samples
    if recipe.score is not None and opened.start is not None and opened.start.folder is not None:
        yield opened.start.path, recipe.score, None, BATCH


def pass_bytes(model: nn.Module, shapes: Shapes) -> int:
    """The most bytes of results that are alive at a time, besides the weights and the inputs.

    Parameters
    ----------
    model : on the meta device.
    shapes : input -> its shape and type.
    """
    inputs = {name: torch.empty(s, dtype=d, device="meta") for name, (s, d) in shapes.items()}
    known = [*model.parameters(), *model.buffers(), *inputs.values()]
    with evaluation(model), torch.no_grad(), Living(known) as living, _Fused():
        model(**inputs)
    return living.most


class _Fused(TorchFunctionMode):
    """Attention as one operation, which it is where there are values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        query, value = given["query"], given["value"]
        return query.new_empty(*query.shape[:-1], value.shape[-1])


class Living(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, as long as these live.

    Attributes
    ----------
    now, most : bytes alive, and the most that were.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._counted = {each.untyped_storage()._cdata for each in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()  # such as "is no input masked?"
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._count(each.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._counted:
            return
        self._counted.add(address)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._counted.discard(address)
        self.now -= size
