"""The networks of the demo: a ``trunk`` that is merged and a ``head`` that is kept per task.

Both are plain ``nn.Sequential(trunk=..., head=...)`` without normalisation by default, the case in
which merging loses most activation variance. Weights start at half of Kaiming's standard
deviation: with weight decay the trained foundations then lie far from where they began, without
which weight matching has nothing to find. Torch's global random state is left as it was.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from nlm.demo.augmentation import SIDE, stream

_INIT_GAIN = 0.5

_Layers = list[tuple[str, nn.Conv2d | nn.Linear | nn.Flatten]]


@torch.random.fork_rng(devices=[])
def cnn64(classes: int, seed: int = 0, norm: str | None = None) -> nn.Sequential:
    """Two convolutions and two linear layers on [n, 1, 16, 16]: 1.39 M parameters.

    It has all three kinds of permutable axis: convolution channels, linear features, and between
    them a flatten, where each of 128 channels owns a block of 16 inputs of ``fc1``.

    Parameters
    ----------
    classes : outputs of the head
    seed : of the initial weights
    norm : None, or "batch" for batch normalisation before each activation
    """
    block = (SIDE // 4) ** 2
    layers: _Layers = [
        ("conv1", nn.Conv2d(1, 64, 5, stride=2, padding=2)),
        ("conv2", nn.Conv2d(64, 128, 3, stride=2, padding=1)),
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(128 * block, 512)),
        ("fc2", nn.Linear(512, 512)),
    ]
    return _network(layers, 512, classes, seed, norm)


@torch.random.fork_rng(devices=[])
def mlp512(classes: int, seed: int = 0, norm: str | None = None) -> nn.Sequential:
    """Four linear layers of 512 on [n, 1, 16, 16]: 0.92 M parameters. Parameters as `cnn64`."""
    layers: _Layers = [
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(SIDE * SIDE, 512)),
        ("fc2", nn.Linear(512, 512)),
        ("fc3", nn.Linear(512, 512)),
        ("fc4", nn.Linear(512, 512)),
    ]
    return _network(layers, 512, classes, seed, norm)


NETWORKS: dict[str, Callable[..., nn.Sequential]] = {
    "cnn64": cnn64,
    "cnn64_norm": partial(cnn64, norm="batch"),
    "mlp512": mlp512,
}


def _network(
    layers: _Layers, features: int, classes: int, seed: int, norm: str | None
) -> nn.Sequential:
    """Put a norm (if any) and a ReLU after each layer with weights, and a head on top."""
    if norm not in (None, "batch"):
        raise ValueError(f"nlm.demo: norm must be None or 'batch', got {norm!r}")
    trunk: OrderedDict[str, nn.Module] = OrderedDict()
    depth = 0
    for name, layer in layers:
        trunk[name] = layer
        if isinstance(layer, nn.Flatten):
            continue
        depth += 1
        if norm == "batch":
            trunk[f"norm{depth}"] = (
                nn.BatchNorm2d(layer.out_channels)
                if isinstance(layer, nn.Conv2d)
                else nn.BatchNorm1d(layer.out_features)
            )
        trunk[f"act{depth}"] = nn.ReLU()
    head = nn.Linear(features, classes)
    model = nn.Sequential(OrderedDict(trunk=nn.Sequential(trunk), head=head))
    _initialise(model, seed)
    return model.eval()


@torch.no_grad()
def _initialise(model: nn.Sequential, seed: int) -> None:
    """Zero biases, normal weights: sd 0.5 sqrt(2 / fan_in) in the trunk, 1 / sqrt(fan_in) above."""
    generator = stream(seed, "weights")
    head = model.get_submodule("head")
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            deviation = fan_in**-0.5 if module is head else _INIT_GAIN * (2 / fan_in) ** 0.5
            module.weight.normal_(0, deviation, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
