"""Linear probing: a new last layer on a frozen model, from labelled samples.

The reference that corrections are held against: it needs labels, and at their budget it knows less.
"""

from typing import Any

import numpy as np
import scipy.optimize
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
    """Multinomial logistic regression on standardised features, by L-BFGS in float64.

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
    features = features.detach().double()
    mean = features.mean(0)
    deviation = features.std(0, unbiased=False) + 1e-6
    standard = (features - mean) / deviation
    shape = (classes, features.shape[1] + 1)

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(flat).reshape(shape).to(features.device)
        weight, bias = parameters[:, :-1], parameters[:, -1]
        log_probability = (standard @ weight.T + bias).log_softmax(-1)
        residual = log_probability.exp()
        residual[torch.arange(len(labels)), labels] -= 1
        residual /= len(labels)
        loss = functional.nll_loss(log_probability, labels) + l2 * weight.square().sum()
        gradient = torch.cat(
            [residual.T @ standard + 2 * l2 * weight, residual.sum(0)[:, None]], dim=1
        )
        return float(loss), gradient.cpu().numpy().ravel()

    found = scipy.optimize.minimize(
        loss_and_gradient, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B",
        options={"maxiter": steps},
    )  # fmt: skip
    best = torch.from_numpy(found.x).reshape(shape).to(features.device)
    weight = best[:, :-1] / deviation
    return weight.float(), (best[:, -1] - weight @ mean).float()
