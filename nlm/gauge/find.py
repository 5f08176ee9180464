"""Finding the gauge of a model: proposed by its graph, proven in float64.

Every group of a proven specification may be more than permutable. A group that norms stand on is
proposed as a residual stream (with the norms and their readers that :mod:`nlm.gauge.flow` finds),
every other one on which nothing but products and sums seem to act as one that rotates as it is.
Whether it is so is decided by the model: what is folded and rotated at random must leave its
outputs as they are. That its units matter at all, each place of them, the proof of the
permutations has shown.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nlm._modules import evaluation
from nlm.gauge.flow import Flow, Read, walk
from nlm.gauge.gauge import Gauge, Shift, Stream, ties, untied
from nlm.symmetry import PermutationSpec, SymmetryError
from nlm.symmetry.discover import Reader, read
from nlm.symmetry.graph import Graph, call_arguments, export
from nlm.symmetry.layout import Ref
from nlm.symmetry.outputs import named_tensors
from nlm.symmetry.subject import Subject, other_shapes


def find(
    model: nn.Module,
    example_inputs: Any,
    spec: PermutationSpec,
    kwargs: Mapping[str, Any] | None = None,
) -> Gauge:
    """The continuous symmetries of a pre-norm model, proven on it.

    Parameters
    ----------
    model : the network; it is not changed.
    example_inputs, kwargs : as for :func:`nlm.trace`.
    spec : its permutations (``nlm.trace``); the groups of the gauge are groups of it.

    Raises
    ------
    SymmetryError
        No residual stream may be rotated (a post-norm model: align it by permutations), or the
        proof failed.
    ValueError
        The model cannot be exported, or the specification is not of this model.

    References
    ----------
    Theus et al.: Generalized Linear Mode Connectivity for Transformers (2025). Ashkboos et al.:
    SliceGPT, arXiv:2401.15024, section 3 (norms folded, the stream rotated).
    """
    spec.check_state_dict(model.state_dict())
    if not spec.proven:
        raise SymmetryError(
            "nlm.gauge: a specification is proven before more is looked for than its "
            "permutations, got one that is not"
        )
    args, arguments = call_arguments(model, example_inputs, kwargs)
    tied, known = ties(model), spec
    for _ in range(2):  # all ties apart, and then only those that have to be
        apart = untied(model, tied)
        graph = export(apart, args, arguments, spec.outputs or None)
        known, reader = read(graph, apart)
        flows, refused = _flows(graph, reader, known)
        reads = {each.weight for flow in flows.values() for each in flow.reads}
        needed = [
            (others[0], *(name for name in names if name in reads))
            for names in tied
            if (others := [name for name in names if name not in reads])
        ]
        needed = [names for names in needed if len(names) > 1]
        if needed == tied:
            break
        tied = needed
    for group in [each for each in flows if each in spec.free]:
        if spec.carriers(group) != known.carriers(group):
            refused.append(
                SymmetryError(
                    f"nlm.gauge: a specification is of the model, with tied entries in one "
                    f"stream, got {group!r} in other places when they are apart",
                    [group],
                )
            )
            del flows[group]
    used = {graph.entries.get(node.name) for node in graph.nodes.nodes if node.users}
    shared = tuple(tuple(sorted(names, key=lambda name: name not in used)) for names in ties(apart))
    _check_same(model, apart, args, arguments)
    example = args, arguments
    subject = Subject(apart, [example], other_shapes(example), None, spec.outputs, spec.stacks)
    proof = _Proof(subject, Gauge(spec, {}, untied=tuple(tied), shared=shared))
    streams: dict[str, Stream] = {}
    for group, flow in flows.items():
        if flow.norms and group in spec.free:
            try:
                streams[group] = proof.stream(group, flow)
            except SymmetryError as error:
                refused.append(error)
    if not streams:
        raise next(iter(refused), None) or SymmetryError(
            "nlm.gauge: a pre-norm model has a residual stream that norms read and no output "
            "shows, got none"
        )
    inner = tuple(
        proof.rotating(
            [
                group
                for group, flow in flows.items()
                if group in spec.free and flow.linear and not flow.norms
            ]
        )
    )
    shifts = tuple(shift for group in inner for shift in proof.shifts(group, flows[group]))
    return proof.all_together(streams, inner, shifts)


def _flows(
    graph: Graph, reader: Reader, spec: PermutationSpec
) -> tuple[dict[str, Flow], list[SymmetryError]]:
    """The flow of every group that moves, and why some have none."""
    flows, refused = {}, []
    for group in spec.free:
        try:
            flows[group] = walk(graph, reader, spec, group)
        except SymmetryError as error:
            refused.append(error)
    return flows, refused


def _check_same(model: nn.Module, apart: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Raises where a model computes something else once its ties are taken apart."""
    with evaluation(model, apart):
        one, other = (named_tensors(each(*args, **kwargs)) for each in (model, apart))
    if not all(torch.allclose(one[name], other[name], equal_nan=True) for name in one):
        raise SymmetryError(
            "nlm.gauge: a model whose head is tied to its embedding computes the same when it is "
            "not, got other outputs"
        )


class _Proof:
    """What folding and rotating do to the outputs of a model with perturbed weights."""

    def __init__(self, subject: Subject, plain: Gauge) -> None:
        self.subject, self.plain, self.spec = subject, plain, plain.spec

    def stream(self, group: str, flow: Flow) -> Stream:
        """The residual stream of a flow, with what its norms allow.

        A norm that is written out may subtract the mean without a name: the all-ones vector is kept
        where the stream does not rotate otherwise.
        """
        behind: dict[tuple[str, int], int] = {}
        for norm in flow.norms:
            norm.reads = [self._checked(each) for each in norm.reads]
            for each in norm.reads:
                behind[each.weight, each.dim] = behind.get((each.weight, each.dim), 0) + 1
        reads = tuple(map(self._checked, flow.reads))
        plain = all(
            isinstance(self.spec.params[name][dim], Ref) for name, dim in self.spec.carriers(group)
        )
        if not plain or max(behind.values(), default=0) > 1:
            raise SymmetryError(
                f"nlm.gauge: a stream is read as a whole, by weights that stand behind one norm, "
                f"got parts of it or weights behind two norms for group {self._named(group)}",
                [group],
            )
        centres = all(norm.centres for norm in flow.norms)
        keeps_ones = any(norm.centres for norm in flow.norms)
        found = Stream(
            tuple(flow.norms), reads, keeps_ones,
            centres and all((each.weight, each.dim) in behind for each in reads),
            tuple(flow.shown), tuple(flow.scales),
        )  # fmt: skip
        error = 0.0
        for tried in (found, replace(found, keeps_ones=True, centred=False)):
            error = self.error(replace(self.plain, streams={group: tried}))
            if error <= self.subject.tolerance:
                return tried
        raise SymmetryError(
            f"nlm.gauge: a rotation of the residual stream must not change the outputs (between "
            f"norm and norm nothing but sums and weights; align other models by permutations, "
            f"method='activations'), got a relative change of {error:.1e} for group "
            f"{self._named(group)}",
            [group],
        )

    def rotating(self, groups: list[str]) -> list[str]:
        """Those of some groups that rotate as they are."""
        if self._rotate(*groups):
            return groups
        return [group for group in groups if self._rotate(group)]

    def _rotate(self, *groups: str) -> bool:
        return self.error(replace(self.plain, inner=groups)) <= self.subject.tolerance

    def shifts(self, group: str, flow: Flow) -> Iterator[Shift]:
        """The biases inside a head that count for nothing, or only through one weight."""
        for name, _ in self.spec.carriers(group):
            if len(self.spec.params[name]) > 1:
                continue
            for number, block in enumerate(self.plain.blocks(name, self.subject.state)):
                if not block.axes_of(group):
                    continue
                ways = [Shift(name, number)]
                ways += [
                    Shift(name, number, each)
                    for each in map(self._checked, flow.reads)
                    if each.bias
                ]
                for shift in ways:
                    gauge = replace(self.plain, inner=(group,), shifts=(shift,))
                    moved = self.copied(gauge)
                    gauge.fold_(moved)
                    if self.subject.change(moved) <= self.subject.tolerance:
                        yield shift
                        break

    def all_together(
        self, streams: dict[str, Stream], inner: tuple[str, ...], shifts: tuple[Shift, ...]
    ) -> Gauge:
        """The whole gauge, proven on all examples."""
        gauge = replace(self.plain, streams=streams, inner=inner, shifts=shifts)
        error = self.error(gauge, slice(None))
        if error > self.subject.tolerance:
            raise SymmetryError(
                f"nlm.gauge: rotating all groups at once must not change the outputs, got a "
                f"relative change of {error:.1e}",
                gauge.groups,
            )
        return replace(gauge, error=error, dtype=self.subject.text)

    def error(self, gauge: Gauge, examples: slice = slice(1)) -> float:
        """The largest change by folding, and by folding and rotating."""
        state = self.copied(gauge)
        gauge.fold_(state)
        folded = self.subject.change(state, examples) if gauge.streams else 0.0
        gauge.rotate_(gauge.random(), state)
        return max(folded, self.subject.change(state, examples))

    def copied(self, gauge: Gauge) -> dict[str, Tensor]:
        """The entries that a gauge touches, as float64 copies."""
        names = set(gauge.touched())
        return {
            name: tensor.to(torch.float64, copy=True)
            for name, tensor in self.subject.state.items()
            if name in names and tensor.is_floating_point()
        }

    def _checked(self, read: Read) -> Read:
        """A reader whose bias has the shape of what the weight computes; else it has none."""
        if not read.bias:
            return read
        shape = list(self.subject.state[read.weight].shape)
        del shape[read.dim]
        fits = shape == list(self.subject.state[read.bias].shape)
        return read if fits else replace(read, bias="")

    def _named(self, group: str) -> str:
        return f"{group!r} ({self.spec.groups[group].origin})"
