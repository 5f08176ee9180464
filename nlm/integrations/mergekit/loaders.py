"""Models that the host reads with their units in another order."""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from torch import Tensor

from nlm.align import AlignmentResult
from nlm.integrations._host import permutation_of
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


@contextmanager
def aligned_loaders(
    alignments: Mapping[Any, Alignment], spec: PermutationSpec | str | os.PathLike[str] | None
) -> Iterator[None]:
    """See :func:`nlm.integrations.mergekit.aligned_loaders`."""
    if spec is not None and not isinstance(spec, PermutationSpec):
        spec = PermutationSpec.load(spec)
    plans: dict[Any, tuple[PermutationSpec, Permutation]] = {}
    for name, alignment in alignments.items():
        model, permutation = (
            ModelReference.model_validate(name),
            permutation_of("nlm.integrations.mergekit", alignment),
        )
        own = pretrained.trace_config(model.model.path) if spec is None else spec
        plans[model] = own, permutations.check(own.groups, permutation)

    stock_get, loaders = LoaderCache.get, LoaderCache.loaders
    made: dict[Any, AlignedLoader] = {}

    def get(cache: Any, model: Any) -> Any:
        if model in plans and model not in made:
            made[model] = AlignedLoader(stock_get(cache, model), str(model), *plans[model])
            loaders[model] = made[model]
        return stock_get(cache, model)

    before = {model: loaders.pop(model) for model in plans if model in loaders}
    LoaderCache.get = get
    try:
        yield
        if unread := [str(model) for model in plans if model not in made]:
            raise ValueError(
                f"nlm.integrations.mergekit: an aligned model is read under the name that it has "
                f"in the configuration, got none of the name {unread[0]!r}"
            )
    finally:
        LoaderCache.get = stock_get
        for model in plans:
            loaders.pop(model, None)
        loaders.update(before)
