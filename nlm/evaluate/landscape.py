"""A quantity on the plane through three models' weights.

    theta(x, y) = origin + x u + y v,    u = (second - origin) / |second - origin|,

and v is the unit vector of what (third - origin) has at right angles to u (Gram-Schmidt): distances
on the plane are distances between weights. With the start of two task vectors as the origin, and
the two experts, it is the plane of figures 1 and 2 of Sharma, Roy and Dziugaite, arXiv:2410.12766.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nlm._multitask import with_state
from nlm._names import is_statistic
from nlm._state_dict import StateDict, check_alike
from nlm.evaluate.barrier import check_entries, mean_loss
from nlm.statistics import Data, Forward, batches

Measure = Callable[[dict[str, Tensor]], Mapping[str, float]]


@dataclass(frozen=True)
class Landscape:
    """Quantities at the places of a grid on a plane of weights.

    Attributes
    ----------
    x, y : the coordinates of the places, ascending.
    values : quantity -> ``[len(y)][len(x)]``.
    models : name -> (x, y, distance from the plane) of each state dict.
    """

    x: list[float]
    y: list[float]
    values: dict[str, list[list[float]]]
    models: dict[str, tuple[float, float, float]]


def landscape(
    states: Mapping[str, StateDict],
    measure: Measure,
    *,
    points: int = 11,
    margin: float = 0.25,
    progress: Callable[[int, int], None] | None = None,
) -> Landscape:
    """What ``measure`` finds at ``points`` x ``points`` places around some models.

    BatchNorm statistics are no part of the plane: a place has the mean of the three models' ones,
    weighted by its nearness to them and never extrapolated. ``measure`` may estimate them anew.
    Entries of integers are the origin's.

    Parameters
    ----------
    states : name -> state dict. The first three span the plane; all are located on it.
    measure : state dict -> {quantity: value}, the same quantities at every place.
    margin : how far the grid reaches beyond the models on each side, as a share of their extent.
    progress : called with (places done, places); what it raises cancels.

    Raises
    ------
    ValueError
        Fewer than three models, models that are not alike or lie on one line, a grid of fewer than
        two points or a negative margin.
    TypeError
        Integer or complex weights.
    """
    if len(states) < 3:
        raise ValueError(f"nlm.evaluate: three models span a plane, got {len(states)}")
    if points < 2 or not margin >= 0:
        raise ValueError(
            f"nlm.evaluate: a landscape has at least two points a side and a margin of at least 0, "
            f"got {points} and {margin}"
        )
    check_alike("nlm.evaluate", states)
    plane = _Plane(states)
    x, y = (_grid(column, points, margin) for column in plane.places.T.tolist())
    found: list[Mapping[str, float]] = []
    for state in plane.states(x, y):
        found.append(measure(state))
        if progress is not None:
            progress(len(found), points**2)
    rows = [found[start : start + points] for start in range(0, points**2, points)]
    return Landscape(
        x,
        y,
        {name: [[float(at[name]) for at in row] for row in rows] for name in found[0]},
        {
            name: (place[0], place[1], away)
            for name, place, away in zip(states, plane.places.tolist(), plane.away, strict=True)
        },
    )


def loss_landscape(
    network: nn.Module,
    states: Mapping[str, StateDict],
    data: Data,
    *,
    prepare: Callable[[nn.Module], object] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
    forward: Forward | None = None,
    max_samples: int | None = None,
    device: torch.device | str | None = None,
    points: int = 11,
    margin: float = 0.25,
    progress: Callable[[int, int], None] | None = None,
    **kwargs: Any,
) -> Landscape:
    """The mean "loss" on the plane through three state dicts of one network.

    Parameters
    ----------
    network : the architecture; its own weights are not used and not changed.
    prepare : called with the model of every place before its loss is taken, such as
        ``lambda model: nlm.reset_batch_norm(model, data)``.
    data, loss, forward, max_samples, device, kwargs : as for :func:`loss_barrier`.
    states, points, margin, progress : as for :func:`landscape`.

    Raises
    ------
    ValueError, TypeError
        What :func:`landscape` and :func:`loss_barrier` raise; losses may be infinite or NaN.
    """
    for state in states.values():
        check_entries(network, state)
    samples = list(batches(data, max_samples, device, "nlm.evaluate"))

    def measure(state: dict[str, Tensor]) -> dict[str, float]:
        model = with_state(network, state)
        if device is not None:
            model.to(device)
        if prepare is not None:
            prepare(model)
        return {"loss": mean_loss(model, samples, loss, forward, kwargs)}

    return landscape(states, measure, points=points, margin=margin, progress=progress)


class _Plane:
    """The coordinates of models on the plane through the first three, and its state dicts.

    With d_i = state_i - origin and L L^T the Gram matrix of d_1 and d_2, model i lies at
    L^-1 (d_1 . d_i, d_2 . d_i), and the place z is origin + s d_1 + t d_2 with L^T (s, t) = z.
    """

    def __init__(self, states: Mapping[str, StateDict]) -> None:
        origin, *others = states.values()
        self._corners = (origin, *others[:2])
        products = torch.zeros(len(others), len(others), dtype=torch.float64)
        for name, tensor in origin.items():
            if tensor.is_floating_point() and not is_statistic(name):
                start = tensor.detach().double().flatten()
                away = torch.stack([s[name].detach().double().flatten() - start for s in others])
                products += (away @ away.T).cpu()
        first, mixed, second = (float(products[i, j]) for i, j in ((0, 0), (0, 1), (1, 1)))
        if not first * second - mixed**2 > 1e-12 * first * second:
            names = ", ".join(map(repr, list(states)[:3]))
            raise ValueError(f"nlm.evaluate: a plane has three models not on a line, got {names}")
        self._root = torch.linalg.cholesky(products[:2, :2])
        places = torch.linalg.solve_triangular(self._root, products[:2], upper=False).T
        left = products.diagonal() - places.square().sum(1)
        self.places = torch.cat([torch.zeros(1, 2, dtype=torch.float64), places])  # [models, 2]
        self.away = [0.0, 0.0, 0.0, *left[2:].clamp(min=0).sqrt().tolist()]

    def states(self, x: list[float], y: list[float]) -> Iterator[dict[str, Tensor]]:
        """The state dicts of the places, x fastest."""
        for down in y:
            for across in x:
                place = torch.tensor([[across], [down]], dtype=torch.float64)
                shares = torch.linalg.solve_triangular(self._root.T, place, upper=True)
                first, second = shares.flatten().tolist()
                yield self._state((1 - first - second, first, second))

    def _state(self, weights: tuple[float, ...]) -> dict[str, Tensor]:
        near = [max(weight, 0.0) for weight in weights]
        inside = [weight / sum(near) for weight in near]
        state = {}
        for name, tensor in self._corners[0].items():
            if tensor.is_floating_point():
                corners = [corner[name].detach() for corner in self._corners]
                shares = inside if is_statistic(name) else weights
                state[name] = sum(
                    (corner * share for corner, share in zip(corners, shares, strict=True)),
                    torch.zeros_like(tensor),
                )
            else:
                state[name] = tensor
        return state


def _grid(places: list[float], points: int, margin: float) -> list[float]:
    reach = margin * (max(places) - min(places))
    return torch.linspace(
        min(places) - reach, max(places) + reach, points, dtype=torch.float64
    ).tolist()
