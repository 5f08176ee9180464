"""Correction points: where a network is corrected, in the order in which it runs.

A point is a module's output or the result of a function that a module calls, named as
:mod:`nlm._functions` says: ``"layer1.0:add"``. A function's result that a module returns is that
module's output, and its point has the module's name. Kinds of points are

"before_activation"
    the outputs of convolution and linear layers (transformers' Conv1D and
    :class:`torch.nn.MultiheadAttention`, whose last layer is no module that runs, among them); a
    batch norm that directly follows takes the place of its layer;
"after_activation"
    the results of activation functions, modules or not;
"residual"
    the sums of a stream and what further layers have made of it;
"norm"
    the outputs of batch, layer and other norms.

Left alone are heads (the layers that compute the network's output, the last layer that runs unless
a batch norm follows it, and modules whose names match ``apart``), and what runs several times in a
forward pass, for which one correction cannot be right.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any

from torch import nn

from nlm._functions import is_place
from nlm._modules import NORMS, channel_dim, submodule
from nlm._names import as_patterns, matches
from nlm.correct.recording import Event, Record, record

KINDS = {"after_activation": "activation", "residual": "add", "norm": "norm"}
BEFORE = "before_activation"
Points = str | Sequence[str] | Mapping[str, int] | None


@dataclass(frozen=True)
class Found:
    """Points in the order in which they run.

    Attributes
    ----------
    dims : point -> channel dimension.
    readers : point -> the layers that read it, and the places of other functions that do.
    lengths : point -> the length of dimension 0.
    """

    dims: dict[str, int]
    readers: dict[str, list[str]]
    lengths: dict[str, int]


def find_points(
    network: nn.Module, call: Callable[[], Any], points: Points = None, apart: Iterable[str] = ()
) -> Found:
    """The points of a kind, or those that are named.

    Parameters
    ----------
    network : the module whose submodules are named.
    call : runs it once on some data.
    points : a kind; a name, or a shell-like pattern of names, or several; name -> channel
        dimension. None stands for "before_activation".
    apart : patterns of the heads' names.

    Raises
    ------
    TypeError
        Points that are no names, or channel dimensions that are no integers.
    ValueError
        A name is no module, or its module does not run exactly once; nothing matches a pattern; a
        channel dimension is not known.
    """
    _check_form(points)
    found = record(network, call)
    if points is None or points == BEFORE:
        dims = _before_activation(found, as_patterns(apart))
    elif isinstance(points, str) and points in KINDS:
        dims = _of_kind(found, KINDS[points], as_patterns(apart))
    else:
        dims = _named(network, found, (points,) if isinstance(points, str) else points)
    runs = found.runs()
    ordered = {name: dims[name] for name in found.order if name in dims}
    values = {name: found.values[name] for name in ordered if name in found.values}
    return Found(
        ordered,
        {name: [_told(each, runs[each]) for each in v.readers] for name, v in values.items()},
        {name: value.shape[0] if value.shape else 1 for name, value in values.items()},
    )


def _check_form(points: Any) -> None:
    if points is None or isinstance(points, str):
        return
    named = isinstance(points, Collection) and all(isinstance(each, str) for each in points)
    if not named:
        raise TypeError(f"nlm.correct: points are a kind or names of modules, got {points!r}")
    dims = points.values() if isinstance(points, Mapping) else ()
    if strangers := [dim for dim in dims if not isinstance(dim, Integral)]:
        raise TypeError(f"nlm.correct: a channel dimension is an integer, got {strangers[0]!r}")


def _told(reader: str, runs: int) -> str:
    return reader if runs <= 1 else f"{reader}, which runs {runs} times"


def default_points(
    network: nn.Module, call: Callable[[], Any], apart: Iterable[str] = ()
) -> dict[str, int]:
    """The points before activations: name -> channel dimension; see :func:`find_points`.

    ``call`` runs ``network`` once; ``apart`` are patterns of the heads' names.
    """
    return find_points(network, call, None, apart).dims


def _before_activation(found: Record, apart: tuple[str, ...]) -> dict[str, int]:
    runs = found.runs()
    layers = [event for event in found.events if event.kind == "layer"]
    norms = [event for event in found.events if isinstance(event.module, NORMS)]
    norm_of = {id(event.read): event for event in norms if runs[event.names[0]] == 1}
    heads = [*found.outputs]
    if layers and layers[-1].value not in [norm.read for norm in norms]:
        heads.append(layers[-1].value)
    dims: dict[str, int] = {}
    for event in layers:
        name = event.names[0]
        if event.value in heads or runs[name] != 1 or matches(name, apart):
            continue
        point = norm_of.get(id(event.value), event)
        assert point.value.dim is not None  # layers and batch norms fix it
        dims[point.names[0]] = point.value.dim
    return dims


def _of_kind(found: Record, kind: str, apart: tuple[str, ...]) -> dict[str, int]:
    runs = found.runs()

    def name_of(event: Event) -> str:
        once = [name for name in (*event.names, event.place) if runs[name] == 1]
        return once[0] if once else ""

    dims: dict[str, int] = {}
    unknown = []
    for event in found.events:
        name = name_of(event)
        if event.kind != kind or not name or event.value in found.outputs or matches(name, apart):
            continue
        if event.value.dim is None:
            unknown.append(name)
        else:
            dims[name] = event.value.dim
    _check_known(unknown)
    return dims


def _named(
    network: nn.Module, found: Record, points: Sequence[str] | Mapping[str, int]
) -> dict[str, int]:
    runs = found.runs()
    chosen: dict[str, int | None] = {}
    for name in points:
        if any(sign in name for sign in "*?["):
            names = [
                each
                for each, count in runs.items()
                if count == 1 and each and fnmatchcase(each, name)
                if is_place(each) == is_place(name)
            ]
        else:
            submodule(network, name.partition(":")[0])
            names = [name]
        for each in names:
            chosen[each] = points[name] if isinstance(points, Mapping) else None
        if not names or runs[names[0]] != 1:
            raise ValueError(
                f"nlm.correct: a point's module runs once in a forward pass, got "
                f"{runs[name]} runs of {name!r}"
            )
    for name, dim in chosen.items():
        if dim is None and is_place(name):
            chosen[name] = found.values[name].dim
        elif dim is None:
            chosen[name] = _dim_of_module(network, found, name)
    _check_known([name for name, dim in chosen.items() if dim is None])
    return {name: dim for name, dim in chosen.items() if dim is not None}


def _dim_of_module(network: nn.Module, found: Record, name: str) -> int:
    """The channel dimension of a module that fixes it, or returns what a layer behind it tells."""
    try:
        return channel_dim(name, submodule(network, name))
    except ValueError:
        known = found.values[name].dim if name in found.values else None
        if known is None:
            raise
        return known


def _check_known(unknown: list[str]) -> None:
    if unknown:
        raise ValueError(
            f"nlm.correct: the channel dimension of a function's result is known where layers, "
            f"norms and transpositions alone stand before it; it is given with any other point, as "
            f"in {{{unknown[0]!r}: 1}}, got none for {', '.join(unknown)}"
        )
