"""sd-mecha's recipes on nlm: merge methods, and the alignment of whole state dicts.

Importing it registers the methods; recipes name them like the host's own, as text too::

    import sd_mecha
    from nlm.integrations.sd_mecha import nlm_align, nlm_ties

    base, a, b = (sd_mecha.model(path) for path in paths)
    sd_mecha.merge(nlm_ties(base, a, b, k=0.2, alpha=0.5), output="merged.safetensors")
    sd_mecha.merge(sd_mecha.weighted_sum(a, nlm_align(a, b, spec="spec.json")), output=...)

What the methods compute is what :mod:`nlm.merge` says of them, one tensor at a time, in the host's
words: ``alpha`` is the factor on the merged task vector, ``k`` the share that TIES keeps,
``probability`` the share that DARE drops, ``weights`` a number for each model ("0.3, 0.7"; one
each by default). Of BatchNorm's running statistics it is the mean, and of integers the base's. For
sd-mecha from 1.1.8, below 1.2.
"""

import inspect
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nlm import align
from nlm._names import is_statistic
from nlm.integrations import _host
from nlm.merge import dropped, linear, slerp, task_arithmetic, ties
from nlm.symmetry import Permutation, PermutationSpec, gather, stacks
from nlm.symmetry import permutation as permutations
from nlm.symmetry.layout import references

__all__ = [
    "nlm_align",
    "nlm_align_expert",
    "nlm_dare",
    "nlm_dare_ties",
    "nlm_linear",
    "nlm_permute",
    "nlm_slerp",
    "nlm_task_arithmetic",
    "nlm_ties",
]

_WHERE = "nlm.integrations.sd_mecha"
_host.check(_WHERE, "sd-mecha", "1.1.8", "1.2")

from sd_mecha import Parameter, StateDict, merge_method  # noqa: E402

if TYPE_CHECKING:
    Model = Mapping[str, Tensor]
    Expert = Mapping[str, Tensor]
    Foundation = Mapping[str, Tensor]
    Host = Any
else:  # the host reads annotations; what is of no space is of the result's, in one method each
    Model, Expert = (Parameter(StateDict[Tensor]) for _ in range(2))
    Foundation = Parameter(StateDict[Tensor], "weight")
    Host = inspect.Parameter.empty  # of what the host itself hands over


@merge_method
def nlm_linear(*models: Tensor, weights: str = "", **kwargs: Host) -> Tensor:
    """The weighted mean of models; the weights need not sum to 1."""
    if not models:
        raise ValueError(f"{_WHERE}: a mean is of one model at least, got none")
    key = kwargs["key"]
    if not models[0].is_floating_point():
        return models[0]
    numbers = _numbers(weights, len(models))
    return linear(_experts(key, models), {key: models[0]}, numbers)[key]


@merge_method
def nlm_slerp(a: Tensor, b: Tensor, alpha: float = 0.5, **kwargs: Host) -> Tensor:
    """The spherical interpolation from one model, alpha = 0, to another, alpha = 1.

    Of the models as they are, as in mergekit; the host's own interpolates directions and norms.
    """
    key = kwargs["key"]
    if not a.is_floating_point() or is_statistic(key):
        return _carried(key, a, (a, b))
    return slerp(_experts(key, (a, b)), {key: a}, alpha)[key]


@merge_method
def nlm_task_arithmetic(
    base: Tensor, *models: Tensor, alpha: float = 1.0, weights: str = "", **kwargs: Host
) -> Tensor:
    """base + alpha * sum of weight * (model - base)."""
    key, numbers = kwargs["key"], _numbers(weights, len(models))
    if not models or not base.is_floating_point() or is_statistic(key):
        return _carried(key, base, models)
    return task_arithmetic(_experts(key, models), {key: base}, alpha, numbers)[key]


@merge_method
def nlm_ties(
    base: Tensor,
    *models: Tensor,
    alpha: float = 1.0,
    k: float = 0.2,
    weights: str = "",
    dialect: str = "mergekit",
    **kwargs: Host,
) -> Tensor:
    """TIES, tensor by tensor: "mergekit", "mergekit_sum" or "peft", see :mod:`nlm.merge.ties`."""
    key, numbers = kwargs["key"], _numbers(weights, len(models))
    _per_tensor(dialect)
    if not models or not base.is_floating_point() or is_statistic(key):
        return _carried(key, base, models)
    return ties(_experts(key, models), {key: base}, k, alpha, numbers, dialect)[key]


@merge_method
def nlm_dare(
    base: Tensor,
    *models: Tensor,
    alpha: float = 1.0,
    probability: float = 0.9,
    weights: str = "",
    rescale: str = "expected",
    seed: int | None = None,
    **kwargs: Host,
) -> Tensor:
    """Task Arithmetic on what random dropping leaves of the task vectors.

    What is dropped follows from the seed (PyTorch's, where none is given), the place of the model
    and the name of the entry: the same for any threads and devices.
    """
    key, numbers = kwargs["key"], _numbers(weights, len(models))
    if not models or not base.is_floating_point() or is_statistic(key):
        return _carried(key, base, models)
    left = dropped(_experts(key, models), {key: base}, probability, _seed(seed), rescale)
    return task_arithmetic(left, {key: base}, alpha, numbers)[key]


@merge_method
def nlm_dare_ties(
    base: Tensor,
    *models: Tensor,
    alpha: float = 1.0,
    probability: float = 0.9,
    weights: str = "",
    rescale: str = "expected",
    dialect: str = "mergekit",
    seed: int | None = None,
    **kwargs: Host,
) -> Tensor:
    """TIES, untrimmed, on what random dropping leaves of the task vectors; see ``nlm_dare``."""
    key, numbers = kwargs["key"], _numbers(weights, len(models))
    _per_tensor(dialect)
    if not models or not base.is_floating_point() or is_statistic(key):
        return _carried(key, base, models)
    left = dropped(_experts(key, models), {key: base}, probability, _seed(seed), rescale)
    return ties(left, {key: base}, 1.0, alpha, numbers, dialect)[key]


class _Together:
    """A method that sees all entries at once: the host calls it once and keeps what is not yet
    asked for."""

    @staticmethod
    def map_keys(builder: Any) -> None:
        keys = tuple(builder.out.keys())
        builder[keys] = builder.keys[keys]


@merge_method(cache_factory=dict)
class nlm_align(_Together):
    """Model ``b`` with its units in the order that brings its weights closest to those of ``a``.

    Parameters
    ----------
    a, b : models of one architecture, which are read as wholes.
    spec : what may be permuted: a file of a :class:`nlm.PermutationSpec`, or a shipped name.
    iters, seed : at most so many visits to every group, in an order that the seed settles.
    strict : with False, entries that the specification does not know stay as they are.

    A head that files leave out because it is tied to the embedding may be missing. The permutation
    is found once in a merge; with the host's ``cache`` once for several merges.
    """

    def __call__(
        self,
        a: Model,
        b: Model,
        spec: str,
        iters: int = 100,
        seed: int = 0,
        strict: bool = True,
        **kwargs: Host,
    ) -> StateDict[Tensor]:
        return _aligned(a, b, None, (spec, iters, seed), strict, kwargs)


@merge_method(cache_factory=dict)
class nlm_align_expert(_Together):
    """An expert, fine-tuned from ``b``, in the order that brings ``b`` closest to ``a``.

    Parameters
    ----------
    a, b : the foundations, which are matched.
    expert : what is permuted: a model, or the difference of two.
    spec, iters, seed, strict : as for ``nlm_align``.
    """

    def __call__(
        self,
        a: Foundation,
        b: Foundation,
        expert: Expert,
        spec: str,
        iters: int = 100,
        seed: int = 0,
        strict: bool = True,
        **kwargs: Host,
    ) -> StateDict[Tensor]:
        return _aligned(a, b, expert, (spec, iters, seed), strict, kwargs)


@merge_method
class nlm_permute:
    """A model in an order that was found before, one entry at a time: no model is held as a whole.

    Parameters
    ----------
    model : a model, or the difference of two.
    alignment : the file that ``nlm align`` or ``AlignmentResult.save`` wrote.
    spec, strict : as for ``nlm_align``; not one with stacks of several entries.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._plan: tuple[PermutationSpec, gather.Gathers] | None = None

    def __call__(
        self, model: Tensor, alignment: str, spec: str, strict: bool = True, **kwargs: Host
    ) -> Tensor:
        with self._lock:
            if self._plan is None:
                self._plan = _opened(alignment, spec)
        plan, gathers = self._plan
        name = kwargs["key"]
        if name not in plan.params:
            if strict:
                raise ValueError(
                    f"{_WHERE}: a permuted model has the entries of its specification, or "
                    f"strict=False, got {name!r} more"
                )
            return model
        alone = replace(plan, params={name: plan.params[name]}, sites={}, verified=None)
        alone.check_state_dict({name: model})
        moves = gathers.of(plan.params[name])
        return gather.apply([model], [moves])[0] if moves else model


def _aligned(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    expert: Mapping[str, Tensor] | None,
    how: tuple[str, int, int],
    strict: bool,
    host: Mapping[str, Any],
) -> dict[str, Tensor]:
    """An expert, or ``b`` itself, in the order that brings ``b`` closest to ``a``; ``how`` is the
    specification, the number of visits and the seed."""
    names = host["key_relation"].outputs
    plan, moved = _loaded(how[0], names), _read("b", b, names)
    found = _found(plan, a, moved, how, strict, host["cache"])
    if expert is not None:
        del moved  # before another whole model is read
        moved = _read("expert", expert, names)
    return plan.apply(found, moved, strict=strict)


def _loaded(spec: str, names: Iterable[str]) -> PermutationSpec:
    """A specification, without a head that files leave out because it is tied to an embedding.

    Else what is missing stays, to be refused. Tied are matrices of one layout, of words by units.
    """
    plan = PermutationSpec.load(spec)
    there = {*names, *plan.stacks}
    written = {
        dims
        for name, dims in plan.params.items()
        if name in there and len(dims) == 2 and not any(references(dims[0]))
    }
    params = {n: dims for n, dims in plan.params.items() if n in there or dims not in written}
    return replace(plan, params=params)


def _opened(alignment: str, spec: str) -> tuple[PermutationSpec, gather.Gathers]:
    plan = PermutationSpec.load(spec)
    if plan.stacks:
        raise ValueError(
            f"{_WHERE}: a specification by which single entries are permuted has no stacks of "
            f"several, got {next(iter(plan.stacks))!r}; nlm_align takes it"
        )
    found = permutations.check(plan.groups, _host.permutation_of(_WHERE, alignment))
    return plan, gather.Gathers(plan.groups, found)


def _found(
    plan: PermutationSpec,
    a: Mapping[str, Tensor],
    model_b: Mapping[str, Tensor],
    key: tuple[str, int, int],
    strict: bool,
    cache: dict[Any, Permutation] | None,
) -> Permutation:
    """The permutation of b's units, or the one that the host's cache has."""
    at = (*key, plan.digest())
    if cache is not None and at in cache:
        return cache[at]
    model_a = _read("a", a, model_b)
    if not strict:
        known = set(stacks.entries(plan.stacks, plan.params))
        model_a, model_b = (
            {name: tensor for name, tensor in model.items() if name in known}
            for model in (model_a, model_b)
        )
    _, iters, seed = key
    found = align.weight_matching(model_a, model_b, plan, max_sweeps=iters, seed=seed)
    if cache is not None:
        cache[at] = found.permutation
    return found.permutation


def _read(who: str, state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Entries of a model; the host leaves out those that are not finite."""
    found = {}
    for name in names:
        try:
            found[name] = state[name]
        except KeyError as error:
            raise ValueError(
                f"{_WHERE}: a model that is aligned has all entries, finite, got none for {name!r} "
                f"of {who}"
            ) from error
    return found


def _experts(key: str, models: Iterable[Tensor]) -> dict[str, dict[str, Tensor]]:
    return {str(place): {key: model} for place, model in enumerate(models)}


def _numbers(weights: str, count: int) -> dict[str, float]:
    """Place of a model -> its weight."""
    given = weights.replace(",", " ").split()
    try:
        numbers = [float(each) for each in given] if given else [1.0] * count
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise ValueError(
            f"{_WHERE}: weights are one number for each model, as in '0.3, 0.7', got {weights!r} "
            f"for {count}"
        )
    return {str(place): number for place, number in enumerate(numbers)}


def _carried(key: str, base: Tensor, models: tuple[Tensor, ...]) -> Tensor:
    """What is not merged: the mean of the models' statistics, else the base's."""
    if not models or not base.is_floating_point() or not is_statistic(key):
        return base
    return linear(_experts(key, models), {key: base}, _numbers("", len(models)))[key]


def _per_tensor(dialect: str) -> None:
    if dialect == "global":
        raise ValueError(
            f"{_WHERE}: the host merges one tensor at a time, and a dialect of TIES does so too "
            f"(mergekit, mergekit_sum, peft), got 'global'"
        )


def _seed(seed: int | None) -> int:
    return torch.initial_seed() if seed is None else seed
