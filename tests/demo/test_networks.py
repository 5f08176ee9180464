"""The two networks: their shapes, their parts, and that a seed decides their weights alone."""

import pytest
import torch
from torch import nn

from nlm.demo import cnn64, mlp512
from nlm.demo.networks import NETWORKS

IMAGES = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("make", "millions"), [(cnn64, 1.39), (mlp512, 0.92)])
@pytest.mark.parametrize("norm", [None, "batch"])
def test_shape_and_size(make, millions: float, norm: str | None) -> None:
    model = make(7, norm=norm)
    assert model(IMAGES).shape == (3, 7)
    trunk = sum(parameter.numel() for parameter in model.get_submodule("trunk").parameters())
    assert round(trunk / 1e6, 2) == millions
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(norms) == (4 if norm else 0)


def test_cnn64_layers_in_order() -> None:
    trunk = cnn64(5).get_submodule("trunk")
    assert [name for name, _ in trunk.named_children()] == [
        *("conv1", "act1", "conv2", "act2", "flatten", "fc1", "act3", "fc2", "act4")
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_seed_decides_the_weights_and_leaves_the_global_state_alone(name: str) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (NETWORKS[name](5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert not torch.equal(first.state_dict()["head.weight"], other.state_dict()["head.weight"])


def test_weights_start_at_half_of_kaiming() -> None:
    weight = cnn64(5).state_dict()["trunk.fc1.weight"]
    assert weight.std().item() == pytest.approx(0.5 * (2 / 2048) ** 0.5, rel=0.01)


def test_an_unknown_norm_is_named() -> None:
    with pytest.raises(ValueError, match=r"norm must be None or 'batch', got 'layer'"):
        cnn64(5, norm="layer")
