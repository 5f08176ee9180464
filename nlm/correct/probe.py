"""Linear probing: a new last layer on a frozen model, from labelled samples.

The reference that corrections are held against: it needs labels, and at their budget it knows less.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nlm._modules import evaluation, submodule
from nlm.statistics import Data
from nlm.statistics.data import batches


def linear_probe(
    model: nn.Module,
    data: Data,
    head: str = "head",
    *,
    classes: int | None = None,
    max_samples: int | None = None,
    l2: float = 1e-3,
    steps: int = 60,
) -> nn.Linear:
    """A new head for a model, fitted on the features that its old head reads.

    Parameters
    ----------
    data : a re-iterable of (inputs, labels) batches, labels int64 [n].
    head : the name of the linear module to replace.
    classes : the number of outputs; by default the old head's.
    max_samples, l2, steps : labelled samples used, weight penalty, iterations at most.

    Returns
    -------
    nn.Linear
        In the model's dtype; the model is not changed.

    Raises
    ------
    ValueError
        No data, batches without labels, or a head that is not linear.
    """
    module = submodule(model, head)
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"nlm.linear_probe: the head is a linear module, got {type(module).__name__} at "
            f"{head!r}"
        )
    features: list[Tensor] = []
    labels: list[Tensor] = []

    def keep(module: nn.Module, args: Any) -> None:
        features.append(args[0].detach().flatten(0, -2))

    handle = module.register_forward_pre_hook(keep)
    try:
        with evaluation(model):
            for batch in batches(data, max_samples, caller="nlm.linear_probe"):
                if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
                    raise ValueError(
                        f"nlm.linear_probe: a batch is (inputs, labels), got {type(batch).__name__}"
                    )
                model(batch[0])
                labels.append(batch[1])
    finally:
        handle.remove()
    count = classes or module.out_features
    weight, bias = fit_logistic(torch.cat(features), torch.cat(labels), count, l2, steps)
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
    labels : int64 [n].
    l2 : the weight of the squared norm of the standardised weights, beside the mean cross-entropy.

    Returns
    -------
    weight, bias
        float32 [classes, d] and [classes], for the features as they are.
    """
    mean = features.mean(0)
    deviation = features.std(0, unbiased=False) + 1e-6
    standard = (features - mean) / deviation
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
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
