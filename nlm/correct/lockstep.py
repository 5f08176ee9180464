"""Forward passes side by side: each stops where a hook asks it to, and they go on together.

A pass runs in a thread of its own, and only while :meth:`Pass.advance` waits for it: one at a time,
as a generator between two yields. Memory is that of the activations that all stopped passes still
need. Each pass runs its own :func:`copy_of` the model, so that neither hooks nor what a module
keeps in its attributes meet; weights are shared, and a change of them in place is seen by all.
"""

import contextvars
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from nlm._multitask import MultiTaskModel, TaskStates

_own = threading.local()


class _Stopped(BaseException):
    """Ends a pass that nobody will advance again."""


class Pass:
    """A call that can be stopped from within by :func:`pause`."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._enter = _surroundings()
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._reply: Any = None
        self._value: Any = None
        self._error: BaseException | None = None
        self._stopped = self._done = False
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), daemon=True)

    def advance(self, reply: Any = None) -> Any:
        """Goes on to the next pause, whose value is returned; None at the end of the call.

        What the call raises is raised here. ``reply`` is what the pause where it stopped returns.
        """
        if self._thread.ident is None:
            self._thread.start()
        elif self._done:
            return None
        self._reply, self._value = reply, None
        self._turn.release()
        self._back.acquire()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._value

    def close(self) -> None:
        """Ends the call where it stands."""
        if self._thread.ident is not None:
            self._stopped = True
            self._turn.release()
            self._thread.join()

    def _run(self) -> None:
        _own.current = self
        try:
            self._wait()
            with self._enter():
                self._call()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        self._call, self._done = _nothing, True  # what the call holds is let go: a copy, a batch
        self._back.release()

    def _wait(self) -> None:
        self._turn.acquire()
        if self._stopped:
            raise _Stopped

    def _pause(self, value: Any) -> Any:
        self._value = value
        self._back.release()
        self._wait()
        return self._reply


def pause(value: Any) -> Any:
    """Stops the pass that it is called in, and returns what the pass is next advanced with."""
    return _own.current._pause(value)


@contextmanager
def lockstep(calls: Sequence[Callable[[], Any]]) -> Iterator[list[Pass]]:
    """Passes that have not begun; those that still stand somewhere at the end are ended there."""
    passes = [Pass(call) for call in calls]
    try:
        yield passes
    finally:
        for each in passes:
            each.close()


def copy_of(model: nn.Module) -> nn.Module:
    """A copy of the modules of a model, with its own hooks and attributes, that shares its tensors.

    A multi-task model's copy shares the merged weights.
    """
    shared: list[Any] = []
    for module in model.modules():
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        shared += [each for each in held if isinstance(each, Tensor)]
        if isinstance(module, MultiTaskModel):
            shared.append(module.states)
    return copy.deepcopy(model, {id(each): each for each in shared})


class _Kept:
    """The weights of a multi-task model, those of each task made once."""

    def __init__(self, states: TaskStates) -> None:
        self.tasks, self.tensors, self.replaced = states.tasks, states.tensors, states.replaced
        self.for_task = cache(states.for_task)


def standing(model: nn.Module) -> nn.Module:
    """A copy, as of :func:`copy_of`, of a model whose weights stand still while it is there.

    Copies of it share the weights that a multi-task model makes for a task.
    """
    own = copy_of(model)
    for module in own.modules():
        if isinstance(module, MultiTaskModel):
            module.states = _Kept(module.states)
    return own


def _nothing() -> None:
    pass


def _surroundings() -> Callable[[], ExitStack]:
    """Enters what a thread does not take over from the one that makes it.

    These are gradient and inference mode, autocast and the current stream.
    """
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    casts = [
        torch.autocast(device, torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def enter() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for cast in casts:
            stack.enter_context(cast)
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))
        return stack

    return enter
