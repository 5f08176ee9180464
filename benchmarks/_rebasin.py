"""One model brought into another's order, by rebasin or by nlm: the process that host_rebasin.py
times.

    python -m _rebasin rebasin|nlm NETWORK SIZE OUT
"""

import sys
from importlib import import_module
from itertools import pairwise

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

MODULES = {"rebasin": "rebasin", "nlm": "nlm.integrations.rebasin"}
#: Units of a hidden layer, channels of the first stage.
SIZES = {"tiny": (24, 4), "full": (2048, 64)}
NETWORKS = ("mlp", "vgg")
_STAGES = (1, 1, 2, 2, 4, 4, 8, 8)  # VGG11's channels, in those of the first stage


def build(network: str, size: str) -> tuple[nn.Module, Tensor]:
    """A network of random weights, and an input."""
    units, channels = SIZES[size]
    if network == "mlp":
        widths = [784, units, units, units, 10]
        layers: list[nn.Module] = []
        for one, two in pairwise(widths):
            layers += [nn.Linear(one, two), nn.ReLU()]
        return nn.Sequential(*layers[:-1]).eval(), torch.randn(2, 784)
    layers, last = [], 3
    for stage in _STAGES:
        width = stage * channels
        layers += [nn.Conv2d(last, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        last = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10)]
    return nn.Sequential(*layers).eval(), torch.randn(2, 3, 16, 16)


def main() -> None:
    program, network, size, out = sys.argv[1:]
    host = import_module(MODULES[program])
    torch.manual_seed(0)
    (model_a, x), (model_b, _) = build(network, size), build(network, size)
    if out != "-":
        host.PermutationCoordinateDescent(model_a, model_b, x).rebasin()
        state = {name: each.contiguous() for name, each in model_b.state_dict().items()}
        products = [
            float((one.detach().double() * two.detach().double()).sum())
            for one, two in zip(model_a.parameters(), model_b.parameters(), strict=True)
        ]
        save_file(state, out, {"objective": repr(sum(products))})


if __name__ == "__main__":
    main()
