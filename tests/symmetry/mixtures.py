"""Networks of several equal modules between two linear layers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nlm.symmetry import PermutationSpec

WIDTH, HIDDEN, EXPERTS = 8, 6, 4


def expert(hidden: int = HIDDEN) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, WIDTH))


class Mixture(nn.Module):
    """``leave(x + mix(self, x))`` with x = enter(inputs), experts, a router and further modules."""

    def __init__(self, mix: Callable[["Mixture", Tensor], Tensor], **more: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(5, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))
        for name, module in more.items():
            self.add_module(name, module)
        self.leave = nn.Linear(WIDTH, 3)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x))
        return self.leave(x + self.mix(self, x))

    def gates(self, x: Tensor) -> Tensor:
        return self.router(x).softmax(-1)


def several(make: Callable[[], nn.Module], count: int = EXPERTS) -> nn.ModuleList:
    return nn.ModuleList(make() for _ in range(count))


INPUT = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))


def interchanged(spec: PermutationSpec) -> list[int]:
    """How many modules may be exchanged for one another, for each of their groups."""
    first = dict.fromkeys(spec.params[name][0] for name in spec.stacks)
    return [layout.size for layout in first if str(layout).startswith("g")]


def softmax(model: Mixture, x: Tensor) -> Tensor:
    gates = model.gates(x)
    return sum(gates[:, i : i + 1] * each(x) for i, each in enumerate(model.experts))


def branches(model: Mixture, x: Tensor) -> Tensor:
    return sum(each(x) for each in model.experts)
