"""Reading results (:class:`nlm.report.Report`): the words for what they hold, and a headline.

``results["settings"][setting][tasks][correction]`` holds ``average`` and ``worst``, the normalised
accuracies (accuracy of the merged model over the expert's) over the tasks, and the chosen
``scale``. Tasks are text, as in JSON. What a run left out is simply not there, and what has no word
here is called by its name.
"""

from collections.abc import Mapping
from typing import Any

Results = Mapping[str, Any]

SETTINGS = {
    "local": "one foundation",
    "nonlocal": "not aligned",
    "permuted": "aligned",
}

CORRECTIONS = {
    "none": "not corrected",
    "plain": "Task Arithmetic",
    "repair": "+ REPAIR",
    "tact": "+ TACT",
    "tact_at_once": "+ TACT, all at once",
    "tact_once": "TACT, all at once",
    "tact_lambda0": "TACT at λ = 0",
    "probe": "probe, as many labels",
    "probe_full": "probe, all labels",
}

METHODS = {
    "weights": "weights",
    "frank-wolfe": "weights and Frank-Wolfe steps",
    "activations": "activations",
    "orthogonal": "orthogonal maps",
    "dual": "weights and activations",
}

# How series are called, of settings and corrections put together.
SERIES = {
    "nonlocal": "not aligned",
    "permuted": "aligned",
    "permuted + TACT": "aligned + TACT",
    "unaligned": "not aligned",
    "weights": "weight matching",
    "activations": "activation matching",
    "none": "not corrected",
    "tact": "+ TACT",
    "repair": "+ REPAIR",
}

# Corrections by what they are in a table: the way itself, its controls, and what needs labels.
SECTIONS = (
    ("plain", "repair", "tact"),
    ("tact_once", "tact_lambda0"),
    ("probe", "probe_full"),
)


def sections(results: Results) -> list[list[str]]:
    """The corrections that the results have, by section; others than those above come first."""
    found = {
        correction: None
        for by_tasks in results.get("settings", {}).values()
        for scores in by_tasks.values()
        for correction in scores
    }
    known = [name for section in SECTIONS for name in section]
    first, *others = SECTIONS
    parts = [[name for name in found if name not in known] + [*first], *map(list, others)]
    return [there for part in parts if (there := [name for name in part if name in found])]


def settings(results: Results) -> dict[str, str]:
    """The settings that the results have, with their words."""
    there = results.get("settings", {})
    return {name: SETTINGS.get(name, name) for name in sorted(there, key=_place)}


def score(results: Results, setting: str, tasks: int, correction: str) -> Mapping[str, Any] | None:
    """The scores of one cell, or None where the run has none."""
    by_tasks = results["settings"].get(setting, {})
    return by_tasks.get(str(tasks), {}).get(correction)


def numbers_of_tasks(results: Results) -> list[int]:
    """The numbers of tasks that were merged, ascending."""
    there = results.get("settings", {}).values()
    return sorted({int(tasks) for by_tasks in there for tasks in by_tasks})


def shown_numbers_of_tasks(results: Results) -> list[int]:
    """The numbers of tasks worth a table: 4, and the largest."""
    numbers = numbers_of_tasks(results)
    return sorted({tasks for tasks in numbers if tasks == 4} | set(numbers[-1:]))


def headline(results: Results) -> str:
    """The result in one sentence: average normalised accuracies at the largest number of tasks.

    Empty where none of the settings was run that it tells of.
    """
    steps = (
        ("nonlocal", "plain", "merged as they are"),
        ("permuted", "plain", "aligned"),
        ("permuted", "tact", "aligned and corrected by TACT"),
        ("local", "plain", "with one foundation for all"),
    )
    for tasks in numbers_of_tasks(results)[-1:]:
        parts = [
            f"{scores['average']:.2f} {words}"
            for setting, correction, words in steps
            if (scores := score(results, setting, tasks, correction)) is not None
        ]
        if parts:
            return f"{tasks} experts of two foundations keep of their accuracy: {', '.join(parts)}."
    return ""


def _place(setting: str) -> int:
    return list(SETTINGS).index(setting) if setting in SETTINGS else len(SETTINGS)
