"""From a model to the graph that discovery reads: exported, free of writes, without dead parts.

``torch.export`` records the ATen operations of one run. Writes into tensors are taken out: an
operation such as ``relu_`` on a tensor that nobody else sees is its pure form; anything more
(writes into views) is left to PyTorch's functionalisation, which costs as much as the export.
"""

import inspect
import io
import logging
import operator
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from nlm._modules import evaluation
from nlm.symmetry.outputs import named_tensors, selected

_PREFIX = "model."
_PURE = "nlm: the result stands for what it was written to"


@dataclass
class Graph:
    """An exported model.

    Attributes
    ----------
    nodes : the graph in order of execution, without dead parts.
    entries : placeholder -> the state dict's name of what it holds.
    constants : placeholder -> its value, for tensors that the model's code made.
    outputs : names of the selected outputs.
    written : the entries that the model changes; their new values are the first outputs.
    module_shapes : module -> shape of its output, for those that ran once and returned one tensor.
    """

    nodes: fx.Graph
    entries: dict[str, str]
    constants: dict[str, Tensor]
    outputs: tuple[str, ...]
    written: tuple[str, ...]
    module_shapes: dict[str, list[int]]


class _Named(nn.Module):
    """A model whose outputs are a tuple of tensors; tells their names while it runs."""

    def __init__(self, model: nn.Module, tell: Callable[[list[str]], None]) -> None:
        super().__init__()
        self.model = model
        self.tell = tell

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        outputs = named_tensors(self.model(*args, **kwargs))
        self.tell(list(outputs))
        return tuple(outputs.values())


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    outputs: Sequence[str] | None,
) -> Graph:
    """The graph of a model in evaluation mode, with the selected outputs only.

    Raises
    ------
    ValueError
        The model cannot be exported, has no tensor among its outputs, or none of a selected name.
    """
    runs: list[list[str]] = []  # export restores a module's attributes
    named = _Named(model, runs.append)
    shapes: dict[str, list[int]] = {}
    with traceable(model), evaluation(named), _watched(model, shapes), _quiet():
        try:
            program = torch.export.export(named, args, dict(kwargs), strict=False)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"nlm.trace: a model is traced by torch.export with the example inputs (else write "
                f"an nlm.PermutationSpec and prove it with its verify), got "
                f"{type(error).__name__}: {reason}"
            ) from error
        if not make_pure(program.graph_module):
            program = program.run_decompositions({})
    signature = program.graph_signature
    kept = selected_outputs(program, runs[-1], outputs)
    entries = {
        placeholder: target.removeprefix(_PREFIX)
        for placeholder, target in {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
        }.items()
    }
    constants = {
        placeholder: program.constants[target]
        for placeholder, target in signature.inputs_to_lifted_tensor_constants.items()
        if isinstance(program.constants.get(target), Tensor)
    }
    written = {**signature.buffers_to_mutate, **signature.parameters_to_mutate}
    changed = [
        written.get(each.arg.name, "").removeprefix(_PREFIX)
        for each in signature.output_specs
        if each.kind.name != "USER_OUTPUT"
    ]
    return Graph(program.graph, entries, constants, kept, tuple(changed), shapes)


@contextmanager
def _watched(model: nn.Module, shapes: dict[str, list[int]]) -> Iterator[None]:
    """Notes the shapes of the modules' outputs while they run."""
    calls: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            shapes.pop(name, None)
            if calls[name] == 1 and isinstance(output, Tensor):
                shapes[name] = [int(size) for size in output.shape]

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)  # these take no hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch.export's own warnings, tracebacks and graphs: what fails is raised."""
    names = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")
    logs = [(log, log.disabled) for log in map(logging.getLogger, names)]
    for log, _ in logs:
        log.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
            with redirect_stderr(io.StringIO()) as held:
                yield
        sys.stderr.write(held.getvalue())
    finally:
        for log, disabled in logs:
            log.disabled = disabled


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Hugging Face models in an implementation that can be read; restored afterwards.

    Experts as batched products and attention as PyTorch's: what a model computes does not depend
    on the implementation, and neither do its symmetries.
    """
    changed: list[tuple[Any, str, Any]] = []
    configs = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    for config in configs.values():
        for name, wanted, unless in (
            ("_experts_implementation", "batched_mm", ()),
            ("_attn_implementation_internal", "eager", ("eager", "sdpa")),
        ):
            value = getattr(config, name, None)
            if isinstance(value, str) and value not in (wanted, *unless):
                changed.append((config, name, value))
                setattr(config, name, wanted)
    try:
        yield
    finally:
        for config, name, value in changed:
            setattr(config, name, value)


def call_arguments(
    model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, with ``use_cache=False`` where the model knows it."""
    args: tuple[Any, ...] = ()
    if isinstance(example_inputs, Mapping):
        kwargs = {**example_inputs, **(kwargs or {})}
    else:
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    known = (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )
    return args, {**known, **(kwargs or {})}


def selected_outputs(
    program: torch.export.ExportedProgram, names: list[str], wanted: Sequence[str] | None
) -> tuple[str, ...]:
    """Leaves only the selected outputs in a program's graph, and what they need; their names."""
    graph = program.graph
    [result] = [node for node in graph.nodes if node.op == "output"]
    values = list(result.args[0])
    written = len(values) - len(names)  # buffers that the model changes come first
    every = dict(zip(names, values[written:], strict=True))
    if not every:
        raise ValueError("nlm.trace: a model returns tensors, got none among its outputs")
    kept = selected(every, wanted) if wanted is not None else _default(every)
    result.args = ((*values[:written], *(every[name] for name in kept)),)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    return tuple(kept)


def _default(every: Mapping[str, fx.Node]) -> list[str]:
    """The logits and whatever else it takes for every parameter to count; else all outputs.

    A language model also returns the last state of its encoder, which would pin the units that it
    is made of; a detector's boxes have weights of their own and belong to what it computes.
    """
    kept = [name for name in every if "logits" in name]
    if not kept:
        return list(every)
    used = {name: _parameters(node) for name, node in every.items()}
    seen = set().union(*(used[name] for name in kept))
    for name in every:
        if not used[name] <= seen:
            kept.append(name)
            seen |= used[name]
    return [name for name in every if name in kept]


def _parameters(node: fx.Node) -> set[str]:
    """The placeholders that a node's value depends on."""
    seen = {node}
    waiting = [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return {each.name for each in seen if each.op == "placeholder"}


def operation_name(target: Any) -> str:
    """ "linear" for an ATen operation, in place or not; "library.name" for another's."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return str(target)
    library, _, name = schema.name.partition("::")
    if schema.is_mutable and name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return name if library == "aten" else f"{library}.{name}"


# --- writes ---------------------------------------------------------------------------------------


def make_pure(module: nn.Module) -> bool:
    """Takes simple writes out of a graph and those inside it; False where there are others."""
    graphs = [each.graph for each in module.modules() if isinstance(each, fx.GraphModule)]
    writes = [node for graph in graphs for node in graph.nodes if is_write(node)]
    order = {node: number for graph in graphs for number, node in enumerate(graph.nodes)}
    if not all(_is_simple(node) for node in writes):
        return False
    for node in writes:
        target = node.args[0]
        node.meta[_PURE] = True
        for user in list(target.users):
            if order[user] > order[node]:
                user.replace_input_with(target, node)
    return True


def is_write(node: fx.Node) -> bool:
    """Whether a node changes one of its arguments, and others see it."""
    schema = getattr(node.target, "_schema", None)
    writes = node.op == "call_function" and schema is not None and schema.is_mutable
    return writes and _PURE not in node.meta


def _is_simple(node: fx.Node) -> bool:
    """Whether a write is of one tensor that an operation made and nobody sees by other names."""
    target = node.args[0] if node.args else None
    if not isinstance(target, fx.Node) or target.op != "call_function":
        return False
    operation: Any = node.target
    written = [argument for argument in operation._schema.arguments if argument.is_write]
    if len(written) != 1 or written[0].name != "self":
        return False
    return not shares_memory(target) and not any(map(shares_memory, target.users))


def shares_memory(node: fx.Node) -> bool:
    """Whether a node's value may be a view of its argument."""
    if node.target is operator.getitem:
        source = node.args[0]
        return not isinstance(source, fx.Node) or shares_memory(source)
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable:
        return schema is None and node.op == "call_function"
    if any(value.alias_info is not None for value in schema.returns):
        return True
    name = schema.name.partition("::")[2]
    return name in {"reshape", "contiguous", "flatten", "to", "dropout", "type_as", "expand_as"}
