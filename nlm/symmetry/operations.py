"""What discovery must know of an operation beside its handler: what it is made of, and ties."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from nlm.symmetry.graph import make_pure, operation_name
from nlm.symmetry.handlers import HANDLERS, Array


def flat(value: Any) -> list[Any]:
    """The leaves of nested tuples, lists and dicts, in order."""
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in flat(part)]
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in flat(part)]
    return [value]


def bound(target: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """An operation's arguments by their names."""
    schema = getattr(target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    return {**dict(zip(names, args, strict=False)), **kwargs}


_TYING = {
    "relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "threshold", "hardswish",
    "hardsigmoid", "hardshrink", "softshrink", "sign", "sgn", "round", "floor", "ceil", "trunc",
    "floor_divide", "heaviside", "maximum", "minimum", "fmax", "fmin", "nan_to_num",
}  # fmt: skip


_MIXING = {
    "linear", "matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "addmm", "baddbmm", "addmv",
    "einsum", "bilinear", "cdist", "_cdist_forward", "scaled_dot_product_attention", "convolution",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "lstm", "gru", "rnn_tanh", "rnn_relu",
}  # fmt: skip


def is_tied(target: Any, operands: list[Array], value: Tensor) -> bool:
    """Whether several values of a result may well be equal.

    Those of an operand may (a mask, what was looked up twice, zeros of a relu), and stay so until
    they are mixed in sums of products, which are taken to differ.
    """
    if not (value.is_floating_point() or value.is_complex()):
        return True
    name = operation_name(target)
    if name in _MIXING:
        return False
    chosen = name in ("max", "min") and len(operands) > 1  # of two tensors
    rounded = name == "div" and "mode" in target._overloadname
    return name in _TYING or chosen or rounded or any(x.tied for x in operands)


def decomposed(node: fx.Node) -> fx.Graph | None:
    """The graph of an operation in terms of others; None where there is none."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    nodes = [each for each in flat((node.args, node.kwargs)) if isinstance(each, fx.Node)]
    examples = [
        torch.empty(each.meta["val"].shape, dtype=each.meta["val"].dtype, device="meta")
        for each in nodes
    ]

    def function(*tensors: Tensor) -> Any:
        remaining = iter(tensors)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: next(remaining))
        return target(*args, **kwargs)

    table = {
        op: rule
        for op, rule in _decompositions().items()
        if operation_name(op) not in HANDLERS or op is target
    }
    try:
        traced = make_fx(function, decomposition_table=table)(*examples)
    except Exception:
        return None
    if not make_pure(traced):
        return None
    graph = traced.graph
    calls = [each for each in graph.nodes if each.op == "call_function"]
    if any(operation_name(each.target) == operation_name(target) for each in calls):
        return None
    return graph if calls else None


@cache
def _decompositions() -> dict[Any, Any]:
    return dict(torch._decomp.core_aten_decompositions())
