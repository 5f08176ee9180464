"""What is wrong with the alignment and the correction of a recipe, from models without weights."""

import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from nlm._names import matches
from nlm.checkpoint import Checkpoint
from nlm.correct.batch_norm import is_kept
from nlm.recipe.aligning import spec_for
from nlm.recipe.data import check_data
from nlm.recipe.measuring import check_score
from nlm.recipe.methods import BESIDE_WEIGHTS, BY_WEIGHTS
from nlm.recipe.modules import hollow_module, names_of
from nlm.recipe.opened import Opened, is_moved, sentence_of
from nlm.recipe.recipe import Alignment, Recipe
from nlm.streaming.permuted import check_fits
from nlm.symmetry import PermutationSpec
from nlm.symmetry.layout import references
from nlm.symmetry.permutation import index_shape
from nlm.symmetry.pretrained import trace_config

_CALLER = "nlm.recipe"
_KNOWN = (OSError, ValueError, ImportError)


def problems(recipe: Recipe, opened: Opened) -> Iterator[str]:
    """A sentence with its line for each."""
    hollow = _Hollow()
    yield from _alignment(recipe, opened, hollow)
    if recipe.correct is not None:
        yield from _correction(recipe, opened, hollow)
    yield from _measured(recipe, opened, hollow)


class _Hollow:
    """Models without weights, each built once; why one cannot be is said once."""

    def __init__(self) -> None:
        self._known: dict[Path, nn.Module | None] = {}

    def get(self, path: Path) -> nn.Module | None:
        """The model of a folder.

        Raises
        ------
        OSError, ValueError, ImportError
            It cannot be built; the next time None comes back.
        """
        if path not in self._known:
            self._known[path] = None
            self._known[path] = hollow_module(path)
        return self._known[path]


def _alignment(recipe: Recipe, opened: Opened, hollow: _Hollow) -> Iterator[str]:
    """Whether models that are permuted have a specification that is theirs, and data."""
    where = recipe.where("align")
    align = recipe.align or Alignment(None)
    if recipe.aligns and align.method not in BY_WEIGHTS:
        yield from _seen(recipe, opened, hollow)
    is_whole = recipe.rotates
    names = [each.name for each in recipe.experts if is_whole or is_moved(recipe, each)]
    moved = {name: opened.experts[name] for name in names if name in opened.experts}
    if not moved:
        return
    try:
        spec = _specification(recipe, opened)
    except _KNOWN as error:
        yield where + sentence_of(error)
        return
    if spec is None:
        yield where + (
            "a file of weights is permuted by a specification, got none: write "
            "'align: {spec: FILE}'"
        )
        return
    for name, model in moved.items():
        try:
            if is_whole:
                own = None if model.folder is None else hollow.get(model.path)
                check_fits(spec, model, names_of(model, own))
            else:
                spec_for(spec, model, recipe.heads, partial(hollow.get, model.path))
        except _KNOWN as error:
            yield recipe.where("experts", name) + sentence_of(error)


def _specification(recipe: Recipe, opened: Opened) -> PermutationSpec | None:
    """What may be permuted in the foundations; None for files of weights without a specification.

    Raises
    ------
    OSError, ValueError, ImportError
        It cannot be read or found.
    """
    if recipe.align is not None and recipe.align.spec is not None:
        return PermutationSpec.load(recipe.align.spec)
    models = (opened.base, *opened.foundations.values(), *opened.experts.values())
    folder = next((each.folder for each in models if each is not None and each.folder), None)
    return None if folder is None else trace_config(str(folder))


def cost_bytes(recipe: Recipe, opened: Opened) -> int:
    """Bytes of the float64 matrices by which units are matched: one group's at a time by weights,
    all groups' by Frank-Wolfe steps, and those of all activations that are seen; 0 where it is not
    known what may be permuted."""
    assert recipe.align is not None
    try:
        spec = _specification(recipe, opened)
    except _KNOWN:
        return 0
    if spec is None:
        return 0
    sizes = {group: index_shape(spec.groups, group) for group in spec.free}
    if recipe.align.method in BY_WEIGHTS:
        costs = [8 * math.prod(shape) * shape[-1] for shape in sizes.values()]
        return max(costs, default=0) if recipe.align.method == "weights" else sum(costs)
    last: dict[str, str] = {}  # group -> where it is seen
    for module, site in spec.sites.items():
        last |= {ref.group: module for ref in references(site.layout) if ref.group in sizes}
    return sum(8 * spec.sites[module].layout.size ** 2 for module in set(last.values()))


def _seen(recipe: Recipe, opened: Opened, hollow: _Hollow) -> Iterator[str]:
    """Whether the foundations can be run, on data that is theirs."""
    align = recipe.align
    assert align is not None and align.data is not None
    where = recipe.where("align")
    models: dict[tuple[str, str], Checkpoint]
    models = {("foundations", name): each for name, each in opened.foundations.items()}
    if align.method == "orthogonal":
        models |= {("experts", name): each for name, each in opened.experts.items()}
        for expert in recipe.experts:
            if expert.permutation is not None:
                yield recipe.where("experts", expert.name, "permutation") + (
                    f"alignment by orthogonal brings all models into another gauge, got a "
                    f"permutation for {expert.name!r}"
                )
    for (kind, name), model in models.items():
        if model.folder is None:
            yield recipe.where(kind, name) + (
                f"alignment by {align.method} runs the models of folders with a config.json, got "
                f"the file {str(model.path)!r}"
            )
    first = next(iter(opened.foundations.values()), None)
    if first is None or first.folder is None:
        return
    try:
        if (runs := hollow.get(first.path)) is not None:
            check_data(align.data, runs, str(first.path), _CALLER)
    except _KNOWN as error:
        yield where + sentence_of(error)


def _correction(recipe: Recipe, opened: Opened, hollow: _Hollow) -> Iterator[str]:
    """Whether the merged model and its experts can be run, and what is found can be kept."""
    chosen = recipe.correct
    assert chosen is not None
    where = recipe.where("correct")
    if recipe.output.path is not None and recipe.output.path.suffix == ".safetensors":
        yield recipe.where("output") + (
            f"a corrected model is a folder, got the file {str(recipe.output.path)!r}"
        )
    models = (opened.base, *opened.foundations.values(), *opened.experts.values())
    if not any(each is not None and each.folder is not None for each in models):
        yield where + "a model is corrected by its config.json, got files of weights alone"
        return
    built: dict[str, nn.Module] = {}
    model: nn.Module
    for name, expert in opened.experts.items():
        here = recipe.where("experts", name)
        if expert.folder is None:
            yield here + (
                f"a correction runs the experts of folders with a config.json, got the file "
                f"{str(expert.path)!r}"
            )
            continue
        try:
            found = hollow.get(expert.path)
        except _KNOWN as error:
            yield here + sentence_of(error)
            continue
        if found is None:
            continue
        built[name] = model = found
        if (text := chosen.data.get(name)) is not None:
            try:
                check_data(text, model, str(expert.path), _CALLER)
            except _KNOWN as error:
                yield recipe.where("correct", name) + sentence_of(error)
        try:
            names_of(expert, model)
        except ValueError as error:
            yield here + sentence_of(error)
    if built:
        yield from _kept(recipe, built)


def _measured(recipe: Recipe, opened: Opened, hollow: _Hollow) -> Iterator[str]:
    """Whether what a method measures can be, on data that fits."""
    for name, model in opened.experts.items():
        if (text := recipe.expert(name).data) is not None:
            where = recipe.where("experts", name, "data")
            if model.folder is None:
                yield where + (
                    f"Gram matrices are measured on models of folders with a config.json, got the "
                    f"file {str(model.path)!r}: write 'gram: FILE'"
                )
                continue
            try:
                if (runs := hollow.get(model.path)) is not None:
                    check_data(text, runs, str(model.path), _CALLER)
                    names_of(model, runs)
            except _KNOWN as error:
                yield where + sentence_of(error)
    first = next(iter(opened.experts.values()), None)
    if recipe.score is not None and first is not None:
        try:
            runs = None if first.folder is None else hollow.get(first.path)
            check_score(recipe.score, runs, first.folder)
        except _KNOWN as error:
            yield recipe.where("score") + sentence_of(error)


def _kept(recipe: Recipe, built: dict[str, nn.Module]) -> Iterator[str]:
    """Whether one network is that of all experts, and has a place for the correction."""
    chosen = recipe.correct
    assert chosen is not None
    (first, model), *others = built.items()
    for name, other in others:
        if type(other) is not type(model):
            yield recipe.where("experts", name) + (
                f"the experts of a correction are of one class, got {type(other).__name__} for "
                f"{name!r} and {type(model).__name__} for {first!r}"
            )
    if chosen.method == "batch_norm" and not any(map(is_kept, model.modules())):
        yield recipe.where("correct") + (
            f"batch_norm has batch norms to estimate anew, got none in {type(model).__name__}"
        )
    if chosen.method in BESIDE_WEIGHTS and recipe.output.per_task == "folded":
        without = _without_place(model, recipe)
        if without:
            yield recipe.where("output") + (
                f"a folded correction needs a bias, and weights of its own, in every layer that it "
                f"goes into, got none for {without[0]!r} in {type(model).__name__}: write "
                "'per_task: side-car'"
            )


def _without_place(model: nn.Module, recipe: Recipe) -> list[str]:
    """The layers that are corrected and cannot take a bias, or share their weights with another.

    Corrections that are fitted on activations leave out what computes the outputs, which stands
    beside the base model.
    """
    assert recipe.correct is not None
    inside: Any = model
    if recipe.correct.method != "data_free":
        inside = getattr(model, "base_model", model)
    corrected = set(inside.modules())
    users = Counter(id(each) for _, each in model.named_parameters(remove_duplicate=False))
    return [
        name
        for name, each in model.named_modules()
        if isinstance(each, (nn.Linear, nn.Conv1d, nn.Conv2d)) and each in corrected
        if (each.bias is None or users[id(each.weight)] > 1)
        and not matches(f"{name}.weight", recipe.heads)
    ]
