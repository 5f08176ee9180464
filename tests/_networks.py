"""Small networks and data that several test files share."""

import torch
from torch import Tensor, nn

from nlm._state_dict import state_of


def merge_options(method: str, experts) -> dict:
    """What nlm.merge must be told beside the method."""
    if method.startswith(("dare", "della")):
        return {"seed": 0}
    if method != "fisher":
        return {}
    state = state_of(next(iter(experts.values())))
    return {"fishers": {task: {n: t.abs() for n, t in state.items()} for task in experts}}


def mlp(seed: int = 0, width: int = 24, classes: int = 5, features: int = 12) -> nn.Sequential:
    """Two hidden layers on [n, features]."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, classes),
    ).eval()  # fmt: skip


def convnet(seed: int = 0, classes: int = 5) -> nn.Sequential:
    """Convolutions with BatchNorm, an in-place activation, pooling and a flatten block."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(),
        nn.Linear(12 * 4, 20), nn.ReLU(), nn.Linear(20, classes),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed + 1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            with torch.no_grad():
                module.weight.uniform_(0.5, 2, generator=generator)
                module.bias.normal_(generator=generator)
    return net.eval()


def images(count: int = 32, seed: int = 0) -> Tensor:
    """[count, 1, 8, 8]."""
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def vectors(count: int = 64, seed: int = 0, features: int = 12) -> Tensor:
    """[count, features]."""
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))
