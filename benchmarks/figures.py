"""Draws the figures of docs/figures.md and writes its text, from the committed results.

    python benchmarks/figures.py

A test fails where the page is not what this script would write.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from _pages import again, save

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "figures.md"
RESULTS = ROOT / "benchmarks" / "experiments" / "results"

TITLES = {
    "local": "one foundation",
    "nonlocal": "two foundations",
    "permuted": "two, aligned",
    "permuted + TACT": "two, aligned, + TACT",
}
_ROWS = {
    "plain": "none",
    "repair": "REPAIR",
    "tact": "TACT",
    "probe": "probe, 128 labels",
    "probe_full": "probe, 1500 labels",
}
_DPI = 80

_TEXT = """# The paper's figures, from these networks

Figures 1 to 5 of Sharma, Roy and Dziugaite, *The Non-Local Model Merging Problem*
(arXiv:2410.12766), drawn by `benchmarks/figures.py` from what `benchmarks/experiments` found on the
demo's networks: VGG16, RESISC45 and Colorectal Histology there, `cnn64`, handwritten digits and
capital letters here. Accuracies are normalised: the merged model's over the expert's.

## 1, 2. The plane of two task vectors

![Average normalised accuracy on the plane of two task vectors](pictures/figure_1.png)

![Normalised accuracy of the worse task on the plane of two task vectors](pictures/figure_2.png)

Every place is a model of its own: {places} of them, with TACT fitted anew at each where it says so
(seed {seed}, {samples} test images a task). *start* is the foundation, or the mean of both.

{landscapes}

{landscape_verdict}

## 3. What happens inside

![Distance to the expert, and ratio of variances, by layer](pictures/figure_3.png)

Four tasks merged, means over the tasks and over seeds {seeds}.

{layers}

Each cell is the variance of the merged activations over the expert's, and how far they lie from
them, relative to their size. In the last layer there is left {collapse} of the variance without
alignment and {aligned} with it. TACT fits it.

## 4. The last features

![t-SNE of the features of digits and of capitals](pictures/figure_4.png)

{projected} test images of a task, each once for the expert, the aligned merge of four tasks, and
the same with TACT, projected together by t-SNE (seed {seed}).

{projections}

Each cell is the mean distance on the picture between what a model makes of an image and what the
expert makes of it, over the mean distance between two images of the expert.

## 5. More tasks

![Normalised accuracy against the number of tasks](pictures/figure_5.png)

{tasks}

Average normalised accuracy, means over seeds {seeds}. {task_verdict}

{again}
"""


def load() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Landscapes and projections, and the results of all seeds."""
    [path] = RESULTS.glob("paper_figures_*.json")
    merging = sorted(RESULTS.glob("nonlocal_merging_*.json"))
    return json.loads(path.read_text()), [json.loads(each.read_text()) for each in merging]


def page(found: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    means, surfaces = averaged(results), found["landscapes"]
    variances = means["layers"]["variance_ratio"]
    return _TEXT.format(
        places=len(surfaces["local"]["x"]) * len(surfaces["local"]["y"]),
        seed=found["seed"],
        samples=found["samples"]["landscapes"],
        projected=found["samples"]["projections"],
        landscapes=_table(_landscape_rows(surfaces)),
        landscape_verdict=_landscape_verdict(surfaces),
        seeds=", ".join(str(result["seed"]) for result in results),
        layers=_table(_layer_rows(means["layers"])),
        collapse=f"{variances['nonlocal'][-1]:.2f}",
        aligned=f"{variances['permuted'][-1]:.2f}",
        projections=_table(_projection_rows(found["projections"])),
        tasks=_table(_task_rows(means["settings"]), names=2),
        task_verdict=_task_verdict(means["settings"]["permuted"]),
        again=again(
            "experiments/nonlocal_merging.py", "experiments/paper_figures.py", "figures.py"
        ),
    )


def averaged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings and layers, means over the seeds."""

    def together(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, Mapping):
            there = [name for name in first if all(name in value for value in values)]
            return {name: together([value[name] for value in values]) for name in there}
        if isinstance(first, list):
            return [together(each) for each in zip(*values, strict=True)]
        return mean(values) if isinstance(first, float) else first

    return {what: together([result[what] for result in results]) for what in ("settings", "layers")}


def away(places: Mapping[str, Sequence[Sequence[float]]], name: str) -> float:
    """The mean distance of a model's samples from the expert's, over that between the expert's."""
    own = [complex(*place) for place in places["expert"]]
    other = [complex(*place) for place in places[name]]
    spread = mean(abs(a - b) for n, a in enumerate(own) for b in own[:n])
    return mean(abs(a - b) for a, b in zip(own, other, strict=True)) / spread


def best(surface: Mapping[str, Any], quantity: str) -> float:
    return max(max(row) for row in surface["values"][quantity])


def at_merged(surface: Mapping[str, Any], quantity: str) -> float:
    """The value at the place of the grid that is nearest to the merged model."""
    x, y, _ = surface["models"]["merged"]
    row, column = (
        min(range(len(line)), key=lambda n: abs(line[n] - at))
        for line, at in ((surface["y"], y), (surface["x"], x))
    )
    return surface["values"][quantity][row][column]


def draw(found: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """File name -> picture."""
    from nlm.cli import figures

    surfaces, means = found["landscapes"], averaged(results)

    def plane(names: Sequence[str], quantity: str) -> bytes:
        draws = [figures.landscape(surfaces[name], quantity, (0.0, 1.0)) for name in names]
        return figures.png(draws, 3.9, [TITLES[name] for name in names], _DPI)

    layers = [
        figures.by_layer(means["layers"], what) for what in ("relative_distance", "variance_ratio")
    ]
    features = [figures.scatter(places) for places in found["projections"].values()]
    panels = {"TACT": ["tact"], "REPAIR": ["repair"], "linear probe": ["probe", "probe_full"]}
    tasks = [
        figures.accuracy_by_tasks(means, "average", ["plain", *names]) for names in panels.values()
    ]
    return {
        "figure_1.png": plane(["local", "nonlocal", "permuted + TACT"], "average"),
        "figure_2.png": plane(["nonlocal", "permuted", "permuted + TACT"], "worst"),
        "figure_3.png": figures.png(layers, 3.4, (), _DPI),
        "figure_4.png": figures.png(features, 4.4, list(found["projections"]), _DPI),
        "figure_5.png": figures.png(tasks, 4.3, list(panels), _DPI),
    }


def _table(rows: Iterable[Sequence[str]], names: int = 1) -> str:
    """The rows under the first of them; all columns but the first ones are numbers."""
    header, *others = list(rows)
    rule = "|---" * names + "|--:" * (len(header) - names) + "|"
    return "\n".join([_line(header), rule, *map(_line, others)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _landscape_rows(surfaces: Mapping[str, Any]) -> Iterator[list[str]]:
    yield ["foundations", "average: best", "at *merged*", "worse task: best", "at *merged*"]
    for name, words in TITLES.items():
        yield [words] + [
            f"{find(surfaces[name], quantity):.2f}"
            for quantity in ("average", "worst")
            for find in (best, at_merged)
        ]


def _landscape_verdict(surfaces: Mapping[str, Any]) -> str:
    worst = {name: f"{best(surface, 'worst'):.2f}" for name, surface in surfaces.items()}
    return (
        "Published: on the plane of one foundation there are places that solve both tasks, between "
        "two foundations there are none, and alignment and TACT bring them back. Here the worse "
        f"task keeps at best {worst['local']} of its accuracy on the plane of one foundation, "
        f"{worst['nonlocal']} between two, {worst['permuted']} where they are aligned and "
        f"{worst['permuted + TACT']} with TACT."
    )


def _layer_rows(layers: Mapping[str, Any]) -> Iterator[list[str]]:
    variances, distances = layers["variance_ratio"], layers["relative_distance"]
    shown = [name for name in TITLES if name in variances]
    yield ["layer", *(TITLES[name] for name in shown)]
    for number, point in enumerate(layers["points"]):
        cells = (f"{variances[n][number]:.2f} / {distances[n][number]:.2f}" for n in shown)
        yield [f"`{point.rpartition('.')[2]}`", *cells]


def _projection_rows(projections: Mapping[str, Any]) -> Iterator[list[str]]:
    names = [name for name in next(iter(projections.values())) if name != "expert"]
    yield ["task", *(TITLES[name] for name in names)]
    for task, places in projections.items():
        yield [task, *(f"{away(places, name):.2f}" for name in names)]


def _task_rows(settings: Mapping[str, Any]) -> Iterator[list[str]]:
    names = [name for name in TITLES if name in settings]
    yield ["tasks", "correction", *(TITLES[name] for name in names)]
    for tasks, cells in settings["permuted"].items():
        for row, words in _ROWS.items():
            if row in cells:
                averages = (settings[name][tasks][row]["average"] for name in names)
                yield [tasks, words, *(f"{average:.2f}" for average in averages)]


def _task_verdict(by_tasks: Mapping[str, Any]) -> str:
    def at(tasks: str, row: str) -> float:
        return by_tasks[tasks][row]["average"]

    least, *_, most = by_tasks
    gains = [at(tasks, "repair") - at(tasks, "plain") for tasks in by_tasks]
    return (
        "Published: TACT gains most, REPAIR falls below no correction with more tasks, and a "
        "linear probe gains moderately. Here, aligned, TACT is "
        f"{at(least, 'tact') - at(least, 'repair'):.2f} above REPAIR at {least} tasks and "
        f"{at(most, 'tact') - at(most, 'repair'):.2f} at {most}; REPAIR gains {min(gains):.2f} or "
        f"more throughout; at {most} tasks a probe has {at(most, 'probe_full'):.2f} with 1500 "
        f"labels a task and {at(most, 'probe'):.2f} with as many as TACT has unlabelled images, "
        f"beside TACT's {at(most, 'tact'):.2f}."
    )


def main() -> None:
    found, results = load()
    save(draw(found, results))
    PAGE.write_text(page(found, results))


if __name__ == "__main__":
    main()
