"""Gauge: the orthogonal maps of a network's units that leave its function as it is."""

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nlm._state_dict import place_of
from nlm.checkpoint.texts import build
from nlm.gauge.flow import Norm, Read, Scale
from nlm.symmetry import PermutationSpec
from nlm.symmetry import permutation as permutations
from nlm.symmetry.blocks import Block, blocks
from nlm.symmetry.stacks import joined, separated
from nlm.symmetry.text import from_mapping, to_mapping

Rotation = dict[str, Tensor]

_EMPTY = PermutationSpec({}, {})


@dataclass(frozen=True)
class Stream:
    """A residual stream.

    Attributes
    ----------
    norms : what stands between it and the weights that read it.
    reads : all weights that read it.
    keeps_ones : whether its maps keep the all-ones vector, which LayerNorm subtracts.
    centred : whether its mean has no effect and is taken out of all that write and read it.
    shown : modules whose outputs are the normed stream.
    scales : the gains on what weights write to it, which go into these weights.
    """

    norms: tuple[Norm, ...]
    reads: tuple[Read, ...]
    keeps_ones: bool
    centred: bool
    shown: tuple[str, ...] = ()
    scales: tuple[Scale, ...] = ()

    @property
    def gains(self) -> set[str]:
        """The entries that folding makes plain, and that do not rotate."""
        return {norm.gain for norm in self.norms} | {scale.gain for scale in self.scales}


@dataclass(frozen=True)
class Shift:
    """One block of a bias inside a head that is free, or counts only by what a weight makes of it.

    A key's bias moves all scores of a query alike: it is set to 0. Attention weights add up to 1:
    a value's bias goes, through the output's weight (``into``), into the output's bias.
    """

    bias: str
    block: int
    into: Read | None = None


@dataclass(frozen=True)
class Gauge:
    """The continuous symmetries of a network, beside its permutations.

    Attributes
    ----------
    spec : its permutations; ``streams`` and ``inner`` are groups of it.
    streams : residual streams, by group.
    inner : groups inside others (the units of a head) that rotate as they are.
    shifts : the biases inside heads that a rotation would carry along for nothing.
    untied : entries that share one tensor in the model and no longer do once gains are folded.
    shared : entries that still do, the one by which the model uses it first.
    error : the largest relative change of the outputs that the proof saw; dtype : computed in.
    """

    spec: PermutationSpec
    streams: dict[str, Stream]
    inner: tuple[str, ...] = ()
    shifts: tuple[Shift, ...] = ()
    untied: tuple[tuple[str, ...], ...] = ()
    shared: tuple[tuple[str, ...], ...] = ()
    error: float = 0.0
    dtype: str = "float64"

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that rotate: streams and inner ones."""
        return (*self.streams, *self.inner)

    def fold(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``state_dict`` with the same function and plain norms: gain 1, bias 0, means taken out.

        The gain g and bias b of a norm go into its readers, W -> W g, c -> c + W b; where one of
        them has no bias of its own, b stays as b / g. With LayerNorm the mean of the stream has no
        effect: it is taken out of the readers' rows and out of all that writes to the stream.
        Computed in float64, returned in the dtypes that came.

        Raises
        ------
        ValueError
            Other entries or shapes than the specification's; a gain of 0 beside a bias that stays.
        """
        return self._mapped(state_dict, self.fold_)

    def apply(
        self, rotation: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """A folded ``state_dict``, of the same function, in another gauge: each group's x -> Q x.

        Parameters
        ----------
        rotation : group -> orthogonal float64 ``[*parent sizes, n, n]``; absent groups stay. For
            streams that ``keeps_ones``, Q 1 = 1.

        Raises
        ------
        ValueError
            No group that rotates, another shape, a matrix that is not orthogonal; another state.
        """
        self.check(rotation)
        return self._mapped(state_dict, lambda state: self.rotate_(rotation, state))

    def random(self, seed: int = 0) -> Rotation:
        """A uniformly drawn rotation of every group, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for group in self.groups:
            *parents, size = permutations.index_shape(self.spec.groups, group)
            kept = self.keeps_ones(group)
            noise = torch.randn(
                *parents, size - kept, size - kept, generator=generator, dtype=torch.float64
            )
            q, r = torch.linalg.qr(noise)
            drawn[group] = around_ones(q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :], kept)
        return drawn

    def keeps_ones(self, group: str) -> bool:
        """Whether the maps of a group keep the all-ones vector."""
        return group in self.streams and self.streams[group].keeps_ones

    def check(self, rotation: Mapping[str, Tensor]) -> None:
        """Raises ValueError where something is no rotation of this gauge."""
        for group, q in rotation.items():
            if group not in self.groups:
                raise ValueError(
                    f"nlm.gauge: a rotation names groups that rotate ({', '.join(self.groups)}), "
                    f"got {group!r}"
                )
            *parents, size = permutations.index_shape(self.spec.groups, group)
            if list(q.shape) != [*parents, size, size]:
                raise ValueError(
                    f"nlm.gauge: the matrices of a group are [*parent sizes, n, n], got "
                    f"{list(q.shape)} for {group!r} of {[*parents, size]}"
                )
            q = q.double()
            error = float((q @ q.mT - torch.eye(size, dtype=q.dtype)).abs().max())
            if self.keeps_ones(group):
                error = max(error, float((q.sum(-1) - 1).abs().max()))
            if not error < 1e-8:
                kept = " and keeps the all-ones vector" if self.keeps_ones(group) else ""
                raise ValueError(
                    f"nlm.gauge: a rotation is orthogonal{kept}, got a deviation of {error:.1e} "
                    f"for {group!r}"
                )

    def untie(self, model: nn.Module) -> nn.Module:
        """A copy of a model that holds folded weights: tied entries apart, and said so."""
        return untied(model, self.untied)

    def to_mapping(self) -> dict[str, Any]:
        """The gauge as plain dicts, lists, texts and numbers."""
        return {**asdict(replace(self, spec=_EMPTY)), "spec": to_mapping(self.spec)}

    @classmethod
    def from_mapping(cls, text: Mapping[str, Any]) -> "Gauge":
        """The gauge that :meth:`to_mapping` described in ``text``.

        Raises
        ------
        KeyError, ValueError
            A part is missing or has another form than it should.
        """
        plain = build(cls, {**text, "spec": {"groups": {}, "params": {}}})
        found = replace(plain, spec=from_mapping(text["spec"], "a gauge"))
        if strangers := set(found.groups) - set(found.spec.groups):
            raise ValueError(
                f"nlm.gauge: a gauge rotates groups of its specification, got {min(strangers)!r}"
            )
        return found

    # --- on float64 entries, stacks joined --------------------------------------------------------

    def fold_(self, state: dict[str, Tensor]) -> None:
        """Folds norms, means and biases inside a state dict of float64 tensors of its own."""
        for group, stream in self.streams.items():
            for scale in stream.scales:
                _fold_scale(scale, state)
            for norm in stream.norms:
                self._fold_norm(norm, state, stream.centred)
            if stream.centred:
                read = {(each.weight, each.dim) for each in stream.reads}
                kept = stream.gains | {norm.bias for norm in stream.norms}
                for name, dim in self.spec.carriers(group):
                    if name not in kept and (name, dim) not in read:
                        _centre(state, name, dim)
        for shift in self.shifts:
            self.shift_(shift, state)
        for used, *others in self.shared:
            if used in state:
                state.update((name, state[used].clone()) for name in others)

    def _fold_norm(self, norm: Norm, state: dict[str, Tensor], centred: bool) -> None:
        stays = bool(norm.bias) and not all(read.bias for read in norm.reads)
        gain = state[norm.gain] + norm.offset if norm.gain else None
        bias = state[norm.bias] if norm.bias else None
        for read in norm.reads:
            weight = state[read.weight].movedim(read.dim, -1)
            if bias is not None and not stays:
                state[read.bias] += weight @ bias
            if gain is not None:
                weight *= gain
            if centred and not stays:
                weight -= weight.mean(-1, keepdim=True)
        if bias is not None:
            if not stays:
                bias.zero_()
            elif gain is not None:
                if bool(((gain == 0) & (bias != 0)).any()):
                    raise ValueError(
                        f"nlm.gauge: a gain is not 0 where the bias stays in the norm (a reader "
                        f"has no bias of its own), got 0 in {norm.gain!r}"
                    )
                bias /= torch.where(gain == 0, 1.0, gain)
        if norm.gain:
            state[norm.gain].fill_(1 - norm.offset)

    def shift_(self, shift: Shift, state: dict[str, Tensor]) -> None:
        """Takes the block that ``shift`` names out of its bias in ``state``, and on."""
        block = self.blocks(shift.bias, state)[shift.block]
        values = block.view(state[shift.bias])
        if shift.into is not None:
            into = shift.into
            for other in self.blocks(into.weight, state):
                labels = {
                    axis.group: n for n, axis in enumerate(other.axes) if axis.dim == into.dim
                }
                if all(axis.group in labels for axis in block.axes):
                    out = [n for n, axis in enumerate(other.axes) if axis.dim != into.dim]
                    made = torch.einsum(
                        other.view(state[into.weight]), list(range(len(other.axes))),
                        values, [labels[axis.group] for axis in block.axes], out,
                    )  # fmt: skip
                    state[into.bias] += made.reshape(state[into.bias].shape)
        values.zero_()

    def rotate_(self, rotation: Mapping[str, Tensor], state: dict[str, Tensor]) -> None:
        """Rotates a state dict of float64 tensors of its own."""
        gains = set().union(*(stream.gains for stream in self.streams.values()))
        for name in dict.fromkeys(name for g in rotation for name, _ in self.spec.carriers(g)):
            if name not in gains:
                for block in self.blocks(name, state):
                    self._rotate_block(block, rotation, state[name])

    def _rotate_block(self, block: Block, rotation: Mapping[str, Tensor], tensor: Tensor) -> None:
        view = block.view(tensor)
        count = len(block.axes)
        for number, axis in enumerate(block.axes):
            if axis.group is None or axis.group not in rotation:
                continue
            matrices = rotation[axis.group].to(view)
            labels: list[int] = []
            for parent in self.spec.groups[axis.group].parents:
                if parent in block.at:
                    matrices = matrices.select(len(labels), block.at[parent])
                else:
                    labels.append(block.axis_of_parent(parent, number))
            out = [count if label == number else label for label in range(count)]
            made = torch.einsum(matrices, [*labels, count, number], view, list(range(count)), out)
            view.copy_(made)

    def blocks(self, name: str, state: Mapping[str, Tensor]) -> list[Block]:
        """The grids that the parameter ``name`` of ``state`` is made of."""
        return blocks(self.spec.params[name], state[name].shape)

    def _mapped(
        self, state_dict: Mapping[str, Tensor], change: Callable[[dict[str, Tensor]], None]
    ) -> dict[str, Tensor]:
        """A state dict after a change in place of a float64 copy of what the gauge touches."""
        self.spec.check_state_dict(state_dict)
        touched = set(self.touched())
        state = {
            name: tensor.detach().to(torch.float64, copy=True)
            if name in touched and tensor.is_floating_point()
            else tensor.detach().clone()
            for name, tensor in joined(self.spec.stacks, state_dict).items()
        }
        change(state)
        found = separated(self.spec.stacks, state)
        return {name: found[name].to(tensor.dtype) for name, tensor in state_dict.items()}

    def touched(self) -> Iterator[str]:
        """The entries that folding or rotating may change."""
        for group in self.groups:
            yield from (name for name, _ in self.spec.carriers(group))
        for stream in self.streams.values():
            yield from (read.bias for read in stream.reads)
        yield from (shift.into.bias for shift in self.shifts if shift.into is not None)
        yield from (name for names in self.shared for name in names)


def _fold_scale(scale: Scale, state: Mapping[str, Tensor]) -> None:
    gain = state[scale.gain] + scale.offset
    state[scale.weight].movedim(scale.dim, -1).mul_(gain)
    if scale.bias:
        state[scale.bias] *= gain
    state[scale.gain].fill_(1 - scale.offset)


def _centre(state: Mapping[str, Tensor], name: str, dim: int) -> None:
    state[name] -= state[name].mean(dim, keepdim=True)


def around_ones(q: Tensor, keeps_ones: bool) -> Tensor:
    """U q U^T + 1 1^T / n: the map q of the complement of the all-ones vector, which it keeps."""
    if not keeps_ones:
        return q
    basis = complement_of_ones(q.shape[-1] + 1)
    return basis @ q @ basis.mT + 1 / len(basis)


def complement_of_ones(size: int) -> Tensor:
    """An orthonormal basis of the vectors whose mean is 0, float64 [n, n - 1]: Helmert's."""
    rows = torch.arange(1, size, dtype=torch.float64)
    basis = torch.ones(size, size - 1, dtype=torch.float64).triu()
    basis[1:].diagonal().copy_(-rows)
    return basis / (rows * (rows + 1)).sqrt()


def ties(model: nn.Module) -> list[tuple[str, ...]]:
    """The entries that are one parameter, or several that share its numbers."""
    names: dict[Hashable, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter):
            names.setdefault(place_of(tensor), []).append(name)
    return [tuple(of) for of in names.values() if len(of) > 1]


def untied(model: nn.Module, apart: Iterable[tuple[str, ...]]) -> nn.Module:
    """A copy of a model whose tied entries have tensors of their own; its config says so."""
    together = ties(model)
    model = copy.deepcopy(model)
    for first, *others in together:  # a copied parameter has numbers of its own
        for name in others:
            model.get_parameter(name).data = model.get_parameter(first).data
    for _, *others in apart:
        for name in others:
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            tied = getattr(module, attribute)
            setattr(module, attribute, nn.Parameter(tied.detach().clone(), tied.requires_grad))
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
    return model
