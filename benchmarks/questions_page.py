"""Writes docs/questions.md and its pictures: the papers' open questions, from committed results.

    python benchmarks/questions_page.py

A test fails where the page is not what this script would write. What is about text stands in
``_text_questions.py``, what the survey asks in ``_survey_questions.py``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import _survey_questions
import _text_questions
from _pages import again, save, spread, table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "questions.md"
RESULTS = ROOT / "benchmarks" / "experiments" / "results"

ASKED = ("size", "foundation", "survey", "text")
TEXT = RESULTS / "text_questions.json"

Seeds = Sequence[Mapping[str, Any]]  # what each seed found

ROWS = {
    "plain": "not corrected",
    "repair": "REPAIR",
    "tact": "TACT",
    "refit_tact": "refit, then TACT",
}
SETTINGS = {
    "local": "one foundation",
    "nonlocal": "two, as they are",
    "permuted": "two, permuted by weights",
    "permuted by activations": "two, permuted by activations",
}

_INTRODUCTION = """# Open questions

Made by `benchmarks/questions_page.py` from the results of `size_questions.py`,
`foundation_questions.py`, `survey_questions.py` and `text_questions.py` in
`benchmarks/experiments`: what the papers on non-local merging (arXiv:2410.12766), on merging text
transformers (arXiv:2403.00986) and on model merging at large (arXiv:2410.12927) leave open, asked
of small networks. Perceptrons of the demo's images, where nothing else is said of four layers of
256 units; experts are merged by Task Arithmetic, corrections see {calibration} unlabelled images a
task, the scale is chosen on validation images, and scores are normalised test accuracies (merged
over expert). Means with their standard errors over seeds {seeds}. What holds for these sizes need
not hold for others."""


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}_questions.json").read_text())


def seeds_of(found: Mapping[str, Any]) -> Seeds:
    return list(found["seeds"].values())


def page() -> str:
    sizes, several, asked = load("size"), load("foundation"), load("survey")
    introduction = _INTRODUCTION.format(
        calibration=sizes["calibration"], seeds=", ".join(sizes["seeds"])
    )
    sections = [
        *size_sections(seeds_of(sizes)),
        *foundation_sections(seeds_of(several)),
        *data_section(),
        *(_text_questions.sections(load("text")) if TEXT.exists() else []),
        *_survey_questions.sections(seeds_of(asked)),
        again(*(f"experiments/{each}_questions.py" for each in ASKED), "questions_page.py"),
    ]
    return "\n\n".join([introduction, *sections]) + "\n"


# --- width, depth, images -------------------------------------------------------------------------


def average(seeds: Seeds, size: str, setting: str, row: str) -> list[float]:
    return [seed[size]["settings"][setting]["rows"][row]["average"] for seed in seeds]


def left(seeds: Seeds, size: str, setting: str) -> list[float]:
    """The share of the variance that is left in the last layer."""
    return [seed[size]["settings"][setting]["variance_ratio"][-1] for seed in seeds]


def behind(seeds: Seeds, size: str, row: str) -> list[float]:
    """Points between one foundation and two that are permuted by activations."""
    there = average(seeds, size, "permuted by activations", row)
    return [100 * (a - b) for a, b in zip(average(seeds, size, "local", row), there, strict=True)]


def size_table(seeds: Seeds, names: Mapping[str, str]) -> str:
    header = [
        "network", "foundations", "variance left, as they are", "aligned", "not corrected",
        "TACT", "refit, then TACT", "points behind one foundation",
    ]  # fmt: skip
    rows = []
    for name, title in names.items():
        aligned = "permuted by activations"
        own = [mean(seed[name]["foundations"]) for seed in seeds]
        accuracies = [
            spread(average(seeds, name, aligned, row)) for row in ("plain", "tact", "refit_tact")
        ]
        rows.append(
            [
                title, spread(own), spread(left(seeds, name, "nonlocal")),
                spread(left(seeds, name, aligned)), *accuracies,
                spread(behind(seeds, name, "refit_tact"), 1),
            ]
        )  # fmt: skip
    return table(header, rows)


def trend(seeds: Seeds, names: Mapping[str, str], what: str) -> str:
    """From the first to the last of some networks."""
    first, *_, last = names
    aligned = "permuted by activations"

    def both(found: Any, digits: int = 2) -> str:
        return " to ".join(f"{mean(found(name)):.{digits}f}" for name in (first, last))

    plain, tact = (
        both(lambda name, row=row: average(seeds, name, aligned, row)) for row in ("plain", "tact")
    )
    return (
        f"From {names[first]} to {names[last]}, {what}: of the last layer's variance after "
        f"alignment {both(lambda name: left(seeds, name, aligned))} is left, accuracy "
        f"without a correction goes from {plain}, with TACT from {tact}, and the "
        "distance to one foundation under refit and TACT from "
        f"{both(lambda name: behind(seeds, name, 'refit_tact'), 1)} points."
    )


def named(seeds: Seeds, word: str) -> dict[str, str]:
    """The networks that differ in one thing, in its order -> what they are called."""
    usual = {
        "width 256": {"width": "width 256", "depth": "depth 4", "images": "24000 images"}[word]
    }
    found = {name: name for name in seeds[0] if word in name} | usual
    return dict(sorted(found.items(), key=lambda each: int("".join(filter(str.isdigit, each[1])))))


def size_sections(seeds: Seeds) -> list[str]:
    """Of one that changes the others stay: width 256, depth 4, 24,000 images."""
    widths, depths, images = (named(seeds, word) for word in ("width", "depth", "images"))
    return [
        "## Is variance collapse worse in wider or deeper networks?",
        "![Variance by layer, and accuracy by width](pictures/questions_sizes.png)",
        "Four tasks, experts of two foundations in turn, permuted by activations.",
        size_table(seeds, widths),
        trend(seeds, widths, "at depth 4"),
        size_table(seeds, depths),
        trend(seeds, depths, "at width 256"),
        "## How much do the foundations have to have seen?",
        "The same number of steps for all: fewer images are seen more often.",
        size_table(seeds, images),
        trend(seeds, images, "in as many steps"),
    ]


# --- more foundations, more tasks, drift ----------------------------------------------------------


def foundation_sections(seeds: Seeds) -> list[str]:
    first = seeds[0]["foundations"]
    columns = ("plain", "tact", "refit_tact")
    rows = [
        [
            count, title,
            *(
                spread([s["foundations"][count][title]["rows"][row]["average"] for s in seeds])
                for row in columns
            ),
            spread([s["foundations"][count][title]["variance_ratio"][-1] for s in seeds]),
        ]
        for count, rows in first.items()
        for title in rows
    ]  # fmt: skip
    header = ["foundations", "alignment", *(ROWS[row] for row in columns), "variance left"]
    return [
        "## Three and four foundations",
        "Eight tasks, whose experts come from so many foundations in turn. One permutation each, "
        "into an order that all share, is all that is found; round every cycle the maps cancel.",
        table(header, rows, names=2),
        foundation_verdict(seeds),
        "## Every number of tasks",
        "Experts of two foundations, permuted by activations, and of one.",
        task_table(seeds),
        task_verdict(seeds),
        "## The second kind of non-locality: far from the foundation that all share",
        "![Accuracy against the number of foundations, and against the distance](pictures/"
        "questions_foundations.png)",
        "Four experts of one foundation, fine-tuned ever longer and harder. The distance is that "
        "of the trunk's weights from the foundation's, relative to their length; the cosine is "
        "that between the ways of two experts.",
        drift_table(seeds),
        drift_verdict(seeds),
    ]


def best(seeds: Seeds, count: str, row: str) -> tuple[str, float]:
    """The alignment with the best mean, and that."""
    found = {
        title: mean(seed["foundations"][count][title]["rows"][row]["average"] for seed in seeds)
        for title in seeds[0]["foundations"][count]
    }
    title = max(found, key=lambda each: found[each])
    return title, found[title]


def foundation_verdict(seeds: Seeds) -> str:
    told = []
    for count in seeds[0]["foundations"]:
        title, value = best(seeds, count, "refit_tact")
        told.append(f"{value:.3f} with {count} ({title})")
    plain = [f"{best(seeds, count, 'plain')[1]:.2f}" for count in seeds[0]["foundations"]]
    return (
        f"The best under refit and TACT: {', '.join(told)}; without a correction "
        f"{', '.join(plain)}. What one permutation a foundation cannot align adds up with the "
        "number of foundations; corrections make up for most of it."
    )


def gains(seeds: Seeds, tasks: str, count: str = "2") -> list[float]:
    """What TACT has above REPAIR."""
    rows = [seed["tasks"][count][tasks]["rows"] for seed in seeds]
    return [each["tact"]["average"] - each["repair"]["average"] for each in rows]


def task_table(seeds: Seeds) -> str:
    columns = ("plain", "repair", "tact")
    header = ["tasks", *(f"two, {ROWS[row]}" for row in columns), "TACT above REPAIR"]
    header += [f"one, {ROWS[row]}" for row in columns]
    rows = []
    for tasks in seeds[0]["tasks"]["2"]:
        two, one = (
            [
                spread([seed["tasks"][count][tasks]["rows"][row]["average"] for seed in seeds])
                for row in columns
            ]
            for count in ("2", "1")
        )
        rows.append([tasks, *two, spread(gains(seeds, tasks)), *one])
    return table(header, rows)


def task_verdict(seeds: Seeds) -> str:
    """Whether TACT is above REPAIR from three tasks on."""
    known = {tasks: gains(seeds, tasks) for tasks in seeds[0]["tasks"]["2"] if int(tasks) > 2}
    missed = [tasks for tasks, found in known.items() if not mean(found) > 0]
    lowest = min((value, tasks) for tasks, found in known.items() for value in found)
    text = (
        f"The least that TACT has above REPAIR with three tasks or more, of all seeds, is "
        f"{lowest[0]:+.3f}, at {lowest[1]} tasks. The goal, TACT above REPAIR at every number of "
        "tasks from three on, "
    )
    return text + (f"is missed at {', '.join(missed)}." if missed else "is met.")


def drift_table(seeds: Seeds) -> str:
    header = ["fine-tuned", "distance", "of the nearest", "cosine", "experts' accuracy"]
    header += [*ROWS.values(), "variance left"]
    nearest = [next(iter(seed["drift"].values()))["distance"] for seed in seeds]
    rows = []
    for name in seeds[0]["drift"]:
        found = [seed["drift"][name] for seed in seeds]
        ratio = mean(each["distance"] / least for each, least in zip(found, nearest, strict=True))
        rows.append(
            [
                name, spread([each["distance"] for each in found]), f"{ratio:.1f} x",
                spread([each["cosine"] for each in found]),
                spread([mean(each["experts"].values()) for each in found]),
                *(spread([each["rows"][row]["average"] for each in found]) for row in ROWS),
                spread([each["variance_ratio"][-1] for each in found]),
            ]
        )  # fmt: skip
    return table(header, rows)


def drift_verdict(seeds: Seeds) -> str:
    names = list(seeds[0]["drift"])

    def at(name: str, row: str) -> float:
        return mean(seed["drift"][name]["rows"][row]["average"] for seed in seeds)

    far = names[-1]
    return (
        f"Without a correction {at(names[0], 'plain'):.3f} is left of the accuracy where the "
        f"experts are nearest and {at(far, 'plain'):.3f} where they are furthest; there TACT "
        f"brings {at(far, 'tact'):.3f}, refit and TACT {at(far, 'refit_tact'):.3f}. The foundation "
        "is shared: no permutation of it is at fault here."
    )


def data_section() -> list[str]:
    return [
        "## Corrections without data",
        "A correction that needs no sample, one that needs no task id, and what they recover of "
        "TACT's gain, stand [beside the other corrections](corrections.md).",
    ]


# --- pictures -------------------------------------------------------------------------------------


def draw() -> dict[str, bytes]:
    """File name -> picture."""
    from nlm.cli import figures

    sizes, several = seeds_of(load("size")), seeds_of(load("foundation"))
    aligned = "permuted by activations"

    def layers(names: Mapping[str, str]) -> Any:
        series = {
            title: [
                mean(column)
                for column in zip(
                    *(s[name]["settings"][aligned]["variance_ratio"] for s in sizes), strict=True
                )
            ]
            for name, title in names.items()
        }

        def lines(axes: Any) -> None:
            for name, found in series.items():
                places = [number / (len(found) - 1) for number in range(len(found))]
                axes.plot(places, found, marker="o", ms=4, label=name)
            axes.set_ylim(0, 1.03)
            axes.set_xlabel("depth, from the first layer to the last")
            axes.set_ylabel("variance, merged over expert")
            axes.legend(fontsize=8)

        return lines

    widths = [name for name in sizes[0] if name.startswith("width")]
    by_width = {
        ROWS[row]: [mean(average(sizes, name, aligned, row)) for name in widths]
        for row in ("plain", "tact", "refit_tact")
    }
    by_width["one foundation, not corrected"] = [
        mean(average(sizes, name, "local", "plain")) for name in widths
    ]
    x = [float(name.split()[1]) for name in widths]
    counts = list(several[0]["foundations"])
    by_count = {
        ROWS[row]: [best(several, count, row)[1] for count in counts]
        for row in ("plain", "tact", "refit_tact")
    }
    far = list(several[0]["drift"])
    distance = [mean(s["drift"][name]["distance"] for s in several) for name in far]
    by_distance = {
        title: [mean(s["drift"][name]["rows"][row]["average"] for s in several) for name in far]
        for row, title in ROWS.items()
    }
    up = "normalised accuracy"
    return {
        "questions_sizes.png": figures.png(
            [
                layers(named(sizes, "width")), layers(named(sizes, "depth")),
                figures.curves(x, by_width, "width", up, 0),
            ],
            3.4, (), 80,
        ),
        "questions_foundations.png": figures.png(
            [
                figures.curves(range(1, len(counts) + 1), by_count, "foundations", up, 0),
                figures.curves(distance, by_distance, "distance, relative", up, 0),
            ],
            3.4, (), 80,
        ),
        **(_text_questions.draw(load("text")) if TEXT.exists() else {}),
        **_survey_questions.draw(seeds_of(load("survey"))),
    }  # fmt: skip


def main() -> None:
    save(draw())
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
