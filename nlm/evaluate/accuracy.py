"""Accuracies: of a model, of an ensemble, and of a merge relative to its experts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nlm._modules import evaluation
from nlm._state_dict import count_not_finite
from nlm.statistics import Data, Forward, run
from nlm.statistics.data import batches, labelled

SUMMARIES = ("average", "worst")


def accuracy(
    model: nn.Module,
    data: Data,
    *,
    forward: Forward | None = None,
    max_samples: int | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> float:
    """The share of samples whose largest output is their label.

    Parameters
    ----------
    data : a re-iterable of (inputs, labels) batches; the model's output is [n, ..., classes] and
        labels are integers [n, ...].
    forward : runs the model as ``forward(model, batch, **kwargs)``, labels included, instead.
    max_samples : how many samples are used, all by default.
    device : where batches are moved to.
    kwargs : passed on to the model, such as ``task="digits"``.

    Raises
    ------
    ValueError
        No sample, batches without labels, labels of another shape than the outputs, or outputs that
        are not finite.
    TypeError
        Labels that are no tensor of integers, outputs that are no tensor.
    """
    return ensemble_accuracy(
        [model], data, forward=forward, max_samples=max_samples, device=device, **kwargs
    )


def ensemble_accuracy(
    models: Sequence[nn.Module],
    data: Data,
    *,
    forward: Forward | None = None,
    max_samples: int | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> float:
    """The accuracy of the mean of several models' class probabilities; arguments as above.

    Raises
    ------
    ValueError, TypeError
        As above; also no model, or models of other classes.
    """
    if not models:
        raise ValueError("nlm.evaluate: an ensemble has at least one model, got none")
    right = total = 0
    with evaluation(*models):
        for batch in batches(data, max_samples, device, "nlm.evaluate"):
            _, labels = labelled(batch, "nlm.evaluate")
            outputs = [_probabilities(model, batch, forward, kwargs) for model in models]
            if len(shapes := {tuple(output.shape) for output in outputs}) > 1:
                raise ValueError(
                    f"nlm.evaluate: the models of an ensemble have the same classes, got outputs "
                    f"of the shapes {', '.join(str(list(shape)) for shape in sorted(shapes))}"
                )
            predicted = torch.stack(outputs).mean(0).argmax(-1)
            if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
                raise TypeError(f"nlm.evaluate: labels are integers, got {labels.dtype}")
            if labels.shape != predicted.shape:
                raise ValueError(
                    f"nlm.evaluate: there is one label per row of outputs "
                    f"{list(outputs[0].shape)}, got labels {list(labels.shape)}"
                )
            right += int((predicted == labels.to(predicted.device)).sum())
            total += labels.numel()
    return right / total


def normalized_accuracy(
    merged: Mapping[str, float], experts: Mapping[str, float]
) -> dict[str, float]:
    """Each task's accuracy divided by its expert's, and their "average" and "worst".

    ``merged`` and ``experts`` are task -> accuracy, from 0 to 1.

    Raises
    ------
    ValueError
        Tasks differ, one has the name of a summary, or an expert is never right.

    References
    ----------
    Ilharco et al., arXiv:2212.04089, section 4.
    """
    if set(merged) != set(experts) or not merged:
        raise ValueError(
            f"nlm.evaluate: there is an expert's accuracy for every task, got {', '.join(merged)} "
            f"and {', '.join(experts)}"
        )
    if taken := [task for task in merged if task in SUMMARIES]:
        raise ValueError(
            f"nlm.evaluate: no task is called {' or '.join(SUMMARIES)}, got {', '.join(merged)}; "
            f"{', '.join(taken)} would lose its score"
        )
    if never := [task for task, value in experts.items() if not value > 0]:
        raise ValueError(
            f"nlm.evaluate: an expert is right at times, got an accuracy of 0 for "
            f"{', '.join(never)}"
        )
    ratios = {task: merged[task] / experts[task] for task in merged}
    return {**ratios, "average": sum(ratios.values()) / len(ratios), "worst": min(ratios.values())}


def outputs_of(
    model: nn.Module, batch: Any, forward: Forward | None, kwargs: Mapping[str, Any]
) -> Any:
    """What a model computes for a labelled batch; inputs may be a dict of arguments."""
    inputs = labelled(batch, "nlm.evaluate")[0] if forward is None else batch
    return run(model, inputs, forward, **kwargs)


def _probabilities(
    model: nn.Module, batch: Any, forward: Forward | None, kwargs: Mapping[str, Any]
) -> Tensor:
    logits = outputs_of(model, batch, forward, kwargs)
    if not isinstance(logits, Tensor) or logits.dim() == 0:
        raise TypeError(
            f"nlm.evaluate: outputs are one tensor with the classes last, got "
            f"{type(logits).__name__} from {type(model).__name__}"
        )
    if count_not_finite(logits):
        raise ValueError(
            f"nlm.evaluate: outputs are finite, got NaN or inf from {type(model).__name__}"
        )
    return logits.double().softmax(-1)
