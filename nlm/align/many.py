"""More than two models: a permutation for each, into an order that all of them share.

    maximise over P_1, ..., P_k    sum_{m < n} sum_W  <P_m(W_m), P_n(W_n)>,

the least sum of all squared distances. Each of the three strategies starts where the one before it
ends, or from the models as they are where that is higher:

reference   every model is aligned with the first, whatever the others are
mean        one model after the other, in random order, is aligned with the mean of the others
            in the shared order, until a round gains nothing (Ainsworth, Hayase and Srinivasa, Git
            Re-Basin, arXiv:2209.04836, algorithm 3)
universe    from the reference, Frank-Wolfe steps of all models together
            (:mod:`nlm.align.frank_wolfe`); the permutations nearest to their end are kept if the
            objective rises, and refined as by "mean"

As all maps between models lead through the shared order, they agree round every cycle. Memory: the
state dicts, the sum of all but one of them, and what a descent needs (:mod:`nlm.align.weights`), or
the steps.
"""

import functools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nlm._state_dict import state_of
from nlm.align.descent import Descent
from nlm.align.frank_wolfe import Entry, Polytope
from nlm.align.result import AlignmentReport
from nlm.align.similarity import Comparison, dot, in_order
from nlm.align.weights import compared
from nlm.symmetry import AxisGroup, PermutationSpec
from nlm.symmetry.gather import Gathers
from nlm.symmetry.permutation import Permutation, compose, inverse

STRATEGIES = ("universe", "mean", "reference")
_BY_WEIGHTS = ("weights", "frank-wolfe")


@dataclass
class JointReport:
    """How the alignment of several models went.

    Attributes
    ----------
    method : of the alignments with the first model.
    strategy : "universe", "mean" or "reference".
    objective : the maximised sum for the models as they are, after the alignments with the first,
        the Frank-Wolfe steps ("universe") and every round ("mean", "universe"). It never falls, but
        with "reference", where it is not what is maximised.
    products : of every pair of models at the end; of a model with itself its squared norm.
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
        """Writes the permutations as safetensors, the report and the groups in the header."""
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
        """Reads what :meth:`save` wrote."""
        from nlm.checkpoint import read_kind

        tensors, metadata = read_kind(path, cls.__name__, "nlm.align_many")
        text = json.loads(metadata["report"])
        alignments = [AlignmentReport(**each) for each in text.pop("alignments")]
        report = JointReport(**text, alignments=alignments)
        groups = {
            each["id"]: AxisGroup(**{**each, "parents": tuple(each["parents"])})
            for each in json.loads(metadata["groups"])
        }
        permutations: list[Permutation] = [
            {group: tensors[f"{number}.{group}"] for group in groups}
            for number in range(len(report.products))
        ]
        return cls(permutations, groups, report)


class Joint:
    """Several models and the permutation of each into a shared order, at first the identity.

    Attributes
    ----------
    permutations : of each model.
    products : of every pair of models in the shared order.
    objective : the sum over all pairs, at first and whenever :meth:`record` was called.
    """

    def __init__(
        self, spec: PermutationSpec, entries: Mapping[str, Sequence[Tensor]], count: int
    ) -> None:
        self.spec = spec
        self.entries = entries
        self.move([spec.identity() for _ in range(count)])
        self.objective: list[float] = []
        self.record()

    def record(self) -> float:
        """Notes the objective, and says it."""
        self.objective.append(_over_pairs(self.products))
        return self.objective[-1]

    def move(self, permutations: Sequence[Permutation]) -> None:
        """Goes on to other permutations."""
        self.permutations, self.products = list(permutations), self._products(permutations)

    def accept(self, permutations: Sequence[Permutation]) -> bool:
        """Goes on to other permutations, if the objective rises."""
        before = self.permutations, self.products
        self.move(permutations)
        if _over_pairs(self.products) > _over_pairs(before[1]):
            return True
        self.permutations, self.products = before
        return False

    def improve(self, number: int, seed: int, max_sweeps: int, tolerance: float) -> bool:
        """Aligns one model with the sum of the others, and says whether that gained anything."""
        orders = self._orders(self.permutations)
        comparisons = []
        for name, tensors in self.entries.items():
            layouts = self.spec.params[name]
            wide = torch.promote_types(tensors[number].dtype, torch.float32)
            others = [
                in_order(tensor, layouts, order).to(wide)
                for place, (tensor, order) in enumerate(zip(tensors, orders, strict=True))
                if place != number
            ]
            total = functools.reduce(torch.add, others)
            comparisons.append(Comparison(total, tensors[number].to(wide), layouts))
        descent = Descent(self.spec.groups, comparisons, self.permutations[number])
        descent.run(seed, max_sweeps, tolerance)
        found = list(self.permutations)
        found[number] = descent.permutation
        return self.accept(found)

    def relax(self, progress: Callable[[int, float], None]) -> list[float]:
        """Tries what Frank-Wolfe steps of all models together find; their objectives."""
        entries = [Entry(self.spec.params[name], of) for name, of in self.entries.items()]
        found, relaxed = Polytope(self.spec.groups, entries, self.permutations).solve(progress)
        self.accept([each for each in found if each is not None])
        return relaxed

    def _orders(self, permutations: Sequence[Permutation]) -> list[Gathers]:
        return [Gathers(self.spec.groups, permutation) for permutation in permutations]

    def _products(self, permutations: Sequence[Permutation]) -> list[list[float]]:
        """Of every pair of models in the shared order, exact to float64."""
        orders = self._orders(permutations)
        pairs = [(m, n) for m in range(len(orders)) for n in range(m + 1)]
        terms: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
        for name, tensors in self.entries.items():
            layouts = self.spec.params[name]
            moved = [
                in_order(tensor, layouts, order)
                for tensor, order in zip(tensors, orders, strict=True)
            ]
            for m, n in pairs:
                terms[m, n].append(dot(moved[m], moved[n]))
        return [
            [math.fsum(terms[max(m, n), min(m, n)]) for n in range(len(orders))]
            for m in range(len(orders))
        ]


def _over_pairs(products: Sequence[Sequence[float]]) -> float:
    return math.fsum(value for number, row in enumerate(products) for value in row[:number])


def align_many(
    models: Sequence[nn.Module | Mapping[str, Tensor]],
    spec: PermutationSpec,
    method: str = "weights",
    strategy: str = "universe",
    *,
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
    method : of the alignments with the first model, as for :func:`nlm.align`: "weights" or
        "frank-wolfe"; with strategy "reference" also "activations".
    strategy : "universe" (all models together), "mean" (each with the mean of the others) or
        "reference" (each with the first); see :mod:`nlm.align.many`.
    example_inputs : an input of the first model, to prove the specification with.
    seed, max_sweeps, tolerance, exclude : as for :func:`nlm.align`; a round that gains less than
        ``tolerance`` of the objective is the last.
    max_rounds : at most so many alignments of every model with the others.
    progress : called after the alignments with the first model, the steps and each round, with a
        running number and the objective; what it raises cancels.
    options : passed on to :func:`nlm.align` for the alignments with the first model.

    Returns
    -------
    JointAlignment
        ``spec.apply(found.permutations[n], models[n].state_dict())`` are the models in the shared
        order; ``found.between(m, n)`` aligns model n with model m.

    Raises
    ------
    ValueError
        Fewer than two models, an unknown method or strategy, activations without a reference, and
        what :func:`nlm.align` raises, as it does other errors.
    """
    from nlm.align import align

    started = time.perf_counter()
    _check(len(models), method, strategy)
    names = {f"model {number}": state_of(model) for number, model in enumerate(models)}
    entries, excluded = compared(names, spec, exclude)
    joint = Joint(spec, entries, len(models))
    results = [
        align(
            models[0], model, spec, method, example_inputs=None if number else example_inputs,
            seed=seed, max_sweeps=max_sweeps, tolerance=tolerance, exclude=exclude, **options,
        )
        for number, model in enumerate(models[1:])
    ]  # fmt: skip
    found = [spec.identity(), *(result.permutation for result in results)]
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
        relaxed = joint.relax(lambda _, value: report(value))
        report(joint.record())
    if strategy != "reference":
        generator = torch.Generator().manual_seed(seed)
        for _ in range(max_rounds):
            order = torch.randperm(len(models), generator=generator).tolist()
            gained = [joint.improve(number, seed, max_sweeps, tolerance) for number in order]
            report(joint.record())
            gain = joint.objective[-1] - joint.objective[-2]
            if not any(gained) or gain <= tolerance * abs(joint.objective[-1]):
                break
    alignment = JointAlignment(
        joint.permutations,
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


def _check(count: int, method: str, strategy: str) -> None:
    if count < 2:
        raise ValueError(f"nlm.align_many: there are at least two models, got {count}")
    if strategy not in STRATEGIES:
        raise ValueError(
            f"nlm.align_many: the strategy is one of {', '.join(STRATEGIES)}, got {strategy!r}"
        )
    if method not in (_BY_WEIGHTS if strategy != "reference" else (*_BY_WEIGHTS, "activations")):
        raise ValueError(
            f"nlm.align_many: the method is one of {', '.join(_BY_WEIGHTS)} (with strategy "
            f"'reference' also activations), got {method!r} with strategy {strategy!r}"
        )
