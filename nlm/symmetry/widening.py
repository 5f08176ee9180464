"""Widening: layers with more units, so that several models live in one.

Unit i of model x becomes unit u_x(i) of the wide model. Where units are *written* (the rows of a
weight, biases, norms) a wide unit is the mean of those that became it; where they are *read* (the
columns of the next weight) it is their sum, in the mean over the models if these share the row:

    W[p, q] = sum_x sum_{u_x(i) = p, u_x(j) = q} W_x[i, j]  /  sum_x |{i : u_x(i) = p}|

for rows p and columns q (Stoica et al., ZipIt!, arXiv:2305.03053, whose unmerging is the sum;
Nasery et al., PLeaS, arXiv:2407.02447). Units of a model that share a wide unit with none are what
they were; a row that all models share, an output among them, is their mean.

Nothing says of a parameter where its units are written and where they are read. It is found by
experiment: in a model whose units are pairs of copies, what is added to one of a pair and taken
from the other changes nothing in what a module computes that reads them. Then it is proven that a
group can be widened: a model with copies of every second unit computes what it did. A norm over the
units, a softmax, a fixed number of heads do not pass.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nlm._multitask import tell_sizes, with_state
from nlm._names import is_statistic
from nlm._state_dict import StateDict
from nlm.symmetry import gather
from nlm.symmetry.blocks import blocks
from nlm.symmetry.layout import Layout, Product, Ref, Sum, references, selectors
from nlm.symmetry.proof import SymmetryError
from nlm.symmetry.spec import PermutationSpec
from nlm.symmetry.stacks import entries, joined, separated
from nlm.symmetry.subject import Subject, call

Place = tuple[str, int]  # a dimension of a parameter
Units = Mapping[str, Tensor]  # group -> the wide unit of each unit, int64 [models, size]


@dataclass(frozen=True)
class Widening:
    """Which groups of a network can be made wider.

    Attributes
    ----------
    spec : the specification; models are brought into one order of units with it before.
    written : group that can be widened -> where its units are written; elsewhere they are read.
    refused : free group that cannot -> why.
    """

    spec: PermutationSpec
    written: dict[str, frozenset[Place]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def find(
        cls,
        model: nn.Module,
        spec: PermutationSpec,
        example_inputs: Any,
        kwargs: Mapping[str, Any] | None = None,
        *,
        forward: Callable[..., Any] | None = None,
    ) -> "Widening":
        """The groups that can be widened, proven one after the other, each with those before it.

        Parameters
        ----------
        model, example_inputs, kwargs, forward : as for :meth:`PermutationSpec.verify`.
        spec : proven.

        Raises
        ------
        SymmetryError
            The specification is not proven.
        """
        if not spec.proven:
            raise SymmetryError(
                "nlm.symmetry: a specification is proven before layers are widened with it "
                "(spec.verify), got one that is not"
            )
        example = example_inputs, dict(kwargs or {})
        watched = _Watched(forward)
        subject = Subject(model, [example], (), watched, spec.outputs, spec.stacks)
        found = cls(spec)
        for group in spec.free:
            reason = _obstacle(spec, group)
            if reason is None:
                found.written[group] = _written(spec, subject, watched, group)
                reason = found._refuted(subject)
            if reason is not None:
                found.written.pop(group, None)
                found.refused[group] = reason
        return found

    def check(self, units: Units, models: int) -> dict[str, Tensor]:
        """The units of the groups that change: where not all models keep theirs in one order.

        Raises
        ------
        ValueError
            A group that is unknown or cannot be widened, or what is no map of units.
        """
        changed = {}
        for group, index in units.items():
            index = index.cpu()
            if group not in self.written:
                raise ValueError(
                    f"nlm.symmetry: the groups that can be widened are "
                    f"{', '.join(self.written) or 'none'}, got {group!r} "
                    f"({self.refused.get(group, 'unknown')})"
                )
            shape = [models, self.spec.groups[group].size]
            if index.dtype != torch.int64 or list(index.shape) != shape:
                raise ValueError(
                    f"nlm.symmetry: the wide units of group {group!r} are int64 of shape {shape}, "
                    f"got {index.dtype} of shape {list(index.shape)}"
                )
            used = index.unique()
            if not torch.equal(used, torch.arange(len(used))):
                raise ValueError(
                    f"nlm.symmetry: wide units are counted from 0 and each is some model's, got "
                    f"{used[:8].tolist()} for group {group!r}"
                )
            if not torch.equal(index, torch.arange(shape[1]).expand(shape)):
                changed[group] = index
        return changed

    def apply(self, states: Mapping[int, StateDict], units: Units) -> dict[str, Tensor]:
        """The wide entries on which some groups stand, of one or more models in one.

        Parameters
        ----------
        states : number of a model, as in ``units``, -> entries of its state dict, in the common
            order; all have the same.
        units : group -> int64 ``[models, size]``, the wide unit that each unit becomes.
        """
        held = {number: joined(self.spec.stacks, state) for number, state in states.items()}
        found = {}
        for name in next(iter(held.values())):
            layouts = self.spec.params.get(name, ())
            if any(ref.group in units for layout in layouts for ref in references(layout)):
                own = {number: state[name].detach() for number, state in held.items()}
                found[name] = self._entry(name, own, units)
        return separated(self.spec.stacks, found)

    def resize(self, network: nn.Module, state: StateDict, units: Units) -> nn.Module:
        """A copy of a network that holds a wide state dict, with its modules told their sizes."""
        filled = with_state(network, state)
        for name, module in filled.named_modules():
            layouts = self.spec.params.get(f"{name}.weight")
            if layouts and isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
                module.groups = _convolution_groups(layouts[0], module.groups, _widths(units))
                tell_sizes(module)
        return filled

    def parameters(self) -> dict[tuple[str, ...], int]:
        """The number of parameters, as a polynomial in the sizes of the groups.

        The groups of a monomial, each as often as it is a factor, -> its coefficient. BatchNorm's
        statistics are none; a parameter counts under each of its names.
        """
        found: Counter[tuple[str, ...]] = Counter()
        for name, layouts in self.spec.params.items():
            if is_statistic(name):
                continue
            for block in blocks(layouts, [layout.size for layout in layouts]):
                wide = [axis.group for axis in block.axes if axis.group in self.written]
                rest = (axis.size for axis in block.axes if axis.group not in self.written)
                found[tuple(sorted(filter(None, wide)))] += math.prod(rest)
        return dict(found)

    def growth(self, units: Units) -> float:
        """The parameters of the wide model, as a multiple of those of one model."""
        sizes = {group: self.spec.groups[group].size for group in self.written}
        totals = [
            sum(times * math.prod(widths[group] for group in key) for key, times in found.items())
            for found in [self.parameters()]
            for widths in (sizes | _widths(units), sizes)
        ]
        return totals[0] / totals[1]

    def _entry(self, name: str, tensors: Mapping[int, Tensor], units: Units) -> Tensor:
        """One entry of the wide model."""
        layouts, widths = self.spec.params[name], _widths(units)
        total, count = torch.zeros(()), torch.zeros(())
        for number, tensor in tensors.items():
            rows = {group: index[number] for group, index in units.items()}
            part, each = tensor.to(torch.promote_types(tensor.dtype, torch.float32)), torch.ones(())
            for dim, layout in enumerate(layouts):
                if not any(ref.group in units for ref in references(layout)):
                    continue
                target, times = self._span(layout, (name, dim), rows, widths)
                shape = [*part.shape[:dim], len(times), *part.shape[dim + 1 :]]
                part = part.new_zeros(shape).index_add_(dim, target.to(part.device), part)
                each = each * times.view([-1 if d == dim else 1 for d in range(len(layouts))])
            total, count = total.to(part) + part, count + each
        return (total / count.clamp(min=1).to(total)).to(tensors[next(iter(tensors))].dtype)

    def _span(
        self, layout: Layout, place: Place, rows: Mapping[str, Tensor], widths: Mapping[str, int]
    ) -> tuple[Tensor, Tensor]:
        """The wide position of every position, and how many were written to every wide one."""
        if isinstance(layout, Ref) and layout.group in rows:
            row, width = rows[layout.group], widths[layout.group]
            if place in self.written[layout.group]:
                return row, row.bincount(minlength=width).float()
            return row, torch.ones(width)
        if isinstance(layout, Product):
            target, times = torch.zeros(1, dtype=torch.int64), torch.ones(1)
            for part in layout.parts:
                inner, each = self._span(part, place, rows, widths)
                target = (target[:, None] * len(each) + inner).flatten()
                times = (times[:, None] * each).flatten()
            return target, times
        if isinstance(layout, Sum):
            spans = [self._span(part, place, rows, widths) for part in layout.parts]
            starts = accumulate((len(each) for _, each in spans), initial=0)
            targets = [start + inner for start, (inner, _) in zip(starts, spans, strict=False)]
            return torch.cat(targets), torch.cat([each for _, each in spans])
        return torch.arange(layout.size), torch.ones(layout.size)

    def _refuted(self, subject: Subject) -> str | None:
        """What happens to a model with copies of every second unit that is not as it should be."""
        units = {
            group: kept_apart(torch.arange(size) % 2 == min(1, size - 1))
            for group in self.written
            for size in [self.spec.groups[group].size]
        }
        state = separated(self.spec.stacks, subject.state)
        wide = {**state, **self.apply({0: state, 1: state}, units)}
        try:
            error = subject.difference(self.resize(subject.model, wide, units))
        except Exception as failure:  # a model may refuse another size in any way that it likes
            lines = str(failure).strip().splitlines()
            return f"the model does not run with more of its units: {lines[0] if lines else ''}"
        if error > subject.tolerance:
            return (
                f"with copies of its units the outputs change by {error:.0e}: a norm, a softmax or "
                f"a mean over them, or a weight that writes and reads them"
            )
        return None


def kept_apart(own: Tensor) -> Tensor:
    """The wide units of two models in one order, of which those of ``own`` are merged with none.

    Parameters
    ----------
    own : bool [size].

    Returns
    -------
    int64 [2, size]: the first model's units come first, then what the second has of its own.
    """
    first = torch.arange(len(own))
    return torch.stack([first, torch.where(own, len(own) + own.cumsum(0) - 1, first)])


def _widths(units: Units) -> dict[str, int]:
    return {group: int(index.max()) + 1 for group, index in units.items()}


def _obstacle(spec: PermutationSpec, group: str) -> str | None:
    """Why a group cannot be widened, where its layouts say so."""
    if parents := spec.groups[group].parents:
        return f"its units lie inside those of {', '.join(parents)}, and go with them"
    for name, layouts in spec.params.items():
        for dim, layout in enumerate(layouts):
            names = {ref.group for ref in references(layout)}
            if name in spec.stacks and dim == 0 and group in names:
                return f"its units are modules: {', '.join(spec.stacks[name][:3])}, ..."
            if group in selectors(layout) or (group in names and _has_family(layout)):
                return f"{name!r} has other groups for each index of another: {layout}"
    return None


def _has_family(layout: Layout) -> bool:
    return next(selectors(layout), None) is not None


class _Watched:
    """Runs a model; with ``entries``, what the modules of these put out is part of its outputs."""

    def __init__(self, forward: Callable[..., Any] | None) -> None:
        self._forward = forward or call
        self.entries: list[str] = []

    def __call__(self, model: nn.Module, args: Any, **kwargs: Any) -> Any:
        seen: list[Any] = []
        with ExitStack() as stack:
            for owner in {name.rpartition(".")[0] for name in self.entries}:
                hook = model.get_submodule(owner).register_forward_hook(
                    lambda module, inputs, output: seen.append(
                        tree_map_only(Tensor, Tensor.clone, output)
                    )
                )
                stack.callback(hook.remove)
            outputs = self._forward(model, args, **kwargs)
        return {"outputs": outputs, "modules": seen} if seen else outputs


def _written(
    spec: PermutationSpec, subject: Subject, watched: _Watched, group: str
) -> frozenset[Place]:
    """Where the units of a group are written: noise there, opposite in two copies, has effects."""
    index = torch.arange(spec.groups[group].size)
    partner = (index ^ 1).where((index ^ 1) < len(index), index)
    still = spec.identity()
    twins, swap = (
        gather.Gathers(spec.groups, {**still, group: moved}) for moved in (index // 2 * 2, partner)
    )
    places = spec.carriers(group)
    names = dict.fromkeys(name for name, _ in places)
    held = gather.apply(
        [subject.state[name] for name in names], [twins.of(spec.params[name]) for name in names]
    )
    pairs = dict(zip(names, held, strict=True))
    found = set()
    for name, dim in places:
        tensor = pairs[name]
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        others = [other for other in range(tensor.dim()) if other != dim]
        [swapped] = gather.apply([noise], [swap.of(spec.params[name], others)])
        size = tensor.double().square().mean().sqrt().to(tensor)
        noisy = tensor + size * (noise - swapped)
        moved = {**pairs, **dict.fromkeys(subject.aliases[name], noisy)}
        watched.entries = list(entries(spec.stacks, subject.aliases[name]))
        if subject.change(moved, since=pairs) > subject.tolerance:
            found.add((name, dim))
    watched.entries = []
    return frozenset(found)


def _convolution_groups(layout: Layout, groups: int, widths: Mapping[str, int]) -> int:
    """The groups of a wide convolution: the leading factors of its first dimension."""
    old = new = 1
    for factor in layout.parts if isinstance(layout, Product) else (layout,):
        if old == groups:
            break
        old *= factor.size
        new *= widths.get(factor.group, factor.size) if isinstance(factor, Ref) else factor.size
    return new if old == groups else groups
