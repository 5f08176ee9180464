"""How layers act on axes: products, attention, convolutions, normalisation, recurrence."""

from collections.abc import Iterable, Sequence
from typing import Any

from nlm.symmetry.atoms import Axis, compound, fixed, free, pin, resolve, size_of, wild
from nlm.symmetry.axes import broadcast, unify
from nlm.symmetry.handlers.registry import Array, NotUnderstood, Step, dim_of, handler, replaced
from nlm.symmetry.sums import concatenate, couple, stack

# --- matrix products ------------------------------------------------------------------------------


@handler("linear")
def linear(step: Step, x: Array, weight: Array, bias: Array | None = None) -> Array:
    unify(x.axes[-1], weight.axes[-1])
    step.record([*x.axes, *weight.axes[:-1]])
    axes = [*x.axes[:-1], *weight.axes[:-1]]
    return Array(axes if bias is None else broadcast(axes, bias.axes))


@handler("matmul", "mm", "bmm", "mv", "dot", "vdot")
def matmul(step: Step, x: Array, y: Array, **more: Any) -> Array:
    unify(x.axes[-1], y.axes[-2] if len(y.axes) > 1 else y.axes[0])
    rows = [] if len(x.axes) == 1 else [x.axes[-2]]
    columns = [] if len(y.axes) == 1 else [y.axes[-1]]
    batch = broadcast(x.axes[:-2], y.axes[:-2])
    step.record([*batch, *rows, x.axes[-1], *columns])
    return Array([*batch, *rows, *columns])


@handler("addmm", "baddbmm", "addmv")
def addmm(step: Step, bias: Array, x: Array, y: Array, **more: Any) -> Array:
    return Array(broadcast(matmul(step, x, y).axes, bias.axes))


@handler("inner")
def inner(step: Step, x: Array, y: Array) -> Array:
    if not x.axes or not y.axes:
        return Array(broadcast(x.axes, y.axes))
    unify(x.axes[-1], y.axes[-1])
    step.record([*x.axes, *y.axes[:-1]])
    return Array([*x.axes[:-1], *y.axes[:-1]])


@handler("outer", "ger")
def outer(step: Step, x: Array, y: Array) -> Array:
    return Array([x.axes[0], y.axes[0]])


@handler("einsum")
def einsum(step: Step, equation: str, operands: Sequence[Array], **more: Any) -> Array:
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation:
        raise NotUnderstood
    axes: dict[str, Axis] = {}
    for letters, x in zip(inputs.split(","), operands, strict=True):
        for letter, axis in zip(letters, x.axes, strict=True):
            [axes[letter]] = broadcast(*([each] for each in (axes.get(letter, axis), axis)))
    step.record(list(axes.values()))
    return Array([axes[letter] for letter in output])


@handler("bilinear")
def bilinear(step: Step, x: Array, y: Array, weight: Array, bias: Array | None = None) -> Array:
    unify(x.axes[-1], weight.axes[1])
    unify(y.axes[-1], weight.axes[2])
    target = weight.axes[:1] if bias is None else broadcast(weight.axes[:1], bias.axes)
    batch = broadcast(x.axes[:-1], y.axes[:-1])
    step.record([*batch, *weight.axes])
    return Array([*batch, *target])


@handler("cdist", "_cdist_forward")
def cdist(step: Step, x: Array, y: Array, *rest: Any, **more: Any) -> Array:
    unify(x.axes[-1], y.axes[-1])
    batch = broadcast(x.axes[:-2], y.axes[:-2])
    step.record([*batch, x.axes[-2], y.axes[-2], x.axes[-1]])
    return Array([*batch, x.axes[-2], y.axes[-2]])


# --- attention ------------------------------------------------------------------------------------


@handler("scaled_dot_product_attention")
def attention(
    step: Step, query: Array, key: Array, value: Array, attn_mask: Array | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: Any = None, enable_gqa: bool = False,
) -> Array:  # fmt: skip
    keys, values = list(key.axes), list(value.axes)
    if enable_gqa:
        for axes in (keys, values):
            times = size_of(query.axes[-3]) // size_of(axes[-3])
            axes[-3] = [*axes[-3], *wild(times)]
    unify(query.axes[-1], keys[-1])
    unify(keys[-2], values[-2])
    batch = broadcast(query.axes[:-2], keys[:-2], values[:-2])
    scores = [*batch, query.axes[-2], keys[-2]]
    if attn_mask is not None:
        scores = broadcast(scores, attn_mask.axes)
    step.record(scores)
    step.record(scores[:-1])
    for features in (keys[-1], values[-1]):
        step.record([*batch, query.axes[-2], keys[-2], features])
    if is_causal:
        pin(query.axes[-2], "causal")
        pin(keys[-2], "causal")
    return Array([*batch, query.axes[-2], values[-1]])


# --- convolutions and what acts on neighbourhoods -------------------------------------------------


@handler("conv1d", "conv2d", "conv3d")
def conv(
    step: Step, x: Array, weight: Array, bias: Array | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Array:  # fmt: skip
    source, target = weight.axes[1], weight.axes[0]
    paired = [source, target]
    if groups > 1:
        group, units = free(groups), free(size_of(target) // groups)
        unify(target, [*group, *units])
        paired = [group, source, units]
        source = [*group, *source]
    return _convolved(step, x, weight, bias, source, target, paired)


@handler("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    step: Step, x: Array, weight: Array, bias: Array | None = None, stride: Any = 1,
    padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Array:  # fmt: skip
    source, target = weight.axes[0], weight.axes[1]
    paired = [source, target]
    if groups > 1:
        group, units = free(groups), free(size_of(source) // groups)
        unify(source, [*group, *units])
        paired = [group, units, target]
        target = [*group, *target]
    return _convolved(step, x, weight, bias, source, target, paired)


@handler("convolution")
def convolution(
    step: Step, x: Array, weight: Array, bias: Array | None, stride: Any, padding: Any,
    dilation: Any, transposed: bool, output_padding: Any, groups: int,
) -> Array:  # fmt: skip
    if transposed:
        return conv_transpose(step, x, weight, bias, groups=groups)
    return conv(step, x, weight, bias, groups=groups)


def _convolved(
    step: Step, x: Array, weight: Array, bias: Array | None, source: Axis, target: Axis,
    paired: list[Axis],
) -> Array:  # fmt: skip
    spatial = len(weight.axes) - 2
    unify(x.axes[-1 - spatial], source)
    if bias is not None:
        [target] = broadcast([target], [bias.axes[0]])
    step.record([*x.axes[: -1 - spatial], *paired])
    for axis in weight.axes[2:]:
        pin(axis, "kernel")
    return Array([*x.axes[: -1 - spatial], target, *_neighbourhoods(step, x, spatial)])


def _neighbourhoods(step: Step, x: Array, spatial: int) -> list[Axis]:
    """The last dimensions, of which an operation mixes neighbours."""
    for axis in x.axes[-spatial:]:
        pin(axis, "neighbourhoods")
    return [fixed(size, "neighbourhoods") for size in step.shape[-spatial:]]


_POOLS = [
    f"{kind}_pool{spatial}d{ending}"
    for kind in (
        "max",
        "avg",
        "adaptive_avg",
        "adaptive_max",
        "lp",
        "_adaptive_avg",
        "fractional_max",
    )
    for spatial in (1, 2, 3)
    for ending in ("", "_with_indices")
]
_RESAMPLING = [
    f"{begin}upsample_{kind}"
    for begin in ("", "_")
    for kind in (
        "nearest1d", "nearest2d", "nearest3d", "nearest_exact1d", "nearest_exact2d",
        "nearest_exact3d", "linear1d", "bilinear2d", "trilinear3d", "bicubic2d", "bilinear2d_aa",
        "bicubic2d_aa",
    )
]  # fmt: skip


@handler(*_POOLS, *_RESAMPLING)
def pool(step: Step, x: Array, *rest: Any, **more: Any) -> Any:
    if any(isinstance(each, Array) for each in (*rest, *more.values())):
        raise NotUnderstood  # random samples
    spatial = next(n for n in (1, 2, 3) if f"{n}d" in step.name)
    axes = [*x.axes[:-spatial], *_neighbourhoods(step, x, spatial)]
    return (Array(axes), Array(list(axes))) if step.several else Array(axes)


@handler("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(step: Step, x: Array, grid: Array, *rest: Any) -> Array:
    """Channels read at places between the positions: the places have axes of their own."""
    for axis in (*x.axes[2:], grid.axes[-1]):
        pin(axis, "coordinates")
    batch = broadcast([x.axes[0]], [grid.axes[0]])
    return Array([*batch, x.axes[1], *grid.axes[1:-1]])


# --- normalisation --------------------------------------------------------------------------------


@handler(
    "batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"
)
def batch_norm(step: Step, x: Array, *rest: Any, **more: Any) -> Any:
    axes = _scaled(x, rest[:4])
    step.record([axes[1]])
    return _with_statistics(step, Array(axes))


@handler("instance_norm")
def instance_norm(step: Step, x: Array, *rest: Any, **more: Any) -> Array:
    axes = _scaled(x, rest[:4])
    step.record(axes[:2])
    return Array(axes)


def _scaled(x: Array, parameters: Iterable[Any]) -> list[Axis]:
    """The axes of channels (dimension 1) with parameters of their own."""
    vectors = [each.axes[0] for each in parameters if isinstance(each, Array)]
    return replaced(x.axes, 1, *broadcast([x.axes[1]], *([axis] for axis in vectors)))


@handler("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def layer_norm(step: Step, x: Array, shape: Sequence[int], *rest: Any, **more: Any) -> Any:
    step.record(x.axes[: -len(shape)])
    parameters = [each.axes for each in (*rest[:2], *more.values()) if isinstance(each, Array)]
    return _with_statistics(step, Array(broadcast(x.axes, *parameters)))


@handler("group_norm", "native_group_norm")
def group_norm(step: Step, x: Array, *rest: Any, **more: Any) -> Any:
    groups = rest[0]
    parameters = [each for each in (*rest[1:], *more.values()) if isinstance(each, Array)]
    if "native" in step.name:
        groups = rest[-2]
        parameters = [each for each in rest[:2] if isinstance(each, Array)]
    x = Array(_scaled(x, parameters))
    normed = _grouped(step, x, groups)
    step.record([x.axes[0], normed])
    return _with_statistics(step, x)


def _grouped(step: Step, x: Array, groups: int) -> Axis:
    """Arranges channels in groups of equal size; the axis of the groups.

    Where the channels are a grid that does not fit (a convolution in 4 groups before a norm in 3),
    groups and rows stay in order, and channels move within what they have in common.
    """
    each = size_of(x.axes[1]) // groups
    channels = resolve(x.axes[1])
    lead = channels[0] if channels else None
    fits = lead is None or lead.size % groups == 0 or groups % lead.size == 0
    if fits or lead is None or len(channels) == 1:
        group = free(groups)
        unify(x.axes[1], [*group, *free(each)])
        return group
    if lead.kind == "leaf":
        lead.become("sum", [[] for _ in range(lead.size)])
        couple(x.axes, lead, step.together)
    rows = compound("sum", [free(each) for _ in range(groups)], each * groups)
    unify(x.axes[1], [rows])
    return fixed(groups, "groups that do not fit")


def _with_statistics(step: Step, normed: Array) -> Any:
    """The result, and fixed axes for the means and deviations that some forms return too."""
    if not step.several:
        return normed
    others = (Array([fixed(size, "statistics") for size in shape]) for shape in step.shapes[1:])
    return (normed, *others)


@handler("_weight_norm", "_weight_norm_interface")
def weight_norm(step: Step, v: Array, g: Array, dim: int = 0) -> Any:
    step.record([v.axes[dim_of(v, dim)]])
    weight = Array(broadcast(v.axes, g.axes))
    return (weight, Array(g.axes)) if step.several else weight


@handler("glu")
def glu(step: Step, x: Array, dim: int = -1) -> Array:
    dim = dim_of(x, dim)
    size = step.shape[dim]
    first, gate = step.pieces(x, dim, [size, size])
    return Array(broadcast(first.axes, gate.axes))


# --- recurrence -----------------------------------------------------------------------------------

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@handler("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(
    step: Step, x: Array, states: Any, weights: Sequence[Array], has_biases: bool, layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool = False,
) -> tuple[Array, ...]:  # fmt: skip
    """The gates are blocks of the hidden units; every layer and direction has units of its own."""
    if not isinstance(has_biases, bool):
        raise NotUnderstood  # packed sequences
    gates = _GATES[step.name]
    directions = 2 if bidirectional else 1
    count = len(weights) // (layers * directions)
    biases = 2 if has_biases else 0
    given = list(states) if isinstance(states, (list, tuple)) else [states]
    initial = [step.pieces(state, 0, [1] * (layers * directions)) for state in given]
    source = x.axes[-1]
    ends: list[tuple[Axis, Axis]] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            own = weights[number * count : (number + 1) * count]
            cells = free(size_of(own[0].axes[0]) // gates)
            visible = own[1].axes[1]
            if count == 2 + biases:
                unify(visible, cells)
            else:  # projected: the hidden state has units of its own
                unify(own[-1].axes[0], visible)
                unify(own[-1].axes[1], cells)
            unify(own[0].axes[1], source)
            step.record([source, cells])
            step.record([visible, cells])
            for parameter in own[: 2 + biases]:
                unify(parameter.axes[0], [*fixed(gates, "gates"), *cells])
            for state, axis in zip(initial, (visible, cells), strict=False):
                unify(state[number].axes[-1], axis)
            outputs.append(visible)
            ends.append((visible, cells))
        source = outputs[0] if directions == 1 else concatenate(outputs)
    batch = list(x.axes[:-1])
    time = 1 if batch_first and len(batch) > 1 else 0
    pin(batch[time], "time")
    batch[time] = fixed(size_of(batch[time]), "time")
    if len(batch) > 1:
        [batch[1 - time]] = broadcast([batch[1 - time]], *([state.axes[1]] for state in given))
    results = [Array([*batch, source])]
    for kind in range(len(given)):
        which, [axis] = stack([[end[kind]] for end in ends])
        middle = [each for dim, each in enumerate(batch) if dim != time]
        results.append(Array([which, *middle, axis]))
    return tuple(results)
