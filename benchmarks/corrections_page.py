"""Writes docs/corrections.md: what each correction of a merged model gains, needs and costs.

    python benchmarks/corrections_page.py

makes it of the committed results; a test fails where the page is not what this script would write.
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import _corrections_parts
import _tact_cost
from _corrections_parts import MERGING, another_run, both, scores
from _pages import again, counted, dots, save, spread
from _pages import table as table_of

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "corrections.md"
RESULTS = ROOT / "benchmarks" / "experiments" / "results"
COST = RESULTS / "tact_cost.json"

NETWORKS = {
    "cnn64": "Two convolutions, two linear layers, no norm",
    "cnn64_norm": "The same with BatchNorm",
}
SETTINGS = {
    "permuted": "Experts of two foundations, aligned",
    "nonlocal": "Experts of two foundations, as they are",
    "local": "Experts of one foundation",
}

SHORT = {
    "none": "none",
    "repair": "REPAIR",
    "least_squares": "least squares, shared",
    "refit": "refit, shared",
    "refit_fields": "refit on random fields",
    "tact": "TACT",
}
HALF = {  # of TACT's gain is asked of what all tasks share, and of what needs no data
    "least_squares": "least squares",
    "refit": "refit",
    "refit_fields": "refit on random fields",
}
WHY = {  # a goal may be missed
    "by one set of scales and shifts for all tasks": "one set fits a line per channel to all tasks "
    "together; where the merged channel is off differently for each task, it takes a task id, or "
    "whole layers ([refit](refit.md))",
    "without data": "the lengths of rows tell variances of inputs that prefer no direction, and "
    "random fields have the spectrum of images, not their shapes",
}
GOALS = {
    "by one set of scales and shifts for all tasks": ("repair", "least_squares", "shared_free"),
    "by layers that all tasks share": ("refit",),
    "without data": ("refit_fields", "shared_free", "free"),
}

INTRODUCTION = """# Corrections beside one another

Made by `benchmarks/corrections_page.py` from the results of
`benchmarks/experiments/corrections.py`. The experts are merged by Task Arithmetic, and the scale is
chosen on labelled validation images after each correction. A cell holds normalised test accuracy
(merged / expert), the mean over the tasks with its standard deviation over the seeds, and that of
the worst task; *scale 0* is the same without task vectors. Bytes are those of each task's own
parameters beside its head, seconds those of one fit at the largest number of tasks; *needs* is per
task."""


def load(network: str, kind: str = "corrections") -> list[dict[str, Any]]:
    """The results of all seeds of a network."""
    return load_all(f"{kind}_{network}")


def load_all(name: str) -> list[dict[str, Any]]:
    """The results of all seeds by the start of their files' names."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}_seed*.json"))]


def page() -> str:
    parts = [INTRODUCTION]
    for network in NETWORKS:
        if results := load(network):
            picture = f"![Each correction's accuracy](pictures/corrections_{network}.png)"
            parts += [f"## {NETWORKS[network]}", picture, *section(results)]
        if results := load(network, "every_number"):
            parts += ["### Every number of tasks", *every_number(results)]
            if differing := changed(load(network), results):
                parts.append(differing)
        if network == "cnn64":
            parts += _corrections_parts.solved(load_all("low_rank"), load_all("low_rank_zero"))
        if results := load(network, "without_data"):
            parts += ["### Without data", *_corrections_parts.without_data(results, load(network))]
    if merging := load_all("nonlocal_merging"):
        cells = both(merging, load("cnn64"), MERGING)
        told = calibration([result["calibration_sizes"] for result in merging])
        others = another_run(cells, "the tables above")
        others = f" {others} README's table is of this run too." if others else ""
        parts += ["## How many samples", f"{told}{others}"]
    if COST.exists():
        parts += ["## What TACT costs", *_tact_cost.section(json.loads(COST.read_text()))]
    parts.append(
        again(
            "experiments/corrections.py", "experiments/corrections.py --every-number",
            "experiments/corrections.py --add",
            "experiments/corrections.py --without-data --networks cnn64",
            "experiments/low_rank.py", "experiments/low_rank.py --zero",
            "experiments/nonlocal_merging.py", "experiments/tact_cost.py", "corrections_page.py",
        )
    )  # fmt: skip
    return "\n\n".join(parts) + "\n"


def draw() -> dict[str, bytes]:
    """The corrections of each network beside one another, by the pictures' file names."""
    return {
        f"corrections_{network}.png": dots(
            {
                f"{count} tasks": {
                    SETTINGS[setting]: {
                        _row(found): average(results, setting, count, name)
                        for name, found in results[0]["rows"].items()
                    }
                    for setting in results[0]["settings"]
                }
                for count in results[0]["settings"]["permuted"]
            },
            "normalised accuracy",
            1.03,
        )
        for network in NETWORKS
        if (results := load(network))
    }


def _row(found: dict[str, str]) -> str:
    """What a row of a picture is called."""
    return f"{found['title']}, {found['needs']}" if "labels" in found["needs"] else found["title"]


def calibration(sizes: list[dict[str, float]]) -> str:
    """TACT by the number of unlabelled samples, and the fewest that are as good as the most."""
    found = {count: [seed[count] for seed in sizes] for count in sizes[0]}
    most = list(found)[-1]
    told = ", ".join(f"{count}: {spread(each)}" for count, each in found.items())
    least = next(n for n, each in found.items() if mean(each) > mean(found[most]) - 0.01)
    return (
        f"TACT at four tasks on `cnn64`, permuted by weights, by unlabelled images a task: {told} "
        f"(means of {len(sizes)} seeds with their standard errors). {least} are within .01 of "
        f"{most} by this labelled test. `nlm.correct.calibration_size` has no labels: it looks for "
        "the fewest whose corrections are nearly those of 128, which may be more."
    )


def section(results: list[dict[str, Any]]) -> list[str]:
    seeds = ", ".join(str(result["seed"]) for result in results)
    told = verdict(results)
    parts = [f"Seeds {seeds}. {told}", *why(told)]
    for setting in results[0]["settings"]:
        parts += [f"### {SETTINGS[setting]}", table(results, setting)]
    return parts


def why(told: str) -> list[str]:
    """The reasons for the goals that a verdict calls missed."""
    missed = [goal for goal in GOALS if f"{goal}: missed" in told]
    each = "; ".join(f"{goal}, {WHY[goal]}" for goal in missed)
    return [f"Why half is missed: {each}."] if missed else []


def every_number(results: list[dict[str, Any]]) -> list[str]:
    """The shared corrections and TACT at each number of tasks, and which goals are met."""
    by_count = {count: [r["counts"][count] for r in results] for count in results[0]["counts"]}
    rows, missed = [], []
    low: dict[str, list[str]] = {name: [] for name in HALF}
    for count, found in by_count.items():
        gains = [100 * (at["tact"]["average"] - at["repair"]["average"]) for at in found]
        if int(count) >= 3 and min(gains) <= 0:
            missed.append(count)
        means = {name: mean(at[name]["average"] for at in found) for name in SHORT}
        parts = {
            name: (means[name] - means["none"]) / (means["tact"] - means["none"]) for name in HALF
        }
        for name, part in parts.items():
            if part < 0.5:
                low[name].append(f"{count} ({part:.0%})")
        cells = [scores([at[name] for at in found], "") for name in SHORT]
        shares = [f"{part:.0%}" for part in parts.values()]
        rows.append([count, *cells, *shares, f"{mean(gains):.1f}", f"{min(gains):.1f}"])
    header = [
        "tasks", *SHORT.values(), *(f"{told}, of TACT's gain" for told in HALF.values()),
        "TACT above REPAIR, points", "least of the seeds",
    ]  # fmt: skip
    above = f"missed at {', '.join(missed)} tasks" if missed else "met for every seed"
    told = "; ".join(
        f"by {HALF[name]} " + (f"missed at {', '.join(at)} tasks" if at else "met at every number")
        for name, at in low.items()
    )
    return [
        f"Aligned by weights; {counted(results, 'seed')} "
        f"({', '.join(str(r['seed']) for r in results)}). *Least squares* is one set of scales and "
        "shifts for all tasks, channel by channel; *refit* solves whole layers that all tasks "
        "share, on the tasks' images or, without data, on 1,024 samples of "
        "`nlm.correct.random_fields`.",
        table_of(header, rows),
        f"TACT above REPAIR from three tasks on: {above}. Half of TACT's gain: {told}.",
    ]


def changed(tables: list[dict[str, Any]], every: list[dict[str, Any]]) -> str:
    """By how much the same row of one seed differs between the tables and every number of tasks."""
    alike = [{"seed": r["seed"], "settings": {"permuted": r["counts"]}} for r in every]
    return another_run(both(alike, tables, {name: name for name in SHORT}), "the tables above")


def table(results: list[dict[str, Any]], setting: str) -> str:
    """One row per correction; costs are those at the largest number of tasks."""
    counts = list(results[0]["settings"][setting])
    columns = [*(f"{count} tasks" for count in counts), *(f"{count}, scale 0" for count in counts)]
    lines = [
        f"| correction | needs | {' | '.join(columns)} | bytes per task | seconds |",
        f"|---|---|{'--:|' * (len(columns) + 2)}",
    ]
    for name, row in results[0]["rows"].items():
        at = {count: [r["settings"][setting][count][name] for r in results] for count in counts}
        cells = [row["title"], row["needs"]]
        cells += [scores(found, "") for found in at.values()]
        cells += [scores(found, "_at_zero") for found in at.values()]
        price = at[counts[-1]]
        cells += [f"{price[0]['bytes']:,}", f"{mean(each['seconds'] for each in price):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(results: list[dict[str, Any]]) -> str:
    """What each correction recovers of TACT's gain, and how far from local merging it ends.

    The goal is half of the gain, of what is shared and of what needs no data.
    """
    text = []
    for count in results[0]["settings"]["permuted"]:
        found = {
            name: share(results, name, count)
            for name, row in results[0]["rows"].items()
            if name not in ("none", "tact") and "labels" not in row["needs"]
        }
        shares = ", ".join(
            f"{results[0]['rows'][name]['title']} {part:.0%}" for name, part in found.items()
        )
        behind = average(results, "local", count, "tact") - average(
            results, "permuted", count, "tact"
        )
        text.append(
            f"At {count} tasks, aligned, of what TACT gains: {shares}. TACT ends "
            f"{100 * behind:.1f} points behind local merging with TACT.{goals(found)}"
        )
    return " ".join(text)


def goals(found: dict[str, float]) -> str:
    """Whether the best shared correction and the best without data reach half of TACT's gain."""
    text = ""
    for told, names in GOALS.items():
        if reached := [found[name] for name in names if name in found]:
            best = max(reached)
            text += f" Half of it {told}: {'met' if best >= 0.5 else 'missed'} ({best:.0%})."
    return text


def share(results: list[dict[str, Any]], name: str, count: str) -> float:
    """The part of TACT's gain over no correction that another correction reaches, aligned."""
    none, tact, other = (
        average(results, "permuted", count, each) for each in ("none", "tact", name)
    )
    return (other - none) / (tact - none)


def average(results: list[dict[str, Any]], setting: str, count: str, name: str) -> float:
    return mean(result["settings"][setting][count][name]["average"] for result in results)


def main() -> None:
    save(draw())
    if COST.exists():
        save(_tact_cost.draw(json.loads(COST.read_text())))
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
