"""The checkpoints that a recipe names, as their headers show them."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from nlm._names import matches
from nlm.checkpoint.headers import ITEM_BYTES, Checkpoint, open_checkpoint
from nlm.recipe.methods import DTYPES, METHODS
from nlm.recipe.recipe import Expert, Output, Recipe


@dataclass
class Opened:
    """The checkpoints of a recipe; what cannot be opened is not there.

    Attributes
    ----------
    problems : why, a sentence for each.
    """

    base: Checkpoint | None = None
    experts: dict[str, Checkpoint] = field(default_factory=dict)
    foundations: dict[str, Checkpoint] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def start(self) -> Checkpoint | None:
        """The checkpoint whose names, shapes and types the result has."""
        others = (*self.foundations.values(), *self.experts.values())
        return self.base or next(iter(others), None)


def open_all(recipe: Recipe) -> Opened:
    """Reads the headers of all that a recipe names; each file once."""
    found, known = Opened(), dict[Path, Checkpoint | None]()

    def opened(path: Path, where: str) -> Checkpoint | None:
        if path not in known:
            known[path] = None
            try:
                known[path] = open_checkpoint(path)
            except (OSError, ValueError) as error:
                found.problems.append(where + sentence_of(error))
        return known[path]

    for name, path in recipe.foundations.items():
        if (foundation := opened(path, recipe.where("foundations", name))) is not None:
            found.foundations[name] = foundation
    if recipe.base is not None:
        found.base = opened(recipe.base, recipe.where("base"))
    for expert in recipe.experts:
        if (one := opened(expert.path, recipe.where("experts", expert.name))) is not None:
            found.experts[expert.name] = one
    return found


def merged(recipe: Recipe, start: Checkpoint) -> list[str]:
    """The entries that the method merges: weights, and no statistics or integers."""
    return [
        name
        for name, entry in start.tensors.items()
        if entry.is_weight and not matches(name, recipe.heads)
    ]


def written_bytes(recipe: Recipe, start: Checkpoint) -> int:
    """Bytes of the tensors of the result."""
    dtype = DTYPES[recipe.output.dtype] if recipe.output.dtype else None
    return sum(
        entry.size * ITEM_BYTES[entry.type_as(dtype)]
        for name, entry in start.tensors.items()
        if not matches(name, recipe.heads)
    )


def is_moved(recipe: Recipe, expert: Expert) -> bool:
    """Whether an expert's units are permuted."""
    first = next(iter(recipe.foundations), None)
    is_other = expert.foundation is not None and expert.foundation != first
    return expert.permutation is not None or (recipe.aligns and is_other)


def work_bytes(recipe: Recipe, opened: Opened) -> int:
    """Bytes of the files that are made beside the result: permuted models, and their mean."""
    made = [
        opened.experts[expert.name]
        for expert in recipe.experts
        if expert.name in opened.experts and is_moved(recipe, expert)
    ]
    total = 0
    if METHODS[recipe.method].base and recipe.base is None:
        first, *others = opened.foundations.values()
        made += others if recipe.aligns else []
        total = written_bytes(replace(recipe, output=Output()), first) if others else 0
    return total + sum(entry.bytes for each in made for entry in each.tensors.values())


def sentence_of(error: Exception) -> str:
    """What an error says, without who says it."""
    text = " ".join(str(error).split()) or type(error).__name__
    head, colon, rest = text.partition(": ")
    return rest if colon and head.startswith("nlm") else text
