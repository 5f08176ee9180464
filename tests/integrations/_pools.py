"""Small networks and data for the pools of a host, which it finds by name."""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(),
        nn.Linear(12, 4),
    )  # fmt: skip


def foundation(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = network()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(64, 6))
        model[1].weight.uniform_(0.5, 2.0)
        model[1].bias.normal_()
    return model.eval()


def tuned(start: nn.Module, seed: int, scale: float = 0.05) -> nn.Module:
    make = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(start)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=make)
    return model


def moved(model: nn.Module, spec, permutation) -> nn.Module:
    other = copy.deepcopy(model)
    other.load_state_dict(spec.apply(permutation, model.state_dict()))
    return other


def write(model: nn.Module, file: Path) -> None:
    save_file(model.state_dict(), file)


def read(file: str) -> nn.Module:
    model = network()
    model.load_state_dict(load_file(file))
    return model.eval()


class Samples(torch.utils.data.Dataset):
    """Inputs with labels."""

    def __init__(self, seed: int = 0, size: int = 256) -> None:
        make = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(size, 6, generator=make)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return self.inputs[place], place % 4


class Images(Samples):
    """Batches by name, as transformers' models take them."""

    def __init__(self, seed: int = 0) -> None:
        make = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(64, 3, 32, 32, generator=make)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"pixel_values": self.inputs[place]}


class Texts(Samples):
    """Token ids by name."""

    def __init__(self, seed: int = 0) -> None:
        make = torch.Generator().manual_seed(seed)
        self.inputs = torch.randint(0, 32, (64, 8), generator=make)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"input_ids": self.inputs[place]}
