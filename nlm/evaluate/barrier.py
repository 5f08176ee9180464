"""The loss on the straight line between two models' weights.

barrier = max over l of  loss((1 - l) A + l B) - ((1 - l) loss(A) + l loss(B))

(Frankle et al., arXiv:1912.05671; Entezari et al., arXiv:2110.06296).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from nlm._modules import evaluation
from nlm._state_dict import check_alike
from nlm.statistics import Data
from nlm.statistics.data import batches


@dataclass(frozen=True)
class BarrierCurve:
    """Losses at the weights' shares ``positions`` of the second model, and their barrier."""

    positions: list[float]
    losses: list[float]

    @property
    def barrier(self) -> float:
        """The largest loss above the line that joins the two ends."""
        first, last = self.losses[0], self.losses[-1]
        return max(
            loss - ((1 - at) * first + at * last)
            for at, loss in zip(self.positions, self.losses, strict=True)
        )


def loss_barrier(
    network: nn.Module,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    data: Data,
    *,
    points: int = 11,
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
    max_samples: int | None = None,
) -> BarrierCurve:
    """The mean loss at ``points`` places on the line between two state dicts.

    Parameters
    ----------
    network : the architecture; its own weights are not used and not changed.
    data : a re-iterable of (inputs, targets) batches.
    loss : the mean loss of a batch from outputs and targets.

    Raises
    ------
    ValueError
        Fewer than two points, no sample, or state dicts that are not alike.
    """
    if points < 2:
        raise ValueError(f"nlm.evaluate: a line has at least two points, got {points}")
    check_alike("nlm.evaluate", {"state_a": state_a, "state_b": state_b})
    samples = list(batches(data, max_samples, caller="nlm.evaluate"))
    positions = [number / (points - 1) for number in range(points)]
    losses = []
    with evaluation(network):
        for at in positions:
            state = {name: _between(state_a[name], state_b[name], at) for name in state_a}
            total = count = 0.0
            for inputs, targets in samples:
                outputs = functional_call(network, state, (inputs,), strict=True)
                total += float(loss(outputs, targets)) * len(targets)
                count += len(targets)
            losses.append(total / count)
    return BarrierCurve(positions, losses)


def _between(a: Tensor, b: Tensor, at: float) -> Tensor:
    return torch.lerp(a, b, at) if a.is_floating_point() else a
