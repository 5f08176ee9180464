"""Where models' features lie beside each other: their t-SNE projection.

The features of several models on the same samples are projected together, so that samples that lie
close in it have like features, whichever model they are of: figure 4 of Sharma, Roy and Dziugaite,
arXiv:2410.12766. Distances between far groups mean nothing (van der Maaten and Hinton, 2008).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nlm._modules import evaluation
from nlm._multitask import network_of
from nlm.evaluate.layers import outputs_of_points
from nlm.statistics import Data, Forward, batches
from nlm.statistics.observe import check_activation


@dataclass(frozen=True)
class Projection:
    """places : model -> two numbers a sample, "expert" first; samples are in one order for all."""

    places: dict[str, list[list[float]]]


def projection(
    models: Mapping[str, nn.Module],
    expert: nn.Module,
    point: str,
    data: Data,
    *,
    seed: int = 0,
    perplexity: float = 30.0,
    forward: Forward | None = None,
    max_samples: int | None = 200,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> Projection:
    """Projects what merged models and an expert compute at one point.

    Parameters
    ----------
    models : name -> any module, a :class:`MultiTaskModel` or a correction.
    expert : the expert of the data's task.
    point : a module of all of them; its whole output for a sample is that sample's features.
    data : a re-iterable of batches; only inputs are used.
    seed : of t-SNE; ``max_samples``, how many samples are used.
    perplexity : about how many neighbours count; at most a third of all places.
    forward, device : see :mod:`nlm.statistics.data`.
    kwargs : passed on to ``models``, such as ``task="digits"``.

    Raises
    ------
    ImportError
        scikit-learn is not installed (``pip install nlm[demo]``).
    ValueError
        A model called "expert", fewer than two samples, one feature, features of several sizes, NaN
        or inf in them, or a module that does not run exactly once.

    References
    ----------
    van der Maaten and Hinton: Visualizing Data using t-SNE, JMLR 9, 2008.
    """
    try:
        from sklearn.manifold import TSNE
    except ModuleNotFoundError as error:
        raise ImportError(
            "nlm.evaluate: a projection needs scikit-learn, got no such package: "
            "pip install nlm[demo]"
        ) from error
    if "expert" in models:
        raise ValueError("nlm.evaluate: models have names of their own, got 'expert'")
    samples = list(batches(data, max_samples, device, "nlm.evaluate"))
    features = {"expert": _features(expert, point, samples, forward, {})}
    features |= {n: _features(each, point, samples, forward, kwargs) for n, each in models.items()}
    shapes = {tuple(each.shape) for each in features.values()}
    count, width = min(shapes)
    if len(shapes) > 1 or count < 2 or width < 2:
        raise ValueError(
            f"nlm.evaluate: a projection has two or more samples and as many features of every "
            f"model, got {', '.join(str(list(shape)) for shape in sorted(shapes))}"
        )
    together = torch.cat(list(features.values())).numpy()
    found = TSNE(
        init="pca", random_state=seed, perplexity=min(perplexity, (len(together) - 1) / 3)
    ).fit_transform(together)
    parts = torch.from_numpy(found).split(count)
    return Projection({name: part.tolist() for name, part in zip(features, parts, strict=True)})


def _features(
    model: nn.Module,
    point: str,
    samples: list[Any],
    forward: Forward | None,
    kwargs: Mapping[str, Any],
) -> Tensor:
    """[samples, features], float32 on the CPU."""
    network, found = network_of(model), []
    with evaluation(model):
        for batch in samples:
            output = outputs_of_points(model, network, {point: 1}, batch, forward, kwargs)[point]
            check_activation("nlm.evaluate", point, output)
            found.append(output.flatten(1).float().cpu())
    return torch.cat(found)
