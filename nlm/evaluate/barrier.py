"""The loss on the straight line between two models' weights.

barrier = max over l of  loss((1 - l) A + l B) - ((1 - l) loss(A) + l loss(B))

(Frankle et al., arXiv:1912.05671; Entezari et al., arXiv:2110.06296).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nlm._modules import evaluation
from nlm._multitask import with_state
from nlm._state_dict import StateDict, check_alike
from nlm.evaluate.accuracy import outputs_of
from nlm.statistics import Data, Forward, batches
from nlm.statistics.data import labelled


@dataclass(frozen=True)
class BarrierCurve:
    """Mean ``losses`` at ``positions``, the second model's shares of the weights; their barrier."""

    positions: list[float]
    losses: list[float]

    @property
    def barrier(self) -> float:
        """The largest loss above the line that joins the two ends; NaN where a loss is."""
        first, last = self.losses[0], self.losses[-1]
        above = [
            loss - ((1 - at) * first + at * last)
            for at, loss in zip(self.positions, self.losses, strict=True)
        ]
        return math.nan if any(map(math.isnan, above)) else max(above)


def loss_barrier(
    network: nn.Module,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    data: Data,
    *,
    points: int = 11,
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
    forward: Forward | None = None,
    max_samples: int | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> BarrierCurve:
    """The mean loss at ``points`` places on the line between two state dicts.

    Parameters
    ----------
    network : the architecture; its own weights are not used and not changed.
    state_a, state_b : its weights at both ends, floating.
    data : a re-iterable of (inputs, targets) batches.
    loss : the mean loss of a batch from outputs and targets.
    forward : runs the network as ``forward(network, batch, **kwargs)``, targets included, instead.
    max_samples : how many samples are used, all by default.
    device : where the network and the batches are moved to.
    kwargs : passed on to the network.

    Raises
    ------
    ValueError
        Fewer than two points, no sample, batches without targets, state dicts that are not alike or
        not the network's, or a loss that is not finite.
    TypeError
        Integer or complex weights, targets that are no tensor.
    """
    if points < 2:
        raise ValueError(f"nlm.evaluate: a line has at least two points, got {points}")
    check_alike("nlm.evaluate", {"state_a": state_a, "state_b": state_b})
    check_entries(network, state_a)
    samples = list(batches(data, max_samples, device, "nlm.evaluate"))
    positions = [number / (points - 1) for number in range(points)]
    losses = []
    for at in positions:
        state = {name: _between(state_a[name], state_b[name], at) for name in state_a}
        model = with_state(network, state)
        model = model if device is None else model.to(device)
        losses.append(mean_loss(model, samples, loss, forward, kwargs))
        if not math.isfinite(losses[-1]):
            raise ValueError(f"nlm.evaluate: losses are finite, got {losses[-1]} at {at:.3g}")
    return BarrierCurve(positions, losses)


def check_entries(network: nn.Module, state: StateDict) -> None:
    """Raises ValueError where a state dict has other entries than a network."""
    if unlike := sorted(set(network.state_dict()) ^ set(state)):
        raise ValueError(
            f"nlm.evaluate: state dicts have the entries of the network, got "
            f"{', '.join(map(repr, unlike[:5]))} in only one of them"
        )


def mean_loss(
    model: nn.Module,
    samples: list[Any],
    loss: Callable[[Tensor, Tensor], Tensor],
    forward: Forward | None,
    kwargs: Mapping[str, Any],
) -> float:
    """The mean over all samples, in evaluation mode."""
    total = count = 0.0
    with evaluation(model):
        for batch in samples:
            _, targets = labelled(batch, "nlm.evaluate")
            total += float(loss(outputs_of(model, batch, forward, kwargs), targets)) * len(targets)
            count += len(targets)
    return total / count


def _between(a: Tensor, b: Tensor, at: float) -> Tensor:
    return torch.lerp(a, b, at) if a.is_floating_point() else a
