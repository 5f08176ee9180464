"""What a model pool of the host holds: weights, data, and models in another order of units."""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from fusion_bench import BaseAlgorithm, BaseModelPool, LazyStateDict, instantiate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nlm.symmetry import Permutation, PermutationSpec, gather, stacks
from nlm.symmetry import permutation as permutations

WHERE = "nlm.integrations.fusion_bench"
Model: TypeAlias = Any  # nn.Module or LazyStateDict


def pool_of(models: Any) -> BaseModelPool:
    """The pool, or one of the models that were given by name or in a list."""
    return models if isinstance(models, BaseModelPool) else BaseModelPool(models)


def state_of(model: Model) -> Mapping[str, Tensor]:
    """The weights of a model; those that are read lazily take no memory of their own.

    Where they are as they lie in a file, they are its pages, opened once.
    """
    if not isinstance(model, LazyStateDict):
        return model.state_dict()
    as_in_file = type(model) in (LazyStateDict, ReadState) and model._torch_dtype is None
    return dict(model.items()) if as_in_file and str(model._device) == "cpu" else model


def module_of(model: Model) -> nn.Module:
    """A module that may be written to, with the weights of a model.

    What is read lazily is loaded as its class loads it, so that buffers that are in no file are
    those of the model.

    Raises
    ------
    ValueError
        A lazy state dict without the class of its model.
    """
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    meta = model.meta_module
    if meta is None:
        raise ValueError(
            f"{WHERE}: weights that are read lazily name the class of their model "
            f"(meta_module_class), got none for {str(model.checkpoint)!r}"
        )
    if hasattr(meta, "from_pretrained"):
        dtype = model._torch_dtype or "auto"
        module = type(meta).from_pretrained(model._local_path, dtype=dtype)
        if model.__dict__.get("_is_moved", False):
            found = module.load_state_dict(dict(model.items()), strict=False)
            if found.unexpected_keys:  # named in the file as in another class, of its base say
                raise ValueError(
                    f"{WHERE}: models that are aligned and read lazily name their entries as "
                    f"{type(meta).__name__} does, got {found.unexpected_keys[0]!r} in "
                    f"{str(model.checkpoint)!r}"
                )
        return module
    module = copy.deepcopy(meta).to_empty(device=model._device)
    module.load_state_dict(dict(model.items()), strict=False)
    return module


def own_module(pool: BaseModelPool, name: str, model: Model) -> nn.Module:
    """The same for a model that a pool has loaded, without a copy where it is nobody else's."""
    held = isinstance(pool._models.get(name), nn.Module) and not isinstance(pool, _Aligned)
    return model if isinstance(model, nn.Module) and not held else module_of(model)


def algorithm_of(inner: Any, outer: BaseAlgorithm) -> BaseAlgorithm:
    """The algorithm that a configuration names, in the program of the one that runs it."""
    if inner is None:
        raise ValueError(f"{WHERE}: there is an inner algorithm, got inner=None")
    found = inner if isinstance(inner, BaseAlgorithm) else instantiate(inner, _recursive_=False)
    for name in ("_program", "_fabric_instance"):
        if hasattr(found, name) and hasattr(outer, name):
            setattr(found, name, getattr(outer, name))
    return found


class Calibration:
    """Batches of a pool's training data, the same each time it is iterated.

    Parameters
    ----------
    pool : its training datasets.
    names : which of them; their batches take turns.
    batches : so many of each at most.
    size : samples of a batch.
    seed : of the samples that are drawn.
    collate : makes a batch of samples; by default PyTorch's way.
    """

    def __init__(
        self, pool: BaseModelPool, names: Sequence[str], batches: int, size: int, seed: int,
        collate: Any = None,
    ) -> None:  # fmt: skip
        known = pool.train_dataset_names
        if missing := [name for name in names if name not in known] or ([] if names else ["any"]):
            raise ValueError(
                f"{WHERE}: activations are seen on training datasets of the pool "
                f"(train_datasets: {', '.join(known) or 'none'}), got none for {missing[0]!r}"
            )
        self._datasets = [pool.load_train_dataset(name) for name in names]
        self._batches, self._size, self._seed, self._collate = batches, size, seed, collate

    def __iter__(self) -> Iterator[Any]:
        loaders = [iter(self._loader(dataset)) for dataset in self._datasets]
        for _ in range(self._batches):
            yield from (batch for each in loaders if (batch := next(each, None)) is not None)

    def _loader(self, dataset: Any) -> DataLoader:
        seeded = torch.Generator().manual_seed(self._seed)
        return DataLoader(
            dataset, self._size, shuffle=True, collate_fn=self._collate, generator=seeded
        )


class ReadState(LazyStateDict):
    """Weights that are read lazily, for those of the host's algorithms too that ask them for a
    state dict as they ask a module (``simple_average``)."""

    def state_dict(self, prefix: str = "", keep_vars: bool = False) -> Any:
        found = super().state_dict(keep_vars)
        return {f"{prefix}{name}": found[name] for name in found} if prefix else found


class AlignedState(ReadState):
    """Weights that are read lazily and in another order of units. Made by :func:`aligned_state`."""

    _spec: PermutationSpec
    _gathers: gather.Gathers

    def _load_tensor_from_checkpoint_file(
        self, checkpoint_file: str, key: str, update_cache: bool = True
    ) -> Tensor:
        owner = stacks.stack_of(self._spec.stacks).get(key, key)
        if owner not in self._spec.params:
            raise ValueError(
                f"{WHERE}: an aligned model has the entries of its specification, got {key!r}"
            )
        layouts = self._spec.params[owner]
        of = {owner: self._spec.stacks[owner]} if owner in self._spec.stacks else {}
        state = {name: self._read(name) for name in of.get(owner, (key,))}
        if not (plan := self._gathers.of(layouts)):
            return state[key]
        moved = gather.apply(stacks.joined(of, state).values(), [plan])
        return stacks.separated(of, {owner: moved[0]})[key]

    def _read(self, key: str) -> Tensor:
        file = os.path.join(self._local_path, self._index[key])
        return LazyStateDict._load_tensor_from_checkpoint_file(self, file, key, False)


def aligned_state(
    state: LazyStateDict, spec: PermutationSpec, permutation: Permutation
) -> LazyStateDict:
    """The same weights in another order of units; nothing is read yet, but of pickled files."""
    found = copy.copy(state)
    found._is_moved = True
    if found._state_dict_cache:  # all of a pickled file
        known = {name: found[name] for name in found}
        there = {
            name: layouts
            for name, layouts in spec.params.items()
            if all(entry in known for entry in spec.stacks.get(name, (name,)))
        }
        of = {name: spec.stacks[name] for name in there if name in spec.stacks}
        own = replace(spec, params=there, stacks=of, sites={}, verified=None)
        found._state_dict_cache = own.apply(permutation, known)
        found.__class__ = ReadState
        return found
    found.__class__ = AlignedState
    found._spec = spec
    found._gathers = gather.Gathers(spec.groups, permutations.check(spec.groups, permutation))
    return found


class _Aligned(BaseModelPool):
    """A pool whose models are permuted as they are loaded. Made by :func:`aligned_pool`."""

    _spec: PermutationSpec
    _permutations: Mapping[str, Permutation]
    _left_out: tuple[str, ...]
    _base: nn.Module | None

    @property
    def has_pretrained(self) -> bool:
        return self._base is not None or super().has_pretrained

    @property
    def model_names(self) -> list[str]:
        return [name for name in super().model_names if name not in self._left_out]

    def load_model(self, model_name_or_config: Any, *args: Any, **kwargs: Any) -> Any:
        name = model_name_or_config
        if name == "_pretrained_" and self._base is not None:
            return copy.deepcopy(self._base)
        model = super().load_model(name, *args, **kwargs)
        if not isinstance(name, str):
            return model
        permutation = self._permutations.get(name, {})
        if isinstance(model, LazyStateDict) and permutation:
            return aligned_state(model, self._spec, permutation)
        if type(model) is LazyStateDict:
            model.__class__ = ReadState
        if isinstance(model, LazyStateDict):
            return model
        if isinstance(self._models.get(name), nn.Module):  # the caller's own stays as it is
            model = copy.deepcopy(model)
        if permutation:
            model.load_state_dict(self._spec.apply(permutation, model.state_dict()))
        return model


def aligned_pool(
    pool: BaseModelPool,
    spec: PermutationSpec,
    permutations: Mapping[str, Permutation],
    left_out: Sequence[str] = (),
    base: nn.Module | None = None,
) -> BaseModelPool:
    """A pool of the same kind, with models permuted as they are loaded; each load is a copy.

    Parameters
    ----------
    permutations : model -> its permutation; others stay in order.
    left_out : models that the pool does not count among those to merge.
    base : what "_pretrained_" is, instead of the pool's.
    """
    found = copy.copy(pool)
    found.__class__ = type(f"Aligned{type(pool).__name__}", (_Aligned, type(pool)), {})
    found._spec, found._permutations = spec, permutations
    found._left_out, found._base = tuple(left_out), base
    return found
