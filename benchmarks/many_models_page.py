"""Writes docs/many_models.md: several foundations in one order, from the committed results.

    python benchmarks/many_models_page.py

A test fails where the page is not what this script would write.
"""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from _pages import again

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "many_models.md"
RESULTS = ROOT / "benchmarks" / "experiments" / "results"

STRATEGIES = {
    "universe": "all together, by Frank-Wolfe steps",
    "mean": "each with the mean of the others",
    "reference": "each with the first",
}

INTRODUCTION = """# More than two foundations

Made by `benchmarks/many_models_page.py` from the results of
`benchmarks/experiments/many_models.py`. Foundations of the demo, of other weights, images and
batches each, are brought into one order by `nlm.align_many`; then the mean of all their weights is
scored on held-out images in their own 240-way task. "Each with the mean of the others" is Git
Re-Basin's way to merge many models (arXiv:2209.04836, section 5); "all together" by weights is
C2M3's (arXiv:2405.17897), refined. Any map between two models goes through the shared order: round
every cycle the maps cancel. Alignments by weights start from one descent (`layerwise=False`).
The objective is a method's own, but for "each with the first" that of weights: it is compared
within a method. Means over the seeds with their standard errors; seconds are those that one
processor core worked, of the runs that counted them."""


def load() -> list[dict[str, Any]]:
    """A run for each network and seed; the first results are a list of them."""
    files = sorted(RESULTS.glob("many_models_*.json"))
    found = [json.loads(file.read_text()) for file in files]
    return [run for each in found for run in (each if isinstance(each, list) else [each])]


def page() -> str:
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in load():
        runs.setdefault(run["network"], []).append(run)
    parts = [INTRODUCTION]
    for network, found in runs.items():
        own = [mean(member["accuracy"] for member in run["members"]) for run in found]
        told = _spread([{"accuracy": each} for each in own], "accuracy", 3)
        parts += [f"## {network}", f"The models themselves score {told}."]
        for count in found[0]["counts"]:
            having = [run for run in found if count in run["counts"]]
            seeds = ", ".join(str(run["seed"]) for run in having)
            parts += [f"### {count} models", f"Seeds {seeds}.", table(having, count)]
    commands = [
        f"experiments/many_models.py --network {network} --seeds "
        f"{' '.join(str(run['seed']) for run in found)}"
        for network, found in runs.items()
    ]
    parts.append(again(*commands, "many_models_page.py"))
    return "\n\n".join(parts) + "\n"


def table(runs: list[dict[str, Any]], count: str) -> str:
    found = [run["counts"][count] for run in runs]
    timed = [run["counts"][count] for run in runs if "threads" in run]
    lines = [
        "| alignment | accuracy of the mean | its loss | objective | seconds |",
        "|---|--:|--:|--:|--:|",
    ]
    plain = [each["as they are"] for each in found]
    lines.append(
        f"| none | {_spread(plain, 'accuracy', 3)} | {_spread(plain, 'loss', 2)} | - | - |"
    )
    for method in (name for name in found[0] if name != "as they are"):
        for strategy, told in STRATEGIES.items():
            rows = [each[method][strategy] for each in found if strategy in each[method]]
            if rows:
                reached = mean(row["objective"][-1] for row in rows)
                seconds = [each[method][strategy]["seconds"] for each in timed]
                lines.append(
                    f"| {method}, {told} | {_spread(rows, 'accuracy', 3)} | "
                    f"{_spread(rows, 'loss', 2)} | {reached:.1f} | {mean(seconds):.0f} |"
                )
    return "\n".join(lines)


def _spread(rows: list[dict[str, float]], name: str, digits: int) -> str:
    """Mean and standard error."""
    values = [row[name] for row in rows]
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values) / len(values) ** 0.5:.{digits}f}"


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
