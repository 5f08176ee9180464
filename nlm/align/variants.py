"""What activation matching does with heads and with the residual stream, by their published names.

Verma and Elbayad, "Merging Text Transformer Models from Different Initializations" (2024),
arXiv:2403.00986. Here every variant is a smaller specification, or other places to look at, and so
as exact as the whole; but for "ignore-heads", which is no symmetry (:func:`without_heads`).

A residual stream is told by its places: a group without parents or units inside that a module
shows alone, then modules show other groups, and then one shows it again, since what the block
between has computed was added to it. (Channels that a gate multiplies look the same.)
"""

import math
from dataclasses import replace

from nlm.symmetry import Layout, PermutationSpec, Ref
from nlm.symmetry.layout import Family, Product, Sum, pin, product, references

HEADS = ("matched", "monotonic", "identity")
RESIDUAL = ("identity", "first", "last", "all")


def restricted(spec: PermutationSpec, heads: str, residual: str) -> PermutationSpec:
    """The specification of what a variant permutes; see :func:`nlm.align.activation_matching`.

    Raises
    ------
    ValueError
        There is no such variant.
    """
    if heads not in HEADS:
        raise ValueError(
            f"nlm.align: heads are one of {', '.join(HEADS)} (ignored they are no symmetry, see "
            f"nlm.align.without_heads), got {heads!r}"
        )
    if residual not in RESIDUAL:
        raise ValueError(
            f"nlm.align: the residual stream is one of {', '.join(RESIDUAL)}, got {residual!r}"
        )
    still = set(streams(spec)) if residual == "identity" else set()
    if heads != "matched":
        still |= _outer(spec)
    if heads == "identity":
        still |= {name for name, group in spec.groups.items() if group.parents}
    return spec.restrict(set(spec.free) - still) if still else spec


def streams(spec: PermutationSpec) -> list[str]:
    """The groups that are residual streams."""
    outer = _outer(spec)
    places: dict[str, list[int]] = {}
    shown: list[set[str]] = []
    for number, site in enumerate(spec.sites.values()):
        shown.append({ref.group for ref in references(site.layout)})
        if isinstance(site.layout, Ref):
            places.setdefault(site.layout.group, []).append(number)
    return [
        name
        for name, group in spec.free.items()
        if name in places and not group.parents and name not in outer
        if any(name not in each for each in shown[places[name][0] : places[name][-1]])
    ]


def stream_sites(spec: PermutationSpec, stream: str) -> list[str]:
    """The modules that show a stream, in order: its norms.

    Of a stream without norms those that have no weights of their own, or else all: a module that
    has some shows what is added to the stream. A norm has vectors for weights, and no statistics.
    """
    alone = Ref(stream, spec.groups[stream].size)
    ranks: dict[str, list[int]] = {
        module: [] for module, site in spec.sites.items() if site.layout == alone
    }
    for name, layouts in spec.params.items():
        if (module := name.rpartition(".")[0]) in ranks:
            ranks[module].append(len(layouts))
    norms = [module for module, dims in ranks.items() if dims and set(dims) == {1}]
    return norms or [module for module, dims in ranks.items() if not dims] or list(ranks)


def without_heads(spec: PermutationSpec) -> PermutationSpec:
    """The units of all heads of a layer as one flat group: "ignore-heads", for comparison alone.

    ``spec`` is left as it is. What comes back is no symmetry (units leave their heads), so
    :func:`nlm.align.align` refuses it; :func:`nlm.align.activation_matching`, which proves nothing,
    takes it, and its ``apply`` makes of the second model one of another function.

    Raises
    ------
    ValueError
        Units stand otherwise than behind their heads: in heads that several queries share, or in
        experts.
    """
    inner = {name: group for name, group in spec.free.items() if group.parents}
    outer = _outer(spec)
    sizes = {
        name: math.prod(spec.groups[each].size for each in (*group.parents, name))
        for name, group in inner.items()
    }

    def flat(layout: Layout) -> Layout:
        if isinstance(layout, (Sum, Family)):
            return replace(layout, parts=tuple(map(flat, layout.parts)))
        parts = list(layout.parts) if isinstance(layout, Product) else [layout]
        for name, group in inner.items():
            run = [Ref(each, spec.groups[each].size) for each in (*group.parents, name)]
            for start in range(len(parts) - len(run) + 1):
                if parts[start : start + len(run)] == run:
                    parts[start : start + len(run)] = [Ref(name, sizes[name])]
        for ref in (ref for part in parts for ref in references(part)):
            if ref.size != sizes.get(ref.group, ref.size):
                raise ValueError(
                    f"nlm.align: heads are ignored where units stand behind them, as in heads x "
                    f"units, got {str(layout)!r}"
                )
        return pin(product(*parts), outer)

    return replace(
        spec,
        groups={
            name: replace(group, parents=(), size=sizes.get(name, group.size))
            for name, group in spec.groups.items()
            if name not in outer
        },
        params={name: tuple(map(flat, layouts)) for name, layouts in spec.params.items()},
        sites={name: replace(site, layout=flat(site.layout)) for name, site in spec.sites.items()},
        pinned=spec.pinned | dict.fromkeys(sorted(outer), "heads ignored"),
        verified=None,
    )


def _outer(spec: PermutationSpec) -> set[str]:
    """The groups that have others inside: heads, experts."""
    return {parent for group in spec.groups.values() for parent in group.parents}
