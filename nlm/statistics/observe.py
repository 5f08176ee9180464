"""Collecting moments of activations from models over data: one walk, nothing stored but moments."""

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nlm._modules import OutputHook, evaluation, output_hooks
from nlm._state_dict import count_not_finite
from nlm.statistics.data import Data, Forward, Mask, batches, run
from nlm.statistics.moments import CrossMoments, Moments
from nlm.statistics.positions import Positions

_Kind = TypeVar("_Kind", Moments, CrossMoments)

_AT_ONCE = 1024  # positions; the sums of 3072 channels take a third more time with 256 at once


def check_activation(
    caller: str, point: str, activation: Tensor, dim: int = 1, mask: Tensor | None = None
) -> None:
    """Raises ValueError where an activation holds NaN or inf, at the positions that count."""
    bad = count_not_finite(activation)
    if bad and mask is not None:
        bad = count_not_finite(activation.movedim(dim, -1)[mask])
    if bad:
        raise ValueError(
            f"{caller}: activations are finite, got {bad} NaN or inf of {activation.numel()} at "
            f"{point!r}"
        )


def check_moments(
    caller: str, point: str, moments: Moments, activation: Tensor, dim: int, mask: Tensor | None
) -> None:
    """Raises ValueError where the activation whose moments they are holds NaN or inf."""
    if not moments.m2.isfinite().all():
        check_activation(caller, point, activation, dim, mask)


def check_reached(caller: str, points: Iterable[str], reached: Container[str]) -> None:
    """Raises ValueError where a point's module did not run."""
    if missing := [point for point in points if point not in reached]:
        raise ValueError(
            f"{caller}: the module of a point runs on the data, got no run of {', '.join(missing)}"
        )


def collect_moments(
    model: nn.Module,
    points: Mapping[str, int],
    data: Data,
    *,
    forward: Forward | None = None,
    mask: Mask | None = None,
    max_samples: int | None = None,
    device: torch.device | str | None = None,
    process_group: Any = None,
    caller: str = "nlm.statistics",
) -> dict[str, Moments]:
    """The moments of the outputs of some modules over data.

    Parameters
    ----------
    model : is run in evaluation mode and comes back as it was; ``caller`` begins the messages of
        errors.
    points : module name -> channel dimension of its output.
    data, forward, mask, max_samples, device : see :mod:`nlm.statistics.data`.
    process_group : of torch.distributed: each of its processes walks data of its own, and all get
        the moments of all. One that fails must end, so that the others see its connection close.

    Returns
    -------
    dict
        point -> moments, in the points' order.

    Raises
    ------
    TypeError
        The data cannot be iterated again and again, or a batch is of no known form.
    ValueError
        No sample; a point that is no module or does not run; NaN or inf in an activation, at a
        position that counts.
    """
    found: dict[str, Moments] = {}
    current: list[Tensor | None] = [None]

    def collector(point: str, dim: int) -> Callable[[Tensor], None]:
        def collect(output: Tensor) -> None:
            new = Moments.of(output, dim, current[0])
            check_moments(caller, point, new, output, dim, current[0])
            found[point] = found[point] + new if point in found else new

        return collect

    hooks = {point: collector(point, dim) for point, dim in points.items()}
    with evaluation(model), output_hooks(model, hooks):
        for batch in batches(data, max_samples, device, caller):
            current[0] = None if mask is None else mask(batch)
            run(model, batch, forward)
    check_reached(caller, points, found)
    return _of_all({point: found[point] for point in points}, process_group)


def collect_cross_moments(
    model_x: nn.Module,
    model_y: nn.Module,
    points: Mapping[str, int],
    data: Data,
    *,
    forward: Forward | None = None,
    mask: Mask | None = None,
    max_samples: int | None = None,
    stride: int = 1,
    max_tokens: int | None = None,
    seed: int = 0,
    precision: str = "float32",
    device: torch.device | str | None = None,
    process_group: Any = None,
    progress: Callable[[int], None] | None = None,
    caller: str = "nlm.statistics",
) -> dict[str, CrossMoments]:
    """The cross-moments between two models' outputs of the same modules over the same data.

    Memory does not grow with the data: the moments, and of one batch the outputs of ``model_x``;
    where some positions count, those of as many batches as have 1024 of them, in both models.

    Parameters
    ----------
    model_x, model_y : models with modules of the same names, or one model twice.
    points, data, forward, max_samples, device, process_group : see :func:`collect_moments`.
    mask, stride, max_tokens, seed : see :mod:`nlm.statistics.positions`.
    precision : of the products, see :func:`nlm.ops.cross_moments_`.
    caller : begins the messages of errors.
    progress : called with the number of batches done after each; what it raises cancels.

    Raises
    ------
    TypeError, ValueError
        As for :func:`collect_moments`; also outputs of the two models whose shapes differ beside
        the channel dimension, a mask of other positions, a stride or most tokens below 1.
    """
    seen = 0
    found: dict[str, CrossMoments] = {}
    outputs: dict[str, tuple[Tensor, Tensor | None]] = {}
    waiting: dict[str, list[tuple[Tensor, Tensor]]] = {}  # [positions, channels] of both models
    positions = Positions(mask, stride, max_tokens, seed, caller)

    def taken(output: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
        """What counts of an output: all of it, or [positions, channels]; and which positions."""
        counted = positions.of(output, dim)
        return output if counted is None else output.movedim(dim, -1)[counted], counted

    def keeper(point: str, dim: int) -> Callable[[Tensor], None]:
        def keep(output: Tensor) -> None:
            x, counted = taken(output, dim)
            outputs[point] = x.clone() if counted is None else x, counted  # may be written into

        return keep

    def add(point: str, x: Tensor, y: Tensor, dim: int) -> None:
        if point not in found:
            found[point] = CrossMoments.zeros(x.shape[dim], y.shape[dim], y.device)
        moments = found[point]
        moments.update(x, y, dim, precision=precision)
        for activation, of in ((x, moments.x), (y, moments.y)):
            if not of.m2.isfinite().all():
                check_activation(caller, point, activation)

    def add_waiting(point: str) -> None:
        xs, ys = zip(*waiting.pop(point), strict=True)
        add(point, torch.cat(xs), torch.cat(ys), -1)

    def collector(point: str, dim: int) -> Callable[[Tensor], None]:
        def collect(output: Tensor) -> None:
            x, of_x = outputs.pop(point, (None, None))
            y, counted = taken(output, dim)
            if x is None or of_x is not counted:
                raise ValueError(
                    f"{caller}: the module of a point runs once in both models, got other runs of "
                    f"{point!r}"
                )
            if counted is None:
                add(point, x, y, dim)
                return
            held = waiting.get(point, [])
            if held and [each.shape[1] for each in held[0]] != [x.shape[1], y.shape[1]]:
                add_waiting(point)  # what comes next is refused by name
            waiting.setdefault(point, []).append((x, y))
            if sum(len(each) for each, _ in waiting[point]) >= _AT_ONCE:
                add_waiting(point)

        return collect

    keepers: Mapping[str, OutputHook] = {point: keeper(point, dim) for point, dim in points.items()}
    collectors: Mapping[str, OutputHook] = {
        point: collector(point, dim) for point, dim in points.items()
    }
    with evaluation(model_x, model_y):
        for batch in batches(data, max_samples, device, caller):
            positions.begin(batch)
            for model, hooks in ((model_x, keepers), (model_y, collectors)):
                with output_hooks(model, hooks):  # one at a time: both may be the same model
                    run(model, batch, forward)
            if progress is not None:
                seen += 1
                progress(seen)
    for point in list(waiting):
        add_waiting(point)
    check_reached(caller, points, found)
    return _of_all({point: found[point] for point in points}, process_group)


def _of_all(found: dict[str, _Kind], process_group: Any) -> dict[str, _Kind]:
    """The moments of all processes of a group, where there is one."""
    if process_group is None:
        return found
    return {point: moments.all_reduce(process_group) for point, moments in found.items()}
