"""PermutationSpec: which permutations of a network's units leave its function as it is.

It names the axis groups, says for every entry of the state dict how the groups make up its
dimensions, and applies permutations to state dicts. A specification is proven on the model before
anything is matched with it (:meth:`PermutationSpec.verify`): none of the published hand-written
tables was, and several are wrong.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nlm.symmetry import application, stacks
from nlm.symmetry import permutation as permutations
from nlm.symmetry.blocks import blocks
from nlm.symmetry.layout import Layout, is_name, pin, references, selectors
from nlm.symmetry.permutation import AxisGroup, Permutation
from nlm.symmetry.proof import SymmetryError, Verification

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Site:
    """Where units are seen: ``layout`` stands on dimension ``dim`` of a module's output."""

    dim: int
    layout: Layout


@dataclass
class PermutationSpec:
    """The permutation symmetries of a network.

    Attributes
    ----------
    groups : id -> :class:`AxisGroup`; what may be permuted.
    params : name in the state dict -> one layout per dimension.
    sites : module name -> :class:`Site`, in the order of execution.
    outputs : names of the selected outputs; their axes are pinned.
    opaque_ops : operations that were not understood, with how often; they pin what they touch.
    pinned : group id or "parameter:dimension" -> why it stays as it is.
    stacks : name in ``params`` -> the entries of sibling modules that it stands for, along a new
        first dimension (:mod:`nlm.symmetry.stacks`): experts in a list.
    verified : the proof, once :meth:`verify` has been passed; see :attr:`proven`.
    """

    groups: dict[str, AxisGroup]
    params: dict[str, tuple[Layout, ...]]
    sites: dict[str, Site] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    opaque_ops: dict[str, int] = field(default_factory=dict)
    pinned: dict[str, str] = field(default_factory=dict)
    verified: Verification | None = None
    stacks: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stacks.check(self.stacks, self.params)
        for name, group in self.groups.items():
            if not is_name(name):
                raise ValueError(
                    f"nlm.symmetry: a group's name is made of letters, digits, '_', '.' and '-' "
                    f"and starts with a letter or '_', got {name!r}"
                )
            if not 0 <= group.size < 1 << 63 or name in group.parents or _repeat(group.parents):
                raise ValueError(
                    f"nlm.symmetry: a group has 0 or more units and other groups as parents, each "
                    f"once, got {name!r} of {group.size} with parents {list(group.parents)}"
                )
            missing = [parent for parent in group.parents if parent not in self.groups]
            if name != group.id or missing:
                raise ValueError(
                    f"nlm.symmetry: a group stands under its id and its parents are groups, got "
                    f"{name!r} with id {group.id!r} and unknown parents {missing}"
                )
            for parent in group.parents:
                if not set(self.groups[parent].parents) <= set(group.parents):
                    raise ValueError(
                        f"nlm.symmetry: the parents of a group include their own parents, got "
                        f"{name!r} with {group.parents} and {parent!r} with "
                        f"{self.groups[parent].parents}"
                    )
        for name, layouts in self.params.items():
            for ref in (ref for layout in layouts for ref in references(layout)):
                if ref.group in self.groups and self.groups[ref.group].size != ref.size:
                    raise ValueError(
                        f"nlm.symmetry: group {ref.group!r} has {self.groups[ref.group].size} "
                        f"units, got {ref.size} in {name!r}"
                    )
                if ref.group not in self.groups and ref.group not in self.pinned:
                    raise ValueError(
                        f"nlm.symmetry: a layout names groups of the specification, got "
                        f"{ref.group!r} in {name!r}"
                    )

    # --- permutations -----------------------------------------------------------------------------

    @property
    def free(self) -> dict[str, AxisGroup]:
        """The groups that may move, by id."""
        return {name: group for name, group in self.groups.items() if not group.fixed}

    def identity(self) -> Permutation:
        """The permutation that moves nothing."""
        return permutations.check(self.groups, {})

    def random(self, seed: int = 0) -> Permutation:
        """A uniformly drawn permutation of every group, the same for the same seed."""
        return permutations.random(self.groups, seed)

    def compose(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Permutation:
        """The permutation that acts as ``first`` and then ``second``."""
        full = permutations.check(self.groups, first), permutations.check(self.groups, second)
        return permutations.compose(self.groups, *full)

    def inverse(self, permutation: Mapping[str, Tensor]) -> Permutation:
        """The permutation that undoes another one."""
        return permutations.inverse(self.groups, permutations.check(self.groups, permutation))

    def apply(
        self,
        permutation: Mapping[str, Tensor],
        state_dict: Mapping[str, Tensor],
        strict: bool = True,
        *,
        out: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """A state dict of the same function, with its units in another order.

        Parameters
        ----------
        permutation : group id -> int64 ``[*parent sizes, size]``; absent groups are left as they
            are.
        state_dict : name -> tensor of any dtype. A dimension that no group touches may have another
            size than in the specification, since nothing moves along it: an expert may have other
            classes, a larger vocabulary or more positions. The result carries no gradients.
        strict : with False, entries that the specification does not know are copied.
        out : a state dict of the same entries, shapes, types and devices, such as another model's
            ``state_dict()``, that is written to instead of new memory. Its memory is apart from
            ``state_dict``'s. Where experts follow one another this takes about half the time: the
            system zeroes new memory before it is written to.

        Raises
        ------
        ValueError
            A missing or an extra entry, a dimension with groups of another size, an index array
            that is no permutation, or an ``out`` that does not fit or shares memory.
        TypeError
            An entry of ``out`` of another type.
        """
        self.check_state_dict(state_dict, strict=strict)
        return application.apply(self, permutation, state_dict, out)

    def restrict(self, groups: Iterable[str]) -> "PermutationSpec":
        """The same specification with only the given groups free and the others pinned.

        Those on whose index a kept group depends stay as fixed ones; ValueError for unknown ones.
        """
        kept = set(groups)
        if unknown := kept - set(self.groups):
            raise ValueError(
                f"nlm.symmetry: restrict keeps groups of the specification "
                f"({', '.join(self.groups)}), got {sorted(unknown)}"
            )
        needed = {parent for name in kept for parent in self.groups[name].parents} - kept
        for layout in (layout for layouts in self.params.values() for layout in layouts):
            if any(ref.group in kept for ref in references(layout)):
                needed |= set(selectors(layout)) - kept
        dropped = set(self.groups) - kept - needed
        restricted = replace(
            self,
            groups={
                name: replace(group, fixed=group.fixed or name in needed)
                for name, group in self.groups.items()
                if name not in dropped
            },
            params={
                name: tuple(pin(layout, dropped) for layout in layouts)
                for name, layouts in self.params.items()
            },
            sites={
                name: Site(site.dim, layout)
                for name, site in self.sites.items()
                if any(references(layout := pin(site.layout, dropped)))
            },
            pinned=self.pinned | dict.fromkeys(sorted(dropped | needed), "left out by restrict"),
            verified=None,
        )
        if self.verified is not None and self.proven:  # of fewer permutations, hence of these
            restricted.verified = replace(self.verified, digest=restricted.digest())
        return restricted

    # --- checks -----------------------------------------------------------------------------------

    def check_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> None:
        """Raises ValueError where ``state_dict`` does not have the entries and shapes it should.

        A dimension that no group touches may have any size; others may be there unless ``strict``.
        """
        entries = dict.fromkeys(stacks.entries(self.stacks, self.params))
        missing = [name for name in entries if name not in state_dict]
        extra = [name for name in state_dict if name not in entries] if strict else []
        if missing or extra:
            raise ValueError(
                f"nlm.symmetry: a state dict has the entries of its specification, got "
                f"{_listed('missing', missing)}{' and ' if missing and extra else ''}"
                f"{_listed('extra', extra)}"
            )
        for name, layouts in self.params.items():
            shape = stacks.shape(self.stacks, name, state_dict)
            fits = len(shape) == len(layouts) and all(
                size == layout.size or not any(references(layout))
                for size, layout in zip(shape, layouts, strict=True)
            )
            if not fits:
                raise ValueError(
                    f"nlm.symmetry: {name!r} must have the shape of its layout "
                    f"[{', '.join(map(str, layouts))}], got {list(shape)}"
                )

    def verify(
        self,
        model: "nn.Module",
        example_inputs: Any,
        kwargs: Mapping[str, Any] | None = None,
        seeds: int = 3,
        *,
        forward: "Callable[..., Any] | None" = None,
        more_inputs: Iterable[Any] = (),
    ) -> Verification:
        """Proves the specification on a model and keeps the proof in :attr:`verified`.

        Random permutations of all groups at once and of each group alone are applied to a float64
        copy of the model (with its weights perturbed, so that nothing is hidden), and the outputs
        must not change; each group permuted everywhere but in one place must change them (a dead
        network proves nothing). All groups at once are tried on inputs of other shapes too.

        Parameters
        ----------
        model : the network; it is not changed.
        example_inputs, kwargs : its input, or a tuple of its inputs, and keyword arguments.
        seeds : how many permutations of all groups at once are tried.
        forward : runs the model as ``forward(model, example_inputs, **kwargs)`` instead.
        more_inputs : further inputs of other shapes; keyword arguments where one is a mapping (and
            ``forward`` is not given). By default other batch sizes and sequence lengths are cut
            from the example, where the model takes them.

        Raises
        ------
        SymmetryError
            The specification does not hold; the message names the group and, where one explains
            it, the parameter. ``VacuousError``: groups have no effect on the outputs. Either has
            the ``.groups``.
        ValueError
            The inputs are not finite; an earlier proof stands.
        """
        from nlm.symmetry.verify import verify

        try:
            proof = verify(self, model, example_inputs, kwargs or {}, seeds, forward, more_inputs)
        except SymmetryError:
            self.verified = None
            raise
        self.verified = proof
        return proof

    @property
    def proven(self) -> bool:
        """Whether there is a proof, of this specification as it is now."""
        return self.verified is not None and self.verified.digest == self.digest()

    def digest(self) -> str:
        """A hash of what the proof is about: groups, layouts, sites, and the outputs compared."""
        content = [
            sorted(
                (name, group.size, group.parents, group.fixed)
                for name, group in self.groups.items()
            ),
            sorted((name, list(map(str, dims))) for name, dims in self.params.items()),
            [(name, site.dim, str(site.layout)) for name, site in self.sites.items()],
            *([sorted(self.stacks.items())] if self.stacks else []),
            *([["outputs", *self.outputs]] if self.outputs else []),
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    # --- reading ----------------------------------------------------------------------------------

    @property
    def permutation_count(self) -> int:
        """The number of independent permutations: one per group and index of its parents."""
        total = 0
        for group in self.free:
            *parents, _ = permutations.index_shape(self.groups, group)
            copies = 1
            for size in parents:
                copies *= size
            total += copies
        return total

    def carriers(self, group: str) -> list[tuple[str, int]]:
        """The (parameter, dimension) pairs that a group stands on."""
        return [
            (name, dim)
            for name, layouts in self.params.items()
            for dim, layout in enumerate(layouts)
            if any(ref.group == group for ref in references(layout))
        ]

    def observation_sites(self) -> dict[str, str]:
        """Group -> the module whose output shows the group best.

        That is the last that carries nothing but the group and its parents, else the last whose
        other units are fixed there or inside the group, else the last that carries it at all.
        """
        best: dict[str, tuple[int, str]] = {}
        for module, site in self.sites.items():
            parts = blocks((site.layout,), (site.layout.size,), partial=True)
            for block in parts:
                standing = {axis.group for axis in block.axes if axis.group in self.free}
                for group in filter(None, standing):
                    parents = self.groups[group].parents
                    if not all(block.holds(parent) for parent in parents):
                        continue
                    alone = len(parts) == 1 and {axis.group for axis in block.axes} == {
                        group,
                        *parents,
                    }
                    others = standing - {group, *parents}
                    inside = all(group in self.groups[str(name)].parents for name in others)
                    rank = 2 if alone else int(inside)
                    if rank >= best.get(group, (0, ""))[0]:
                        best[group] = rank, module
        return {group: module for group, (_, module) in best.items()}

    def show(self) -> str:
        """A table of the groups and of the layout of every entry."""
        from nlm.symmetry.text import table

        return table(self)

    # --- files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Writes JSON, or YAML where ``path`` ends so; ``force`` replaces a file."""
        from nlm.symmetry.text import write

        write(self, path, force)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PermutationSpec":
        """Reads the JSON or YAML at ``path``; a hand-written specification is not verified.

        The proof of a file that was edited since is dropped, with a warning.
        """
        from nlm.symmetry.text import read

        return read(path)

    def to_axes_to_perm(self) -> dict[str, tuple[str | None, ...]]:
        """The table ``{parameter: (group or None per dimension)}`` of Git Re-Basin's tools.

        Raises
        ------
        ValueError
            A layout is more than one group per dimension, or a group depends on another one: such a
            table cannot say it.
        """
        from nlm.symmetry.axes_to_perm import export_table

        return export_table(self)

    @classmethod
    def from_axes_to_perm(
        cls, table: Mapping[str, Iterable[str | None] | None], state_dict: Mapping[str, Tensor]
    ) -> "PermutationSpec":
        """A specification from Git Re-Basin's table; not verified until :meth:`verify` is passed.

        Entries of ``state_dict`` that the table leaves out are fixed, with one warning.
        """
        from nlm.symmetry.axes_to_perm import import_table

        return import_table(table, state_dict)


def _repeat(names: tuple[str, ...]) -> bool:
    return len(set(names)) < len(names)


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{what} {', '.join(map(repr, names[:5]))}{more}"
