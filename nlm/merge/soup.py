"""The greedy soup (Wortsman et al., Model Soups, arXiv:2203.05482), for experts of one task.

The models are sorted by their score. Each in turn is added to the mean, and stays where the score
of the mean does not fall. The uniform soup is ``nlm.merge(experts, method="uniform_soup")``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from nlm import _methods
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

    def mean_of(names: tuple[str, ...]) -> Merged:
        return merge({name: experts[name] for name in names}, method="uniform_soup")

    def scored(names: tuple[str, ...]) -> float:
        return score(state_of(experts[names[0]]) if len(names) == 1 else mean_of(names))

    ingredients, best, scores = _methods.greedy_soup(experts, scored)
    return Soup(mean_of(ingredients), ingredients, best, scores)
