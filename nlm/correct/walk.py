"""A network layer by layer: what is refitted together, in which order, and towards what.

A step holds the layers that read one tensor (query, key and value, for example) and is fitted to
what the experts' layers compute there. Two cases are different:

- A batch norm that directly follows a layer is an affine map of it: its output is what is fitted.
- A layer *writes* where its output, or its norm's, goes straight into an addition, or through
  dropout only: into a residual stream, as a rule. It is fitted to the sum that the experts have
  there less what the merged network has on the stream, and so makes up for what is wrong before it.
  Of two layers whose outputs are added the later one does.

Additions are no modules: a :class:`TorchFunctionMode` sees them. What the passes of a walk find at
its steps, see :mod:`nlm.correct.passes`.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from nlm._modules import is_transformers_conv1d
from nlm._names import as_patterns, matches
from nlm.correct.batch_norm import is_kept
from nlm.symmetry.outputs import named_tensors

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}


@dataclass(frozen=True)
class Step:
    """What is fitted at once.

    Attributes
    ----------
    layers : modules that read one tensor; none where a batch norm stands alone.
    norm : the batch norm that directly follows the only layer, or stands alone.
    writes : whether the output of the only layer, or of its norm, goes straight into an addition.
    """

    layers: tuple[str, ...]
    norm: str | None = None
    writes: bool = False

    @property
    def ends(self) -> tuple[str, ...]:
        """The modules whose outputs are fitted."""
        return self.layers if self.norm is None else (self.norm,)


def weight_of(module: nn.Module, name: str = "weight") -> Tensor | None:
    """A tensor of a module's own, which a multi-task model keeps among the buffers."""
    return module._parameters.get(name, module._buffers.get(name))


def _own(module: nn.Module) -> list[Tensor]:
    """The weight and the bias of a module, where it has them."""
    return [t for t in (weight_of(module), weight_of(module, "bias")) if t is not None]


def argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a layer or a norm reads, by position or by keyword."""
    return args[0] if args else next(iter(kwargs.values()), None)


def is_layer(module: nn.Module) -> bool:
    """Whether a module computes W x + b, with taps or without, from a weight of its own."""
    usual = any(type(module).forward is kind.forward for kind in (nn.Linear, *CONVOLUTIONS))
    return (usual or is_transformers_conv1d(module)) and weight_of(module) is not None


# --- finding the steps ----------------------------------------------------------------------------


@dataclass(eq=False)
class _Run:
    """One run of a layer or a batch norm.

    The tensors are kept, so that their ids stay theirs; with an id goes the number of writes to it.

    Attributes
    ----------
    place : its number among all runs; of one that writes, behind the last before the addition.
    used : whether an operation has read its output.
    writes : whether the first that did was an addition that kept its shape.
    """

    name: str
    module: nn.Module
    place: float
    tensors: tuple[Tensor, Tensor]
    read: tuple[int, int]
    wrote: tuple[int, int]
    used: bool = False
    writes: bool = False


class _Record(TorchFunctionMode):
    """All runs of layers and batch norms in one forward pass, and the marks of its outputs."""

    def __init__(self, network: nn.Module, call: Callable[[], Any]) -> None:
        super().__init__()
        self.runs: list[_Run] = []
        self._of: dict[int, _Run] = {}
        self._later = count(2)  # of two additions without a run between them the second one is
        with ExitStack() as stack:
            for name, module in network.named_modules():
                if is_layer(module) or is_kept(module):
                    ran = partial(self._ran, name)
                    stack.callback(module.register_forward_hook(ran, with_kwargs=True).remove)
            with self:
                outputs = call()
        self.outputs = {_mark(tensor) for tensor in named_tensors(outputs).values()}

    def _ran(
        self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        x = argument(args, kwargs)
        if isinstance(x, Tensor) and isinstance(output, Tensor):
            tensors, place = (x, output), len(self.runs)
            run = _Run(name, module, place, tensors, _mark(tensors[0]), _mark(tensors[1]))
            self.runs.append(run)
            self._of[id(output)] = run

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        read = _tensors((args, kwargs))
        before = [_mark(tensor) for tensor in read]
        result = function(*args, **(kwargs or {}))
        made = [_mark(tensor) for tensor in _tensors(result)]
        if not made or made == before[:1]:  # a size, or dropout in evaluation mode
            return result
        found = [run for tensor in read if (run := self._of.get(id(tensor))) and not run.used]
        for run in found:
            run.used = True
        if found and is_addition(function, args, kwargs):
            last = max(found, key=lambda run: run.place)
            if result.shape == last.tensors[1].shape:
                last.writes, last.place = True, len(self.runs) - 1 / next(self._later)
        return result


def find_steps(
    network: nn.Module,
    call: Callable[[], Any],
    shared: Callable[[str], bool],
    points: str | Iterable[str] | None,
    outputs: bool,
    caller: str,
) -> list[Step]:
    """The steps of a network in their order, batch norms that stand alone among them.

    Left alone are layers that run several times in a forward pass, that share a weight with another
    module, or that each task has for itself; and by default heads: the layers that compute the
    network's output, and the last one that runs, unless it writes or a norm follows it.

    Parameters
    ----------
    call : runs the network on a few samples.
    shared : whether the tasks share what the module of a name holds.
    points : patterns of layers, heads or not, instead of all but the heads.
    outputs : whether heads are refitted too.

    Raises
    ------
    ValueError
        No layer to refit, or none that a pattern matches.
    """
    record = _Record(network, call)
    times = Counter(run.name for run in record.runs)
    users = Counter(id(tensor) for module in network.modules() for tensor in _own(module))
    able = [run for run in record.runs if times[run.name] == 1 and shared(run.name)]
    layers = [
        run
        for run in able
        if is_layer(run.module) and all(users[id(tensor)] == 1 for tensor in _own(run.module))
    ]
    norms = {run.read: run for run in able if is_kept(run.module)}
    last = [run for run in record.runs if is_layer(run.module)][-1:]
    patterns = None if points is None else as_patterns(points)
    steps: dict[Any, tuple[float, Step]] = {}
    for run in layers:
        end = norms.get(run.wrote, run) if _is_normed(run) else run
        norm = end.name if end is not run else None
        head = end.wrote in record.outputs or (run in last and norm is None and not end.writes)
        wanted = (outputs or not head) if patterns is None else matches(run.name, patterns)
        if not wanted:
            continue
        if norm is not None or end.writes or isinstance(run.module, CONVOLUTIONS):
            place = end.place if end.writes else run.place
            steps[run.name] = place, Step((run.name,), norm, end.writes)
        else:
            key = run.read, weight_of(run.module, "bias") is None
            place, step = steps.get(key, (run.place, Step(())))
            steps[key] = place, Step((*step.layers, run.name))
    refitted = [name for _, step in steps.values() for name in step.layers]
    unknown = [p for p in patterns or () if not any(matches(name, p) for name in refitted)]
    if unknown or not refitted:
        raise ValueError(
            f"{caller}: what is refitted are linear and convolution layers that run once, with a "
            f"weight of their own that all tasks share, got none of {', '.join(unknown) or 'them'}"
        )
    followers = {step.norm for _, step in steps.values()}
    for run in record.runs:
        if is_kept(run.module) and run.name not in followers:
            steps.setdefault(run.name, (run.place, Step((), run.name)))
    return [step for _, step in sorted(steps.values(), key=lambda timed: timed[0])]


def _is_normed(run: _Run) -> bool:
    """Whether a batch norm on the output of a layer has the layer's channels."""
    return isinstance(run.module, CONVOLUTIONS) or run.tensors[1].dim() == 2


def is_addition(function: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Whether a call adds one tensor to another, as they are."""
    plain = len(args) == 2 and not kwargs and all(isinstance(each, Tensor) for each in args)
    return plain and getattr(function, "__name__", "") in _ADDITIONS and args[0] is not args[1]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _mark(tensor: Tensor) -> tuple[int, int]:
    """A tensor and the number of times that it was written to; inference tensors do not count."""
    return id(tensor), 0 if tensor.is_inference() else tensor._version
