"""Borrowing a user's model: it comes back in the mode and with the hooks that it had."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nlm._functions import FunctionHooks, is_place

OutputHook = Callable[[Tensor], Tensor | None]

#: Every batch norm, SyncBatchNorm among them.
NORMS = (nn.modules.batchnorm._BatchNorm,)

_CHANNELS_SECOND = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._LPPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
_CHANNELS_LAST = (
    nn.Linear, nn.Bilinear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention,
)  # fmt: skip
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
_OUT_OF_PLACE = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm,
)  # fmt: skip


class _Entered(threading.local):
    """network -> what sees its functions, in this thread."""

    def __init__(self) -> None:
        self.calls: WeakKeyDictionary[nn.Module, FunctionHooks] = WeakKeyDictionary()


_entered = _Entered()
_locks: WeakKeyDictionary[nn.Module, AbstractContextManager[bool]] = WeakKeyDictionary()
_making_a_lock = threading.Lock()


def lock_of(network: nn.Module) -> AbstractContextManager[bool]:
    """The lock of a network that is hooked while it runs: one per network, for as long as it lives.

    The thread that holds it may take it again. It is kept beside the module, not on it, so that
    copies and pickles of the module are none the wiser.
    """
    with _making_a_lock:
        return _locks.setdefault(network, threading.RLock())


@contextmanager
def evaluation(*models: nn.Module) -> Iterator[None]:
    """Models in evaluation mode and without gradients, for the length of the block."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def output_hooks(model: nn.Module, hooks: Mapping[str, OutputHook]) -> Iterator[None]:
    """Calls ``hooks[name](output)`` for the named modules; what it returns replaces the output.

    They run before the hooks that are there already, a user's among them, which see the new output:
    what is measured is what the module itself computes, where a correction stands at run time too.
    A name may also be that of a function call, see :mod:`nlm._functions`. An encoder of PyTorch's
    runs its layers one by one, and not as one operation on nested tensors.
    """
    entered = _entered.calls.get(model)
    calls, remove = install_hooks(model, hooks, entered)
    nested = stop_nesting(model)
    try:
        if calls is None or calls is entered:
            yield
        else:
            with calls:
                _entered.calls[model] = calls
                yield
    finally:
        if calls is not entered:
            _entered.calls.pop(model, None)
        remove()
        for encoder in nested:
            encoder.use_nested_tensor = True


def stop_nesting(model: nn.Module) -> list[Any]:
    """Has every encoder of PyTorch's run its layers one by one; those that would not have."""
    nested: list[Any] = [
        each for each in model.modules() if getattr(each, "use_nested_tensor", False) is True
    ]
    for encoder in nested:
        encoder.use_nested_tensor = False
    return nested


def install_hooks(
    model: nn.Module, hooks: Mapping[str, OutputHook], calls: FunctionHooks | None = None
) -> tuple[FunctionHooks | None, Callable[[], None]]:
    """Hooks that stay until they are removed by what is returned last.

    ``calls`` sees the functions that the model calls; where none is given and there are hooks on
    functions, it is made. It is returned, and entered for a call.
    """
    modules = {name: submodule(model, name.partition(":")[0]) for name in hooks}
    places = {name: hook for name, hook in hooks.items() if is_place(name)}
    with ExitStack() as stack:
        if places and calls is None:
            calls = FunctionHooks()
            for handle in calls.watch(model):
                stack.callback(handle.remove)
        if calls is not None:
            stack.callback(calls.add(places))
        for name, hook in hooks.items():
            if not is_place(name):
                at_output = partial(_at_output, name, hook, calls)
                handle = modules[name].register_forward_hook(at_output, prepend=True)
                stack.callback(handle.remove)
        return calls, stack.pop_all().close


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of that name.

    Raises
    ------
    ValueError
        There is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"nlm: a point is the name of a module of the model, got {name!r}"
        ) from None


def is_transformers_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D: a linear layer whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear or convolution layer, or an attention that ends with one."""
    return isinstance(module, _LAYERS) or is_transformers_conv1d(module)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: PyTorch's kinds, and others that are called so.

    What computes a layer's weight, as weight norm does, is called so and is none.
    """
    of_weights = type(module).__module__.startswith("torch.nn.utils.")
    called_so = type(module).__name__.endswith("Norm") and not module._modules and not of_weights
    return called_so or isinstance(
        module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    )


def writes_new_memory(module: nn.Module) -> bool:
    """Whether a module's output is memory that nothing else reads: it may be written to."""
    usual = any(type(module).forward is kind.forward for kind in _OUT_OF_PLACE)
    return (usual and not module.training) or is_transformers_conv1d(module)


def channel_dim(name: str, module: nn.Module) -> int:
    """The dimension of a module's output on which its units stand, of kinds that fix it.

    Raises
    ------
    ValueError
        A module of another kind: an activation function's depends on what it is given.
    """
    if isinstance(module, _CHANNELS_SECOND):
        return 1
    if isinstance(module, _CHANNELS_LAST) or is_transformers_conv1d(module):
        return -1
    raise ValueError(
        f"nlm: the channel dimension is known for linear, convolution, normalisation, pooling and "
        f"embedding modules; any other point is given with it, as in {{{name!r}: 1}}, got "
        f"{type(module).__name__} at {name!r}"
    )


def channel_count(module: nn.Module) -> int | None:
    """The number of channels of a module's output, where the module says it."""
    for attribute in ("out_features", "out_channels", "num_features", "num_channels"):
        if isinstance(count := getattr(module, attribute, None), int):
            return count
    return None


def _at_output(
    name: str,
    hook: OutputHook,
    calls: FunctionHooks | None,
    module: nn.Module,
    args: Any,
    output: Any,
) -> Any:
    """The hook on a module's tensor, or on the first of a tuple of which it is the first."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor):
        raise ValueError(
            f"nlm: a point is a module that returns a tensor, or a tuple that begins with one, "
            f"got {type(output).__name__} from {name!r}"
        )
    with nullcontext() if calls is None else calls.aside():
        new = hook(first)
    return new if first is output or new is None else (new, *output[1:])
