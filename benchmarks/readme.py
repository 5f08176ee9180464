"""Writes README's tables and figure, and docs/performance.md, from the committed results.

    python benchmarks/readme.py

A test fails where README is not what this script would write.
"""

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

import _performance

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "experiments" / "results"
FIGURE = RESULTS / "nonlocal_merging.svg"

_SETTINGS = {"nonlocal": "two foundations", "permuted": "two, aligned", "local": "one foundation"}
_ROWS = {
    "plain": "Task Arithmetic",
    "repair": "+ REPAIR",
    "tact": "**+ TACT**",
    "tact_once": "+ TACT, all layers' statistics at once",
    "tact_lambda0": "TACT without task vectors (scale 0)",
    "probe": "+ linear probe, 128 *labels* a task",
    "probe_full": "+ linear probe, 1500 *labels* a task",
}
_COLOURS = {"nonlocal": "#b3431e", "permuted": "#1e6fb3", "local": "#4d8a3d"}


def load() -> list[dict[str, Any]]:
    """The results of all seeds."""
    return [
        json.loads(path.read_text()) for path in sorted(RESULTS.glob("nonlocal_merging_*.json"))
    ]


def table(results: list[dict[str, Any]]) -> str:
    """Average / worst normalised accuracy at 4 and 8 tasks, means over the seeds."""
    header = [f"{name}, {count}" for count in (4, 8) for name in _SETTINGS.values()]
    lines = [f"| tasks | {' | '.join(header)} |", "|---" * (len(header) + 1) + "|"]
    for row, title in _ROWS.items():
        cells = [
            " / ".join(
                f"{_mean(results, setting, count, row, what):.2f}" for what in ("average", "worst")
            )
            for count in (4, 8)
            for setting in _SETTINGS
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    seeds = ", ".join(str(result["seed"]) for result in results)
    lines += [
        "",
        f"Normalised accuracy (merged / expert), average / worst task, means over seeds {seeds}. "
        "TACT and REPAIR see 128 unlabelled images a task; the scale is chosen on validation "
        "images, all scores are on test images. "
        "A single expert scores 1 on its own task by definition. "
        f"The two foundations score {_accuracies(results)} in their own 240-way task.",
    ]
    return "\n".join(lines)


def figure(results: list[dict[str, Any]]) -> None:
    """Average normalised accuracy against the number of tasks, plain and with TACT."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "nlm", "svg.fonttype": "none", "font.size": 10})
    counts = [int(count) for count in results[0]["settings"]["permuted"]]
    drawing, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    for setting, title in _SETTINGS.items():
        for row, style, label in (
            ("tact", "-", f"{title}, TACT"),
            ("plain", ":", f"{title}, plain"),
        ):
            values = [_mean(results, setting, count, row, "average") for count in counts]
            axes.plot(counts, values, style, color=_COLOURS[setting], marker="o", label=label)
    axes.set(xlabel="merged tasks", ylabel="normalised accuracy", ylim=(0, 1.03), xticks=counts)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    drawing.savefig(FIGURE, metadata={"Date": None})
    plt.close(drawing)


def filled(readme: str, results: list[dict[str, Any]]) -> str:
    """README with its tables as the results say."""
    for mark, text in (
        ("results", table(results)),
        ("timings", _performance.readme_table(_performance.load())),
    ):
        pattern = rf"(<!-- {mark}: [^>]*-->\n).*?(<!-- end of {mark} -->)"
        readme = re.sub(
            pattern, lambda m, text=text: f"{m[1]}{text}\n{m[2]}", readme, flags=re.DOTALL
        )
    return readme


def performance_page() -> str:
    return _performance.page(_performance.load())


def _mean(results: list[dict[str, Any]], setting: str, count: int, row: str, what: str) -> float:
    return mean(result["settings"][setting][str(count)][row][what] for result in results)


def _accuracies(results: list[dict[str, Any]]) -> str:
    ends = [result["foundations"][name] for result in results for name in ("A", "B")]
    together = mean(result["foundations"]["ensemble"] for result in results)
    return f"{min(ends):.2f} to {max(ends):.2f} (their ensemble {together:.2f})"


def main() -> None:
    results = load()
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(), results))
    figure(results)
    PAGE.write_text(performance_page())


if __name__ == "__main__":
    main()
