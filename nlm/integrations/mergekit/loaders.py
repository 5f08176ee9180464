"""Models that the host reads with their units in another order."""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from torch import Tensor

from nlm.align import AlignmentResult
from nlm.integrations import _host
from nlm.symmetry import Permutation, PermutationSpec, gather, pretrained, stacks
from nlm.symmetry import permutation as permutations

Alignment = AlignmentResult | Permutation | str | os.PathLike[str]


class AlignedLoader:
    """The host's loader of a model, for the host a loader too; its tensors are permuted.

    Parameters
    ----------
    loader : of the model as it is.
    model : its name, for messages.
    spec, permutation : what may be permuted, and how each group is.

    Raises
    ------
    ValueError
        The model has entries that the specification lacks.
    """

    def __init__(
        self, loader: Any, model: str, spec: PermutationSpec, permutation: Permutation
    ) -> None:
        extra = sorted(loader.index.tensor_paths.keys() - stacks.entries(spec.stacks, spec.params))
        if extra:
            raise ValueError(
                f"nlm.integrations.mergekit: the files of an aligned model have the entries of its "
                f"specification, got {len(extra)} more in {model!r}, such as {extra[0]!r}"
            )
        self._loader, self._spec = loader, spec
        self._gathers = gather.Gathers(spec.groups, permutation)
        self._owners = stacks.stack_of(spec.stacks)
        self._waiting: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    @property
    def index(self) -> Any:
        return self._loader.index

    def get_tensor(
        self,
        key: str,
        device: str = "cpu",
        aliases: list[str] | None = None,
        raise_on_missing: bool = True,
    ) -> Tensor | None:
        """A tensor in its new order, contiguous where it was moved. For the members of a stack all
        are read at once, and the others wait to be asked for.
        """
        known = [name for name in (key, *(aliases or ())) if name in self.index.tensor_paths]
        if not known:
            return self._loader.get_tensor(key, device, None, raise_on_missing)
        name = known[0]
        with self._lock:
            if name in self._waiting:
                return self._waiting.pop(name).to(device)
        owner = self._owners.get(name, name)
        layouts = self._spec.params[owner]
        of = {owner: self._spec.stacks[owner]} if owner in self._spec.stacks else {}
        state = {each: self._loader.get_tensor(each, device) for each in of.get(owner, (name,))}
        alone = replace(self._spec, params={owner: layouts}, stacks=of, sites={}, verified=None)
        alone.check_state_dict(state)
        plan = self._gathers.of(layouts)
        if not plan:
            return state[name]
        moved = gather.apply(stacks.joined(of, state).values(), [plan])
        found = stacks.separated(of, {owner: moved[0]})
        tensor = found.pop(name)
        with self._lock:
            self._waiting |= found
        return tensor

    def flush(self) -> None:
        with self._lock:
            self._waiting.clear()
        self._loader.flush()


@dataclass
class _Use:
    """A model that is read aligned, as long as ``contexts`` are open; in all threads."""

    spec: PermutationSpec
    permutation: Permutation
    before: Any  # the host's loader of it, where it had one
    contexts: int = 0
    loader: AlignedLoader | None = None

    def is_same(self, spec: PermutationSpec, permutation: Permutation) -> bool:
        return self.spec.digest() == spec.digest() and all(
            torch.equal(index, permutation[group]) for group, index in self.permutation.items()
        )


_uses: dict[ModelReference, _Use] = {}
_lock = threading.RLock()
_stock_get = LoaderCache.get


def _get(cache: LoaderCache, model: ModelReference) -> Any:
    """The host's ``LoaderCache.get``, which opens aligned models as such."""
    with _lock:
        use = _uses.get(model)
        if use is not None and use.loader is None:
            plain = _stock_get(cache, model)
            del cache.loaders[model]
            use.loader = AlignedLoader(plain, str(model), use.spec, use.permutation)
            cache.loaders[model] = use.loader
    return _stock_get(cache, model)


def _begin(model: ModelReference, spec: PermutationSpec, permutation: Permutation) -> None:
    with _lock:
        use = _uses.get(model)
        if use is None:
            before = LoaderCache.loaders.pop(model, None)
            use = _uses[model] = _Use(spec, permutation, before)
        elif not use.is_same(spec, permutation):
            raise ValueError(
                f"nlm.integrations.mergekit: a model is read in one order of units at a time, got "
                f"another alignment of {str(model)!r} while one is in use"
            )
        use.contexts += 1


def _end(model: ModelReference) -> None:
    with _lock:
        use = _uses[model]
        use.contexts -= 1
        if use.contexts == 0:
            del _uses[model]
            LoaderCache.loaders.pop(model, None)
            if use.before is not None:
                LoaderCache.loaders[model] = use.before


def _replace() -> None:
    LoaderCache.get = _get


def _restore() -> None:
    LoaderCache.get = _stock_get


_switch = _host.Switch(_replace, _restore)


@contextmanager
def aligned_loaders(
    alignments: Mapping[Any, Alignment], spec: PermutationSpec | str | os.PathLike[str] | None
) -> Iterator[None]:
    """See :func:`nlm.integrations.mergekit.aligned_loaders`."""
    if spec is not None and not isinstance(spec, PermutationSpec):
        spec = PermutationSpec.load(spec)
    plans: dict[ModelReference, tuple[PermutationSpec, Permutation]] = {}
    for name, alignment in alignments.items():
        model, permutation = (
            ModelReference.model_validate(name),
            _host.permutation_of("nlm.integrations.mergekit", alignment),
        )
        own = pretrained.trace_config(model.model.path) if spec is None else spec
        plans[model] = own, permutations.check(own.groups, permutation)
    with _switch(), ExitStack() as stack:
        for model, plan in plans.items():
            _begin(model, *plan)
            stack.callback(_end, model)
        yield
        if unread := [str(model) for model in plans if _uses[model].loader is None]:
            raise ValueError(
                f"nlm.integrations.mergekit: an aligned model is read under the name that it has "
                f"in the configuration, got none of the name {unread[0]!r}"
            )
