"""The checkpoints that a recipe names, as their headers show them."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from nlm._names import matches
from nlm._random import RANKED
from nlm.checkpoint.headers import ITEM_BYTES, Checkpoint, TensorEntry, open_checkpoint
from nlm.recipe.methods import BESIDE_WEIGHTS, DTYPES, METHODS, SHARED
from nlm.recipe.recipe import Expert, Output, Recipe


@dataclass
class Opened:
    """The checkpoints of a recipe; what cannot be opened is not there.

    Attributes
    ----------
    base, experts, foundations : those of the recipe, by their names.
    curvatures : task -> what Fisher averaging or RegMean weighs its expert's entries by.
    problems : why something is not there, a sentence for each.
    """

    base: Checkpoint | None = None
    experts: dict[str, Checkpoint] = field(default_factory=dict)
    foundations: dict[str, Checkpoint] = field(default_factory=dict)
    curvatures: dict[str, Checkpoint] = field(default_factory=dict)  # Fisher or Gram
    problems: list[str] = field(default_factory=list)

    @property
    def start(self) -> Checkpoint | None:
        """The checkpoint whose names, shapes and types the result has."""
        others = (*self.foundations.values(), *self.experts.values())
        return self.base or next(iter(others), None)


def open_all(recipe: Recipe) -> Opened:
    """Reads the headers of all that a recipe names; each file once."""
    found, seen = Opened(), dict[Path, Checkpoint | None]()

    def opened(path: Path, where: str) -> Checkpoint | None:
        if path not in seen:
            seen[path] = None
            try:
                seen[path] = open_checkpoint(path)
            except (OSError, ValueError) as error:
                found.problems.append(where + sentence_of(error))
        return seen[path]

    for name, path in recipe.foundations.items():
        if (foundation := opened(path, recipe.where("foundations", name))) is not None:
            found.foundations[name] = foundation
    if recipe.base is not None:
        found.base = opened(recipe.base, recipe.where("base"))
    for expert in recipe.experts:
        if (one := opened(expert.path, recipe.where("experts", expert.name))) is not None:
            found.experts[expert.name] = one
        where = recipe.where("experts", expert.name, "fisher" if expert.fisher else "gram")
        file = expert.fisher or expert.gram
        if file is not None and (known := opened(file, where)) is not None:
            found.curvatures[expert.name] = known
    return found


def merged(recipe: Recipe, start: Checkpoint) -> list[str]:
    """The entries that the method merges: weights, and no statistics or integers."""
    return [
        name
        for name, entry in start.tensors.items()
        if entry.is_weight and not matches(name, recipe.heads)
    ]


def written_entries(recipe: Recipe, start: Checkpoint) -> list[TensorEntry]:
    """The entries of the result."""
    found = start.tensors.items()
    return [entry for name, entry in found if not matches(name, recipe.heads)]


def written_bytes(recipe: Recipe, start: Checkpoint) -> int:
    """Bytes of the tensors of the result, and of the masks beside them."""
    dtype = DTYPES[recipe.output.dtype] if recipe.output.dtype else None
    entries = written_entries(recipe, start)
    total = sum(entry.size * ITEM_BYTES[entry.type_as(dtype)] for entry in entries)
    if recipe.method == "tall_mask":
        bits = sum(-(-start.tensors[name].size // 8) for name in merged(recipe, start))
        total += len(recipe.experts) * bits
    return total


def is_moved(recipe: Recipe, expert: Expert) -> bool:
    """Whether an expert's units are permuted."""
    first = next(iter(recipe.foundations), None)
    is_other = expert.foundation is not None and expert.foundation != first
    return expert.permutation is not None or (recipe.aligns and is_other)


def work_bytes(recipe: Recipe, opened: Opened) -> int:
    """Bytes of the files that are made beside the result: permuted models, and their mean."""
    made = [
        each[expert.name]
        for expert in recipe.experts
        for each in (opened.experts, opened.curvatures)
        if expert.name in each and (recipe.rotates or is_moved(recipe, expert))
    ]
    total = measured_bytes(recipe, opened)
    if METHODS[recipe.method].base and recipe.base is None:
        first, *others = opened.foundations.values()
        made += others if recipe.aligns else []
        made += [first] if recipe.rotates else []
        total += written_bytes(replace(recipe, output=Output()), first) if others else 0
    elif METHODS[recipe.method].base and recipe.rotates and opened.base is not None:
        made.append(opened.base)
    if recipe.rotates:
        return total + sum(map(module_bytes, made))
    return total + sum(entry.bytes for each in made for entry in each.tensors.values())


def measured_bytes(recipe: Recipe, opened: Opened) -> int:
    """Bytes of what is measured before the merge: Gram matrices, and the mean that is scored."""
    if recipe.method == "greedy_soup" and opened.start is not None:
        return written_bytes(replace(recipe, output=Output()), opened.start)
    own = [opened.experts[e.name] for e in recipe.experts if e.data and e.name in opened.experts]
    return sum(map(_gram_bytes, own))


def _gram_bytes(model: Checkpoint) -> int:
    """Bytes of the Gram matrices of a model at most."""
    shapes = (entry.shape for entry in model.tensors.values() if entry.is_weight)
    return sum(8 * shape[1] ** 2 for shape in shapes if len(shape) == 2)


def beside_bytes(recipe: Recipe, opened: Opened) -> int:
    """Bytes of what a correction leaves beside the merged weights, where these are models."""
    if recipe.correct is None or recipe.correct.method not in BESIDE_WEIGHTS:
        return 0
    start = opened.start
    if start is None or recipe.output.per_task != "folded":
        return 0
    return written_bytes(replace(recipe, heads=()), start) * len(recipe.experts)


def module_bytes(model: Checkpoint) -> int:
    """Bytes of a checkpoint's entries in memory: weights are float32 there."""
    return sum(4 * e.size if e.is_float else e.bytes for e in model.tensors.values())


def memory_bytes(recipe: Recipe, opened: Opened, processes: int = 1) -> int:
    """Bytes that are held at once beside activations and the buffers of the merge.

    By alignment two foundations and cost matrices; by correction the merged model, its corrected
    copy and all experts; by DELLA the longest row of a tensor, of 2^20 entries at most. Of
    several ``processes`` on a machine each holds these where they share the data.
    """
    aligned = sorted(map(module_bytes, opened.foundations.values()))[-2:] if recipe.aligns else []
    if recipe.rotates:
        aligned = 2 * aligned  # their folded copies
    corrected: list[int] = []
    if recipe.correct is not None and opened.start is not None:
        corrected = [*map(module_bytes, opened.experts.values()), *2 * [module_bytes(opened.start)]]
    costs = 0
    if recipe.aligns:
        from nlm.recipe.check_modules import cost_bytes

        costs = cost_bytes(recipe, opened)
    known = _measuring_bytes(recipe, opened)
    sees = recipe.align is not None and recipe.align.data is not None
    shares = recipe.correct is not None and recipe.correct.method in SHARED and not recipe.rotates
    return max(
        (sum(aligned) + costs) * (processes if sees else 1),
        sum(corrected) * (processes if shares else 1),
        known * (processes if recipe.method == "regmean" else 1),
        _ranked_bytes(recipe, opened.start) * processes,
    )


def _measuring_bytes(recipe: Recipe, opened: Opened) -> int:
    """By RegMean the largest expert that is run, with its Gram matrices, or all of one layer; by a
    greedy soup the model that is scored."""
    if opened.start is None or recipe.method not in ("regmean", "greedy_soup"):
        return 0
    if recipe.method == "greedy_soup":
        return module_bytes(opened.start)
    own = [opened.experts[e.name] for e in recipe.experts if e.data and e.name in opened.experts]
    run = max((module_bytes(model) + _gram_bytes(model) for model in own), default=0)
    shapes = [opened.start.tensors[name].shape for name in merged(recipe, opened.start)]
    widest = max((shape[1] for shape in shapes if len(shape) == 2), default=0)
    return max(run, 8 * widest**2 * (2 * len(recipe.experts) + 2))


def _ranked_bytes(recipe: Recipe, start: Checkpoint | None) -> int:
    """What DELLA holds of the longest row that is ranked: of each expert, and its ranks."""
    if start is None or recipe.method not in ("della", "della_linear"):
        return 0
    shapes = [start.tensors[name].shape for name in merged(recipe, start)]
    longest = max((math.prod(s[1:]) if len(s) > 1 else math.prod(s) for s in shapes), default=0)
    return (8 * len(recipe.experts) + 64) * min(longest, RANKED)


def runs_models(recipe: Recipe) -> bool:
    """Whether models are run on data, whose activations are held for a time."""
    sees = recipe.align is not None and recipe.align.data is not None
    measures = recipe.score is not None or any(each.data for each in recipe.experts)
    return sees or measures or (recipe.correct is not None and bool(recipe.correct.data))


def sentence_of(error: Exception) -> str:
    """What an error says, without who says it."""
    text = " ".join(str(error).split()) or type(error).__name__
    head, colon, rest = text.partition(": ")
    return rest if colon and head.startswith("nlm") else text
