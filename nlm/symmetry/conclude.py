"""From axes to a specification: names for the groups, layouts for the parameters, sites."""

from collections.abc import Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nlm.symmetry import layout as text
from nlm.symmetry.atoms import Atom, Axis, find_selector, leaves, resolve, size_of
from nlm.symmetry.dependence import (
    families,
    parents_of,
    rows,
    selects_behind,
    settle,
    tell_apart,
    unwritable,
)
from nlm.symmetry.graph import Graph
from nlm.symmetry.handlers import Array
from nlm.symmetry.layout import Family, Fixed, Layout, Ref, Sum, product, references
from nlm.symmetry.permutation import AxisGroup
from nlm.symmetry.spec import PermutationSpec, Site
from nlm.symmetry.stacks import shape, stack_of

if TYPE_CHECKING:
    from nlm.symmetry.discover import Reader


def conclude(
    reader: "Reader", state: Mapping[str, Tensor], graph: Graph, modules: dict[str, nn.Module]
) -> PermutationSpec:
    """The specification that the axes allow."""
    stacks = {name: of for each in reader.siblings for name, of in each.names.items()}
    owner = stack_of(stacks)
    names = dict.fromkeys(owner.get(entry, entry) for entry in state)
    shapes = {name: shape(stacks, name, state) for name in names}
    entries = {name: reader.entries.get(name) for name in shapes}
    tell_apart(reader.records, [x for x in entries.values() if x is not None])
    settle(reader.records, [x for x in entries.values() if x is not None])
    outermost = [atom for each in reader.siblings for atom in each.axis]
    parents = parents_of(reader.records, entries, outermost)
    writer = _Writer(entries, parents, set(stacks))
    params = {
        name: tuple(map(Fixed, shapes[name])) if x is None else writer.layouts(x.axes)
        for name, x in entries.items()
    }
    groups = writer.groups(params, parents)
    reader.names = {atom: name for atom, name in writer.names.items() if name in groups}
    sites = {}
    reader.shown = dict(_module_outputs(reader, graph, modules))
    for module, x in reader.shown.items():
        for dim, axis in enumerate(x.axes):
            seen = writer.seen(axis)
            if seen is not None and any(ref.group in groups for ref in references(seen)):
                sites[module] = Site(dim, seen)
                break
    pinned = {
        f"{name}:{dim}": _why(axis)
        for name, x in entries.items()
        if x is not None
        for dim, axis in enumerate(x.axes)
        if size_of(axis) > 1 and not any(references(params[name][dim]))
    }
    return PermutationSpec(
        groups, params, sites, graph.outputs, dict(reader.opaque), pinned, stacks=stacks
    )


def _why(axis: Axis) -> str:
    for leaf in leaves(axis):
        if leaf.pinned:
            return leaf.pinned
    return "not read"


def _module_outputs(
    reader: "Reader", graph: Graph, modules: dict[str, nn.Module]
) -> Iterator[tuple[str, Array]]:
    """The modules that ran once and returned one tensor, with what is known of it."""
    last: dict[str, Array] = {}
    inside = {node for each in reader.siblings for node in each.index}
    for node, value in reader.values.items():
        stack = node.meta.get("nn_module_stack") or {}
        if isinstance(value, Array):
            for path, _ in stack.values():
                name = path.removeprefix("model").removeprefix(".")
                shape = graph.module_shapes.get(name)
                if shape == [size_of(axis) for axis in value.axes]:
                    last.pop(name, None)
                    if node not in inside:  # where the sibling's index is not to be seen
                        last[name] = value
    for name, value in last.items():
        if name in modules and name:
            yield name, value


# --- writing --------------------------------------------------------------------------------------


class _Writer:
    """Names the groups in the order in which they are met and writes layouts."""

    def __init__(
        self,
        entries: Mapping[str, Array | None],
        parents: Mapping[Atom, list[Atom]],
        stacks: Set[str],
    ) -> None:
        self.names: dict[Atom, str] = {}
        self.still: dict[Atom, str] = {}
        self.origins: dict[str, str] = {}
        needed = {other for own in parents.values() for other in own if other not in parents}
        for name, x in entries.items():
            for dim, axis in enumerate(x.axes if x is not None else ()):
                for leaf in leaves(axis):
                    self._name(leaf, name, dim - (name in stacks), parents, needed)

    def _name(
        self, leaf: Atom, entry: str, dim: int, parents: Mapping[Atom, Any], needed: set[Atom]
    ) -> None:
        if leaf in parents and leaf not in self.names:
            self.names[leaf] = f"g{len(self.names)}"
        elif leaf in needed and leaf not in self.still:
            self.still[leaf] = f"f{len(self.still)}"
        name = self.names.get(leaf) or self.still.get(leaf)
        if name is not None and (name not in self.origins or (dim <= 0 and self._late(name))):
            module = entry.rpartition(".")[0] or entry
            self.origins[name] = module if dim <= 0 else f"{module} (input)"

    def _late(self, name: str) -> bool:
        return self.origins[name].endswith(" (input)")

    def layouts(self, axes: list[Axis]) -> tuple[Layout, ...]:
        """The layouts of a parameter's dimensions."""
        return tuple(self._product(resolve(axis), axes) for axis in axes)

    def seen(self, axis: Axis) -> Layout | None:
        """The layout of an activation's dimension; None where it hangs on another dimension."""
        if unwritable([axis]):
            return None
        return self._product(resolve(axis), [axis])

    def _product(self, atoms: Axis, axes: list[Axis]) -> Layout:
        found: list[Layout] = []
        for number, atom in enumerate(atoms):
            if atom.kind == "leaf":
                name = self.names.get(atom) or self.still.get(atom)
                found.append(Fixed(atom.size) if name is None else Ref(name, atom.size))
            elif atom.kind == "family":
                selector = find_selector(atom)
                members = [self._product(resolve(part), axes) for part in atom.parts]
                sizes = [size_of(part) for part in selector.parts]
                every = [m for m, size in zip(members, sizes, strict=True) for _ in range(size)]
                found.append(Family(self._selector(selector), tuple(every)))
            elif selects_behind(atom, atoms[number:], axes):
                found.append(
                    _sum([self._product(row, [row]) for row in rows(atom, atoms[number + 1 :])])
                )
                break
            elif atom in map(find_selector, families(axes)):
                found.append(Ref(self._selector(atom), atom.size))
            else:
                found.append(_sum([self._product(resolve(part), axes) for part in atom.parts]))
        return product(*found)

    def _selector(self, atom: Atom) -> str:
        if atom not in self.still:
            self.still[atom] = f"f{len(self.still)}"
            self.origins[self.still[atom]] = "selects"
        return self.still[atom]

    def groups(
        self, params: Mapping[str, tuple[Layout, ...]], parents: Mapping[Atom, list[Atom]]
    ) -> dict[str, AxisGroup]:
        """The groups that the parameters' layouts mention, with their parents."""
        atoms = {name: atom for atom, name in (*self.names.items(), *self.still.items())}
        used = {
            ref.group for dims in params.values() for layout in dims for ref in references(layout)
        }
        used |= {name for dims in params.values() for part in dims for name in text.selectors(part)}
        found: dict[str, AxisGroup] = {}
        for name, atom in sorted(atoms.items(), key=lambda item: (item[0][0], int(item[0][1:]))):
            if name not in used:
                continue
            own = sorted(parents.get(atom, ()), key=lambda each: len(parents.get(each, ())))
            names = tuple(self.names.get(each) or self.still[each] for each in own)
            fixed = atom in self.still
            found[name] = AxisGroup(name, atom.size, names, self.origins[name], fixed)
        return found


def _sum(parts: list[Layout]) -> Layout:
    flat = [each for part in parts for each in (part.parts if isinstance(part, Sum) else (part,))]
    if all(isinstance(part, Fixed) for part in flat):
        return Fixed(sum(part.size for part in flat))
    return Sum(tuple(flat))
