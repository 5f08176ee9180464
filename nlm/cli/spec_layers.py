"""A specification as people read it: blocks of layers that are alike are told once.

``encoder.layer.0`` to ``encoder.layer.11`` of a transformer have the same layouts but for the names
of the groups that live inside one layer. Such a run is shown by its first block, times 12.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from nlm.symmetry import AxisGroup, Family, Fixed, Layout, PermutationSpec, Ref
from nlm.symmetry.layout import references, selectors


@dataclass(frozen=True)
class Run:
    """Blocks ``prefix.first`` to ``prefix.last`` that are alike."""

    prefix: str
    first: int
    last: int

    @property
    def times(self) -> int:
        return self.last - self.first + 1

    def __str__(self) -> str:
        return f"{self.prefix}.{self.first}-{self.last}"


@dataclass(frozen=True)
class Entry:
    """An entry of the state dict that is shown, with the runs that it stands for."""

    name: str
    layouts: tuple[Layout, ...]
    runs: tuple[Run, ...]

    @property
    def title(self) -> str:
        """The name with the range of layers in place of the first one's number."""
        title = self.name
        for run in reversed(self.runs):  # the inner ones first: the prefixes are those of the name
            head = f"{run.prefix}.{run.first}"
            title = f"{run}{title[len(head) :]}"
        return title


@dataclass(frozen=True)
class Shown:
    """What is shown of a specification: entries, and groups with how often each occurs."""

    entries: list[Entry]
    groups: list[AxisGroup]
    times: dict[str, int]


def shown(spec: PermutationSpec, fold: bool = True) -> Shown:
    """The entries and groups to show; with ``fold``, one for each run of layers that are alike."""
    names = list(spec.params)
    runs: dict[str, tuple[Run, ...]] = dict.fromkeys(names, ())
    if fold:
        homes = _homes(spec)
        for prefix in _prefixes(names):
            for run in _runs(spec, homes, names, prefix):
                dropped = tuple(f"{prefix}.{k}." for k in range(run.first + 1, run.last + 1))
                names = [name for name in names if not name.startswith(dropped)]
                for name in names:
                    if name.startswith(f"{prefix}.{run.first}."):
                        runs[name] += (run,)
    entries = [Entry(name, spec.params[name], runs[name]) for name in names]
    times: dict[str, int] = {}
    for entry in entries:
        count = 1
        for run in entry.runs:
            count *= run.times
        for group in _groups(spec, entry.layouts):
            times[group] = min(times.get(group, count), count)
    kept = [group for name, group in spec.groups.items() if name in times or not fold]
    return Shown(entries, kept, {group.id: times.get(group.id, 1) for group in kept})


def _groups(spec: PermutationSpec, layouts: tuple[Layout, ...]) -> list[str]:
    """The groups that layouts name, with their parents, by first appearance."""
    found: dict[str, None] = {}
    for layout in layouts:
        for name in (*(ref.group for ref in references(layout)), *selectors(layout)):
            if name in spec.groups:
                found.update(dict.fromkeys((*spec.groups[name].parents, name)))
    return list(found)


def _homes(spec: PermutationSpec) -> dict[str, list[str]]:
    """The entries that each group stands on."""
    homes: dict[str, list[str]] = defaultdict(list)
    for name, layouts in spec.params.items():
        for group in _groups(spec, layouts):
            homes[group].append(name)
    return homes


def _prefixes(names: list[str]) -> list[str]:
    """What stands before a number in the names, the outermost first."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for place in range(1, len(parts)):
            if parts[place].isdigit():
                found[".".join(parts[:place])] = None
    return sorted(found, key=lambda prefix: prefix.count("."))


def _runs(
    spec: PermutationSpec, homes: dict[str, list[str]], names: list[str], prefix: str
) -> Iterator[Run]:
    """The longest runs of two or more consecutive blocks below a prefix that are alike."""
    blocks: dict[int, list[str]] = defaultdict(list)
    for name in names:
        if name.startswith(f"{prefix}."):
            number = name[len(prefix) + 1 :].partition(".")[0]
            if number.isdigit():
                blocks[int(number)].append(name)
    forms = {
        number: _form(spec, homes, inside, f"{prefix}.{number}.")
        for number, inside in sorted(blocks.items())
    }
    for _, alike in groupby(enumerate(forms), lambda pair: (pair[1] - pair[0], forms[pair[1]])):
        numbers = [number for _, number in alike]
        if len(numbers) > 1:
            yield Run(prefix, numbers[0], numbers[-1])


def _form(spec: PermutationSpec, homes: dict[str, list[str]], names: list[str], head: str) -> list:
    """A block without its number and without the names of the groups that live in it alone."""
    local: dict[str, str] = {}
    form: list = []
    for name in names:
        layouts = spec.params[name]
        for group in _groups(spec, layouts):
            if group not in local and all(home.startswith(head) for home in homes[group]):
                local[group] = f"local{len(local)}"
                of = spec.groups[group]
                form.append((of.size, of.fixed, [local.get(above, above) for above in of.parents]))
        form.append((name[len(head) :], [str(_renamed(layout, local)) for layout in layouts]))
    return form


def _renamed(layout: Layout, names: dict[str, str]) -> Layout:
    if isinstance(layout, Ref):
        return Ref(names.get(layout.group, layout.group), layout.size)
    if isinstance(layout, Fixed):
        return layout
    parts = tuple(_renamed(part, names) for part in layout.parts)
    if isinstance(layout, Family):
        return Family(names.get(layout.selector, layout.selector), parts)
    return type(layout)(parts)
