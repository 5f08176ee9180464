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


SAME = 0.5  # points: what is called nothing
BITS = 5e-4  # of a score: rows of the same networks differ by less


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
    return [*parts, f"{added(results, zero)} {unlike(results, zero)}"]


def added(results: Results, zero: Results) -> str:
    """What task vectors add to each correction, and what follows where it is nothing."""
    found = {
        name: mean(
            100 * (one["settings"][setting][count][name]["average"] - at[name]["average"])
            for one, other in zip(results, zero, strict=True)
            for setting, counts in other["settings"].items()
            for count, at in counts.items()
        )
        for name in SOLVED
    }
    each = ", ".join(f"{SOLVED[name][0]} {points:+.1f}" for name, points in found.items())
    told = f"What task vectors add, in points, over all seeds and settings: {each}."
    if max(abs(points) for name, points in found.items() if name != "tact") > SAME:
        return told
    return (
        f"{told} Layers that are solved anew take the tasks from the experts' features: the merge "
        "is where they start, and the mean of the foundations does as well."
    )


def unlike(results: Results, zero: Results) -> str:
    """What else differs between results with task vectors and without: ridges and networks."""
    ridges = {
        f"{each[name]['ridge']:g}"
        for result in zero
        for counts in result["settings"].values()
        for each in counts.values()
        for name in ("low_rank", "low_rank_tact")
    }
    told = (
        f"At a scale of 0 parts of low rank have a ridge of {' or '.join(sorted(ridges))}; at the "
        f"other, validation images choose it of {', '.join(map(str, results[0]['ridges']))}."
    )
    digests = [[result.get("networks") for result in found] for found in (results, zero)]
    if digests[0] == digests[1] and None not in digests[0]:
        return told
    if None in digests[0] + digests[1]:
        return (
            f"{told} The results of one side were written without a digest of their networks: "
            "whether both are of the same ones, trained to the same bits, is not known, and "
            "differences of some tenths of a point say nothing."
        )
    return f"{told} Both sides are of networks of other digests."


def another_run(pairs: Sequence[tuple[float, float]], than: str) -> str:
    """That results are of another run, where the same row of one seed differs; else nothing."""
    apart = [100 * abs(one - other) for one, other in pairs]
    if not apart or max(apart) < 100 * BITS:
        return ""
    return (
        f"These are of another run than {than}, of another revision and, as no digest says "
        "otherwise, of networks that were trained anew by the same settings: the same row of one "
        f"seed differs by {mean(apart):.1f} points on average, {max(apart):.1f} at most."
    )


def both(one: Results, other: Results, names: Mapping[str, str]) -> list[tuple[float, float]]:
    """The averages of cells that both results hold, by the names of the rows in each."""
    seeds = {result["seed"]: result["settings"] for result in other}
    return [
        (at[name]["average"], theirs["average"])
        for result in one
        for setting, counts in result["settings"].items()
        for count, at in counts.items()
        for name, known in names.items()
        for theirs in [seeds.get(result["seed"], {}).get(setting, {}).get(count, {}).get(known)]
        if theirs and name in at
    ]


MERGING = {"plain": "none", "repair": "repair", "tact": "tact"}  # rows here and in corrections.py


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
