"""How element-wise operations, reductions and constants act on axes."""

from collections.abc import Sequence
from typing import Any

from nlm.symmetry.atoms import Axis, fixed, pin, wild
from nlm.symmetry.axes import broadcast
from nlm.symmetry.handlers.lookups import positions
from nlm.symmetry.handlers.registry import Array, NotUnderstood, Step, dim_of, handler, replaced


def pointwise(step: Step, operands: Sequence[Array]) -> Array:
    """Element-wise: equal axes; index values that are computed with are just numbers."""
    for x in operands:
        if x.over is not None:
            pin(x.over, "computed with")
    return Array(broadcast(*(x.axes for x in operands)))


@handler("where", "float_power", "polar", "complex")
def untagged(step: Step, *operands: Any, **more: Any) -> Array:
    """Element-wise operations that are not marked as such."""
    return pointwise(step, [x for x in (*operands, *more.values()) if isinstance(x, Array)])


@handler("prelu", "_prelu_kernel")
def prelu(step: Step, x: Array, weight: Array) -> Array:
    if len(weight.axes) == 1 and len(x.axes) > 1:
        return Array(replaced(x.axes, 1, *broadcast([x.axes[1]], [weight.axes[0]])))
    return pointwise(step, [x, weight])


def reduction(step: Step, x: Array, dims: Sequence[int] | None) -> Any:
    """Over some dimensions, or all: what is left of the axes."""
    name, shape = step.name, step.shape
    if x.over is not None:
        pin(x.over, "computed with")
    gone = set(range(len(x.axes))) if dims is None else {dim_of(x, dim) for dim in dims}
    kept = len(shape) == len(x.axes) and bool(x.axes)
    axes: list[Axis] = [
        [] if dim in gone else axis for dim, axis in enumerate(x.axes) if kept or dim not in gone
    ]
    over = None
    names_positions = name in _EXTREMES
    if len(gone) == 1 and names_positions:
        over = positions(x, min(gone)) if step.several or name.startswith("arg") else None
    elif gone and names_positions and (step.several or name.startswith("arg")):
        pin([atom for axis in x.axes for atom in axis], "position of an extreme")
    if name in ("argmax", "argmin"):
        return Array(axes, over=over)
    if step.several:
        return tuple(Array(list(axes), over=over if n else None) for n in range(len(step.shapes)))
    return Array(axes)


_EXTREMES = ("max", "min", "median", "nanmedian", "mode", "argmax", "argmin")


@handler("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax", "softmin")
def softmax(step: Step, x: Array, dim: int, *rest: Any, **more: Any) -> Array:
    step.record(replaced(x.axes, dim_of(x, dim)))
    return Array(x.axes)


@handler(
    "zeros", "ones", "full", "new_ones", "new_zeros", "new_full", "zeros_like", "ones_like",
    "full_like", "scalar_tensor", "fill", "zero",
    looks_up=True,
)  # fmt: skip
def filled(step: Step, *rest: Any, **more: Any) -> Array:
    value = more.get("fill_value", rest[-1] if rest else None)
    if isinstance(value, Array) and step.name.startswith("fill"):
        return Array([wild(size) for size in step.shape], lookups=value.lookups)
    return Array([wild(size) for size in step.shape])


# --- positions that an operation tells apart ------------------------------------------------------


@handler("cumsum", "cumprod", "logcumsumexp", "diff", "flip", "roll", "rot90", "fliplr", "flipud")
def ordered(step: Step, x: Array, *rest: Any, **more: Any) -> Array:
    """Sums up, shifts or turns round along dimensions: these stay in order."""
    name = step.name
    if any(isinstance(each, Array) for each in (*rest, *more.values())):
        raise NotUnderstood  # differences with values before the first
    given: Any = more.get("dims", more.get("dim"))
    if given is None:
        place = {"roll": 1, "diff": 1, "rot90": 1}.get(name, 0)
        given = rest[place] if len(rest) > place else {"diff": -1}.get(name)
    dims = [given] if isinstance(given, int) else list(given or range(len(x.axes)))
    axes = list(x.axes)
    for dim in (dim_of(x, dim) for dim in dims):
        pin(axes[dim], name)
        axes[dim] = fixed(step.shape[dim], name)
    moved = name in ("flip", "roll", "rot90", "fliplr", "flipud")
    return Array(axes, x.over if moved else None)


@handler("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fourier(step: Step, x: Array, dims: Sequence[int], *rest: Any) -> Array:
    axes = list(x.axes)
    for dim in (dim_of(x, dim) for dim in dims):
        pin(axes[dim], "Fourier transform")
        axes[dim] = fixed(step.shape[dim], "Fourier transform")
    return Array(axes)


@handler("view_as_real", reads=False)
def view_as_real(step: Step, x: Array) -> Array:
    return Array([*x.axes, fixed(2, "real and imaginary")])


@handler("view_as_complex", reads=False)
def view_as_complex(step: Step, x: Array) -> Array:
    pin(x.axes[-1], "real and imaginary")
    step.record(x.axes[:-1])
    return Array(x.axes[:-1])


@handler("triu", "tril")
def triangle(step: Step, x: Array, *rest: Any, **more: Any) -> Array:
    for dim in (-1, -2):
        pin(x.axes[dim], "triangle")
    return Array([*x.axes[:-2], *(fixed(size, "triangle") for size in step.shape[-2:])])
