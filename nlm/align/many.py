"""More than two models: a permutation for each, into an order that all of them share.

    maximise over P_1, ..., P_k    sum_{m < n} sum_W  <P_m(W_m), P_n(W_n)>,

the least sum of all squared distances. Each of the three strategies starts where the one before it
ends, or from the models as they are where that is higher:

reference   every model is aligned with the first, whatever the others are
mean        one model after the other, in random order, is aligned with the mean of the others
            in the shared order, until a round gains nothing (Ainsworth, Hayase and Srinivasa, Git
            Re-Basin, arXiv:2209.04836, algorithm 3)
universe    from the reference, Frank-Wolfe steps of all models together
            (:mod:`nlm.align.frank_wolfe`, which is what Crisostomi et al. do, "Cycle-consistent
            multi-model merging", arXiv:2405.17897); the permutations nearest to their end are kept
            if the objective rises, and refined as by "mean"

By activations the sum is that of the correlations that every two permutations match, of all modules
that show units; by both ("dual") that of :mod:`nlm.align.dual`; how, :mod:`nlm.align.pairs` says.

As all maps between models lead through the shared order, they agree round every cycle. Memory: the
state dicts, the sum of all but one of them, and what a descent needs (:mod:`nlm.align.weights`), or
the steps.
"""

import inspect
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nlm._state_dict import StateDict, state_of
from nlm.align.activations import match_seen
from nlm.align.dual import check_share
from nlm.align.joint import Joint
from nlm.align.pairs import correlate_all, factors
from nlm.align.proof import prove
from nlm.align.result import AlignmentReport, AlignmentResult
from nlm.align.scale import on_one_scale
from nlm.align.similarity import Comparison
from nlm.align.variants import restricted
from nlm.align.weights import compared, weight_matching
from nlm.statistics import Data
from nlm.symmetry import AxisGroup, PermutationSpec
from nlm.symmetry.permutation import Permutation, check, compose, inverse

STRATEGIES = ("universe", "mean", "reference")
_BY_WEIGHTS = ("weights", "frank-wolfe")
_METHODS = (*_BY_WEIGHTS, "activations", "dual")
_SEARCH = ("order", "restarts", "layerwise", "normalise")

# what is permuted, the models, their alignments with the first, entries left out of the cost
_Start = tuple[PermutationSpec, Joint, list[AlignmentResult], list[str]]


@dataclass
class JointReport:
    """How the alignment of several models went.

    Attributes
    ----------
    method : "weights", "frank-wolfe", "activations" or "dual".
    strategy : "universe", "mean" or "reference".
    objective : the maximised sum for the models as they are, after the alignments with the first,
        the Frank-Wolfe steps ("universe") and every round ("mean", "universe"). It never falls, but
        with "reference", where it is not what is maximised.
    products : of every pair of models at the end; of a model with itself the squared norm of its
        weights.
    seconds : wall time.
    excluded : entries left out of the objective.
    relaxed : the objective on the convex hull of the permutations, before and after each step
        ("universe").
    alignments : the reports of the alignments with the first model.
    """

    method: str
    strategy: str
    objective: list[float]
    products: list[list[float]]
    seconds: float
    excluded: list[str] = field(default_factory=list)
    relaxed: list[float] = field(default_factory=list)
    alignments: list[AlignmentReport] = field(default_factory=list)


@dataclass
class JointAlignment:
    """A permutation of every model's units, and the report on how they were found.

    Attributes
    ----------
    permutations : of each model, into the shared order. The first one's is the identity, but with
        strategy "universe".
    groups : those of the specification, by id.
    """

    permutations: list[Permutation]
    groups: dict[str, AxisGroup]
    report: JointReport

    def between(self, first: int, second: int) -> Permutation:
        """The permutation of model ``second``'s units that aligns it with model ``first``."""
        back = inverse(self.groups, self.permutations[first])
        return compose(self.groups, self.permutations[second], back)

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Writes the permutations to ``path`` as safetensors, report and groups in the header.

        ``force`` replaces a file that is there.
        """
        from nlm.checkpoint import write_tensors

        tensors = {
            f"{number}.{group}": index
            for number, permutation in enumerate(self.permutations)
            for group, index in permutation.items()
        }
        texts = {
            "report": asdict(self.report),
            "groups": [asdict(group) for group in self.groups.values()],
        }
        header = {name: json.dumps(text) for name, text in texts.items()}
        write_tensors(path, tensors, {"nlm": type(self).__name__, **header}, force)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "JointAlignment":
        """Reads what :meth:`save` wrote to ``path``.

        Raises
        ------
        DamagedFileError, ValueError
            The file is damaged, or holds something else.
        """
        from nlm.checkpoint import read_kind
        from nlm.checkpoint.texts import build, parse_json, whole

        tensors, metadata = read_kind(path, cls.__name__, "nlm.align_many")
        with whole(path, cls.__name__, "nlm.align_many"):
            report = build(JointReport, parse_json(metadata["report"]))
            found = [build(AxisGroup, each) for each in parse_json(metadata["groups"])]
            groups = {each.id: each for each in found}
            permutations: list[Permutation] = [
                {group: tensors[f"{number}.{group}"] for group in groups}
                for number in range(len(report.products))
            ]
            for permutation in permutations:
                check(groups, permutation)
        return cls(permutations, groups, report)


def align_many(
    models: Sequence[nn.Module | Mapping[str, Tensor]],
    spec: PermutationSpec,
    method: str = "weights",
    strategy: str = "universe",
    *,
    data: Data | None = None,
    example_inputs: Any = None,
    seed: int = 0,
    max_sweeps: int = 100,
    max_rounds: int = 100,
    tolerance: float = 1e-9,
    exclude: str | tuple[str, ...] = (),
    progress: Callable[[int, float], None] | None = None,
    **options: Any,
) -> JointAlignment:
    """Finds a permutation of every model's units, into an order that all of them share.

    Parameters
    ----------
    models : two or more of one architecture, modules or (by weights) their state dicts.
    spec : what may be permuted, as for :func:`nlm.align`.
    method : "weights", "frank-wolfe" (of the alignments with the first model; then as "weights"),
        "activations" or "dual", as for :func:`nlm.align`.
    strategy : "universe" (all models together), "mean" (each with the mean of the others) or
        "reference" (each with the first); see :mod:`nlm.align.many`.
    data : for "activations" and "dual", as for :func:`nlm.align`.
    example_inputs : an input of the first model, to prove the specification with.
    seed, max_sweeps, tolerance, exclude : as for :func:`nlm.align`; a round or a step that
        gains less than ``tolerance`` of the objective is the last.
    max_rounds : at most so many alignments of every model with the others.
    progress : called after the alignments with the first model, the steps and each round, with a
        running number and the objective; what it raises cancels.
    options : those of :func:`nlm.align`, for the alignments with the first model; how activations
        are seen, and ``dual``, hold for all pairs of models. ``layerwise`` is False where nothing
        else is said, but with "reference": all are improved together afterwards.

    Returns
    -------
    JointAlignment
        ``spec.apply(found.permutations[n], models[n].state_dict())`` are the models in the shared
        order; ``found.between(m, n)`` aligns model n with model m.

    Raises
    ------
    ValueError
        Fewer than two models, an unknown method or strategy, activations without modules and data,
        and what :func:`nlm.align` raises, as it does other errors.
    TypeError
        An option that :func:`nlm.align` does not have.
    """
    started = time.perf_counter()
    _check(len(models), method, strategy, options)
    if strategy != "reference":
        options.setdefault("layerwise", False)  # all are improved together afterwards
    search: dict[str, Any] = {
        "seed": seed, "max_sweeps": max_sweeps, "tolerance": tolerance, "exclude": exclude,
    }  # fmt: skip
    start = _one_by_one if method in _BY_WEIGHTS or strategy == "reference" else _seen_together
    inside, joint, results, excluded = start(
        models, spec, method, data, example_inputs, search, options
    )
    found = [inside.identity(), *(result.permutation for result in results)]
    steps = 0

    def report(objective: float) -> None:
        nonlocal steps
        steps += 1
        if progress is not None:
            progress(steps, objective)

    if not joint.accept(found) and strategy == "reference":
        joint.move(found)
    report(joint.record())
    relaxed: list[float] = []
    if strategy == "universe":
        relaxed = joint.relax(lambda _, value: report(value), tolerance)
        report(joint.record())
        joint.check()
    if strategy != "reference":
        generator = torch.Generator().manual_seed(seed)
        for _ in range(max_rounds):
            order = torch.randperm(len(models), generator=generator).tolist()
            gained = [joint.improve(number, seed, max_sweeps, tolerance) for number in order]
            report(joint.record())
            joint.check()
            gain = joint.objective[-1] - joint.objective[-2]
            if not any(gained) or gain <= tolerance * abs(joint.objective[-1]):
                break
    permutations = joint.permutations
    unseen = results[0].report.by_weights if method == "activations" else []
    if unseen and strategy != "reference":
        moved = [
            inside.apply(permutation, state_of(model))
            for permutation, model in zip(permutations, models, strict=True)
        ]
        rest = align_many(
            moved, inside.restrict(unseen), "weights", strategy, max_rounds=max_rounds, **search
        )
        permutations = [
            inside.compose(*both) for both in zip(permutations, rest.permutations, strict=True)
        ]
    alignment = JointAlignment(
        [spec.compose(permutation, {}) for permutation in permutations],
        spec.groups,
        JointReport(
            method,
            strategy,
            joint.objective,
            joint.products,
            time.perf_counter() - started,
            excluded,
            relaxed,
            [result.report for result in results],
        ),
    )
    if strategy == "mean":
        alignment.permutations = [alignment.between(0, number) for number in range(len(models))]
    return alignment


def _one_by_one(
    models: Sequence[nn.Module | Mapping[str, Tensor]],
    spec: PermutationSpec,
    method: str,
    data: Data | None,
    example_inputs: Any,
    search: Mapping[str, Any],
    options: Mapping[str, Any],
) -> _Start:
    """The models compared by their weights, and each aligned with the first."""
    from nlm.align import align

    entries, excluded = compared(_named(models), spec, search["exclude"])
    results = [
        align(
            models[0], model, spec, method, data=data,
            example_inputs=None if number else example_inputs, **search, **options,
        )
        for number, model in enumerate(models[1:])
    ]  # fmt: skip
    return spec, Joint(spec, entries, {}, len(models)), results, excluded


def _seen_together(
    models: Sequence[nn.Module | Mapping[str, Tensor]],
    spec: PermutationSpec,
    method: str,
    data: Data | None,
    example_inputs: Any,
    search: Mapping[str, Any],
    options: Mapping[str, Any],
) -> _Start:
    """The models compared by what their modules show, beside their weights or alone."""
    modules = [model for model in models if isinstance(model, nn.Module)]
    if data is None or len(modules) < len(models):
        raise ValueError(
            f"nlm.align_many: the method {method!r} needs modules and data, got "
            f"{', '.join(type(model).__name__ for model in models)} and data={data!r}"
        )
    walk = dict(options)
    by_weights = {name: walk.pop(name) for name in _SEARCH if name in walk}
    heads, residual = walk.pop("heads", "matched"), walk.setdefault("residual", "all")
    dual = walk.pop("dual", 0.5)
    check_share(dual)
    prove(spec, modules[0], example_inputs, data, walk.get("forward"), walk.get("device"))
    inside = restricted(spec, heads, residual)
    entries, excluded = compared(_named(models), inside, search["exclude"])
    seen = correlate_all(modules, inside, data, seed=search["seed"], **walk)
    first, *others = (model.state_dict() for model in modules)
    if method == "dual":
        pairs = {}
        for (one, two), each in seen.items():
            comparisons = [
                Comparison(of[one], of[two], inside.params[name]) for name, of in entries.items()
            ]
            pairs[one, two] = on_one_scale(comparisons, each, inside.groups, dual)
        results = [
            weight_matching(
                first, other, inside, seen=seen[0, number], dual=dual, **search, **by_weights
            )
            for number, other in enumerate(others, 1)
        ]
    else:
        pairs = {pair: each.comparisons for pair, each in seen.items()}
        results = [
            match_seen(first, other, inside, seen[0, number])
            for number, other in enumerate(others, 1)
        ]
        entries, excluded = {}, []
    joint = Joint(inside, entries, factors(pairs, len(models)), len(models))
    return inside, joint, results, excluded


def _named(models: Sequence[nn.Module | Mapping[str, Tensor]]) -> dict[str, StateDict]:
    """The state dicts, by what errors call them."""
    return {f"model {number}": state_of(model) for number, model in enumerate(models)}


def _check(count: int, method: str, strategy: str, options: Mapping[str, Any]) -> None:
    from nlm.align import align

    if unknown := [name for name in options if name not in inspect.signature(align).parameters]:
        raise TypeError(
            f"nlm.align_many: the options are those of nlm.align, got {', '.join(unknown)}"
        )
    for what, names, given in (("method", _METHODS, method), ("strategy", STRATEGIES, strategy)):
        if given not in names:
            raise ValueError(
                f"nlm.align_many: the {what} is one of {', '.join(names)}, got {given!r}"
            )
    if count < 2:
        raise ValueError(f"nlm.align_many: there are at least two models, got {count}")
