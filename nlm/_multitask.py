"""MultiTaskModel: one network that is run with the weights of the task at hand."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.func import functional_call


class TaskStates(Protocol):
    """What holds the state dict of every task: the result of :func:`nlm.merge`."""

    @property
    def tasks(self) -> Sequence[str]: ...

    def for_task(self, task: str) -> Mapping[str, Tensor]: ...


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

    Parameters
    ----------
    network : the architecture; its own weights are not used. Any expert will do.
    states : the merged weights, as :func:`nlm.merge` returns them.

    Call it as ``model(x, task="digits")``.
    """

    def __init__(self, network: nn.Module, states: TaskStates) -> None:
        super().__init__()
        self.network = network
        self.states = states

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
            The task is unknown.
        """
        state = dict(self.states.for_task(task))
        return functional_call(self.network, state, args, kwargs, strict=True)

    def for_task(self, task: str) -> nn.Module:
        """A plain copy of the network with the weights of one task."""
        return with_state(self.network, self.states.for_task(task))


def with_state(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network that holds the tensors of a state dict, whatever their sizes."""
    filled = copy.deepcopy(network)
    for name, tensor in state.items():
        owner, _, entry = name.rpartition(".")
        module = filled.get_submodule(owner)
        if entry in module._parameters:
            module._parameters[entry] = nn.Parameter(tensor.detach().clone())
        else:
            module._buffers[entry] = tensor.detach().clone()
    for module in filled.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    return filled
