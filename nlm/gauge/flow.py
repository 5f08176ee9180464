"""Which norms stand before which weights: one walk over a model's graph.

The axes that discovery has read say where the units of a group stand. The walk follows a norm's
gain from the normalised stream to the weights that read it, and notes every weight that reads the
group, the bias that is added to what it computes, and the gain on what a weight writes to it.
It proposes; :mod:`nlm.gauge.find` proves.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from nlm.symmetry import PermutationSpec, SymmetryError
from nlm.symmetry.atoms import resolve
from nlm.symmetry.discover import Reader
from nlm.symmetry.graph import Graph, operation_name
from nlm.symmetry.handlers import Array
from nlm.symmetry.layout import references
from nlm.symmetry.operations import bound, flat
from nlm.symmetry.stacks import stack_of


@dataclass(frozen=True)
class Read:
    """A weight that contracts a dimension with the stream, and the bias added to the result."""

    weight: str
    dim: int
    bias: str = ""


@dataclass
class Norm:
    """What stands between a stream and its readers: (gain + offset) * x / |x| + bias.

    Attributes
    ----------
    gain, bias : entries of the state dict, "" where there is none.
    offset : what the model adds to the gain (1 in Gemma).
    centres : whether the mean is subtracted (LayerNorm, not RMSNorm).
    reads : the weights behind it.
    """

    gain: str = ""
    bias: str = ""
    offset: float = 0.0
    centres: bool = False
    reads: list[Read] = field(default_factory=list)


@dataclass(frozen=True)
class Scale:
    """A gain + offset on what a weight and its bias write to the stream (LayerScale)."""

    gain: str
    offset: float
    weight: str
    dim: int
    bias: str = ""


@dataclass
class Flow:
    """What happens to a group's units.

    Attributes
    ----------
    norms : the norms on their way.
    reads : all weights that read them.
    scales : the gains on what weights write to them.
    shown : the modules that show them normed.
    linear : whether nothing else acts on each of them alone.
    """

    norms: list[Norm] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    scales: list[Scale] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    linear: bool = True


_NORMS = {"layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"}
_PRODUCTS = {"linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "conv1d", "conv2d", "conv3d"}
_LINEAR = {"add", "sub", "rsub", "neg", "to", "_to_copy", "clone", "where", "masked_fill"}
_SAME = {"dropout", "clone", "contiguous", "to", "_to_copy", "view", "reshape", "transpose"}
_WEIGHT = ("weight", "mat2", "batch2", "other")
_BIAS = ("bias", "self")


def walk(graph: Graph, reader: Reader, spec: PermutationSpec, group: str) -> Flow:
    """The flow of a group's units through a model.

    Raises
    ------
    SymmetryError
        A norm's output is used otherwise than by a weight: it is added to the stream (a post-norm
        model), or goes through another operation first.
    """
    return _Walk(graph, reader, spec, group).flow


class _Walk:
    def __init__(self, graph: Graph, reader: Reader, spec: PermutationSpec, group: str) -> None:
        self.values, self.spec, self.group = reader.values, spec, group
        self.atoms = {atom for atom, name in reader.names.items() if name == group}
        self.entry: dict[fx.Node, tuple[str, float]] = {}
        self.norm_of: dict[fx.Node, Norm] = {}
        self.by_gain: dict[tuple[str, str], Norm] = {}
        self.written: dict[fx.Node, tuple[str, int, str]] = {}
        self.flow = Flow()
        owner = stack_of(spec.stacks)
        for node in graph.nodes.nodes:
            if node.op == "placeholder" and (name := graph.entries.get(node.name)):
                self.entry[node] = owner.get(name, name), 0.0
            elif node.op == "call_function":
                self.call(node)
        normed = {id(self.values[node]) for node in self.norm_of}
        self.flow.shown = [
            module
            for module, value in reader.shown.items()
            if id(value) in normed and module in spec.sites
        ]

    def carries(self, node: fx.Node) -> bool:
        """Whether the group stands on a dimension of a value."""
        return any(
            atom in self.atoms
            for x in flat(self.values.get(node))
            if isinstance(x, Array)
            for axis in x.axes
            for atom in resolve(axis)
        )

    def call(self, node: fx.Node) -> None:
        name = operation_name(node.target)
        sources = node.all_input_nodes
        if len(sources) == 1 and sources[0] in self.entry:  # a parameter in another form
            entry, offset = self.entry[sources[0]]
            more = [each for each in node.args if isinstance(each, (int, float))]
            self.entry[node] = entry, offset + (float(more[0]) if name == "add" and more else 0.0)
            return
        carried = [each for each in sources if self.carries(each)]
        if name == "type_as":
            carried = carried[:1]
        own = [each for each in carried if each in self.entry]
        streams = [each for each in carried if each not in self.entry]
        if not streams:
            if name in _PRODUCTS and own:
                self.written[node] = self.weight(node, own, reads=False)
            return
        norms = [self.norm_of[each] for each in streams if each in self.norm_of]
        if torch.Tag.pointwise in getattr(node.target, "tags", ()) and name not in _LINEAR:
            scales = name in {"mul", "div"} and len(carried) == 1
            self.flow.linear &= scales
        if name in _NORMS and not norms:
            self.normalise(node, name)
        elif name in _SAME and streams[0] in self.written:
            self.written[node] = self.written[streams[0]]
        elif name == "mul" and streams[0] in self.written and self.is_vector(own):
            self.scale(own[0], streams[0])
        elif name in _PRODUCTS and own:
            self.product(node, streams, own)
        elif name == "mul" and self.is_vector(own) and not any(n.gain or n.bias for n in norms):
            entry, offset = self.entry[own[0]]
            norm = norms[0] if norms else Norm()
            norm.gain, norm.offset = entry, offset
            self.add(node, norm)
        elif name == "add" and self.is_vector(own) and norms:
            norms[0].bias = self.entry[own[0]][0]
            self.norm_of[node] = norms[0]
        elif norms:
            one = len(norms) == len(streams) and all(norm is norms[0] for norm in norms)
            if own or not one or not self.carries(node):
                where = (node.meta.get("nn_module_stack") or {}).values()
                module = [path for path, _ in where][-1:] or [""]
                raise SymmetryError(
                    f"nlm.gauge: a norm's output is read by weights alone where the stream may be "
                    f"rotated (pre-norm; align other models by permutations, "
                    f"method='activations'), got {name!r} on it in "
                    f"{module[0].removeprefix('model.')!r}",
                    [self.group],
                )
            self.norm_of[node] = norms[0]

    def is_vector(self, own: list[fx.Node]) -> bool:
        """Whether the parameters of an operation are one vector."""
        return len(own) == 1 and len(self.spec.params[self.entry[own[0]][0]]) == 1

    def named(self, value: Any) -> str:
        return self.entry[value][0] if isinstance(value, fx.Node) and value in self.entry else ""

    def normalise(self, node: fx.Node, name: str) -> None:
        arguments = bound(node.target, node.args, node.kwargs)
        gain, bias = (self.named(arguments.get(part)) for part in ("weight", "bias"))
        self.add(node, Norm(gain, bias, centres="layer" in name))

    def add(self, node: fx.Node, norm: Norm) -> None:
        """A norm that runs again, with the same gain, is the same."""
        if norm.gain:
            norm = self.by_gain.setdefault((norm.gain, norm.bias), norm)
        self.norm_of[node] = norm
        if all(norm is not each for each in self.flow.norms):
            self.flow.norms.append(norm)

    def scale(self, vector: fx.Node, product: fx.Node) -> None:
        gain, offset = self.entry[vector]
        scale = Scale(gain, offset, *self.written[product])
        if scale not in self.flow.scales:
            self.flow.scales.append(scale)

    def weight(self, node: fx.Node, own: list[fx.Node], reads: bool) -> tuple[str, int, str]:
        """The weight of a product, the dimension of it that reads or writes, and the bias added."""
        arguments = bound(node.target, node.args, node.kwargs)
        weight = next((arguments[part] for part in _WEIGHT if part in arguments), None)
        if weight not in own:
            weight = own[0]
        bias = next((self.named(arguments[part]) for part in _BIAS if part in arguments), "")
        entry = self.named(weight)
        dims = [
            dim
            for dim, layout in enumerate(self.spec.params[entry])
            if any(ref.group == self.group for ref in references(layout))
        ]
        transposed = operation_name(node.target) in {"linear", "conv1d", "conv2d", "conv3d"}
        return entry, dims[-1 if transposed == reads else 0], bias if bias != entry else ""

    def product(self, node: fx.Node, streams: list[fx.Node], own: list[fx.Node]) -> None:
        read = Read(*self.weight(node, own, reads=True))
        if read not in self.flow.reads:
            self.flow.reads.append(read)
        for norm in map(self.norm_of.get, streams):
            if norm is not None and read not in norm.reads:
                norm.reads.append(read)
