"""Borrowing a user's model: it comes back in the mode and with the hooks that it had."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

OutputHook = Callable[[Tensor], Tensor | None]


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
def output_hooks(
    model: nn.Module, hooks: Mapping[str, OutputHook], first: bool = False
) -> Iterator[None]:
    """Calls ``hooks[name](output)`` for the named modules; what it returns replaces the output.

    With ``first`` they run before hooks that are there already, which then see the new output.
    """
    with ExitStack() as stack:
        for name, hook in hooks.items():
            module = submodule(model, name)
            handle = module.register_forward_hook(_only_output(name, hook), prepend=first)
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


def channel_dim(module: nn.Module) -> int:
    """The dimension of a module's output on which its units stand: 1 for images, else the last."""
    convolutional = (
        nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU,
        nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
    )  # fmt: skip
    return 1 if isinstance(module, convolutional) else -1


def _only_output(name: str, hook: OutputHook) -> Callable[..., Any]:
    def forward_hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"nlm: a point is a module that returns one tensor, got {type(output).__name__} "
                f"from {name!r}"
            )
        return hook(output)

    return forward_hook
