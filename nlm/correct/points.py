"""Correction points: the modules whose outputs are corrected, in the order in which they run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nlm._modules import NORMS, channel_dim, evaluation, submodule
from nlm._state_dict import as_patterns, matches

_LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


@dataclass(eq=False)
class _Run:
    """One run of a module: the tensors are kept alive, so that their ids stay theirs.

    A tensor that is written to in place keeps its id: with it goes its number of writes, as they
    were before and after the run.
    """

    name: str
    tensors: tuple[Any, Any]
    read: tuple[int, int]
    written: tuple[int, int]


def default_points(
    network: nn.Module, call: Callable[[], Any], apart: Iterable[str] = ()
) -> dict[str, int]:
    """The points before the activation function of each convolution and linear module.

    A batch norm that directly follows takes the place of its layer. Left alone are heads: the
    layers that compute the network's output, the last layer that runs (unless a norm follows it)
    and those whose names match ``apart``; and layers that run several times in a forward pass, for
    which one correction cannot be right.

    Parameters
    ----------
    network : the module whose submodules are the points.
    call : runs it once on some data.

    Returns
    -------
    dict
        module name -> channel dimension of its output, in the order of execution.
    """
    apart = as_patterns(apart)
    runs, outputs = _record(network, call, _LAYERS + NORMS)
    names = [run.name for run in runs]
    norms = [run for run in runs if isinstance(submodule(network, run.name), NORMS)]
    layers = [run for run in runs if run not in norms]
    norm_of = {run.read: run.name for run in norms if names.count(run.name) == 1}
    heads = {_state(leaf) for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)}
    if layers and layers[-1].written not in {run.read for run in norms}:
        heads.add(layers[-1].written)
    points: dict[str, int] = {}
    for run in layers:
        if run.written in heads or names.count(run.name) != 1 or matches(run.name, apart):
            continue
        point = norm_of.get(run.written, run.name)
        points[point] = channel_dim(point, submodule(network, point))
    return points


def points_in_order(
    network: nn.Module,
    call: Callable[[], Any],
    points: Sequence[str] | Mapping[str, int],
) -> dict[str, int]:
    """The given points in the order in which they run; a mapping names their channel dimensions.

    Raises
    ------
    ValueError
        A name is no module, or its module does not run exactly once, or is of a kind whose channel
        dimension is not known.
    """
    modules = {name: submodule(network, name) for name in points}
    runs, _ = _record(network, call, (nn.Module,), {id(module) for module in modules.values()})
    ran = [run.name for run in runs if run.name in modules]
    for name in modules:
        if ran.count(name) != 1:
            raise ValueError(
                f"nlm.correct: a point's module runs once in a forward pass, got "
                f"{ran.count(name)} runs of {name!r}"
            )
    if isinstance(points, Mapping):
        return {name: points[name] for name in ran}
    return {name: channel_dim(name, modules[name]) for name in ran}


def _record(
    network: nn.Module,
    call: Callable[[], Any],
    kinds: tuple[type[nn.Module], ...],
    only: set[int] | None = None,
) -> tuple[list[_Run], Any]:
    """Every run of the modules of some kinds, and the outputs."""
    runs: list[_Run] = []
    handles = []
    reads: dict[str, tuple[int, int]] = {}

    def before(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any) -> None:
            reads[name] = _state(args[0] if args else None)

        return record

    def after(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            tensors = (args[0] if args else None, output)
            runs.append(_Run(name, tensors, reads[name], _state(output)))

        return record

    try:
        for name, module in network.named_modules():
            if isinstance(module, kinds) and (only is None or id(module) in only):
                handles.append(module.register_forward_pre_hook(before(name)))
                handles.append(module.register_forward_hook(after(name)))
        with evaluation(network), torch.no_grad():
            outputs = call()
    finally:
        for handle in handles:
            handle.remove()
    return runs, outputs


def _state(value: Any) -> tuple[int, int]:
    """A tensor and the number of times that it was written to; inference tensors do not count."""
    counted = isinstance(value, Tensor) and not value.is_inference()
    return id(value), value._version if counted else 0
