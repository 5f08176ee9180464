"""The files of Fisher information that a recipe names, checked by their headers."""

from collections.abc import Iterator

from nlm.checkpoint.headers import Checkpoint, open_checkpoint
from nlm.recipe.opened import merged, sentence_of
from nlm.recipe.recipe import Recipe
from nlm.streaming.plan import without_fisher


def check_fishers(recipe: Recipe, start: Checkpoint) -> Iterator[str]:
    """What is wrong with them, a sentence with its line for each."""
    names = merged(recipe, start)
    for expert in recipe.experts:
        if expert.fisher is None:
            continue
        where = recipe.where("experts", expert.name, "fisher")
        try:
            found = open_checkpoint(expert.fisher)
        except (OSError, ValueError) as error:
            yield where + sentence_of(error)
            continue
        for sentence in without_fisher(start, names, expert.name, found):
            yield where + sentence
