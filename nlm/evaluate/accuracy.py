"""Accuracies: of a model, of an ensemble, and of a merge relative to its experts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nlm._modules import evaluation
from nlm._state_dict import count_not_finite
from nlm.statistics import Data, Forward, run
from nlm.statistics.data import batches


def accuracy(
    model: nn.Module,
    data: Data,
    *,
    forward: Forward | None = None,
    max_samples: int | None = None,
    **kwargs: Any,
) -> float:
    """The share of samples whose largest output is their label.

    Parameters
    ----------
    data : a re-iterable of (inputs, labels) batches, labels int64 [n].
    kwargs : passed on to the model, such as ``task="digits"``.

    Raises
    ------
    ValueError
        No sample, batches without labels, or outputs that are not finite.
    """
    return ensemble_accuracy([model], data, forward=forward, max_samples=max_samples, **kwargs)


def ensemble_accuracy(
    models: Sequence[nn.Module],
    data: Data,
    *,
    forward: Forward | None = None,
    max_samples: int | None = None,
    **kwargs: Any,
) -> float:
    """The accuracy of the mean of several models' class probabilities; arguments as above."""
    right = total = 0
    with evaluation(*models):
        for batch in batches(data, max_samples, caller="nlm.evaluate"):
            inputs, labels = _labelled(batch)
            probabilities: Tensor | int = 0
            for model in models:
                logits = run(model, inputs, forward, **kwargs)
                if count_not_finite(logits):
                    raise ValueError(
                        f"nlm.evaluate: outputs are finite, got NaN or inf from "
                        f"{type(model).__name__}"
                    )
                probabilities = probabilities + logits.double().softmax(-1)
            right += int((torch.as_tensor(probabilities).argmax(-1) == labels).sum())
            total += len(labels)
    return right / total


def normalized_accuracy(
    merged: Mapping[str, float], experts: Mapping[str, float]
) -> dict[str, float]:
    """Each task's accuracy divided by its expert's, and their "average" and "worst".

    Raises
    ------
    ValueError
        Tasks differ, or an expert is never right.

    References
    ----------
    Ilharco et al., arXiv:2212.04089, section 4.
    """
    if set(merged) != set(experts) or not merged:
        raise ValueError(
            f"nlm.evaluate: there is an expert's accuracy for every task, got {', '.join(merged)} "
            f"and {', '.join(experts)}"
        )
    if never := [task for task, value in experts.items() if not value > 0]:
        raise ValueError(
            f"nlm.evaluate: an expert is right at times, got an accuracy of 0 for "
            f"{', '.join(never)}"
        )
    ratios = {task: merged[task] / experts[task] for task in merged}
    return {**ratios, "average": sum(ratios.values()) / len(ratios), "worst": min(ratios.values())}


def _labelled(batch: Any) -> tuple[Any, Tensor]:
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise ValueError(f"nlm.evaluate: a batch is (inputs, labels), got {type(batch).__name__}")
    return batch[0], batch[1]
