"""Least squares, channel by channel: one correction for all tasks, of the experts' activations.

With m_i what the merged model has at a channel of a point for sample i, and a_i what the expert of
the sample's task has there, over the samples of all tasks together

    min_s,t  sum_i |s m_i + t - a_i|^2:     s = cov(m, a) / var(m),     t = mean(a) - s mean(m),

fitted in forward order. It needs no task id at run time and folds into the weights, as REPAIR does,
but the samples are paired: REPAIR has to spread the activations as far as the experts' are, and
where a channel has little to do with theirs that spreads its errors; here it is made smaller.
:func:`nlm.refit` is the same with whole layers in the place of channels.

The covariance comes of three variances that are kept in one pass and add up over batches and
processes, cov(m, a) = (var(m + a) - var(m) - var(a)) / 2, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nlm.correct.correction import Correction, exclusive
from nlm.correct.fitting import prepare
from nlm.correct.matching import is_dead
from nlm.correct.points import Points
from nlm.correct.sequential import fit_sequential
from nlm.statistics import Data, Forward, Mask, Moments

_Self = TypeVar("_Self", bound="LeastSquares")


@dataclass(frozen=True)
class Paired:
    """The moments of the merged model's activations, of the expert's, and of their sums."""

    merged: Moments
    expert: Moments
    sums: Moments

    def __add__(self, other: Paired) -> Paired:
        return Paired(
            self.merged + other.merged, self.expert + other.expert, self.sums + other.sums
        )

    def all_reduce(self, process_group: Any = None) -> Paired:
        parts = (self.merged, self.expert, self.sums)
        return Paired(*(part.all_reduce(process_group) for part in parts))


class Regression:
    """The rule: the least squares of the expert's activations from the merged model's."""

    def measure(
        self, output: Tensor, dim: int, mask: Tensor | None, beside: Callable[[], Tensor]
    ) -> Paired:
        expert = beside()
        parts = (output, expert, output + expert)
        return Paired(*(Moments.of(part, dim, mask) for part in parts))

    def solve(
        self, caller: str, point: str, measured: Paired, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        merged, expert = measured.merged, measured.expert
        if not expert.m2.isfinite().all():
            raise ValueError(
                f"{caller}: activations are finite, got NaN or inf from an expert at {point!r}"
            )
        dead = is_dead(merged.mean, merged.variance, dtype)
        covariance = (measured.sums.m2 - merged.m2 - expert.m2) / 2
        scale = torch.where(dead, 1.0, covariance / torch.where(dead, 1.0, merged.m2))
        return scale, expert.mean - scale * merged.mean


class LeastSquares(Correction):
    """A merged model whose channels are as near to the experts' as one set brings them."""

    _kind = "LeastSquares"

    @classmethod
    def fit(
        cls: type[_Self],
        model: nn.Module,
        experts: Mapping[str, nn.Module],
        data: Mapping[str, Data],
        *,
        points: Points = None,
        max_samples: int | None = 128,
        micro_batch: int | None = None,
        recompute: bool = False,
        forward: Forward | None = None,
        mask: Mask | None = None,
        device: torch.device | str | None = None,
        process_group: Any = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> _Self:
        """Fits one correction; arguments and errors as for :meth:`Tact.fit`.

        The experts run beside the merged model, each on the samples of its task. ``progress`` is
        called with (point, points done, points); what it raises cancels.
        """
        with exclusive(model):
            setup = prepare(
                "nlm.LeastSquares", model, experts, data, points, max_samples, micro_batch, forward,
                mask, device, None, process_group,
            )  # fmt: skip
            streams = [setup.stream(task, both=True) for task in setup.tasks]
            fitted = fit_sequential(setup.fit(Regression()), streams, progress, recompute)
        rows = dict.fromkeys(setup.tasks, 0)
        return cls(model, setup.points, rows, [fitted], setup.found.readers, setup.apart)
