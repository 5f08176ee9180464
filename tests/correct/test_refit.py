"""Refit: least squares from the network's own inputs, whatever the layers and the micro-batches."""

import copy

import numpy as np
import pytest
import torch
from _networks import convnet, images, mlp, vectors
from torch import nn
from torch.nn import functional

import nlm

TASKS = ("a", "b")


def experts(build=mlp) -> dict[str, nn.Module]:
    return {task: build(seed).double() for seed, task in enumerate(TASKS, start=1)}


def calibration(draw=vectors, count: int = 64) -> dict[str, list[torch.Tensor]]:
    return {t: [draw(count, seed).double() * (1 + seed)] for seed, t in enumerate(TASKS)}


def least_squares(x, y, start=None, bias=None, ridge=0.0, biased=True):
    """[W, b] of min |W x + b - y|^2 + lambda |W - W_0|^2 by numpy, x and y of shape [n, *]."""
    x, y = x.detach().numpy(), y.detach().numpy()
    level = ridge * (((x - x.mean(0)) if biased else x) ** 2).sum(0).mean()
    ones = np.ones((len(x), 1)) if biased else np.zeros((len(x), 0))
    design, target = np.hstack([x, ones]), y
    if ridge:
        pull = np.sqrt(level) * np.eye(x.shape[1])
        design = np.vstack([design, np.hstack([pull, np.zeros((len(pull), ones.shape[1]))])])
        target = np.vstack([y, pull @ start.detach().numpy().T])
    solved = torch.from_numpy(np.linalg.lstsq(design, target, rcond=None)[0].T)
    return solved[:, : x.shape[1]], solved[:, x.shape[1] :].flatten()


@torch.no_grad()
def test_a_network_of_its_own_experts_stays_as_it_is():
    model = mlp().double()
    data = {"a": [vectors(40).double()], "b": [vectors(40, 1).double()]}
    same = nlm.refit(model, {task: mlp().double() for task in TASKS}, data, ridge=1e-3)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], weight, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("ridge", [1e-12, 0.1])
@torch.no_grad()
def test_each_layer_is_the_least_squares_solution_from_its_own_inputs(ridge):
    model, own, data = mlp().double(), experts(), calibration()
    before = copy.deepcopy(model.state_dict())
    fitted = nlm.refit(model, own, data, ridge=ridge)
    inputs = {task: batches[0] for task, batches in data.items()}
    targets = dict(inputs)
    for place in (0, 2):
        for task in TASKS:
            targets[task] = own[task][place](targets[task])
        x, y = (torch.cat([each[t] for t in TASKS]) for each in (inputs, targets))
        weight, bias = least_squares(x, y, model[place].weight, ridge=ridge)
        torch.testing.assert_close(fitted[place].weight, weight, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(fitted[place].bias, bias, rtol=1e-7, atol=1e-8)
        for task in TASKS:
            inputs[task] = fitted[place](inputs[task]).relu()
            targets[task] = targets[task].relu()
    assert torch.equal(fitted[4].weight, model[4].weight)  # a head
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


@torch.no_grad()
def test_data_for_all_experts_give_their_mean():
    x, own = vectors(50).double(), experts()
    fitted = nlm.refit(mlp().double(), own, [x], ridge=1e-12, points="0")
    weight, bias = least_squares(x, sum(expert[0](x) for expert in own.values()) / 2)
    torch.testing.assert_close(fitted[0].weight, weight, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(fitted[0].bias, bias, rtol=1e-7, atol=1e-8)
    with_head = nlm.refit(mlp().double(), own, [x], ridge=1e-12, outputs=True)
    hidden = with_head[:4](x)
    weight, _ = least_squares(hidden, sum(expert(x) for expert in own.values()) / 2)
    mean = sum(expert(x) for expert in own.values()) / 2
    error = (with_head(x) - mean).square().mean()
    bare = nlm.refit(mlp().double(), own, [x], ridge=1e-12)
    assert error < (bare(x) - mean).square().mean()
    torch.testing.assert_close(with_head(x).mean(0), mean.mean(0))


CONVOLUTIONS = {
    "plain": (nn.Conv2d(3, 4, 3), (7, 6)),
    "strided": (nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 2)), (7, 9)),
    "dilated": (nn.Conv2d(2, 4, 3, dilation=2, padding=2, bias=False), (8, 7)),
    "same": (nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), (6, 7)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (6, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), (6, 6)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (5, 6)),
    "reflected": (nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect", stride=2), (7, 6)),
    "one tap": (nn.Conv2d(5, 3, 1), (4, 4)),
    "sequence": (nn.Conv1d(3, 4, 5, stride=2, padding=2, padding_mode="replicate"), (12,)),
    "volume": (nn.Conv3d(2, 3, (2, 3, 1), padding=(0, 1, 0)), (4, 5, 3)),
}


def responses(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What each tap of each input channel gives alone, [groups, n positions, taps]."""
    bare = copy.deepcopy(layer)
    bare.bias = None
    columns = []
    for tap in range(layer.weight[0].numel()):
        weight = torch.zeros_like(layer.weight)
        weight.flatten(1)[:, tap] = 1
        bare.weight = nn.Parameter(weight)
        found = bare(x).movedim(1, 0).unflatten(0, (layer.groups, -1))
        columns.append(found[:, 0].flatten(1))
    return torch.stack(columns, 2)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("tile", [1 << 24, 1])
@torch.no_grad()
def test_convolutions_are_solved_by_their_taps(kind, tile, monkeypatch):
    from nlm.correct import normal_equations

    monkeypatch.setattr(normal_equations, "_TILE", tile)
    layer, size = CONVOLUTIONS[kind]
    torch.manual_seed(0)
    model, expert = (nn.Sequential(copy.deepcopy(layer), nn.ReLU()).double() for _ in range(2))
    expert[0].weight.normal_()
    if layer.bias is not None:
        expert[0].bias.normal_()
    x = torch.randn(9, layer.in_channels, *size, dtype=torch.float64) + 0.5
    target = nn.Sequential(expert[0], nn.ReLU())
    noisy = copy.deepcopy(model)
    fitted = nlm.refit(noisy, {"a": target}, {"a": [x]}, ridge=0.05, points="0")[0]
    y = expert[0](x).movedim(1, 0).unflatten(0, (layer.groups, -1)).flatten(2)
    design = responses(model[0], x)
    for group in range(layer.groups):
        start = model[0].weight.chunk(layer.groups)[group].flatten(1)
        weight, bias = least_squares(
            design[group], y[group].T, start, ridge=0.05, biased=layer.bias is not None
        )
        found = fitted.weight.chunk(layer.groups)[group].flatten(1)
        torch.testing.assert_close(found, weight, rtol=1e-8, atol=1e-9)
        if layer.bias is not None:
            torch.testing.assert_close(fitted.bias.chunk(layer.groups)[group], bias)


class Residual(nn.Module):
    """Blocks that add to a stream, as transformers and residual networks do."""

    def __init__(self, seed: int, in_place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(12, 8)
        self.up, self.down = (
            nn.ModuleList(nn.Linear(*sizes) for _ in range(2)) for sizes in ((8, 16), (16, 8))
        )
        self.norm, self.dropout, self.head = nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 3)
        self.in_place = in_place

    def streams(self, x):
        """The stream behind the embedding and each block, and what each block's last layer reads"""
        found, read = [self.embed(x)], []
        for up, down in zip(self.up, self.down, strict=True):
            read.append(functional.gelu(up(self.norm(found[-1]))))
            out = self.dropout(down(read[-1]))
            if self.in_place:
                out += found[-1]
                found.append(out)
            else:
                found.append(found[-1] + out)
        return found, read

    def forward(self, x):
        return self.head(self.norm(self.streams(x)[0][-1]))


@pytest.mark.parametrize("in_place", [False, True])
@torch.no_grad()
def test_a_layer_that_writes_to_a_stream_is_fitted_to_the_sum(in_place):
    model, other = (Residual(seed, in_place).double().eval() for seed in (0, 1))
    x = vectors(60).double()
    fitted = nlm.refit(model, {"a": other}, {"a": [x]}, ridge=0.01, points="down.1")
    streams, read = model.streams(x)
    target = other.streams(x)[0][2] - streams[1]
    weight, bias = least_squares(read[1], target, model.down[1].weight, ridge=0.01)
    torch.testing.assert_close(fitted.down[1].weight, weight, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(fitted.down[1].bias, bias, rtol=1e-7, atol=1e-9)
    whole = nlm.refit(model, {"a": other}, {"a": [x]}, ridge=1e-3)
    ends = [net.streams(x)[0][2] for net in (model, whole, other)]
    assert (ends[1] - ends[2]).square().sum() < 0.2 * (ends[0] - ends[2]).square().sum()
    torch.testing.assert_close(ends[1].mean(0), ends[2].mean(0))


class Bottleneck(nn.Module):
    """Two convolutions with batch norms, added to a projection that runs last."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.project = nn.Sequential(nn.Conv2d(1, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.last, self.head = nn.BatchNorm2d(6), nn.Linear(6, 3)
        for norm in (self.bn1, self.bn2, self.project[1]):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
        self.relu = nn.ReLU(inplace=True)

    def added(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.project(x)
        return out

    def forward(self, x):
        return self.head(self.last(self.relu(self.added(x))).mean((2, 3)))


@pytest.mark.parametrize("micro_batch", [None, 7])
@torch.no_grad()
def test_batch_norms_are_part_of_their_layers(micro_batch):
    x = images(40).double()
    model, other = (Bottleneck(seed).double().eval() for seed in (0, 1))
    nlm.reset_batch_norm(other, [x])
    told = []
    fitted = nlm.refit(
        model, {"a": other}, {"a": [x]}, ridge=1e-4, micro_batch=micro_batch,
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    assert [step[0] for step in told] == ["conv1", "conv2", "project.0", "last"]
    first, target = (net.bn1(net.conv1(x)) for net in (fitted, other))
    torch.testing.assert_close(first, target, rtol=1e-2, atol=1e-2)  # same inputs, small ridge
    sums = [net.added(x) for net in (model, fitted, other)]
    torch.testing.assert_close(sums[1].mean((0, 2, 3)), sums[2].mean((0, 2, 3)))
    assert (sums[1] - sums[2]).square().sum() < 0.05 * (sums[0] - sums[2]).square().sum()
    inputs = sums[1].relu()
    torch.testing.assert_close(fitted.last.running_mean, inputs.mean((0, 2, 3)))


@torch.no_grad()
def test_a_dead_channel_of_a_batch_norm_keeps_its_weights():
    model, other = (Bottleneck(seed).double().eval() for seed in (0, 1))
    model.bn2.weight[3] = 0
    x = images(40).double()
    fitted = nlm.refit(model, {"a": other}, {"a": [x]}, ridge=0.1)
    assert torch.equal(fitted.conv2.weight[3], model.conv2.weight[3])
    assert all(tensor.isfinite().all() for tensor in fitted.state_dict().values())


@pytest.mark.parametrize(
    ("build", "draw"),
    [(mlp, vectors), (convnet, images), (Residual, vectors), (Bottleneck, images)],
)
def test_the_micro_batches_do_not_matter(build, draw):
    model, own = build(0).double(), experts(build)
    data = calibration(draw, 60)
    cut = {task: list(batches[0].split(13)) for task, batches in data.items()}
    whole = nlm.refit(model, own, data, ridge=0.01)
    for other in (
        nlm.refit(model, own, data, ridge=0.01, micro_batch=7),
        nlm.refit(model, own, cut, ridge=0.01, micro_batch=25),
    ):
        for name, weight in whole.state_dict().items():
            error = (other.state_dict()[name] - weight).abs().max()
            assert error <= 1e-9 * max(weight.abs().max(), 1), name
