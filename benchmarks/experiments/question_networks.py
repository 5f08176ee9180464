"""The networks of the open questions: perceptrons of any width and depth, and their experts.

They are trained as the demo's are (``nlm.demo.training``) on the demo's images, and kept in nlm's
cache. The experiments that ask are ``size_questions.py``, ``foundation_questions.py`` and
``survey_questions.py``.
"""

import argparse
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from many_models import foundations
from nonlocal_merging import commit
from torch import Tensor, nn

import nlm
from nlm.correct import default_points
from nlm.demo import cache
from nlm.demo.glyphs import Glyphs
from nlm.demo.networks import NETWORKS, _network
from nlm.demo.tasks import Sizes, Task, make_task
from nlm.demo.training import EXPERT, FOUNDATION, Recipe, train_expert
from nlm.evaluate import accuracy, normalized_accuracy
from nlm.pipeline import Aligned, Choice, choose
from nlm.report import layers

__all__ = [
    "command",
    "default",
    "expert",
    "foundations",
    "perceptron",
    "score",
    "tasks",
    "variances",
]

RESULTS = Path(__file__).parent / "results"
PIXELS = 256  # of an image
CALIBRATION = 512  # unlabelled images a task
SCALES_TIMES_TASKS = (0.8, 1.2, 2.0)  # as in the demo, without its ends
RIDGE = 0.1
SMALL = Sizes(400, 60, 40, 100)  # for tests

# Correction -> its name in nlm.correct, and what the choice of it takes.
CORRECTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("none", {}),
    "repair": ("repair", {}),
    "tact": ("tact", {}),
    "refit_tact": ("refit+tact", {"correct_options": {"ridge": RIDGE}}),
}


def _perceptron(
    width: int, depth: int, classes: int, seed: int = 0, norm: str | None = None
) -> nn.Sequential:
    sizes = [PIXELS, *[width] * depth]
    linear = [(f"fc{n}", nn.Linear(sizes[n - 1], sizes[n])) for n in range(1, depth + 1)]
    with torch.random.fork_rng(devices=[]):
        return _network([("flatten", nn.Flatten()), *linear], width, classes, seed, norm)


def perceptron(width: int, depth: int) -> str:
    """The name of a network of so many linear layers, under which the demo trains it."""
    name = f"mlp{width}x{depth}"
    NETWORKS.setdefault(name, partial(_perceptron, width, depth))
    FOUNDATION.setdefault(name, FOUNDATION["mlp512"])
    EXPERT.setdefault(name, EXPERT["mlp512"])
    return name


def default(small: bool) -> str:
    """The network of all questions but those of its size."""
    return perceptron(16, 2) if small else perceptron(256, 4)


def tasks(names: Sequence[str], glyphs: Glyphs, seed: int, sizes: Sizes) -> dict[str, Task]:
    return {name: make_task(name, glyphs, seed, sizes) for name in names}


def expert(
    network: str,
    foundation: nn.Sequential,
    task: Task,
    seed: int,
    index: int = 0,
    recipe: Recipe | None = None,
) -> nn.Sequential:
    """A foundation fine-tuned for a task; ``index`` decides the order of its batches."""
    recipe = recipe or EXPERT[network]

    def train() -> Mapping[str, Tensor]:
        return train_expert(network, foundation, task, recipe, seed, index).state_dict()

    key = cache.key(
        start=cache.digest(foundation.state_dict()), seed=seed, index=index, recipe=asdict(recipe),
        data=cache.digest({"inputs": task.train.inputs, "labels": task.train.labels}),
    )  # fmt: skip
    model = NETWORKS[network](len(task.classes))
    model.load_state_dict(cache.remember(f"{network}-seed{seed}-{task.name}", key, train))
    return model.eval()


def score(
    aligned: Aligned, data: Mapping[str, Task], corrections: Sequence[str], own: Mapping[str, float]
) -> tuple[dict[str, dict[str, float]], dict[str, Choice]]:
    """Normalised test accuracies of Task Arithmetic under each correction, and what was chosen.

    Parameters
    ----------
    own : task -> its expert's test accuracy.
    """
    names = list(aligned.experts)
    calibration = {name: [data[name].calibration] for name in names}
    validation = {name: data[name].validation.batches() for name in names}
    known = {name: accuracy(aligned.experts[name], validation[name]) for name in names}
    scales = [round(multiple / len(names), 4) for multiple in SCALES_TIMES_TASKS]
    rows, choices = {}, {}
    for correction in corrections:
        name, options = CORRECTIONS[correction]
        choice = choose(
            aligned, calibration, validation, correction=name, scales=scales,
            max_samples=CALIBRATION, expert_scores=known, **options,
        )  # fmt: skip
        found = {
            name: accuracy(choice.model, data[name].test.batches(), task=name) for name in names
        }
        normalised = normalized_accuracy(found, own)
        rows[correction] = {
            "average": normalised["average"], "worst": normalised["worst"], "scale": choice.scale,
        }  # fmt: skip
        choices[correction] = choice
    return rows, choices


def variances(model: nn.Module, aligned: Aligned, data: Mapping[str, Task]) -> list[float]:
    """Ratio of the variances, merged over expert, by layer; means over the tasks."""
    network = next(iter(aligned.experts.values()))
    inputs = next(iter(data.values())).test.inputs
    points = default_points(network, lambda: network(inputs[:2]))
    test = {name: data[name].test.batches() for name in aligned.experts}
    found = layers({"merged": (model, aligned.experts)}, points, test)
    return found["variance_ratio"]["merged"]


def command(
    name: str, run: Callable[[int], Any], what: str, seeds: Sequence[int] = (0, 1, 2)
) -> None:
    """Runs every seed that the command line asks for and writes one JSON.

    Parameters
    ----------
    what : the script's docstring, whose first line is its help.
    seeds : by default.
    """
    parser = argparse.ArgumentParser(description=what.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--results", type=Path, help="the JSON file")
    chosen = parser.parse_args()
    found: dict[str, Any] = {"calibration": CALIBRATION, "ridge": RIDGE, "seeds": {}}
    for seed in chosen.seeds:
        found["seeds"][str(seed)] = run(seed)
    found["machine"] = {"cpu": platform.machine(), "threads": torch.get_num_threads()}
    found["versions"] = {"nlm": nlm.__version__, "torch": torch.__version__}
    found["commit"] = commit()
    path = chosen.results or RESULTS / f"{name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
