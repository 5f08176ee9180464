"""Combining the weights of experts into one set."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nlm._methods import DIALECTS, METHODS, OPTIONS, RESCALES, WITHOUT_BASE
from nlm._names import as_patterns, is_statistic, matches
from nlm._state_dict import StateDict, check_alike, count_not_finite, state_of
from nlm.merge.breadcrumbs import breadcrumbs
from nlm.merge.dare import dropped
from nlm.merge.della import magprune
from nlm.merge.fisher import fisher, fisher_mean
from nlm.merge.linear import linear
from nlm.merge.model_stock import model_stock
from nlm.merge.partial import merge_partial
from nlm.merge.regmean import gram_matrices, regmean
from nlm.merge.result import Merged
from nlm.merge.sce import sce
from nlm.merge.slerp import slerp
from nlm.merge.soup import Soup, greedy_soup
from nlm.merge.tall_mask import consensus, tall_masks
from nlm.merge.task_arithmetic import task_arithmetic
from nlm.merge.ties import ties

__all__ = [
    "DIALECTS",
    "METHODS",
    "RESCALES",
    "Merged",
    "Soup",
    "breadcrumbs",
    "consensus",
    "dropped",
    "fisher",
    "fisher_mean",
    "gram_matrices",
    "greedy_soup",
    "linear",
    "magprune",
    "merge",
    "merge_partial",
    "model_stock",
    "regmean",
    "sce",
    "slerp",
    "tall_masks",
    "task_arithmetic",
    "ties",
]


def merge(
    experts: Mapping[str, nn.Module | Mapping[str, Tensor]],
    base: nn.Module | Mapping[str, Tensor] | None = None,
    method: str = "task_arithmetic",
    *,
    scale: float = 1.0,
    weights: Mapping[str, float] | None = None,
    heads: str | Sequence[str] = (),
    density: float = 0.2,
    dialect: str = "global",
    mask_threshold: float | Mapping[str, float] = 0.4,
    agreement: int = 2,
    drop: float = 0.9,
    seed: int | None = None,
    rescale: str = "expected",
    t: float = 0.5,
    gamma: float = 0.01,
    epsilon: float = 0.15,
    select: float = 1.0,
    fishers: Mapping[str, Mapping[str, Tensor]] | None = None,
    floor: float = 1e-6,
) -> Merged:
    """Merges experts that stand in one basin: of one foundation, or aligned with it.

    Parameters
    ----------
    experts : task -> state dict (or module), all with the same entries and shapes.
    base : theta_init, where the task vectors start: the foundation, or the mean of the aligned
        foundations. Not needed for "linear", "uniform_soup", "slerp" and "fisher". It needs no
        heads.
    method : "linear" (weighted mean), "uniform_soup" (plain mean), "slerp" (of two experts),
        "task_arithmetic", "model_stock", "ties"; Task Arithmetic on what is left of the task
        vectors: "dare", "breadcrumbs", "della_linear"; TIES, untrimmed, on the same: "dare_ties",
        "breadcrumbs_ties", "della"; "sce", "tall_mask", "consensus", or "fisher" (the mean weighted
        by importance). More need data or a score: :func:`regmean`, :func:`greedy_soup`.
    scale : the factor on the merged task vector, negative to unlearn it (task negation); the means,
        "slerp", "model_stock" and "tall_mask" have none. Choose it on validation data, after the
        correction that will be used.
    weights : task -> weight of its expert; 1 by default. "uniform_soup", "slerp", "model_stock" and
        "sce" have none.
    heads : patterns of entries that are never merged, such as ("head",): each task keeps its own.
        Every pattern matches an entry of some expert.
    density : share of each task vector that TIES, breadcrumbs and DELLA keep.
    dialect : which TIES: "global", "mergekit", "peft", "mergekit_sum"; :func:`nlm.merge.ties`.
    mask_threshold : lambda of TALL-mask and of the consensus, one or per task.
    agreement : how many tasks' masks must have an entry for the consensus to keep it.
    drop : the share of each task vector that DARE drops.
    seed : what DARE and DELLA drop is drawn from it, the task and the entry's name.
    rescale : how DARE and DELLA rescale the rest: "expected", "l1" or "none"; see
        :mod:`nlm.merge.dare` and :mod:`nlm.merge.della`.
    t : where "slerp" ends between the first expert, 0, and the second, 1.
    gamma : the share of the largest entries that breadcrumbs drops.
    epsilon : DELLA keeps the smallest entry of a row with probability density - epsilon, the
        largest with density + epsilon.
    select : the share of the entries in which the experts differ that "sce" keeps.
    fishers, floor : task -> name -> the Fisher information of each entry (:func:`fisher`), and the
        least share of a tensor's mean that one counts as.

    Returns
    -------
    Merged
        A dict of the shared entries, in the dtype of the base, no tensor of which is the experts'
        or the base's; ``.for_task(task)`` is the complete state dict of one task. BatchNorm's
        running statistics are the experts' means (to be re-estimated, never extrapolated); other
        integer entries are the base's.

    Raises
    ------
    ValueError
        Missing or extra entries, differing shapes or devices, NaN or inf in a model or in the
        result, heads that match nothing or leave nothing, an unknown method or task, a value out of
        range, an option that the method does not have.
    TypeError
        Integer or complex weights, a task's name that is no string.

    References
    ----------
    Ilharco et al.: Editing Models with Task Arithmetic, arXiv:2212.04089. Yadav et al.:
    TIES-Merging, arXiv:2306.01708. Wang et al.: Localizing Task Information (TALL-masks),
    arXiv:2405.07813. Yu et al.: Language Models are Super Mario (DARE), arXiv:2311.03099. Wortsman
    et al.: Model Soups, arXiv:2203.05482. Jang et al.: Model Stock, arXiv:2403.19522. Davari and
    Belilovsky: Model Breadcrumbs, arXiv:2312.06795. Deep et al.: DELLA-Merging, arXiv:2406.11617.
    Wan et al.: FuseChat (SCE), arXiv:2408.07990. Matena and Raffel: Merging Models with
    Fisher-Weighted Averaging, arXiv:2111.09832.
    """
    if method not in METHODS:
        raise ValueError(f"nlm.merge: the method is one of {', '.join(METHODS)}, got {method!r}")
    given = {
        "scale": scale, "density": density, "dialect": dialect, "mask_threshold": mask_threshold,
        "agreement": agreement, "drop": drop, "seed": seed, "rescale": rescale, "t": t,
        "weights": weights, "gamma": gamma, "epsilon": epsilon, "select": select,
        "fishers": fishers, "floor": floor,
    }  # fmt: skip
    for option, (default, readers) in OPTIONS.items():
        if method not in readers and given[option] != default:
            raise ValueError(
                f"nlm.merge: {option} is an option of {', '.join(readers)}, got "
                f"{given[option]!r} for {method!r}"
            )
    states = _states(experts)
    patterns = _patterns(states, heads)
    factors = _weights(states, weights)
    if base is None:
        if method not in WITHOUT_BASE:
            raise ValueError(f"nlm.merge: {method!r} starts from a base, got none")
        start = next(iter(states.values()))
    else:
        start = state_of(base)
    _one_device(start, states)
    shared = check_alike("nlm.merge", {"the base": start, **states}, patterns)
    floating = [name for name in shared if start[name].is_floating_point()]
    learned = [name for name in floating if not is_statistic(name)]
    if not learned:
        raise ValueError(
            f"nlm.merge: there is at least one weight to merge, got none beside the heads "
            f"{', '.join(patterns) or 'of no name'}"
        )
    origin = {name: start[name].detach() for name in learned}
    vectors = {
        task: {name: state[name].detach() for name in learned} for task, state in states.items()
    }

    merged = {name: _carried(name, start, states) for name in shared if name not in origin}
    masks: dict[str, dict[str, Tensor]] = {}
    parts: Mapping[str, StateDict] = vectors
    if method.startswith("dare"):
        parts = dropped(vectors, origin, drop, seed, rescale)
    elif method.startswith("breadcrumbs"):
        parts = breadcrumbs(vectors, origin, density, gamma)
    elif method.startswith("della"):
        parts = magprune(vectors, origin, density, epsilon, seed, rescale)
    if method in ("linear", "uniform_soup"):
        merged |= linear(vectors, origin, factors)
    elif method == "slerp":
        merged |= slerp(vectors, origin, t)
    elif method == "model_stock":
        merged |= model_stock(vectors, origin)
    elif method == "sce":
        merged |= sce(vectors, origin, scale, select)
    elif method == "fisher":
        merged |= fisher_mean(vectors, origin, factors, fishers, floor)
    elif method in ("task_arithmetic", "dare", "breadcrumbs", "della_linear"):
        merged |= task_arithmetic(parts, origin, scale, factors)
    elif method in ("ties", "dare_ties", "breadcrumbs_ties", "della"):
        share = density if method == "ties" else 1.0
        merged |= ties(parts, origin, share, scale, factors, dialect)
    elif method == "consensus":
        merged |= consensus(vectors, origin, scale, factors, mask_threshold, agreement)
    else:
        merged |= task_arithmetic(vectors, origin, 1.0, factors)
        masks = tall_masks(vectors, origin, merged, mask_threshold)
    for name in learned:
        if bad := count_not_finite(merged[name]):
            raise ValueError(
                f"nlm.merge: merged weights are finite, got {bad} NaN or inf of "
                f"{merged[name].numel()} in {name!r} ({merged[name].dtype}) at scale {scale}"
            )
    kept = {
        task: {name: value.detach().clone() for name, value in state.items() if name not in merged}
        for task, state in states.items()
    }
    kept_base = {name: tensor.clone() for name, tensor in origin.items()} if masks else {}
    return Merged({name: merged[name] for name in shared}, kept, masks, kept_base)


def _states(experts: Mapping[str, nn.Module | StateDict]) -> dict[str, StateDict]:
    """task -> state dict, after checking the tasks' names."""
    if not experts:
        raise ValueError("nlm.merge: there is at least one expert, got none")
    for task in experts:
        if not isinstance(task, str):
            raise TypeError(
                f"nlm.merge: a task's name is a string, got {type(task).__name__} {task!r}"
            )
    return {task: state_of(expert) for task, expert in experts.items()}


def _patterns(states: Mapping[str, StateDict], heads: str | Sequence[str]) -> tuple[str, ...]:
    """The heads' patterns, each of which matches an entry of some expert."""
    patterns = as_patterns(heads)
    names = {name for state in states.values() for name in state}
    for pattern in patterns:
        if not any(matches(name, (pattern,)) for name in names):
            raise ValueError(
                f"nlm.merge: a pattern of heads matches an entry of an expert, got {pattern!r}"
            )
    return patterns


def _one_device(base: StateDict, states: Mapping[str, StateDict]) -> None:
    for task, state in states.items():
        for name, start in base.items():
            if name in state and state[name].device != start.device:
                raise ValueError(
                    f"nlm.merge: an entry is on one device in all models, got {start.device} and "
                    f"{state[name].device} for {name!r} of {task!r}"
                )


def _weights(states: Mapping[str, Any], weights: Mapping[str, float] | None) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(states, 1.0)
    if set(weights) != set(states):
        raise ValueError(
            f"nlm.merge: there is one weight per expert ({', '.join(states)}), got "
            f"{', '.join(weights)}"
        )
    return {task: float(weights[task]) for task in states}


def _carried(
    name: str, base: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]]
) -> Tensor:
    """A statistic, averaged where it is real, or an integer entry, which must be one for all."""
    start = base[name].detach()
    if start.is_floating_point():
        mean = sum(state[name].detach().double() for state in states.values()) / len(states)
        return mean.to(start.dtype)  # type: ignore[union-attr]
    if not is_statistic(name):
        for task, state in states.items():
            if not bool((state[name] == start).all()):
                raise TypeError(
                    f"nlm.merge: entries that are not floating-point are one for all models, got "
                    f"other {start.dtype} values for {name!r} of {task!r}"
                )
    return start.clone()
