"""How operations that only pass values on act on axes: views, parts, concatenations."""

from collections.abc import Sequence
from typing import Any

import torch

from nlm.symmetry.atoms import Axis, fixed, pin, size_of, wild
from nlm.symmetry.axes import broadcast, view
from nlm.symmetry.handlers.registry import Array, NotUnderstood, Step, dim_of, handler, replaced
from nlm.symmetry.sums import concatenate, cut, stack

# --- the same values in another shape -------------------------------------------------------------


@handler(
    "alias", "detach", "clone", "contiguous", "to", "_to_copy", "type_as", "lift_fresh",
    "lift_fresh_copy", "positive", "resolve_conj", "resolve_neg", "detach_copy", "alias_copy",
    "pin_memory", "_conj", "requires_grad",
    reads=False,
)  # fmt: skip
def identity(step: Step, x: Array, *rest: Any, **more: Any) -> Array:
    return x.shaped(x.axes)


@handler(
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout",
    reads=False,
)  # fmt: skip
def dropout(step: Step, x: Array, p: float, train: bool | None) -> Any:
    """What is dropped at random also in evaluation is dropped by place."""
    if train is not False and p:
        raise NotUnderstood
    same = x.shaped(x.axes)
    return (same, Array(x.axes)) if step.several else same


@handler(
    "view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as", "squeeze",
    "unsqueeze", "view_copy", "squeeze_copy", "unsqueeze_copy", "ravel",
    reads=False,
)  # fmt: skip
def reshape(step: Step, x: Array, *rest: Any, **more: Any) -> Array:
    return x.shaped(view(x.axes, step.shape))


@handler("transpose", "swapaxes", "swapdims", "transpose_copy", reads=False)
def transpose(step: Step, x: Array, first: int, second: int) -> Array:
    axes = list(x.axes)
    first, second = dim_of(x, first), dim_of(x, second)
    axes[first], axes[second] = axes[second], axes[first]
    return x.shaped(axes)


@handler("t", "numpy_T", "t_copy", reads=False)
def reverse(step: Step, x: Array) -> Array:
    return x.shaped(x.axes[::-1])


@handler("mT", "adjoint", "matrix_H", "mH", reads=False)
def matrix_transpose(step: Step, x: Array) -> Array:
    return transpose(step, x, -2, -1)


@handler("permute", "permute_copy", reads=False)
def permute(step: Step, x: Array, dims: Sequence[int]) -> Array:
    return x.shaped([x.axes[dim] for dim in dims])


@handler("movedim", "moveaxis", reads=False)
def movedim(step: Step, x: Array, source: Any, destination: Any) -> Array:
    marks = torch.empty(list(range(1, len(x.axes) + 1)), device="meta")
    return x.shaped([x.axes[size - 1] for size in marks.movedim(source, destination).shape])


@handler("expand", "expand_as", "broadcast_to", "expand_copy", reads=False)
def expand(step: Step, x: Array, *rest: Any, **more: Any) -> Array:
    return expanded(x, step.shape)


def expanded(x: Array, shape: Sequence[int]) -> Array:
    """A tensor in a larger shape, its values repeated."""
    old: list[Axis] = [[] for _ in range(len(shape) - len(x.axes))] + x.axes
    axes = [
        wild(size) if size != 1 and size_of(axis) == 1 else axis
        for size, axis in zip(shape, old, strict=True)
    ]
    return x.shaped(axes)


@handler("broadcast_tensors", reads=False)
def broadcast_tensors(step: Step, tensors: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(expanded(x, shape) for x, shape in zip(tensors, step.shapes, strict=True))


@handler("repeat", reads=False)
def repeat(step: Step, x: Array, times: Sequence[int]) -> Array:
    old: list[Axis] = [[] for _ in range(len(times) - len(x.axes))] + x.axes
    return x.shaped([[*wild(n), *axis] for n, axis in zip(times, old, strict=True)])


@handler("repeat_interleave", reads=False)
def repeat_interleave(
    step: Step, x: Array, times: Any, dim: int | None = None, **more: Any
) -> Array:
    if not isinstance(times, int):
        raise NotUnderstood
    axes = view(x.axes, [size_of([a for axis in x.axes for a in axis])]) if dim is None else x.axes
    at = 0 if dim is None else dim_of(x, dim)
    return x.shaped(replaced(axes, at, [*axes[at], *wild(times)]))


# --- parts of a tensor ----------------------------------------------------------------------------


def span(x: Array, dim: int, start: int | None, end: int | None) -> tuple[int, int]:
    """The bounds of a slice, as Python understands them."""
    return slice(start, end).indices(size_of(x.axes[dim]))[:2]


@handler("slice", "slice_copy", reads=False)
def slice_(
    step: Step, x: Array, dim: int = 0, start: Any = None, end: Any = None, stride: int = 1
) -> Array:
    dim = dim_of(x, dim)
    first, last = span(x, dim, start, end)
    size = size_of(x.axes[dim])
    if (first, last, stride) == (0, size, 1):
        return x.shaped(x.axes)
    if stride != 1 or last <= first:
        pin(x.axes[dim], "sliced")
        return Array(replaced(x.axes, dim, fixed(step.shape[dim], "sliced")), x.over)
    return step.pieces(x, dim, [first, last - first, size - last])[1]


@handler("unfold", "unfold_copy", reads=False)
def unfold(step: Step, x: Array, dim: int, size: int, stride: int) -> Array:
    dim = dim_of(x, dim)
    pin(x.axes[dim], "unfolded")
    windows = fixed(step.shape[dim], "unfolded")
    return Array([*replaced(x.axes, dim, windows), fixed(size, "unfolded")])


@handler("narrow", "narrow_copy", reads=False)
def narrow(step: Step, x: Array, dim: int, start: int, length: int) -> Array:
    return slice_(step, x, dim, start, start + length)


@handler("select", "select_copy", reads=False)
def select(step: Step, x: Array, dim: int, index: int) -> Array:
    dim = dim_of(x, dim)
    size = size_of(x.axes[dim])
    index %= size
    [_, chosen, _] = step.pieces(x, dim, [index, 1, size - index - 1])
    return Array(replaced(chosen.axes, dim), x.over)


@handler("unbind", "unbind_copy", reads=False)
def unbind(step: Step, x: Array, dim: int = 0) -> tuple[Array, ...]:
    dim = dim_of(x, dim)
    parts = step.pieces(x, dim, [1] * size_of(x.axes[dim]))
    return tuple(Array(replaced(part.axes, dim), x.over) for part in parts)


@handler(
    "split", "chunk", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk",
    "split_copy", "split_with_sizes_copy", "unsafe_split_with_sizes",
    reads=False,
)  # fmt: skip
def split(step: Step, x: Array, how: Any, dim: int = 0) -> tuple[Array, ...]:
    dim = dim_of(x, dim)
    return tuple(step.pieces(x, dim, [shape[dim] for shape in step.shapes]))


@handler("cat", "concat", "concatenate", reads=False, looks_up=True)
def cat(step: Step, tensors: Sequence[Array], dim: int = 0) -> Array:
    parts = [x for x in tensors if all(size_of(axis) for axis in x.axes)] or list(tensors[:1])
    dim = dim_of(parts[0], dim)
    others = broadcast(*(replaced(x.axes, dim, []) for x in parts))
    named = [x.over for x in parts if x.over is not None]
    if named and len(named) < len(parts):
        raise NotUnderstood
    over = broadcast(*([axis] for axis in named))[0] if named else None
    return Array(replaced(others, dim, concatenate([x.axes[dim] for x in parts])), over)


@handler("stack", reads=False)
def stack_(step: Step, tensors: Sequence[Array], dim: int = 0) -> Array:
    if any(x.over is not None for x in tensors):
        raise NotUnderstood
    new, axes = stack([x.axes for x in tensors])
    axes.insert(dim % (len(axes) + 1), new)
    return Array(axes)


@handler("pad", "constant_pad_nd", reads=False)
def pad(step: Step, x: Array, amounts: Sequence[int], *rest: Any, **more: Any) -> Array:
    mode = more.get("mode", rest[0] if rest else "constant")
    axes = list(x.axes)
    for back in range(len(amounts) // 2):
        before, after = amounts[2 * back], amounts[2 * back + 1]
        dim = len(axes) - 1 - back
        if not before and not after:
            continue
        if min(before, after) < 0 or (isinstance(mode, str) and mode != "constant"):
            pin(axes[dim], "padded")
            axes[dim] = fixed(step.shape[dim], "padded")
        else:
            ends = [[fixed(n, "padding")] if n else [] for n in (before, after)]
            axes[dim] = concatenate([*ends[0], axes[dim], *ends[1]])
    return Array(axes)


@handler("copy", reads=False)
def copy(step: Step, x: Array, source: Array, *rest: Any, **more: Any) -> Array:
    return source.shaped(broadcast([wild(size) for size in step.shape], source.axes))


@handler("slice_scatter")
def slice_scatter(
    step: Step, x: Array, source: Array, dim: int = 0, start: Any = None, end: Any = None,
    stride: int = 1,
) -> Array:  # fmt: skip
    dim = dim_of(x, dim)
    first, last = span(x, dim, start, end)
    if stride != 1:
        raise NotUnderstood
    others = broadcast(replaced(x.axes, dim, []), replaced(source.axes, dim, []))
    sizes = [first, last - first, size_of(x.axes[dim]) - last]
    parts = iter(cut(x.axes[dim], [size for size in sizes if size]))
    kept = [next(parts) if size else None for size in sizes]
    joined = [part for part in (kept[0], source.axes[dim], kept[2]) if part is not None]
    return Array(replaced(others, dim, concatenate(joined)))


@handler("select_scatter")
def select_scatter(step: Step, x: Array, source: Array, dim: int, index: int) -> Array:
    dim = dim_of(x, dim)
    index %= size_of(x.axes[dim])
    row = Array([*source.axes[:dim], [], *source.axes[dim:]])
    return slice_scatter(step, x, row, dim, index, index + 1)
