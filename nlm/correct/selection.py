"""Pool and select: whole units and attention heads of several networks instead of means of them.

Where a mean of two units that hardly correlate is like neither, the units of all experts and their
means stand side by side before the layers that read them, and the best are kept, as many as one
network has (:mod:`nlm.correct.elimination`), never worse ones than the means. Each expert's units
are fitted to what they are in the expert, from the merged network's own inputs.

That takes units that the layers of one step make and those of another one read, and nothing else:
hidden units, attention heads, groups of heads with one key and value. The specification tells them.

Between two small GPTs, in three pairs, refit leaves a barrier of .196 to .229 and selecting one of
.119 to .128 (where they are not aligned .495 and .210, in one pair), at eight times the work: that
of the products of all units with one another. Of the hidden units that it keeps next to none are
means, of the heads half are. Without means to choose from it leaves .114 and .130 in two pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nlm._modules import is_transformers_conv1d, submodule
from nlm._state_dict import state_of
from nlm.correct.elimination import entries_of, select_blocks
from nlm.correct.passes import MergedPass
from nlm.correct.solving import CALLER, Stream, Walk
from nlm.correct.walk import CONVOLUTIONS, Step
from nlm.statistics import Forward, Mask
from nlm.symmetry import Family, Layout, PermutationSpec, Product, Ref, Sum, trace

MEANS = "mean of all"
_APART = 1e-3  # of the largest activation: units that differ by less do not depend on others


class Selection:
    """Selecting units in :func:`nlm.refit`, and what came of it.

    Parameters
    ----------
    spec : the model's specification; by default :func:`nlm.trace` finds it on two samples.

    Attributes
    ----------
    kept : layers that read units -> expert -> its units among them; "mean of all" -> the means.
        Of attention the units are heads, or groups of heads with one key and value.
    left : group of the specification -> why its units are refitted as they are.
    """

    def __init__(self, spec: PermutationSpec | None = None) -> None:
        self.spec = spec
        self.kept: dict[str, dict[str, list[int]]] = {}
        self.left: dict[str, str] = {}

    def find_spec(self, network: nn.Module, batch: Any, forward: Forward | None) -> PermutationSpec:
        """The specification that was given, or else that of a network that runs on a batch."""
        if self.spec is None and forward is not None:
            raise ValueError(
                f"{CALLER}: units of a model that a function runs are selected by a specification, "
                f"got none: select=Selection(spec)"
            )
        if self.spec is None:
            self.spec = trace(network, batch[0] if isinstance(batch, (tuple, list)) else batch)
        return self.spec


@dataclass(frozen=True)
class Pool:
    """Units that the layers of one step make and those of another one read.

    Attributes
    ----------
    group : of the specification.
    made : the rows of the maker's layers, one layer after the other, of each unit, [units, rows].
    read : the inputs of the reader's layers of each unit, [units, inputs].
    """

    group: str
    maker: Step
    reader: Step
    made: Tensor
    read: Tensor

    def side_by_side(self, tensors: Sequence[Tensor], dim: int) -> Tensor:
        """What the reader's inputs are along, of several networks: by unit, then by network."""
        dim %= tensors[0].dim()
        size = *self.read.shape[:1], -1
        index = entries_of(self.read.flatten(), tensors[0].shape[dim] // self.read.numel())
        parts = [
            each.index_select(dim, index.to(each.device)).unflatten(dim, size) for each in tensors
        ]
        return torch.stack(parts, dim + 1).flatten(dim, dim + 2)


# --- which units can be selected ------------------------------------------------------------------


def find_pools(
    network: nn.Module,
    steps: Sequence[Step],
    spec: PermutationSpec,
    are_apart: Callable[[Pool], bool],
) -> tuple[list[Pool], dict[str, str]]:
    """Groups that the layers of one step make and those of another read; why others are not.

    ``are_apart`` tells whether the units of a pool depend on nothing but their own weights.
    """
    pools: list[Pool] = []
    left: dict[str, str] = {}
    taken: set[Step] = set()
    for group in spec.free:
        if spec.groups[group].parents:  # goes with its parent
            continue
        found = _pool(network, steps, spec, group)
        if isinstance(found, Pool) and taken & {found.maker, found.reader}:
            found = "its layers make or read other units that are selected"
        if isinstance(found, Pool) and not are_apart(found):
            found = "its units depend on one another"
        if isinstance(found, Pool):
            pools.append(found)
            taken |= {found.maker, found.reader}
        else:
            left[group] = found
    return pools, left


def _pool(
    network: nn.Module, steps: Sequence[Step], spec: PermutationSpec, group: str
) -> Pool | str:
    of = {name: step for step in steps for name in step.layers}
    layers: tuple[dict[str, None], dict[str, None]] = {}, {}  # that make units, that read them
    for name, dim in spec.carriers(group):
        layer = name.rpartition(".")[0]
        if layer not in of:
            return f"{name} is not refitted"
        columns = name.endswith("weight") and is_transformers_conv1d(submodule(network, layer))
        layers[dim ^ columns][layer] = None
    found = []
    for names, does in zip(layers, ("makes", "reads"), strict=True):
        step = of[next(iter(names))] if names else Step(())
        modules = [submodule(network, name) for name in step.layers]
        if set(step.layers) != set(names) or not names:
            return f"what {does} it is no whole step: {', '.join(names) or 'no layer'}"
        if any(isinstance(each, CONVOLUTIONS) and each.groups > 1 for each in modules):
            return f"{step.layers[0]} has groups of channels"
        found.append(step)
    maker, reader = found
    if maker is reader:
        return f"{maker.layers[0]} makes and reads it"
    sides = [(maker.layers, 0), (reader.layers[:1], 1)]
    units = [
        torch.cat([_units(spec, group, network, name, dim) for name in names])
        for names, dim in sides
    ]
    if any(len(each) == 0 or (each < 0).any() for each in units):
        return f"{maker.layers[0]} and {reader.layers[0]} hold more than its units"
    size = spec.groups[group].size
    return Pool(group, maker, reader, *(each.argsort(stable=True).view(size, -1) for each in units))


def _units(spec: PermutationSpec, group: str, network: nn.Module, layer: str, dim: int) -> Tensor:
    """The unit at each output (0) or input (1) of a layer; -1 where there is none."""
    columns = is_transformers_conv1d(submodule(network, layer))
    return _units_along(spec.params[f"{layer}.weight"][dim ^ columns], group)


def _units_along(layout: Layout, group: str) -> Tensor:
    if isinstance(layout, Ref) and layout.group == group:
        return torch.arange(layout.size)
    parts = [] if isinstance(layout, Ref) else getattr(layout, "parts", [])
    found = [_units_along(part, group) for part in parts]
    if isinstance(layout, Sum):
        return torch.cat(found)
    if isinstance(layout, Product):
        whole = torch.full((1,), -1)
        for part in found:
            whole = torch.maximum(whole[:, None], part).flatten()
        return whole
    if isinstance(layout, Family) and all(torch.equal(found[0], part) for part in found):
        return found[0]
    return torch.full((layout.size,), -1)


# --- selecting them -------------------------------------------------------------------------------


class SelectingWalk(Walk):
    """A walk that selects units of some experts where it can.

    Parameters
    ----------
    selection : with a specification.
    trial : a pass of the model over a few samples.
    """

    def __init__(
        self,
        model: nn.Module,
        ridge: float | None,
        mask: Mask | None,
        experts: Mapping[str, nn.Module],
        selection: Selection,
        spec: PermutationSpec,
        steps: Sequence[Step],
        trial: MergedPass,
    ) -> None:
        super().__init__(model, ridge, mask)
        self._networks = {name: state_of(expert) for name, expert in experts.items()}
        self._networks[MEANS] = self.weights
        self.passes = len(self._networks)
        self._selection = selection
        are_apart = partial(self._are_apart, trial)
        pools, selection.left = find_pools(self.network, steps, spec, are_apart)
        selection.kept = {}
        self._pools = {step: pool for pool in pools for step in (pool.maker, pool.reader)}
        self._offered: dict[str, tuple[Tensor, Tensor]] = {}

    def take(self, step: Step) -> None:
        pool = self._pools.get(step)
        if pool is None:
            super().take(step)
        elif step is pool.maker:
            self._offer(pool)
        else:
            self._choose(pool)

    def inputs(self, step: Step, stream: Stream) -> tuple[Tensor, Tensor | None]:
        """As for any walk; the units of all networks side by side where they are selected."""
        pool = self._pools.get(step)
        if pool is None or step is pool.maker:
            return super().inputs(step, stream)
        found = [each.at(step, CALLER) for each in stream.merged]
        return pool.side_by_side([each.x for each in found], self.dim(step)), found[0].held

    def target(self, step: Step, stream: Stream) -> Tensor:
        """As for any walk; those of all networks side by side where units are made."""
        pool = self._pools.get(step)
        if pool is None or step is pool.reader:
            return super().target(step, stream)
        return torch.cat(self.targets(step, stream), self.dim(step))

    def _are_apart(self, trial: MergedPass, pool: Pool) -> bool:
        """Whether each unit is made from its own rows alone: it is the same wherever it stands."""
        twice = torch.arange(len(pool.made)) // 2
        rows = torch.empty(pool.made.numel(), dtype=torch.int64)
        rows[pool.made] = pool.made[twice]
        weight = torch.cat([self.matrix(name) for name in pool.maker.layers])
        entries = self.entries(pool.maker, weight[rows], self.biases(pool.maker)[rows])
        x = trial.at(pool.reader, CALLER).x
        with_others = trial.use(entries).at(pool.reader, CALLER).x
        trial.use({name: self.weights[name] for name in entries})
        dim = self.dim(pool.reader)
        was, now = (
            each.index_select(dim, read.flatten().to(x.device))
            for each, read in ((x, pool.read[twice]), (with_others, pool.read))
        )
        return bool((was - now).abs().max() <= _APART * x.abs().max())

    def _offer(self, pool: Pool) -> None:
        """Fits the units of each network, and has a pass make them."""
        networks = list(self._networks.values())
        solved = self.solved(pool.maker, self.equations(pool.maker), networks)
        weight, bias = (each.unflatten(0, (len(networks), -1)) for each in solved)
        self._offered[pool.group] = weight, bias
        for number in range(len(networks)):
            entries = self.entries(pool.maker, weight[number], bias[number])
            for stream in self.streams:
                stream.merged[number].use(entries)

    def _choose(self, pool: Pool) -> None:
        """Keeps the best units, and solves the layers that read them."""
        [equations] = self.equations(pool.reader)
        names, count, units = list(self._networks), self.passes, len(pool.read)
        matrices = [
            torch.cat([self.matrix(name, own) for name in pool.reader.layers])
            for own in self._networks.values()
        ]
        start = pool.side_by_side(matrices, 1).double() / count
        gram, cross, pull = equations.system(self.ridge, self.is_biased(pool.reader))
        block = len(gram) // (units * count)
        means = torch.arange(units) * count + count - 1
        kept, solved = select_blocks(
            gram, cross + pull * start.T, block, means, pool.reader.layers[0]
        )
        kept = kept.cpu()
        bias = equations.xy.y.mean - equations.xx.mean_x[entries_of(kept, block)] @ solved
        weight = torch.empty_like(solved.T)
        weight[:, entries_of(pool.read.flatten(), block // pool.read.shape[1])] = solved.T
        self.write(pool.reader, weight, bias)
        unit, network = kept // count, kept % count
        weight, bias = (
            offered[network[:, None], pool.made[unit]].flatten(0, 1)[pool.made.flatten().argsort()]
            for offered in self._offered.pop(pool.group)
        )
        self.write(pool.maker, weight, bias)
        order = torch.empty_like(pool.read.flatten())
        order[pool.read.flatten()] = entries_of(kept, pool.read.shape[1])
        own = {name: self.weights[name] for name in self.entries(pool.maker, weight, bias)}
        for stream in self.streams:
            if stream.merged[0].in_lockstep:
                x, _ = self.inputs(pool.reader, stream)
                x = x.index_select(self.dim(pool.reader), order.to(x.device))
                for each in stream.merged:
                    each.read(x)
            for each in stream.merged:
                each.use(own)
        self._selection.kept[", ".join(pool.reader.layers)] = {
            name: unit[network == number].tolist() for number, name in enumerate(names)
        }
