"""Plans for the checkpoints of the tests. Imports no torch: children start fast."""

from pathlib import Path
from typing import Any

from nlm.checkpoint import open_checkpoint
from nlm.recipe.methods import NUMBERS
from nlm.streaming import Plan
from nlm.streaming.folder import CARD, card, complete


def plan_of(
    output: Path, base: Path | None, experts: dict[str, Path], method: str, **given
) -> Plan:
    """A plan with the same numbers for all tensors."""
    numbers = {name: number.default for name, number in NUMBERS.items()}
    weights = given.pop("weights", {})
    numbers |= {name: given.pop(name) for name in list(given) if name in numbers}
    options = {name: given.pop(name) for name in ("dialect", "seed", "rescale") if name in given}

    def value(parameter: str, task: str | None, tensor: str) -> float:
        if parameter == "weight" and task in weights:
            return weights[task]
        return numbers[parameter]

    return Plan(
        output,
        {task: open_checkpoint(path) for task, path in experts.items()},
        None if base is None else open_checkpoint(base),
        method, value, options, **given,
    )  # fmt: skip


def completed(folder: Path, plan: Plan, recipe: str, files: dict[str, Any]) -> None:
    """All of a merged folder but its weights."""
    complete(folder, plan)
    (folder / CARD).write_text(card(plan, recipe, files))
