"""Pool and select: whole units and attention heads of several networks instead of means of them.

Where a mean of two units that hardly correlate is like neither, the units of all experts stand side
by side before the layers that read them, and the best are kept, as many as one network has
(:mod:`nlm.correct.elimination`), or their means where these explain more. Heads and other units of
several channels are chosen from the means too. Each expert's units are fitted to what they are in
the expert, from the merged network's own inputs.

That takes units that the layers of one step make and those of another one read, and nothing else:
hidden units, attention heads, groups of heads with one key and value. The specification tells them.

What it leaves between small transformers beside refit, aligned and not, docs/barriers.md says. It
takes a pass of the merged network for each expert, one more, and the elimination.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nlm._modules import is_transformers_conv1d, submodule
from nlm._state_dict import state_of
from nlm.correct.elimination import entries_of, select_blocks
from nlm.correct.normal_equations import NormalEquations
from nlm.correct.passes import MergedPass
from nlm.correct.solving import CALLER, Stream, Walk
from nlm.correct.walk import CONVOLUTIONS, Step
from nlm.statistics import Forward, Mask
from nlm.symmetry import Family, Layout, PermutationSpec, Product, Ref, Sum, trace

Trial = Callable[[ExitStack], MergedPass]

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
        """The specification that was given, or else that of a network that runs on ``batch``.

        Raises
        ------
        ValueError
            None was given, and a function, ``forward``, runs the network.
        """
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

    @property
    def is_single(self) -> bool:
        """Whether a unit is one channel."""
        return self.read.shape[1] == 1

    def order(self, networks: int, size: int) -> Tensor:
        """What the reader's inputs of several networks, one after the other, are by unit.

        ``size`` is the number of inputs for each channel, which a convolution's taps are.
        """
        start = torch.arange(networks, device=self.read.device)[:, None] * self.read.numel()
        return entries_of((self.read[:, None] + start).flatten(), size)


# --- which units can be selected ------------------------------------------------------------------


def find_pools(
    network: nn.Module,
    steps: Sequence[Step],
    spec: PermutationSpec,
    find_apart: Callable[[Sequence[Pool]], set[str]],
) -> tuple[list[Pool], dict[str, str]]:
    """Groups that the layers of one step make and those of another read; why others are not.

    ``find_apart`` finds the groups of which each unit depends on nothing but its own weights.
    """
    found = {
        group: _pool(network, steps, spec, group)
        for group in spec.free
        if not spec.groups[group].parents  # else it goes with its parent
    }
    apart = find_apart([pool for pool in found.values() if isinstance(pool, Pool)])
    pools: list[Pool] = []
    left: dict[str, str] = {}
    taken: set[Step] = set()
    for group, pool in found.items():
        if not isinstance(pool, Pool):
            left[group] = pool
        elif taken & {pool.maker, pool.reader}:
            left[group] = "its layers make or read other units that are selected"
        elif group not in apart:
            left[group] = "its units depend on one another"
        else:
            pools.append(pool)
            taken |= {pool.maker, pool.reader}
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


def _twice(pool: Pool) -> Tensor:
    return torch.arange(len(pool.made)) // 2 * 2


@dataclass(frozen=True)
class _Best:
    """The units that were chosen and the layers that read them, which explain so much."""

    kept: Tensor
    weight: Tensor
    bias: Tensor
    explained: float


class SelectingWalk(Walk):
    """A walk that selects units of some experts where it can.

    Parameters
    ----------
    selection : with a specification.
    trial : makes a pass of the model over a few samples, in lockstep.
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
        trial: Trial,
    ) -> None:
        super().__init__(model, ridge, mask)
        self._networks = {name: state_of(expert) for name, expert in experts.items()}
        self._networks[MEANS] = self.weights
        self.passes = len(self._networks)
        self._selection = selection
        find_apart = partial(self._find_apart, trial, steps)
        pools, selection.left = find_pools(self.network, steps, spec, find_apart)
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

    def inputs(self, step: Step, stream: Stream) -> tuple[list[Tensor], Tensor | None]:
        """As for any walk; where units are selected those of all networks, one after the other.

        Means that are not chosen among stand alone.
        """
        pool = self._pools.get(step)
        if pool is None or step is pool.maker:
            return super().inputs(step, stream)
        found = [each.at(step, CALLER) for each in stream.merged]
        pooled = found[: self._pooled(pool)]
        alone = [each.x for each in found[len(pooled) :]]
        return [torch.cat([each.x for each in pooled], self.dim(step)), *alone], found[0].held

    def _pooled(self, pool: Pool) -> int:
        """The networks whose units are chosen among: the means too where there are few units."""
        return self.passes - pool.is_single

    def target(self, step: Step, stream: Stream) -> Tensor:
        """As for any walk; those of all networks side by side where units are made."""
        pool = self._pools.get(step)
        if pool is None or step is pool.reader:
            return super().target(step, stream)
        return torch.cat(self.targets(step, stream), self.dim(step))

    def _find_apart(self, trial: Trial, steps: Sequence[Step], pools: Sequence[Pool]) -> set[str]:
        """The groups whose units are each made from their own rows: the same wherever they stand.

        Where a trial's step makes units, each second one is made like the one before it; where they
        are read they are compared, and the trial goes on with what it would have read.
        """
        found: set[str] = set()
        tried: dict[Step, list[tuple[Pool, MergedPass]]] = {}
        with ExitStack() as stack:
            plain, free = trial(stack), []
            for step in steps:
                x = plain.at(step, CALLER).x
                for pool, each in tried.pop(step, []):
                    if self._is_apart(pool, x, each.at(step, CALLER).x):
                        found.add(pool.group)
                    each.read(x)
                    each.use({name: self.weights[name] for name in self._doubled(pool)})
                    free.append(each)
                for pool in pools:
                    if pool.maker is step:
                        each = free.pop() if free else trial(stack)
                        each.at(step, CALLER)
                        each.use(self._doubled(pool))
                        tried.setdefault(pool.reader, []).append((pool, each))
        return found

    def _doubled(self, pool: Pool) -> dict[str, Tensor]:
        """Weights and biases with which each unit of an odd number is the one before it."""
        rows = torch.empty(pool.made.numel(), dtype=torch.int64)
        rows[pool.made] = pool.made[_twice(pool)]
        weight = torch.cat([self.matrix(name) for name in pool.maker.layers])
        return self.entries(pool.maker, weight[rows], self.biases(pool.maker)[rows])

    def _is_apart(self, pool: Pool, x: Tensor, with_others: Tensor) -> bool:
        dim = self.dim(pool.reader)
        was, now = (
            each.index_select(dim, read.flatten().to(x.device))
            for each, read in ((x, pool.read[_twice(pool)]), (with_others, pool.read))
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
        names, count = list(self._networks), self._pooled(pool)
        equations, *of_means = self.equations(pool.reader)
        found = self._best(pool, equations, list(self._networks.values())[:count])
        unit, network = found.kept // count, found.kept % count
        for alone in of_means:
            means = self._best(pool, alone, [self.weights])
            if means.explained > found.explained:
                found, unit, network = means, means.kept, torch.full_like(means.kept, count)
        self.write(pool.reader, found.weight, found.bias)
        weight, bias = (
            offered[network[:, None], pool.made[unit]].flatten(0, 1)[pool.made.flatten().argsort()]
            for offered in self._offered.pop(pool.group)
        )
        self.write(pool.maker, weight, bias)
        own = {name: self.weights[name] for name in self.entries(pool.maker, weight, bias)}
        for stream in self.streams:
            if stream.merged[0].in_lockstep:
                x = self._chosen(pool, stream, unit, network)
                for each in stream.merged:
                    each.read(x)
            for each in stream.merged:
                each.use(own)
        self._selection.kept[", ".join(pool.reader.layers)] = {
            name: unit[network == number].tolist() for number, name in enumerate(names)
        }

    def _chosen(self, pool: Pool, stream: Stream, unit: Tensor, network: Tensor) -> Tensor:
        """What the reader is given by the units that are kept."""
        dim, found = (
            self.dim(pool.reader),
            [each.at(pool.reader, CALLER).x for each in stream.merged],
        )
        x = torch.empty_like(found[0])
        for number, own in enumerate(found):
            here = network == number
            to, source = (
                each.flatten().to(x.device) for each in (pool.read[here], pool.read[unit[here]])
            )
            x.index_copy_(dim, to, own.index_select(dim, source))
        return x

    def _best(
        self, pool: Pool, equations: NormalEquations, networks: Sequence[Mapping[str, Tensor]]
    ) -> _Best:
        """As many units as one network has, of those that networks have one after the other."""
        count, units = len(networks), len(pool.read)
        matrices = [
            torch.cat([self.matrix(name, own) for name in pool.reader.layers]) for own in networks
        ]
        gram, cross, pull = equations.system(self.ridge, self.is_biased(pool.reader))
        block = len(gram) // (units * count)
        taps = block // pool.read.shape[1]
        order = pool.order(count, taps).to(gram.device)
        start = torch.cat(matrices, 1)[:, order].double() / self.passes
        gram, cross = gram[order][:, order], cross[order] + pull * start.T
        # with the means among them the means, else the units of one network
        known = torch.arange(units) * count + count - 1
        kept, solved = select_blocks(gram, cross, block, known, pool.reader.layers[0])
        at = entries_of(kept, block)
        weight = torch.empty_like(solved.T)
        weight[:, pool.order(1, taps).to(gram.device)] = solved.T
        bias = equations.xy.y.mean - equations.xx.mean_x[order[at]] @ solved
        return _Best(kept.cpu(), weight, bias, float((solved * cross[at]).sum()))
