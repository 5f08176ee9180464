"""The rules of single methods that the headers and numbers of a recipe show to be broken."""

from collections.abc import Iterator

from nlm._methods import check_agreement, check_ranked
from nlm.checkpoint.headers import Checkpoint
from nlm.recipe.opened import Opened, is_moved, merged, sentence_of
from nlm.recipe.recipe import Recipe
from nlm.streaming.plan import without_fisher, without_gram

_OF_RANKS = "density", "epsilon"


def broken_rules(recipe: Recipe, opened: Opened, start: Checkpoint) -> Iterator[str]:
    """A sentence with its line for each."""
    if recipe.method in ("della", "della_linear"):
        yield from _ranks(recipe, start)
    elif recipe.method == "consensus":
        yield from _agreement(recipe, start)
    elif recipe.method == "tall_mask":
        yield from _masks(recipe)
    elif recipe.method == "fisher":
        yield from _fishers(recipe, opened, start)
    elif recipe.method == "regmean":
        yield from _grams(recipe, opened, start)
    elif recipe.method == "greedy_soup":
        yield from _soup(recipe)
    if recipe.method in ("tall_mask", "fisher", "regmean") and recipe.rotates:
        yield recipe.where("align", "method") + (
            f"{recipe.method} goes with permutations, got {recipe.align and recipe.align.method!r}"
        )
    if recipe.method == "tall_mask" and recipe.correct is not None:
        yield recipe.where("correct") + (
            "what tall_mask restores is each task's own model, got a correction of their mean: "
            "leave 'correct' out"
        )


def _ranks(recipe: Recipe, start: Checkpoint) -> Iterator[str]:
    """Whether DELLA's probabilities lie between 0 and 1."""
    value = recipe.numbers(start.tensors)
    for expert in recipe.experts:
        for name in merged(recipe, start):
            try:
                density, epsilon = (value(each, expert.name, name) for each in _OF_RANKS)
            except ValueError:
                break  # no number: told by the check of all methods
            try:
                check_ranked(density, epsilon)
            except ValueError as error:
                yield recipe.where("experts", expert.name) + sentence_of(error)
                break


def _agreement(recipe: Recipe, start: Checkpoint) -> Iterator[str]:
    """Whether an agreement is a number of experts."""
    value = recipe.numbers(start.tensors)
    for name in merged(recipe, start):
        try:
            agreement = value("agreement", None, name)
        except ValueError:
            break
        try:
            check_agreement(agreement, len(recipe.experts))
        except ValueError as error:
            yield recipe.where("parameters", "agreement") + sentence_of(error)
            break


def _masks(recipe: Recipe) -> Iterator[str]:
    """Whether the base that tasks are restored from is there after the merge, as it was used."""
    others = [*recipe.foundations.values()][1:]
    if recipe.base is None or (recipe.aligns and recipe.base in others):
        yield recipe.where("method") + (
            "tall_mask restores tasks from a base that stays, got one that is made for the merge: "
            "write 'base: NAME' of the first foundation, or a folder"
        )


def _fishers(recipe: Recipe, opened: Opened, start: Checkpoint) -> Iterator[str]:
    names = merged(recipe, start)
    for name, fisher in opened.curvatures.items():
        for sentence in without_fisher(start, names, name, fisher):
            yield recipe.where("experts", name, "fisher") + sentence


def _grams(recipe: Recipe, opened: Opened, start: Checkpoint) -> Iterator[str]:
    for name, grams in opened.curvatures.items():
        where = recipe.where("experts", name, "gram")
        if is_moved(recipe, recipe.expert(name)):
            yield where + (
                f"the Gram matrices of an expert that is permuted are measured as it is merged, "
                f"got a file for {name!r}: write 'data: FILE'"
            )
        for sentence in without_gram(start, name, grams):
            yield where + sentence


def _soup(recipe: Recipe) -> Iterator[str]:
    if recipe.heads:
        yield recipe.where("heads") + "a soup is of models of one task, got heads of their own"
    if recipe.correct is not None:
        yield recipe.where("correct") + (
            "a soup is of models of one task, got a correction for each: leave 'correct' out"
        )
