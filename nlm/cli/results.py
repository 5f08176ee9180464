"""Reading the results of the demo: the words for its settings and corrections, and its headline.

``results["settings"][setting][tasks][correction]`` holds ``average`` and ``worst``, the normalised
accuracies (accuracy of the merged model over the expert's) over the tasks, and the chosen
``scale``. Tasks are text, as in JSON. What a run left out is simply not there.
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
    "plain": "Task Arithmetic",
    "repair": "+ REPAIR",
    "tact": "+ TACT",
    "tact_once": "TACT, all at once",
    "tact_lambda0": "TACT at λ = 0",
    "probe": "probe, as many labels",
    "probe_full": "probe, all labels",
}

# Corrections by what they are in a table: the way itself, its controls, and what needs labels.
SECTIONS = (
    ("plain", "repair", "tact"),
    ("tact_once", "tact_lambda0"),
    ("probe", "probe_full"),
)


def score(
    results: Results, setting: str, tasks: int, correction: str
) -> Mapping[str, float] | None:
    """The scores of one cell, or None where the run has none."""
    by_tasks = results["settings"].get(setting, {})
    return by_tasks.get(str(tasks), {}).get(correction)


def numbers_of_tasks(results: Results) -> list[int]:
    """The numbers of tasks that were merged, ascending."""
    found = {int(tasks) for by_tasks in results["settings"].values() for tasks in by_tasks}
    return sorted(found)


def shown_numbers_of_tasks(results: Results) -> list[int]:
    """The numbers of tasks worth a table: 4, and the largest."""
    numbers = numbers_of_tasks(results)
    return sorted({tasks for tasks in numbers if tasks == 4} | set(numbers[-1:]))


def headline(results: Results) -> str:
    """The result in one sentence: average normalised accuracies at the largest number of tasks."""
    tasks = numbers_of_tasks(results)[-1]
    steps = (
        ("nonlocal", "plain", "merged as they are"),
        ("permuted", "plain", "aligned"),
        ("permuted", "tact", "aligned and corrected by TACT"),
        ("local", "plain", "with one foundation for all"),
    )
    parts = [
        f"{scores['average']:.2f} {words}"
        for setting, correction, words in steps
        if (scores := score(results, setting, tasks, correction)) is not None
    ]
    return f"{tasks} experts of two foundations keep of their accuracy: {', '.join(parts)}."
