"""Linear probing: a new last layer on a frozen model, from labelled samples.

The reference that corrections are held against: it needs labels, and at their budget it knows less.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nlm._modules import evaluation, submodule
from nlm._multitask import network_of
from nlm.statistics import Data, Forward, run
from nlm.statistics.data import batches, labelled
from nlm.statistics.observe import check_activation


def linear_probe(
    model: nn.Module,
    data: Data,
    head: str = "head",
    *,
    classes: int | None = None,
    max_samples: int | None = None,
    l2: float = 1e-3,
    steps: int = 60,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> nn.Linear:
    """A new head for a model, fitted on the features that its old head reads.

    Parameters
    ----------
    model : any module, a :class:`MultiTaskModel` or a correction; its head is found in the network
        inside.
    data : a re-iterable of (inputs, labels) batches, labels int64 with one per row of features:
        [n], or [n, length] for a head that reads [n, length, features].
    head : the name of the linear module to replace.
    classes : the number of outputs; by default the old head's.
    max_samples, l2, steps : labelled samples used, weight penalty, iterations at most.
    forward, device : see :mod:`nlm.statistics.data`.
    kwargs : passed on to the model, such as ``task="digits"``.

    Returns
    -------
    nn.Linear
        In the model's dtype; the model is not changed.

    Raises
    ------
    ValueError
        No data, batches without labels, labels that are not one per row of features or no classes,
        NaN or inf in a feature, a head that is not linear or does not run once.
    """
    module = submodule(network_of(model), head)
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"nlm.linear_probe: the head is a linear module, got {type(module).__name__} at "
            f"{head!r}"
        )
    features: list[Tensor] = []
    labels: list[Tensor] = []
    outputs = [module.out_features]

    def keep(module: Any, args: Any) -> None:
        check_activation("nlm.linear_probe", head, args[0])
        features.append(args[0].detach().reshape(-1, args[0].shape[-1]))
        outputs[:] = [module.weight.shape[0]]  # a task's head has its own size

    handle = module.register_forward_pre_hook(keep)
    try:
        with evaluation(model):
            for batch in batches(data, max_samples, device, "nlm.linear_probe"):
                own = labelled(batch, "nlm.linear_probe")[1]
                if own.dtype != torch.int64:
                    raise ValueError(f"nlm.linear_probe: labels are int64, got {own.dtype}")
                run(model, batch, forward, **kwargs)
                labels.append(own.flatten())
                if sum(map(len, features)) != sum(map(len, labels)):
                    raise ValueError(
                        f"nlm.linear_probe: there is one label per row of features, got labels "
                        f"{list(own.shape)} and {sum(map(len, features))} rows for "
                        f"{sum(map(len, labels))} labels at {head!r}"
                    )
    finally:
        handle.remove()
    count = outputs[0] if classes is None else classes
    known = torch.cat(labels)
    if bool(((known < 0) | (known >= count)).any()):
        raise ValueError(
            f"nlm.linear_probe: labels lie in 0 to {count - 1}, got {int(known.min())} to "
            f"{int(known.max())}"
        )
    weight, bias = fit_logistic(torch.cat(features), known, count, l2, steps)
    new = nn.Linear(weight.shape[1], count, device=weight.device, dtype=features[0].dtype)
    with torch.no_grad():
        new.weight.copy_(weight)
        new.bias.copy_(bias)
    return new


def fit_logistic(
    features: Tensor, labels: Tensor, classes: int, l2: float = 1e-3, steps: int = 60
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression on standardised features, by L-BFGS.

    Parameters
    ----------
    features : float [n, d].
    labels : int64 [n], from 0 to ``classes`` - 1.
    l2 : the weight of the squared norm of the standardised weights, beside the mean cross-entropy.
    steps : of L-BFGS at most.

    Returns
    -------
    weight, bias
        [classes, d] and [classes], for the features as they are: float64 where they are, else
        float32.
    """
    if features.dtype != torch.float64:
        features = features.float()
    mean = features.mean(0)
    deviation = features.std(0, unbiased=False) + 1e-6
    standard = (features - mean) / deviation
    weight = features.new_zeros(classes, features.shape[1]).requires_grad_()
    bias = features.new_zeros(classes).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, line_search_fn="strong_wolfe", history_size=10
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = functional.cross_entropy(standard @ weight.T + bias, labels)
        value = value + l2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    unscaled = weight.detach() / deviation
    return unscaled, bias.detach() - unscaled @ mean
