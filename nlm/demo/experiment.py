"""The demo's experiment: experts of two unrelated foundations become one multi-task model.

Everything here runs on the trained checkpoints by the public API: trace, align, merge, correct,
evaluate. Three settings are compared, with the same merger and the same corrections:

local      all experts come from foundation A (task vectors from A): the easy problem
nonlocal   experts come from A and B in turn (task vectors from the mean of both), not permuted
permuted   the same, with B and its experts brought into A's order of units first

The scale of the merged task vector is chosen for each of them on validation data after the
correction; test data are only scored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

import nlm
from nlm.align import AlignmentResult, align
from nlm.correct import default_points, expert_moments, linear_probe
from nlm.demo.tasks import TASKS
from nlm.demo.world import Demo, load
from nlm.evaluate import accuracy, ensemble_accuracy, loss_barrier, normalized_accuracy
from nlm.pipeline import Aligned, Choice, align_experts, choose
from nlm.report import Barrier, Cell, Clock, Layers, barriers, cell, layers

Progress = Callable[[str, float], None]

CORRECTIONS = {"plain": "none", "repair": "repair", "tact": "tact", "tact_once": "tact_at_once"}
CONTROLS = ("tact_lambda0", "probe", "probe_full")
CALIBRATION = 128
PROBE_LABELS = 1500
SCALES_TIMES_TASKS = (0.4, 0.8, 1.2, 2.0, 2.8)

_LOADING_SHARE = 0.6


@dataclass
class World:
    """The demo's models and data, and what is measured on them once."""

    demo: Demo
    spec: nlm.PermutationSpec
    alignments: dict[str, AlignmentResult]
    samples: int = CALIBRATION
    experts: dict[tuple[str, int, str], float] = field(default_factory=dict)

    @property
    def calibration(self) -> dict[str, list[torch.Tensor]]:
        return {name: [task.calibration[: self.samples]] for name, task in self.demo.tasks.items()}

    @property
    def validation(self) -> dict[str, Any]:
        return {name: task.validation.batches() for name, task in self.demo.tasks.items()}

    @property
    def test(self) -> dict[str, Any]:
        return {name: task.test.batches() for name, task in self.demo.tasks.items()}

    def origin(self, setting: str, task: str) -> int:
        """The number of the foundation that a task's expert comes from."""
        return 0 if setting == "local" else list(self.demo.tasks).index(task) % 2

    def aligned(self, setting: str, count: int) -> Aligned:
        """The first ``count`` experts of a setting in one order of units.

        ``setting`` is "local", "nonlocal", "permuted" (by weights) or "permuted by activations".
        """
        names = list(self.demo.tasks)[:count]
        experts = {
            name: (number, self.demo.experts[name][number])
            for name in names
            for number in [self.origin(setting, name)]
        }
        if setting == "local":
            return align_experts(self.demo.foundations[:1], experts, self.spec, None)
        if setting == "nonlocal":
            return align_experts(self.demo.foundations, experts, self.spec, None)
        method = "activations" if setting.endswith("activations") else "weights"
        found = self.alignments[method].permutation
        return align_experts(self.demo.foundations, experts, self.spec, permutations=[found])

    def expert_accuracy(
        self, setting: str, names: Sequence[str], part: str = "test"
    ) -> dict[str, float]:
        """The accuracies of a setting's experts on "test" or "validation" data, measured once."""
        scores = {}
        for name in names:
            key = (name, self.origin(setting, name), part)
            if key not in self.experts:
                data = (self.test if part == "test" else self.validation)[name]
                self.experts[key] = accuracy(self.demo.experts[name][key[1]], data)
            scores[name] = self.experts[key]
        return scores

    def score(self, setting: str, model: nn.Module, names: Sequence[str]) -> dict[str, float]:
        """Normalised test accuracies of a multi-task model, "average" and "worst" among them."""
        merged = {name: accuracy(model, self.test[name], task=name) for name in names}
        return normalized_accuracy(merged, self.expert_accuracy(setting, names))


def prepare(
    seed: int = 0, tasks: int = len(TASKS), progress: Progress | None = None, **loading: Any
) -> World:
    """Loads or trains the demo, finds its symmetries and aligns its foundations both ways."""
    demo = load(seed, tasks, progress, **loading)
    first, second = demo.foundations
    spec = nlm.trace(first, demo.pretraining.calibration[:32])
    images = [demo.pretraining.calibration]
    alignments = {
        "weights": align(first, second, spec, "weights", seed=seed, layerwise=False),
        "activations": align(first, second, spec, "activations", data=images),
    }
    return World(demo, spec, alignments)


def compare(
    world: World,
    setting: str,
    count: int,
    method: str = "task_arithmetic",
    corrections: Sequence[str] = tuple(CORRECTIONS),
    controls: Sequence[str] = CONTROLS,
    multiples: Sequence[float] = SCALES_TIMES_TASKS,
    **options: Any,
) -> tuple[dict[str, Cell], dict[str, Choice], Aligned]:
    """Average and worst normalised test accuracy of one setting under every correction.

    The controls are "tact_lambda0" (TACT on theta_init, no task vector in it), and linear probes on
    the merged trunk: "probe" with as many labels as TACT has unlabelled images, "probe_full".
    The scales that are tried are ``multiples`` of 1 / count.
    """
    aligned = world.aligned(setting, count)
    names = list(aligned.experts)
    calibration = {name: world.calibration[name] for name in names}
    validation = world.validation
    choices: dict[str, Choice] = {}
    scores: dict[str, Cell] = {}

    scales = [round(multiple / count, 4) for multiple in multiples]
    known = {"moments": expert_moments(aligned.experts, calibration, max_samples=None)}
    expert_scores = world.expert_accuracy(setting, names, "validation")

    def choose_with(correction: str, scales: Sequence[float]) -> Choice:
        return choose(
            aligned, calibration, validation, method=method, correction=correction,
            scales=scales, max_samples=None, correct_options=known, expert_scores=expert_scores,
            **options,
        )  # fmt: skip

    for name in corrections:
        choices[name] = choose_with(CORRECTIONS[name], scales)
        scores[name] = cell(world.score(setting, choices[name].model, names), choices[name].scale)
    if "tact_lambda0" in controls:
        nothing = choose_with("tact", (0.0,))
        scores["tact_lambda0"] = cell(world.score(setting, nothing.model, names), 0.0)
    for name, labels in (("probe", CALIBRATION), ("probe_full", PROBE_LABELS)):
        if name in controls:
            model = probed(world, choices["plain"], labels)
            scores[name] = cell(world.score(setting, model, names), choices["plain"].scale)
    return scores, choices, aligned


def run(
    seed: int = 0,
    tasks: int = len(TASKS),
    progress: Progress | None = None,
    thorough: bool = False,
    **loading: Any,
) -> dict[str, Any]:
    """The whole demo, as plain numbers.

    Compares at 2, 4 and all tasks; the controls are run at 4 and at all tasks. ``thorough`` adds 6
    tasks, and in every setting the all-at-once statistics and the probe with all labels, which are
    otherwise run on aligned experts only.

    Returns
    -------
    dict
        seconds, seed, tasks, experts, settings (setting -> number of tasks -> correction ->
        average, worst, scale, tasks), layers, barrier, alignment, foundations, timings, versions:
        an :class:`nlm.report.Report`.
    """
    clock = Clock()
    world = prepare(seed, tasks, _share(progress, 0.0, _LOADING_SHARE), **loading)
    clock.lap("models, data and alignment")
    counts = [count for count in ((2, 4, 6) if thorough else (2, 4)) if count < tasks] + [tasks]
    main = {min(4, tasks), tasks}
    settings: dict[str, dict[str, Any]] = {}
    kept: dict[tuple[str, int], tuple[dict[str, Choice], Aligned]] = {}
    jobs = [(setting, count) for setting in ("local", "nonlocal", "permuted") for count in counts]
    for number, (setting, count) in enumerate(jobs):
        _tell(progress, f"merging {count} tasks, {setting}", number / len(jobs))
        corrections: tuple[str, ...] = tuple(CORRECTIONS)
        controls: tuple[str, ...] = CONTROLS
        if count not in main:
            corrections, controls = corrections[:3], ()
        elif not (thorough or setting == "permuted"):
            corrections, controls = corrections[:3], controls[:2]
        scores, choices, aligned = compare(
            world, setting, count, corrections=corrections, controls=controls
        )
        settings.setdefault(setting, {})[str(count)] = scores
        kept[setting, count] = (choices, aligned)
    clock.lap("merging, correction and evaluation")
    _tell(progress, "layers and barrier", 1.0)
    middle = min(4, tasks)
    by_layer = _layers(world, {name: kept[name, middle] for name in ("nonlocal", "permuted")})
    clock.lap("layer statistics")
    barrier = _barrier(world)
    clock.lap("loss barrier")
    return {
        "seconds": clock.total,
        "seed": seed,
        "tasks": list(world.demo.tasks),
        "experts": world.expert_accuracy("nonlocal", list(world.demo.tasks)),
        "settings": settings,
        "layers": by_layer,
        "barrier": barrier,
        "alignment": {name: asdict(result.report) for name, result in world.alignments.items()},
        "foundations": _foundations(world),
        "timings": clock.laps,
        "versions": {"nlm": nlm.__version__, "torch": torch.__version__},
    }


def probed(world: World, choice: Choice, labels: int) -> nn.Module:
    """The merged trunk with a new head per task, from labelled images."""
    merged, network = choice.merged, world.demo.experts[choice.merged.tasks[0]][0]
    trunk = merged.model(network)
    heads = {}
    for name in merged.tasks:
        data = world.demo.tasks[name].train.batches()
        head = linear_probe(trunk, data, max_samples=labels, task=name)
        heads[name] = {f"head.{entry}": tensor for entry, tensor in head.state_dict().items()}
    return nlm.Merged(merged, heads, merged.masks, merged.base).model(network)


def _layers(world: World, kept: Mapping[str, tuple[dict[str, Choice], Aligned]]) -> Layers:
    """Per layer the variance ratio and relative distance on test images, means over the tasks."""
    network = world.demo.foundations[0]
    inputs = world.demo.pretraining.calibration[:2]
    points = default_points(network, lambda: network(inputs))
    models = {
        name: (choices["plain"].model, aligned.experts) for name, (choices, aligned) in kept.items()
    }
    choices, aligned = kept["permuted"]
    models["permuted + TACT"] = (choices["tact"].model, aligned.experts)
    return layers(models, points, world.test)


def _barrier(world: World) -> Barrier:
    """The loss of the pre-training task on the line between the two foundations."""
    first, second = world.demo.foundations
    test = world.demo.pretraining.test.batches()
    moves = {"unaligned": world.spec.identity()}
    moves |= {name: result.permutation for name, result in world.alignments.items()}
    curves = {
        name: loss_barrier(
            first, first.state_dict(), world.spec.apply(move, second.state_dict()), test
        )
        for name, move in moves.items()
    }
    return barriers(curves)


def _foundations(world: World) -> dict[str, float]:
    """Accuracies in the pre-training task: each foundation, and both together as an ensemble."""
    first, second = world.demo.foundations
    test = world.demo.pretraining.test.batches()
    return {
        "A": accuracy(first, test),
        "B": accuracy(second, test),
        "ensemble": ensemble_accuracy([first, second], test),
    }


def _share(progress: Progress | None, start: float, length: float) -> Progress | None:
    if progress is None:
        return None
    return lambda what, done: progress(what, start + length * done)


def _tell(progress: Progress | None, what: str, done: float) -> None:
    if progress is not None:
        progress(what, _LOADING_SHARE + (1 - _LOADING_SHARE) * done)
