"""What docs/questions.md says of the survey's questions."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from _pages import spread, table

Seeds = Sequence[Mapping[str, Any]]

# Of one task: title -> how many networks run for a sample.
NETWORKS = {
    "one expert": 1,
    "one expert of the other foundation": 1,
    "uniform soup of three": 1,
    "greedy soup of three": 1,
    "ensemble of three": 3,
    "two foundations, averaged as they are": 1,
    "two foundations, as they are, refitted": 1,
    "two foundations, aligned and averaged": 1,
    "two foundations, aligned, refitted": 1,
    "ensemble of two foundations": 2,
}


def sections(seeds: Seeds) -> list[str]:
    return [
        "## Ensembles, soups and single experts beside merging",
        f"Several networks of *one* task ({', '.join(seeds[0]['one task'])}): three fine-tunings "
        "of one foundation whose batches differ in order, and one of another foundation. Test "
        "accuracy; refits see 512 unlabelled images.",
        one_task_table(seeds),
        one_task_verdict(seeds),
        "## Task negation",
        "A task's vector is subtracted from the first foundation, by the largest factor (of steps "
        "of 0.1, to 3) that keeps 95 % of the accuracy in its own 240-way task on validation "
        "images. *Forget* is the accuracy in the task under a logistic probe of the foundation, "
        "*retain* that in the foundation's own task, both on test images.",
        negation_table(seeds),
        negation_verdict(seeds),
        "## Paths between children of one checkpoint",
        "![Error along the path, and the units that tasks change](pictures/questions_survey.png)",
        "Two foundations that see the same batches for a share of their training, then others. The "
        "error halfway between them above the mean error of both ends, in points.",
        children_table(seeds),
        "## The units that a task lives in",
        "Which tenth of the units of a layer fine-tuning has changed most (by their incoming "
        "weights), and the share that two experts have in common; chance is 0.10.",
        unit_table(seeds),
        unit_verdict(seeds),
    ]


def one_task(seeds: Seeds, title: str) -> list[float]:
    """Accuracy by seed, means over the tasks."""
    return [mean(rows[title] for rows in seed["one task"].values()) for seed in seeds]


def one_task_table(seeds: Seeds) -> str:
    rows = [
        [title, spread(one_task(seeds, title)), str(count)] for title, count in NETWORKS.items()
    ]
    return table(["network", "accuracy", "networks run"], rows)


def one_task_verdict(seeds: Seeds) -> str:
    def gain(title: str) -> str:
        other = mean(one_task(seeds, "one expert of the other foundation"))
        single = (mean(one_task(seeds, "one expert")) + other) / 2
        return f"{100 * (mean(one_task(seeds, title)) - single):+.1f}"

    return (
        "Against a single expert (the mean of both), in points: a uniform soup "
        f"{gain('uniform soup of three')}, the ensemble of the same three "
        f"{gain('ensemble of three')}; of two foundations, the ensemble "
        f"{gain('ensemble of two foundations')}, aligned and averaged "
        f"{gain('two foundations, aligned and averaged')}, aligned and refitted "
        f"{gain('two foundations, aligned, refitted')}."
    )


def negated(seeds: Seeds, title: str, what: str) -> list[float]:
    return [mean(rows[title][what] for rows in seed["negation"].values()) for seed in seeds]


def _vectors(seeds: Seeds) -> list[str]:
    return list(next(iter(seeds[0]["negation"].values())))


def negation_table(seeds: Seeds) -> str:
    rows = [
        [
            title, *(spread(negated(seeds, title, what)) for what in ("forget", "retain")),
            spread(negated(seeds, title, "factor"), 2),
        ]
        for title in _vectors(seeds)
    ]  # fmt: skip
    return table(["vector subtracted", "forget", "retain", "factor"], rows)


def negation_verdict(seeds: Seeds) -> str:
    before = mean(negated(seeds, "nothing", "forget"))

    def lost(title: str) -> str:
        return f"{100 * (before - mean(negated(seeds, title, 'forget'))):.1f}"

    return (
        f"Its own vector takes {lost('its own')} points of the task, one of another foundation "
        f"{lost('of the other foundation, aligned')} after alignment and "
        f"{lost('of the other foundation')} as it is, noise {lost('noise of its lengths')}."
    )


def above(errors: Sequence[float]) -> float:
    """Points halfway above the mean of the ends."""
    return 100 * (errors[len(errors) // 2] - (errors[0] + errors[-1]) / 2)


def children_table(seeds: Seeds) -> str:
    rows = [
        [
            f"{float(common):.0%}",
            spread([100 * seed["children"][common]["as they are"][0] for seed in seeds], 1),
            *(
                spread([above(seed["children"][common][how]) for seed in seeds], 1)
                for how in ("as they are", "aligned")
            ),
        ]
        for common in seeds[0]["children"]
    ]
    header = ["steps in common", "error of a child, %", "halfway, as they are", "aligned"]
    return table(header, rows)


def unit_table(seeds: Seeds) -> str:
    layers = list(next(iter(seeds[0]["units"].values())))
    rows = [
        [title, *(spread([seed["units"][title][layer] for seed in seeds]) for layer in layers)]
        for title in seeds[0]["units"]
    ]
    return table(["compared", *(f"`{layer.rpartition('.')[2]}`" for layer in layers)], rows)


def unit_verdict(seeds: Seeds) -> str:
    def overall(title: str) -> float:
        return mean(mean(seed["units"][title].values()) for seed in seeds)

    return "Over all layers: " + ", ".join(
        f"{title} {overall(title):.2f}" for title in seeds[0]["units"]
    ) + "."  # fmt: skip


def draw(seeds: Seeds) -> dict[str, bytes]:
    """File name -> picture."""
    from nlm.cli import figures

    def along(common: str, how: str) -> list[float]:
        return [
            mean(column)
            for column in zip(*(s["children"][common][how] for s in seeds), strict=True)
        ]

    commons = list(seeds[0]["children"])
    count = len(along(commons[0], "as they are"))
    paths = {f"{float(common):.0%} in common": along(common, "as they are") for common in commons}
    paths[f"{float(commons[0]):.0%}, aligned"] = along(commons[0], "aligned")
    places = [number / (count - 1) for number in range(count)]
    shared = {
        title: [mean(s["units"][title][layer] for s in seeds) for layer in layers]
        for title, layers in seeds[0]["units"].items()
    }
    layers = range(1, 1 + len(next(iter(shared.values()))))
    return {
        "questions_survey.png": figures.png(
            [
                figures.curves(places, paths, "from one child to the other", "error", 0),
                figures.curves(layers, shared, "layer", "units in common", 0),
            ],
            3.4, (), 80,
        )
    }  # fmt: skip
