"""The files of Fisher information that a recipe names, checked by their headers."""

from collections.abc import Iterator

from nlm.checkpoint.headers import Checkpoint
from nlm.recipe.opened import Opened, merged
from nlm.recipe.recipe import Recipe
from nlm.streaming.plan import without_fisher


def check_fishers(recipe: Recipe, opened: Opened, start: Checkpoint) -> Iterator[str]:
    """What is wrong with them, a sentence with its line for each."""
    names = merged(recipe, start)
    for name, fisher in opened.fishers.items():
        for sentence in without_fisher(start, names, name, fisher):
            yield recipe.where("experts", name, "fisher") + sentence
