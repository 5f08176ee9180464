"""Writes docs/transformer_tasks.md: merged tasks of small transformers, from the committed results.

    python benchmarks/transformer_tasks_page.py

A test fails where the page is not what this script would write.
"""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from _pages import again, dots, save

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "transformer_tasks.md"
RESULTS = ROOT / "benchmarks" / "experiments" / "results"

KINDS = {"vit": "A vision transformer of letters", "gpt": "A character GPT"}
PLACES = {
    "nonlocal": "two foundations, not aligned (control)",
    "permuted": "two foundations, permuted by weights",
    "permuted by activations": "two foundations, permuted by activations",
    "rotated": "two foundations, stream and heads rotated",
    "local": "one foundation",
}
CORRECTIONS = {
    "plain": "not corrected",
    "repair": "REPAIR",
    "tact": "TACT",
    "tact_lambda0": "TACT, scale 0",
    "probe": "probe, 128 labels",
}
SOLVED = {
    "plain": "not corrected",
    "tact": "TACT",
    "refit_default": "refit",
    "refit": "refit, ridge chosen",
    "refit_tact": "refit, then TACT",
}

PICTURE = "transformer_tasks.png"
LAST = "refit_default"  # of what is measured in a setting

INTRODUCTION = """# Tasks of small transformers

Made by `benchmarks/transformer_tasks_page.py` from the results of
`benchmarks/experiments/transformer_tasks.py`. Two foundations of other seeds and batches are
fine-tuned for a task in turn; the experts are merged by Task Arithmetic and corrected. Normalised
test accuracy (merged / expert), the mean over the tasks with its standard deviation over the seeds,
and the worst task's mean. REPAIR and TACT see 128 unlabelled samples a task and the scale is chosen
on validation data; refit stands beside TACT at one scale, on as many samples."""


def load(kind: str) -> dict[str, Any] | None:
    """The results of all seeds of a kind, in one file or several, which are of one setting."""
    paths = sorted(RESULTS.glob(f"transformer_tasks_{kind}*.json"))
    return joined([json.loads(path.read_text()) for path in paths]) if paths else None


def joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Results of several seeds as one."""
    for fact in ("settings", "tuning", "amounts", "refit"):
        assert all(each.get(fact) == found[0].get(fact) for each in found), fact
    return found[0] | {
        "seeds": {seed: rows for each in found for seed, rows in each["seeds"].items()}
    }


def page() -> str:
    parts = []
    for kind, title in KINDS.items():
        parts.append(f"## {title}")
        if found := load(kind):
            parts += section(found)
        else:
            parts.append(f"Not measured yet: `transformer_tasks.py {kind}` does it.")
    parts.append(again("experiments/transformer_tasks.py vit gpt", "transformer_tasks_page.py"))
    picture = f"![What each correction leaves of the experts' accuracy](pictures/{PICTURE})"
    return "\n\n".join([INTRODUCTION, picture, *parts]) + "\n"


def draw() -> dict[str, bytes]:
    """Four tasks of each kind under every correction, by the picture's file name."""
    panels = {}
    for kind, title in KINDS.items():
        if found := load(kind):
            own = {place: {} for place in PLACES}  # type: dict[str, dict[str, float]]
            for what, columns, keys in (("rows", CORRECTIONS, ("4",)), ("refits", SOLVED, ())):
                for place, seeds in gathered(found["seeds"], what, *keys).items():
                    for name, told in columns.items():
                        if told not in own[place] and all(name in each for each in seeds):
                            own[place][told] = mean(each[name]["average"] for each in seeds)
            panels[title] = {PLACES[place]: rows for place, rows in own.items() if rows}
    return {PICTURE: dots(panels, "normalised accuracy", 1.03)}


def section(found: dict[str, Any]) -> list[str]:
    """A kind's tasks, its tables, and what they say."""
    seeds, settings = found["seeds"], found["settings"]
    size = settings["size"]
    first = next(iter(seeds.values()))
    tasks = ", ".join(
        f"{name} {mean(each['experts'][name] for each in seeds.values()):.2f}"
        for name in first["experts"]
    )
    told = (
        f"{size['depth']} layers of width {size['width']}, {settings['steps']} steps; seeds "
        f"{', '.join(seeds)}. The experts' own accuracies: {tasks}. What is solved anew sees "
        f"{found['refit']['images']} samples a task, at a scale of {found['refit']['scale']}."
    )
    parts = [told]
    for count in next(iter(first["rows"].values())):
        rows = gathered(seeds, "rows", count)
        parts += [f"### {count} tasks", table(rows, CORRECTIONS)]
    solved = {
        place: own for place, own in gathered(seeds, "refits").items()
        if all(LAST in each for each in own)
    }  # fmt: skip
    if left := [PLACES[p] for p in found.get("amounts", {}).get("places", ()) if p not in solved]:
        parts[0] += f" Not measured to the end: {'; '.join(left)}."
    columns = {
        name: title for name, title in SOLVED.items()
        if all(name in each for rows in solved.values() for each in rows)
    }  # fmt: skip
    parts += ["### The same, solved anew", table(solved, columns)]
    return [*parts, verdict(solved, columns), gains(solved)]


def gathered(
    seeds: dict[str, dict[str, Any]], what: str, *keys: str
) -> dict[str, list[dict[str, Any]]]:
    """place -> what each seed has there, of the places where all have it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for place in PLACES:
        own = [each[what].get(place) for each in seeds.values()]
        for key in keys:
            own = [each and each.get(key) for each in own]
        if all(own):
            found[place] = own
    return found


def table(rows: dict[str, list[dict[str, Any]]], columns: dict[str, str]) -> str:
    """place -> the scores of each seed, under each correction."""
    lines = [
        f"| experts of | {' | '.join(columns.values())} |", f"|---|{'--:|' * len(columns)}"
    ]  # fmt: skip
    for place, seeds in rows.items():
        cells = [_scores([each[name] for each in seeds]) for name in columns]
        lines.append(f"| {PLACES[place]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(solved: dict[str, list[dict[str, Any]]], columns: dict[str, str]) -> str:
    """How far the best of each treatment is from local merging under the same."""

    def average(place: str, name: str) -> float:
        return mean(each[name]["average"] for each in solved[place])

    text = []
    for name, title in columns.items():
        best = max((place for place in solved if place != "local"), key=lambda p: average(p, name))
        behind = 100 * (average("local", name) - average(best, name))
        text.append(
            f"{title}: best where the experts are of {PLACES[best]} ({average(best, name):.3f}), "
            f"{behind:.1f} points behind one foundation and "
            f"{100 * (average(best, name) - average('nonlocal', name)):.1f} above the control."
        )
    return " ".join(each[0].upper() + each[1:] for each in text)


def gains(solved: dict[str, list[dict[str, Any]]]) -> str:
    """What TACT and refit add to the merge as it is, and whether each does in every setting.

    The control, which is no merge to speak of, is told but does not count.
    """
    told = []
    for name, title in (("tact", "TACT"), ("refit_default", "refit")):
        by_place = {
            place: [100 * (each[name]["average"] - each["plain"]["average"]) for each in seeds]
            for place, seeds in solved.items()
        }
        least = min(min(each) for place, each in by_place.items() if place != "nonlocal")
        each = ", ".join(f"{mean(by_place[place]):+.1f} ({PLACES[place]})" for place in by_place)
        reached = "met" if least > 0 else f"missed, a seed loses {-least:.1f}"
        told.append(
            f"{title} adds {each}; the least of a seed and setting is {least:+.1f}: {reached}"
        )
    goal = "The goal, a gain in every setting but the control, in points"
    return f"{goal}: {'; '.join(told)}."


def _scores(found: list[dict[str, float]]) -> str:
    averages = [each["average"] for each in found]
    spread = f" ± {stdev(averages):.3f}" if len(averages) > 1 else ""
    worst = [each["worst"] for each in found if "worst" in each]
    return f"{mean(averages):.3f}{spread}" + (f" / {mean(worst):.2f}" if worst else "")


def main() -> None:
    save(draw())
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
