"""Fitting corrections in forward order, on pooled moments.

At each point all micro-batches of all streams are advanced to it with the earlier corrections in
place, their moments are pooled (Chan), the point's correction is fixed, and all go on. So a later
point sees repaired inputs, and the result does not depend on how the samples are cut into batches.
Statistics taken at all points at once from the uncorrected model are worse than no correction in
places; they are here as a control.

What is measured at a point, and how a correction comes of it, a :class:`Rule` says. Over the
processes of a group what each of them has measured is added before it is used.

Several micro-batches go in lockstep (:mod:`nlm.correct.lockstep`): one forward pass each, whose
activations all stand in memory. Where that is short they are recomputed from the input for each
point, which takes as many passes as there are points and the memory of one micro-batch.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from nlm import ops
from nlm._functions import is_place
from nlm._modules import OutputHook, evaluation, output_hooks, submodule, writes_new_memory
from nlm._multitask import network_of
from nlm._state_dict import count_not_finite
from nlm.correct.lockstep import copy_of, lockstep, pause, standing
from nlm.correct.matching import check_size
from nlm.statistics import Moments
from nlm.statistics.observe import check_moments, check_reached

Progress = Callable[[str, int, int], None]

Fitted = dict[str, tuple[Tensor, Tensor]]  # point -> scale and shift, [channels]
Reaching = tuple[str, Any, torch.dtype]  # a pass at a point: what was measured, of what dtype


@dataclass
class Stream:
    """A model, how it is run on a batch, and micro-batches.

    Attributes
    ----------
    beside : another network and how it is run, for rules that ask for its outputs.
    """

    model: nn.Module
    call: Callable[[nn.Module, Any], Any]
    batches: list[Any]
    mask: Callable[[Any], Tensor | None] | None = None
    beside: tuple[nn.Module, Callable[[nn.Module, Any], Any]] | None = None


class Measured(Protocol):
    """What is kept of batches at a point; it adds up."""

    @property
    def merged(self) -> Moments:
        """The moments of the merged model's activations."""

    def __add__(self, other: Any) -> Any: ...

    def all_reduce(self, process_group: Any = None) -> Any: ...


class Rule(Protocol):
    """How a point's correction comes of what batches give there."""

    def measure(
        self, output: Tensor, dim: int, mask: Tensor | None, beside: Callable[[], Tensor]
    ) -> Any:
        """What is kept of a batch; ``beside`` gives the output of the network beside the model."""

    def solve(
        self, caller: str, point: str, measured: Any, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Scale and shift, float64 [channels]; ``dtype`` is that of the activations."""


@dataclass(frozen=True)
class Fit:
    """What is fitted where, by which rule, and over which processes' samples.

    Attributes
    ----------
    points : point -> channel dimension.
    group : of torch.distributed: all of its processes come to the same points in one order.
    """

    caller: str
    network: nn.Module
    points: Mapping[str, int]
    rule: Rule
    group: Any = None

    def solve(self, point: str, measured: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scale and shift from what this process has measured, in the dtype of their tables."""
        if self.group is not None:
            measured = measured.all_reduce(self.group)
        check_count(self.caller, point, measured.merged)
        parameters = torch.float64 if dtype == torch.float64 else torch.float32
        found = self.rule.solve(self.caller, point, measured, dtype)
        scale, shift = (part.to(parameters) for part in found)
        if bad := count_not_finite(torch.stack([scale, shift])):
            raise ValueError(
                f"{self.caller}: a correction is finite in {parameters}, got {bad} NaN or inf in "
                f"the scales and shifts of {point!r}, whose variances lie too far from their "
                f"targets"
            )
        return scale, shift


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
    fit: Fit,
    streams: Sequence[Stream],
    progress: Progress | None = None,
    recompute: bool = False,
) -> Fitted:
    """Scale and shift for every point, each fitted with the earlier ones in place.

    ``progress`` is called with (point, points done, points); what it raises cancels.
    """
    fitted: Fitted = {}

    def settle(found: list[Reaching]) -> None:
        (point, pooled, dtype), *others = found
        for _, measured, _ in others:
            pooled = pooled + measured
        fitted[point] = fit.solve(point, pooled, dtype)
        if progress is not None:
            progress(point, len(fitted), len(fit.points))

    def settle_alone(found: Reaching) -> None:
        settle([found])

    with ExitStack() as stack:
        stack.enter_context(evaluation(fit.network))
        walks = _walks(fit, streams, None if recompute else stack)
        if len(walks) == 1:
            walks[0].run(fit.points, fitted, settle_alone)
        elif recompute:
            for point in fit.points:
                found: list[Reaching] = []
                for walk in walks:
                    passing = {each: fit.points[each] for each in (*fitted, point)}
                    advance(partial(walk.run, passing, fitted, partial(_stop, found)))
                if found:
                    settle(found)
        else:
            _advance_together(fit, walks, fitted, settle)
    check_reached(fit.caller, fit.points, fitted)
    return fitted


def fit_at_once(fit: Fit, streams: Sequence[Stream]) -> Fitted:
    """Scale and shift for every point from the uncorrected model's statistics: a control."""
    pooled: dict[str, Any] = {}
    dtypes: dict[str, torch.dtype] = {}

    def collect(point: str, output: Tensor, measured: Any) -> None:
        pooled[point] = pooled[point] + measured if point in pooled else measured
        dtypes[point] = output.dtype

    with ExitStack() as stack:
        stack.enter_context(evaluation(fit.network))
        for walk in _walks(fit, streams, stack):
            with walk.measuring(walk.stream.model, fit.points, collect):
                walk.stream.call(walk.stream.model, walk.batch)
    check_reached(fit.caller, fit.points, pooled)
    return {point: fit.solve(point, pooled[point], dtypes[point]) for point in fit.points}


def _walks(fit: Fit, streams: Sequence[Stream], stack: ExitStack | None) -> list["_Walk"]:
    return [_Walk(fit, stream, batch, stack) for stream in streams for batch in stream.batches]


def _advance_together(
    fit: Fit,
    walks: Sequence["_Walk"],
    fitted: Fitted,
    settle: Callable[[list[Reaching]], None],
) -> None:
    """Walks all micro-batches of one model to the first point not fitted, and from there on."""
    order = list(fit.points)
    model = standing(walks[0].stream.model)

    def call(walk: "_Walk") -> None:
        walk.run(fit.points, fitted, pause, copy_of(model))

    with lockstep([partial(call, walk) for walk in walks]) as passes:
        waiting = [(each, each.advance()) for each in passes]
        while waiting := [(each, found) for each, found in waiting if found is not None]:
            point = min((found[0] for _, found in waiting), key=order.index)
            settle([found for _, found in waiting if found[0] == point])
            waiting = [
                (each, each.advance() if found[0] == point else found) for each, found in waiting
            ]


class _Walk:
    """A stream's model on one of its batches, from point to point.

    With a stack the network beside it goes along and ends with that, else it is run anew for each
    point.
    """

    def __init__(self, fit: Fit, stream: Stream, batch: Any, stack: ExitStack | None) -> None:
        self.fit, self.stream, self.batch = fit, stream, batch
        self._mask = None if stream.mask is None else stream.mask(batch)
        self._beside = None
        if stream.beside is not None:
            self._beside = _Beside(*stream.beside, batch, fit.points, stack)

    def run(
        self,
        points: Mapping[str, int],
        fitted: Fitted,
        visit: Callable[[Reaching], Any],
        model: nn.Module | None = None,
    ) -> None:
        """Runs the model, corrected at each point once ``visit`` has had it fitted."""
        model = self.stream.model if model is None else model
        network = network_of(model)
        correctors = {point: corrector(network, point, dim) for point, dim in points.items()}

        def use(point: str, output: Tensor, measured: Any) -> Tensor:
            if measured is not None:
                visit((point, measured, output.dtype))
            return correctors[point](output, *fitted[point], None)

        with self.measuring(model, points, use, fitted):
            self.stream.call(model, self.batch)

    @contextmanager
    def measuring(
        self,
        model: nn.Module,
        points: Mapping[str, int],
        use: Callable[[str, Tensor, Any], Tensor | None],
        known: Container[str] = (),
    ) -> Iterator[None]:
        """Hands each point's output and what is kept of it to ``use``, which may replace it.

        At ``known`` points nothing is measured.
        """

        def hook(point: str, dim: int) -> Callable[[Tensor], Tensor | None]:
            def measure(output: Tensor) -> Tensor | None:
                return use(point, output, None if point in known else self._measured(point, output))

            return measure

        hooks = {point: hook(point, dim) for point, dim in points.items()}
        with output_hooks(network_of(model), hooks):
            yield

    def _measured(self, point: str, output: Tensor) -> Any:
        def beside() -> Tensor:
            assert self._beside is not None  # rules that ask have streams with one
            other = self._beside.at(point, self.fit.caller)
            check_size(self.fit.caller, point, other.shape[dim], output.shape[dim])
            return other

        dim = self.fit.points[point]
        measured = self.fit.rule.measure(output, dim, self._mask, beside)
        check_moments(self.fit.caller, point, measured.merged, output, dim, self._mask)
        return measured


class _Beside:
    """Another network on a batch, at one point after the other."""

    def __init__(
        self,
        model: nn.Module,
        call: Callable[[nn.Module, Any], Any],
        batch: Any,
        points: Iterable[str],
        stack: ExitStack | None,
    ) -> None:
        self._model = model if stack is None else copy_of(model)
        self._call = partial(call, self._model, batch)
        self._kept: dict[str, Tensor] = {}
        self._pass = None
        if stack is not None:
            hooks = {point: partial(self._wait, point) for point in points}
            self._pass = stack.enter_context(lockstep([partial(self._run, hooks)]))[0]

    def at(self, point: str, caller: str) -> Tensor:
        """Its output there, which is read before the next one is asked for."""
        if self._pass is None:
            advance(partial(self._run, {point: partial(self._end, point)}))
        while self._pass is not None and point not in self._kept:
            if (found := self._pass.advance()) is None:
                break
            name, output = found
            self._kept[name] = output if name == point else output.clone()  # may be written into
        check_reached(caller, [point], self._kept)
        return self._kept.pop(point)

    def _wait(self, point: str, output: Tensor) -> None:
        pause((point, output))

    def _end(self, point: str, output: Tensor) -> None:
        self._kept[point] = output
        raise Reached

    def _run(self, hooks: Mapping[str, OutputHook]) -> None:
        with evaluation(self._model), output_hooks(self._model, hooks):
            self._call()


def _stop(found: list[Reaching], at: Reaching) -> None:
    found.append(at)
    raise Reached
