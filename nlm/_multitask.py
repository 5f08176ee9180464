"""MultiTaskModel: one network that is run with the weights of the task at hand."""

import copy
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call


class TaskStates(Protocol):
    """What holds the state dict of every task: the result of :func:`nlm.merge`."""

    @property
    def tasks(self) -> Sequence[str]: ...

    def for_task(self, task: str) -> Mapping[str, Tensor]: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def replaced(self, tensors: Mapping[str, Tensor]) -> "TaskStates": ...


class CallLock:
    """A reentrant lock for a ``with`` block; a copied or unpickled one is a new, free lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["CallLock"], tuple[()]]:
        return CallLock, ()


class Wrapper(nn.Module):
    """A module around a network whose submodules a user names."""

    def inner(self) -> nn.Module:
        """The network inside."""
        raise NotImplementedError


def network_of(model: nn.Module) -> nn.Module:
    """The network inside all wrappers: the module that points are named in."""
    while isinstance(model, Wrapper):
        model = model.inner()
    return model


class MultiTaskModel(Wrapper):
    """A merged network with the head (and the mask, where there is one) of each task.

    Call it as ``model(x, task="digits")``. It starts in evaluation mode, and one call runs at a
    time: threads wait for each other. In training mode buffers that a module writes into, such as
    running statistics, are copies: the merged ones stay as they are.

    Parameters
    ----------
    network : the architecture; a copy without its weights is kept. Any expert will do.
    states : the merged weights, as :func:`nlm.merge` returns them. They are the model's state dict,
        and what ``.to()`` moves: into tensors of its own, ``states`` stays where it is.

    Attributes
    ----------
    lock : held during a call; whoever hooks ``network`` holds it from hooking to unhooking.
    """

    def __init__(self, network: nn.Module, states: TaskStates) -> None:
        super().__init__()
        self.network = _hollow(network)
        self.states = states
        self.lock = CallLock()
        self._entries = tuple(network.state_dict())
        self.eval()

    def inner(self) -> nn.Module:
        return self.network

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return tuple(self.states.tasks)

    def forward(self, *args: Any, task: str, **kwargs: Any) -> Any:
        """The network's output with the weights of one task.

        Raises
        ------
        ValueError
            The task is unknown, or the merged weights are not those of the network.
        """
        state = self._state(task)
        with nullcontext() if torch.compiler.is_compiling() else self.lock:  # traced by one thread
            if any(module.training for module in self.network.modules()):
                state |= {
                    name: state[name].clone()
                    for name, hollow in self.network.named_buffers(remove_duplicate=False)
                    if name in state and not isinstance(hollow, nn.Parameter)
                }
            return functional_call(self.network, state, args, kwargs, tie_weights=False)

    def for_task(self, task: str) -> nn.Module:
        """A plain copy of the network with the weights of one task."""
        plain = with_state(self.network, self._state(task))
        for module in plain.modules():
            for entry in list(module._buffers):
                if isinstance(module._buffers[entry], nn.Parameter):
                    module._parameters[entry] = module._buffers.pop(entry)  # type: ignore[assignment]
        for name in self._entries:
            owner, _, entry = name.rpartition(".")
            plain.get_submodule(owner)._non_persistent_buffers_set.discard(entry)
        return plain

    def _state(self, task: str) -> dict[str, Tensor]:
        state = dict(self.states.for_task(task))
        if state.keys() != set(self._entries):
            missing = [name for name in self._entries if name not in state]
            extra = [name for name in state if name not in self._entries]
            raise ValueError(
                f"nlm.MultiTaskModel: the merged weights have the network's entries, got "
                f"{', '.join(missing) or 'none'} missing and {', '.join(extra) or 'none'} extra"
            )
        return state

    # --- what nn.Module does with weights ---------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> "MultiTaskModel":
        super()._apply(lambda tensor: tensor if tensor.is_meta else fn(tensor), recurse)
        self.states = self.states.replaced({n: fn(t) for n, t in self.states.tensors().items()})
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, tensor in self.states.tensors().items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        held = self.states.tensors()
        given = {
            name.removeprefix(prefix): tensor
            for name, tensor in state_dict.items()
            if name.startswith(prefix)
        }
        missing_keys += [prefix + name for name in held if name not in given]
        if strict:
            unexpected_keys += [prefix + name for name in given if name not in held]
        for name, tensor in held.items():
            if name in given and given[name].shape != tensor.shape:
                error_msgs.append(
                    f"nlm.MultiTaskModel: a weight that is loaded has the shape of the one it "
                    f"replaces, got {list(given[name].shape)} and {list(tensor.shape)} for "
                    f"{prefix + name!r}"
                )
            elif name in given:
                held[name] = given[name].detach().to(tensor.device, tensor.dtype, copy=True)
        self.states = self.states.replaced(held)


def with_state(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network that holds the tensors of a state dict, whatever their sizes.

    Parameters keep their ``requires_grad``, and weights that several modules share stay shared
    where the state dict has equal values for them.
    """
    filled = _copy_with(network, state)
    for module in filled.modules():
        tell_sizes(module)
    return filled


def _hollow(network: nn.Module) -> nn.Module:
    """A copy whose weights are meta tensors that no state dict holds.

    Parameters stand among the buffers, marked as not persistent: so a module that contains the copy
    neither saves nor loads nor trains them. Buffers that the network itself does not save are real.
    """
    hollow = _copy_with(network, {n: t.to("meta") for n, t in network.state_dict().items()})
    for module in hollow.modules():
        for entry, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._buffers[entry] = module._parameters.pop(entry)
        module._non_persistent_buffers_set |= set(module._buffers)
    return hollow


def _copy_with(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy with other tensors in the places of a network's: its own are never copied."""
    named = [
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    ]
    new: dict[str, Tensor] = {}
    copies: dict[int, Any] = {}  # as copy.deepcopy keeps them: id -> copy
    for name, old in named:
        if name not in state:
            continue
        known = copies.get(id(old))
        if known is not None and (known.is_meta or torch.equal(known, state[name])):
            continue
        new[name] = state[name].detach().clone()
        if isinstance(old, nn.Parameter):
            new[name] = nn.Parameter(new[name], requires_grad=old.requires_grad)
        copies.setdefault(id(old), new[name])
    filled = copy.deepcopy(network, copies)
    for name, tensor in new.items():  # differs where a state dict unties what was shared
        owner, _, entry = name.rpartition(".")
        module = filled.get_submodule(owner)
        place: Any = module._parameters if entry in module._parameters else module._buffers
        place[entry] = tensor
    return filled


def tell_sizes(module: nn.Module) -> None:
    """The sizes that a module says it has, from its weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    shape = tuple(weight.shape)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        first, second = shape[0], shape[1] * module.groups
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        module.in_channels, module.out_channels = (first, second) if transposed else (second, first)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = shape[0]
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = shape[0]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = shape
    elif isinstance(getattr(module, "nf", None), int):  # transformers' Conv1D
        module.nx, module.nf = shape  # type: ignore[assignment]
