"""Where a merge departs from an expert: per point the ratio of variances and the distance.

    variance ratio    = sum_c Var[merged_c] / sum_c Var[expert_c]
    relative distance = || merged - expert || / || expert ||

over the same samples: figure 3 of Sharma, Roy and Dziugaite, arXiv:2410.12766. A ratio that falls
with depth is variance collapse.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nlm._modules import evaluation, output_hooks
from nlm._multitask import network_of
from nlm.statistics import Data, Forward, Moments, run
from nlm.statistics.data import batches


@dataclass(frozen=True)
class LayerStatistics:
    """point -> variance ratio and relative distance, in the order of the points."""

    variance_ratio: dict[str, float]
    relative_distance: dict[str, float]


def layer_statistics(
    merged: nn.Module,
    expert: nn.Module,
    points: Mapping[str, int],
    data: Data,
    *,
    forward: Forward | None = None,
    max_samples: int | None = None,
    **kwargs: Any,
) -> LayerStatistics:
    """Compares a merged model's activations with an expert's.

    Parameters
    ----------
    merged : any module, a :class:`MultiTaskModel` or a correction such as :class:`nlm.Tact` (whose
        corrected outputs are seen).
    expert : the expert of the data's task, with modules of the same names.
    points : module name -> channel dimension of its output.
    kwargs : passed on to ``merged``, such as ``task="digits"``.
    """
    network = network_of(merged)
    kept: dict[str, Tensor] = {}
    moments: dict[str, list[Moments]] = {}
    squares = {point: [0.0, 0.0] for point in points}

    def keeper(point: str) -> Any:
        def keep(output: Tensor) -> None:
            kept[point] = output.detach().clone()

        return keep

    hooks = {point: keeper(point) for point in points}
    with evaluation(merged, expert):
        for batch in batches(data, max_samples, caller="nlm.evaluate"):
            outputs = []
            for model, inner in ((merged, network), (expert, expert)):
                kept.clear()
                with output_hooks(inner, hooks):
                    run(model, batch, forward, **(kwargs if model is merged else {}))
                outputs.append(dict(kept))
            for point, dim in points.items():
                ours, theirs = (side[point] for side in outputs)
                new = [Moments.of(ours, dim), Moments.of(theirs, dim)]
                old = moments.get(point)
                moments[point] = (
                    new if old is None else [a + b for a, b in zip(old, new, strict=True)]
                )
                squares[point][0] += float((ours.double() - theirs.double()).square().sum())
                squares[point][1] += float(theirs.double().square().sum())
    ratio = {p: float(a.m2.sum() / b.m2.sum()) for p, (a, b) in moments.items()}
    distance = {p: (over / under) ** 0.5 for p, (over, under) in squares.items()}
    return LayerStatistics(ratio, distance)
