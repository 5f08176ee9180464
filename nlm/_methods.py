"""What the merge methods are, apart from tensors: their names, options and rules. Imports no torch.

:mod:`nlm.merge` applies them to tensors in memory, :mod:`nlm.streaming` to files.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any

from nlm._core import DIALECTS as DIALECTS

METHODS = (
    "linear", "uniform_soup", "slerp", "task_arithmetic", "model_stock", "ties", "dare",
    "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "sce", "tall_mask",
    "consensus", "fisher",
)  # fmt: skip

#: What starts from no base.
WITHOUT_BASE = ("linear", "uniform_soup", "slerp", "fisher")

RESCALES = ("expected", "l1", "none")

_CRUMBS = ("breadcrumbs", "breadcrumbs_ties")
_DELLAS = ("della", "della_linear")
_DARES = ("dare", "dare_ties")
_UNWEIGHTED = ("uniform_soup", "slerp", "model_stock", "sce")

#: option -> its default and the methods that read it
OPTIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "scale": (1.0, ("task_arithmetic", "ties", *_DARES, *_CRUMBS, *_DELLAS, "sce", "consensus")),
    "density": (0.2, ("ties", *_CRUMBS, *_DELLAS)),
    "gamma": (0.01, _CRUMBS),
    "epsilon": (0.15, _DELLAS),
    "dialect": ("global", ("ties", "dare_ties", "breadcrumbs_ties", "della")),
    "select": (1.0, ("sce",)),
    "mask_threshold": (0.4, ("tall_mask", "consensus")),
    "agreement": (2, ("consensus",)),
    "drop": (0.9, _DARES),
    "seed": (None, (*_DARES, *_DELLAS)),
    "rescale": ("expected", (*_DARES, *_DELLAS)),
    "t": (0.5, ("slerp",)),
    "floor": (1e-6, ("fisher",)),
    "fishers": (None, ("fisher",)),
    "weights": (None, tuple(m for m in METHODS if m not in _UNWEIGHTED)),
}


def kept_entries(density: float, entries: int, dialect: str) -> int:
    """How many entries of so many TIES keeps.

    Raises
    ------
    ValueError
        An unknown dialect, or a density outside (0, 1].
    """
    if dialect not in DIALECTS:
        raise ValueError(
            f"nlm.merge: the TIES dialect is one of {', '.join(DIALECTS)}, got {dialect!r}"
        )
    _check_density(density)
    kept = int(density * entries)
    return max(1, kept) if dialect.startswith("mergekit") else kept


def check_dropping(drop: float, seed: int | None, rescale: str) -> int:
    """The seed of DARE and DELLA.

    Raises
    ------
    ValueError
        No seed, an unknown rescaling, or a share to drop outside [0, 1).
    """
    if seed is None:
        raise ValueError("nlm.merge: what is dropped at random has a seed, got none")
    if rescale not in RESCALES:
        raise ValueError(
            f"nlm.merge: the rescaling is one of {', '.join(RESCALES)}, got {rescale!r}"
        )
    if not 0 <= drop < 1:
        raise ValueError(f"nlm.merge: the share to drop lies in [0, 1), got {drop}")
    return seed


def check_middle(density: float, gamma: float) -> None:
    """What breadcrumbs keeps, and what it takes for too large.

    Raises
    ------
    ValueError
        A density outside (0, 1], or a gamma outside [0, 1).
    """
    _check_density(density)
    if not 0 <= gamma < 1:
        raise ValueError(f"nlm.merge: the share that is too large lies in [0, 1), got {gamma}")


def check_ranked(density: float, epsilon: float) -> None:
    """What DELLA keeps on average, and by how much that changes with the rank.

    Raises
    ------
    ValueError
        A density outside (0, 1], or below 1 with a probability outside (0, 1).
    """
    _check_density(density)
    if density < 1 and not (epsilon >= 0 and density - epsilon > 0 and density + epsilon < 1):
        raise ValueError(
            f"nlm.merge: density - epsilon and density + epsilon lie in (0, 1), got density "
            f"{density} and epsilon {epsilon}"
        )


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"nlm.merge: a density lies in (0, 1], got {density}")


def check_select(select: float) -> None:
    """The share of entries that SCE selects; raises ValueError outside (0, 1]."""
    if not 0 < select <= 1:
        raise ValueError(f"nlm.merge: the share that is selected lies in (0, 1], got {select}")


def check_mask_threshold(limit: float, task: str) -> None:
    """lambda of a TALL-mask; raises ValueError where it is not positive."""
    if not limit > 0:
        raise ValueError(f"nlm.merge: a mask threshold is positive, got {limit} for {task!r}")


def check_agreement(agreement: float, experts: int) -> None:
    """How many masks agree; raises ValueError where it is no number of experts."""
    if not 1 <= agreement <= experts or agreement != int(agreement):
        raise ValueError(
            f"nlm.merge: an agreement lies in [1, {experts}], the number of experts, got "
            f"{agreement}"
        )


def check_floor(floor: float) -> None:
    """The least share of the mean Fisher information; raises ValueError where it is no such."""
    if not 0 < floor < float("inf"):
        raise ValueError(f"nlm.merge: the floor of the Fisher information is positive, got {floor}")


def check_alpha(alpha: float) -> None:
    """RegMean's factor on off-diagonal entries; raises ValueError outside [0, 1]."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"nlm.merge.regmean: alpha lies in [0, 1], got {alpha}")


def greedy_soup(
    names: Iterable[str], score: Callable[[tuple[str, ...]], float]
) -> tuple[tuple[str, ...], float, dict[str, float]]:
    """The ingredients of a soup, found greedily, the score of their mean, and that of each alone.

    ``score`` is called with the names of those that are averaged; larger is better.

    Raises
    ------
    ValueError
        No name, or a score that is NaN.
    """

    def scored(chosen: tuple[str, ...]) -> float:
        found = float(score(chosen))
        if math.isnan(found):
            who = " and ".join(map(repr, chosen))
            raise ValueError(f"nlm.merge: a score is a number, got NaN for {who}")
        return found

    alone = {name: scored((name,)) for name in names}
    scores = dict(sorted(alone.items(), key=lambda item: -item[1]))
    if not scores:
        raise ValueError("nlm.merge: there is at least one expert, got none")
    first, *others = scores
    ingredients: tuple[str, ...] = (first,)
    best = scores[first]
    for name in others:
        found = scored((*ingredients, name))
        if found >= best:
            ingredients, best = (*ingredients, name), found
    return ingredients, best, scores


def check_importance(number: float, name: str, task: str) -> None:
    """A number of Fisher information, or a sum; raises ValueError where it is negative or none."""
    if not 0 <= number < float("inf"):
        raise ValueError(
            f"nlm.merge: Fisher information is finite and at least 0, got {number} in {name!r} of "
            f"{task!r}"
        )


def tensor_seed(seed: int, task: str, name: str) -> int:
    """The seed of what is dropped from one tensor of one task, in [0, 2^63)."""
    text = "\0".join((str(seed), task, name))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
