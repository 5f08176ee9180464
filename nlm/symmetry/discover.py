"""Discovery of the permutation symmetries of any model, by abstract interpretation of its graph.

Every parameter dimension begins as an axis of its own, of which nothing is known. The operations of
the exported graph are run on axes instead of numbers: a linear layer makes its input's features and
its weight's columns one axis, a view refines 768 units into 12 x 64, a slice of a position table
pins what it cuts. The axes of inputs, of outputs and of everything made by the code itself stay in
place. What is left unpinned may be permuted; :mod:`nlm.symmetry.conclude` writes it down.

It is sound by construction: operations only ever take permutations away, and one that is not
understood pins all that it touches.
"""

import logging
import math
import operator
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from nlm._state_dict import overlapping, place_of
from nlm.symmetry.alike import siblings
from nlm.symmetry.atoms import Atom, Axis, fixed, free, leaves, mark_read, pin, resolve, size_of
from nlm.symmetry.axes import unify
from nlm.symmetry.conclude import conclude
from nlm.symmetry.graph import Graph, export, is_write, operation_name
from nlm.symmetry.handlers import HANDLERS, Array, Lookup, NotUnderstood, Step
from nlm.symmetry.handlers.elements import pointwise, reduction
from nlm.symmetry.operations import bound, decomposed, flat, is_tied
from nlm.symmetry.siblings import Siblings
from nlm.symmetry.spec import PermutationSpec

_log = logging.getLogger(__name__)
_FOLDED = 65536  # constants of at most so many elements are computed


def discover(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    outputs: Sequence[str] | None = None,
) -> PermutationSpec:
    """The specification of a model; not verified.

    Raises
    ------
    ValueError
        The model cannot be exported, or has no such outputs.
    """
    graph = export(model, args, kwargs, outputs)
    return interpret(graph, model)


def interpret(graph: Graph, model: nn.Module) -> PermutationSpec:
    """The specification that a graph of a model allows."""
    return read(graph, model)[0]


def read(graph: Graph, model: nn.Module) -> tuple[PermutationSpec, "Reader"]:
    """The specification that a graph of a model allows, and what was read on the way."""
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"nlm.trace: a model's state dict holds tensors, got {type(tensor).__name__} for "
                f"{name!r}"
            )
    modules = dict(model.named_modules())
    reader = Reader(graph, state)
    reader.run(graph.nodes, {})
    stacked = siblings(graph, state, reader.values)
    reader.name_shared(state)
    found = conclude(reader, state, graph, modules), reader
    while stacked:
        reader = Reader(graph, state, stacked)
        reader.run(graph.nodes, {})
        if all(each.movable for each in stacked):
            reader.name_shared(state)
            other = conclude(reader, state, graph, modules), reader
            return max(found, other, key=lambda each: each[0].permutation_count)
        stacked = [each for each in stacked if each.movable]
    return found


class Reader:
    """Runs a graph on axes.

    Attributes
    ----------
    entries : state dict name -> its axes, for the floating-point entries that the graph mentions.
    records : the axes of every tensor, and the index values on which it depends.
    values : node -> what is known of its value.
    opaque : operation -> how often it was not understood.
    siblings : modules that are alike; the entries of each stack stand under its name.
    names, shown : leaf -> the id of its group, module -> its output; once it is concluded.
    """

    def __init__(
        self, graph: Graph, state: Mapping[str, Tensor], siblings: Sequence[Siblings] = ()
    ) -> None:
        self.graph = graph
        self.state = state
        self.siblings = siblings
        self.around: tuple[Axis, ...] = ()
        for each in siblings:
            each.begin()
        self.entries: dict[str, Array] = {}
        self.by_place: dict[Hashable, Array] = {}
        self.overlapping = overlapping(state)
        self.records: list[tuple[tuple[Axis, ...], frozenset[Lookup]]] = []
        self.values: dict[fx.Node, Any] = {}
        self.opaque: Counter[str] = Counter()
        self.names: dict[Atom, str] = {}
        self.shown: dict[str, Array] = {}

    def run(self, nodes: fx.Graph, given: dict[fx.Node, Any]) -> Any:
        """The outputs of a graph; ``given`` holds the values of an inner graph's placeholders."""
        outermost = nodes is self.graph.nodes
        values = self.values
        values.update(given)
        for node in nodes.nodes:
            if node.op == "placeholder":
                if node not in values:
                    values[node] = self.placeholder(node)
            elif node.op == "get_attr":
                values[node] = _constant(getattr(node.graph.owning_module, str(node.target), None))
            elif node.op == "call_function":
                values[node] = self.call(node, values)
            elif node.op == "output":
                outputs = fx.node.map_arg(node.args[0], lambda each: values[each])
                if outermost:
                    written = self.graph.written
                    for name, x in zip(written, outputs, strict=False):
                        self.write(name, x)
                    for x in _arrays(outputs[len(written) :]):
                        for axis in (*x.axes, x.over or []):
                            pin(axis, "output")
                return outputs
        return None

    def write(self, name: str, x: Array) -> None:
        """An entry that the model changes keeps its axes."""
        if name in self.entries:
            for axis, other in zip(self.entries[name].axes, x.axes, strict=True):
                unify(axis, other)
        else:
            for axis in (*x.axes, x.over or []):
                pin(axis, "written")

    def placeholder(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return value
        name = self.graph.entries.get(node.name, "")
        for each in self.siblings:
            if stack := each.stack_of.get(name):
                return self.member(stack, value, each.axis)
        if name in self.state and value.is_floating_point():
            key = place_of(self.state[name])
            if key not in self.by_place:
                self.by_place[key] = Array([free(size) for size in value.shape])
                self.records.append((tuple(self.by_place[key].axes), frozenset()))
            self.entries[name] = self.by_place[key]
            if name in self.overlapping:
                for axis in self.entries[name].axes:
                    pin(axis, "shares memory")
            return self.entries[name]
        why = "input" if not name and node.name not in self.graph.constants else "constant"
        x = Array([fixed(size, why) for size in value.shape], tied=not value.is_floating_point())
        x.constant = self.graph.constants.get(node.name)
        return x

    def member(self, stack: str, value: Tensor, axis: Axis) -> Array:
        """A parameter of one sibling: all have the same axes."""
        if stack not in self.entries:
            real = value.is_floating_point()
            axes = [free(size) if real else fixed(size, "constant") for size in value.shape]
            self.entries[stack] = Array([axis, *axes])
            self.records.append((tuple(self.entries[stack].axes), frozenset()))
        return Array(self.entries[stack].axes[1:])

    def name_shared(self, state: Mapping[str, Tensor]) -> None:
        """Gives the other names of a shared parameter the same axes."""
        for name, tensor in state.items():
            if name not in self.entries and place_of(tensor) in self.by_place:
                self.entries[name] = self.by_place[place_of(tensor)]

    def call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """What is known of the result of an operation."""
        known: Any = fx.node.map_arg((node.args, node.kwargs), lambda each: values[each])
        args, kwargs = known
        if node.graph is self.graph.nodes:
            self.around = tuple(each.axis for each in self.siblings if node in each.index)
        special = [found for each in self.siblings if (found := each.result(node, args))]
        if node.target is operator.getitem and not special:
            return args[0][args[1]]
        outputs = node.meta.get("val")
        operands = _arrays((args, kwargs))
        if not any(isinstance(each, Tensor) for each in flat(outputs)):
            for x in operands if outputs is not None else ():
                pin(x.over or [], "computed with")
            return outputs
        lookups: frozenset[Lookup] = frozenset().union(*(x.lookups for x in operands))
        step = Step(node, self.records, lookups, self.around)
        if special:
            for x in _arrays(special[0]):
                x.tied = x.tied or any(each.tied for each in operands)
            return self.noted(special[0], lookups, operands)
        try:
            if is_write(node):
                raise NotUnderstood
            result = self.understood(step, args, kwargs, operands)
            _check_shapes(result, outputs)
        except NotUnderstood:
            result = self.inner(node, args, kwargs)
            if result is None:
                result = self.not_understood(node, operands, outputs)
        except Exception:
            _log.debug("nlm.trace: the handler of %s failed", node.target, exc_info=True)
            result = self.not_understood(node, operands, outputs)
        kept = {id(x.over) for x in _arrays(result)}
        for x in operands:
            if x.over is not None and id(x.over) not in kept and not _looks_up(node.target):
                pin(x.over, "computed with")
        self.fold(node, args, kwargs, operands, self.noted(result, lookups, operands))
        for x, value in zip(flat(result), flat(outputs), strict=False):
            if isinstance(x, Array) and isinstance(value, Tensor):
                x.tied = x.tied or is_tied(node.target, operands, value)
        return result

    def noted(self, result: Any, lookups: frozenset[Lookup], operands: list[Array]) -> Any:
        """A result, of which the axes are recorded."""
        known = {leaf for x in operands for axis in x.axes for leaf in leaves(axis)}
        for x in _arrays(result):
            x.lookups |= lookups
            self.records.append(((*self.around, *x.axes), x.lookups))
            # What stands in order from here on may have been moved on its way: nothing hangs on it.
            if placed := {e for axis in x.axes for e in leaves(axis) if e.pinned} - known:
                rest = ([each for each in resolve(axis) if each not in placed] for axis in x.axes)
                self.records.append(((*self.around, *rest), x.lookups))
            there = {leaf for axis in x.axes for leaf in leaves(axis)}
            x.lookups = frozenset(each for each in x.lookups if there.issuperset(each.leaves()))
        return result

    def understood(self, step: Step, args: Any, kwargs: Any, operands: list[Array]) -> Any:
        """The result by the operation's handler, or by its tags."""
        target: Any = step.node.target
        registered = HANDLERS.get(operation_name(target))
        if registered is None or registered.reads:
            for x in operands:
                for axis in x.axes:
                    mark_read(axis)
        if registered is not None:
            return registered.function(step, *args, **kwargs)
        tags = getattr(target, "tags", ())
        outputs = step.node.meta["val"]
        if torch.Tag.pointwise in tags and isinstance(outputs, Tensor):
            return pointwise(step, operands)
        if torch.Tag.reduction in tags or operation_name(target) in _REDUCTIONS:
            arguments = bound(target, args, kwargs)
            if isinstance(arguments.get("other"), Array):
                return pointwise(step, operands)
            dims = arguments.get("dim")
            if dims is None or dims == []:
                dims = None
            elif isinstance(dims, int):
                dims = [dims]
            if isinstance(arguments.get("self"), Array) and len(operands) == 1:
                return reduction(step, arguments["self"], dims)
        if not operands:
            return _placed(outputs, lambda size: fixed(size, "constant"))
        raise NotUnderstood

    def inner(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """The result of the operations that one is made of; None where it is not made of others."""
        given = _arrays((args, kwargs))
        graphs = [each.graph for each in flat(args) if isinstance(each, fx.GraphModule)]
        graph = graphs[0] if str(node.target) in _WRAPPERS and graphs else decomposed(node)
        if graph is None:
            return None
        places = [each for each in graph.nodes if each.op == "placeholder"]
        if len(places) != len(given):
            return None
        outputs = self.run(graph, dict(zip(places, given, strict=True)))
        single = isinstance(node.meta["val"], Tensor)
        result = outputs[0] if single and isinstance(outputs, (tuple, list)) else outputs
        return result if single else tuple(result)

    def not_understood(self, node: fx.Node, operands: list[Array], outputs: Any) -> Any:
        name = str(node.target)
        self.opaque[name] += 1
        for x in operands:
            for axis in (*x.axes, x.over or []):
                mark_read(axis)
                pin(axis, name)
        return _placed(outputs, lambda size: fixed(size, name))

    def fold(
        self, node: fx.Node, args: Any, kwargs: Any, operands: list[Array], result: Any
    ) -> None:
        """Computes small constants: an index that is one may be a slice."""
        if not isinstance(result, Array) or any(x.constant is None for x in operands):
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            return
        if math.prod(map(size_of, result.axes)) > _FOLDED:
            return
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            return
        known = _mapped((args, kwargs), lambda x: x.constant)
        if "device" in known[1]:
            known[1]["device"] = torch.device("cpu")
        try:
            result.constant = node.target(*known[0], **known[1])
        except Exception:
            result.constant = None


_REDUCTIONS = {
    "sum", "mean", "amax", "amin", "var", "std", "any", "all", "logsumexp", "norm", "prod", "max",
    "min", "argmax", "argmin", "linalg_vector_norm", "var_mean", "std_mean", "aminmax", "median",
    "nanmedian", "mode", "nansum", "nanmean", "count_nonzero",
}  # fmt: skip


#: Operations that only say under which settings a graph runs.
_WRAPPERS = {"wrap_with_set_grad_enabled", "wrap_with_autocast", "hints_wrapper"}


def _looks_up(target: Any) -> bool:
    """Whether an operation's handler understands index values as such."""
    registered = HANDLERS.get(operation_name(target))
    return registered is not None and registered.looks_up


def _arrays(value: Any) -> list[Array]:
    return [leaf for leaf in flat(value) if isinstance(leaf, Array)]


def _mapped(value: Any, function: Callable[[Array], Any]) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(part, function) for part in value)
    if isinstance(value, dict):
        return {key: _mapped(part, function) for key, part in value.items()}
    return function(value) if isinstance(value, Array) else value


def _placed(outputs: Any, axis: Callable[[int], Axis]) -> Any:
    """Results of which only the shapes are known."""
    if isinstance(outputs, Tensor):
        return Array([axis(size) if isinstance(size, int) else axis(-1) for size in outputs.shape])
    if isinstance(outputs, (tuple, list)):
        return tuple(_placed(each, axis) for each in outputs)
    return outputs


def _check_shapes(result: Any, outputs: Any) -> None:
    """Raises where a handler's result has another shape than the operation's."""
    found, expected = flat(result), flat(outputs)
    for x, value in zip(found, expected, strict=True):
        if isinstance(value, Tensor) and [size_of(axis) for axis in x.axes] != list(value.shape):
            raise ValueError(f"{[size_of(axis) for axis in x.axes]} for {list(value.shape)}")


def _constant(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    tied = not value.is_floating_point()
    return Array([fixed(size, "constant") for size in value.shape], constant=value, tied=tied)
