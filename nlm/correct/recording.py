"""One forward pass, watched: what makes which tensor, what is known of it, and what reads it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from nlm._functions import (
    ACTIVATIONS,
    FunctionCalls,
    is_transparent,
    tensors_of,
    version_of,
)
from nlm._modules import channel_dim, evaluation, is_layer, is_norm, output_hooks
from nlm.symmetry.outputs import named_tensors

OUTPUT = "the network's output"
_PRODUCTS = set(
    "linear addmm matmul rmatmul mm bmm einsum embedding bilinear "
    "multi_head_attention_forward".split()
)
_REARRANGING = set(
    "transpose swapaxes swapdims t T mT get permute movedim moveaxis view reshape flatten "
    "unflatten view_as reshape_as squeeze unsqueeze flip roll".split()
)


@dataclass(eq=False)
class Value:
    """What a tensor holds, from one write to the next.

    Attributes
    ----------
    shape : of the tensor.
    version : how often the tensor was written to before.
    depth : the layers behind it.
    dim : its channel dimension, where the layers behind it tell.
    readers : layers that read it, and places of other functions that do.
    """

    shape: torch.Size
    version: int
    depth: int = 0
    dim: int | None = None
    readers: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Event:
    """Something that may be a point.

    Attributes
    ----------
    kind : "layer", "norm", "activation" or "add" (a residual one).
    value : what it makes.
    names : the modules that return it, from the innermost on.
    place : the function call that makes it, of the last two kinds.
    module, read : the module and the value of its first argument, of the first two kinds.
    """

    kind: str
    value: Value
    names: list[str]
    place: str = ""
    module: nn.Module | None = None
    read: Value | None = None


class Record(FunctionCalls):
    """What happened in a forward pass.

    Attributes
    ----------
    events : in the order in which they happened.
    order : the names of all modules and places, in the order in which they gave their results.
    values : name -> what came last from there.
    outputs : the values that the network returned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.order: list[str] = []
        self.values: dict[str, Value] = {}
        self.outputs: list[Value] = []
        self._known: Any = WeakTensorKeyDictionary()
        self._started: list[tuple[int, Value | None]] = []
        self._layers: set[str] = set()

    def runs(self) -> Counter[str]:
        """How often each module and place gave a result."""
        return Counter(self.order)

    # --- functions --------------------------------------------------------------------------------

    def called(
        self, owner: str, function: Any, args: Any, kwargs: dict[str, Any], result: Any
    ) -> Any:
        place = self.place(owner, function, result)
        inputs, made = list(tensors_of((args, kwargs))), list(tensors_of(result))
        written = any(result is each for each in inputs)
        if written and self._value(result) is not None:  # the tensor as it was, by dropout perhaps
            return result
        name = getattr(function, "__name__", "").strip("_")
        read = [self._known.get(each) for each in inputs]
        values = [each for each in read if each is not None]
        for value in values if made else ():
            value.readers.append(owner if owner in self._layers else place or f"{owner}:{name}")
        weighs = (name in _PRODUCTS or "conv" in name) and any(
            value is None and each.is_floating_point()
            for each, value in zip(inputs, read, strict=True)
        )
        depth = max((value.depth for value in values), default=0) + weighs
        dim = _channels(name, args, values, made[0], weighs) if made else None
        for tensor in made:
            self._known[tensor] = Value(tensor.shape, version_of(tensor), depth, dim)
        if place is None:
            return result
        self.order.append(place)
        value = self.values[place] = self._known[result]
        if name in ACTIVATIONS:
            self.events.append(Event("activation", value, [], place))
        elif _is_residual(read, value):
            value.dim = next((each.dim for each in values if each.dim is not None), None)
            self.events.append(Event("add", value, [], place))
        return result

    def _value(self, tensor: Tensor) -> Value | None:
        value = self._known.get(tensor)
        return value if value is not None and value.version == version_of(tensor) else None

    # --- modules ----------------------------------------------------------------------------------

    def watch(self, network: nn.Module) -> list[Any]:
        self._layers = {name for name, module in network.named_modules() if is_layer(module)}
        handles = super().watch(network)
        handles.append(network.register_forward_pre_hook(self._begin, with_kwargs=True))
        for name, module in network.named_modules():
            handles.append(module.register_forward_pre_hook(self._before))
            handles.append(module.register_forward_hook(self._after(name)))
        return handles

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        for tensor in tensors_of((args, kwargs)):
            if tensor.is_floating_point():
                self._known[tensor] = Value(tensor.shape, version_of(tensor))

    def _before(self, module: nn.Module, args: Any) -> None:
        first = args[0] if args else None
        read = self._value(first) if isinstance(first, Tensor) else None
        self._started.append((len(self.events), read))

    def _after(self, name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            with self.aside():
                self._ran(name, module, output)

        return record

    def _ran(self, name: str, module: nn.Module, output: Any) -> None:
        start, read = self._started.pop()
        self.order.append(name)
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, Tensor):
            return
        value = self._value(first)
        if value is None:
            value = self._known[first] = Value(first.shape, version_of(first))
        self.values[name] = value
        within = self.events[start:]
        if is_layer(module):
            value.dim = channel_dim(name, module)
            value.depth = max(value.depth, 1 + (read.depth if read else 0))
            self.events.append(Event("layer", value, [name], module=module, read=read))
        elif is_norm(module):
            value.dim = _norm_dim(name, module, value)
            self.events[start:] = [Event("norm", value, [name], module=module, read=read)]
        elif is_transparent(module) and any(each.kind == "activation" for each in within):
            own = [each for each in within if each.value is value]
            place = own[0].place if own else ""
            self.events[start:] = [Event("activation", value, [name], place)]
        elif isinstance(output, Tensor):
            for each in within:
                if each.place and each.value is value:
                    each.names.append(name)


def record(network: nn.Module, call: Callable[[], Any]) -> Record:
    """Watches ``call()``, which runs a network once."""
    found = Record()
    handles: list[Any] = []
    try:
        handles += found.watch(network)
        # in inference mode tensors do not count how often they are written to
        with torch.inference_mode(False), evaluation(network), output_hooks(network, {}), found:
            outputs = call()
    finally:
        for handle in handles:
            handle.remove()
    for leaf in named_tensors(outputs).values():
        value = found._value(leaf)
        if value is not None:
            value.readers.append(OUTPUT)
            found.outputs.append(value)
    return found


def _is_residual(read: list[Value | None], value: Value) -> bool:
    """Whether a sum is that of a stream and of what further layers made of it."""
    if len(read) != 2 or read[0] is None or read[1] is None:
        return False
    one, two = read[0], read[1]
    return one.shape == two.shape == value.shape and min(one.depth, two.depth) < value.depth


def _channels(name: str, args: Any, read: list[Value], made: Tensor, weighs: bool) -> int | None:
    """The channel dimension of a function's result, counted from the end where it is the last."""
    dim: int | None = None
    if "conv" in name and weighs:
        dim = made.dim() - 1 - int(name[-2])
    elif weighs:
        dim = made.dim() - 1
    elif name in {"transpose", "permute"} and len(read) == 1 and read[0].dim is not None:
        dim = _moved(name, args[1:], read[0].dim, made.dim())
    elif name not in _REARRANGING:
        dim = next((v.dim for v in read if v.dim is not None and v.shape == made.shape), None)
    return -1 if dim == made.dim() - 1 else dim


def _moved(name: str, to: Any, dim: int, count: int) -> int | None:
    dims = to[0] if len(to) == 1 and isinstance(to[0], (tuple, list)) else to
    if len(dims) != (count if name == "permute" else 2):
        return None
    dims, dim = [each % count for each in dims], dim % count
    if name == "permute":
        return dims.index(dim)
    return dims[1 - dims.index(dim)] if dim in dims else dim


def _norm_dim(name: str, module: nn.Module, value: Value) -> int | None:
    """Where a norm's channels stand: where its kind has them, or as many as its weight."""
    weight = getattr(module, "weight", None)
    size = len(weight) if isinstance(weight, Tensor) and weight.dim() == 1 else None
    try:
        return channel_dim(name, module)
    except ValueError:
        dims = [d for d in (value.dim, -1, 1) if d is not None and -1 <= d < len(value.shape)]
        return next((dim for dim in dims if value.shape[dim] == size), value.dim)
