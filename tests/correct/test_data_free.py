"""Inputs without data: their colours, and that a correction fitted on them helps on real ones."""

import pytest
import torch
from _networks import convnet, mlp, vectors
from torch import nn

import nlm
from nlm.correct import synthetic_inputs
from nlm.statistics import collect_moments


@pytest.mark.parametrize("flat", [False, True])
def test_the_covariance_is_that_of_the_first_layers_weights(flat):
    model = nn.Sequential(nn.Flatten(), *mlp(3)) if flat else mlp(3)
    weight = mlp(3)[0].weight.detach().double()
    [inputs] = synthetic_inputs(model, (3, 4) if flat else (12,), 40_000)
    inputs = inputs.reshape(-1, 12).double()
    expected = weight.T @ weight
    expected *= 12 / expected.trace()
    found = inputs.T @ inputs / len(inputs)
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()
    assert float(inputs.square().mean()) == pytest.approx(1, abs=1e-6)


def test_a_seed_decides_the_inputs_and_the_model_is_left_as_it_is():
    model = convnet(1).double().train()
    first, again, other = (
        synthetic_inputs(model, (1, 8, 8), 5, seed=seed)[0] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (5, 1, 8, 8) and first.dtype == torch.float64
    assert not first.requires_grad and model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_inputs_are_read_by_a_layer():
    class Learnt(nn.Module):
        """Its first layer reads a parameter, not the inputs."""

        def __init__(self) -> None:
            super().__init__()
            self.code, self.layer = nn.Parameter(torch.ones(1, 12)), nn.Linear(12, 3)

        def forward(self, x):
            return self.layer(self.code) + x.sum()

    for model, got in ((Learnt(), "one that does not in Learnt"), (nn.PReLU(), "none in PReLU")):
        with pytest.raises(ValueError, match=f"layer reads the inputs, got {got}"):
            synthetic_inputs(model, (12,))


@pytest.mark.parametrize("fit", [nlm.Tact.fit, lambda *args: nlm.Repair.fit(*args, target="union")])
def test_the_collapse_on_real_inputs_is_undone_in_part(fit):
    own = {"a": mlp(1), "b": mlp(2)}
    model = mlp(0)
    model.load_state_dict(nlm.merge(own, method="linear"))
    made = {task: synthetic_inputs(expert, (12,)) for task, expert in own.items()}
    corrected = fit(model, own, made)
    points, real = corrected.points, [vectors(256, 5)]
    for task, expert in own.items():
        aim, plain, fixed = (
            collect_moments(network, points, real)
            for network in (expert, model, corrected.fold(task))
        )
        for point in list(points)[1:]:
            off = [
                (found[point].variance / aim[point].variance).log().mean().abs()
                for found in (plain, fixed)
            ]
            assert off[1] < 0.5 * off[0], (task, point)
