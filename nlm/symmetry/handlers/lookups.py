"""How looking up acts on axes: indices, ranks, and the values that name positions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from nlm.symmetry.atoms import Axis, fixed, is_wild, leaves, pin, resolve, size_of
from nlm.symmetry.axes import broadcast, unify
from nlm.symmetry.handlers.registry import (
    Array,
    Lookup,
    NotUnderstood,
    Step,
    dim_of,
    handler,
    replaced,
)
from nlm.symmetry.handlers.shapes import slice_


def look_up(axis: Axis, index: Array, why: str) -> None:
    """The values of an index name positions along an axis: that of which they are, or none."""
    if index.over is None or is_wild(index.over):
        pin(axis, why)
    else:
        unify(axis, index.over)


def used(index: Array) -> frozenset[Lookup]:
    return frozenset() if index.lookup is None else frozenset([index.lookup])


@handler("embedding", looks_up=True)
def embedding(step: Step, weight: Array, index: Array, *rest: Any, **more: Any) -> Array:
    look_up(weight.axes[0], index, "looked up by number")
    return Array([*index.axes, *weight.axes[1:]], lookups=used(index))


@handler("_embedding_bag", "_embedding_bag_forward_only", looks_up=True)
def embedding_bag(step: Step, weight: Array, index: Array, *rest: Any) -> tuple[Array, ...]:
    pin(weight.axes[0], "looked up by number")
    step.record(weight.axes[1:])
    for x in (index, *(each for each in rest if isinstance(each, Array))):
        for axis in (*x.axes, x.over or []):
            pin(axis, "looked up by number")
    bags, *others = step.shapes
    sizes = ([fixed(size, "bags") for size in shape] for shape in others)
    return Array([fixed(bags[0], "bags"), weight.axes[1]]), *map(Array, sizes)


@handler("index_select", looks_up=True)
def index_select(step: Step, x: Array, dim: int, index: Array) -> Array:
    before: list[Array | None] = [None] * dim_of(x, dim)
    return index_(step, x, [*before, index])


@handler("index", "_unsafe_index", looks_up=True)
def index_(step: Step, x: Array, indices: Sequence[Array | None]) -> Array:
    given = {dim: index for dim, index in enumerate(indices) if index is not None}
    if len(given) == 1:
        [(dim, index)] = given.items()
        run = _run(index, size_of(x.axes[dim]))
        if run is not None:
            return slice_(step, x, dim, run.start, run.stop)
    if _has_mask(step):
        raise NotUnderstood
    lookups: frozenset[Lookup] = frozenset()
    for dim, index in given.items():
        look_up(x.axes[dim], index, "indexed")
        lookups |= used(index)
    common = broadcast(*(index.axes for index in given.values()))
    dims = list(given)
    kept = [axis for dim, axis in enumerate(x.axes) if dim not in given]
    place = dims[0] if dims[-1] - dims[0] == len(dims) - 1 else 0
    return Array([*kept[:place], *common, *kept[place:]], x.over, lookups=lookups)


def _has_mask(step: Step) -> bool:
    """Whether one of an operation's indices is of booleans."""
    indices = step.node.args[1]
    return any(
        isinstance(each, fx.Node) and each.meta["val"].dtype == torch.bool
        for each in (indices if isinstance(indices, (list, tuple)) else ())
    )


def _run(index: Array, size: int) -> range | None:
    """The positions that a constant index names, where they follow one another."""
    values = index.constant
    if values is None or values.dim() != 1 or values.dtype == torch.bool or not values.numel():
        return None
    positions = [int(value) % size for value in values.tolist()]
    run = range(positions[0], positions[0] + len(positions))
    return run if positions == list(run) else None


@handler("gather", "take_along_dim", looks_up=True)
def gather(step: Step, x: Array, dim: int, index: Array, **more: Any) -> Array:
    if isinstance(dim, Array):
        raise NotUnderstood
    dim = dim_of(x, dim)
    for at, (axis, other) in enumerate(zip(x.axes, index.axes, strict=True)):
        if at == dim:
            look_up(axis, index, "gathered")
        elif size_of(axis) == size_of(other):
            unify(axis, other)
        else:
            pin(axis, "gathered")
            pin(other, "gathered")
    axes = broadcast(index.axes, replaced(x.axes, dim, [])) if x.axes else index.axes
    if [size_of(axis) for axis in axes] != step.shape:
        axes = index.axes
    return Array(axes, x.over, lookups=used(index))


@handler("scatter", "scatter_add", looks_up=True)
def scatter(step: Step, x: Array, dim: int, index: Array, source: Any, **more: Any) -> Array:
    dim = dim_of(x, dim)
    operands = [index, *([source] if isinstance(source, Array) else [])]
    if x.over is not None or any(each.over is not None for each in operands[1:]):
        raise NotUnderstood
    for at in range(len(x.axes)):
        sizes = {size_of(each.axes[at]) for each in operands}
        if len(sizes) > 1 or (at != dim and sizes != {size_of(x.axes[at])}):
            raise NotUnderstood
    common = broadcast(*(each.axes for each in operands))
    if step.name == "scatter" and isinstance(source, Array):
        pin(common[dim], "the last one stays")
    look_up(x.axes[dim], index, "scattered to")
    target = x.axes[dim]
    if is_wild(target):
        known = index.over is not None and not is_wild(index.over)
        target = index.over if known and index.over else fixed(size_of(target), "scattered to")
    others = broadcast(replaced(x.axes, dim, []), replaced(common, dim, []))
    step.record(common)
    return Array(replaced(others, dim, target))


@handler("index_put", looks_up=True)
def index_put(
    step: Step, x: Array, indices: Sequence[Array | None], source: Array, add: bool = False
) -> Array:
    """Writes, or adds, where indices say; these dimensions stay in order."""
    given = {dim: index for dim, index in enumerate(indices) if index is not None}
    dims = list(given)
    if (
        _has_mask(step)
        or dims[-1] - dims[0] != len(dims) - 1
        or any(each is not None and each.over is not None for each in (x, source, *indices))
    ):
        raise NotUnderstood
    common = broadcast(*(index.axes for index in given.values()))
    if not add:
        for axis in common:
            pin(axis, "the last one stays")
    first, last = dims[0], dims[-1] + 1
    written = broadcast([*x.axes[:first], *common, *x.axes[last:]], source.axes)
    before, after = written[:first], written[first + len(common) :]
    step.record(written)
    step.record([*before, *after])
    for dim in dims:
        pin(x.axes[dim], "written to by number")
    places = [fixed(size, "written to by number") for size in step.shape[first:last]]
    return Array([*before, *places, *after])


@handler("one_hot", looks_up=True)
def one_hot(step: Step, index: Array, classes: int = -1) -> Array:
    size = step.shape[-1]
    if index.over is None or is_wild(index.over) or size_of(index.over) != size:
        return Array([*index.axes, fixed(size, "classes")])
    return Array([*index.axes, resolve(index.over)], lookups=frozenset())


# --- ranks ----------------------------------------------------------------------------------------


@handler("topk", "sort", "kthvalue", "msort")
def ranked(step: Step, x: Array, *rest: Any, **more: Any) -> Any:
    """The largest values along a dimension, in order, and where they stand."""
    name = step.name
    place = 0 if name in ("sort", "msort") else 1
    dim = more.get("dim", rest[place] if len(rest) > place else 0 if name == "msort" else -1)
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise NotUnderstood
    dim = dim_of(x, dim)
    step.record(replaced(x.axes, dim))
    kept = len(step.shape) == len(x.axes)
    ranks: list[Axis] = [fixed(step.shape[dim], "ranks")] if kept else []
    axes = replaced(x.axes, dim, *ranks)
    if not step.several:
        return Array(axes)
    return Array(axes), Array(list(axes), over=positions(x, dim))


@handler("argsort")
def argsort(step: Step, x: Array, *rest: Any, **more: Any) -> Array:
    dim = dim_of(x, more.get("dim", next((r for r in rest if type(r) is int), -1)))
    step.record(replaced(x.axes, dim))
    return Array(replaced(x.axes, dim, fixed(step.shape[dim], "ranks")), over=positions(x, dim))


def positions(x: Array, dim: int) -> Axis:
    """What index values found along a dimension name.

    Among equal values the place decides, so that nothing may move.
    """
    axis = x.axes[dim]
    found = list(leaves(axis))
    if x.tied or len(set(found)) < len(found) or any(leaf.wild for leaf in found):
        pin(axis, "ranks of equal values")
        return fixed(size_of(axis), "ranks of equal values")
    return axis
