"""Borrowing a user's model: it comes back in the mode and with the hooks that it had."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

OutputHook = Callable[[Tensor], Tensor | None]

#: Every batch norm, SyncBatchNorm among them.
NORMS = (nn.modules.batchnorm._BatchNorm,)

_CHANNELS_SECOND = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._LPPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
_CHANNELS_LAST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)

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
    """
    with ExitStack() as stack:
        for name, hook in hooks.items():
            module = submodule(model, name)
            handle = module.register_forward_hook(_only_output(name, hook), prepend=True)
            stack.callback(handle.remove)
        yield


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


def channel_dim(name: str, module: nn.Module) -> int:
    """The dimension of a module's output on which its units stand, of kinds that fix it.

    Raises
    ------
    ValueError
        A module of another kind: an activation function's depends on what it is given.
    """
    if isinstance(module, _CHANNELS_SECOND):
        return 1
    if isinstance(module, _CHANNELS_LAST):
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


def _only_output(name: str, hook: OutputHook) -> Callable[..., Any]:
    def forward_hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"nlm: a point is a module that returns one tensor, got {type(output).__name__} "
                f"from {name!r}"
            )
        return hook(output)

    return forward_hook
