"""Where a merge departs from an expert: per point the ratio of variances and the distance.

    variance ratio    = sum_c Var[merged_c] / sum_c Var[expert_c]
    relative distance = || merged - expert || / || expert ||

over the same samples: figure 3 of Sharma, Roy and Dziugaite, arXiv:2410.12766. A ratio that falls
with depth is variance collapse.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nlm._modules import evaluation, output_hooks
from nlm._multitask import network_of
from nlm.statistics import Data, Forward, Mask, Moments, batches, run
from nlm.statistics.observe import check_activation


@dataclass(frozen=True)
class LayerStatistics:
    """point -> ``variance_ratio`` and ``relative_distance``, in the order of the points.

    Both are ratios, without a unit: of the merged model's variance to the expert's, and of the
    distance of their outputs to the size of the expert's. Where the expert is constant, or zero,
    they are inf, or NaN if the merged model is so, too.
    """

    variance_ratio: dict[str, float]
    relative_distance: dict[str, float]


def layer_statistics(
    merged: nn.Module,
    expert: nn.Module,
    points: Mapping[str, int],
    data: Data,
    *,
    forward: Forward | None = None,
    mask: Mask | None = None,
    max_samples: int | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> LayerStatistics:
    """Compares a merged model's activations with an expert's.

    Parameters
    ----------
    merged : any module, a :class:`MultiTaskModel` or a correction such as :class:`nlm.Tact` (whose
        corrected outputs are seen).
    expert : the expert of the data's task, with modules of the same names.
    points : module name -> channel dimension of its output.
    data : a re-iterable of batches; only inputs are used.
    forward : runs a model as ``forward(model, batch, **kwargs)`` instead.
    mask : ``mask(batch)`` says which positions count, bool of the output's shape without the
        channel dimension.
    max_samples : how many samples are used, all by default.
    device : where batches are moved to.
    kwargs : passed on to ``merged``, such as ``task="digits"``.

    Raises
    ------
    ValueError
        No sample, NaN or inf in an activation that counts, a name that is no module of both, a
        module that does not run exactly once, or outputs of two shapes.
    """
    network = network_of(merged)
    moments: dict[str, list[Moments]] = {}
    squares = {point: [0.0, 0.0] for point in points}
    with evaluation(merged, expert):
        for batch in batches(data, max_samples, device, "nlm.evaluate"):
            counted = None if mask is None else mask(batch)
            outputs = [
                outputs_of_points(merged, network, points, batch, forward, kwargs),
                outputs_of_points(expert, expert, points, batch, forward, {}),
            ]
            for point, dim in points.items():
                if outputs[0][point].shape != outputs[1][point].shape:
                    raise ValueError(
                        f"nlm.evaluate: both models' outputs have one shape, got "
                        f"{list(outputs[0][point].shape)} and {list(outputs[1][point].shape)} at "
                        f"{point!r}"
                    )
                ours, theirs = (_rows(side[point], dim, counted) for side in outputs)
                for side in (ours, theirs):
                    check_activation("nlm.evaluate", point, side)
                new = [Moments.of(ours), Moments.of(theirs)]
                old = moments.get(point)
                moments[point] = (
                    new if old is None else [a + b for a, b in zip(old, new, strict=True)]
                )
                squares[point][0] += float((ours.double() - theirs.double()).square().sum())
                squares[point][1] += float(theirs.double().square().sum())
    return LayerStatistics(
        {p: _ratio(float(a.m2.sum()), float(b.m2.sum())) for p, (a, b) in moments.items()},
        {p: math.sqrt(_ratio(over, under)) for p, (over, under) in squares.items()},
    )


def outputs_of_points(
    model: nn.Module,
    network: nn.Module,
    points: Mapping[str, int],
    batch: Any,
    forward: Forward | None,
    kwargs: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The outputs of the points in ``network`` when the model around it is run on a batch.

    They are cloned, as a later module may write into them.
    """
    kept: dict[str, list[Tensor]] = {point: [] for point in points}

    def keeper(outputs: list[Tensor]) -> Callable[[Tensor], None]:
        return lambda output: outputs.append(output.detach().clone())

    with output_hooks(network, {point: keeper(outputs) for point, outputs in kept.items()}):
        run(model, batch, forward, **kwargs)
    for point, outputs in kept.items():
        if len(outputs) != 1:
            raise ValueError(
                f"nlm.evaluate: a point's module runs once in a forward pass, got {len(outputs)} "
                f"runs of {point!r}"
            )
    return {point: outputs[0] for point, outputs in kept.items()}


def _rows(output: Tensor, dim: int, counted: Tensor | None) -> Tensor:
    """The positions that count, [positions, channels]."""
    rows = output.movedim(dim, -1)
    if counted is None:
        return rows.flatten(0, -2)
    if counted.dtype != torch.bool or counted.shape != rows.shape[:-1]:
        raise ValueError(
            f"nlm.evaluate: a mask is bool of an output's shape without the channels "
            f"{list(rows.shape[:-1])}, got {counted.dtype} {list(counted.shape)}"
        )
    return rows[counted.to(rows.device)]


def _ratio(over: float, under: float) -> float:
    if under:
        return over / under
    return math.inf if over else math.nan
