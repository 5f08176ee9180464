"""Fitting corrections in forward order, on pooled moments.

At each point all micro-batches of all streams are advanced to it with the earlier corrections in
place, their moments are pooled (Chan), the point's correction is fixed, and all go on. So a later
point sees repaired inputs, and the result does not depend on how the samples are cut into batches.
Statistics taken at all points at once from the uncorrected model are worse than no correction in
places; they are here as a control.

One micro-batch is advanced by a single forward pass that is corrected as it goes. Several are
recomputed from the input for each point, so that memory stays that of one micro-batch.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nlm import ops
from nlm._modules import evaluation, output_hooks
from nlm._state_dict import count_not_finite
from nlm.correct.matching import match
from nlm.statistics import Moments
from nlm.statistics.observe import check_activation, check_reached

Progress = Callable[[str, int, int], None]

Target = tuple[Tensor, Tensor]  # mean and variance, float64 [channels]
Fitted = dict[str, tuple[Tensor, Tensor]]  # point -> scale and shift, [channels]


@dataclass
class Stream:
    """Micro-batches and how the model is run on them."""

    call: Callable[[Any], Any]
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


def fit_sequential(
    network: nn.Module,
    streams: list[Stream],
    points: Mapping[str, int],
    targets: Mapping[str, Target],
    caller: str,
    progress: Progress | None = None,
) -> Fitted:
    """Scale and shift for every point, each fitted with the earlier ones in place.

    ``progress`` is called with (point, points done, points); what it raises cancels.
    """
    fitted: Fitted = {}
    alone = sum(len(stream.batches) for stream in streams) == 1

    def keep(point: str, moments: Moments, dtype: torch.dtype) -> None:
        fitted[point] = _fit(point, moments, targets, dtype, caller)
        if progress is not None:
            progress(point, len(fitted), len(points))

    with evaluation(network):
        if alone:
            [stream] = [stream for stream in streams if stream.batches]

            def fit_here(point: str, output: Tensor, moments: Moments) -> Tensor:
                keep(point, moments, output.dtype)
                return ops.scale_shift(output, *fitted[point], None, points[point])

            with _measuring(network, points, caller, stream, stream.batches[0], fit_here):
                stream.call(stream.batches[0])
        else:
            for point in points:
                with _applying(network, points, fitted):
                    pooled, dtype = _pooled(network, point, points[point], streams, caller)
                keep(point, pooled, dtype)
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

    def collect(point: str, output: Tensor, moments: Moments) -> None:
        pooled[point] = pooled[point] + moments if point in pooled else moments
        dtypes[point] = output.dtype

    with evaluation(network):
        for stream in streams:
            for batch in stream.batches:
                with _measuring(network, points, caller, stream, batch, collect):
                    stream.call(batch)
    check_reached(caller, points, pooled)
    return {point: _fit(point, pooled[point], targets, dtypes[point], caller) for point in points}


def _pooled(
    network: nn.Module, point: str, dim: int, streams: list[Stream], caller: str
) -> tuple[Moments, torch.dtype]:
    """The moments at one point over all micro-batches; forward passes end there."""
    total: list[Moments] = []
    dtypes: list[torch.dtype] = []

    def collect(point: str, output: Tensor, moments: Moments) -> None:
        total[:] = [total[0] + moments] if total else [moments]
        dtypes[:] = [output.dtype]
        raise Reached

    for stream in streams:
        for batch in stream.batches:
            with _measuring(network, {point: dim}, caller, stream, batch, collect):
                advance(partial(stream.call, batch))
    if not total:
        check_reached(caller, [point], ())
    return total[0], dtypes[0]


@contextmanager
def _measuring(
    network: nn.Module,
    points: Mapping[str, int],
    caller: str,
    stream: Stream,
    batch: Any,
    use: Callable[[str, Tensor, Moments], Tensor | None],
) -> Iterator[None]:
    """Hands each point's output and moments to ``use``; what it returns replaces the output."""
    mask = None if stream.mask is None else stream.mask(batch)

    def hook(point: str, dim: int) -> Callable[[Tensor], Tensor | None]:
        def measure(output: Tensor) -> Tensor | None:
            moments = Moments.of(output, dim, mask)
            check_activation(caller, point, output, dim, mask)
            return use(point, output, moments)

        return measure

    with output_hooks(network, {point: hook(point, dim) for point, dim in points.items()}):
        yield


@contextmanager
def _applying(network: nn.Module, points: Mapping[str, int], fitted: Fitted) -> Iterator[None]:
    def hook(point: str) -> Callable[[Tensor], Tensor]:
        scale, shift = fitted[point]
        return lambda output: ops.scale_shift(output, scale, shift, None, points[point])

    with output_hooks(network, {point: hook(point) for point in fitted}):
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
