"""Finds everything that is wrong with a merge before any work: only headers are read.

Torch is imported only where models are aligned, permuted or corrected.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from nlm._names import matches
from nlm.checkpoint.compare import differences, unmergeable
from nlm.checkpoint.headers import INDEX_SUFFIX, Checkpoint, read_header
from nlm.checkpoint.names import contains, lies_in, wrong_name
from nlm.checkpoint.partial import refuse_target
from nlm.recipe.finished import named_files
from nlm.recipe.methods import METHODS, NUMBERS
from nlm.recipe.opened import (
    Opened,
    beside_bytes,
    is_moved,
    memory_bytes,
    merged,
    open_all,
    runs_models,
    sentence_of,
    work_bytes,
    written_bytes,
)
from nlm.recipe.rates import available_memory
from nlm.recipe.recipe import Number, Recipe
from nlm.recipe.rules import broken_rules
from nlm.recipe.values import Values, layers

_SHAPELESS = {"activation_function", "feed_forward_proj", "hidden_act", "n_head"}


def check(recipe: Recipe, opened: Opened | None = None, *, force: bool = False) -> list[str]:
    """Everything that is wrong with a recipe and its files, a sentence with its line for each.

    Found are files that are missing or damaged, entries that are missing or extra, shapes,
    vocabularies and types that differ, heads and filters that match nothing, numbers that are
    missing or that a method cannot use together, an architecture or a specification that cannot be
    aligned, data that is missing or does not fit its model, a correction that cannot be done or
    kept, an output that exists, a disk or a memory that is too small.

    Parameters
    ----------
    opened : the checkpoints, where they were opened before.
    force : whether the output may exist.
    """
    opened = opened or open_all(recipe)
    found = list(opened.problems)
    if (start := opened.start) is not None:
        found += _models(recipe, opened, start)
        found += _numbers(recipe, start)
        found += _architectures(recipe, opened, start)
        found += _modules(recipe, opened)
        found += broken_rules(recipe, opened, start)
    found += _files(recipe)
    if (target := recipe.output.path) is not None:
        size = 0
        if start is not None:
            size = written_bytes(recipe, start) + work_bytes(recipe, opened)
            size += beside_bytes(recipe, opened)
        found += (recipe.where("output") + each for each in _output(target, size, force))
        found += (recipe.where("output") + each for each in _apart(recipe, opened, target))
    found += _memory(recipe, opened)
    for expert in recipe.experts:
        if sentence := wrong_name(expert.name):
            found.append(recipe.where("experts", expert.name) + sentence)
    return list(dict.fromkeys(found))


def _apart(recipe: Recipe, opened: Opened, output: Path) -> Iterator[str]:
    """Whether what is written leaves alone what is read, and holds all there is to write."""
    beside = (opened.base, *opened.foundations.values(), *opened.curvatures.values())
    models = [each for each in (*beside, *opened.experts.values()) if each is not None]
    files = [file for each in models for file in each.files]
    files += [*named_files(recipe), *([] if recipe.file is None else [recipe.file])]
    for folder in dict.fromkeys(each.folder for each in models):
        if folder is None or any(folder.glob(f"*{INDEX_SUFFIX}")):
            continue
        if output.suffix == ".safetensors" and lies_in(output, folder):
            yield (
                "a file that is written lies in no input's folder, whose weights it would join, "
                f"got {str(output)!r}"
            )
    for file in dict.fromkeys(files):
        if contains(output, file):
            yield (
                f"an output is not and does not hold an input, got {str(output)!r} and "
                f"{str(file)!r}"
            )
    if recipe.heads and output.suffix == ".safetensors":
        yield f"heads are written to a folder, got the file {str(output)!r}"
    if recipe.method == "tall_mask" and output.suffix == ".safetensors":
        yield f"masks are written to a folder, got the file {str(output)!r}"


def _models(recipe: Recipe, opened: Opened, start: Checkpoint) -> Iterator[str]:
    """Whether the models go together."""
    others = {
        **{("experts", name): each for name, each in opened.experts.items()},
        **{("foundations", name): each for name, each in opened.foundations.items()},
    }
    if recipe.base is not None and opened.base is None:
        return  # what the others would be compared with
    names = {name for each in (start, *others.values()) for name in each.tensors}
    for pattern in recipe.heads:
        if not opened.problems and not any(matches(name, (pattern,)) for name in names):
            yield (
                recipe.where("heads") + "a pattern of heads matches an entry of a model, got "
                f"{pattern!r}"
            )
    for (kind, name), other in others.items():
        who = f"{'expert' if kind == 'experts' else 'foundation'} {name!r}"
        for sentence in differences(start, other, who, recipe.heads):
            yield recipe.where(kind, name) + sentence
        if bad := unmergeable(other, recipe.heads):
            yield recipe.where(kind, name) + _narrow(other, bad)
    if recipe.base is not None and (bad := unmergeable(start, recipe.heads)):
        yield recipe.where("base") + _narrow(start, bad)
    if not merged(recipe, start):
        yield recipe.where("heads") + (
            f"there is at least one weight to merge, got none in {str(start.path)!r}"
        )
    count = max((count for _, count in layers(start.tensors).values()), default=0)
    if recipe.layers is not None and recipe.layers != count:
        yield recipe.where("slices") + (
            f"a slice is the whole model, got layers 0 to {recipe.layers} of {count}: write "
            f"'layer_range: [0, {count}]'"
        )


def _narrow(checkpoint: Checkpoint, names: list[str]) -> str:
    entry = checkpoint.tensors[names[0]]
    return (
        f"weights are float16, bfloat16, float32 or float64, got {entry.dtype} for {names[0]!r} "
        f"in {str(checkpoint.path)!r}"
    )


def _numbers(recipe: Recipe, start: Checkpoint) -> Iterator[str]:
    """Whether every tensor has every number, and the method can use them together."""
    names = merged(recipe, start)
    method = METHODS[recipe.method]
    if recipe.form == "nlm":
        yield from _filters(recipe, names)
    value = recipe.numbers(start.tensors)
    for parameter in (each for each in method.parameters if each in NUMBERS):
        of_each = NUMBERS[parameter].per_expert
        for expert in recipe.experts if of_each else (None,):
            who = None if expert is None else expert.name
            where = recipe.where_of(parameter, who)
            try:
                numbers = {value(parameter, who, name) for name in names}
            except ValueError as error:
                yield where + f"{sentence_of(error)}: write a last rule without a filter"
                break
            is_ties = recipe.method == "ties" and parameter == "density"
            is_one = is_ties and recipe.options.get("dialect") == "global"
            if is_one and len(numbers) > 1:
                yield where + (
                    "the global dialect of ties trims all tensors together, with one density, got "
                    f"{min(numbers):g} to {max(numbers):g}: write 'dialect: mergekit' or one number"
                )
        else:
            is_mean = recipe.method == "linear" and recipe.options.get("normalize")
            if is_mean or recipe.method == "fisher":
                yield from _sums(recipe, names, value)


def _sums(recipe: Recipe, names: Iterable[str], value: Number) -> Iterator[str]:
    """Whether the weights of a mean sum to something."""
    for name in names:
        weights = [value("weight", expert.name, name) for expert in recipe.experts]
        if sum(weights) == 0:
            yield recipe.where("method") + (
                f"the weights of a mean do not sum to zero, got {weights} for {name!r}"
            )
            return


def _filters(recipe: Recipe, names: list[str]) -> Iterator[str]:
    """Filters that match no name are misspelt."""
    of_all: dict[tuple[str, ...], Values]
    of_all = {("parameters", key): values for key, values in recipe.values.items()}
    for expert in recipe.experts:
        of_all |= {("experts", expert.name, key): each for key, each in expert.values.items()}
    for keys, values in of_all.items():
        for part in values.parts:
            if not any(part in name for name in names):
                yield recipe.where(*keys) + (
                    f"a filter is part of a tensor's name, got {part!r}, which is in none, such as "
                    f"{names[0]!r}"
                )


def _files(recipe: Recipe) -> Iterator[str]:
    """Whether the permutations are there, and are permutations."""
    for expert in recipe.experts:
        if expert.permutation is not None and not os.path.isfile(expert.permutation):
            yield recipe.where("experts", expert.name, "permutation") + (
                f"a permutation is a file of nlm align, got {str(expert.permutation)!r}"
            )
        elif expert.permutation is not None:
            try:
                kind = read_header(expert.permutation)[1].get("nlm", "another safetensors file")
            except (OSError, ValueError) as error:
                kind = sentence_of(error)
            if kind != "AlignmentResult":
                yield recipe.where("experts", expert.name, "permutation") + (
                    f"a permutation is a file of nlm align, got {str(expert.permutation)!r}: {kind}"
                )


def _modules(recipe: Recipe, opened: Opened) -> Iterator[str]:
    """Whether what needs more than files can be done: alignment, correction and their data."""
    moves = any(is_moved(recipe, each) for each in recipe.experts)
    measures = recipe.score is not None or any(each.data for each in recipe.experts)
    if moves or measures or recipe.aligns or recipe.correct is not None:
        from nlm.recipe.check_modules import problems

        yield from problems(recipe, opened)


def _architectures(recipe: Recipe, opened: Opened, start: Checkpoint) -> Iterator[str]:
    """Whether the configurations are of one architecture, as far as shapes do not show it."""
    ours = start.config or {}
    others = {
        **{("experts", name): each for name, each in opened.experts.items()},
        **{("foundations", name): each for name, each in opened.foundations.items()},
    }
    for (kind, name), other in others.items():
        theirs = other.config or {}
        keys = [key for key in ours if key in theirs and _is_of_architecture(key)]
        for key in keys:
            if ours[key] != theirs[key]:
                yield recipe.where(kind, name) + (
                    f"the models are of one architecture, got {key} {theirs[key]!r} in "
                    f"{kind.removesuffix('s')} {name!r} and {ours[key]!r} in the start"
                )


def _is_of_architecture(key: str) -> bool:
    """Whether a setting changes what is computed and no weight's shape."""
    return key == "model_type" or "_heads" in key or key in _SHAPELESS


def _memory(recipe: Recipe, opened: Opened) -> Iterator[str]:
    """Whether what is held at once fits into memory, where the system tells its size."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed, free = memory_bytes(recipe, opened, processes), available_memory()
    if free is not None and needed > free:
        given = [name for name in ("correct", "align") if getattr(recipe, name) is not None]
        yield recipe.where(*(given or ["method"])[:1]) + (
            f"what is held at once fits into memory, got {needed} bytes for {free} free"
            + (f" and {processes} processes" if processes > 1 else "")
            + (", without the activations of the data" if runs_models(recipe) else "")
        )


def _output(path: Path, size: int, force: bool) -> Iterator[str]:
    """Whether so many bytes can be written there."""
    if os.path.exists(path) and not force:
        yield f"an output that exists is replaced only with force (--force), got {str(path)!r}"
    if os.path.exists(path) and force:
        try:
            refuse_target(path, True)
        except FileExistsError as error:
            yield sentence_of(error)
    parent = path.absolute().parent
    if not os.path.isdir(parent):
        yield f"the folder of an output exists, got {str(parent)!r}"
        return
    # What another run has left is taken up or removed.
    left = [parent / f".{path.name}{kind}" for kind in (".partial", ".work")]
    free = shutil.disk_usage(parent).free + sum(map(_held, left))
    if size > free:
        yield f"the disk has room for {size} bytes, got {free} free in {str(parent)!r}"


def _held(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
