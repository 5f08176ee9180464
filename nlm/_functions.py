"""The functions that a network's modules call, such as ``x + y`` and ``F.relu(x)``, as places.

A place is named ``"module:function"``: ``"layer1.0:add"`` is the first addition in the forward of
``layer1.0`` itself, ``"layer1.0:add.1"`` the second, ``":relu"`` the network's own. What modules
without weights and submodules call, such as that of :class:`torch.nn.ReLU`, counts as called by the
module around them, so that one such module may serve many places.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ResultHook = Callable[[Tensor], Tensor | None]

ACTIVATIONS = frozenset(
    "relu relu6 gelu silu elu selu celu leaky_relu prelu rrelu mish hardswish hardsigmoid hardtanh "
    "softplus softsign tanh sigmoid logsigmoid tanhshrink softshrink hardshrink".split()
)


def _named() -> dict[Any, str]:
    """function -> its name, of those that have places: in every form in which PyTorch offers it."""
    forms = {name: name for name in ACTIVATIONS | {"add"}} | {"__iadd__": "add", "__radd__": "add"}
    forms |= {f"{name}_": name for name in [*forms]}
    homes = (torch, torch.nn.functional, torch._C._nn, Tensor)
    found = {getattr(home, form, None): name for form, name in forms.items() for home in homes}
    return {function: name for function, name in found.items() if function is not None}


_NAMES = _named()


def is_transparent(module: nn.Module) -> bool:
    """Whether what a module calls counts as called by the module around it."""
    return not (module._modules or module._parameters or module._buffers)


class FunctionCalls(TorchFunctionMode):
    """Sees the function calls of one forward pass of a network, in the thread that entered it.

    :meth:`watch` first hooks the modules, to tell whose call it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._running: list[tuple[str, dict[str, int]]] = []
        self._aside = False

    def called(
        self, owner: str, function: Any, args: Any, kwargs: dict[str, Any], result: Any
    ) -> Any:
        """What a call returns instead of its result. ``owner`` is the module that calls."""
        raise NotImplementedError

    def place(self, owner: str, function: Any, result: Any) -> str | None:
        """The place of the current call, of a function that has places."""
        name = _NAMES.get(function)
        if name is None or not isinstance(result, Tensor):
            return None
        counts = self._running[-1][1]
        number = counts.get(name, 0)
        counts[name] = number + 1
        return f"{owner}:{name}.{number}" if number else f"{owner}:{name}"

    def watch(self, network: nn.Module) -> list[Any]:
        """Hooks the modules of a network; the handles of the hooks."""
        handles: list[Any] = []
        for name, module in network.named_modules():
            if not is_transparent(module):
                handles.append(module.register_forward_pre_hook(partial(self._entering, name)))
                handles.append(module.register_forward_hook(self._leaving))
        return handles

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is called in the block is no call of the network's."""
        before, self._aside = self._aside, True
        try:
            yield
        finally:
            self._aside = before

    def _entering(self, name: str, module: nn.Module, args: Any) -> None:
        if not name:  # a pass that failed has left its modules here
            self._running.clear()
        self._running.append((name, {}))

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._aside or not self._running:
            return result
        return self.called(self._running[-1][0], func, args, kwargs, result)


class FunctionHooks(FunctionCalls):
    """Calls the hooks of a place with its result, which what they return replaces, in place or not.

    The latest come first.
    """

    def __init__(self) -> None:
        super().__init__()
        self._hooks: dict[str, list[ResultHook]] = {}

    def add(self, hooks: Mapping[str, ResultHook]) -> Callable[[], None]:
        """Adds hooks; the result takes them away again."""
        for place, hook in hooks.items():
            self._hooks.setdefault(place, []).insert(0, hook)

        def remove() -> None:
            for place, hook in hooks.items():
                self._hooks[place].remove(hook)

        return remove

    def called(
        self, owner: str, function: Any, args: Any, kwargs: dict[str, Any], result: Any
    ) -> Any:
        place = self.place(owner, function, result)
        for hook in self._hooks.get(place, ()) if place is not None else ():
            within = bool(args) and result is args[0]
            new = hook(result.clone() if within and torch.is_grad_enabled() else result)
            if new is not None and new is not result:
                result = result.copy_(new) if within else new
        return result


def is_place(name: str) -> bool:
    """Whether a name is that of a function call, not of a module."""
    return ":" in name


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results, and in the lists among them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_of(each)
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))


def version_of(value: Any) -> int:
    """How often a tensor was written to; inference tensors do not count."""
    counted = isinstance(value, Tensor) and not value.is_inference()
    return value._version if counted else 0
