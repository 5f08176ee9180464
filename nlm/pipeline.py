"""The whole way as one call: align the foundations, permute the experts, merge, correct, choose.

Experts of several foundations are brought into the first one's order of units by the permutation
that aligns *their foundations* (not the experts themselves), their task vectors start from the mean
of the aligned foundations, and the factor on the merged task vector is chosen on validation data
after the correction that will be used (Sharma, Roy and Dziugaite, arXiv:2410.12766).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from nlm._multitask import MultiTaskModel
from nlm._state_dict import matches
from nlm.align import AlignmentResult, align
from nlm.correct import Correction, Repair, Tact, expert_moments
from nlm.evaluate import accuracy, normalized_accuracy
from nlm.merge import Merged, merge
from nlm.statistics import Data
from nlm.symmetry import PermutationSpec
from nlm.symmetry.permutation import Permutation

CORRECTIONS = ("none", "tact", "tact_at_once", "repair")
Model = MultiTaskModel | Correction


@dataclass
class Aligned:
    """Foundations and experts in one order of units.

    Attributes
    ----------
    base : theta_init, the mean of the aligned foundations (their heads left out), or one of them.
    experts : task -> aligned expert, a module of its own.
    foundations : aligned state dicts; the first one is as it was.
    results : one alignment per further foundation.
    """

    base: dict[str, Tensor]
    experts: dict[str, nn.Module]
    foundations: list[dict[str, Tensor]]
    results: list[AlignmentResult] = field(default_factory=list)


@dataclass
class Choice:
    """A merge and correction, with the scale that validation data chose.

    Attributes
    ----------
    model : call it as ``model(x, task=...)``.
    merged : the merged weights.
    scale : the chosen factor on the task vector.
    scores : scale -> average normalised accuracy on validation data.
    """

    model: Model
    merged: Merged
    scale: float
    scores: dict[float, float]


def align_experts(
    foundations: Sequence[nn.Module],
    experts: Mapping[str, tuple[int, nn.Module]],
    spec: PermutationSpec,
    method: str | None = "weights",
    *,
    heads: Sequence[str] = ("head",),
    base: str | int = "mean",
    permutations: Sequence[Permutation] | None = None,
    **options: Any,
) -> Aligned:
    """Aligns foundations with the first one and brings every expert into its order.

    Parameters
    ----------
    experts : task -> (number of its foundation, the expert).
    method : as for :func:`nlm.align`, or None to permute nothing (the control).
    base : "mean" of the aligned foundations, or the number of one.
    permutations : permutations found before, one per further foundation, instead of a method.
    options : passed on to :func:`nlm.align`.

    Raises
    ------
    ValueError
        An expert of a foundation that is not there, and what :func:`nlm.align` raises.
    """
    for task, (number, _) in experts.items():
        if not 0 <= number < len(foundations):
            raise ValueError(
                f"nlm.pipeline: an expert belongs to one of {len(foundations)} foundations, got "
                f"number {number} for {task!r}"
            )
    results: list[AlignmentResult] = []
    moves: list[Permutation] = [spec.identity()]
    for number, foundation in enumerate(foundations[1:]):
        if permutations is not None:
            moves.append(permutations[number])
        elif method is None:
            moves.append(spec.identity())
        else:
            results.append(align(foundations[0], foundation, spec, method, **options))
            moves.append(results[-1].permutation)
    states = [
        spec.apply(move, foundation.state_dict())
        for move, foundation in zip(moves, foundations, strict=True)
    ]
    if base == "mean":
        named = {f"foundation {number}": state for number, state in enumerate(states)}
        start = dict(merge(named, method="linear", heads=heads))
    else:
        start = {
            name: tensor for name, tensor in states[int(base)].items() if not matches(name, heads)
        }
    moved = {}
    for task, (number, expert) in experts.items():
        moved[task] = copy.deepcopy(expert)
        moved[task].load_state_dict(spec.apply(moves[number], expert.state_dict()))
    return Aligned(start, moved, states, results)


def correct(
    model: MultiTaskModel,
    experts: Mapping[str, nn.Module],
    calibration: Mapping[str, Data],
    correction: str = "tact",
    **options: Any,
) -> Model:
    """The merged model with one of the corrections: "none", "tact", "tact_at_once" or "repair".

    ``options`` are passed on to :meth:`Tact.fit` or :meth:`Repair.fit`.
    """
    if correction not in CORRECTIONS:
        raise ValueError(
            f"nlm.pipeline: the correction is one of {', '.join(CORRECTIONS)}, got {correction!r}"
        )
    if correction == "none":
        return model
    data = {task: calibration[task] for task in experts}
    if correction == "repair":
        return Repair.fit(model, experts, data, **options)
    mode = "sequential" if correction == "tact" else "at_once"
    return Tact.fit(model, experts, data, mode=mode, **options)


def choose(
    aligned: Aligned,
    calibration: Mapping[str, Data],
    validation: Mapping[str, Data],
    *,
    method: str = "task_arithmetic",
    correction: str = "tact",
    scales: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0),
    mask_thresholds: Sequence[float] = (0.2, 0.3, 0.4, 0.5, 0.6),
    heads: Sequence[str] = ("head",),
    max_samples: int | None = 128,
    progress: Callable[[float, float], None] | None = None,
    **options: Any,
) -> Choice:
    """Merges at each scale, corrects, and keeps the scale that is best on validation data.

    Parameters
    ----------
    calibration : task -> unlabelled batches for the correction.
    validation : task -> (inputs, labels) batches, disjoint from calibration and test data.
    scales : the factors to try; TALL-mask has none and tries ``mask_thresholds`` for each task.
    max_samples : calibration samples used per task.
    progress : called with each scale and its score; what it raises cancels.
    options : passed on to :func:`nlm.merge`.
    """
    if not scales or not mask_thresholds:
        raise ValueError("nlm.pipeline: there is at least one scale to try, got none")
    network = next(iter(aligned.experts.values()))
    samples = {task: calibration[task] for task in aligned.experts}
    fitting: dict[str, Any] = {"max_samples": max_samples}
    if correction != "none":
        fitting["moments"] = expert_moments(aligned.experts, samples, max_samples=max_samples)
    own = {task: accuracy(expert, validation[task]) for task, expert in aligned.experts.items()}

    def build(**setting: Any) -> tuple[Merged, Model]:
        merged = merge(aligned.experts, aligned.base, method, heads=heads, **options, **setting)
        model = merged.model(network)
        return merged, correct(model, aligned.experts, samples, correction, **fitting)

    def validated(model: Model) -> dict[str, float]:
        return {task: accuracy(model, validation[task], task=task) for task in aligned.experts}

    scores: dict[float, float] = {}
    per_task: dict[float, dict[str, float]] = {}
    best: Choice | None = None
    by_mask = method == "tall_mask"
    for value in mask_thresholds if by_mask else scales:
        merged, model = build(**{"mask_threshold" if by_mask else "scale": value})
        per_task[value] = validated(model)
        scores[value] = normalized_accuracy(per_task[value], own)["average"]
        if best is None or scores[value] > scores[best.scale]:
            best = Choice(model, merged, value, scores)
        if progress is not None:
            progress(value, scores[value])
    if by_mask:
        chosen = {task: max(per_task, key=lambda value: per_task[value][task]) for task in own}
        merged, model = build(mask_threshold=chosen)
        return Choice(model, merged, 1.0, scores)
    assert best is not None  # there is at least one scale
    return best


def merge_nonlocal(
    foundations: Sequence[nn.Module],
    experts: Mapping[str, tuple[int, nn.Module]],
    spec: PermutationSpec,
    calibration: Mapping[str, Data],
    validation: Mapping[str, Data],
    *,
    alignment: str | None = "weights",
    method: str = "task_arithmetic",
    correction: str = "tact",
    base: str | int = "mean",
    heads: Sequence[str] = ("head",),
    align_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Choice, Aligned]:
    """Aligns, permutes, merges, corrects and chooses the scale: :func:`align_experts`, then
    :func:`choose`, whose arguments ``options`` are.

    Returns
    -------
    Choice, Aligned
        ``choice.model(x, task="digits")`` is the multi-task model.
    """
    aligned = align_experts(
        foundations, experts, spec, alignment, heads=heads, base=base, **(align_options or {})
    )
    choice = choose(
        aligned, calibration, validation, method=method, correction=correction, heads=heads,
        **options,
    )  # fmt: skip
    return choice, aligned
