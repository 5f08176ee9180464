"""Writes docs/every_merge.md: every merger, alignment and correction, from the committed results.

    python benchmarks/every_merge_page.py

A test fails where the page is not what this script would write.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from _pages import again, counted, dots, save, table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "every_merge.md"
RESULTS = ROOT / "benchmarks" / "experiments" / "results"
PICTURE = "every_merge.png"

SETTINGS = {
    "nonlocal": "two foundations, as they are",
    "permuted": "two foundations, permuted by weights",
    "permuted by activations": "two foundations, permuted by activations",
    "local": "one foundation",
}
CORRECTIONS = {
    "none": "none",
    "repair": "REPAIR",
    "least_squares": "least squares, shared",
    "data_free": "row lengths",
    "tact": "TACT",
    "refit": "refit",
    "refit+tact": "refit, then TACT",
}
ALL = range(2, 9)
SOME = 4  # mergers that are named
DRAWN = ("none", "tact", "refit")
MAIN = "4"

INTRODUCTION = """# Every merger under every correction

Made by `benchmarks/every_merge_page.py` from the results of
`benchmarks/experiments/every_merge.py`: the demo's experts (`cnn64`), aligned in every way,
merged by every method that merges any number of experts, and corrected, at {counts} tasks{unrun}.
A cell holds the mean normalised test accuracy (merged / expert) of the tasks{seeds}. Mergers
stand at their default parameters; the factor on task vectors (of {multiples} over the number of
tasks) and TALL-mask's threshold (of {thresholds}) are chosen on validation images for each
correction, but for refit and TACT on top of it, which take what was best under TACT. Corrections,
Fisher averaging and RegMean see {images} unlabelled images a task. TALL-mask makes a network for
each task, so that no layer is left that all share to be solved anew. `uniform_soup` is `linear`
here; `slerp` takes two experts.{stock}"""
LOST = 5.0  # points
LENGTHENED = ("regmean", "dare", "dare_ties", "della", "della_linear")
WHY = (
    "Row lengths take the rows of a merge for averages of the experts' rows, shorter and otherwise "
    "alike. RegMean's are no averages: they solve least squares on the inputs, and along "
    "directions in which the inputs hardly vary they grow far longer than any expert's with little "
    "effect; brought to the experts' lengths, they lose most of what does have one. DARE and DELLA "
    "drop entries at random and scale up those that stay: rows are longer while what they compute "
    "is the same on average. Both are to be corrected on data."
)

Results = Sequence[Mapping[str, Any]]


def load() -> Results:
    """The results of all seeds."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("every_merge_seed*.json"))]


def page() -> str:
    return told(load())


def told(results: Results) -> str:
    """The page of some results."""
    first = results[0]
    counts = sorted(finished(results), key=int)
    many = (
        f", means of {counted(results, 'seed')}"
        if len(results) > 1
        else f", of seed {first['seed']}"
    )
    partly = [result for result in results[1:] if len(result["counts"]) < len(first["counts"])]
    if partly:
        many += " where they were run (the tables say which)"
    left = [str(count) for count in ALL if str(count) not in counts]
    unrun = f" ({joined(left)} were not run to their end)" if left else ""
    introduction = INTRODUCTION.format(
        counts=joined(counts), unrun=unrun, seeds=many, images=first["images"],
        multiples=joined([f"{each:g}" for each in first["multiples"]]),
        thresholds=joined([f"{each:g}" for each in first["thresholds"]]),
        stock=stock(first, counts),
    )  # fmt: skip
    picture = f"![Accuracy by merger and setting](pictures/{PICTURE})"
    parts = [introduction, picture, *verdict(results, counts)]
    for count in counts:
        having = [result for result in results if whole(result, count)]
        seeds = ", ".join(str(result["seed"]) for result in having)
        parts += [f"## {count} tasks", f"Seeds {seeds}." if len(results) > 1 else ""]
        for setting, title in SETTINGS.items():
            parts += [f"### {title.capitalize()}, {count} tasks", scores(having, count, setting)]
    commands = [
        f"experiments/every_merge.py --seeds {result['seed']} --counts {' '.join(run)}"
        for result in results
        if (run := [count for count in counts if whole(result, count)])
    ]
    parts.append(again(*commands, "every_merge_page.py"))
    return "\n\n".join(part for part in parts if part) + "\n"


def stock(first: Mapping[str, Any], counts: Sequence[str]) -> str:
    """What Model Stock leaves of one seed's experts, not corrected."""
    if any("model_stock" not in first["counts"][c][s] for c in counts for s in SETTINGS):
        return ""
    found = {
        setting: [first["counts"][c][setting]["model_stock"]["none"]["average"] for c in counts]
        for setting in ("permuted", "local")
    }
    two = joined([f"{x:.2f} at {c}" for c, x in zip(counts, found["permuted"], strict=True)])
    return (
        f" Not corrected, `model_stock` leaves {two} tasks of two foundations permuted by weights, "
        f"and at least {min(found['local']):.2f} of one (seed {first['seed']})."
    )


def joined(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def whole(result: Mapping[str, Any], count: str) -> bool:
    """Whether a number of tasks was run to its end."""
    found = result["counts"].get(count, {})
    mergers = {
        merger for of in result["counts"].values() for each in of.values() for merger in each
    }
    return all(found.get(setting, {}).keys() >= mergers for setting in SETTINGS)


def finished(results: Results) -> list[str]:
    return [count for count in results[0]["counts"] if whole(results[0], count)]


def averages(results: Results, count: str, setting: str) -> dict[str, dict[str, float]]:
    """merger -> correction -> the mean over the seeds."""
    found = [result["counts"][count][setting] for result in results]
    return {
        merger: {
            name: mean(each[merger][name]["average"] for each in found)
            for name in CORRECTIONS
            if name in rows
        }
        for merger, rows in found[0].items()
    }


def scores(results: Results, count: str, setting: str) -> str:
    rows = []
    for merger, found in averages(results, count, setting).items():
        cells = [f"{found[name]:.3f}" if name in found else "-" for name in CORRECTIONS]
        rows.append([f"`{merger}`", *cells])
    return table(["merger", *CORRECTIONS.values()], rows)


def verdict(results: Results, counts: Sequence[str]) -> Iterator[str]:
    """What each correction adds to every merger and where it does not; what is left to local."""
    pairs = (("tact", "none"), ("tact", "repair"), ("refit+tact", "tact"), ("data_free", "none"))
    for correction, over in pairs:
        gains, below, mergers = [], [], []
        for count in counts:
            having = [result for result in results if whole(result, count)]
            for setting in SETTINGS:
                for merger, found in averages(having, count, setting).items():
                    if correction in found:
                        gains.append(100 * (found[correction] - found[over]))
                        if gains[-1] < 0:
                            below.append((gains[-1], f"`{merger}`, {SETTINGS[setting]}, {count}"))
                            mergers.append(f"`{merger}`")
        text = (
            f"{CORRECTIONS[correction]} {'are' if correction == 'data_free' else 'is'} "
            f"{mean(gains):+.1f} points above "
            f"{'no correction' if over == 'none' else CORRECTIONS[over]} on average"
        )
        where = f", below it in {len(below)} of {len(gains)} cells" if below else ", in every cell"
        if 0 < len(which := list(dict.fromkeys(mergers))) <= SOME:
            where += f" of {joined(which)}"
        worst = f" (most: {-min(below)[0]:.1f} points, {min(below)[1]} tasks)" if below else ""
        harm = lost(gains, below) if correction == "data_free" else ""
        yield f"{text[0].upper()}{text[1:]}{where}{worst}.{harm}"
    aligned = []
    for count in counts:
        having = [result for result in results if whole(result, count)]
        at = {setting: averages(having, count, setting) for setting in SETTINGS}
        behind = {
            merger: 100 * (max(at["local"][merger].values()) - max(found.values()))
            for merger, found in at["permuted by activations"].items()
        }
        best = min(behind, key=lambda merger: behind[merger])
        top = max(
            at["permuted by activations"],
            key=lambda merger: max(at["permuted by activations"][merger].values()),
        )
        value = max(at["permuted by activations"][top].values())
        aligned.append(
            f"{count} tasks: `{top}` {value:.3f}, {behind[top]:.1f} points behind one foundation"
            + (f" (nearest: `{best}`, {behind[best]:.1f})" if best != top else "")
        )
    yield (
        "Permuted by activations, the best merger and correction of the tables, and how far it is "
        f"behind the same merger's best of one foundation: {'; '.join(aligned)}."
    )


def lost(gains: Sequence[float], below: Sequence[tuple[float, str]]) -> str:
    """Where row lengths lose much, and why where the merger explains it."""
    much = Counter(where.split("`")[1] for gain, where in below if gain < -LOST)
    if not much:
        return ""
    each = joined([f"`{merger}` ({count})" for merger, count in much.most_common()])
    why = f" {WHY}" if set(much) <= set(LENGTHENED) else ""
    return f" More than {LOST:g} points are lost in {much.total()}: {each}.{why}"


def draw(results: Results) -> dict[str, bytes]:
    """Mergers beside one another at the main number of tasks, by the picture's file name."""
    having = [result for result in results if whole(result, MAIN)]
    at = {setting: averages(having, MAIN, setting) for setting in SETTINGS}
    panels = {
        f"{CORRECTIONS[name]}, {MAIN} tasks": {
            SETTINGS[setting]: {m: rows[name] for m, rows in found.items() if name in rows}
            for setting, found in at.items()
        }
        for name in DRAWN
    }
    return {PICTURE: dots(panels, "normalised accuracy", 1.03)}


def main() -> None:
    results = load()
    save(draw(results))
    PAGE.write_text(told(results))


if __name__ == "__main__":
    main()
