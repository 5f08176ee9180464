"""Landscapes and projections as in figures 1, 2 and 4 of arXiv:2410.12766, on the demo's networks.

    python benchmarks/experiments/paper_figures.py

writes a JSON beside this file. benchmarks/figures.py makes docs/figures.md of it and of the results
of nonlocal_merging.py, which hold the numbers of figures 3 and 5.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from nonlocal_merging import commit

from nlm.demo.experiment import World, compare, prepare
from nlm.evaluate import projection
from nlm.report import task_landscape

RESULTS = Path(__file__).parent / "results"
TASKS = 4
FEATURES = "trunk.fc2"  # the last layer before the heads
PROJECTED = ("digits", "upper")
SAMPLES = {"landscapes": 300, "projections": 150}
GRID = 11

# title -> setting and correction of a landscape, which is fitted anew at every place.
LANDSCAPES = {
    "local": ("local", "none"),
    "nonlocal": ("nonlocal", "none"),
    "permuted": ("permuted", "none"),
    "permuted + TACT": ("permuted", "tact"),
}


def run(world: World, grid: int = GRID) -> dict[str, Any]:
    """Landscapes of two tasks, and projections of two of the merged tasks' features."""
    found = {
        "seed": world.demo.seed,
        "samples": SAMPLES,
        "landscapes": landscapes(world, grid),
        "projections": projections(world),
    }
    return rounded(found)


def landscapes(world: World, grid: int) -> dict[str, Any]:
    found = {}
    for title, (setting, correction) in LANDSCAPES.items():
        name = {"none": "plain"}.get(correction, correction)
        _, choices, aligned = compare(world, setting, 2, corrections=(name,), controls=())
        data = {
            task: [(t.test.inputs[: SAMPLES["landscapes"]], t.test.labels[: SAMPLES["landscapes"]])]
            for task, t in world.demo.tasks.items()
        }
        calibration = {task: world.calibration[task] for task in aligned.experts}
        merged = choices[name].merged
        found[title] = task_landscape(merged, aligned, data, correction, calibration, grid=grid)
    return found


def projections(world: World) -> dict[str, Any]:
    """The experts' features, and those of the aligned merge of all tasks with and without TACT."""
    count = len(world.demo.tasks)
    _, choices, aligned = compare(
        world, "permuted", count, corrections=("plain", "tact"), controls=()
    )
    models = {"permuted": choices["plain"].model, "permuted + TACT": choices["tact"].model}
    return {
        task: projection(
            models, aligned.experts[task], FEATURES, [world.demo.tasks[task].test.inputs],
            max_samples=SAMPLES["projections"], task=task,
        ).places
        for task in PROJECTED
    }  # fmt: skip


def rounded(value: Any) -> Any:
    """Numbers to four digits: what a figure shows."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    settings = parser.parse_args()
    found = run(prepare(settings.seed, TASKS)) | {"commit": commit()}
    path = settings.folder / f"paper_figures_seed{settings.seed}.json"
    path.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
