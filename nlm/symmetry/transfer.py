"""A permutation of one network carried over to another one with the same trunk and another head."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from nlm._names import matches
from nlm.symmetry.layout import Family, Fixed, Layout, Ref, references
from nlm.symmetry.permutation import Permutation, index_shape
from nlm.symmetry.spec import PermutationSpec

_WHERE = "nlm.symmetry"


def transferred(
    permutation: Mapping[str, Tensor],
    spec: PermutationSpec,
    other: PermutationSpec,
    heads: str | Iterable[str] = (),
) -> Permutation:
    """The permutation as one of another specification: groups are known by the entries both have.

    Groups of the other one that stand in none of these keep their order.

    Parameters
    ----------
    heads : patterns of entries that are none of the trunk's, whatever they are called.

    Raises
    ------
    ValueError
        An entry that both have is laid out otherwise, so that what is moved here cannot be there.
    """
    of: dict[str, str | None] = {}
    both = [name for name in other.params if name in spec.params and not matches(name, heads)]
    for name in both:
        ours, theirs = spec.params[name], other.params[name]
        for group, known in _pairs(ours, theirs, name):
            if of.setdefault(group, known) != known:
                raise _apart(name, ours, theirs)
    moved = {
        group: permutation[known]
        for group, known in of.items()
        if known is not None and known in permutation
    }
    for group, index in moved.items():
        if tuple(index.shape) != tuple(index_shape(other.groups, group)):
            raise ValueError(
                f"{_WHERE}: a group depends on the same parents in both networks, got "
                f"{list(index.shape)} for {list(index_shape(other.groups, group))} of {group!r}"
            )
    found = set(of.values())
    shared = {group for name in both for group in _groups(spec.params[name])}
    for known in shared & permutation.keys() - found:
        index = permutation[known]
        if not bool((index == torch.arange(index.shape[-1])).all()):
            raise ValueError(
                f"{_WHERE}: what is moved in one network may be moved in the other, got a group "
                f"that is fixed there, {known!r} ({spec.groups[known].origin})"
            )
    return moved


def _pairs(
    ours: tuple[Layout, ...], theirs: tuple[Layout, ...], name: str
) -> Iterator[tuple[str, str | None]]:
    """(group of the other, group of the one) wherever the other has a group."""
    if len(ours) != len(theirs):
        raise _apart(name, ours, theirs)
    for one, other in zip(ours, theirs, strict=True):
        yield from _nodes(one, other, name)


def _nodes(one: Layout, other: Layout, name: str) -> Iterator[tuple[str, str | None]]:
    if isinstance(other, Ref):
        if isinstance(one, Ref) and one.size == other.size:
            yield other.group, one.group
        elif isinstance(one, Fixed) and one.size == other.size:
            yield other.group, None
        else:
            raise _apart(name, (one,), (other,))
    elif isinstance(one, Fixed) or isinstance(other, Fixed):
        yield from ((group, None) for group in _groups((other,)))
    elif type(one) is type(other) and len(one.parts) == len(other.parts):
        if isinstance(one, Family) and isinstance(other, Family):
            yield other.selector, one.selector
        for part, its in zip(one.parts, other.parts, strict=True):
            yield from _nodes(part, its, name)
    else:
        raise _apart(name, (one,), (other,))


def _groups(layouts: tuple[Layout, ...]) -> Iterator[str]:
    for layout in layouts:
        yield from (ref.group for ref in references(layout))


def _apart(name: str, ours: tuple[Layout, ...], theirs: tuple[Layout, ...]) -> ValueError:
    return ValueError(
        f"{_WHERE}: networks with the same trunk lay out its entries alike, got "
        f"[{', '.join(map(str, ours))}] and [{', '.join(map(str, theirs))}] for {name!r}"
    )
