"""A merge by any algorithm, corrected for each task by TACT."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from fusion_bench import BaseAlgorithm, LazyStateDict, auto_register_config, import_object
from torch import nn

from nlm.correct import Tact
from nlm.integrations.fusion_bench.pools import (
    WHERE,
    Calibration,
    algorithm_of,
    module_of,
    pool_of,
)


@auto_register_config
class NlmTact(BaseAlgorithm):
    """Merges by another algorithm, and gives each task the activations of its expert.

    The experts are the pool's models: within :class:`NlmRebasin` the aligned ones. Activations are
    seen on their training data, without labels.

    Parameters
    ----------
    inner : the configuration of an algorithm that returns one model, or an algorithm.
    datasets : model -> its training dataset; by default the one of its name.
    max_samples, batch_size, seed : of the data of each task.
    options : passed on to :meth:`nlm.Tact.fit`, such as ``points``.
    collate_fn : see :class:`NlmRebasin`.

    References
    ----------
    Sharma, Roy, Dziugaite: The Non-Local Model Merging Problem, arXiv:2410.12766, section 4.
    """

    def __init__(
        self,
        inner: Any = None,
        datasets: Mapping[str, str] | None = None,
        max_samples: int = 128,
        batch_size: int = 32,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
        collate_fn: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)

    def run(self, modelpool: Any) -> dict[str, Any]:
        """``{"models": {name: module}, "metadata": None}``, as the host's program evaluates it.

        Each is an ordinary module: the corrections stand in its weights where all of them can, and
        run beside its layers else.

        Raises
        ------
        ValueError
            No inner algorithm, one that returns no module, a model without training data, and what
            :meth:`nlm.Tact.fit` raises.
        """
        pool = pool_of(modelpool)
        inner = algorithm_of(self.inner, self)
        experts, lazy = {}, None
        for name in pool.model_names:
            model = pool.load_model(name)
            if lazy is None and isinstance(model, LazyStateDict):
                lazy = model
            held = model is pool._models.get(name)  # the inner algorithm may write to it
            experts[name] = module_of(model) if held or not isinstance(model, nn.Module) else model
        collate = None if self.collate_fn is None else import_object(self.collate_fn)
        count = -(-self.max_samples // self.batch_size)
        of = dict(self.datasets or {})
        data = {}
        for name in experts:
            dataset = of.get(name, name)
            data[name] = list(
                Calibration(pool, [dataset], count, self.batch_size, self.seed, collate)
            )
        merged = inner.run(pool)
        if not isinstance(merged, nn.Module):
            raise ValueError(
                f"{WHERE}: what is corrected is one merged model, got {type(merged).__name__} of "
                f"{type(inner).__name__}"
            )
        if lazy is not None:
            merged = _whole(merged, lazy)
        options = {"max_samples": self.max_samples, **dict(self.options or {})}
        with torch.no_grad():
            tact = Tact.fit(
                merged.eval(), {n: x.eval() for n, x in experts.items()}, data, **options
            )
        plain = tact.inline if tact.unfoldable() else tact.fold
        return {"models": {name: copy.deepcopy(plain(name)) for name in experts}, "metadata": None}


def _whole(merged: nn.Module, start: LazyStateDict) -> nn.Module:
    """A model merged from others like ``start`` as it computes. Of models that are read lazily the
    host's algorithms leave tied weights and buffers that are in no file as memory was.
    """
    if type(merged) is not type(start.meta_module):
        return merged
    found, known = module_of(start), set(start.keys())
    state = {name: tensor for name, tensor in merged.state_dict().items() if name in known}
    found.load_state_dict(state, strict=False)
    return found
