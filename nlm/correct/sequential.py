"""Fitting corrections in forward order, on pooled moments.

At each point all micro-batches of all streams are advanced to it with the earlier corrections in
place, their moments are pooled (Chan), the point's correction is fixed, and all go on. So a later
point sees repaired inputs, and the result does not depend on how the samples are cut into batches.
Statistics taken at all points at once from the uncorrected model are worse than no correction in
places; they are here as a control.

Several micro-batches go in lockstep (:mod:`nlm.correct.lockstep`): one forward pass each, whose
activations all stand in memory. Where that is short they are recomputed from the input for each
point, which takes as many passes as there are points and the memory of one micro-batch.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from nlm import ops
from nlm._functions import is_place
from nlm._modules import evaluation, output_hooks, submodule, writes_new_memory
from nlm._multitask import network_of
from nlm._state_dict import count_not_finite
from nlm.correct.lockstep import copy_of, lockstep, pause, standing
from nlm.correct.matching import match
from nlm.statistics import Moments
from nlm.statistics.observe import check_moments, check_reached

Progress = Callable[[str, int, int], None]

Target = tuple[Tensor, Tensor]  # mean and variance, float64 [channels]
Fitted = dict[str, tuple[Tensor, Tensor]]  # point -> scale and shift, [channels]
Reaching = tuple[str, Moments, torch.dtype]  # a pass at a point, and the activations there


@dataclass
class Stream:
    """A model, how it is run on a batch, and micro-batches."""

    model: nn.Module
    call: Callable[[nn.Module, Any], Any]
    batches: list[Any]
    mask: Callable[[Any], Tensor | None] | None = None


class Reached(Exception):
    """Raised by a hook: ends a forward pass at the point that was waited for."""


def advance(call: Callable[[], Any]) -> None:
    """Runs a forward pass, which a hook may end at its point."""
    with suppress(Reached):
        call()


def check_count(caller: str, point: str, moments: Moments) -> None:
    """Raises ValueError where there are too few values for a variance."""
    if int(moments.count) < 2:
        raise ValueError(
            f"{caller}: a variance needs at least two values per channel, got "
            f"{int(moments.count)} at {point!r}"
        )


def corrector(
    network: nn.Module, point: str, dim: int
) -> Callable[[Tensor, Tensor, Tensor, int | Tensor | None], Tensor]:
    """``(output, scale, shift, rows) -> corrected output`` of a point, in place where it may be.

    It may where a module has just written its output to new memory and no gradient is wanted.
    """
    fresh = not is_place(point) and writes_new_memory(submodule(network, point))

    def correct(output: Tensor, scale: Tensor, shift: Tensor, rows: int | Tensor | None) -> Tensor:
        differentiated = torch.is_grad_enabled() or forward_ad._current_level >= 0
        within = fresh and not differentiated and output.is_contiguous()
        return ops.scale_shift(output, scale, shift, rows, dim, out=output if within else None)

    return correct


def fit_sequential(
    network: nn.Module,
    streams: list[Stream],
    points: Mapping[str, int],
    targets: Mapping[str, Target],
    caller: str,
    progress: Progress | None = None,
    recompute: bool = False,
) -> Fitted:
    """Scale and shift for every point, each fitted with the earlier ones in place.

    ``progress`` is called with (point, points done, points); what it raises cancels.
    """
    fitted: Fitted = {}
    batches = [(stream, batch) for stream in streams for batch in stream.batches]

    def settle(found: list[Reaching]) -> None:
        (point, pooled, dtype), *others = found
        for _, moments, _ in others:
            pooled = pooled + moments
        fitted[point] = _fit(point, pooled, targets, dtype, caller)
        if progress is not None:
            progress(point, len(fitted), len(points))

    def settle_alone(found: Reaching) -> None:
        settle([found])

    with evaluation(network):
        if len(batches) == 1:
            [(stream, batch)] = batches
            _walk(stream, batch, points, fitted, settle_alone, caller)
        elif recompute:
            for point in points:
                found: list[Reaching] = []
                for stream, batch in batches:
                    seen = partial(_stop, found)
                    passing = {each: points[each] for each in (*fitted, point)}
                    advance(partial(_walk, stream, batch, passing, fitted, seen, caller))
                if found:
                    settle(found)
        else:
            _advance_together(batches, points, fitted, settle, caller)
    check_reached(caller, points, fitted)
    return fitted


def fit_at_once(
    network: nn.Module,
    streams: list[Stream],
    points: Mapping[str, int],
    targets: Mapping[str, Target],
    caller: str,
) -> Fitted:
    """Scale and shift for every point from the uncorrected model's statistics: a control."""
    pooled: dict[str, Moments] = {}
    dtypes: dict[str, torch.dtype] = {}

    def collect(point: str, output: Tensor, moments: Moments | None) -> None:
        assert moments is not None  # none is known before
        pooled[point] = pooled[point] + moments if point in pooled else moments
        dtypes[point] = output.dtype

    with evaluation(network):
        for stream in streams:
            for batch in stream.batches:
                with _measuring(network, points, caller, stream, batch, collect):
                    stream.call(stream.model, batch)
    check_reached(caller, points, pooled)
    return {point: _fit(point, pooled[point], targets, dtypes[point], caller) for point in points}


def _advance_together(
    batches: list[tuple[Stream, Any]],
    points: Mapping[str, int],
    fitted: Fitted,
    settle: Callable[[list[Reaching]], None],
    caller: str,
) -> None:
    """Walks all micro-batches of one model to the first point not fitted, and from there on."""
    order = list(points)
    model = standing(batches[0][0].model)

    def call(stream: Stream, batch: Any) -> None:
        own = Stream(copy_of(model), stream.call, [], stream.mask)
        _walk(own, batch, points, fitted, pause, caller)

    with lockstep([partial(call, stream, batch) for stream, batch in batches]) as passes:
        waiting = [(each, each.advance()) for each in passes]
        while waiting := [(each, found) for each, found in waiting if found is not None]:
            point = min((found[0] for _, found in waiting), key=order.index)
            settle([found for _, found in waiting if found[0] == point])
            waiting = [
                (each, each.advance() if found[0] == point else found) for each, found in waiting
            ]


def _walk(
    stream: Stream,
    batch: Any,
    points: Mapping[str, int],
    fitted: Fitted,
    visit: Callable[[Reaching], Any],
    caller: str,
) -> None:
    """Runs a model on a batch, corrected at each point once ``visit`` has had it fitted."""
    network = network_of(stream.model)
    correctors = {point: corrector(network, point, dim) for point, dim in points.items()}

    def use(point: str, output: Tensor, moments: Moments | None) -> Tensor:
        if moments is not None:
            visit((point, moments, output.dtype))
        return correctors[point](output, *fitted[point], None)

    with _measuring(network, points, caller, stream, batch, use, fitted):
        stream.call(stream.model, batch)


def _stop(found: list[Reaching], at: Reaching) -> None:
    found.append(at)
    raise Reached


@contextmanager
def _measuring(
    network: nn.Module,
    points: Mapping[str, int],
    caller: str,
    stream: Stream,
    batch: Any,
    use: Callable[[str, Tensor, Moments | None], Tensor | None],
    known: Fitted | None = None,
) -> Iterator[None]:
    """Hands each point's output and moments to ``use``; what it returns replaces the output.

    The moments of ``known`` points are not taken.
    """
    mask = None if stream.mask is None else stream.mask(batch)

    def hook(point: str, dim: int) -> Callable[[Tensor], Tensor | None]:
        def measure(output: Tensor) -> Tensor | None:
            if known is not None and point in known:
                return use(point, output, None)
            moments = Moments.of(output, dim, mask)
            check_moments(caller, point, moments, output, dim, mask)
            return use(point, output, moments)

        return measure

    with output_hooks(network, {point: hook(point, dim) for point, dim in points.items()}):
        yield


def _fit(
    point: str,
    moments: Moments,
    targets: Mapping[str, Target],
    dtype: torch.dtype,
    caller: str,
) -> tuple[Tensor, Tensor]:
    check_count(caller, point, moments)
    mean, variance = targets[point]
    if mean.shape != moments.mean.shape:
        raise ValueError(
            f"{caller}: the experts have the merged model's channels, got {len(mean)} and "
            f"{len(moments.mean)} at {point!r}"
        )
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    scale, shift = (part.to(parameters) for part in match(moments, mean, variance, dtype))
    if bad := count_not_finite(torch.stack([scale, shift])):
        raise ValueError(
            f"{caller}: a correction is finite in {parameters}, got {bad} NaN or inf in the scales "
            f"and shifts of {point!r}, whose variances lie too far from their targets"
        )
    return scale, shift
