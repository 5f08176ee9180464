"""Fisher averaging (Matena and Raffel, arXiv:2111.09832): each entry weighs what it matters.

theta = sum_t w_t F_t theta_t / sum_t w_t F_t, entry by entry, with the diagonal of expert t's
Fisher information,

    F = mean over samples x of E_y [ (d log p(y | x) / d theta)^2 ],    y ~ p(y | x) of the expert.

An F below ``floor`` times the mean F of the tensor over all experts counts as that, so that where
all are 0 the result is the plain mean; a floor that is absolute, as in other implementations, makes
it the plain mean wherever gradients are small.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nlm._methods import check_floor, check_importance
from nlm._modules import evaluation
from nlm._names import is_statistic
from nlm._sparse import importance_mean, importance_unit
from nlm._state_dict import StateDict, place_of
from nlm.merge.dare import powers, wide
from nlm.merge.linear import alike
from nlm.statistics import Data, Forward, batches, run
from nlm.statistics.data import cut, sample_count

_CALLER = "nlm.merge.fisher"


def fisher_mean(
    experts: Mapping[str, StateDict],
    like: StateDict,
    weights: Mapping[str, float],
    fishers: Mapping[str, StateDict] | None,
    floor: float,
) -> dict[str, Tensor]:
    """The mean of the experts weighted by their Fisher information, in the dtypes of ``like``.

    Parameters
    ----------
    experts : task -> state dict; ``weights``, task -> the factor on its information.
    like : a state dict whose dtypes the result has.
    fishers : task -> name -> the diagonal of its Fisher information, shaped as the entry.
    floor : what every information counts for at least, above 0.

    Raises
    ------
    ValueError
        Weights that sum to zero, a floor that is not positive, an expert or an entry without Fisher
        information, or with one of another shape, below 0 or not finite.
    """
    check_floor(floor)
    if sum(weights.values()) == 0:
        raise ValueError(
            f"nlm.merge: the weights of a mean do not sum to zero, got {dict(weights)}"
        )
    if missing := [task for task in experts if task not in (fishers or {})]:
        raise ValueError(
            f"nlm.merge: Fisher averaging has the Fisher information of every expert, got none for "
            f"{', '.join(map(repr, missing))}"
        )
    assert fishers is not None
    merged = {}
    for name, each in like.items():
        for task in experts:
            _check(task, name, each, fishers[task].get(name))
        found = [wide(state[name]) for state in experts.values()]
        found += [wide(fishers[task][name].to(each.device)) for task in experts]
        found = list(alike(*found))
        tensors, importances = found[: len(experts)], found[len(experts) :]
        factors = [tensors[0].new_tensor(weights[task]) for task in experts]
        sums = [powers(importance, 1) for importance in importances]
        for task, total in zip(experts, sums, strict=True):
            check_importance(total, name, task)
        unit = importance_unit(sums, each.numel())
        merged[name] = importance_mean(tensors, importances, factors, unit, floor).to(each.dtype)
    return merged


def _check(task: str, name: str, like: Tensor, fisher: Tensor | None) -> None:
    if fisher is None or fisher.shape != like.shape:
        seen = "none" if fisher is None else list(fisher.shape)
        raise ValueError(
            f"nlm.merge: the Fisher information of an entry is a number for each of its weights, "
            f"got {seen} for {name!r} {list(like.shape)} of {task!r}"
        )
    if fisher.numel():
        check_importance(float(fisher.min()), name, task)


def fisher(
    model: nn.Module,
    data: Data,
    *,
    exact_classes: int = 16,
    seed: int = 0,
    forward: Forward | None = None,
    max_samples: int | None = 512,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """The diagonal of a classifier's Fisher information, from unlabelled data.

    Parameters
    ----------
    model : gives logits, the classes last: ``[n, classes]``, or ``[n, positions, classes]``, whose
        likelihood is that of all positions together.
    data, forward, max_samples, device : see :mod:`nlm.statistics.data`; one sample at a time.
    exact_classes : the expectation is taken over all classes of outputs ``[n, classes]`` with so
        many of them or fewer, a backward pass for each; of others one label is drawn.
    seed : what it is drawn with.

    Returns
    -------
    dict
        name -> float32 of the entry's shape, for every weight of the state dict; 0 for what the
        logits do not depend on. :func:`nlm.merge` takes it as ``fishers``.

    Raises
    ------
    ValueError
        No sample, outputs that are no logits, or a gradient that is not finite.
    """
    state = model.state_dict(keep_vars=True)
    names: dict[object, list[str]] = {}
    for name, entry in state.items():
        if entry.is_floating_point() and not is_statistic(name):
            names.setdefault(place_of(entry), []).append(name)
    leaves = [p for p in dict.fromkeys(model.parameters()) if place_of(p) in names]
    sums = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in leaves]
    generator = torch.Generator().manual_seed(seed)
    needed = [leaf.requires_grad for leaf in leaves]
    count = 0
    try:
        for leaf in leaves:
            leaf.requires_grad_(True)
        with evaluation(model), torch.enable_grad():
            for batch in batches(data, max_samples, device, _CALLER):
                size = sample_count(batch, _CALLER)
                count += size
                for place in range(size):
                    logits = run(model, cut(batch, place, place + 1, _CALLER), forward)
                    _add(sums, leaves, _logits(logits), exact_classes, generator)
    finally:
        for leaf, was in zip(leaves, needed, strict=True):
            leaf.requires_grad_(was)
    found = {
        name: torch.zeros_like(state[name], dtype=torch.float32)
        for own in names.values()
        for name in own
    }
    for leaf, total in zip(leaves, sums, strict=True):
        if not bool(total.isfinite().all()):
            raise ValueError(
                f"{_CALLER}: gradients are finite, got NaN or inf for {names[place_of(leaf)][0]!r}"
            )
        for name in names[place_of(leaf)]:
            found[name] = (total / count).float()
    return found


def _logits(outputs: object) -> Tensor:
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor) or logits.dim() < 2 or not logits.requires_grad:
        seen = list(logits.shape) if isinstance(logits, Tensor) else type(outputs).__name__
        raise ValueError(f"{_CALLER}: a model gives logits [n, ..., classes], got {seen}")
    return logits


def _add(
    sums: Sequence[Tensor],
    leaves: Sequence[Tensor],
    logits: Tensor,
    exact: int,
    generator: torch.Generator,
) -> None:
    """Adds the squared gradients of one sample's log-likelihood."""
    likelihoods = logits.double().log_softmax(-1)
    shares = likelihoods.detach().exp()
    if logits.dim() == 2 and logits.shape[1] <= exact:
        chosen = [(float(share), likelihoods[0, k]) for k, share in enumerate(shares[0])]
    else:
        rows = shares.reshape(-1, shares.shape[-1]).cpu()
        drawn = torch.multinomial(rows, 1, generator=generator).to(logits.device)
        chosen = [(1.0, likelihoods.reshape(len(rows), -1).gather(1, drawn).sum())]
    for place, (share, likelihood) in enumerate(chosen):
        gradients = torch.autograd.grad(
            likelihood, leaves, retain_graph=place + 1 < len(chosen), allow_unused=True
        )
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total.add_(gradient.double().square(), alpha=share)
