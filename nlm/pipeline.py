"""The whole way as one call: align the foundations, permute the experts, merge, correct, choose.

Experts of several foundations are brought into the first one's order of units by the permutation
that aligns *their foundations* (not the experts themselves), their task vectors start from the mean
of the aligned foundations, and the factor on the merged task vector is chosen on validation data
after the correction that will be used (Sharma, Roy and Dziugaite, arXiv:2410.12766).
"""

import copy
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nlm._names import as_patterns, matches
from nlm.align import AlignmentResult, JointAlignment, align, align_many
from nlm.align.result import Move
from nlm.correct import expert_moments
from nlm.correct.by_name import USE_MOMENTS, Model, check_correction, check_data, correct
from nlm.evaluate import accuracy, normalized_accuracy
from nlm.merge import Merged, merge
from nlm.statistics import Data, Forward
from nlm.statistics.data import batches
from nlm.symmetry import PermutationSpec
from nlm.symmetry.permutation import Permutation


@dataclass
class Aligned:
    """Foundations and experts in one order of units.

    Attributes
    ----------
    base : theta_init, the mean of the aligned foundations (their heads left out), or one of them.
    experts : task -> aligned expert, a module of its own.
    foundations : aligned state dicts; the first one is as it was, or folded ("orthogonal").
    results : one alignment per further foundation.
    joint : the alignment of all of them together instead.
    """

    base: dict[str, Tensor]
    experts: dict[str, nn.Module]
    foundations: list[dict[str, Tensor]]
    results: list[AlignmentResult] = field(default_factory=list)
    joint: JointAlignment | None = None


@dataclass
class Choice:
    """A merge and correction, with the scale (or the mask thresholds) that validation data chose.

    Attributes
    ----------
    model : call it as ``model(x, task=...)``.
    merged : the merged weights.
    scale : the chosen factor on the task vector; 1 for methods without one.
    scores : what was tried -> average normalised accuracy on validation data. The keys are values
        of ``tried``.
    tried : "scale", or "mask_threshold" for TALL-mask.
    mask_thresholds : task -> its threshold, for TALL-mask alone.
    ridge : the ridge that validation data chose, of several for a refit.
    method, seconds : how it was merged, and how long merging, correcting and choosing took.
    """

    model: Model
    merged: Merged
    scale: float
    scores: dict[float, float]
    tried: str = "scale"
    mask_thresholds: dict[str, float] = field(default_factory=dict)
    ridge: float | None = None
    method: str = ""
    seconds: float | None = None


def align_experts(
    foundations: Sequence[nn.Module],
    experts: Mapping[str, tuple[int, nn.Module]],
    spec: PermutationSpec,
    method: str | None = "weights",
    *,
    heads: str | Sequence[str] = ("head",),
    base: str | int = "mean",
    permutations: Sequence[Permutation] | None = None,
    strategy: str = "reference",
    **options: Any,
) -> Aligned:
    """Aligns foundations with the first one and brings every expert into its order (and gauge).

    Parameters
    ----------
    foundations : modules of one architecture, two or more, trained apart.
    experts : task -> (number of its foundation, the expert).
    spec : what may be permuted, see :func:`nlm.trace`.
    method : as for :func:`nlm.align`, or None to permute nothing (the control).
    base : "mean" of the aligned foundations, or the number of one.
    permutations : permutations found before, one per further foundation, instead of a method.
    strategy : "reference" aligns each foundation with the first one, "mean" and "universe" all of
        them together (:func:`nlm.align_many`); the order kept is that of the first one.
    heads : patterns of entries that are left out of the mean; foundations may lack them.
    options : passed on to :func:`nlm.align` or :func:`nlm.align_many`.

    Raises
    ------
    ValueError
        No foundation or expert, an expert or a base of a foundation that is not there, another
        number of permutations than there are further foundations, and what :func:`nlm.align`
        raises.
    """
    _check_foundations(foundations, experts, base, permutations)
    patterns = as_patterns(heads)
    results: list[AlignmentResult] = []
    moves: list[Move] = [partial(spec.apply, {})]
    joint = None
    if method is not None and permutations is None and strategy != "reference":
        joint = align_many(foundations, spec, method, strategy, **options)
        permutations = [joint.between(0, number) for number in range(1, len(foundations))]
    for number, foundation in enumerate(foundations[1:]):
        if permutations is not None:
            moves.append(partial(spec.apply, permutations[number]))
        elif method is None:
            moves.append(moves[0])
        else:
            results.append(align(foundations[0], foundation, spec, method, **options))
            moves[0], there = results[-1].moves(spec)
            moves.append(there)
    states = [
        move(foundation.state_dict()) for move, foundation in zip(moves, foundations, strict=True)
    ]
    if base == "mean":
        named = {f"foundation {number}": state for number, state in enumerate(states)}
        found = [p for p in patterns if any(matches(name, (p,)) for name in states[0])]
        start = dict(merge(named, method="linear", heads=found))
    else:
        start = {
            name: tensor.clone()
            for name, tensor in states[int(base)].items()
            if not matches(name, patterns)
        }
    receiver = results[0].receiver if results else copy.deepcopy
    moved = {}
    for task, (number, expert) in experts.items():
        moved[task] = receiver(expert)
        moved[task].load_state_dict(moves[number](expert.state_dict()))
    return Aligned(start, moved, states, results, joint)


def _check_foundations(
    foundations: Sequence[nn.Module],
    experts: Mapping[str, tuple[int, nn.Module]],
    base: str | int,
    permutations: Sequence[Permutation] | None,
) -> None:
    count = len(foundations)
    if not count or not experts:
        raise ValueError(
            f"nlm.pipeline: there is at least one foundation and one expert, got {count} and "
            f"{len(experts)}"
        )
    for task, (number, _) in experts.items():
        if not 0 <= number < count:
            raise ValueError(
                f"nlm.pipeline: an expert belongs to one of {count} foundations, got number "
                f"{number} for {task!r}"
            )
    if base != "mean" and not (isinstance(base, int) and 0 <= base < count):
        raise ValueError(
            f"nlm.pipeline: the base is 'mean' or the number of one of {count} foundations, got "
            f"{base!r}"
        )
    if permutations is not None and len(permutations) != count - 1:
        raise ValueError(
            f"nlm.pipeline: there is one permutation per further foundation ({count - 1}), got "
            f"{len(permutations)}"
        )


def choose(
    aligned: Aligned,
    calibration: Mapping[str, Data],
    validation: Mapping[str, Data],
    *,
    method: str = "task_arithmetic",
    correction: str = "tact",
    scales: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0),
    mask_thresholds: Sequence[float] = (0.2, 0.3, 0.4, 0.5, 0.6),
    ridges: Sequence[float | None] = (None,),
    heads: str | Sequence[str] = ("head",),
    max_samples: int | None = 128,
    correct_options: Mapping[str, Any] | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    expert_scores: Mapping[str, float] | None = None,
    progress: Callable[[float, float], None] | None = None,
    **options: Any,
) -> Choice:
    """Merges at each scale, corrects, and keeps the scale that is best on validation data.

    Calibration and validation data are drawn once: loaders that shuffle give the same samples to
    the experts and to every scale.

    Parameters
    ----------
    aligned : what :func:`align_experts` returns.
    calibration : task -> unlabelled batches for the correction; "none" and "data_free" need none.
    validation : task -> (inputs, labels) batches, disjoint from calibration and test data.
    method : as for :func:`nlm.merge`; ``heads``, patterns of entries that each task keeps.
    correction : its name, see :func:`nlm.correct.correct`.
    scales : the factors to try; the linear mean has none, and TALL-mask tries ``mask_thresholds``
        for each task instead.
    ridges : the ridges of a refit to try with each of them; None is the default one.
    max_samples : calibration samples used per task.
    correct_options : passed on to :func:`correct`, such as ``points``, ``mask`` or ``micro_batch``;
        ``moments`` found before spare a run of the experts.
    forward, device : see :mod:`nlm.statistics.data`; both kinds of data go to the device, where the
        models are.
    expert_scores : task -> its expert's accuracy on the validation data, where it is known before.
    progress : called with each scale and its score; what it raises cancels.
    options : passed on to :func:`nlm.merge`.

    Raises
    ------
    ValueError
        No scale to try, an expert without data, an unknown correction, and what the merge, the fit
        and :func:`nlm.evaluate.accuracy` raise.
    """
    if not (scales and mask_thresholds and ridges):
        raise ValueError("nlm.pipeline: there is at least one scale to try, got none")
    check_correction(correction)
    experts = aligned.experts
    uses_data = correction not in ("none", "data_free")
    if uses_data:
        check_data("calibration", calibration, experts)
    check_data("validation", validation, experts)
    network = next(iter(experts.values()))
    samples = _drawn(calibration, experts, max_samples, device) if uses_data else {}
    fitting: dict[str, Any] = {}
    if correction == "data_free":
        fitting = dict(correct_options or {})
    elif correction != "none":
        fitting = {"max_samples": None, "forward": forward, **(correct_options or {})}
        if "moments" not in fitting and correction in USE_MOMENTS:
            shared = {n: fitting[n] for n in ("points", "mask", "forward") if n in fitting}
            fitting["moments"] = expert_moments(experts, samples, max_samples=None, **shared)
    labelled = _drawn(validation, experts, None, device)

    def build(ridge: float | None = None, **setting: Any) -> tuple[Merged, Model]:
        merged = merge(experts, aligned.base, method, heads=heads, **options, **setting)
        model = merged.model(network)
        given = fitting if ridge is None else {**fitting, "ridge": ridge}
        return merged, correct(model, experts, samples, correction, **given)

    known = expert_scores or {}
    own = {
        task: known[task] if task in known else accuracy(expert, labelled[task], forward=forward)
        for task, expert in experts.items()
    }
    tried = "mask_threshold" if method == "tall_mask" else "scale"
    unscaled = dict.fromkeys(("linear", "slerp", "model_stock"), (1.0,))
    values = {"tall_mask": mask_thresholds, **unscaled}.get(method, scales)
    started = time.perf_counter()
    scores: dict[float, float] = {}
    per_task: dict[float, dict[str, float]] = {}
    best: Choice | None = None
    for value, ridge in itertools.product(values, ridges):
        merged, model = build(ridge, **{tried: value})
        found = {
            task: accuracy(model, labelled[task], forward=forward, task=task) for task in experts
        }
        score = normalized_accuracy(found, own)["average"]
        if best is None or score > scores[best.scale]:
            best = Choice(model, merged, value, scores, ridge=ridge)
        if value not in scores or score > scores[value]:
            scores[value], per_task[value] = score, found
        if progress is not None:
            progress(value, score)
    if tried == "mask_threshold":
        chosen = {task: max(per_task, key=lambda value: per_task[value][task]) for task in own}
        merged, model = build(mask_threshold=chosen)
        best = Choice(model, merged, 1.0, scores, tried, chosen)
    assert best is not None  # there is at least one scale
    return replace(best, method=method, seconds=time.perf_counter() - started)


def _drawn(
    data: Mapping[str, Data],
    experts: Mapping[str, nn.Module],
    max_samples: int | None,
    device: torch.device | str | None,
) -> dict[str, Data]:
    """task -> its batches, held in memory."""
    return {
        task: list(batches(data[task], max_samples, device, f"nlm.pipeline ({task})"))
        for task in experts
    }


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
    strategy: str = "reference",
    heads: str | Sequence[str] = ("head",),
    align_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Choice, Aligned]:
    """Aligns, permutes, merges, corrects and chooses the scale: :func:`align_experts`, then
    :func:`choose`, whose arguments ``options`` are (``correct_options``, ``forward`` and ``device``
    among them).

    Parameters
    ----------
    foundations, experts, spec, base, strategy : as for :func:`align_experts`; ``alignment`` is its
        method.
    calibration, validation, method, correction : as for :func:`choose`.
    heads : patterns of entries that every task keeps for itself.
    align_options : passed on to :func:`nlm.align` or :func:`nlm.align_many`.

    Returns
    -------
    Choice, Aligned
        ``choice.model(x, task="digits")`` is the multi-task model.

    Raises
    ------
    ValueError
        What :func:`align_experts` and :func:`choose` raise.
    """
    aligned = align_experts(
        foundations, experts, spec, alignment, heads=heads, base=base, strategy=strategy,
        **(align_options or {}),
    )  # fmt: skip
    choice = choose(
        aligned, calibration, validation, method=method, correction=correction, heads=heads,
        **options,
    )  # fmt: skip
    return choice, aligned
