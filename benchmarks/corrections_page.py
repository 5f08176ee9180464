"""Writes docs/corrections.md: what each correction of a merged model gains, needs and costs.

    python benchmarks/corrections_page.py

makes it of the committed results; a test fails where the page is not what this script would write.
"""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "corrections.md"
RESULTS = ROOT / "benchmarks" / "experiments" / "results"

NETWORKS = {
    "cnn64": "Two convolutions, two linear layers, no norm",
    "cnn64_norm": "The same with BatchNorm",
}
SETTINGS = {
    "permuted": "Experts of two foundations, aligned",
    "nonlocal": "Experts of two foundations, as they are",
    "local": "Experts of one foundation",
}

INTRODUCTION = """# Corrections beside one another

Made by `benchmarks/corrections_page.py` from the results of
`benchmarks/experiments/corrections.py`. The experts are merged by Task Arithmetic, and the scale is
chosen on labelled validation images after each correction. A cell holds normalised test accuracy
(merged / expert), the mean over the tasks with its standard deviation over the seeds, and that of
the worst task; *scale 0* is the same without task vectors. Bytes are those of each task's own
parameters beside its head, seconds those of one fit at the largest number of tasks; *needs* is per
task."""


def load(network: str) -> list[dict[str, Any]]:
    """The results of all seeds of a network."""
    return [
        json.loads(path.read_text())
        for path in sorted(RESULTS.glob(f"corrections_{network}_seed*.json"))
    ]


def page() -> str:
    parts = [INTRODUCTION]
    for network in NETWORKS:
        if results := load(network):
            parts += [f"## {NETWORKS[network]}", *section(results)]
    return "\n\n".join(parts) + "\n"


def section(results: list[dict[str, Any]]) -> list[str]:
    seeds = ", ".join(str(result["seed"]) for result in results)
    parts = [f"Seeds {seeds}. {verdict(results)}"]
    for setting in results[0]["settings"]:
        parts += [f"### {SETTINGS[setting]}", table(results, setting)]
    return parts


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
        cells += [_scores(found, "") for found in at.values()]
        cells += [_scores(found, "_at_zero") for found in at.values()]
        price = at[counts[-1]]
        cells += [f"{price[0]['bytes']:,}", f"{mean(each['seconds'] for each in price):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(results: list[dict[str, Any]]) -> str:
    """What each correction recovers of TACT's gain, and how far from local merging it ends."""
    text = []
    for count in results[0]["settings"]["permuted"]:
        shares = ", ".join(
            f"{results[0]['rows'][name]['title']} {share(results, name, count):.0%}"
            for name, row in results[0]["rows"].items()
            if name not in ("none", "tact") and "labels" not in row["needs"]
        )
        behind = average(results, "local", count, "tact") - average(
            results, "permuted", count, "tact"
        )
        text.append(
            f"At {count} tasks, aligned, of what TACT gains: {shares}; TACT ends "
            f"{100 * behind:.1f} points behind local merging with TACT."
        )
    return " ".join(text)


def share(results: list[dict[str, Any]], name: str, count: str) -> float:
    """The part of TACT's gain over no correction that another correction reaches, aligned."""
    none, tact, other = (
        average(results, "permuted", count, each) for each in ("none", "tact", name)
    )
    return (other - none) / (tact - none)


def average(results: list[dict[str, Any]], setting: str, count: str, name: str) -> float:
    return mean(result["settings"][setting][count][name]["average"] for result in results)


def _scores(found: list[dict[str, Any]], suffix: str) -> str:
    """Mean over the seeds with its spread / the worst task's mean."""
    averages = [each[f"average{suffix}"] for each in found]
    worst = mean(each[f"worst{suffix}"] for each in found)
    spread = f" ± {stdev(averages):.3f}" if len(averages) > 1 else ""
    return f"{mean(averages):.3f}{spread} / {worst:.2f}"


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
