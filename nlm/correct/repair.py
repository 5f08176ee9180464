"""REPAIR: one correction for all tasks, folded into the weights or used without a task id.

The merged model's statistics are taken over all tasks' samples together. The targets are one of

average    the means over the experts of their activations' means and standard deviations, as
           published. This variance is that within tasks, while the variance over all samples also
           holds that between the tasks' means: where the tasks' inputs differ, REPAIR shrinks the
           activations even of a merge that equals its experts.
union      the mean and the variance of all experts' activations together, each on its own task's
           samples: a merge that equals its experts is left as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import TypeVar

import torch
from torch import nn

from nlm.correct.correction import Correction, check_channels, exclusive
from nlm.correct.fitting import ExpertMoments, prepare
from nlm.correct.sequential import Target, fit_sequential
from nlm.statistics import Data, Forward, Mask, Moments

_Self = TypeVar("_Self", bound="Repair")
TARGETS = ("average", "union")


class Repair(Correction):
    """A merged model whose activations have the experts' statistics over all tasks: ``repair(x)``.

    References
    ----------
    Jordan et al.: REPAIR: REnormalizing Permuted Activations for Interpolation Repair,
    arXiv:2211.08403, section 4.
    """

    _kind = "Repair"

    @classmethod
    def fit(
        cls: type[_Self],
        model: nn.Module,
        experts: Mapping[str, nn.Module],
        data: Mapping[str, Data],
        *,
        points: Sequence[str] | Mapping[str, int] | None = None,
        max_samples: int | None = 128,
        micro_batch: int | None = None,
        target: str = "average",
        forward: Forward | None = None,
        mask: Mask | None = None,
        device: torch.device | str | None = None,
        moments: ExpertMoments | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> _Self:
        """Fits one correction; arguments and errors as for :meth:`Tact.fit`.

        ``target`` is "average" or "union" (above). ``progress`` is called with (point, points done,
        points); what it raises cancels.
        """
        if target not in TARGETS:
            raise ValueError(
                f"nlm.Repair: the target is one of {', '.join(TARGETS)}, got {target!r}"
            )
        with exclusive(model):
            setup = prepare(
                "nlm.Repair", model, experts, data, points, max_samples, micro_batch, forward, mask,
                device, moments,
            )  # fmt: skip
            own = [setup.expert_moments(task) for task in setup.tasks]
            targets = {}
            for point in setup.points:
                check_channels("nlm.Repair", point, [len(of[point].mean) for of in own])
                targets[point] = _target([of[point] for of in own], target)
            streams = [setup.stream(task) for task in setup.tasks]
            fitted = fit_sequential(
                setup.network, streams, setup.points, targets, "nlm.Repair", progress
            )
        return cls(model, setup.points, dict.fromkeys(setup.tasks, 0), [fitted])


def _target(own: list[Moments], target: str) -> Target:
    """Mean and variance that a point shall have, from the experts' moments there."""
    if target == "union":
        union = reduce(add, own)
        return union.mean, union.variance
    deviation = torch.stack([moments.variance.sqrt() for moments in own]).mean(0)
    return torch.stack([moments.mean for moments in own]).mean(0), deviation.square()
