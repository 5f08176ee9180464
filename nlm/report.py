"""Measuring what ``nlm report`` shows of a merge: :func:`merge_report`, on models and data.

``nlm demo --json`` and ``nlm align --json`` write files of the same form (:class:`Report`), and so
does ``json.dump`` of what :func:`merge_report` returns.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from nlm._info import info
from nlm._results import Alignment, Barrier, Cell, Group, Layers, Report, Surface
from nlm.align import AlignmentReport
from nlm.correct import Correction, correct, default_points
from nlm.evaluate import (
    BarrierCurve,
    accuracy,
    landscape,
    layer_statistics,
    loss_barrier,
    normalized_accuracy,
    projection,
)
from nlm.evaluate.accuracy import outputs_of
from nlm.merge import Merged
from nlm.pipeline import Aligned, Choice
from nlm.statistics import Data, Forward, Mask, batches
from nlm.statistics.data import labelled
from nlm.symmetry import PermutationSpec


class Clock:
    """Seconds per stage and in all."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return time.perf_counter() - self._start


def cell(scores: Mapping[str, float], scale: float) -> Cell:
    """Of what :func:`nlm.evaluate.normalized_accuracy` returns."""
    tasks = {name: score for name, score in scores.items() if name not in {"average", "worst"}}
    return {
        "average": scores["average"],
        "worst": scores["worst"],
        "scale": scale,
        "tasks": tasks,
    }


def layers(
    models: Mapping[str, tuple[nn.Module, Mapping[str, nn.Module]]],
    points: Mapping[str, int],
    data: Mapping[str, Data],
    **options: Any,
) -> Layers:
    """Means over the tasks of layer statistics; models come with the experts they are held to."""
    found: Layers = {"points": list(points), "variance_ratio": {}, "relative_distance": {}}
    for name, (model, experts) in models.items():
        every = [
            layer_statistics(model, expert, points, data[task], task=task, **options)
            for task, expert in experts.items()
        ]
        for what in ("variance_ratio", "relative_distance"):
            columns = [getattr(statistics, what) for statistics in every]
            found[what][name] = [
                sum(column[point] for column in columns) / len(columns) for point in points
            ]
    return found


def barriers(curves: Mapping[str, BarrierCurve]) -> Barrier:
    """Of what :func:`nlm.evaluate.loss_barrier` returns, at the same positions."""
    return {
        "lambda": next(iter(curves.values())).positions,
        "loss": {name: curve.losses for name, curve in curves.items()},
        "barrier": {name: curve.barrier for name, curve in curves.items()},
    }


def alignment_of(report: AlignmentReport, spec: PermutationSpec | None = None) -> Alignment:
    """How an alignment went; of a specification also what its groups are."""
    found: Alignment = asdict(report)  # type: ignore[assignment]
    if spec is not None:
        found["groups"] = {}
        for name, counts in report.histogram.items():
            group = spec.groups[name]
            of = f" in {group.parents[-1]}" if group.parents else ""
            found["groups"][name] = Group(units=f"{sum(counts)} units{of}", origin=group.origin)
    return found


def merge_report(
    choice: Choice,
    aligned: Aligned,
    data: Mapping[str, Data],
    *,
    correction: str = "tact",
    calibration: Mapping[str, Data] | None = None,
    correct_options: Mapping[str, Any] | None = None,
    foundations: Sequence[nn.Module] = (),
    foundation_data: Data | None = None,
    spec: PermutationSpec | None = None,
    points: Mapping[str, int] | None = None,
    grid: int = 11,
    projected: int = 2,
    max_samples: int = 200,
    forward: Forward | None = None,
    mask: Mask | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Report:
    """Measures what a page on a merge shows.

    Parameters
    ----------
    choice, aligned : what :func:`nlm.merge_nonlocal` returns; of another merge they are
        ``Choice(model, merged, scale, {})`` and ``Aligned(base, experts, [])``.
    data : task -> labelled test batches, used whole for the accuracies.
    correction : the one that ``choice.model`` has; "none" where it has none.
    calibration : with it the landscape is drawn also with the correction fitted at every place.
    correct_options : passed on to its fit, as in :func:`nlm.pipeline.choose`.
    foundations, foundation_data : the foundations as they were and labelled batches of a task that
        all of them do: with both, the loss between them is measured.
    spec : of the alignment: with it the page says where the units of each group are.
    points : where layers are compared, module name -> channel dimension; by default where the
        correction stands, or :func:`nlm.correct.default_points`. The last is what is projected.
    grid : places along each side of the landscape of the first two tasks; 0 for none.
    projected : how many tasks, from the first, are projected (this needs scikit-learn).
    max_samples : per task, for layers, landscape and projections.
    forward, mask, device : see :mod:`nlm.statistics.data`.
    progress : called with what is being done and the share done; what it raises cancels.

    Raises
    ------
    ValueError
        An expert without data, and what the functions of :mod:`nlm.evaluate` raise.

    Examples
    --------
    >>> choice, aligned = nlm.merge_nonlocal(...)  # doctest: +SKIP
    >>> report = merge_report(choice, aligned, test, calibration=calibration)  # doctest: +SKIP
    >>> Path("run.json").write_text(json.dumps(report))  # doctest: +SKIP
    """
    experts = aligned.experts
    if lost := [task for task in experts if task not in data]:
        raise ValueError(
            f"nlm.report: there is test data for every expert, got none for {', '.join(lost)}"
        )
    clock = Clock()

    def tell(what: str, share: float) -> None:
        if progress is not None:
            progress(what, share)

    tell("accuracies", 0.0)
    samples = {task: list(batches(data[task], None, device, "nlm.report")) for task in experts}
    models: dict[str, nn.Module] = {"none": choice.merged.model(next(iter(experts.values())))}
    if correction != "none":
        models[correction] = choice.model
    own = _own(experts, samples, forward)
    scores = {name: _kept(model, own, samples, forward) for name, model in models.items()}
    best = scores[list(models)[-1]]
    report: Report = {
        "title": f"{len(own)} experts, merged into one model",
        "lead": f"The merged model keeps {best['average']:.2f} of its experts' accuracy on average "
        f"and {best['worst']:.2f} in the worst task.",
        "tasks": list(own),
        "experts": own,
        "settings": {
            "merged": {str(len(own)): {n: cell(each, choice.scale) for n, each in scores.items()}}
        },
        "alignment": _alignments(aligned, spec),
        "run": {
            **({"merger": choice.method} if choice.method else {}),
            "correction": correction,
            choice.tried: choice.scale,
            **{f"validation at {choice.tried} {at:g}": each for at, each in choice.scores.items()},
            **_amounts(samples, max_samples),
            **({"seconds of merging and choosing": choice.seconds} if choice.seconds else {}),
        },
    }
    clock.lap("accuracies")
    few = {task: list(batches(every, max_samples)) for task, every in samples.items()}
    if points is None:
        points = _points(choice.model, experts, few, forward)
    inputs = few if forward is not None else {
        task: [labelled(batch, "nlm.report")[0] for batch in every] for task, every in few.items()
    }  # fmt: skip
    tell("layers", 0.1)
    report["layers"] = layers(
        {name: (model, experts) for name, model in models.items()}, points, inputs,
        forward=forward, mask=mask,
    )  # fmt: skip
    clock.lap("layers")
    if foundations and foundation_data is not None:
        tell("loss between the foundations", 0.2)
        report["barrier"] = _between(foundations, aligned, foundation_data, forward, device)
        clock.lap("barrier")
    if grid and len(own) > 1:
        kinds = ["none", correction] if calibration and correction != "none" else ["none"]

        def tell_landscape(number: int, done: float) -> None:
            tell("landscapes", 0.3 + 0.6 * (number + done) / len(kinds))

        report["landscapes"] = {
            kind: task_landscape(
                choice.merged, aligned, few, kind, calibration, grid=grid, forward=forward,
                progress=partial(tell_landscape, number), **(correct_options or {}),
            )
            for number, kind in enumerate(kinds)
        }  # fmt: skip
        clock.lap("landscapes")
    tell("projections", 0.9)
    report["projections"] = {
        task: projection(
            models, experts[task], list(points)[-1], inputs[task], forward=forward,
            max_samples=max_samples, task=task,
        ).places
        for task in list(own)[:projected]
    }  # fmt: skip
    clock.lap("projections")
    known = info()
    return report | {
        "seconds": clock.total,
        "timings": clock.laps,
        "versions": {**known["versions"], "machine": known["machine"]},
    }


def _own(
    experts: Mapping[str, nn.Module], samples: Mapping[str, Data], forward: Forward | None
) -> dict[str, float]:
    """The experts' accuracies."""
    return {
        task: accuracy(expert, samples[task], forward=forward) for task, expert in experts.items()
    }


def _kept(
    model: nn.Module,
    own: Mapping[str, float],
    samples: Mapping[str, Data],
    forward: Forward | None,
) -> dict[str, float]:
    """The normalised accuracies of a multi-task model."""
    merged = {task: accuracy(model, samples[task], forward=forward, task=task) for task in own}
    return normalized_accuracy(merged, own)


def _points(
    model: nn.Module,
    experts: Mapping[str, nn.Module],
    samples: Mapping[str, list[Any]],
    forward: Forward | None,
) -> Mapping[str, int]:
    if isinstance(model, Correction):
        return model.points
    task, expert = next(iter(experts.items()))
    return default_points(expert, lambda: outputs_of(expert, samples[task][0], forward, {}))


def _amounts(samples: Mapping[str, Sequence[Any]], max_samples: int) -> dict[str, str]:
    """How many test samples a task has, and how many of them the figures see."""
    counts = [sum(len(labelled(batch, "nlm.report")[1]) for batch in s) for s in samples.values()]
    few, many = min(counts), max(counts)
    return {
        "test samples a task": f"{few:,}" if few == many else f"{few:,} to {many:,}",
        "of these in figures, at most": f"{max_samples:,}",
    }


def _alignments(aligned: Aligned, spec: PermutationSpec | None) -> dict[str, Alignment]:
    found: dict[str, Alignment] = {}
    for number, result in enumerate(aligned.results, 2):
        name = result.report.method if number == 2 else f"{result.report.method}, {number}"
        known = (
            spec
            if spec is not None and result.report.histogram.keys() <= spec.groups.keys()
            else None
        )
        found[name] = alignment_of(result.report, known)
    return found


def _between(
    foundations: Sequence[nn.Module],
    aligned: Aligned,
    data: Data,
    forward: Forward | None,
    device: torch.device | str | None,
) -> Barrier:
    """The losses on the lines from the first foundation to the others, before and after."""
    first = foundations[0]
    network = aligned.results[0].receiver(first) if aligned.results else first
    ends, curves = aligned.foundations, {}
    for number, other in enumerate(foundations[1:], 1):
        which = f", {number + 1}" if len(foundations) > 2 else ""
        for name, model, a, b in (
            (f"not aligned{which}", first, first.state_dict(), other.state_dict()),
            (f"aligned{which}", network, ends[0], ends[number]),
        ):
            curves[name] = loss_barrier(model, a, b, data, forward=forward, device=device)
    return barriers(curves)


def task_landscape(
    merged: Merged,
    aligned: Aligned,
    data: Mapping[str, Data],
    correction: str = "none",
    calibration: Mapping[str, Data] | None = None,
    *,
    grid: int = 11,
    forward: Forward | None = None,
    progress: Callable[[float], None] | None = None,
    **options: Any,
) -> Surface:
    """Normalised accuracies of the first two tasks on the plane of their task vectors.

    Parameters
    ----------
    merged : is located on the plane, and has the heads.
    data : task -> labelled batches.
    correction, calibration, options : as for :func:`nlm.pipeline.correct`, at every place anew.
    progress : called with the share done; what it raises cancels.
    """
    experts = dict(list(aligned.experts.items())[:2])
    network, own = next(iter(experts.values())), _own(experts, data, forward)
    heads = {task: merged.heads[task] for task in experts}
    if correction != "none":
        options = {"forward": forward, **options}

    def measure(state: Mapping[str, torch.Tensor]) -> dict[str, float]:
        model = Merged(state, heads, {}, {}).model(network)
        corrected = correct(model, experts, calibration or {}, correction, **options)
        scores = _kept(corrected, own, data, forward)
        return {"average": scores["average"], "worst": scores["worst"]}

    everything = {
        "start": aligned.base,
        **{f"expert {task}": expert.state_dict() for task, expert in experts.items()},
        "merged": merged,
    }
    states = {name: {entry: state[entry] for entry in merged} for name, state in everything.items()}
    tell = None if progress is None else lambda done, every: progress(done / every)
    return asdict(landscape(states, measure, points=grid, progress=tell))  # type: ignore[return-value]
