"""Writes docs/refit.md: local and non-local merging under the same correction, from the results.

    python benchmarks/refit_page.py

makes it of what ``refit.py`` and ``nonlocal_merging.py`` in ``benchmarks/experiments`` have found;
a test fails where the page is not what this script would write.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from _corrections_parts import MERGING, added, another_run, both
from _pages import again, counted, dots, save, spread, table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "refit.md"
RESULTS = ROOT / "benchmarks" / "experiments" / "results"

SETTINGS = {
    "nonlocal": "two foundations, as they are (control)",
    "permuted": "two foundations, permuted by weights",
    "permuted by activations": "two foundations, permuted by activations",
    "local": "one foundation",
}
COLUMNS = {
    "plain": "not corrected",
    "tact": "TACT",
    "refit_default": "refit",
    "refit": "refit, ridge chosen",
    "refit_tact": "refit, then TACT",
}
LOW_RANK = {  # the last column is no merge, but what it would be without a limit
    "tact": "TACT",
    "refit": "refit",
    "refit_tact": "refit, then TACT",
    "low_rank": "refit, low rank",
    "low_rank_tact": "refit, low rank, TACT",
    "full_rank": "refit, full rank",
}
TWICE = {"tact": "tact", "refit": "refit_default"}  # rows of low_rank.py, as in refit.py
GOALS = {"4": 2.0, "8": 4.0}  # tasks -> points behind one foundation, at most
ALIGNED = "permuted by activations"
PICTURE = "refit.png"
LOW_RANK_PART = "#a-part-of-low-rank-for-each-task"

INTRODUCTION = """# Refit beside TACT, and what is left between one foundation and two

Made by `benchmarks/refit_page.py` from the results of `benchmarks/experiments/refit.py` and
`nonlocal_merging.py`, on the demo's `cnn64`: experts merged by Task Arithmetic at a scale of
{scale}, corrections fitted to {images} unlabelled images a task. Normalised test accuracy, means
over the tasks with their standard errors over seeds {seeds}, and the worst task's mean."""

Results = Sequence[Mapping[str, Any]]


def load(name: str) -> Results:
    """The results of all seeds."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}_seed*.json"))]


def page() -> str:
    results, merging = load("refit"), load("nonlocal_merging")
    introduction = INTRODUCTION.format(
        scale=results[0]["scale"], images=results[0]["images"],
        seeds=", ".join(str(result["seed"]) for result in results),
    )  # fmt: skip
    low_rank = load("low_rank")
    picture = f"![What each correction leaves of the experts' accuracy](pictures/{PICTURE})"
    parts = [introduction, goals(results, low_rank), picture]
    for tasks in GOALS:
        parts += [f"## {tasks} tasks", scores(results, tasks), verdict(results, tasks)]
    if low_rank:
        parts += ["## A part of low rank for each task", *parts_of_low_rank(low_rank)]
        if zero := load("low_rank_zero"):
            control = "[The control](corrections.md#layers-solved-anew) has a scale of 0."
            parts.append(f"{control} {added(low_rank, zero)}")
        parts.append(another_run(both(low_rank, results, TWICE), "the tables above"))
    parts += ["## TACT and REPAIR by the number of tasks", gains(merging)]
    table_of_all = "those of the [table of corrections](corrections.md)"
    parts.append(another_run(both(merging, load("corrections_cnn64"), MERGING), table_of_all))
    parts.append(
        again(
            "experiments/refit.py", "experiments/low_rank.py", "experiments/nonlocal_merging.py",
            "refit_page.py",
        )
    )  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def draw() -> dict[str, bytes]:
    """What each correction leaves, by the picture's file name."""
    results, low_rank = load("refit"), load("low_rank")

    def found(tasks: str, setting: str) -> dict[str, float]:
        parts = ((results, COLUMNS), (low_rank, {k: v for k, v in LOW_RANK.items() if "rank" in k}))
        return {
            title: mean(values(of, setting, tasks, row, "average"))
            for of, titles in parts
            if of and tasks in of[0]["settings"].get(setting, {})
            for row, title in titles.items()
        }

    panels = {
        f"{tasks} tasks": {SETTINGS[setting]: found(tasks, setting) for setting in SETTINGS}
        for tasks in GOALS
    }
    return {PICTURE: dots(panels, "normalised accuracy", 1.03)}


def goals(results: Results, low_rank: Results) -> str:
    """How near two foundations come to one, by what all tasks share and by what each stores."""
    wanted = " and ".join(f"{goal:g} points at {tasks} tasks" for tasks, goal in GOALS.items())
    told = f"Refit, then TACT: {ends(results, 'refit_tact')}."
    if low_rank:
        told = (
            f"The best correction, refit with [a part of low rank]({LOW_RANK_PART}) of at most "
            f"{low_rank[0]['share']:.0%} of the weights a task ({counted(low_rank, 'seed')}): "
            f"{ends(low_rank, 'low_rank')}. {told}"
        )
    return (
        "The goal: experts of two foundations, permuted, end at most "
        f"{wanted} behind those of one foundation under the same merger and correction. {told}"
    )


def ends(results: Results, row: str) -> str:
    """Points behind one foundation at each number of tasks, and whether that is near enough."""
    return " and ".join(
        f"{spread(points, 1)} at {tasks} tasks ({reached(points, goal)})"
        for tasks, goal in GOALS.items()
        if all(tasks in r["settings"].get(s, {}) for r in results for s in (ALIGNED, "local"))
        for points in [behind(results, ALIGNED, tasks, row)]
    )


def reached(points: Sequence[float], goal: float) -> str:
    left = mean(points) - goal
    return "met" if left <= 0 else f"missed by {left:.1f}"


def values(results: Results, setting: str, tasks: str, row: str, what: str) -> list[float]:
    return [result["settings"][setting][tasks][row][what] for result in results]


def scores(results: Results, tasks: str) -> str:
    rows = []
    for setting, title in SETTINGS.items():
        if tasks in results[0]["settings"][setting]:
            cells = [
                f"{spread(values(results, setting, tasks, row, 'average'))} / "
                f"{mean(values(results, setting, tasks, row, 'worst')):.2f}"
                for row in COLUMNS
            ]
            rows.append([title, *cells])
    return table(["experts of", *COLUMNS.values()], rows)


def behind(results: Results, setting: str, tasks: str, row: str) -> list[float]:
    """Points behind one foundation under the same correction."""
    local, other = (values(results, place, tasks, row, "average") for place in ("local", setting))
    return [100 * (a - b) for a, b in zip(local, other, strict=True)]


def verdict(results: Results, tasks: str) -> str:
    """How far the best correction is from one foundation, and from the goal."""
    told = ", ".join(
        f"{title} {spread(behind(results, ALIGNED, tasks, row), 1)}"
        for row, title in COLUMNS.items()
    )
    points, goal = behind(results, ALIGNED, tasks, "refit_tact"), GOALS[tasks]
    text = (
        f"Permuted by activations, points behind one foundation under the same correction: {told}. "
        f"The goal, at most {goal:g}, under refit and TACT: {reached(points, goal)}"
    )
    if mean(points) <= goal:
        return f"{text}."
    return (
        f"{text}. The units of two foundations correspond only in part, and what all tasks share "
        f"is fitted to a mean of features that differ; [a part of low rank]({LOW_RANK_PART}) that "
        "each task adds holds the difference, and [wider networks](questions.md) are nearer."
    )


def parts_of_low_rank(results: Results) -> list[str]:
    """Refit with each task's part of low rank: the table, its price, and what it gains."""
    first = results[0]
    introduction = (
        f"`nlm.correct.LowRank` on the refitted network: each task's part weighs at most "
        f"{first['share']:.0%} of the layers, at the ridge that validation images choose of "
        f"{', '.join(map(str, first['ridges']))}; full rank is a network for each task. "
        f"{counted(results, 'seed')}: {', '.join(str(result['seed']) for result in results)}."
    )
    places = [
        (tasks, setting)
        for setting in SETTINGS
        for tasks in first["settings"].get(setting, {})
        if all(tasks in result["settings"].get(setting, {}) for result in results)
    ]
    rows, told = [], []
    for tasks, setting in sorted(places, key=lambda place: int(place[0])):
        cells = [
            f"{spread(values(results, setting, tasks, row, 'average'))} / "
            f"{mean(values(results, setting, tasks, row, 'worst')):.2f}"
            for row in LOW_RANK
        ]
        rows.append([tasks, SETTINGS[setting], *cells])
    for tasks, goal in GOALS.items():
        best = ALIGNED
        if (tasks, best) in places and (tasks, "local") in places:
            left = {row: behind(results, best, tasks, row) for row in LOW_RANK}
            points = ", ".join(f"{LOW_RANK[row]} {spread(each, 1)}" for row, each in left.items())
            told.append(
                f"At {tasks} tasks, points behind one foundation under the same correction: "
                f"{points}. The goal, at most {goal:g}, under refit with a part of low rank: "
                f"{reached(left['low_rank'], goal)}."
            )
        if (tasks, best) in places and (tasks, "nonlocal") in places:
            off = [
                100 * (a - b)
                for a, b in zip(
                    values(results, best, tasks, "low_rank", "average"),
                    values(results, "nonlocal", tasks, "low_rank", "average"),
                    strict=True,
                )
            ]
            told.append(
                f"Not aligned, a part of low rank leaves {spread(off, 1)} points less: the more a "
                "task may store for itself, the less alignment is worth."
            )
    tasks, setting = places[0]
    sizes = ", ".join(
        f"{title} {values(results, setting, tasks, row, 'bytes')[0]:,.0f} "
        f"({values(results, setting, tasks, row, 'share')[0]:.1%} of the trunk)"
        for row, title in LOW_RANK.items()
    )
    return [
        introduction,
        table(["tasks", "experts of", *LOW_RANK.values()], rows),
        f"Bytes a task: {sizes}.",
        *told,
    ]


def gains(merging: Results) -> str:
    """TACT above REPAIR, permuted by weights."""
    counts = list(merging[0]["settings"]["permuted"])
    found = {
        tasks: [
            rows["tact"]["average"] - rows["repair"]["average"]
            for result in merging
            for rows in [result["settings"]["permuted"][tasks]]
        ]
        for tasks in counts
    }
    told = ", ".join(f"{spread(each)} at {tasks}" for tasks, each in found.items())
    least = min(min(each) for tasks, each in found.items() if int(tasks) > 2)
    return (
        "With the scale chosen on validation images and 128 images a task, TACT is above REPAIR by "
        f"{told} tasks; the least of any seed with more than two tasks is {least:+.3f}. Every "
        "number of tasks from two to eight is measured [on this network](corrections.md) and on "
        "[perceptrons](questions.md)."
    )


def main() -> None:
    save(draw())
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
