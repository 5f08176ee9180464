"""What the passes of a walk find at its steps: what a merged network reads, what its experts have.

All passes go in lockstep (:mod:`nlm.correct.lockstep`): each runs once, stops where a step begins,
and goes on with the layers that were solved there. Where memory is short they run anew from the
input for each step, one after the other.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nlm._modules import OutputHook, output_hooks, submodule
from nlm._multitask import network_of
from nlm.correct.batch_norm import Statistics
from nlm.correct.lockstep import Pass, copy_of, lockstep, pause
from nlm.correct.sequential import Reached, advance
from nlm.correct.walk import Step, argument, is_addition
from nlm.statistics.observe import check_reached

Call = Callable[[nn.Module], Any]  # runs a model on one batch


@dataclass(frozen=True)
class Found:
    """A pass of the merged network at a step.

    Attributes
    ----------
    x : what the layers of the step read, or the batch norm that stands alone.
    held : what the stream holds that they write to, where they do.
    norm : the statistics of the step's batch norm, where it has one, and the moments of its inputs.
    """

    step: Step
    x: Tensor
    held: Tensor | None
    norm: Statistics | None


class MergedPass:
    """The merged model on one batch, at one step after the other.

    Parameters
    ----------
    model : it is left as it is: a copy that shares its tensors is run.
    call : runs a model on the batch.
    steps : all that will be asked for, in their order.
    stack : ends the pass where it goes in lockstep; None to run it anew for each step.
    """

    def __init__(
        self, model: nn.Module, call: Call, steps: Sequence[Step], stack: ExitStack | None
    ) -> None:
        model = copy_of(model)
        self.network = network_of(model)
        self._call = partial(call, model)
        self._pass = _entered(stack, partial(self._run, steps, pause))
        self._found: Found | None = None
        self._instead: Tensor | None = None

    def at(self, step: Step, caller: str) -> Found:
        """What is found at a step; all before it are over."""
        if self._pass is None:
            seen: list[Found] = []
            advance(partial(self._run, [step], partial(_stop, seen)))
            found = seen[0] if seen else None
        else:
            while self._found is None or self._found.step is not step:
                instead, self._instead = self._instead, None
                self._found = self._pass.advance(instead)
                if self._found is None:
                    break
            found = self._found
        if found is None:
            check_reached(caller, (step.layers or step.ends)[:1], ())
        assert found is not None  # else the check has raised
        return found

    @property
    def in_lockstep(self) -> bool:
        """Whether it waits at the step that was asked for last."""
        return self._pass is not None

    def read(self, x: Tensor) -> None:
        """The layers of the step that it waits at read something else."""
        self._instead = x

    def use(self, weights: Mapping[str, Tensor]) -> "MergedPass":
        """Entries of the network's state dict are other tensors, for this pass alone."""
        for name, tensor in weights.items():
            owner, _, entry = name.rpartition(".")
            parameter = nn.Parameter(tensor, requires_grad=False)
            submodule(self.network, owner)._parameters[entry] = parameter
        return self

    def _run(self, steps: Sequence[Step], visit: Callable[[Found], Tensor | None]) -> None:
        with _visiting(self.network, steps, visit):
            self._call()


class ExpertPass:
    """An expert on one batch, at the end of one step after the other; arguments as above."""

    def __init__(
        self, model: nn.Module, call: Call, steps: Sequence[Step], stack: ExitStack | None
    ) -> None:
        self._model = model if stack is None else copy_of(model)
        self._call = partial(call, self._model)
        self._pass = _entered(stack, partial(self._run, steps, lambda *end: pause(end)))
        self._kept: dict[str, Tensor] = {}

    def at(self, step: Step, caller: str) -> Tensor:
        """The outputs of a step's layers side by side, or of its norm, or the sum on the stream."""

        def lacking() -> bool:
            return any(end not in self._kept for end in step.ends)

        def keep(name: str, output: Tensor) -> None:
            self._kept[name] = output
            if lacking():
                self._kept[name] = output.clone()  # may be written into

        def stop(name: str, output: Tensor) -> None:
            keep(name, output)
            if not lacking():
                raise Reached

        if self._pass is None:
            advance(partial(self._run, [step], stop))
        else:
            while lacking() and (end := self._pass.advance()) is not None:
                keep(*end)
        check_reached(caller, step.ends, self._kept)
        outputs = [self._kept.pop(name) for name in step.ends]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def _run(self, steps: Sequence[Step], visit: Callable[[str, Tensor], None]) -> None:
        def meet(step: Step, written: Tensor, held: Tensor, add: Callable[[], Tensor]) -> Tensor:
            added = add()
            visit(step.ends[0], added)
            return added

        plain = [step for step in steps if step.layers and not step.writes]
        hooks = {name: partial(visit, name) for step in plain for name in step.ends}
        with _additions(self._model, steps, meet, hooks):
            self._call()


def _entered(stack: ExitStack | None, call: Callable[[], Any]) -> Pass | None:
    """A pass that has not begun, and ends with the stack."""
    return None if stack is None else stack.enter_context(lockstep([call]))[0]


def _stop(seen: list[Found], found: Found) -> None:
    seen.append(found)
    raise Reached


@contextmanager
def _visiting(
    network: nn.Module, steps: Sequence[Step], visit: Callable[[Found], Tensor | None]
) -> Iterator[None]:
    """Hands what is found at each step to ``visit``; what that returns is what its layers read.

    A step begins before its first layer runs. One that writes begins where what it gives is added
    to the stream, and gives it anew then.
    """
    read: dict[Step, Tensor] = {}
    begun: set[Step] = set()

    def begin(step: Step, x: Tensor, held: Tensor | None = None) -> None:
        norm = None
        if step.norm is not None:
            module = submodule(network, step.norm)
            norm = Statistics.of(step.norm, module, _through(network, step.layers, x))
        if (instead := visit(Found(step, x, held, norm))) is not None:
            x.copy_(instead)

    def reach(step: Step, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        x = argument(args, kwargs)
        if step.writes:
            read[step] = x.clone()  # may be written into
        elif step not in begun:
            begun.add(step)
            begin(step, x)

    def meet(step: Step, written: Tensor, held: Tensor, add: Callable[[], Tensor]) -> Tensor:
        x = read.pop(step)
        begin(step, x, held)
        written.copy_(_through(network, dict.fromkeys((*step.layers, *step.ends)), x))
        return add()

    with ExitStack() as stack:
        for step in steps:
            first = submodule(network, (step.layers or step.ends)[0])
            hook = first.register_forward_pre_hook(partial(reach, step), with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(_additions(network, steps, meet, {}))
        yield


def _through(network: nn.Module, names: Iterable[str], x: Tensor) -> Tensor:
    """What modules give that read one another."""
    for name in names:
        x = submodule(network, name).forward(x)
    return x


# --- additions ------------------------------------------------------------------------------------

Meet = Callable[[Step, Tensor, Tensor, Callable[[], Tensor]], Tensor]


@contextmanager
def _additions(
    network: nn.Module, steps: Sequence[Step], meet: Meet, hooks: Mapping[str, OutputHook]
) -> Iterator[None]:
    """Hooks on outputs; where a step writes, ``meet`` does the addition.

    It is given the step, what is added, to what, and the addition.
    """
    seen = _Additions(meet)
    writers = {step.ends[0]: partial(seen.awaits, step) for step in steps if step.writes}
    with output_hooks(network, {**hooks, **writers}), seen if writers else nullcontext():
        yield


class _Additions(TorchFunctionMode):
    """Gives the additions of tensors, once they are known, to a function."""

    def __init__(self, meet: Meet) -> None:
        super().__init__()
        self._meet = meet
        self._awaited: dict[int, tuple[Step, Tensor]] = {}

    def awaits(self, step: Step, output: Tensor) -> None:
        self._awaited[id(output)] = step, output

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        add = partial(function, *args, **(kwargs or {}))
        if self._awaited and is_addition(function, args, kwargs):
            for one, other in (args, args[::-1]):
                if id(one) in self._awaited:
                    step, _ = self._awaited.pop(id(one))
                    return self._meet(step, one, other, add)
        return add()
