"""Parts of docs/corrections.md: layers that are solved anew, and corrections without data."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from _pages import counted
from _pages import table as table_of

Results = Sequence[Mapping[str, Any]]

SOLVED_SETTINGS = {
    "permuted by activations": "Experts of two foundations, aligned",
    "nonlocal": "Experts of two foundations, as they are",
    "local": "Experts of one foundation",
}
SOLVED = {
    "tact": ("TACT", "512 images, a task id"),
    "refit": ("refit", "512 images"),
    "refit_tact": ("refit, then TACT", "512 images, a task id"),
    "low_rank": ("refit, low rank", "512 images, a task id"),
    "low_rank_tact": ("refit, low rank, then TACT", "512 images, a task id"),
}
FREE = {
    "none": "none",
    "shared_free": "row lengths, shared",
    "free": "row lengths",
    "refit_fields": "refit on random fields, shared",
    "noise": "TACT, white noise",
    "tact": "TACT",
}


def solved(results: Results, zero: Results) -> list[str]:
    """Refit and what stands on it, with and without task vectors: the results of low_rank.py."""
    if not results or not zero:
        return []
    counts = ("4", "8")
    parts = [
        "### Layers solved anew",
        f"Permuted by activations, at a scale of {results[0]['scale']} or 0, on "
        f"{results[0]['images']} images a task; {counted(results, 'seed')} "
        f"({', '.join(str(r['seed']) for r in results)}). TACT stands beside as it is there. "
        "[More of them](refit.md).",
    ]
    for setting, title in SOLVED_SETTINGS.items():
        there = [count for count in counts if count in results[0]["settings"][setting]]
        rows = []
        for name, (told, needs) in SOLVED.items():
            at = [
                [r["settings"][setting][count][name] for r in found]
                for found in (results, zero)
                for count in there
            ]
            price = at[len(there) - 1]
            costs = [f"{price[0]['bytes']:,}", f"{min(each['seconds'] for each in price):.1f}"]
            rows.append([told, needs, *(scores(each, "") for each in at), *costs])
        columns = [*(f"{count} tasks" for count in there), *(f"{c}, scale 0" for c in there)]
        header = ["correction", "needs", *columns, "bytes per task", "seconds, least"]
        parts += [f"**{title}**", table_of(header, rows, 2)]
    lost = {
        told: [
            100 * (one["settings"][setting][count][name]["average"] - at[name]["average"])
            for one, other in zip(results, zero, strict=True)
            for setting, counts in other["settings"].items()
            for count, at in counts.items()
        ]
        for name, (told, _) in SOLVED.items()
    }
    each = ", ".join(f"{told} {mean(points):+.1f}" for told, points in lost.items())
    return [
        *parts,
        f"What task vectors add, in points, over all seeds and settings: {each}. Layers that are "
        "solved anew take the tasks from the experts' features: the merge is where they start, and "
        "the mean of the foundations does as well.",
    ]


def without_data(results: Results, tables: Results) -> list[str]:
    """What weights, random fields and white noise recover of what TACT gains on data.

    ``tables`` are the results of the same networks that hold refit.
    """
    rows, told = [], []
    of = {(table["seed"], table["networks"]): table for table in tables}
    for count in results[0]["counts"]:
        found = [
            {**of[r["seed"], r["networks"]]["settings"]["permuted"][count], **r["counts"][count]}
            for r in results
        ]
        means = {name: mean(at[name]["average"] for at in found) for name in FREE}
        gain = means["tact"] - means["none"]
        parts = {name: (means[name] - means["none"]) / gain for name in FREE}
        rows.append(
            [count]
            + [
                scores([at[name] for at in found], "")
                + ("" if name in ("none", "tact") else f" ({parts[name]:.0%})")
                for name in FREE
            ]
        )
        best = max(parts[name] for name in FREE if name not in ("none", "tact"))
        reached = "met" if best >= 0.5 else "missed"
        told.append(f"{reached} at {count} tasks ({best:.0%})")
    return [
        f"Aligned by weights, on {counted(results, 'seed')}. *Row lengths* look at weights alone; "
        "*refit on random fields* solves all layers anew on 1,024 samples of "
        "`nlm.correct.random_fields`, the same for all tasks, and needs no task id; *white noise* "
        "is TACT fitted to normal noise in the place of images. In brackets the share of TACT's "
        "gain.",
        table_of(["tasks", *FREE.values()], rows),
        f"Half of TACT's gain by the best of them: {', '.join(told)}.",
    ]


def scores(found: Results, suffix: str) -> str:
    """Mean over the seeds with its spread / the worst task's mean."""
    averages = [each[f"average{suffix}"] for each in found]
    worst = mean(each[f"worst{suffix}"] for each in found)
    spread = f" ± {stdev(averages):.3f}" if len(averages) > 1 else ""
    return f"{mean(averages):.3f}{spread} / {worst:.2f}"
