"""Pools whose models are aligned before another algorithm merges them: re-basin for the host."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fusion_bench import BaseAlgorithm, BaseModelPool, auto_register_config, import_object
from torch import nn

from nlm.align import align
from nlm.integrations.fusion_bench.pools import (
    WHERE,
    Calibration,
    algorithm_of,
    aligned_pool,
    module_of,
    pool_of,
)
from nlm.merge import merge
from nlm.statistics.data import batches
from nlm.symmetry import Permutation, PermutationSpec, pretrained, trace

log = logging.getLogger(__name__)

_BASE = "_pretrained_"
_STARTS = ("mean", "reference")


@auto_register_config
class NlmRebasin(BaseAlgorithm):
    """Runs another algorithm on a pool whose units stand in one order.

    Every model is aligned with the reference by its weights (Git Re-Basin), or, where
    ``foundations`` says so, by its foundation: experts that were fine-tuned from other foundations
    are permuted as these are, and their task vectors start from the mean of the aligned
    foundations. The models of the pool stay as they are.

    Parameters
    ----------
    inner : the configuration of an algorithm of the host or of nlm, or an algorithm.
    foundations : expert -> the model of the pool that it was fine-tuned from. Foundations are not
        merged with the experts.
    reference : the model whose order is kept; by default "_pretrained_", else the first foundation,
        else the first model.
    base : with foundations, what "_pretrained_" is for the inner algorithm: their "mean", or the
        "reference".
    spec : a specification's file, or a shipped name; by default it is found in the reference: in
        its configuration, where it is one of transformers, else traced on calibration data.
    matching : the method of :func:`nlm.align`: "weights", "frank-wolfe", "activations" or "dual".
        Those that see activations, and the tracing of other models than transformers', use training
        data.
    options : passed on to :func:`nlm.align`.
    datasets : the training datasets of the pool that are used; by default all.
    num_batches, batch_size, seed : of each of them.
    collate_fn : the name of a function that makes a batch of its samples, where PyTorch's own does
        not do; a batch is what the model takes first, a tuple with that first, or keywords.

    References
    ----------
    Ainsworth, Hayase, Srinivasa: Git Re-Basin, arXiv:2209.04836. Sharma, Roy, Dziugaite: The
    Non-Local Model Merging Problem, arXiv:2410.12766.
    """

    def __init__(
        self,
        inner: Any = None,
        foundations: Mapping[str, str] | None = None,
        reference: str | None = None,
        base: str = "mean",
        spec: str | None = None,
        matching: str = "weights",
        options: Mapping[str, Any] | None = None,
        datasets: Sequence[str] | None = None,
        num_batches: int = 4,
        batch_size: int = 32,
        seed: int = 0,
        collate_fn: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)

    def run(self, modelpool: Any) -> Any:
        """What the inner algorithm makes of the aligned pool.

        Raises
        ------
        ValueError
            No inner algorithm, a model that the pool lacks, no training data where it is needed,
            and what :func:`nlm.align` raises.
        """
        pool = pool_of(modelpool)
        inner = algorithm_of(self.inner, self)
        return inner.run(self.aligned(pool))

    @torch.no_grad()
    def aligned(self, pool: BaseModelPool) -> BaseModelPool:
        """The pool with its models in the reference's order, permuted as they are loaded."""
        if self.base not in _STARTS:
            raise ValueError(f"{WHERE}: the base is one of {', '.join(_STARTS)}, got {self.base!r}")
        foundations = {str(k): str(v) for k, v in (self.foundations or {}).items()}
        of = {name: name for name in pool.all_model_names} | foundations
        reference = self._reference(pool, foundations)
        self._check(pool, foundations, reference)
        module = _module(pool, reference)
        data = self._data(pool)
        spec = self._specification(module, data)
        found: dict[str, Permutation] = {reference: {}}
        own = [*pool.model_names, *([_BASE] if pool.has_pretrained else [])]
        needed = foundations.values() if foundations else own
        for name in dict.fromkeys(needed):
            if name not in found:
                other = _module(pool, name)
                result = align(
                    module,
                    other,
                    spec,
                    self.matching,
                    data=data,
                    seed=self.seed,
                    **dict(self.options or {}),
                )
                found[name] = result.permutation
                log.info("aligned %s with %s: %s", name, reference, result.report)
        permutations = {name: found[each] for name, each in of.items() if found.get(each)}
        base = None
        if foundations and self.base == "mean":
            of_base = {name: found[name] for name in foundations.values()}
            base = self._mean(pool, spec, of_base, module)
        elif foundations and reference != _BASE:
            base = module_of(module)
        left_out = [name for name in foundations.values() if name not in foundations]
        return aligned_pool(pool, spec, permutations, left_out, base)

    def _reference(self, pool: BaseModelPool, foundations: Mapping[str, str]) -> str:
        if self.reference is not None:
            return self.reference
        if pool.has_pretrained:
            return _BASE
        return next(iter([*foundations.values(), *pool.model_names]), "")

    def _check(self, pool: BaseModelPool, foundations: Mapping[str, str], reference: str) -> None:
        known = pool.all_model_names
        for name in (reference, *foundations, *foundations.values()):
            if name not in known:
                raise ValueError(
                    f"{WHERE}: reference and foundations name models of the pool "
                    f"({', '.join(known) or 'none'}), got {name!r}"
                )
        experts = [name for name in pool.model_names if name not in foundations.values()]
        if foundations and (missing := [name for name in experts if name not in foundations]):
            raise ValueError(f"{WHERE}: every expert has a foundation, got none for {missing[0]!r}")

    def _data(self, pool: BaseModelPool) -> list[Any] | None:
        """Batches of the pool's training data, drawn once; None where it has none."""
        names = self.datasets if self.datasets is not None else pool.train_dataset_names
        if not names and self.matching in ("weights", "frank-wolfe"):
            return None
        collate = None if self.collate_fn is None else import_object(self.collate_fn)
        return list(
            Calibration(pool, list(names), self.num_batches, self.batch_size, self.seed, collate)
        )

    def _specification(self, module: nn.Module, data: list[Any] | None) -> PermutationSpec:
        """Proven on the reference."""
        spec = None if self.spec is None else PermutationSpec.load(self.spec)
        if hasattr(module, "config") and hasattr(module, "from_pretrained"):
            inputs = pretrained.make_inputs(module)
            if spec is None:
                spec = pretrained.trace_config(module.config, type(module))
            if not spec.proven:
                spec.verify(module, (), inputs)
            return spec
        if data is None:
            if spec is not None and spec.proven:
                return spec
            raise ValueError(
                f"{WHERE}: what may be permuted in a {type(module).__name__} is found and proven "
                f"on inputs: the pool needs train_datasets, or spec a proven specification"
            )
        batch = next(batches(data, 32, caller=WHERE))
        if isinstance(batch, Mapping):
            return spec or trace(module, (), dict(batch))
        example = batch[0] if isinstance(batch, (tuple, list)) else batch
        return spec or trace(module, example)

    def _mean(
        self,
        pool: BaseModelPool,
        spec: PermutationSpec,
        found: Mapping[str, Permutation],
        like: nn.Module,
    ) -> nn.Module:
        """The mean of the aligned foundations."""
        states = {}
        for name, permutation in found.items():
            states[name] = spec.apply(permutation, _module(pool, name).state_dict())
        base = module_of(like)
        base.load_state_dict(dict(merge(states, method="linear")))
        return base


@auto_register_config
class NlmActivationMatching(NlmRebasin):
    """The same by what units compute on the pool's training data, not by their weights.

    Parameters
    ----------
    inner, foundations, reference, base, spec, options, collate_fn : see :class:`NlmRebasin`.
    datasets, num_batches, batch_size, seed : of the training data on which activations are seen.

    References
    ----------
    Li et al., arXiv:1511.07543. Ainsworth, Hayase, Srinivasa, arXiv:2209.04836, section 3.1.
    """

    def __init__(
        self,
        inner: Any = None,
        foundations: Mapping[str, str] | None = None,
        reference: str | None = None,
        base: str = "mean",
        spec: str | None = None,
        matching: str = "activations",
        options: Mapping[str, Any] | None = None,
        datasets: Sequence[str] | None = None,
        num_batches: int = 8,
        batch_size: int = 32,
        seed: int = 0,
        collate_fn: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            inner, foundations, reference, base, spec, matching, options, datasets, num_batches,
            batch_size, seed, collate_fn, **kwargs,
        )  # fmt: skip


def _module(pool: BaseModelPool, name: str) -> nn.Module:
    """A model of a pool, to be read; with all its entries, where its files leave out tied ones."""
    model = pool.load_model(name)
    return model if isinstance(model, nn.Module) else module_of(model)
