"""Correction points: the modules whose outputs are corrected, in the order in which they run."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nlm._modules import channel_dim, evaluation, submodule
from nlm._state_dict import matches

_LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def default_points(
    network: nn.Module, call: Callable[[], Any], apart: Iterable[str] = ()
) -> dict[str, int]:
    """The points before the activation function of each convolution and linear module.

    A batch norm that directly follows takes the place of its layer. The layers that compute the
    network's output, and those whose names match ``apart`` (heads), are left alone.

    Parameters
    ----------
    network : the module whose submodules are the points.
    call : runs it once on some data.

    Returns
    -------
    dict
        module name -> channel dimension of its output, in the order of execution.
    """
    apart = tuple(apart)
    calls, outputs = _record(network, call, _LAYERS + _NORMS)
    final = {id(leaf) for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)}
    norm_of = {
        id(source): name
        for name, source, _ in calls
        if isinstance(submodule(network, name), _NORMS)
    }
    points: dict[str, int] = {}
    for name, _, output in calls:
        if isinstance(submodule(network, name), _NORMS) or matches(name, apart):
            continue
        point = norm_of.get(id(output), name)
        if id(output) not in final and point not in points:
            points[point] = channel_dim(submodule(network, point))
    return points


def ordered_points(
    network: nn.Module, call: Callable[[], Any], names: Iterable[str]
) -> dict[str, int]:
    """The given points in the order in which they run, with their channel dimensions.

    Raises
    ------
    ValueError
        A name is no module, or its module does not run exactly once.
    """
    names = tuple(names)
    kinds = {id(submodule(network, name)) for name in names}
    calls, _ = _record(network, call, (nn.Module,), kinds)
    ran = [name for name, _, _ in calls if name in names]
    for name in names:
        if ran.count(name) != 1:
            raise ValueError(
                f"nlm.correct: a point's module runs once in a forward pass, got "
                f"{ran.count(name)} runs of {name!r}"
            )
    return {name: channel_dim(submodule(network, name)) for name in ran}


def _record(
    network: nn.Module,
    call: Callable[[], Any],
    kinds: tuple[type[nn.Module], ...],
    only: set[int] | None = None,
) -> tuple[list[tuple[str, Any, Any]], Any]:
    """(name, first input, output) of every run of the modules of some kinds; and the outputs.

    The tensors are kept alive, so that their ids stay theirs.
    """
    calls: list[tuple[str, Any, Any]] = []
    handles = []

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            calls.append((name, args[0] if args else None, output))

        return record

    try:
        for name, module in network.named_modules():
            if isinstance(module, kinds) and (only is None or id(module) in only):
                handles.append(module.register_forward_hook(recorder(name)))
        with evaluation(network), torch.no_grad():
            outputs = call()
    finally:
        for handle in handles:
            handle.remove()
    return calls, outputs
