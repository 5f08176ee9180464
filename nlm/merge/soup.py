"""The greedy soup (Wortsman et al., Model Soups, arXiv:2203.05482), for experts of one task.

The models are sorted by their score. Each in turn is added to the mean, and stays where the score
of the mean does not fall. The uniform soup is ``nlm.merge(experts, method="uniform_soup")``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from nlm._state_dict import state_of
from nlm.merge.result import Merged


@dataclass(frozen=True)
class Soup:
    """A greedy soup.

    Attributes
    ----------
    merged : the mean of the ingredients.
    ingredients : their names, the best one first.
    score : of the mean.
    scores : name -> score of each model alone, the best one first.
    """

    merged: Merged
    ingredients: tuple[str, ...]
    score: float
    scores: dict[str, float]


def greedy_soup(
    experts: Mapping[str, nn.Module | Mapping[str, Tensor]],
    score: Callable[[Mapping[str, Tensor]], float],
) -> Soup:
    """The mean of those models that together score best, found greedily.

    Parameters
    ----------
    experts : name -> state dict (or module), all with the same entries and shapes; of equal scores
        the first comes first.
    score : called with a state dict; larger is better. Choose data that neither trained nor test.

    Raises
    ------
    ValueError
        A score that is NaN, and what :func:`nlm.merge` raises.
    """
    from nlm.merge import merge

    def scored(mean: Mapping[str, Tensor], who: str) -> float:
        found = float(score(mean))
        if math.isnan(found):
            raise ValueError(f"nlm.merge: a score is a number, got NaN for {who}")
        return found

    def mean_of(names: tuple[str, ...]) -> Merged:
        return merge({name: experts[name] for name in names}, method="uniform_soup")

    alone = {name: scored(state_of(model), repr(name)) for name, model in experts.items()}
    scores = dict(sorted(alone.items(), key=lambda item: -item[1]))
    if not scores:
        raise ValueError("nlm.merge: there is at least one expert, got none")
    first, *others = scores
    ingredients: tuple[str, ...] = (first,)
    best = scores[first]
    for name in others:
        trial = (*ingredients, name)
        found = scored(mean_of(trial), " and ".join(map(repr, trial)))
        if found >= best:
            ingredients, best = trial, found
    return Soup(mean_of(ingredients), ingredients, best, scores)
